"""The contract of RMS normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .case import BadCall, BenchCase, Case, Maker, Spec


def call(
    rows: tuple[int, ...], shape: tuple[int, ...], weight: bool = True, eps: float | None = 1e-6,
    residual: bool = False, mean: float = 0.0, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*rows, *shape, shift=mean), dict(options)
        factor = t(*shape) if weight else None
        if residual:
            given["residual"] = t(*rows, *shape)
        return partial(FF.rms_norm, x, shape, factor, eps, **given)

    return make


CASES = [
    Case("odd rows", "masks of rows and columns", call((37,), (45,)), spelled=True),
    Case("no weight", "a missing weight", call((9,), (32,), weight=False), spelled=True),
    Case("two dimensions", "several normalized dimensions", call((3, 4), (5, 7)), spelled=True),
    Case("no rows before", "normalizing all there is", call((), (33,)), spelled=True),
    Case("one column", "a row that is its own mean, and eps", call((9,), (1,), eps=0.1)),
    Case("one row", "a size of 1", call((1,), (64,)), spelled=True),
    Case("many rows", "several rows a program, and a tail", call((131,), (24,)), spelled=True),
    Case("heads", "four dimensions, of which the last is normalized", call((2, 5, 3), (16,)), spelled=True),
    Case("wide", "rows beyond the registers, with a tail", call((5,), (300,)), core=True, spelled=True),
    Case("wide, all", "an offset and a residual of rows beyond the registers", call((5,), (200,), residual=True, prenorm=True, weight_offset=1.0)),
    Case("wide, no weight", "a missing weight of rows beyond the registers", call((3,), (200,), weight=False)),
    Case("wide, rounded", "the cast of rows beyond the registers", call((3,), (200,), cast="llama")),
    Case("beyond 65536", "a block that Triton would refuse", call((2,), (65600,))),
    Case("residual", "h, and its gradient in two places", call((37,), (45,), residual=True, prenorm=True), core=True, spelled=True),
    Case("residual alone", "a gradient of h that never comes", call((7,), (40,), residual=True), spelled=True),
    Case("prenorm alone", "h when there is no residual", call((7,), (40,), prenorm=True)),
    Case("gemma", "an offset that backward forgets", call((9,), (40,), weight_offset=1.0, cast="gemma")),
    Case("offset", "an offset other than 1", call((9,), (40,), weight_offset=-0.5, cast="torch")),
    Case("offset, no weight", "an offset of nothing", call((9,), (40,), weight=False, weight_offset=1.0)),
    Case("llama", "a cast before the weight", call((9,), (40,), cast="llama"), core=True),
    Case("all", "everything at once", call((3, 5), (24,), residual=True, prenorm=True, weight_offset=1.0, cast="llama")),
    Case("mean far from 0", "rows that are centered", call((9,), (90,), mean=100.0)),
    Case("wide, mean far from 0", "wide rows that are centered", call((3,), (400,), mean=100.0)),
    Case("large eps", "eps inside of the root", call((9,), (40,), eps=0.5)),
    Case("eps of torch", "a missing eps", call((9,), (40,), eps=None), spelled=True),
]  # fmt: skip

EMPTY = [
    Case("no rows", "the gradient of the weight is zeros", call((0,), (8,))),
    Case("no columns", "a reduced dimension of 0", call((4,), (0,))),
]


def bad(name: str, *args: Any, says: tuple[str, ...]) -> BadCall:
    return BadCall(name, lambda: FF.rms_norm(*args), lambda: F.rms_norm(*args), says)


X = torch.ones(2, 4)
BAD_CALLS = [
    bad("shape", X, (3,), says=("(2, 4)", "(3,)")),
    bad("no shape", X, (), says=("(2, 4)", "()")),
    bad("weight", X, (4,), torch.ones(3), says=("(4,)", "(3,)")),
]


def bench(rows: int, cols: int, backward: bool = False, **options: Any) -> BenchCase:
    tensors = 4 if options.get("residual") else 2
    words = [f"{rows}x{cols}", options.get("cast", ""), "residual" if tensors == 4 else ""]
    name = " ".join(word for word in (*words, "backward" if backward else "") if word)
    make = call((rows,), (cols,), prenorm=tensors == 4, **options)
    if backward:
        tensors += 3  # backward reads two and writes one
    return BenchCase(name, make, 2 * tensors * rows * cols, 0, backward=backward)


SPEC = Spec(
    "rms_norm",
    CASES,
    ("rms_norm", "rms_norm_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.rms_norm, F.rms_norm)],
    modules=[
        lambda: (fnn.RMSNorm(8), nn.RMSNorm(8), torch.randn(4, 8)),
        lambda: (fnn.RMSNorm((2, 4), eps=0.1), nn.RMSNorm((2, 4), eps=0.1), torch.randn(3, 2, 4)),
        lambda: (fnn.RMSNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False), torch.randn(4, 8)),
    ],
    one_pass=[
        Case("tall", "bytes", call((256,), (64,))),
        Case("tall, all", "bytes", call((256,), (64,), residual=True, prenorm=True)),
    ],
    bench=[
        bench(262144, 128),
        bench(32768, 1024),
        bench(16384, 4096),
        bench(4096, 16384),
        bench(1024, 65536),
        bench(16384, 4096, cast="llama"),
        bench(16384, 4096, residual=True),
        bench(16384, 4096, residual=True, cast="llama"),
        bench(16384, 1024, backward=True),
        bench(16384, 4096, backward=True),
    ],
)  # fmt: skip
