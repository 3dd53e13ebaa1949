"""Convolutions on tensors of four dimensions: who computes them, blocks and launches."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _tuned
from ._finish import Extent, launch_backward, launch_finish, tile_of
from ._launch import Config, Kernel, cdiv, device_of, launch
from .activation import same_layout
from .linear import Finish, fitting, product

CONV_FWD = Kernel("conv.conv_fwd")
DEPTHWISE_FWD = Kernel("conv.depthwise_fwd")

# torch's convolution, finished by one pass over it.
VENDOR = Config({}, variant="vendor")
DEPTHWISE = Config({}, variant="depthwise")
# A product of what lies at each position, on the kernels of linear.
POINTWISE = Config({}, variant="pointwise")

# Offsets inside of an image are 32-bit.
FAR = 2**31


class Geometry(NamedTuple):
    """The options of torch.convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def flat(self) -> "Geometry":
        """In two dimensions, of which the first may be 1."""
        if len(self.stride) == 2:
            return self
        return Geometry(
            [1, *self.stride], [0, *self.padding], [1, *self.dilation],
            self.transposed, [0, *self.output_padding], self.groups,
        )  # fmt: skip

    def output_shape(self, x: Tensor, weight: Tensor) -> list[Any]:
        sizes = zip(x.shape[2:], weight.shape[2:], *self[:3], self.output_padding, strict=True)
        if self.transposed:
            extents = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in sizes]
            return [x.shape[0], weight.shape[1] * self.groups, *extents]
        extents = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in sizes]
        return [x.shape[0], weight.shape[0], *extents]


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and suggest_memory_format(x) == torch.channels_last


def are_last(x: Tensor, weight: Tensor) -> bool:
    """Whether torch puts channels last in the output, and in the gradients."""
    return is_channels_last(x) or is_channels_last(weight)


def allocate(like: Tensor, shape: Sequence[Any], last: bool) -> Tensor:
    if not last:
        return like.new_empty(shape)
    n, c, h, w = shape
    return like.new_empty((n, h, w, c)).permute(0, 3, 1, 2)


def arranged(t: Tensor, last: bool) -> Tensor:
    """In the memory format, and with the very strides, of what `allocate` gives."""
    if not last:
        t = t.contiguous()
        return t.view(t.shape)
    n, c, h, w = t.shape
    return t.permute(0, 2, 3, 1).contiguous().view(n, h, w, c).permute(0, 3, 1, 2)


def extent_of(y: Tensor) -> Extent:
    n, c, *sizes = y.shape
    return Extent(n, math.prod(sizes), c, planes=y.stride(1) != 1)


def tf32() -> bool:
    backends: Any = torch.backends.cudnn  # its stub lacks `conv`
    return bool(backends.conv.fp32_precision == "tf32")


def choose(x: Tensor, weight: Tensor, y_shape: Any, geometry: Geometry, last: bool) -> Config:
    """Who computes a convolution in two dimensions: a measured choice, else a rule. `last` says
    whether the output has its channels last.
    """
    (outs, C, KH, KW), groups, device = weight.shape, geometry.groups, device_of(x)
    positions = y_shape[0] * y_shape[2] * y_shape[3]
    if geometry.transposed or not _is_near(x) or positions * outs >= FAR:
        return VENDOR
    if groups > 1 and C == 1:
        return DEPTHWISE
    op = "conv" if last else "conv_nchw"
    tuned = _tuned.lookup(op, x.dtype, (positions, outs // groups, C, KH * KW), device)
    small = device.backend == "interpreter"
    # rows are gathered by 16 bytes, and exact fp32 has no tensor cores
    gathers = small or (C % 16 == 0 and (x.dtype != torch.float32 or tf32()))
    if gathers and tuned is not None and tuned.variant == "implicit":
        return fitting(tuned, x.dtype, device)
    simple = geometry.stride == [1, 1] and geometry.padding == [0, 0] and groups == KH == KW == 1
    simple = simple and last and x.is_contiguous(memory_format=torch.channels_last)
    if simple and (tuned is None or tuned.variant == "pointwise"):
        return POINTWISE
    if small and tuned is None and C >= 16:
        return _implicit(32, 16, 16, 4, 2)
    return VENDOR  # until a measurement says otherwise


def _is_near(x: Tensor) -> bool:
    steps = ((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    return sum(steps) < FAR


def _implicit(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return Config(blocks, warps, stages, variant="implicit")


def candidates(dtype: torch.dtype, last: bool) -> list[Config]:
    """Every configuration that tuning may pick. Gathering from planes takes more registers."""
    k, offers = (32 if dtype == torch.float32 else 64), [VENDOR]
    tiles = [(64, 64, 4, 3)]
    if not last:
        tiles.append((64, 128, 8, 3))
    else:
        offers.append(POINTWISE)
        tiles += [(128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3)]
        if dtype != torch.float32:
            tiles += [(64, 256, 8, 3), (128, 256, 8, 3)]
    return [*offers, *(_implicit(m, n, k, warps, stages) for m, n, warps, stages in tiles)]


_tuned.CANDIDATES["conv"] = lambda dtype, sizes, device: candidates(dtype, True)
_tuned.CANDIDATES["conv_nchw"] = lambda dtype, sizes, device: candidates(dtype, False)


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry,
    options: Any, keep: bool, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """act(scale conv(x) + b + residual), and what is in the brackets if it is to be kept."""
    last = are_last(x, weight)
    flat, x4, weight4 = geometry.flat(), in_2d(x), in_2d(weight)
    config = choose(x4, weight4, flat.output_shape(x4, weight4), flat, last)
    if config.variant == "vendor":
        return _vendor(x, weight, bias, residual, geometry, options, keep, scale)
    if config.variant == "pointwise":
        return _pointwise(x, weight, bias, residual, options, keep, scale)
    y = allocate(x, geometry.output_shape(x, weight), last)
    z = torch.empty_like(y) if keep else None
    tail = (
        scale, None if bias is None else bias.contiguous(),
        None if residual is None else same_layout(residual, y),
        y, z,
    )  # fmt: skip
    run = launch_depthwise if config.variant == "depthwise" else _launch_implicit
    run(x4, weight4, tail, in_2d(y), flat, options, config)
    return y, y.new_empty(0) if z is None else z


def in_2d(t: Tensor) -> Tensor:
    """One dimension as the second of two."""
    return t.unsqueeze(2) if t.dim() == 3 else t


def _vendor(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry,
    options: Any, keep: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's convolution, and one pass over it if anything is left to do."""
    name, *parameters = options
    plain = name == "none" and residual is None and scale is None
    z = torch.convolution(x, weight, bias if plain else None, *geometry)
    z = arranged(z, are_last(x, weight))
    if plain:
        return z, z.new_empty(0)
    y = torch.empty_like(z) if keep else z
    tail = (
        scale, None if bias is None else bias.contiguous(),
        None if residual is None else same_layout(residual, z),
        None, y, z if keep and not (bias is None and residual is None) else None,
    )  # fmt: skip
    launch_finish(z, 1, tail, extent_of(z), (name, *parameters, 0.0), inside=True)
    return y, z if keep else z.new_empty(0)


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Any,
    keep: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    residual = None if residual is None else residual.permute(0, 2, 3, 1)
    y, z = product(
        x.permute(0, 2, 3, 1), weight.flatten(1), bias, residual, None, (*options, 0.0), keep,
        Finish(inside=True, tf32=tf32()), scale,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2) if keep else z


def _launch_implicit(
    x: Tensor, weight: Tensor, tail: Any, y: Tensor, geometry: Geometry, options: Any,
    config: Config,
) -> None:  # fmt: skip
    outs, C, KH, KW = weight.shape
    N, (images, M, _, planes) = outs // geometry.groups, extent_of(y)
    tiles = cdiv(images * M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    launch(
        CONV_FWD, (tiles, geometry.groups),
        x, weight.permute(0, 2, 3, 1).contiguous(), *tail,
        images, M, N, C, *x.shape[2:], y.shape[3], *x.stride(), *_window(geometry), *options[1:],
        ACT=options[0], PRECISION="tf32" if tf32() else "ieee", KH=KH, KW=KW, PLANES=planes,
        config=config,
    )  # fmt: skip


def launch_depthwise(
    x: Tensor, weight: Tensor, tail: Any, y: Tensor, geometry: Geometry, options: Any,
    config: Config = DEPTHWISE,
) -> None:  # fmt: skip
    """`tail` is scale, bias, residual, y and z. y may have fewer positions than padding allows."""
    outs, _, KH, KW = weight.shape
    extent = extent_of(y)
    # taps that lie apart are read one by one, and many of them at a time take registers
    size = 512 if extent.planes else 1024
    config = replace(tile_of(extent, size, device_of(x)), variant=config.variant)
    images, M, N, planes = extent
    launch(
        DEPTHWISE_FWD, (images * cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),),
        x, weight.permute(2, 3, 1, 0).contiguous(), *tail,
        M, N, *x.shape[2:], y.shape[3], *x.stride(), *_window(geometry), *options[1:],
        ACT=options[0], KH=KH, KW=KW, MULTIPLE=outs // x.shape[1], PLANES=planes, config=config,
    )  # fmt: skip


def _window(geometry: Geometry) -> tuple[int, ...]:
    return (*geometry.stride, *geometry.padding, *geometry.dilation)


def begin_backward(
    dy: Tensor, z: Tensor, options: Any, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """act'(z) dy, and the gradient of the bias."""
    extent = extent_of(z)
    return launch_backward(same_layout(dy, z), z, None, extent, (*options, 0.0), need_bias)
