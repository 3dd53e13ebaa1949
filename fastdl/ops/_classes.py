"""What losses of rows of classes share: the check of their arguments, views, and the mean.

Classes are dimension 1, of [rows, classes] or, with what follows the classes made one dimension,
of [rows, classes, inner].
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import device_of
from ._op import Op
from ._route import Reason

Shape = tuple[int, ...]


def has_probabilities(shape: Shape, target: Tensor) -> bool:
    """Whether the target gives each class of an input of this shape a probability: torch tells it
    by the shape.
    """
    return target.dim() == len(shape) and tuple(target.shape) == tuple(shape)


def check(
    op: str, shape: Shape, target: Tensor, weight: Tensor | None, ignore_index: int,
    probabilities: bool = True,
) -> bool:  # fmt: skip
    """Raise where torch would for an input of this shape. Says whether the target is of
    probabilities, where it may be.
    """
    given = f"{op}: input is {tuple(shape)}, target is {tuple(target.shape)} {target.dtype}"
    classes = shape[1] if len(shape) > 1 else shape[0] if shape else 0
    if weight is not None and tuple(weight.shape) != (classes,):
        raise RuntimeError(f"{given}, weight is {tuple(weight.shape)}; it must be {(classes,)}")
    if not (probabilities and has_probabilities(shape, target)):
        _check_indices(given, shape, target)
        return False
    if not target.is_floating_point():
        raise RuntimeError(f"{given}; probabilities must be of a floating point dtype")
    if ignore_index >= 0:
        raise RuntimeError(f"{given}; ignore_index is {ignore_index}, but probabilities have none")
    return True


def _check_indices(given: str, shape: Shape, target: Tensor) -> None:
    if not shape:
        raise ValueError(f"{given}; input must have a dimension of classes")
    if len(shape) == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ValueError(f"{given}; without rows target must be one index")
    elif target.dim() == 0 or target.shape[0] != shape[0]:
        raise ValueError(f"{given}; they must have as many rows")
    elif tuple(target.shape[1:]) != tuple(shape[2:]):
        raise RuntimeError(f"{given}; target must have the shape of input without the classes")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{given}; indices must be int64 or uint8")


def flattened(x: Tensor, dims: int) -> Tensor:
    """The dimensions from `dims` on as one, where there are several."""
    return x.flatten(dims) if x.dim() > dims + 1 else x


def row_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


def inner_of(x: Tensor) -> int:
    """How many rows there are for each of the first dimension."""
    return x.shape[2] if x.dim() == 3 else 1


def n_rows_of(x: Tensor) -> int:
    return x.shape[0] * inner_of(x)


def too_many(x: Tensor, *args: Any) -> Reason | None:
    """Kernels number rows in 32 bits."""
    return Reason.SIZE if n_rows_of(x) >= 2**30 else None


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Between rows of the first dimension, classes, and rows of the last."""
    if x is None or x.dim() < 2:
        return 0, 0, 0
    return x.stride(0), x.stride(1), x.stride(2) if x.dim() == 3 else 0


def require_known(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise as torch does on a CPU where an index is no class. On a GPU nobody waits for the
    answer: the loss is NaN.
    """
    if device_of(target).backend != "interpreter":
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds: there are {classes} classes.")


def row_weights(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row counts in the mean: the weight of its class, 0 where it is ignored."""
    if target.is_floating_point():
        return x.new_ones(row_shape(x))
    kept = target != ignore_index
    if weight is None:
        return kept.to(x.dtype)
    return torch.where(kept, weight[torch.where(kept, target, 0).long()], 0.0)


def new_losses(x: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, Tensor | None]:
    """Where kernels put the losses of rows, and what rows count, if that matters."""
    if reduction == "none":
        return x.new_empty(row_shape(x), dtype=dtype), None
    rows = x.new_empty((2, *row_shape(x)), dtype=torch.float32)
    return rows, rows[1] if reduction == "mean" else None


def reduced(losses: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss, and for the mean the sums of losses and of what rows count."""
    none = losses.new_empty(0, dtype=torch.float32)
    if reduction == "none":
        return losses, none
    if reduction == "sum":
        return losses[0].sum().to(dtype), none
    sums = losses.flatten(1).sum(1)
    return (sums[0] / sums[1]).to(dtype), sums


def put_sums(
    sums: Tensor, loss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    """In torch, what `reduced` returns beside the loss."""
    if sums.numel():
        count = row_weights(x.float(), target, weight, ignore_index).sum()
        sums.copy_(torch.stack([loss.float() * count, count]))


def like_reduced(x: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, Tensor]:
    """What `reduced` allocates."""
    sums = x.new_empty(2 if reduction == "mean" else 0, dtype=torch.float32)
    return x.new_empty(row_shape(x) if reduction == "none" else (), dtype=dtype), sums


def run_on_rows(
    op: Op, input: Tensor, target: Tensor, probabilities: bool, weight: Tensor | None,
    reduction: str, *options: Any,
) -> Tensor:  # fmt: skip
    """The op, on rows; its result has the shape of torch's."""
    shape: tuple[int, ...] = ()
    if input.dim() > 1:
        shape = row_shape(input)
    else:
        input, target = input.unsqueeze(0), target.reshape((1, -1) if probabilities else 1)
    target = flattened(target, 2 if probabilities else 1)
    loss = op(flattened(input, 2), target, weight, reduction, *options)
    return loss if reduction != "none" or loss.shape == shape else loss.view(shape)


def rows_first(dloss: Any) -> tuple[Tensor, int]:
    """The gradient of the loss side by side, and the stride between rows: 0 where it is one."""
    return dloss.contiguous(), 1 if dloss.dim() else 0
