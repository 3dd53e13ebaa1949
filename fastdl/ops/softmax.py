"""Softmax and log-softmax over any dimension, of scaled and masked logits."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuned
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import Gradient, LibraryOp, Op, autocast_widens, differentiating
from ._route import FUSED_DTYPES, Reason, report
from ._rows import choose
from ._strides import merged

SOFTMAX_FWD = Kernel("softmax.softmax_fwd")
SOFTMAX_BWD = Kernel("softmax.softmax_bwd")
SOFTMAX_WIDE_FWD = Kernel("softmax_wide.softmax_wide_fwd")
SOFTMAX_WIDE_BWD = Kernel("softmax_wide.softmax_wide_bwd")


def definition(
    x: Tensor, mask: Tensor | None, dim: int, scale: float, fill: float, log: bool, widens: bool
) -> Tensor:
    """softmax(s), or its logarithm, of s = x scale + mask, or x scale with `fill` where a boolean
    mask is False; `widens`: in float32, of less.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if widens else x.dtype
    s = x.to(dtype)
    if scale != 1:
        s = s * scale
    if mask is not None:
        s = torch.where(mask, s, fill) if mask.dtype == torch.bool else s + mask
    return (F.log_softmax if log else F.softmax)(s, dim).to(dtype)


def logits_gradient(dy: Tensor, y: Tensor, mask: Tensor | None, dim: int, log: bool) -> Tensor:
    """The gradient of s, taken at the output, in torch. What a boolean mask hides has none."""
    of_logits = torch._log_softmax_backward_data if log else torch._softmax_backward_data
    ds = of_logits(dy, y, dim, y.dtype)
    return ds if mask is None or mask.dtype != torch.bool else torch.where(mask, ds, 0.0)


def _like(x: Tensor, *options: Any) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32) if options[-1] else x.dtype
    return torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)


def _view(tensor: Tensor, dim: int) -> Tensor:
    """The tensor as [outer, n, inner], where n is reduced, all of the rows of a last n being in
    inner. Copies only where the layout does not allow a view.
    """
    outer, n = tensor.shape[:dim].numel(), tensor.shape[dim]
    inner = tensor.shape[dim + 1 :].numel()
    if inner == 1:
        return tensor.reshape(1, outer, n).transpose(1, 2)
    return tensor.reshape(outer, n, inner)


class _Mask(NamedTuple):
    """A mask, and where its elements are: `inner` is [a, b, c] there."""

    tensor: Tensor | None = None
    outer: int = 0
    n: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    size_b: int = 1
    size_c: int = 1


def _placed(mask: Tensor | None, shape: torch.Size, dim: int) -> _Mask:
    """The mask for logits of this shape. Copies only what is broadcast in a more involved way."""
    if mask is None:
        return _Mask()
    full = mask.expand(shape)
    steps = full.stride()
    before = merged(shape[:dim], steps[:dim])
    after = merged(shape[dim + 1 :], steps[dim + 1 :])
    outer, inner = (before, after) if shape[dim + 1 :].numel() > 1 else ([], before)
    if len(outer) > 1 or len(inner) > 3:
        return _placed(full.contiguous(), shape, dim)
    (_, a), (size_b, b), (size_c, c) = [(1, 0)] * (3 - len(inner)) + inner
    return _Mask(full, outer[0][1] if outer else 0, steps[dim], a, b, c, size_b, size_c)


def choose_columns(n: int, inner: int, device: Device) -> Config:
    """Tiles of whole columns while these fit in registers, with few columns at the least: they are
    what is read side by side. A thread has 16 elements, of the longest 32.
    """
    # in the interpreter a column is soon long, and blocks are small while columns are
    small = device.backend == "interpreter" and n < 1024
    tile, fewest, longest = (128, 2, 128) if small else (4096, 16, 16384)
    block = power_of_2(n)
    rows = min(max(tile // block, fewest), 1024, power_of_2(inner))
    if rows * block > longest:
        rows = min(4 * fewest, power_of_2(inner))
        return Config({"ROWS": rows, "BLOCK": tile // rows}, 8, 1, "wide")
    return Config({"ROWS": rows, "BLOCK": block}, min(max(rows * block // 512, 1), 16), 1, "rows")


def _config(op: str, given: Tensor, into: Tensor, dtype: torch.dtype) -> Config:
    """The configuration for tensors [outer, n, inner]."""
    _, n, inner = given.shape
    if n == 1 or given.stride(1) == into.stride(1) == 1:
        return choose(op, n, dtype, device_of(given))
    return choose_columns(n, inner, device_of(given))


def _launch(
    op: str, kernels: tuple[Kernel, Kernel], given: Tensor, tensors: Iterable[Tensor | None],
    into: Tensor, mask: _Mask, *options: float | None, log: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Run over tiles of `into`. `given` is what may have strides of its own."""
    outer, n, inner = given.shape
    config = _config(op, given, into, dtype)
    rows = config.blocks.get("ROWS", 1)
    launch(
        kernels[config.variant == "wide"], (outer * cdiv(inner, rows),), given, *tensors, into,
        *given.stride(), into.stride(1), into.stride(2), *mask[1:], n, inner, *options,
        LOG=log, config=replace(config, blocks={"ROWS": 1, **config.blocks}),
    )  # fmt: skip


def _forward(
    x: Tensor, mask: Tensor | None, dim: int, scale: float, fill: float, log: bool, widens: bool
) -> Tensor:
    y = _like(x, widens)
    given, placed = _view(x, dim), _placed(mask, x.shape, dim)
    _launch(
        "softmax", (SOFTMAX_FWD, SOFTMAX_WIDE_FWD), given, (placed.tensor,), _view(y, dim), placed,
        None if scale == 1 else scale, fill, log=log, dtype=x.dtype,
    )  # fmt: skip
    return y


def _torch_forward(x: Tensor, *args: Any) -> Tensor:
    return definition(x, *args).contiguous()


def _decline(x: Tensor, mask: Tensor | None, dim: int, *options: Any) -> Reason | None:
    if dim + 1 < x.dim():
        return None  # rows are measured
    tuned = _tuned.lookup("softmax", x.dtype, (x.shape[dim],), device_of(x))
    return Reason.MEASURED if tuned is not None and tuned.variant == "torch" else None


Gradients = tuple[Gradient, Gradient]


def _like_backward(
    dy: Tensor, y: Tensor, mask: Tensor | None, dim: int, scale: float, log: bool,
    dtype: torch.dtype, needs: list[bool],
) -> Gradients:  # fmt: skip
    dense = torch.contiguous_format
    dx = torch.empty_like(y, dtype=dtype, memory_format=dense) if needs[0] else None
    dmask = None
    if mask is not None and needs[1]:
        dmask = torch.empty_like(mask, memory_format=dense)
    return dx, dmask


def _backward(
    dy: Tensor, y: Tensor, mask: Tensor | None, dim: int, scale: float, log: bool,
    dtype: torch.dtype, needs: list[bool],
) -> Gradients:  # fmt: skip
    keep = mask if mask is not None and mask.dtype == torch.bool else None
    # the gradient of a mask is that of the logits, summed
    added = mask if needs[1] else None
    wide = dtype if added is None else torch.promote_types(dtype, added.dtype)
    ds = torch.empty_like(y, dtype=wide, memory_format=torch.contiguous_format)
    given, placed = _view(dy, dim), _placed(keep, y.shape, dim)
    _launch(
        "softmax_backward", (SOFTMAX_BWD, SOFTMAX_WIDE_BWD), given,
        (_view(y, dim), placed.tensor), _view(ds, dim), placed,
        None if added is not None or scale == 1 else scale, log=log, dtype=dtype,
    )  # fmt: skip
    if added is None:
        return ds, None
    return _shared(ds, mask, scale, dtype, needs)


def _shared(
    ds: Tensor, mask: Any, scale: float, dtype: torch.dtype, needs: list[bool]
) -> Gradients:
    """The gradients of x and of a mask that is added, from that of the logits."""
    # copies: outputs of an op share no memory
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype, copy=True) if needs[1] else None
    dx: Any = None
    if needs[0]:
        dx = (ds if scale == 1 else ds * scale).to(dtype)
    return dx, dmask


def _torch_backward(
    dy: Tensor, y: Tensor, mask: Tensor | None, dim: int, scale: float, log: bool,
    dtype: torch.dtype, needs: list[bool],
) -> Gradients:  # fmt: skip
    # in float32, as the kernels compute
    ds = logits_gradient(dy.float(), y.float(), mask, dim, log)
    return _shared(ds, mask, scale, dtype, needs)


FORWARD = LibraryOp("softmax", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp("softmax_backward", _backward, like=_like_backward, torch_form=_torch_backward)


class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, dim: int, scale: float, fill: float, log: bool,
        widens: bool,
    ) -> Tensor:  # fmt: skip
        y = FORWARD.overload(x, mask, dim, scale, fill, log, widens)
        # of a mask that is added and has no gradient, backward needs nothing
        reads = mask is not None and (mask.dtype == torch.bool or ctx.needs_input_grad[1])
        ctx.save_for_backward(y, mask if reads else None)
        ctx.options = (dim, scale, log, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, mask = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        run = BACKWARD.overload
        if differentiating():
            # x is not kept: torch differentiates its own gradient at y, and this Function y
            report("softmax", "call", Reason.DOUBLE_BACKWARD)
            run = _torch_backward
        return *run(dy, y, mask, *ctx.options, needs), None, None, None, None, None


OP = Op("softmax", definition, SoftmaxFunction, FORWARD.overload)


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    fill: float = -math.inf,
) -> Tensor:
    """softmax(input * scale + mask) over `dim`. A boolean mask is True where logits are kept; the
    others are `fill`.
    """
    dim = _checked("softmax", input, dim, mask, _stacklevel)
    return _call(input, mask, dim, dtype, scale, fill, log=False)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    fill: float = -math.inf,
) -> Tensor:
    """The logarithm of `softmax`."""
    dim = _checked("log_softmax", input, dim, mask, _stacklevel)
    return _call(input, mask, dim, dtype, scale, fill, log=True)


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """softmax(-input)."""
    dim = _checked("softmin", input, dim, None, _stacklevel)
    return _call(input, None, dim, dtype, -1.0, -math.inf, log=False)


def _checked(op: str, input: Tensor, dim: Any, mask: Tensor | None, stacklevel: int) -> int:
    """The dimension, counted from 0. Raises where it or the mask do not fit the input."""
    count = input.dim()
    if dim is None:
        dim = F._get_softmax_dim(op, count, stacklevel + 1)  # type: ignore[attr-defined]
    if not isinstance(dim, int):
        raise TypeError(f"{op}: dim is {dim!r}, allowed is an int")
    if not -max(count, 1) <= dim < max(count, 1):
        raise IndexError(
            f"{op}: dim is {dim}, allowed are {-max(count, 1)} to {max(count, 1) - 1}"
            f" for an input of {count} dimensions"
        )
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise RuntimeError(f"{op}: mask is {mask.dtype}, allowed are bool and floating point")
        if mask.dim() > count or any(
            m not in (1, n) for m, n in zip(mask.shape[::-1], input.shape[::-1], strict=False)
        ):
            raise RuntimeError(
                f"{op}: mask is {tuple(mask.shape)}, input is {tuple(input.shape)};"
                " mask must broadcast to input"
            )
    return dim % max(count, 1)


def _call(
    input: Tensor, mask: Tensor | None, dim: int, dtype: torch.dtype | None, scale: float,
    fill: float, *, log: bool,
) -> Tensor:  # fmt: skip
    if not input.dim():
        return _call(input[None], mask, dim, dtype, scale, fill, log=log)[0]
    if dtype is None and autocast_widens(input) and input.dtype in FUSED_DTYPES:
        dtype = torch.float32
    # kernels widen, and for the truth float64 does not narrow; every other cast comes first
    widens = dtype == torch.float32 and input.dtype in (*FUSED_DTYPES, torch.float64)
    if dtype is not None and not widens:
        input = input.to(dtype)
    y = OP(input, mask, dim, float(scale), float(fill), log, widens)
    return y if dtype is None else y.to(dtype)
