"""Blocks of image networks and diffusion models, told by the names of their parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

from ... import functional as F
from ...nn._children import is_one_of
from ...nn.conv import run_conv
from ...nn.norm import run_group_norm
from .form import Act, Draw, Form, Inputs, in_autocast, parameters
from .parts import KINDS, Parts


@dataclass(frozen=True)
class Residual(Form):
    """act(norm(conv(... act(norm(conv(x))))) + shortcut(x)): the blocks of ResNets."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    act: Act
    shortcut: str | None

    @property
    def op(self) -> str:
        return "conv2d"

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        return (draw(2, getattr(module, self.convs[0]).in_channels, 6, 6),)

    def run(self, module: Any, *args: Any) -> Any:
        act, pairs = self.act.of(module), self._pairs(module)
        if act is NotImplemented or pairs is None or len(args) != 1:
            return NotImplemented
        h = args[0]
        for conv, norm in pairs[:-1]:
            h = run_conv(h, conv, act, norm)
        shortcut = getattr(module, self.shortcut) if self.shortcut else None
        residual = args[0] if shortcut is None else shortcut(args[0])
        conv, norm = pairs[-1]
        return run_conv(h, conv, act, norm, residual)

    def _pairs(self, module: Any) -> list[tuple[Any, Any]] | None:
        pairs = [
            (getattr(module, conv, None), getattr(module, norm, None))
            for conv, norm in zip(self.convs, self.norms, strict=True)
        ]
        known = all(
            is_one_of(c, *KINDS["convs"]) and is_one_of(n, *KINDS["batch_norms"]) for c, n in pairs
        )
        return pairs if known else None


@dataclass(frozen=True)
class Timed(Form):
    """The residual block of diffusion models: twice a group norm with activation and a convolution,
    with the time added between them, or as scale and shift of the second norm.
    """

    norms: tuple[str, ...]
    convs: tuple[str, ...]
    act: Act
    time: str | None
    dropout: str | None
    shortcut: str | None
    resample: str | None
    scales: bool
    divisor: str | None

    @property
    def op(self) -> str:
        return "group_norm"

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        x = draw(2, getattr(module, self.convs[0]).in_channels, 4, 4)
        time = draw(2, getattr(module, self.time).in_features) if self.time else None
        return x, *[time, None, None][: len(parameters(type(module))) - 1]

    def run(self, module: Any, *args: Any) -> Any:
        norms = [getattr(module, name, None) for name in self.norms]
        convs = [getattr(module, name, None) for name in self.convs]
        act = self.act.of(module)
        x, time, *rest = (*args, None)
        if (
            act is NotImplemented
            or not all(is_one_of(norm, *KINDS["group_norms"]) for norm in norms)
            or not all(is_one_of(conv, *KINDS["convs"]) for conv in convs)
            or (time is None) != (self.time is None)
            or any(value is not None for value in rest)
        ):
            return NotImplemented
        h = run_group_norm(x, norms[0], act)
        if self.resample:
            resample = getattr(module, self.resample)
            x, h = resample(x), resample(h)
        h = run_conv(h, convs[0])
        scale = shift = None
        if self.time:
            time = getattr(module, self.time)(F.activation(time, act))[:, :, None, None]
            if self.scales:
                scale, shift = time.chunk(2, dim=1)
            else:
                h = h + time
        h = run_group_norm(h, norms[1], act, scale, shift)
        h = getattr(module, self.dropout)(h) if self.dropout else h
        x = getattr(module, self.shortcut)(x) if self.shortcut else x
        divisor = getattr(module, self.divisor) if self.divisor else 1.0
        h = run_conv(h, convs[1], residual=x)
        return h if divisor == 1.0 else h / divisor


@dataclass(frozen=True)
class Adaptive(Form):
    """norm(x) (1 + scale) + shift, where linear(act(condition)) gives scale, shift and the rest
    that is returned with it: adaptive layer norms.
    """

    act: Act
    linear: str
    norm: str
    # the argument that is the condition, after x
    position: int
    parts: int
    shift_first: bool

    @property
    def op(self) -> str:
        return "layer_norm"

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        width = getattr(module, self.norm).normalized_shape[0]
        condition = draw(2, getattr(module, self.linear).in_features)
        return draw(2, 0, width), *[None] * self.position, condition

    def run(self, module: Any, *args: Any) -> Any:
        act: Any = self.act.of(module)
        norm: Any = getattr(module, self.norm, None)
        x, *rest = args
        given = [value for value in rest[self.position :] if value is not None]
        if (
            act is NotImplemented
            or not is_one_of(norm, *KINDS["layer_norms"])
            or len(given) != 1
            or any(value is not None for value in rest[: self.position])
            or not isinstance(given[0], Tensor)
            or in_autocast(x)
            or given[0].dtype != x.dtype
        ):
            return NotImplemented
        parts = getattr(module, self.linear)(F.activation(given[0], act)).chunk(self.parts, dim=1)
        shift, scale = parts[:2] if self.shift_first else parts[1::-1]
        y = F.layer_norm(
            x, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
            scale=scale[:, None], shift=shift[:, None],
        )  # fmt: skip
        return (y, *parts[2:]) if len(parts) > 2 else y


def blocks(module: Any, parts: Parts) -> Iterator[Form]:
    """What blocks the parts of a module may be."""
    if len(parts.others) < 2:
        if parts.only("convs", "batch_norms", "others"):
            yield from _residual(parts)
        if parts.only("convs", "group_norms", "linears", "drops", "others"):
            yield from _timed(module, parts)
    if parts.only("linears", "layer_norms"):
        yield from _adaptive(module, parts)


def _one(names: list[str]) -> str | None:
    return names[0] if names else None


def _residual(parts: Parts) -> Iterator[Form]:
    convs, norms = tuple(parts.convs), tuple(parts.batch_norms)
    if len(convs) == len(norms) > 1:
        yield from (Residual(convs, norms, act, _one(parts.others)) for act in parts.acts)


def _timed(module: nn.Module, parts: Parts) -> Iterator[Form]:
    if len(parts.group_norms) != 2 or len(parts.convs) not in (2, 3):
        return
    if len(parts.linears) > 1 or len(parts.drops) > 1:
        return
    norms, convs = tuple(parts.group_norms), tuple(parts.convs[:2])
    floats = [name for name, value in vars(module).items() if isinstance(value, float)]
    for act, scales, divisor in product(parts.acts, (False, True), [*floats, None]):
        yield Timed(
            norms, convs, act, _one(parts.linears), _one(parts.drops), _one(parts.convs[2:]),
            _one(parts.others), scales, divisor,
        )  # fmt: skip


def _adaptive(module: Any, parts: Parts) -> Iterator[Form]:
    if not len(parts.linears) == len(parts.layer_norms) == 1:
        return
    linear, norm = parts.linears[0], parts.layer_norms[0]
    outputs, width = getattr(module, linear).out_features, getattr(module, norm).normalized_shape[0]
    if outputs >= 2 * width and outputs % width == 0:
        positions = range(len(parameters(type(module))) - 1)
        for act, position, first in product(parts.acts, positions, (True, False)):
            yield Adaptive(act, linear, norm, position, outputs // width, first)
