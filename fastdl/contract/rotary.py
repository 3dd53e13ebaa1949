"""The contract of rotary embedding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as FF
from .case import BadCall, BenchCase, Case, Maker, Spec

Make = Callable[[Maker], "partial[Any]"]


def angles(t: Maker, rows: int, width: int, dtype: torch.dtype | None = None) -> Any:
    """The usual cos and sin, in steps that every dtype has; nothing that takes a gradient."""
    if t.device == "meta":
        return (torch.empty(rows, width, dtype=dtype or t.dtype, device="meta"),) * 2
    # every column has its own frequency, so that one taken for another shows
    frequencies = 100.0 ** -(torch.arange(width) / width)
    found = torch.outer(torch.arange(rows) + 1.0, frequencies)
    return tuple(
        (f(found) * 64).round().div(64).to(device=t.device, dtype=dtype or t.dtype)
        for f in (torch.cos, torch.sin)
    )


def at(t: Maker, rows: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Positions of no order, most of them twice."""
    if t.device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    count = torch.Size(shape).numel()
    return (torch.arange(count) // 2 * 7 % rows).view(shape).to(device=t.device, dtype=dtype)


def call(
    *shape: int, rows: int | None = None, positions: tuple[int, ...] | None = None,
    table: torch.dtype | None = None, index: torch.dtype = torch.int64, swapped: bool = False,
    **options: Any,
) -> Make:  # fmt: skip
    """A frozen table of `rows`, x's own number of them without positions; `swapped` stores x as
    [B, S, H, D].
    """

    def make(t: Maker) -> "partial[Any]":
        given, size = dict(options), rows or shape[-2]
        b, *middle, width = shape
        x = t(b, *middle[::-1], width).transpose(1, 2) if swapped else t(*shape)
        if positions is not None:
            given["positions"] = at(t, size, *positions, dtype=index)
        return partial(FF.apply_rotary_emb, x, *angles(t, size, shape[-1], table), **given)

    return make


def learned(
    shape: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None, **options: Any,
) -> Make:  # fmt: skip
    """With cos and sin that take gradients."""

    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape), dict(options)
        if positions is not None:
            given["positions"] = at(t, cos[0], *positions)
        return partial(FF.apply_rotary_emb, x, t(*cos), t(*(sin or cos)), **given)

    return make


LOW, HALF = torch.float32, torch.float16
CASES = [
    Case("halves", "masks of rows and of columns, and halves", call(2, 3, 7, 42), core=True, spelled=True),
    Case("neighbours", "pairs of neighbours", call(2, 3, 5, 38, interleaved=True), core=True, spelled=True),
    Case("learned", "gradients of tables, and of rows taken twice", learned((3, 2, 5, 10), (11, 10), positions=(5,)), core=True),
    Case("learned, whole", "gradients that are summed over what broadcasts", learned((2, 3, 5, 6), (5, 6)), exact=True),
    Case("learned, neighbours", "the transposed turn of neighbours", learned((2, 3, 5, 6), (5, 6), interleaved=True), exact=True),
    Case("[B, S, H, D] in memory", "strides of x and of the output", call(2, 5, 9, 16, swapped=True), exact=True),
    Case("[B, S, H, D] in shape", "heads that are the second last dimension", learned((2, 5, 3, 8), (5, 1, 8))),
    Case("by batch", "tables of a batch", learned((2, 3, 5, 8), (2, 1, 5, 8))),
    Case("one batch", "sizes of 1 in tables", learned((2, 3, 5, 8), (1, 1, 5, 8))),
    Case("by head", "tables that no two rows share", learned((2, 3, 5, 8), (2, 3, 5, 8))),
    Case("by head, over a batch", "tables that only the first dimension shares", learned((4, 3, 5, 8), (3, 5, 8))),
    Case("one angle", "tables of one row", learned((2, 3, 5, 8), (8,))),
    Case("one column", "tables that are no wider than 1", learned((2, 3, 5, 8), (5, 1))),
    Case("unlike tables", "cos and sin of other strides", learned((2, 3, 5, 8), (5, 8), (2, 1, 5, 8))),
    Case("five dimensions", "more than three loops", learned((2, 3, 2, 5, 6), (2, 1, 2, 5, 6))),
    Case("two dimensions", "no batch and no heads", call(9, 12)),
    Case("one dimension", "no rows at all", learned((16,), (16,))),
    Case("one pair", "a width of 2", call(2, 3, 5, 2), exact=True),
    Case("one pair of neighbours", "a width of 2", call(2, 3, 5, 2, interleaved=True)),
    Case("many heads", "several heads a program, and a rest", call(5, 43, 4, 6)),
    Case("wide", "rows of many blocks", call(3, 2100)),
    Case("float32 tables", "what is computed before it is rounded", call(2, 3, 5, 16, table=LOW)),
    Case("float16 tables", "tables of another dtype", call(2, 3, 5, 16, table=HALF)),
    Case("positions", "rows of a table", call(2, 3, 5, 16, rows=23, positions=(5,))),
    Case("positions by batch", "rows of each batch", call(3, 2, 5, 16, rows=23, positions=(3, 5))),
    Case("positions of one batch", "positions of size 1", call(3, 2, 5, 16, rows=23, positions=(1, 5))),
    Case("positions, three dimensions", "no heads", call(3, 5, 16, rows=23, positions=(3, 5))),
    Case("positions, int32", "their dtype", call(3, 2, 5, 16, rows=23, positions=(3, 5), index=torch.int32)),
    Case("decoding", "one row of each batch", call(5, 3, 1, 16, rows=23, positions=(5, 1), swapped=True, table=LOW)),
    Case("decoding one", "nothing but heads", call(1, 5, 1, 64, rows=9, positions=(1, 1))),
]  # fmt: skip

EMPTY = [
    Case("no batch", "no launch", call(0, 3, 5, 8)),
    Case("no rows", "tables of no rows", learned((2, 3, 0, 8), (0, 8))),
    Case("no columns", "a width of 0", call(2, 3, 5, 0)),
]


def bad(
    name: str, x: Tensor, cos: Tensor, like: Callable[[], Any], says: tuple[str, ...], **options: Any
) -> BadCall:  # fmt: skip
    return BadCall(name, lambda: FF.apply_rotary_emb(x, cos, cos, **options), like, says)


X, ROWS, TABLE = torch.ones(2, 3, 4, 6), torch.ones(4, 6), torch.ones(9, 6)
BAD_CALLS = [
    bad("odd", torch.ones(4, 5), torch.ones(4, 5), lambda: torch.ones(4, 5).view(4, -1, 2), ("(4, 5)", "even")),
    bad("rows", X, torch.ones(5, 6), lambda: X * torch.ones(5, 6), ("(2, 3, 4, 6)", "(5, 6)")),
    bad("half of the width", X, torch.ones(4, 3), lambda: X * torch.ones(4, 3), ("(2, 3, 4, 6)", "(4, 3)")),
    bad("enlarging", ROWS, X, lambda: ROWS.clone().mul_(X), ("(4, 6)", "(2, 3, 4, 6)")),
    bad("count of positions", X, TABLE, lambda: X * TABLE[torch.arange(3)], ("(2, 3, 4, 6)", "(3,)"), positions=torch.arange(3)),
    bad("batch of positions", X, TABLE, lambda: X * torch.ones(3, 1, 4, 6), ("(3, 4)", "(B, S)"), positions=torch.zeros(3, 4).long()),
    bad("dtype of positions", X, TABLE, lambda: TABLE[torch.ones(4)], ("float32", "int64"), positions=torch.ones(4)),
]  # fmt: skip


def bench(
    b: int, heads: int, s: int, d: int, *, swapped: bool = True, interleaved: bool = False,
    table: torch.dtype = torch.bfloat16, decode: int = 0, backward: bool = False,
) -> BenchCase:  # fmt: skip
    """As models have it, [B, S, H, D] in memory; `decode` is the length of the tables."""
    options: dict[str, Any] = {"rows": decode, "positions": (b, s)} if decode else {}
    make = call(b, heads, s, d, table=table, swapped=swapped, interleaved=interleaved, **options)
    words = {
        "plain": not swapped, "neighbours": interleaved, "decoding": decode,
        "float32 tables": table == torch.float32, "backward": backward,
    }  # fmt: skip
    name = " ".join([f"{b}x{heads}x{s}x{d}", *(word for word, is_so in words.items() if is_so)])
    # cos and sin once, and x in and out; with positions a row of each and 8 bytes a token
    tables = 2 * d * table.itemsize * (b * s if decode else s) + (8 * b * s if decode else 0)
    bytes = 2 * 2 * b * heads * s * d + tables
    # backward does not read x: it moves as much as forward
    return BenchCase(name, make, bytes * 2 if backward else bytes, 0, backward=backward)


SPEC = Spec(
    "rotary",
    CASES,
    ("rotary", "rotary_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    bench=[
        bench(4, 32, 4096, 128),
        bench(4, 8, 4096, 128),
        bench(4, 32, 4096, 128, table=torch.float32),
        bench(4, 32, 4096, 128, swapped=False),
        bench(8, 16, 4096, 64),
        bench(4, 32, 4096, 80),
        bench(4, 32, 4096, 128, interleaved=True),
        bench(256, 32, 1, 128, decode=8192, table=torch.float32),
        bench(4, 32, 4096, 128, backward=True),
        bench(4, 32, 4096, 128, interleaved=True, backward=True),
    ],
)
