"""The contract of negative log likelihood."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of
from .cross_entropy import class_weights, labels


def call(*shape: int, weight: bool = False, ignored: int | None = None, **options: Any) -> Any:
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape), dict(options)
        if weight:
            given["weight"] = class_weights(t, shape[1])
        if ignored is not None and ignored != -100:
            given["ignore_index"] = ignored
        return partial(FF.nll_loss, x, labels(x, shape[1], ignored), **given)

    return make


CASES = [
    Case("odd rows", "masks of rows and classes", call(37, 45), core=True, spelled=True),
    Case("sum", "every element is exact", call(37, 5, reduction="sum"), exact=True, spelled=True),
    Case("ignored and weighted", "the mean's denominator", call(21, 150, ignored=-100, weight=True), core=True, spelled=True),
    Case("rows", "every row with its own gradient", call(7, 150, ignored=3, reduction="none"), core=True, exact=True, spelled=True),
    Case("pixels", "rows side by side, classes apart", call(2, 9, 5, 7, weight=True)),
]  # fmt: skip


bad = bad_calls_of("nll_loss")
X, Y = torch.ones(3, 5), torch.tensor([0, 1, 4])
N = 1 << 15
SPEC = Spec(
    "nll_loss",
    CASES,
    ("nll_loss", "nll_loss_backward"),
    empty=[Case("no rows", "a mean of nothing", call(0, 8))],
    bad_calls=[
        bad("rows", X, Y[:2], says=("(3, 5)", "(2,)")),
        bad("no classes", torch.tensor(1.0), torch.tensor(0), says=("()",)),
        bad("weight", X, Y, torch.ones(4), says=("(5,)", "(4,)")),
        bad("no such class", X, torch.tensor([0, 5, 1]), says=("5", "out of bounds")),
    ],
    signatures=[(FF.nll_loss, F.nll_loss)],
    modules=[lambda: (fnn.NLLLoss(ignore_index=4), nn.NLLLoss(ignore_index=4), (X, Y))],
    # forward touches an element a row, backward writes them all
    bench=[BenchCase("32768x1000 backward", call(N, 1000), 2 * N * 1000, 0, backward=True)],
)
