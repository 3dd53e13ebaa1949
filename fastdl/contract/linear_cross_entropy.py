"""The contract of cross entropy of a linear layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of
from .cross_entropy import class_weights, labels


def call(
    rows: int, features: int, classes: int, bias: bool = False, weight: bool = False,
    ignored: int | None = None, probabilities: bool = False, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, w, given = t(rows, features), t(classes, features, scale=0.4), dict(options)
        if bias:
            given["linear_bias"] = t(classes)
        if probabilities:
            # exact in every dtype, and no leaf
            shares = torch.arange(classes, device=t.device) % 4 + torch.arange(x.shape[0], device=t.device)[:, None] % 3  # fmt: skip
            target = (shares / 8).to(t.dtype)
        else:
            target = labels(x, classes, ignored)
        if weight:
            given["weight"] = class_weights(t, classes)
        if ignored is not None and ignored != -100:
            given["ignore_index"] = ignored
        return partial(FF.linear_cross_entropy, x, w, target, **given)

    return make


def tied(t: Maker) -> "partial[Any]":
    """The head is the embedding that the rows are made of."""
    table = t(45, 16, scale=0.4)
    target = (torch.arange(19, device=t.device) * 7 + 3) % 45
    return partial(FF.linear_cross_entropy, table[:19] * 2.0, table, target)


def single(t: Maker) -> "partial[Any]":
    return partial(FF.linear_cross_entropy, t(8), t(9, 8), torch.full((), 4, device=t.device))


def several(t: Maker) -> "partial[Any]":
    target = (torch.arange(12, device=t.device) % 5).view(2, 6)
    return partial(FF.linear_cross_entropy, t(2, 8), t(5, 6, 8), target, linear_bias=t(5, 6))


CASES = [
    Case("chunks", "sums over chunks, and a tail", call(37, 24, 45), core=True, spelled=True),
    Case("rows", "every row with its own gradient", call(21, 16, 45, bias=True, reduction="none", ignored=-100), core=True, spelled=True),
    Case("one chunk", "nothing to sum up", call(7, 16, 45, bias=True, reduction="sum"), spelled=True),
    Case("chunks of 5", "a size that is asked for", call(13, 16, 90, chunk_size=5, ignored=2, weight=True)),
    Case("smoothing", "all classes beside the one", call(19, 16, 90, label_smoothing=0.2, weight=True, ignored=-100, bias=True), spelled=True),
    Case("probabilities", "labels in chunks", call(19, 16, 45, probabilities=True), spelled=True),
    Case("all", "everything at once", call(19, 16, 90, bias=True, softcap=4.0, z_loss=0.05, label_smoothing=0.1, weight=True, ignored=-100)),
    Case("all, of rows", "everything at once, made once more in backward", call(19, 16, 45, bias=True, softcap=4.0, z_loss=0.05, label_smoothing=0.1, weight=True, ignored=-100, reduction="none")),
    Case("tied", "gradients of one tensor in two places", tied),
    Case("one row", "no dimension of rows", single),
    Case("several dimensions", "labels of several dimensions", several),
]  # fmt: skip

EMPTY = [
    Case("no rows", "a mean of nothing", call(0, 8, 5)),
    Case("no features", "logits of 0", call(3, 0, 5)),
]


bad = bad_calls_of("linear_cross_entropy")
X, W, Y = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4])
BAD_CALLS = [
    bad("features", X, torch.ones(5, 3), Y, says=("(3, 4)", "(5, 3)")),
    bad("dimensions", torch.ones(2, 3, 4), W, Y, says=("(2, 3, 4)",)),
    bad("vector", X, torch.ones(4), Y, says=("(4,)",)),
    bad("bias", X, W, Y, linear_bias=torch.ones(4), says=("(4,)", "(5,)")),
    bad("rows", X, W, Y[:2], says=("(3, 5)", "(2,)")),
    bad("no such class", X, W, torch.tensor([0, 5, 1]), says=("5", "out of bounds")),
    bad("probabilities ignored", X, W, torch.ones(3, 5), ignore_index=-1, says=("ignore_index is -1",)),
    bad("dtypes", X, W.half(), Y, says=("Half",)),
]  # fmt: skip


# torch has it since 2.13
IN_TORCH = hasattr(F, "linear_cross_entropy")


def module(**options: Any) -> Callable[[], Any]:
    target = torch.tensor([[0, 1], [3, 4], [2, 2]])
    given = torch.randn(3, 8), target if "out_features" in options else target[:, 0]
    names = "LinearCrossEntropyLoss"
    return lambda: (
        getattr(fnn, names)(8, 5, **options), getattr(nn, names)(8, 5, **options), given
    )  # fmt: skip


def bench(rows: int, features: int, classes: int, backward: bool = True) -> BenchCase:
    name = f"{rows}x{features}x{classes}{' backward' if backward else ''}"
    # logits are no output, but one product makes them and the others read what becomes of them
    both = rows * features + classes * features
    bytes, flops = 2 * both, 2 * rows * features * classes
    if backward:
        bytes, flops = 3 * bytes, 3 * flops
    return BenchCase(name, call(rows, features, classes), bytes, flops, backward=backward)


SPEC = Spec(
    "linear_cross_entropy",
    CASES,
    ("linear_cross_entropy", "linear_cross_entropy_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS if IN_TORCH else [],
    signatures=[(FF.linear_cross_entropy, F.linear_cross_entropy)] if IN_TORCH else [],
    modules=[module(), module(bias=True, out_features=(2,), ignore_index=3)] if IN_TORCH else [],
    bench=[
        bench(8192, 4096, 32000, backward=False),
        bench(8192, 4096, 32000),
        bench(32768, 4096, 131072),
    ],
)
