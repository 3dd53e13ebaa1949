"""Embedding: rows of a table by index. Its gradient is summed in a fixed order, without atomics."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    SPELLINGS,
    LibraryOp,
    Op,
    Spelling,
    differentiating,
    gradients,
    second_derivative,
)
from ._route import Reason

EMBEDDING_FWD = Kernel("embedding.embedding_fwd")
EMBEDDING_BWD_CHUNKS = Kernel("embedding.embedding_bwd_chunks")
EMBEDDING_BWD = Kernel("embedding.embedding_bwd")


def definition(
    weight: Tensor, ids: Tensor, padding_idx: int | None, max_norm: float | None,
    norm_type: float, by_freq: bool, sparse: bool,
) -> Tensor:  # fmt: skip
    """weight[ids]; no gradient goes to the row of padding_idx."""
    return F.embedding(ids, weight, padding_idx, max_norm, norm_type, by_freq, sparse)


def choose(n_ids: int, n_cols: int, device: Device) -> Config:
    """32 elements a thread: several 16-byte loads are under way while indices arrive."""
    small = device.backend == "interpreter"
    block = min(power_of_2(n_cols), 32 if small else 2048)
    rows = max((512 if small else 4096) // block, 1)
    columns = cdiv(n_cols, block)
    while rows > 1 and cdiv(n_ids, rows) * columns < 2 * device.sms:
        rows //= 2
    return Config({"ROWS": rows, "BLOCK": block}, _warps(rows * block), 1)


def choose_backward(n_ids: int, n_cols: int, device: Device) -> tuple[Config, Config]:
    """For chunks and for rows of the table. 16 to 32 elements a thread, of which several are of one
    run.

    A run has at most two chunks' worth of positions outside of whole chunks. With √n / 4 a chunk
    that is about as many as the chunks of the commonest of words.
    """
    small = device.backend == "interpreter"
    chunk = max(power_of_2(math.isqrt(n_ids) // 4), 8 if small else 32)
    block = min(power_of_2(n_cols), 32 if small else 1024)
    pos = 2 if small else 4 if block >= 512 else 8
    rows = max((256 if small else 2048) // block // pos, 1)
    most = min(max((256 if small else 4096) // block, 1), chunk)
    return (
        Config({"CHUNK": chunk, "POS": most, "BLOCK": block}, _warps(most * block), 1),
        Config(
            {"CHUNK": chunk, "ROWS": rows, "POS": pos, "BLOCK": block},
            _warps(rows * pos * block),
            1,
        ),
    )


def _warps(elements: int) -> int:
    return max(min(elements // 512, 4), 1)


def _like(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _forward(weight: Tensor, ids: Tensor) -> Tensor:
    y = _like(weight, ids)
    n_rows, n_cols = weight.shape
    if ids.device.type == "cpu":
        _check_range(ids, n_rows)
    config = choose(ids.numel(), n_cols, device_of(weight))
    launch(
        EMBEDDING_FWD, (cdiv(ids.numel(), config["ROWS"]), cdiv(n_cols, config["BLOCK"])),
        weight, ids.contiguous(), y,
        ids.numel(), n_rows, n_cols, *weight.stride(),
        config=config,
    )  # fmt: skip
    return y


def _check_range(ids: Tensor, n_rows: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_rows:
        raise IndexError(
            f"embedding: an index is out of range: they are {low} to {high}, the table has {n_rows}"
            " rows"
        )


def _torch_forward(weight: Tensor, ids: Tensor) -> Tensor:
    return definition(weight, ids, None, None, 2.0, False, False)


def _decline(tensor: Tensor, ids: Tensor, *args: Any) -> Reason | None:
    return None if ids.numel() else Reason.EMPTY


def _like_backward(
    dy: Tensor, ids: Tensor, n_rows: int, padding: int | None, by_freq: bool
) -> Tensor:
    return dy.new_empty((n_rows, dy.shape[-1]))


def _backward(dy: Tensor, ids: Tensor, n_rows: int, padding: int | None, by_freq: bool) -> Tensor:
    dweight = _like_backward(dy, ids, n_rows, padding, by_freq)
    dy, n_cols, n_ids = dy.contiguous(), dy.shape[-1], ids.numel()
    for_chunks, for_rows = choose_backward(n_ids, n_cols, device_of(dy))
    # half the bytes to sort; indices that int32 does not hold are none of the table's
    known = ids.flatten() if n_rows >= 2**31 else ids.flatten().to(torch.int32)
    found, order = known.sort(stable=True)
    rows = torch.arange(n_rows + 1, dtype=found.dtype, device=found.device)
    starts = torch.searchsorted(found, rows, out_int32=n_ids < 2**31)
    n_chunks, columns = n_ids // for_chunks["CHUNK"], cdiv(n_cols, for_chunks["BLOCK"])
    padding = -1 if padding is None else padding
    sums = dy.new_empty((n_chunks, n_cols), dtype=torch.float32) if n_chunks else None
    if n_chunks:
        launch(
            EMBEDDING_BWD_CHUNKS, (n_chunks, columns),
            dy, found, order, sums, n_cols, padding,
            config=for_chunks,
        )  # fmt: skip
    launch(
        EMBEDDING_BWD, (cdiv(n_rows, for_rows["ROWS"]), columns),
        dy, order, starts, sums, dweight, n_rows, n_cols, padding,
        BY_FREQ=by_freq, config=for_rows,
    )  # fmt: skip
    return dweight


def _stand_in(dy: Tensor, n_rows: int) -> Tensor:
    """For the table, which is not kept: its gradient does not depend on it."""
    return dy.new_zeros((), requires_grad=True).expand(n_rows, dy.shape[-1])


def _torch_backward(
    dy: Tensor, ids: Tensor, n_rows: int, padding: int | None, by_freq: bool
) -> Tensor:
    args = (_stand_in(dy, n_rows), ids, padding, None, 2.0, by_freq, False)
    return gradients(definition, args, dy, [True])[0].contiguous()


FORWARD = LibraryOp("embedding", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp(
    "embedding_backward", _backward,
    like=_like_backward, torch_form=_torch_backward, decline=_decline,
)  # fmt: skip


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_rows, ctx.options = weight.shape[0], options
        return FORWARD.overload(weight, ids)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        padding_idx, _, _, by_freq, _ = ctx.options
        if differentiating():
            args = (_stand_in(dy, ctx.n_rows), ids, *ctx.options)
            dweight = second_derivative("embedding", definition, args, dy, [True])[0]
        else:
            dweight = BACKWARD.overload(dy, ids, ctx.n_rows, padding_idx, by_freq)
        return dweight, None, None, None, None, None, None


def _inference(weight: Tensor, ids: Tensor, *options: Any) -> Tensor:
    return FORWARD.overload(weight, ids)


def _needs_torch(
    weight: Tensor, ids: Tensor, padding_idx: int | None, max_norm: float | None,
    norm_type: float, by_freq: bool, sparse: bool,
) -> Reason | None:  # fmt: skip
    """max_norm writes into the table, and sparse gradients are another kind of tensor."""
    return Reason.OPTION if sparse or max_norm is not None else None


OP = Op("embedding", definition, EmbeddingFunction, _inference, decline=_needs_torch)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """weight[input], the row of padding_idx without a gradient.

    An index that the table does not have is an IndexError on a CPU; on a GPU, where nobody can wait
    for it, its row is NaN.
    """
    _check(input, weight)
    if padding_idx is not None:
        n_rows = weight.shape[0]
        if not -n_rows <= padding_idx < max(n_rows, 1):
            raise AssertionError(
                f"embedding: padding_idx is {padding_idx}, the table has {n_rows} rows"
            )
        padding_idx = padding_idx + n_rows if padding_idx < 0 else padding_idx
    return OP(weight, input, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _check(ids: Tensor, weight: Tensor) -> None:
    if not isinstance(ids, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(
            f"embedding: input is a {type(ids).__name__} and weight a {type(weight).__name__};"
            " both must be tensors"
        )
    if weight.dim() != 2:
        raise RuntimeError(f"embedding: weight is {tuple(weight.shape)}, it must be 2-D")
    if ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"embedding: input is {ids.dtype}, allowed are torch.int64, torch.int32")
    if ids.device != weight.device:
        raise RuntimeError(
            f"embedding: input is on {ids.device}, weight on {weight.device}; they must match"
        )


def _pattern(
    input: Any, weight: Any, padding_idx: Any, norm_type: Any, scale_grad_by_freq: Any
) -> Tensor:
    return F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, False)


def _call(
    input: Any, weight: Any, padding_idx: Any, norm_type: Any, scale_grad_by_freq: Any
) -> "partial[Any]":
    return partial(embedding, input, weight, padding_idx, None, norm_type, scale_grad_by_freq)


SPELLINGS.append(Spelling(_pattern, _call))
