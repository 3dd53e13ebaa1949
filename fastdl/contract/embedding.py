"""The contract of embedding."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of

Make = Callable[[Maker], "partial[Any]"]
Indices = Callable[[torch.Size, int], Tensor]


def spread(shape: torch.Size, rows: int) -> Tensor:
    """Indices of no order: most rows are found, some of them several times, some never."""
    at = torch.arange(shape.numel())
    return ((at * at * 7 + at // 3) % rows).view(shape)


def once(shape: torch.Size, rows: int) -> Tensor:
    """Every row once, as far as indices go."""
    return (torch.arange(shape.numel()) * 7919 % rows).view(shape)


def skewed(shape: torch.Size, rows: int) -> Tensor:
    """Row 2 for more than half of them, row 5 for a quarter: runs of many chunks."""
    at = torch.arange(shape.numel())
    found = torch.where(at % 7 < 4, 2, at * 5 % rows)
    return torch.where(at % 4 == 3, 5, found).view(shape)


def words(shape: torch.Size, rows: int) -> Tensor:
    """As often as the words of a language, by Zipf's law."""
    share = torch.arange(shape.numel()) * 7919 % 65521 / 65521  # vmap forbids to draw
    return (rows**share).long().sub(1).view(shape)


def call(
    shape: tuple[int, ...], rows: int, cols: int, ids: Indices = spread,
    dtype: torch.dtype = torch.int64, swapped: bool = False, **options: Any,
) -> Make:  # fmt: skip
    """`swapped` stores the indices in another order of dimensions."""

    def make(t: Maker) -> "partial[Any]":
        weight = t(rows, cols)
        if t.device == "meta":
            found = torch.empty(shape, dtype=dtype, device="meta")
        else:
            found = ids(torch.Size(shape), rows).to(dtype).to(t.device)
        found = found.t().contiguous().t() if swapped else found
        return partial(FF.embedding, found, weight, **options)

    return make


CASES = [
    Case("odd", "masks of indices, rows and columns, and rows that are never seen", call((3, 13), 23, 45), core=True, spelled=True, exact=True),
    Case("skewed", "runs of many chunks, and what is left of them at both ends", call((3, 51), 11, 37, skewed), core=True, exact=True),
    Case("skewed, wide", "chunks of several blocks of columns", call((90,), 7, 70, skewed)),
    Case("one row", "a single run", call((90,), 1, 16)),
    Case("narrow", "many rows a program", call((70,), 90, 3, words), spelled=True, exact=True),
    Case("one column", "a stride that is 1 in both directions", call((20,), 9, 1)),
    Case("padding", "a row without a gradient", call((4, 9), 10, 20, padding_idx=3), core=True, spelled=True, exact=True),
    Case("padding, skewed", "chunks of the row without a gradient", call((90,), 10, 20, skewed, padding_idx=2), exact=True),
    Case("last row is padding", "a negative padding_idx", call((4, 9), 10, 20, padding_idx=-1), spelled=True),
    Case("by frequency", "gradients over counts, chunks among them", call((90,), 12, 20, skewed, scale_grad_by_freq=True, padding_idx=5), spelled=True),
    Case("int32", "another dtype of indices", call((5, 6), 12, 20, dtype=torch.int32), exact=True),
    Case("swapped", "strides of indices", call((5, 6), 12, 20, swapped=True)),
    Case("one index", "no dimensions", call((), 12, 20), spelled=True),
    Case("a batch of one", "fewer indices than rows of a tile", call((1, 1), 5, 8)),
]  # fmt: skip

EMPTY = [
    Case("no indices", "the gradient is zeros", call((0, 3), 5, 8)),
    Case("no columns", "rows of nothing", call((4,), 5, 0)),
]


bad = bad_calls_of("embedding")
W, IDS = torch.ones(4, 3), torch.tensor([1, 2])
BAD_CALLS = [
    bad("past the end", torch.tensor([1, 4]), W, says=("index", "range")),
    bad("below 0", torch.tensor([-1]), W, says=("index", "range")),
    bad("weight", IDS, torch.ones(4), says=("(4,)", "2-D")),
    bad("dtype", torch.ones(2), W, says=("float32", "int64", "int32")),
    bad("padding", IDS, W, 4, says=("4 rows", "padding_idx is 4")),
    bad("negative padding", IDS, W, -5, says=("4 rows", "padding_idx is -5")),
    bad("a list", [1, 2], W, says=("list", "tensors")),
]


def bench(n_ids: int, rows: int, cols: int, backward: bool = False) -> BenchCase:
    """Forward reads every row that is found once; backward reads gradients and writes the table."""
    name = f"{n_ids} of {rows}x{cols}{' backward' if backward else ''}"
    moved = 2 * (found_of(n_ids, rows) + n_ids) * cols + 8 * n_ids
    if backward:
        moved += 2 * (n_ids + rows) * cols + 8 * n_ids
    return BenchCase(name, call((n_ids,), rows, cols, words), moved, 0, backward=backward)


def found_of(n_ids: int, rows: int) -> int:
    """How many rows `words` finds: the common ones all, the others as often as they are drawn."""
    common = n_ids / math.log(rows)
    return int(min(common + n_ids * max(1 - math.log(common) / math.log(rows), 0), rows))


SPEC = Spec(
    "embedding",
    CASES,
    ("embedding", "embedding_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.embedding, F.embedding)],
    modules=[
        lambda: (fnn.Embedding(9, 4), nn.Embedding(9, 4), torch.arange(6).view(2, 3)),
        lambda: (fnn.Embedding(9, 4, -2), nn.Embedding(9, 4, -2), torch.arange(9)),
        lambda: (fnn.Embedding(9, 4, max_norm=0.5), nn.Embedding(9, 4, max_norm=0.5), torch.arange(9)),
    ],
    one_pass=[Case("every row once", "", call((300,), 300, 64, once))],
    bench=[
        bench(16384, 128256, 4096),
        bench(65536, 50304, 768),
        bench(1 << 20, 4096, 64),
        bench(16384, 128256, 4096, backward=True),
        bench(65536, 50304, 768, backward=True),
        bench(1 << 20, 4096, 64, backward=True),
    ],
)  # fmt: skip
