"""Cross entropy of a linear layer whose logits are never whole: chunks of rows, one after another.

Where the loss is a sum, a chunk's gradients are made while its logits are there, of a loss whose
own gradient is 1; backward scales them. Where every row has a gradient of its own, backward makes
the logits once more. Sums over chunks are in float32, and rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cross_entropy as rows
from ._classes import like_reduced, new_losses, reduced, require_known
from ._launch import Device, cdiv, device_of
from ._op import (
    LibraryOp,
    Op,
    autocast_to_lower,
    differentiating,
    empty_gradients,
    gradients,
    second_derivative,
)
from ._reduction import reduction_of
from ._route import Reason
from .cross_entropy import cross_entropy, in_autocast

MIB = 1 << 20


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    chunk: int,
) -> Tensor:  # fmt: skip
    """The cross entropy of x Wᵀ + b. How many rows make a chunk is nothing to it."""
    return rows.definition(
        F.linear(x, weight, bias), target, class_weight, reduction, ignore_index, smoothing,
        z_loss, softcap, wide,
    )  # fmt: skip


def choose_chunk(n_rows: int, classes: int, itemsize: int, device: Device) -> int:
    """Rows of a chunk. Each one reads and writes the sum that the weight's gradient is, so they are
    few: two and more of at most 512 MiB, and four of what is small all the same.
    """
    whole = n_rows * classes * itemsize
    parts = max(cdiv(whole, 512 * MIB), 4 if whole < 256 * MIB else 2)
    multiple = 8 if device.backend == "interpreter" else 128
    return cdiv(cdiv(n_rows, parts), multiple) * multiple


def _chunks(x: Tensor, weight: Tensor, chunk: int) -> tuple[list[slice], Tensor]:
    """The chunks, and memory for the logits of one, whose rows begin at multiples of 128 bytes."""
    n_rows, classes = x.shape[0], weight.shape[0]
    step = min(chunk or choose_chunk(n_rows, classes, x.itemsize, device_of(x)), n_rows)
    logits = x.new_empty((step, cdiv(classes, 64) * 64))[:, :classes]
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)], logits


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> Tensor:
    """The logits of a chunk, in the memory that there is for them."""
    z = logits[: x.shape[0]]
    if bias is None:
        return torch.mm(x, weight.t(), out=z)
    return torch.addmm(bias, x, weight.t(), out=z)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total + a b in float32. The first product needs nothing to add to."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.device.type != "cuda" or torch.version.hip:
        # these have no product of less that ends in float32, meta tensors in some versions
        _add(total, torch.mm(a, b), first)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)


def _add(total: Tensor, more: Tensor, first: bool) -> None:
    if first:
        total.copy_(more)
    else:
        total.add_(more)


def _add_gradients(totals: Any, dz: Tensor, x: Tensor, weight: Tensor, chunk: slice) -> None:
    """What a chunk adds to the gradients of input, weight and bias."""
    dx, dweight, dbias = totals
    if dx is not None:
        _add_product(dx[chunk], dz, weight, first=True)
    if dweight is not None:
        _add_product(dweight, dz.t(), x[chunk], chunk.start == 0)
    if dbias is not None:
        _add(dbias, dz.sum(0, dtype=torch.float32), chunk.start == 0)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _like(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    chunk: int, needs: list[bool],
) -> Outputs:  # fmt: skip
    loss, sums = like_reduced(x, rows.dtype_of(x, target, class_weight, wide), reduction)
    of_stats = (3, x.shape[0]) if reduction == "none" else (0,)
    shapes = (
        t.shape if need and t is not None else (0,)
        for t, need in zip((x, weight, bias), needs, strict=True)
    )
    stats, dx, dweight, dbias = (
        x.new_empty(shape, dtype=torch.float32) for shape in (of_stats, *shapes)
    )
    return loss, sums, stats, dx, dweight, dbias


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    chunk: int, needs: list[bool],
) -> Outputs:  # fmt: skip
    if not target.is_floating_point():
        require_known(target, weight.shape[0], ignore_index)
    options = (ignore_index, smoothing, z_loss, softcap)
    _, _, stats, *totals = outs = _like(
        x, weight, bias, target, class_weight, reduction, *options, wide, chunk, needs
    )
    wanted = [t if need else None for t, need in zip(totals, needs, strict=True)]
    dtype = rows.dtype_of(x, target, class_weight, wide)
    losses, row_weight = new_losses(x[:, :1], dtype, reduction)
    row_losses = losses if reduction == "none" else losses[0]
    chunks, logits = _chunks(x, weight, chunk)
    for part in chunks:
        z = _product(x[part], weight, bias, logits)
        rows.launch_forward(
            z, target[part], class_weight, row_losses[part],
            None if row_weight is None else row_weight[part],
            stats[:, part] if reduction == "none" else None, z if any(needs) else None, *options,
        )  # fmt: skip
        _add_gradients(wanted, z, x, weight, part)
    return *reduced(losses, dtype, reduction), *outs[2:]


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    chunk: int, needs: list[bool],
) -> Outputs:  # fmt: skip
    options = (ignore_index, smoothing, z_loss, softcap, wide)
    outs = _like(x, weight, bias, target, class_weight, reduction, *options, chunk, needs)
    of_rows = rows.FORWARD.torch_form(
        F.linear(x, weight, bias), target, class_weight, reduction, *options
    )
    outs[0].copy_(of_rows[0])
    outs[1].copy_(of_rows[2])
    if reduction == "none":
        outs[2].copy_(of_rows[1])
    args = (x, weight, bias, target, class_weight, "sum", *options, chunk)
    found = gradients(definition, args, None, needs) if any(needs) else ()
    for out, grad in zip(outs[3:], found, strict=False):
        if grad is not None:
            out.copy_(grad)
    return outs


def _library_decline(x: Tensor, weight: Tensor, *args: Any) -> Reason | None:
    return Reason.EMPTY if weight.numel() == 0 else None


Gradients = tuple[Tensor, Tensor, Tensor]


def _like_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Gradients:
    return empty_gradients((x, weight, bias), rest[-1])


def _backward(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, sums: Tensor, stats: Tensor, dx: Tensor, dweight: Tensor,
    dbias: Tensor, reduction: str, ignore_index: int, smoothing: float, z_loss: float,
    softcap: float, wide: bool, chunk: int, needs: list[bool],
) -> Gradients:  # fmt: skip
    options = (ignore_index, smoothing, z_loss, softcap)
    outs = _like_backward(dloss, x, weight, bias, needs)
    if reduction != "none":
        scale = dloss.float()
        if reduction == "mean":
            # where all rows are ignored the loss is NaN and the gradients are 0, as in torch
            scale = torch.where(sums[1] == 0, 0.0, scale / sums[1])
        for out, total in zip(outs, (dx, dweight, dbias), strict=True):
            if out is not None:
                torch.mul(total, scale, out=out)
        return outs
    totals = [None if t is None else _total_of(t) for t in outs]
    chunks, logits = _chunks(x, weight, chunk)
    for part in chunks:
        z = _product(x[part], weight, bias, logits)
        rows.launch_backward(
            dloss[part], z, target[part], class_weight, stats[:, part], None, z, None, *options
        )
        _add_gradients(totals, z, x, weight, part)
    for out, of_all in zip(outs, totals, strict=True):
        if out is not None and of_all is not out:
            out.copy_(of_all)
    return outs


def _total_of(out: Tensor) -> Tensor:
    """Where a gradient is summed up: where it goes, if that is float32."""
    return out if out.dtype == torch.float32 else out.new_empty(out.shape, dtype=torch.float32)


def _torch_backward(dloss: Tensor, *rest: Any) -> Gradients:
    *args, needs = rest
    given, options = args[:5], args[10:]
    return tuple(gradients(definition, (*given, *options), dloss, needs)[:3])


FORWARD = LibraryOp(
    "linear_cross_entropy", _forward, like=_like, torch_form=_torch_forward,
    decline=_library_decline,
)  # fmt: skip
BACKWARD = LibraryOp(
    "linear_cross_entropy_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        class_weight: Tensor | None, *options: Any,
    ) -> Tensor:  # fmt: skip
        by_row = options[0] == "none"
        needs = [need and not by_row for need in ctx.needs_input_grad[:3]]
        loss, *kept = FORWARD.overload(x, weight, bias, target, class_weight, *options, needs)
        ctx.save_for_backward(x, weight, bias, target, class_weight, *kept)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        given, kept = saved[:5], saved[5:]
        if differentiating():
            found = second_derivative(
                "linear_cross_entropy", definition, (*given, *ctx.options), dloss, needs
            )[:3]
        else:
            found = BACKWARD.overload(dloss, *given, *kept, *ctx.options, list(needs))
        return *found, *[None] * 9


def _inference(*args: Any) -> Tensor:
    return FORWARD.overload(*args, [False, False, False])[0]


def vendor(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    chunk: int,
) -> Any:  # fmt: skip
    """torch's own in chunks, where somebody asks for chunks and it has the options."""
    if not chunk or smoothing or z_loss or softcap or wide or target.dtype != torch.int64:
        return None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, allow_retain_graph=True)
    return F.linear_cross_entropy(
        x, weight, target, linear_bias=bias, weight=class_weight, reduction=reduction,
        ignore_index=ignore_index, options=options,
    )  # fmt: skip


def _decline(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    *options: Any,
) -> Reason | None:  # fmt: skip
    """Learned labels and weights of classes are torch's, and so are dtypes that it refuses."""
    mixed = x.dtype != weight.dtype or (bias is not None and x.dtype != bias.dtype)
    learned = torch.is_grad_enabled() and target.requires_grad
    return Reason.OPTION if mixed or learned else rows.decline(x, target, class_weight, options[5])


OP = Op(
    "linear_cross_entropy", definition, LinearCrossEntropyFunction, _inference, vendor, _decline
)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = (
        f"linear_cross_entropy: input is {tuple(input.shape)}, linear_weight {tuple(weight.shape)}"
    )
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(f"{given}; input must be [rows, features] or [features]")
    if weight.dim() < 2 or weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(f"{given}; they must end in as many features")
    if weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(f"{given}; a loss of several dimensions needs rows")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"{given}, linear_bias {tuple(bias.shape)}; it must be {tuple(weight.shape[:-1])}"
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """cross_entropy(input Wᵀ + b, target), and the logits are never whole.

    `chunk_size` rows at a time, by default as many as make good products; of torch's `options`
    this is batch_chunk_size, and the others have no meaning here.
    """
    op = "linear_cross_entropy"
    _check(input, linear_weight, linear_bias)
    reduction = reduction_of(op, None, None, reduction)
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    if tuple(target.shape) == shape and ignore_index is not None:
        raise RuntimeError(f"{op}: ignore_index is {ignore_index}, but target is of probabilities")
    if chunk_size is None and options is not None:
        chunk_size = options.batch_chunk_size
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}, it must be at least 1")
    ignored = -100 if ignore_index is None else ignore_index
    if linear_weight.dim() > 2:
        flat = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, linear_weight.flatten(0, -2), flat).view(shape)
        return cross_entropy(
            logits, target, weight, None, ignored, None, reduction, label_smoothing,
            z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    return run(
        input, linear_weight, linear_bias, target, weight, reduction, ignored, label_smoothing,
        z_loss, softcap, in_autocast(input), chunk_size or 0,
    )  # fmt: skip


def run(
    input: Tensor, linear_weight: Tensor, bias: Tensor | None, target: Tensor,
    weight: Tensor | None, reduction: str, ignore_index: int, smoothing: float, z_loss: float,
    softcap: float, wide: bool, chunk: int,
) -> Tensor:  # fmt: skip
    """The op, on rows."""
    shape = (*input.shape[:-1], linear_weight.shape[0])
    probabilities = rows.check(
        "linear_cross_entropy", shape, target, weight, ignore_index, smoothing
    )
    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), target.reshape((1, -1) if probabilities else 1)
    if weight is not None and in_autocast(input):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    input, linear_weight, bias = autocast_to_lower(input, linear_weight, bias)
    loss = OP(
        input, linear_weight, bias, target, weight, reduction, ignore_index,
        max(float(smoothing), 0.0), float(z_loss), float(softcap), wide, chunk,
    )  # fmt: skip
    return loss.view(()) if single and reduction == "none" else loss
