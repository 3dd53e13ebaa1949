"""The contract of causal convolutions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from .case import BadCall, BenchCase, Case, Maker, Spec


def call(
    images: int, channels: int, length: int, width: int, bias: bool = True, last: bool = False,
    past: bool = False, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    """`last`: channels lie in a line, as where a transposed projection is the input."""

    def make(t: Maker) -> "partial[Any]":
        x = t(images, length, channels).transpose(1, 2) if last else t(images, channels, length)
        args = (x, t(channels, width, scale=0.5), t(channels) if bias else None)
        if past:
            return partial(FF.causal_conv1d, *args, initial_states=t(images, channels, width - 1))
        return partial(FF.causal_conv1d, *args, **options)

    return make


CASES = [
    Case("positions in a line", "taps that see the future, tails", call(2, 11, 41, 4, activation="silu"), core=True),
    Case("channels in a line", "taps that see the future, tails", call(2, 41, 11, 4, last=True, activation="silu")),
    Case("plain", "sums of each tap", call(2, 11, 41, 3), exact=True),
    Case("channels in a line, exact", "sums of each tap", call(3, 37, 19, 3, last=True, activation="relu"), exact=True),
    Case("no bias", "a missing bias", call(1, 5, 7, 2, bias=False, activation="gelu")),
    Case("initial states", "what came before", call(2, 6, 9, 4, past=True), exact=True),
    Case("short", "fewer positions than taps", call(2, 6, 2, 5), exact=True),
    Case("one tap", "no padding at all", call(2, 6, 5, 1)),
]  # fmt: skip


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv1d(x, weight.unsqueeze(1), bias, groups=x.shape[1])


def bad(name: str, says: tuple[str, ...], *shapes: tuple[int, ...]) -> BadCall:
    given = [torch.ones(shape) for shape in shapes]
    return BadCall(name, lambda: FF.causal_conv1d(*given), lambda: torchs(*given), says)


def bench(images: int, channels: int, length: int, last: bool, backward: bool = False) -> BenchCase:
    elements = images * channels * length
    # backward reads dy, z and x, and writes dx; forward writes z for it
    bytes = 2 * elements * (7 if backward else 2)
    words = [f"{images}x{channels}x{length}", "last" * last, "backward" * backward]
    make = call(images, channels, length, 4, last=last, activation="silu")
    flops = 2 * elements * 4 * (3 if backward else 1)
    return BenchCase(" ".join(filter(None, words)), make, bytes, flops, backward=backward)


SPEC = Spec(
    "causal_conv1d",
    CASES,
    ("causal_conv1d", "causal_conv1d_backward"),
    empty=[Case("no images", "gradients of weights are zeros", call(0, 4, 5, 3))],
    bad_calls=[
        bad("channels", ("(2, 4, 5)", "(3, 2)"), (2, 4, 5), (3, 2)),
        bad("bias", ("(3,)", "(4,)"), (2, 4, 5), (4, 2), (3,)),
    ],
    bench=[
        bench(8, 4096, 2048, last=False),
        bench(8, 4096, 2048, last=True),
        bench(8, 4096, 2048, last=False, backward=True),
        bench(8, 4096, 2048, last=True, backward=True),
    ],
)
