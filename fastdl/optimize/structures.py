"""What modules of other libraries compute, told from their attributes, types and shapes.

A form is a guess: probe.py decides. Its `run` looks again at each call, and returns NotImplemented
where the module is no longer what it was: then the module's own forward runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import functional as F, nn as fused
from ..nn._children import is_one_of, is_plain
from ..ops.activation import BY_MODULE

Draw = Callable[..., Tensor]
Eps = str | float | None


def original_class(cls: type) -> type:
    """The class that a class with a form was made of, else the class itself."""
    return vars(cls).get("_fastdl_original", cls)


def form_of(cls: type) -> "Form | None":
    return vars(cls).get("_fastdl_form")


@dataclass(frozen=True)
class Form:
    """How a module's forward is fastdl's. Fields name its attributes."""

    # Whether where it rounds is part of what it is.
    rounds: ClassVar[bool] = False

    @property
    def op(self) -> str:
        raise NotImplementedError

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        """Arguments of a call. A size of 0 is any."""
        raise NotImplementedError

    def run(self, module: Any, *args: Any) -> Any:
        raise NotImplementedError


def _one_tensor(args: tuple[Any, ...], weight: Tensor | None) -> bool:
    """Whether a call is f(x), with x in the dtype of the weight or cast to the same by autocast."""
    return (
        len(args) == 1
        and isinstance(args[0], Tensor)
        and (weight is None or args[0].dtype == weight.dtype or _in_autocast(args[0]))
    )


def _in_autocast(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


@dataclass(frozen=True)
class Norm(Form):
    """An RMS norm over the last dimension, or with `mean` a layer norm."""

    rounds = True
    weight: str | None
    bias: str | None
    eps: Eps
    mean: bool = False
    offset: float = 0.0
    cast: str = "torch"

    @property
    def op(self) -> str:
        return "layer_norm" if self.mean else "rms_norm"

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        return (draw(2, 0, getattr(module, self.weight).shape[0] if self.weight else 16),)

    def run(self, module: Any, *args: Any) -> Any:
        weight = getattr(module, self.weight) if self.weight else None
        # what is written out is not cast by autocast
        if not _one_tensor(args, weight) or (
            _in_autocast(args[0]) and args[0].dtype != torch.float32
        ):
            return NotImplemented
        x = args[0]
        eps = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        if self.mean:
            bias = getattr(module, self.bias) if self.bias else None
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return F.rms_norm(x, x.shape[-1:], weight, eps, weight_offset=self.offset, cast=self.cast)


@dataclass(frozen=True)
class Elementwise(Form):
    """An activation as a class of its own."""

    name: str

    @property
    def op(self) -> str:
        return "activation"

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        return (draw(16, 0, 8),)

    def run(self, module: Any, *args: Any) -> Any:
        return F.activation(args[0], self.name) if _one_tensor(args, None) else NotImplemented


@dataclass(frozen=True)
class Transposed(Form):
    """A linear layer whose weight is [in, out]."""

    weight: str
    bias: str | None

    @property
    def op(self) -> str:
        return "linear"

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        return (draw(2, 0, getattr(module, self.weight).shape[0]),)

    def run(self, module: Any, *args: Any) -> Any:
        weight = getattr(module, self.weight)
        if not _one_tensor(args, weight):
            return NotImplemented
        return F.linear(args[0], weight.t(), getattr(module, self.bias) if self.bias else None)


@dataclass(frozen=True)
class Act:
    """An activation: a module or a function that stands as an attribute, or none of these, where it
    is written in forward. `name` is None for a module of torch's, whose parameters count.
    """

    attribute: str | None
    kind: Any
    name: str | None

    def of(self, module: Any) -> Any:
        """What fastdl's functions take for it; NotImplemented if it has been exchanged."""
        if self.attribute is None:
            return self.name
        found = getattr(module, self.attribute, None)
        if not isinstance(found, nn.Module):
            return self.name if found is self.kind else NotImplemented
        if not is_plain(found):
            return NotImplemented
        if self.name is None:
            return found if type(found) in BY_MODULE else NotImplemented
        return self.name if original_class(type(found)) is self.kind else NotImplemented


def linear_weight(child: Any, transposed: type | None) -> Any:
    """The weight of a linear layer as [out, in]; NotImplemented for anything else."""
    if is_one_of(child, nn.Linear, fused.Linear):
        return child.weight
    if transposed and original_class(type(child)) is transposed and is_plain(child):
        return child.weight.t()
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
    gate: Literal["first half", "second half", None] = None
    middle: str | None = None
    down: str | None = None
    end: str | None = None
    transposed: type | None = None

    @property
    def op(self) -> str:
        gated = self.gated or self.gate
        return ("gated_mlp" if gated else "mlp") if self.down else ("glu" if gated else "linear")

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        return (draw(2, 0, linear_weight(getattr(module, self.first), self.transposed).shape[1]),)

    def run(self, module: Any, *args: Any) -> Any:
        names = [name for name in (self.first, self.gated, self.down) if name]
        weights = [linear_weight(getattr(module, name), self.transposed) for name in names]
        act = self.act.of(module)
        if act is NotImplemented or not all(
            weight is not NotImplemented and _one_tensor(args, weight) for weight in weights
        ):
            return NotImplemented
        x = args[0]
        if self.gated:
            h = F.glu(
                self._linear(module, self.gated, x),
                activation=act,
                gate=self._linear(module, self.first, x),
            )
        elif self.gate:
            h = F.glu(
                self._linear(module, self.first, x),
                activation=act,
                gate_first=self.gate == "first half",
            )
        else:
            h = self._linear(module, self.first, x, act, self.middle)
        if self.middle and (self.gated or self.gate):
            h = getattr(module, self.middle)(h)
        return self._linear(module, self.down, h, None, self.end) if self.down else h

    def _linear(
        self, module: Any, name: str, x: Tensor, act: Any = None, drop: str | None = None
    ) -> Tensor:
        layer, dropout = getattr(module, name), getattr(module, drop) if drop else None
        weight = linear_weight(layer, self.transposed)
        if not is_one_of(dropout, nn.Dropout, fused.Dropout):
            y = F.linear(x, weight, layer.bias, activation=act)
            return y if dropout is None else dropout(y)
        return F.linear(
            x, weight, layer.bias,
            activation=act, dropout_p=dropout.p, training=dropout.training,
        )  # fmt: skip


@dataclass(frozen=True)
class AddNorm(Form):
    """norm(dropout(dense(x)) + residual), as BERT ends its halves of a layer."""

    dense: str
    dropout: str | None
    norm: str
    transposed: type | None = None

    @property
    def op(self) -> str:
        return "linear"

    def inputs(self, module: Any, draw: Draw) -> tuple[Tensor, ...]:
        weight = linear_weight(getattr(module, self.dense), self.transposed)
        return draw(2, 0, weight.shape[1]), draw(2, 0, weight.shape[0])

    def run(self, module: Any, *args: Any) -> Any:
        dense, norm = getattr(module, self.dense), getattr(module, self.norm)
        weight = linear_weight(dense, self.transposed)
        if (
            weight is NotImplemented
            or not is_one_of(norm, nn.LayerNorm, fused.LayerNorm)
            or not (
                len(args) == 2 and _one_tensor(args[:1], weight) and _one_tensor(args[1:], weight)
            )
        ):
            return NotImplemented
        y = F.linear(args[0], weight, dense.bias)
        y = getattr(module, self.dropout)(y) if self.dropout else y
        return F.layer_norm(
            y, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=args[1]
        )
