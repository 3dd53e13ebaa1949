"""What norms of channels share: how a tensor is seen, their configurations and launches, and what
torch does after them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import differentiating, gradients, second_derivative
from ._rows import dense
from .activation import (
    Activations,
    activation as apply_activation,
    apply_definition,
    at_output,
    same_layout,
)

GROUPNORM_FWD = Kernel("groupnorm.groupnorm_fwd")
GROUPNORM_BWD = Kernel("groupnorm.groupnorm_bwd")
CHANNELNORM_MOMENTS = Kernel("channelnorm.channelnorm_moments")
CHANNELNORM_MERGE = Kernel("channelnorm.channelnorm_merge")
CHANNELNORM_FWD = Kernel("channelnorm.channelnorm_fwd")
CHANNELNORM_AFFINE = Kernel("channelnorm.channelnorm_affine")
CHANNELNORM_SUMS = Kernel("channelnorm.channelnorm_sums")
CHANNELNORM_MERGE_SUMS = Kernel("channelnorm.channelnorm_merge_sums")
CHANNELNORM_DX = Kernel("channelnorm.channelnorm_dx")

Act = tuple[str, float, float]
NO_ACT: Act = ("none", 0.0, 0.0)


@dataclass(frozen=True)
class Shape:
    """A tensor as [samples, channels, pixels], and which of it has a mean of its own: a group of
    channels of a sample, or ("pooled") of all samples.
    """

    samples: int
    channels: int
    pixels: int
    last: bool  # whether channels lie side by side, else pixels do
    groups: int
    pooled: bool

    @property
    def strides(self) -> tuple[int, int, int]:
        each = self.channels * self.pixels
        return (each, 1, self.channels) if self.last else (each, self.pixels, 1)

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def n_stats(self) -> int:
        return self.groups if self.pooled else self.samples * self.groups

    @property
    def stat_n(self) -> int:
        return 0 if self.pooled else self.groups

    @property
    def count(self) -> float:
        """The elements of a statistic."""
        return float(self.samples * self.channels * self.pixels // self.n_stats)

    @property
    def sums(self) -> int:
        """The channels that are summed apart."""
        return self.channels if self.pooled else self.samples * self.channels


def _channels_last(x: Tensor) -> bool:
    """Whether channels lie side by side. A single pixel counts as such."""
    step = 1
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[dim] != 1 and x.stride(dim) != step:
            return False
        step *= x.shape[dim]
    return True


def shape_of(x: Tensor, groups: int, pooled: bool) -> Shape:
    """The shape of a tensor that `arranged` returned."""
    samples, channels, *rest = x.shape
    pixels, last = math.prod(rest), _channels_last(x)
    if pooled and last:
        samples, pixels = 1, samples * pixels
    return Shape(samples, channels, pixels, last, groups, pooled)


def arranged(x: Tensor) -> Tensor:
    """x in one of the two layouts, as it is where it can be."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


class Output:
    """A tensor like x that kernels fill in the layout of `arranged(x)`, if anybody wants it."""

    def __init__(self, x: Tensor, rows: Tensor, wanted: bool = True) -> None:
        self._result = torch.empty_like(x) if wanted else None
        fits = self._result is None or self._result.stride() == rows.stride()
        self.written: Any = self._result if fits else torch.empty_like(rows)

    def get(self) -> Any:
        if self._result is not None and self.written is not self._result:
            self._result.copy_(self.written)
        return self._result


class Factors(NamedTuple):
    """Weight and bias of the channels; scale and shift, as [samples, channels]."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def prepared(self) -> "Factors":
        return Factors(dense(self.weight), dense(self.bias), self.scale, self.shift)

    @property
    def strides(self) -> tuple[int, ...]:
        return (*_strides(self.scale), *_strides(self.shift))


def _strides(factor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if factor is None else (factor.stride(0), factor.stride(1))


class Moments(NamedTuple):
    """Mean and variance, in the order of the statistics; `given` ones do not depend on x."""

    mean: Tensor
    var: Tensor
    given: bool = False
    unbiased: Tensor | None = None


@functools.lru_cache(maxsize=1024)
def choose_whole(shape: Shape, device: Device, backward: bool) -> Config | None:
    """Tiles of whole groups where these fit in registers, and where there are enough of them.

    A thread has 16 to 32 elements, of which backward holds two.
    """
    small = device.backend == "interpreter"
    channels, pixels = power_of_2(shape.group_channels), power_of_2(shape.pixels)
    limit = (128 if small else 16384) // (2 if backward else 1)
    if shape.last or shape.pooled or channels * pixels > limit or 8 * shape.n_stats < device.sms:
        return None
    # several small groups a program, while every processor has one
    rows = min(limit // 4 // (channels * pixels), shape.n_stats // device.sms, 16)
    rows = power_of_2(rows + 1) // 2 if rows > 1 else 1
    warps = min(max(rows * channels * pixels // 512, 1), 16)
    return Config({"ROWS": rows, "BLOCK_C": channels, "BLOCK_P": pixels}, warps, 1, "whole")


@functools.lru_cache(maxsize=1024)
def choose_tiles(shape: Shape, device: Device) -> Config:
    """Tiles as long as may be in the direction in which elements lie side by side: 128 bytes of
    16-bit channels, or all of the pixels. A thread has 16 bytes of 16-bit elements: the addresses
    of more, where lines begin anywhere, do not fit in registers.
    """
    small = device.backend == "interpreter"
    area = 256 if small else 2048
    if shape.last:
        channels = min(power_of_2(shape.channels), 16 if small else 64)
        return Config({"BLOCK_C": channels, "BLOCK_P": area // channels}, 8, 1, "tiles")
    pixels = min(power_of_2(shape.pixels), area)
    channels = min(area // pixels, power_of_2(shape.channels))
    return Config({"BLOCK_C": channels, "BLOCK_P": pixels}, 8, 1, "tiles")


class Split(NamedTuple):
    """How pixels are shared out: so many a program, and where its part of a statistic is put."""

    splits: int
    chunk: int
    part_n: int
    part_c: int
    n_parts: int


def split(shape: Shape, config: Config, device: Device) -> Split:
    """A few programs for each processor, with whole tiles."""
    blocks = cdiv(shape.pixels, config["BLOCK_P"])
    programs = (4 if device.backend == "interpreter" else 8) * device.sms
    splits = max(1, min(blocks, programs // _columns(shape, config)))
    chunk = cdiv(blocks, splits) * config["BLOCK_P"]
    splits = cdiv(shape.pixels, chunk)
    if shape.pooled:
        part_n, part_c = splits, shape.samples * splits
    else:
        part_n, part_c = shape.channels * splits, splits
    return Split(splits, chunk, part_n, part_c, shape.samples * shape.channels * splits)


def _columns(shape: Shape, config: Config) -> int:
    """Programs that share no pixels."""
    return shape.samples * cdiv(shape.channels, config["BLOCK_C"])


def _merging(device: Device, channels: int, parts: int) -> Config:
    area = 16 if device.backend == "interpreter" else 1024
    block = min(power_of_2(parts), area)
    return Config({"BLOCK_C": min(power_of_2(channels), area // block), "BLOCK": block}, 4, 1)


def launch_moments(x: Tensor, shape: Shape, out: Moments) -> None:
    """Fill mean and variance."""
    device = device_of(x)
    config = choose_tiles(shape, device)
    plan = split(shape, config, device)
    parts = x.new_empty((2, plan.n_parts), dtype=torch.float32)
    launch(
        CHANNELNORM_MOMENTS, (_columns(shape, config) * plan.splits,),
        x, parts, shape.channels, shape.pixels, *shape.strides, *plan, config=config,
    )  # fmt: skip
    each = plan.n_parts // shape.n_stats
    merging = _merging(device, 1, each)
    launch(
        CHANNELNORM_MERGE, (shape.n_stats,), parts, out.mean, out.var, out.unbiased,
        shape.pixels, plan.splits, plan.chunk, each, plan.n_parts, shape.count,
        config=Config({"BLOCK": merging["BLOCK"]}, 4, 1),
    )  # fmt: skip


def launch_forward(
    x: Tensor, residual: Tensor | None, factors: Factors, moments: Moments, eps: float, act: Act,
    groups: int, pooled: bool = False,
) -> Tensor:  # fmt: skip
    """y. Fills mean and variance unless they are given."""
    rows = arranged(x)
    y = Output(x, rows)
    residual = None if residual is None else same_layout(residual, rows)
    shape = shape_of(rows, groups, pooled)
    config = choose_whole(shape, device_of(x), False)
    if config is not None and not moments.given:
        _launch_whole_forward(
            rows, residual, factors.prepared(), y.written, moments, eps, act, shape, config
        )
        return y.get()
    if not moments.given:
        launch_moments(rows, shape, moments)
    _launch_tiles(rows, residual, factors.prepared(), y.written, moments, eps, act, shape)
    return y.get()


def _launch_whole_forward(
    x: Tensor, residual: Tensor | None, factors: Factors, y: Any, moments: Moments, eps: float,
    act: Act, shape: Shape, config: Config,
) -> None:  # fmt: skip
    name, a, b = act
    launch(
        GROUPNORM_FWD, (cdiv(shape.n_stats, config["ROWS"]),),
        x, residual, *factors, y, moments.mean, moments.var,
        shape.n_stats, shape.groups, shape.group_channels, shape.pixels, *factors.strides,
        eps, a, b, ACT=name, config=config,
    )  # fmt: skip


def _launch_tiles(
    x: Tensor, residual: Tensor | None, factors: Factors, y: Any, moments: Moments, eps: float,
    act: Act, shape: Shape,
) -> None:  # fmt: skip
    name, a, b = act
    config = choose_tiles(shape, device_of(x))
    blocks = cdiv(shape.pixels, config["BLOCK_P"])
    launch(
        CHANNELNORM_FWD, (_columns(shape, config) * blocks,),
        x, residual, *factors, moments.mean, moments.var, y,
        shape.channels, shape.pixels, *shape.strides, blocks, shape.stat_n, shape.group_channels,
        *factors.strides, eps, a, b, ACT=name, config=config,
    )  # fmt: skip


def launch_affine(
    factors: Factors, mean: Tensor, var: Tensor, before: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """scale and shift, in float32: the norm of x + before is x scale + shift."""
    n, device = mean.shape[0], device_of(mean)
    out = mean.new_empty((2, n), dtype=torch.float32)
    config = Config({"BLOCK": 16 if device.backend == "interpreter" else 256}, 1, 1)
    given = (factors.weight, factors.bias, mean, var, before)
    launch(
        CHANNELNORM_AFFINE, (cdiv(n, config["BLOCK"]),),
        *map(dense, given), out,
        n, eps, config=config,
    )  # fmt: skip
    return out[0], out[1]


class Given(NamedTuple):
    """What backward computes gradients of: dy, x, and what the activation's derivative is taken at,
    the residual or ("from y") the output.
    """

    dy: Tensor
    x: Tensor
    z: Tensor | None
    from_y: bool
    factors: Factors
    moments: Moments
    eps: float
    act: Act
    shape: Shape


def launch_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, from_y: bool, factors: Factors, moments: Moments,
    eps: float, act: Act, needs: Sequence[bool], groups: int, pooled: bool = False,
) -> tuple[Any, Any, Tensor | None]:  # fmt: skip
    """dx, g, the gradient before the activation, and the sums of g and of g x_hat of every channel:
    [2, channels], of each sample unless it is pooled. Each if it is needed, else None.
    """
    rows = arranged(x)
    dx, g = Output(x, rows, needs[0]), Output(x, rows, needs[1])
    given = Given(
        same_layout(dy, rows), rows, None if z is None else same_layout(z, rows), from_y,
        factors.prepared(), moments, eps, act, shape_of(rows, groups, pooled),
    )  # fmt: skip
    config = choose_whole(given.shape, device_of(x), True)
    if config is not None and not moments.given:
        sums = _launch_whole(given, dx.written, g.written, any(needs[2:]), config)
    else:
        sums = _launch_parts(given, dx.written, g.written, any(needs[2:]))
    return dx.get(), g.get(), sums


def _launch_parts(
    given: Given, dx: Tensor | None, g: Tensor | None, need_sums: bool
) -> Tensor | None:
    """One pass for sums where they are needed, also by dx, and one for dx."""
    sums = means = None
    need_means = dx is not None and not given.moments.given
    if need_sums or need_means:
        sums, means = _launch_sums(given, g, need_means)
        if g is not None:
            given, g = given._replace(dy=g, z=None, from_y=False, act=NO_ACT), None
    if dx is not None or g is not None:
        _launch_dx(given, means, dx, g)
    return sums


def _launch_whole(
    given: Given, dx: Tensor | None, g: Tensor | None, need_sums: bool, config: Config
) -> Tensor | None:
    shape, factors, (name, a, b) = given.shape, given.factors, given.act
    sums = given.x.new_empty((2, shape.sums), dtype=torch.float32) if need_sums else None
    launch(
        GROUPNORM_BWD, (cdiv(shape.n_stats, config["ROWS"]),),
        given.dy, given.x, given.z, *factors, given.moments.mean, given.moments.var, dx, g, sums,
        shape.n_stats, shape.groups, shape.group_channels, shape.pixels, *factors.strides,
        given.eps, a, b, ACT=name, FROM_Y=given.from_y, config=config,
    )  # fmt: skip
    return sums


def _launch_sums(given: Given, g: Tensor | None, need_means: bool) -> tuple[Tensor, Tensor | None]:
    x, shape, factors, (name, a, b) = given.x, given.shape, given.factors, given.act
    device = device_of(x)
    config = choose_tiles(shape, device)
    plan = split(shape, config, device)
    parts = x.new_empty((2, plan.n_parts), dtype=torch.float32)
    launch(
        CHANNELNORM_SUMS, (_columns(shape, config) * plan.splits,),
        given.dy, x, given.z, *factors, given.moments.mean, given.moments.var, g, parts,
        shape.channels, shape.pixels, *shape.strides, *plan, shape.stat_n, shape.group_channels,
        *factors.strides, given.eps, a, b, ACT=name, FROM_Y=given.from_y, config=config,
    )  # fmt: skip
    sums = x.new_empty((2, shape.sums), dtype=torch.float32)
    means = x.new_empty((2, shape.n_stats), dtype=torch.float32) if need_means else None
    each = plan.n_parts // shape.sums
    launch(
        CHANNELNORM_MERGE_SUMS, (shape.n_stats,),
        parts, factors.weight, factors.scale, sums, means,
        shape.groups, shape.group_channels, each, plan.n_parts, shape.sums, shape.n_stats,
        *_strides(factors.scale), shape.count,
        config=_merging(device, shape.group_channels, each),
    )  # fmt: skip
    return sums, means


def _launch_dx(given: Given, means: Tensor | None, dx: Tensor | None, g: Tensor | None) -> None:
    x, shape, factors, (name, a, b) = given.x, given.shape, given.factors, given.act
    config = choose_tiles(shape, device_of(x))
    blocks = cdiv(shape.pixels, config["BLOCK_P"])
    launch(
        CHANNELNORM_DX, (_columns(shape, config) * blocks,),
        given.dy, x, given.z, *factors, given.moments.mean, given.moments.var, means, dx, g,
        shape.channels, shape.pixels, *shape.strides, blocks, shape.stat_n, shape.group_channels,
        shape.n_stats, *factors.strides, given.eps, a, b,
        ACT=name, FROM_Y=given.from_y, config=config,
    )  # fmt: skip


def kept(y: Tensor, residual: Tensor | None, name: str, a: float) -> tuple[Tensor | None, bool]:
    """What backward needs besides x for the derivative of the activation, and whether it is y."""
    if name == "none" or residual is None:
        return None, False
    # rounding may move y on to a bound of hardtanh, where the derivative is another
    from_y = at_output(name, a) and name != "hardtanh"
    return (y if from_y else residual), from_y


def of_definition(
    definition: Callable[..., Any], x: Tensor, z: Tensor | None, from_y: bool, rest: Sequence[Any],
    dy: Tensor, needs: Sequence[bool], differentiate: Callable[..., Any] = gradients,
    create_graph: bool = False,
) -> Any:  # fmt: skip
    """Gradients of definition(x, residual, *rest), the last three of which are the activation. z is
    the residual, or ("from y") the output: then the derivative of the activation is taken there.
    """
    if not from_y:
        return tuple(differentiate(definition, (x, z, *rest), dy, needs)[: len(needs)])
    *before, name, a, b = rest
    g = gradients(apply_definition, (z, name, a, b), dy, [True], create_graph)[0]
    others = [needs[0], False, *needs[2:]]
    found = [None] * len(needs)
    if any(others):
        found = differentiate(definition, (x, None, *before, *NO_ACT), g, others)[: len(needs)]
    return found[0], g if needs[1] else None, *found[2:]


def backward(
    op: str, definition: Callable[..., Any], x: Tensor, z: Tensor | None, from_y: bool,
    rest: Sequence[Any], dy: Tensor, needs: Sequence[bool],
    run: Callable[[list[bool]], Sequence[Tensor]],
) -> Any:  # fmt: skip
    """Gradients of x, the residual and the factors: `run` computes those that are needed, and
    where backward is itself being differentiated, `of_definition` does.
    """
    # without an activation that of the residual is dy itself
    passes = needs[1] and rest[-3] == "none"
    needs = [needs[0], needs[1] and not passes, *needs[2:]]
    grads: Sequence[Any] = [None] * len(needs)
    if any(needs) and differentiating():
        differentiate = partial(second_derivative, op)
        grads = of_definition(definition, x, z, from_y, rest, dy, needs, differentiate, True)
    elif any(needs):
        grads = run(needs)
    return grads[0], dy if passes else grads[1], *grads[2:]


def finish(y: Tensor, residual: Tensor | None, activation: Activations) -> Tensor:
    """act(y + residual), in torch where the kernels could not."""
    return apply_activation(y if residual is None else y + residual, activation)


def check_factors(op: str, input: Tensor, **factors: Tensor | None) -> None:
    """Raise where one of these is not one number a channel, or on another device."""
    for name, factor in factors.items():
        if factor is None:
            continue
        if tuple(factor.shape) != tuple(input.shape[1:2]):
            raise RuntimeError(
                f"{op}: input is {tuple(input.shape)}, {name} is {tuple(factor.shape)};"
                " allowed are input (N, C, ...) and one number a channel, (C,)"
            )
        if factor.device != input.device:
            raise RuntimeError(
                f"{op}: input is on {input.device}, {name} on {factor.device}; they must match"
            )
