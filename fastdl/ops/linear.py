"""Linear layers with what follows them: dropout(act(x Wᵀ + b)) + residual."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuned
from ._finish import Extent, launch_backward, launch_finish
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    SPELLINGS,
    Gradient,
    LibraryOp,
    Op,
    Spelling,
    autocast_to_lower,
    differentiating,
    gradients,
    second_derivative,
)
from ._rng import dropout
from ._route import Reason
from .activation import (
    ACTIVATIONS,
    Activations,
    activation as apply_activation,
    apply_definition,
    at_output,
    lower,
    seed_for,
    spelled,
    with_parameters,
)

LINEAR_FWD = Kernel("linear.linear_fwd")
LINEAR_PERSISTENT = Kernel("linear.linear_persistent")


Layout = Literal["strided", "rows", "aligned"]


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    name: str, a: float, b: float, p: float,
) -> Tensor:  # fmt: skip
    """dropout(act(x Wᵀ + b)) + residual."""
    return _finish(F.linear(x, weight, bias), residual, seed, name, a, b, p)


def vendor(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    name: str, a: float, b: float, p: float,
) -> Any:  # fmt: skip
    """With torch's own dropout, which is faster than drawing the kernels' mask in torch."""
    if seed is None:
        return None
    y = F.dropout(apply_definition(F.linear(x, weight, bias), name, a, b), p)
    return y if residual is None else y + residual


def _finish(
    z: Tensor, residual: Tensor | None, seed: Tensor | None, name: str, a: float, b: float, p: float
) -> Tensor:
    y = dropout(apply_definition(z, name, a, b), seed, p, rows=_rows(z))
    return y if residual is None else y + residual


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])  # numel() of a shape would fix it where it is symbolic


def matrix(x: Tensor) -> Tensor:
    return x.reshape(_rows(x), x.shape[-1])


def choose(
    M: int, N: int, K: int, dtype: torch.dtype, device: Device, layout: Layout, tf32: bool = False
) -> Config:
    """The launch configuration: a measured one, else by rule."""
    small = device.backend == "interpreter"
    if layout == "strided" or not (small or (layout == "aligned" and N % 16 == 0)):
        # rows that cannot be moved 16 bytes at a time: torch's product, then our one pass over it
        return GEMM
    tma = layout == "aligned" and dtype != torch.float32 and (small or device.has_tma)
    tuned = _tuned.lookup("linear", dtype, (M, N, K), device)
    if tuned is not None and (tma or tuned.variant != "persistent"):
        return fitting(tuned, dtype, device)
    if dtype == torch.float32 and not small and not tf32:
        return GEMM  # exact fp32 has no tensor cores
    return _rule(M, N, K, dtype, device, tma)


@functools.lru_cache(maxsize=4096)
def _rule(M: int, N: int, K: int, dtype: torch.dtype, device: Device, tma: bool) -> Config:
    """The interpreter takes the same decisions, on blocks and shapes a quarter as long."""
    scale = 4 if device.backend == "interpreter" else 1
    if scale * M <= 64:
        # few rows: weight tiles take the tensor cores' long side
        config = _tiles(max(16, power_of_2(M)), 128 // scale, 128 // scale, 4, 3, swap=1)
    elif tma and scale**2 * M * N >= 2048 * 1024:
        return Config(
            _blocks(128 // scale, 256 // scale, 64 // scale, 8), 8, 3, variant="persistent"
        )
    elif scale**2 * M * N >= 1024 * 1024:
        config = _tiles(128 // scale, 128 // scale, 64 // scale, 8, 3)
    else:
        config = _tiles(64 // scale, 64 // scale, 64 // scale, 4, 4)
    return _with_splits(fitting(config, dtype, device), M, N, K, device)


def fitting(config: Config, dtype: torch.dtype, device: Device) -> Config:
    """As many stages as shared memory holds."""
    if config.variant not in ("tiles", "persistent", "implicit"):
        return config
    stage = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
    buffers = device.shared // stage
    # on AMD the newest stage is in registers; a kilobyte or so is for barriers
    stages = min(config.num_stages, buffers + 1 if device.backend == "hip" else buffers)
    return replace(config, num_stages=max(stages, 1))


# torch's product, finished by one pass over it.
GEMM = Config({}, variant="gemm")


def _blocks(m: int, n: int, k: int, group: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group}


def _tiles(m: int, n: int, k: int, warps: int, stages: int, swap: int = 0) -> Config:
    return Config({**_blocks(m, n, k, 8), "SWAP": swap}, warps, stages, variant="tiles")


def _with_splits(config: Config, M: int, N: int, K: int, device: Device) -> Config:
    """Slice K while tiles leave half of the processors idle and a slice keeps four blocks."""
    tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    splits = max(1, min(device.sms // tiles, K // (4 * config["BLOCK_K"]), 16))
    return Config(config.blocks, config.num_warps, config.num_stages, config.variant, splits)


def candidates(dtype: torch.dtype) -> list[Config]:
    """Every configuration that tuning may pick, each to be proved exact on the device."""
    tiles = [(64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3)]
    if dtype == torch.float32:
        return [
            _tiles(64, 64, 32, 4, 3),
            _tiles(128, 128, 32, 8, 3),
            GEMM,
        ]
    return [
        *(_tiles(*tile) for tile in tiles),
        *(_tiles(m, 128, 128, 4, 3, swap=1) for m in (16, 32, 64)),
        Config(_blocks(128, 256, 64, 8), 8, 3, variant="persistent"),
        Config(_blocks(256, 128, 64, 8), 8, 3, variant="persistent"),
        Config(_blocks(128, 128, 64, 8), 8, 4, variant="persistent"),
        GEMM,
    ]


_tuned.CANDIDATES["linear"] = lambda dtype, sizes, device: candidates(dtype)


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def layout_of(*tensors: Tensor) -> Layout:
    """Whether rows lie in a line, and start at multiples of 16, which Triton looks for."""
    if any(t.stride(1) != 1 for t in tensors):
        return "strided"
    aligned = (t.stride(0) % 16 == 0 and (t.is_meta or t.data_ptr() % 16 == 0) for t in tensors)
    return "aligned" if all(aligned) else "rows"


def _like(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    keep = rest[-1]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if keep else y.new_empty(0)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    name: str, a: float, b: float, p: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return product(x, weight, bias, residual, seed, (name, a, b, p), keep, Finish(False, _tf32()))


class Finish(NamedTuple):
    """Whether the residual is added inside of the activation, and the precision of float32."""

    inside: bool
    tf32: bool


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    options: Any, keep: bool, how: Finish, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on rows, and what is kept for backward. `scale` is of the columns, before the bias."""
    rows, N = matrix(x), weight.shape[0]
    M, K = rows.shape
    config = choose(M, N, K, x.dtype, device_of(x), layout_of(rows, weight), how.tf32)
    residual = None if residual is None else residual.contiguous()
    if config.variant == "gemm":
        return _forward_gemm(x, weight, bias, residual, seed, options, keep, how, scale)
    y, z = _like(x, weight, bias, residual, seed, *options, keep)
    bias = None if bias is None else bias.contiguous()
    tail = (scale, bias, residual, seed, y, z if keep else None)
    run = _launch_persistent if config.variant == "persistent" else _launch_tiles
    run(rows, weight, tail, (M, N, K), options, how, config)
    return y, z


def _forward_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    options: Any, keep: bool, how: Finish, scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's product, and one pass over it if anything is left to do."""
    z = F.linear(x, weight, bias if scale is None else None)
    if options[0] == "none" and seed is None and residual is None and scale is None:
        return z, z.new_empty(0)
    y = torch.empty_like(z)
    # a residual inside of the activation is part of what is kept
    keeps = keep and how.inside and residual is not None
    bias = None if scale is None else bias
    tail = (scale, bias, residual, seed, y, z if keeps else None)
    launch_finish(z, 1, tail, Extent(1, _rows(z), z.shape[-1]), options, how.inside)
    return y, z if keep else z.new_empty(0)


def _launch_tiles(
    x: Tensor, weight: Tensor, tail: Any, sizes: Any, options: Any, how: Finish, config: Config
) -> None:
    (M, N, K), (name, a, b, p) = sizes, options
    parts = config.splits
    partial_sums = x.new_empty((parts, M, N), dtype=torch.float32) if parts > 1 else None
    tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    launch(
        LINEAR_FWD, (tiles, parts),
        x, weight, *tail, partial_sums,
        M, N, K, x.stride(0), weight.stride(0), a, b, p,
        ACT=name, INSIDE=how.inside, PRECISION="tf32" if how.tf32 else "ieee",
        EVEN_K=K % (config["BLOCK_K"] * parts) == 0, config=config,
    )  # fmt: skip
    if partial_sums is not None:
        launch_finish(partial_sums, parts, tail, Extent(1, M, N), options, how.inside)


def _launch_persistent(
    x: Tensor, weight: Tensor, tail: Any, sizes: Any, options: Any, how: Finish, config: Config
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (M, N, K), (name, a, b, p) = sizes, options
    tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    x_desc = TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]])
    weight_desc = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    launch(
        LINEAR_PERSISTENT, (min(tiles, device_of(x).sms),),
        x_desc, weight_desc, *tail,
        M, N, K, a, b, p,
        ACT=name, INSIDE=how.inside, config=config,
    )  # fmt: skip


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *options, keep = rest
    z = F.linear(x, weight, bias)
    y = _finish(z, residual, *options)
    # a library op returns neither an input nor the same tensor twice
    return y.contiguous() if y is not z else y.clone(), z.contiguous() if keep else y.new_empty(0)


def _decline(x: Tensor, weight: Tensor, *args: Any) -> Reason | None:
    N, K = weight.shape
    return Reason.EMPTY if N == 0 or K == 0 else measured(x, N)


def measured(x: Tensor, N: int) -> Reason | None:
    """Whether torch was measured faster at a product of x with N columns."""
    tuned = _tuned.lookup("linear", x.dtype, (_rows(x), N, x.shape[-1]), device_of(x))
    return Reason.MEASURED if tuned is not None and tuned.variant == "torch" else None


Gradients = tuple[Gradient, Gradient, Gradient]


def _like_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    needs = rest[-1]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    made: Any = (x.new_empty(s) if need else None for s, need in zip(shapes, needs, strict=True))
    return tuple(made)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, seed: Tensor | None,
    name: str, a: float, b: float, p: float, needs: list[bool],
) -> Gradients:  # fmt: skip
    x2, dy = matrix(x), matrix(dy)
    if name == "none" and seed is None:
        dz, dbias = dy, dy.sum(0) if needs[2] else None
    else:
        extent = Extent(1, *dy.shape)
        dz, dbias = launch_backward(dy.contiguous(), z, seed, extent, (name, a, b, p), needs[2])
    dx = torch.mm(dz, weight).view(x.shape) if needs[0] else None
    dweight = torch.mm(dz.t(), x2) if needs[1] else None
    return dx, dweight, dbias


def _torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, seed: Tensor | None,
    name: str, a: float, b: float, p: float, needs: list[bool],
) -> Gradients:  # fmt: skip
    dz = dy
    if z is not None or seed is not None:
        args = (dy if z is None else z, None, seed, name, a, b, p)
        dz = gradients(_finish, args, dy, [True])[0]
    bias = x.new_zeros(weight.shape[0])
    dx, dweight, dbias = gradients(F.linear, (x, weight, bias), dz, needs)
    return dx, dweight, dbias


FORWARD = LibraryOp("linear", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp("linear_backward", _backward, like=_like_backward, torch_form=_torch_backward)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        seed: Tensor | None, *options: Any,
    ) -> Tensor:  # fmt: skip
        name, a = options[:2]
        curved = name != "none" and any(ctx.needs_input_grad[:3])
        from_y = curved and at_output(name, a) and seed is None and residual is None
        y, z = FORWARD.overload(x, weight, bias, residual, seed, *options, curved and not from_y)
        # a frozen weight without an activation asks only for the shape of x
        saved_x = x if ctx.needs_input_grad[1] or curved else None
        saved_z = (y if from_y else z) if curved else None
        ctx.save_for_backward(saved_x, weight, bias, seed, saved_z)
        ctx.shape, ctx.options = x.shape, options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, seed, z = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if x is None:
            x = weight.new_zeros((), requires_grad=True).expand(ctx.shape)
        if not any(needs):
            grads: Any = (None, None, None)
        elif differentiating():
            args = (x, weight, bias, None, seed, *ctx.options)
            grads = second_derivative("linear", definition, args, dy, needs)[:3]
        else:
            grads = BACKWARD.overload(dy, x, weight, z, seed, *ctx.options, needs)
        return *grads, dy if ctx.needs_input_grad[3] else None, None, None, None, None, None


def _inference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    return FORWARD.overload(x, weight, bias, residual, *rest, False)[0]


OP = Op("linear", definition, LinearFunction, _inference, vendor)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activations = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(act(input @ weight.T + bias)) + residual, in one pass over the output."""
    options, module = lower("linear", activation)
    seed = seed_for(input, dropout_p, training)
    input, weight, bias = autocast_to_lower(input, weight, bias)
    check("linear", input, weight, bias)
    if module is not None:
        y = module(OP(input, weight, bias, None, None, *options, 0.0))
        y = apply_activation(y, None, dropout_p=dropout_p, training=training)
        return y if residual is None else y + residual
    p = dropout_p if seed is not None else 0.0
    if residual is None or _adds_in_place(residual, input, weight):
        return OP(input, weight, bias, residual, seed, *options, p)
    return OP(input, weight, bias, None, seed, *options, p) + residual


def _adds_in_place(residual: Tensor, input: Tensor, weight: Tensor) -> bool:
    """Whether adding the residual neither broadcasts nor promotes."""
    return residual.dtype == input.dtype and residual.shape == (*input.shape[:-1], weight.shape[0])


def check(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{op}: input is {tuple(input.shape)}, weight is {tuple(weight.shape)};"
            " allowed are input (..., in) and weight (out, in)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{op}: weight is {tuple(weight.shape)}, bias is {tuple(bias.shape)};"
            " allowed are weight (out, in) and bias (out,)"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.dtype != input.dtype:
            raise RuntimeError(
                f"{op}: input is {input.dtype}, {name} is {other.dtype}; they must match"
            )
        if other.device != input.device:
            raise RuntimeError(
                f"{op}: input is on {input.device}, {name} on {other.device}; they must match"
            )


def _spell(act: Callable[..., Tensor], name: str, drops: bool, adds: bool) -> Spelling:
    """The op with this way to write its activation, with or without what follows it."""

    def pattern(
        x: Any, w: Any, bias: Any, a: Any, b: Any, p: Any, training: Any, residual: Any
    ) -> Tensor:
        y = act(F.linear(x, w, bias), a, b)
        y = F.dropout(y, p, training) if drops else y
        return y + residual if adds else y

    def call(
        x: Any, w: Any, bias: Any, a: Any, b: Any, p: Any, training: Any, residual: Any
    ) -> partial[Any]:
        options = {
            "activation": None if name == "none" else with_parameters(name, a, b),
            "residual": residual,
            "dropout_p": p,
            "training": training,
        }
        return partial(linear, x, w, bias, **{k: v for k, v in options.items() if v is not None})

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(act, name, drops, adds)
    for name in ACTIVATIONS
    for act in spelled(name)
    for drops in (False, True)
    for adds in (False, True)
)
