"""Layer normalization with the residual before it and the modulation after it."""

import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuned
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    SPELLINGS,
    LibraryOp,
    Op,
    Spelling,
    autocast_to_float32,
    differentiating,
    gradients,
    second_derivative,
)
from ._route import Reason

LAYERNORM_FWD = Kernel("layernorm.layernorm_fwd")
LAYERNORM_BWD = Kernel("layernorm.layernorm_bwd")
LAYERNORM_WIDE_FWD = Kernel("layernorm_wide.layernorm_wide_fwd")
LAYERNORM_WIDE_DX = Kernel("layernorm_wide.layernorm_wide_dx")
LAYERNORM_WIDE_SUMS = Kernel("layernorm_wide.layernorm_wide_sums")


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> Any:  # fmt: skip
    """norm(h) (1 + scale) + shift of h = x + residual, over the last `dims` dimensions; with a
    residual, h too.
    """
    h = x if residual is None else x + residual
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch cannot differentiate a bias alone twice
    wide = h.dtype if weight is None else torch.promote_types(h.dtype, weight.dtype)
    y = F.layer_norm(h.to(wide), h.shape[h.dim() - dims :], weight, bias, eps).to(h.dtype)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return y if residual is None else (y, h)


def choose(n_cols: int, dtype: torch.dtype, device: Device, backward: bool) -> Config:
    """Tiles of whole rows while they fit in registers, else ("wide") blocks of columns.

    Backward holds four sums of columns beside its rows, so its rows are shorter. A thread has 16
    elements.
    """
    op = "layer_norm_backward" if backward else "layer_norm"
    return _tuned.lookup(op, dtype, (n_cols,), device) or _rule(n_cols, device, backward)


@functools.lru_cache(maxsize=1024)
def _rule(n_cols: int, device: Device, backward: bool) -> Config:
    # in the interpreter a row is soon long, and blocks are small while rows are
    small = device.backend == "interpreter"
    if n_cols > (128 if small else 8192 if backward else 32768):
        block = 64 if small and n_cols < 1024 else 2048 if backward else 8192
        return Config({"BLOCK": block}, 4 if backward else 16, 1, "wide")
    block, tile = power_of_2(n_cols), 128 if small else 4096
    rows = max(1, min(tile // block, 16))
    warps = min(max(rows * block // 512, 1), 16)
    return Config({"ROWS": rows, "BLOCK": block}, warps, 1, "rows")


def _candidates(longest: int) -> _tuned.Candidates:
    """What tuning may pick, of rows up to `longest`."""

    def candidates(dtype: Any, sizes: tuple[int, ...], device: Device) -> list[Config]:
        (cols,) = sizes
        block = power_of_2(cols)
        # tiles of at most `longest` elements, 8 to 32 of them a thread where there are enough
        tiles = [
            Config({"ROWS": rows, "BLOCK": block}, warps, 1, "rows")
            for rows in (1, 2, 4, 8, 16)
            for warps in (1, 2, 4, 8, 16)
            if rows * block <= longest and _shared_out(rows * block, warps)
        ]
        if block < 4096 and tiles:
            return tiles
        blocks = [
            Config({"BLOCK": wide}, warps, 1, "wide")
            for wide in (2048, 4096, 8192)
            for warps in (4, 8, 16)
            if _shared_out(wide, warps)
        ]
        return tiles + blocks

    return candidates


def _shared_out(elements: int, warps: int) -> bool:
    """Whether threads have few enough for registers, and enough to move 16 bytes at a time."""
    each = elements / (32 * warps)
    return each <= 32 and (warps == 1 or each >= 8)


_tuned.CANDIDATES["layer_norm"] = _candidates(32768)
_tuned.CANDIDATES["layer_norm_backward"] = _candidates(8192)


def _like(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float32)
    return y, h, mean, torch.empty_like(mean)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, mean, rstd = _like(x, residual, weight, bias, scale, shift, dims, eps)
    groups, scale, shift = _by_group(x, scale, shift, dims)
    rows = _as_rows(x, dims)
    n_rows, n_cols = rows.shape
    config = choose(n_cols, x.dtype, device_of(x), backward=False)
    group_rows = n_rows // groups
    tensors = (rows, _dense(residual), _dense(weight), _dense(bias), scale, shift, y)
    outputs = (None if residual is None else h, mean, rstd)
    if config.variant == "wide":
        launch(
            LAYERNORM_WIDE_FWD, (n_rows,), *tensors, *outputs,
            rows.stride(0), n_cols, group_rows, eps, config=config,
        )  # fmt: skip
    else:
        parts = cdiv(group_rows, config["ROWS"])
        launch(
            LAYERNORM_FWD, (groups * parts,), *tensors, *outputs,
            rows.stride(0), n_cols, group_rows, parts, eps, config=config,
        )  # fmt: skip
    return y, h, mean, rstd


def _as_rows(x: Tensor, dims: int) -> Tensor:
    """x as [rows, columns], columns side by side. Copies only where the layout does not allow a
    view.
    """
    rows = x.reshape(x.shape[: x.dim() - dims].numel(), -1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _leading(x: Tensor, dims: int, *factors: Tensor | None) -> int:
    """How many leading dimensions of x scale and shift vary over."""
    n = x.dim() - dims
    shapes = [(1,) * (x.dim() - f.dim()) + tuple(f.shape) for f in factors if f is not None]
    return max((i + 1 for shape in shapes for i in range(n) if shape[i] != 1), default=0)


def _by_group(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, dims: int
) -> tuple[int, Tensor | None, Tensor | None]:
    """The number of groups of rows that share a scale and shift, and these as [groups, columns]."""
    if scale is None and shift is None:
        return 1, None, None
    lead = _leading(x, dims, scale, shift)
    groups, n = x.shape[:lead].numel(), x.dim() - dims
    shape = (*x.shape[:lead], *(1 for _ in range(n - lead)), *x.shape[n:])

    def expand(f: Tensor | None) -> Tensor | None:
        return None if f is None else f.expand(shape).reshape(groups, -1).contiguous()

    return groups, expand(scale), expand(shift)


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, mean, rstd = _like(x, residual, weight, bias, scale, shift, dims, eps)
    if residual is None:
        h_, y_ = x, definition(x, residual, weight, bias, scale, shift, dims, eps)
    else:
        y_, h_ = definition(x, residual, weight, bias, scale, shift, dims, eps)
        h.copy_(h_)
    if x.numel():
        moments = torch.var_mean(h_.float().flatten(x.dim() - dims), -1, correction=0)
        rstd.copy_(moments[0].add(eps).rsqrt()), mean.copy_(moments[1])
    return y.copy_(y_), h, mean, rstd


def _decline(x: Tensor, *args: Any) -> Reason | None:
    n_cols = x.shape[x.dim() - args[-2] :].numel()
    tuned = _tuned.lookup("layer_norm", x.dtype, (n_cols,), device_of(x))
    return Reason.MEASURED if tuned is not None and tuned.variant == "torch" else None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _like_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, dims: int, eps: float,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    return tuple(  # type: ignore[return-value]
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None  # type: ignore[arg-type]
        for t, need in zip((h, weight, bias, scale, shift), needs, strict=True)
    )


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, dims: int, eps: float,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    dx: Any = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[0] else None
    groups, group_scale, _ = _by_group(h, scale, shift, dims)
    rows = _as_rows(h, dims)
    config = choose(rows.shape[1], h.dtype, device_of(h), backward=True)
    run = _launch_wide_backward if config.variant == "wide" else _launch_backward
    sums = run(
        _dense(dy), _dense(dh), rows, _dense(weight), _dense(bias), group_scale, mean, rstd,
        dx, groups, config, any(needs[1:]),
    )  # fmt: skip
    if sums is None:
        return dx, None, None, None, None  # type: ignore[return-value]
    by_group = sums.view(sums.shape[0], groups, -1, rows.shape[1]).sum(2)
    lead = _leading(h, dims, scale, shift)
    into = ((0, weight), (1, bias), (2, scale), (1 if scale is None else 3, shift))
    factors: Any = [
        _into(by_group[kind], h, lead, dims, like) if need else None
        for need, (kind, like) in zip(needs[1:], into, strict=True)
    ]
    return dx, *factors


def _into(by_group: Tensor, h: Tensor, lead: int, dims: int, like: Any) -> Tensor:
    """Sums of columns [groups, columns], summed on to the shape of their factor."""
    n = h.dim() - dims
    full = by_group.view(*h.shape[:lead], *(1 for _ in range(n - lead)), *h.shape[n:])
    # a copy: outputs of an op share no memory
    return full.sum_to_size(like.shape).to(like.dtype, copy=True)


def _parts(group_rows: int, rows: int, groups: int, device: Device) -> int:
    """Programs a group: a few for each processor, and one partial sum each."""
    return max(1, min(cdiv(group_rows, rows), 4 * device.sms // groups))


def _launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, mean: Tensor, rstd: Tensor, dx: Any, groups: int, config: Config,
    need_sums: bool,
) -> Any:  # fmt: skip
    (n_rows, n_cols), kinds = h.shape, 2 if scale is None else 4
    group_rows = n_rows // groups
    parts = _parts(group_rows, config["ROWS"], groups, device_of(h))
    sums = h.new_empty((kinds, groups * parts, n_cols), dtype=torch.float32) if need_sums else None
    launch(
        LAYERNORM_BWD, (groups * parts,),
        dy, dh, h, weight, bias, scale, mean, rstd, dx, sums,
        h.stride(0), n_cols, group_rows, parts, config=config,
    )  # fmt: skip
    return sums


def _launch_wide_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, mean: Tensor, rstd: Tensor, dx: Any, groups: int, config: Config,
    need_sums: bool,
) -> Any:  # fmt: skip
    (n_rows, n_cols), kinds = h.shape, 2 if scale is None else 4
    group_rows, columns = n_rows // groups, cdiv(n_cols, config["BLOCK"])
    if dx is not None:
        launch(
            LAYERNORM_WIDE_DX, (n_rows,),
            dy, dh, h, weight, scale, mean, rstd, dx,
            h.stride(0), n_cols, group_rows, config=config,
        )  # fmt: skip
    if not need_sums:
        return None
    parts = _parts(group_rows, 1, groups * columns, device_of(h))
    sums = h.new_empty((kinds, groups * parts, n_cols), dtype=torch.float32)
    launch(
        LAYERNORM_WIDE_SUMS, (groups * parts, columns),
        dy, h, weight, bias, scale, mean, rstd, sums,
        h.stride(0), n_cols, group_rows, parts, config=config,
    )  # fmt: skip
    return sums


def _torch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, dims: int, eps: float,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    args = (h, None, weight, bias, scale, shift, dims, eps)
    dx, _, *others = gradients(definition, args, dy, [needs[0], False, *needs[1:]])[:6]
    return (dx if dx is None or dh is None else dx + dh), *others


FORWARD = LibraryOp("layer_norm", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp(
    "layer_norm_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
    ) -> Any:  # fmt: skip
        y, h, mean, rstd = FORWARD.overload(x, residual, weight, bias, scale, shift, dims, eps)
        ctx.save_for_backward(x if residual is None else h, weight, bias, scale, shift, mean, rstd)
        ctx.options = (dims, eps)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        needs = [any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:6]]
        if dy is None:
            return dh, dh, None, None, None, None, None, None
        h, *factors, mean, rstd = ctx.saved_tensors
        if differentiating():
            # h is an output of this Function: its own path back to x and residual is added by
            # autograd
            args, wanted = (h, None, *factors, *ctx.options), [needs[0], False, *needs[1:]]
            dx, _, *others = second_derivative("layer_norm", definition, args, dy, wanted)[:6]
            dx = dx if dh is None or dx is None else dx + dh
        else:
            dx, *others = BACKWARD.overload(dy, dh, h, *factors, mean, rstd, *ctx.options, needs)
        into_x, into_residual = ctx.needs_input_grad[:2]
        return dx if into_x else None, dx if into_residual else None, *others, None, None


def _inference(x: Tensor, residual: Tensor | None, *args: Any) -> Any:
    y, h, *_ = FORWARD.overload(x, residual, *args)
    return y if residual is None else (y, h)


OP = Op("layer_norm", definition, LayerNormFunction, _inference)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    """norm(h) * weight + bias of h = input + residual, then * (1 + scale) + shift; with `prenorm`
    also h.
    """
    _check(input, tuple(normalized_shape), weight, bias)
    input, weight, bias, residual, scale, shift = autocast_to_float32(
        input, weight, bias, residual, scale, shift
    )
    if residual is not None and not (
        residual.dtype == input.dtype and residual.shape == input.shape
    ):
        input, residual = input + residual, None
    late = [f for f in (scale, shift) if f is not None and not _modulates(f, input)]
    early = (scale, shift) if not late else (None, None)
    out = OP(input, residual, weight, bias, *early, len(normalized_shape), eps)
    y, h = (out, input) if residual is None else out
    if late:
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
    return (y, h) if prenorm else y


def _modulates(factor: Tensor, input: Tensor) -> bool:
    """Whether applying the factor neither enlarges nor promotes the input."""
    grown = factor.dim() > input.dim() or any(
        f not in (1, n) for f, n in zip(factor.shape[::-1], input.shape[::-1], strict=False)
    )
    return factor.dtype == input.dtype and not grown


def _check(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"layer_norm: input is {tuple(input.shape)}, normalized_shape is {shape};"
            " it must be the last dimensions of input"
        )
    for name, factor in (("weight", weight), ("bias", bias)):
        if factor is None:
            continue
        if tuple(factor.shape) != shape:
            raise RuntimeError(
                f"layer_norm: normalized_shape is {shape}, {name} is {tuple(factor.shape)};"
                " they must match"
            )
        if factor.device != input.device:
            raise RuntimeError(
                f"layer_norm: input is on {input.device}, {name} on {factor.device};"
                " they must match"
            )


def _spell(*, adds: bool, prenorm: bool, scales: bool, shifts: bool, widens: bool) -> Spelling:
    """The op with or without what may stand around it; `widens` is a norm in float32 of less."""

    def pattern(
        x: Any, r: Any, shape: Any, w: Any, b: Any, eps: Any, scale: Any, shift: Any, dtype: Any
    ) -> Any:
        h = x + r if adds else x
        y = F.layer_norm(h.to(torch.float32) if widens else h, shape, w, b, eps)
        y = y.to(dtype) if widens else y
        y = y * (1 + scale) if scales else y
        y = y + shift if shifts else y
        return (y, h) if prenorm else y

    def call(
        x: Any, r: Any, shape: Any, w: Any, b: Any, eps: Any, scale: Any, shift: Any, dtype: Any
    ) -> partial[Any]:
        options = {"residual": r, "prenorm": prenorm or None, "scale": scale, "shift": shift}
        given = {k: v for k, v in options.items() if v is not None}
        return partial(layer_norm, x, shape, w, b, eps, **given)

    return Spelling(pattern, call)


# A shift alone is no modulation: it is mostly a residual, as large as the input.
SPELLINGS.extend(
    _spell(adds=adds, prenorm=prenorm, scales=scales, shifts=shifts, widens=widens)
    for widens in (False, True)
    for adds, prenorm in ((False, False), (True, False), (True, True))
    for scales, shifts in ((False, False), (True, False), (True, True))
)
