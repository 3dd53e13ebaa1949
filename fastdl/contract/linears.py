"""The contract of linear layers of one input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .. import functional as FF
from .case import BadCall, BenchCase, Case, Maker, Spec
from .linear import SMALL, shapes

Make = Callable[[Maker], "partial[Any]"]


def call(m: tuple[int, ...], ns: tuple[int, ...], k: int, biases: str = "") -> Make:
    """`biases` has a letter for each weight: b where it has one. Without letters, no list is given."""

    def make(t: Maker) -> "partial[Any]":
        x, weights = t(*m, k), [t(n, k, scale=SMALL) for n in ns]
        if not biases:
            return partial(FF.linears, x, weights)
        return partial(
            FF.linears, x, weights,
            [t(n) if letter == "b" else None for n, letter in zip(ns, biases, strict=True)],
        )  # fmt: skip

    return make


def tied(t: Maker) -> "partial[Any]":
    x, w = t(24, 24), t(20, 24)
    return partial(FF.linears, x, [w, x, w])


def strides_of_their_own(t: Maker) -> "partial[Any]":
    return partial(FF.linears, t(9, 24), [t(20, 24), t(30, 60)[:, :24], t(12, 24)])


CASES = [
    Case("three", "masks at the edges of each weight", call((18,), (17, 40, 9), 21, "b-b"), core=True, exact=True, spelled=True),
    Case("two", "the place of a weight that is not there", call((9,), (20, 20), 24, "bb"), exact=True, spelled=True),
    Case("no biases", "missing biases", call((3, 2, 3), (8, 20, 8), 17), exact=True, spelled=True),
    Case("the last bias alone", "which weight a bias belongs to", call((9,), (17, 5, 20), 20, "--b"), exact=True, spelled=True),
    Case("the second bias alone", "which weight a bias belongs to", call((9,), (17, 20), 20, "-b"), exact=True),
    Case("one vector", "a 1-d input", call((), (17, 5), 9), exact=True),
    Case("one of everything", "sizes of 1, which Triton specialises", call((1,), (1, 1, 1), 1), exact=True),
    Case("few rows, split", "slices of K and their sum", call((3,), (20, 33, 9), 520, "bb-"), spelled=True),
    Case("few rows, exact", "slices of K and their sum", call((2,), (9, 20), 300, "-b"), exact=True),
    Case("persistent", "descriptors, the order of tiles, and programs that go from weight to weight", call((520,), (112, 80, 64), 32, "b-b"), spelled=True),
    Case("input and weights alike", "gradients of one tensor in several places", tied),
    Case("strides of their own", "rows of one weight apart as those of another", strides_of_their_own, exact=True),
]  # fmt: skip

EMPTY = [
    Case("no rows", "gradients of weights are zeros", call((0,), (8, 3), 5)),
    Case("no outputs", "one result is empty, the other is not", call((3,), (0, 4), 5, "bb")),
    Case("no inputs", "the bias, not garbage", call((3,), (8, 4), 0, "bb")),
]


def bad(name: str, sizes: Any, biases: Any, *says: str) -> BadCall:
    """torch's call is the first one that does not fit."""

    def ours() -> Any:
        x, *weights = shapes(*sizes)
        return FF.linears(x, weights, None if biases is None else shapes(*biases))

    return BadCall(name, ours, lambda: F.linear(*shapes((3, 4), (5, 6))), says)


BAD_CALLS = [
    bad("inner sizes", ((3, 4), (5, 4), (5, 6)), None, "linears", "(3, 4)", "(5, 6)"),
    bad("bias size", ((3, 4), (5, 4), (7, 4)), ((5,), (5,)), "(7, 4)", "(5,)"),
    bad("one weight", ((3, 4), (5, 4)), None, "1 weights", "2 to 3"),
    bad("four weights", ((3, 4), *[(5, 4)] * 4), None, "4 weights", "2 to 3"),
    bad("biases", ((3, 4), (5, 4), (7, 4)), ((5,),), "1 biases", "each"),
    BadCall(
        "dtypes",
        lambda: FF.linears(torch.ones(3, 4), [torch.ones(5, 4), torch.ones(5, 4).half()]),
        lambda: F.linear(torch.ones(3, 4), torch.ones(5, 4).half()),
        ("float32", "float16"),
    ),
]  # fmt: skip


def bench(
    m: int, ns: tuple[int, ...], k: int, biases: str = "", backward: bool = False
) -> BenchCase:
    """Bytes of 16-bit tensors, each once, and flops of the products.

    Forward reads x once, where a product for each weight reads it as often as there are weights.
    Of three weights dx, the sum of three products, is written three times and read twice;
    autograd writes three products and two sums and reads four: 5 m k elements against 9.
    """
    n = sum(ns)
    bytes, flops = 2 * (m * k + n * k + (n if biases else 0) + m * n), 2 * m * n * k
    if backward:
        # products with x and with the weights: dy is read in both, dx and dweight are written
        bytes, flops = bytes + 2 * (2 * m * k + 2 * n * k + 2 * m * n), 3 * flops
    words = [
        f"{m}x{'+'.join(map(str, ns))}x{k}",
        *(["biases"] if biases else []),
        *(["backward"] if backward else []),
    ]
    return BenchCase(" ".join(words), call((m,), ns, k, biases), bytes, flops, backward=backward)


# Queries, keys and values of Llama 8B and of GPT-2 medium; gate and up.
GROUPED, EQUAL, GATED = (4096, 1024, 1024), (1024, 1024, 1024), (14336, 14336)

SPEC = Spec(
    "linears",
    CASES,
    ("linears", "linears_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    bench=[
        bench(8192, GROUPED, 4096),
        bench(2048, GROUPED, 4096),
        bench(8192, EQUAL, 1024, "bbb"),
        bench(8192, GATED, 4096),
        bench(16, GROUPED, 4096),
        bench(16, GATED, 4096),
        bench(8192, GROUPED, 4096, backward=True),
        bench(8192, EQUAL, 1024, "bbb", backward=True),
    ],
)
