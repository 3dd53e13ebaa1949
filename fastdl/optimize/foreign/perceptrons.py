"""Perceptrons: linear layers with what stands around them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any, Literal

from torch import Tensor, nn

from ... import functional as F, nn as fused
from ...nn._children import is_one_of, is_plain
from .form import Act, Draw, Form, Inputs, one_tensor, original_class
from .leaves import Transposed
from .parts import KINDS, Parts

Gate = Literal["first half", "second half", None]


# A class of linear layers whose weight is [in, out], with its form.
Other = tuple[type, Transposed] | None


def linear_tensors(child: Any, other: Other) -> Any:
    """Weight, as [out, in], and bias of a linear layer; NotImplemented for anything else."""
    if is_one_of(child, *KINDS["linears"]):
        return child.weight, child.bias
    if other and original_class(type(child)) is other[0] and is_plain(child):
        return other[1].tensors(child)
    return NotImplemented


@dataclass(frozen=True)
class Perceptron(Form):
    """dropout(down(dropout(act(first(x))))), each part but `first` optional, with a gate beside
    `first` or in it.
    """

    first: str
    act: Act
    # the layer that `act(first(x))` gates
    gated: str | None = None
    # where one layer holds both: which half is the gate
    gate: Gate = None
    middle: str | None = None
    down: str | None = None
    end: str | None = None
    transposed: Other = None

    @property
    def op(self) -> str:
        gated = self.gated or self.gate
        return ("gated_mlp" if gated else "mlp") if self.down else ("glu" if gated else "linear")

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        weight, _ = linear_tensors(getattr(module, self.first), self.transposed)
        return (draw(2, 0, weight.shape[1]),)

    def run(self, module: Any, *args: Any) -> Any:
        names = [name for name in (self.first, self.gated, self.down) if name]
        layers = [linear_tensors(getattr(module, name), self.transposed) for name in names]
        act = self.act.of(module)
        if act is NotImplemented or not all(
            layer is not NotImplemented and one_tensor(args, layer[0]) for layer in layers
        ):
            return NotImplemented
        x = args[0]
        if not (self.gated or self.gate):
            h = self._linear(module, self.first, x, act, self.middle)
        else:
            gate = self._linear(module, self.first, x)
            if self.gated:
                h = F.glu(self._linear(module, self.gated, x), activation=act, gate=gate)
            else:
                h = F.glu(gate, activation=act, gate_first=self.gate == "first half")
            h = getattr(module, self.middle)(h) if self.middle else h
        return self._linear(module, self.down, h, None, self.end) if self.down else h

    def _linear(
        self, module: Any, name: str, x: Tensor, act: Any = None, drop: str | None = None
    ) -> Tensor:
        weight, bias = linear_tensors(getattr(module, name), self.transposed)
        dropout: Any = getattr(module, drop) if drop else None
        if is_one_of(dropout, nn.Dropout, fused.Dropout):
            p, training = dropout.p, dropout.training
            return F.linear(x, weight, bias, activation=act, dropout_p=p, training=training)
        y = F.linear(x, weight, bias, activation=act)
        return y if dropout is None else dropout(y)


@dataclass(frozen=True)
class AddNorm(Form):
    """norm(dropout(dense(x)) + residual), as BERT ends its halves of a layer."""

    dense: str
    dropout: str | None
    norm: str
    transposed: Other = None

    @property
    def op(self) -> str:
        return "linear"

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        weight, _ = linear_tensors(getattr(module, self.dense), self.transposed)
        return draw(2, 0, weight.shape[1]), draw(2, 0, weight.shape[0])

    def run(self, module: Any, *args: Any) -> Any:
        layer = linear_tensors(getattr(module, self.dense), self.transposed)
        norm: Any = getattr(module, self.norm)
        if (
            layer is NotImplemented
            or not is_one_of(norm, *KINDS["layer_norms"])
            or len(args) != 2
            or not all(one_tensor((arg,), layer[0]) for arg in args)
        ):
            return NotImplemented
        y = F.linear(args[0], *layer)
        y = getattr(module, self.dropout)(y) if self.dropout else y
        return F.layer_norm(
            y, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=args[1]
        )


def perceptrons(parts: Parts) -> Iterator[Form]:
    """Every way to put the parts together. Those whose shapes do not fit fail the probe."""
    if not parts.only("linears", "drops", "layer_norms") or len(parts.linears) > 3:
        return
    if len(parts.linears) == len(parts.layer_norms) == 1 and len(parts.drops) < 2:
        drop = parts.drops[0] if parts.drops else None
        yield AddNorm(parts.linears[0], drop, parts.layer_norms[0], parts.transposed)
    between = {*parts.drops, *parts.layer_norms}
    for middle, end in product([None, *sorted(between)], repeat=2):
        if {middle, end} - {None} == between:
            for act in parts.acts:
                yield from _arranged(parts, act, middle, end)


def _arranged(parts: Parts, act: Act, middle: str | None, end: str | None) -> Iterator[Form]:
    make = partial(Perceptron, transposed=parts.transposed, middle=middle, end=end)
    gates: tuple[Gate, ...] = (None, "first half", "second half")
    match parts.linears:
        case [first] if end is None:
            yield from (make(first, act, gate=gate) for gate in gates)
        case [_, _]:
            for (first, down), gate in product(permutations(parts.linears), gates):
                yield make(first, act, gate=gate, down=down)
        case [_, _, _]:
            for first, gated, down in permutations(parts.linears):
                yield make(first, act, gated, down=down)
