"""The contract of gated units, and of the perceptron around them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .case import BadCall, BenchCase, Case, Maker, Spec

Make = Callable[[Maker], "partial[Any]"]


def halves(*shape: int, **options: Any) -> Make:
    return lambda t: partial(FF.glu, t(*shape), **options)


def pair(*shape: int, **options: Any) -> Make:
    return lambda t: partial(FF.glu, t(*shape), gate=t(*shape), **options)


def parts(t: Maker) -> "partial[Any]":
    """What lies past the last row of these is not NaN."""
    return partial(FF.glu, t(20, 24)[:9], gate=t(20, 60)[:9, :24], activation="relu")


def transposed_gate(t: Maker) -> "partial[Any]":
    return partial(FF.glu, t(9, 24), gate=t(24, 9).t(), activation="relu")


def prelu(t: Maker) -> "partial[Any]":
    return partial(FF.glu, t(9, 16), activation=nn.PReLU(device=t.device, dtype=t.dtype))


def mlp(
    m: int, k: int, h: int, joined: bool = False, bias: bool = True, residual: bool = False,
    **options: Any,
) -> Make:  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, scale = t(m, k), 0.2
        gate, up = (
            t(2 * h if joined else h, k, scale=scale),
            None if joined else t(h, k, scale=scale),
        )
        down, sizes = t(k, h, scale=scale), (gate.shape[0], 0 if joined else h, k)
        biases = [t(size) if bias and size else None for size in sizes]
        given = {**options, "residual": t(m, k)} if residual else options
        return partial(FF.gated_mlp, x, gate, up, down, *biases, **given)

    return make


CASES = [
    Case("halves", "masks of rows and columns", halves(37, 90), core=True, spelled=True),
    Case("gate first", "the order of halves", halves(9, 80, activation="silu", gate_first=True), spelled=True),
    Case("two tensors", "a gradient that nobody asks for", pair(11, 43, activation="gelu"), core=True, spelled=True),
    Case("two tensors, exact", "several blocks of columns", pair(5, 311, activation="relu"), exact=True, spelled=True),
    Case("halves, exact", "several blocks of rows and columns", halves(19, 134, activation="relu", gate_first=True), exact=True),
    Case("channels", "a dimension in the middle, and the order of memory", halves(2, 6, 3, 5, dim=1, activation="silu"), core=True, spelled=True),
    Case("first dimension", "rows that begin the tensor", halves(6, 7, dim=0, activation="relu"), exact=True, spelled=True),
    Case("one column", "columns that do not lie side by side", halves(150, 2, activation="relu"), exact=True),
    Case("one vector", "a single dimension", halves(34, dim=0)),
    Case("one of everything", "sizes of 1, which Triton specialises", halves(1, 2)),
    Case("no activation", "a derivative of 1", halves(5, 46, activation=None), exact=True, spelled=True),
    Case("parameters", "bounds that backward forgets", halves(9, 44, activation=("hardtanh", -0.5, 0.7)), spelled=True),
    Case("parts of tensors", "rows past the end, and a stride of the gate's own", parts, exact=True),
    Case("transposed gate", "two orders of memory", transposed_gate, exact=True),
    Case("unknown module", "a module that kernels do not know", prelu),
    Case("perceptron", "gate and up in their places", mlp(7, 12, 24), spelled=True),
    Case("perceptron of one weight", "the gate's rows first", mlp(7, 12, 20, joined=True, activation="relu"), exact=True),
    Case("perceptron with a residual", "adding after all", mlp(7, 12, 24, bias=False, residual=True, activation="gelu_tanh"), spelled=True),
]  # fmt: skip

EMPTY = [
    Case("no rows", "no launch", halves(0, 8)),
    Case("no columns", "halves of nothing", halves(4, 0)),
]


def bad(name: str, ours: Callable[[], Any], torchs: Callable[[], Any], *says: str) -> BadCall:
    return BadCall(name, ours, torchs, says)


X, LONG = torch.ones(2, 5), torch.ones(2, 4, dtype=torch.long)
BAD_CALLS = [
    bad("odd", lambda: FF.glu(X), lambda: F.glu(X), "(2, 5)", "even"),
    bad("dimension", lambda: FF.glu(X, 2), lambda: F.glu(X, 2), "2", "-2 to 1"),
    bad("scalar", lambda: FF.glu(X[0, 0]), lambda: F.glu(X[0, 0]), "scalar"),
    bad("integers", lambda: FF.glu(LONG), lambda: F.glu(LONG), "int64", "floating"),
    bad("gate", lambda: FF.glu(X, gate=X[:, :2]), lambda: X * X[:, :2], "[2, 5]", "[2, 2]"),
    bad("gate's dtype", lambda: FF.glu(X, gate=X.half()), lambda: F.linear(X, X.half()), "float32", "float16"),
    bad("up", lambda: FF.gated_mlp(X, X, X.t(), X), lambda: F.linear(X, X) * F.linear(X, X.t()), "(2, 5)", "(5, 2)"),
    bad("one weight", lambda: FF.gated_mlp(X, X[:1], None, X), lambda: F.glu(X), "(1, 5)", "even"),
]  # fmt: skip


def bench(rows: int, cols: int, two: bool, backward: bool = False, **options: Any) -> BenchCase:
    words = [f"{rows}x{cols}", options["activation"], "of two" if two else "of one"]
    make = pair(rows, cols, **options) if two else halves(rows, 2 * cols, **options)
    # backward reads three and writes two
    tensors = 8 if backward else 3
    name = " ".join([*words, "backward"] if backward else words)
    return BenchCase(name, make, 2 * tensors * rows * cols, 0, backward=backward)


def bench_mlp(m: int, k: int, h: int, **options: Any) -> BenchCase:
    """Both passes, with and without recomputing: bytes and flops are of what is needed at least."""
    name = f"perceptron {m}x{k}x{h} {'recomputed ' if options.get('recompute') else ''}backward"
    # three weights, read twice and their gradients written; x, y, dy, dx; gate, up and their product
    # and the three gradients, each written once and read once a pass
    bytes = 2 * (9 * k * h + 5 * m * k + 15 * m * h)
    return BenchCase(
        name, mlp(m, k, h, bias=False, **options), bytes, 18 * m * k * h, backward=True
    )


SPEC = Spec(
    "glu",
    CASES,
    ("glu", "glu_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.glu, F.glu)],
    modules=[
        lambda: (fnn.GLU(), nn.GLU(), torch.randn(4, 8)),
        lambda: (fnn.GLU(1), nn.GLU(1), torch.randn(2, 6, 3, 4)),
    ],
    bench=[
        bench(16384, 14336, two=True, activation="silu"),
        bench(16384, 14336, two=False, activation="silu", gate_first=True),
        bench(65536, 1280, two=False, activation="gelu"),
        bench(4096, 11008, two=True, activation="silu"),
        bench(16384, 14336, two=True, activation="silu", backward=True),
        bench(16384, 14336, two=False, activation="silu", gate_first=True, backward=True),
        bench_mlp(8192, 4096, 14336),
        bench_mlp(8192, 4096, 14336, recompute=True),
    ],
    one_pass=[
        Case("halves", "the halves of one tensor", halves(220, 90)),
        Case("two tensors", "two tensors", pair(220, 45, activation="silu")),
    ],
)
