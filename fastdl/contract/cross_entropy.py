"""The contract of cross entropy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of


def labels(x: Tensor, classes: int, ignored: int | None = None) -> Tensor:
    """An index for each row of x, every third of them to be ignored."""
    shape = (x.shape[0], *x.shape[2:])
    count = torch.arange(torch.Size(shape).numel() if x.dim() > 2 else x.shape[0], device=x.device)
    found = (count * 7 + 3) % classes
    if ignored is not None:
        found = torch.where(count % 3 == 1, ignored, found)
    return found.view(shape) if x.dim() > 2 else found


def class_weights(t: Maker, classes: int) -> Tensor:
    """Exact in every dtype."""
    return ((torch.arange(classes, device=t.device) % 8 + 1) / 8).to(t.dtype)


def call(
    *shape: int, weight: bool = False, ignored: int | None = None, probabilities: bool = False,
    mean: float = 0.0, scale: float = 1.0, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, classes = t(*shape, shift=mean, scale=scale), shape[1]
        target = t(*shape) if probabilities else labels(x, classes, ignored)
        given = dict(options)
        if weight:
            given["weight"] = class_weights(t, classes)
        if ignored is not None and ignored != -100:
            given["ignore_index"] = ignored
        return partial(FF.cross_entropy, x, target, **given)

    return make


CASES = [
    Case("odd rows", "masks of rows and classes", call(37, 45), core=True, spelled=True),
    Case("few classes", "several rows a program, and a tail", call(131, 5), spelled=True),
    Case("one class", "a loss of 0", call(9, 1), spelled=True),
    Case("long rows", "an online sum with a tail, every row with its own gradient", call(7, 150, reduction="none", ignored=-100, weight=True), core=True, spelled=True),
    Case("ignored and weighted", "the mean's denominator", call(21, 45, ignored=-100, weight=True), spelled=True),
    Case("another index ignored", "an ignored index that is a class", call(9, 200, ignored=3, reduction="sum"), spelled=True),
    Case("smoothing", "all classes beside the one", call(9, 200, label_smoothing=0.3, ignored=-100), spelled=True),
    Case("weighted smoothing", "the sum of weights", call(9, 45, label_smoothing=0.3, weight=True, ignored=2, reduction="none"), spelled=True),
    Case("probabilities", "gradients of both", call(9, 90, probabilities=True), core=True, spelled=True),
    Case("weighted probabilities", "weights and smoothing of probabilities", call(9, 45, probabilities=True, weight=True, label_smoothing=0.2, reduction="none"), spelled=True),
    Case("pixels", "rows side by side, classes apart", call(2, 19, 5, 7, ignored=-100, weight=True)),
    Case("pixels, none reduced", "the shape of the loss", call(2, 5, 3, 4, reduction="none", label_smoothing=0.1)),
    Case("probabilities of pixels", "labels whose classes are apart", call(2, 9, 11, probabilities=True, reduction="sum"), spelled=True),
    Case("many classes", "blocks of a row whose rows begin at multiples of 16 bytes", call(3, 8208, reduction="sum"), spelled=True),
    Case("z-loss", "the square of lse, and its mean", call(9, 200, z_loss=0.1, ignored=-100, weight=True)),
    Case("z-loss of rows", "the square of lse of a row", call(9, 45, z_loss=0.1, ignored=-100, reduction="none")),
    Case("softcap", "tanh in both passes", call(9, 200, softcap=2.0, scale=3.0)),
    Case("all", "everything at once", call(9, 200, softcap=5.0, z_loss=0.01, label_smoothing=0.1, weight=True, ignored=-100, reduction="sum")),
    Case("all of probabilities", "everything at once", call(9, 90, softcap=5.0, z_loss=0.01, label_smoothing=0.1, weight=True, probabilities=True)),
    Case("mean far from 0", "cancellation", call(9, 200, mean=100.0, label_smoothing=0.1)),
    Case("probabilities, far from 0", "cancellation in sums of z", call(9, 200, mean=100.0, probabilities=True)),
]  # fmt: skip

EMPTY = [
    Case("no rows", "a mean of nothing", call(0, 8)),
    Case("no rows, none reduced", "an empty loss", call(0, 8, reduction="none")),
]


bad = bad_calls_of("cross_entropy")
X, Y, W = torch.ones(3, 5), torch.tensor([0, 1, 4]), torch.rand(5)
BAD_CALLS = [
    bad("rows", X, Y[:2], says=("(3, 5)", "(2,)")),
    bad("inner", torch.ones(2, 5, 3), torch.zeros(2, 2).long(), says=("(2, 5, 3)", "(2, 2)")),
    bad("weight", X, Y, torch.ones(4), says=("(5,)", "(4,)")),
    bad("dtype of indices", X, Y.int(), says=("int32", "int64")),
    bad("indices like probabilities", X, X.long(), says=("int64", "floating point")),
    bad("probabilities ignored", X, X, ignore_index=1, says=("ignore_index is 1",)),
    bad("smoothing", X, Y, label_smoothing=2.0, says=("2.0", "between 0 and 1")),
    bad("reduction", X, Y, reduction="avg", says=("avg", "none, mean, sum")),
    bad("no such class", X, torch.tensor([0, 5, 1]), says=("5", "out of bounds")),
    bad("negative class", X, torch.tensor([0, -1, 1]), says=("-1", "out of bounds")),
    bad("dtype of weight", X, Y, torch.ones(5).half(), says=("Half",)),
]


def bench(
    rows: int, classes: int, backward: bool = False, dtype: torch.dtype = torch.bfloat16
) -> BenchCase:
    name = f"{rows}x{classes}{' backward' if backward else ''}"
    # backward reads the logits again and writes their gradient
    bytes = dtype.itemsize * rows * classes * (3 if backward else 1)
    return BenchCase(name, call(rows, classes), bytes, 0, dtype, backward=backward)


SPEC = Spec(
    "cross_entropy",
    CASES,
    ("cross_entropy", "cross_entropy_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.cross_entropy, F.cross_entropy)],
    modules=[
        lambda: (fnn.CrossEntropyLoss(), nn.CrossEntropyLoss(), (X, Y)),
        lambda: (fnn.CrossEntropyLoss(W, label_smoothing=0.1, reduction="sum"), nn.CrossEntropyLoss(W, label_smoothing=0.1, reduction="sum"), (X, Y)),
    ],
    bench=[
        bench(65536, 1000),
        bench(8192, 32000),
        bench(4096, 131072),
        bench(65536, 1000, backward=True),
        bench(8192, 32000, backward=True),
        bench(4096, 131072, backward=True),
    ],
    one_pass=[
        Case("rows in a tile", "a tile that is read again", call(256, 45)),
        Case("long rows", "a row that is read again", call(256, 200, reduction="none")),
    ],
)  # fmt: skip
