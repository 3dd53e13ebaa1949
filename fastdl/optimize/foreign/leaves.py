"""Modules without children: norms, activations, linear layers whose weight is transposed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...ops.activation import ACTIVATIONS
from .form import Draw, Form, Inputs, in_autocast, one_tensor

NAMES = [name for name in ACTIVATIONS if name != "none"]

Eps = str | float | None

# What may be written in a norm's forward. None is torch's own.
EPS: tuple[Eps, ...] = (1e-5, 1e-6, 1e-8, 1e-12, None)


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

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        return (draw(2, 0, getattr(module, self.weight).shape[0] if self.weight else 16),)

    def run(self, module: Any, *args: Any) -> Any:
        weight = getattr(module, self.weight) if self.weight else None
        # what is written out is not cast by autocast
        if not one_tensor(args, weight) or (
            in_autocast(args[0]) and args[0].dtype != torch.float32
        ):
            return NotImplemented
        x = args[0]
        eps: Any = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
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

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        return (draw(16, 0, 8),)

    def run(self, module: Any, *args: Any) -> Any:
        return F.activation(args[0], self.name) if one_tensor(args, None) else NotImplemented


@dataclass(frozen=True)
class Transposed(Form):
    """A linear layer whose weight is [in, out]."""

    weight: str
    bias: str | None

    @property
    def op(self) -> str:
        return "linear"

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        return (draw(2, 0, getattr(module, self.weight).shape[0]),)

    def tensors(self, module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight, as [out, in], and bias."""
        bias = getattr(module, self.bias) if self.bias else None
        return getattr(module, self.weight).t(), bias

    def run(self, module: Any, *args: Any) -> Any:
        weight, bias = self.tensors(module)
        return F.linear(args[0], weight, bias) if one_tensor(args, weight) else NotImplemented


def leaves(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Form]:
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    eps = [name for name, value in vars(module).items() if _may_be_eps(value)]
    match sorted(shapes, key=lambda name: -len(shapes[name])):
        case []:
            yield from map(Elementwise, NAMES)
            for name in eps:
                yield Norm(None, None, name)
        case [weight] if len(shapes[weight]) == 1:
            for value in eps or EPS:
                for offset, cast in product((0.0, 1.0), ("torch", "llama")):
                    yield Norm(weight, None, value, offset=offset, cast=cast)
                if value is not None:
                    yield Norm(weight, None, value, mean=True)
        case [a, b] if len(shapes[a]) == 1 and shapes[a] == shapes[b]:
            for value, (weight, bias) in product(eps or EPS[:-1], ((a, b), (b, a))):
                yield Norm(weight, bias, value, mean=True)
        case [weight, *bias] if len(shapes[weight]) == 2:
            if all(shapes[name] == shapes[weight][1:] for name in bias):
                yield Transposed(weight, bias[0] if bias else None)


def _may_be_eps(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1e-2
