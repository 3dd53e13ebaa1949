"""The contract of batch normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of
from .groupnorm import channels_last, made_last


def statistics(channels: int, t: Maker) -> tuple[torch.Tensor, torch.Tensor]:
    """Running ones of which every channel has another; they have no gradient."""
    mean = torch.linspace(-0.5, 1.0, channels).to(t.device, t.dtype)
    return mean, torch.linspace(0.5, 1.5, channels).to(t.device, t.dtype)


def call(
    shape: tuple[int, ...], training: bool = True, weight: bool = True, bias: bool = True,
    residual: bool = False, mean: float = 0.0, last: bool = False, eps: float = 1e-5,
    wide: bool = False, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    """`wide` parameters are float32 where x is less, as in mixed precision."""

    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape, shift=mean), dict(options)
        factors = [t(shape[1]) if has else None for has in (weight, bias)]
        if wide:
            dtype = torch.promote_types(t.dtype, torch.float32)
            factors = [None if factor is None else factor.to(dtype) for factor in factors]
        if residual:
            given["residual"] = t(*shape)
        running = (None, None) if training else statistics(shape[1], t)
        args = (x, *running, *factors, training, 0.1, eps)
        if last:
            return partial(channels_last, FF.batch_norm, *args, **given)
        return partial(FF.batch_norm, *args, **given)

    return make


# In the interpreter tiles are of 256 elements, with 16 channels where these are last.
CASES = [
    Case("training", "statistics of samples that are merged, without cancellation", call((4, 6, 7, 3), mean=100.0), spelled=True),
    Case("many pixels", "parts of a sample that are merged, of two lengths, the last with a tail", call((2, 2, 12, 75), activation="relu"), spelled=True),
    Case("residual", "a derivative taken at the output", call((4, 5, 3, 7), residual=True, activation="relu"), core=True, spelled=True),
    Case("residual, kept", "a derivative that needs the residual", call((4, 5, 30), residual=True, activation="silu"), spelled=True),
    Case("residual, bounded", "an output that rounding moves to a bound", call((4, 5, 30), residual=True, activation="relu6"), spelled=True),
    Case("residual alone", "no activation", call((4, 3, 9), residual=True), spelled=True),
    Case("two dimensions", "channels that lie side by side", call((37, 19), activation="silu"), spelled=True),
    Case("channels last", "strides", call((3, 10, 5, 5), last=True, activation="gelu"), core=True),
    Case("five dimensions, last", "strides of more dimensions", call((2, 20, 3, 2, 3), last=True, residual=True, activation="relu")),
    Case("no weight", "missing factors, and eps inside of the root", call((3, 4, 20), weight=False, bias=False, eps=0.5), spelled=True),
    Case("no weight, bias", "a missing weight", call((3, 4, 20), weight=False, activation="silu")),
    Case("evaluation", "statistics that do not depend on x", call((3, 5, 30), training=False), core=True, spelled=True),
    Case("evaluation, residual", "given statistics, and a gradient that is written on the way", call((3, 10, 9), training=False, residual=True, activation="silu", last=True)),
    Case("evaluation, no weight", "no sums", call((3, 5, 9), training=False, weight=False, bias=False, activation="hardswish"), spelled=True),
]  # fmt: skip

EMPTY = [
    Case("no samples", "gradients of weights are zeros", call((0, 4, 3))),
    Case("no pixels", "a reduced dimension of 0", call((2, 4, 0), training=False)),
]


bad = bad_calls_of("batch_norm")
X, FOUR, THREE = torch.ones(2, 4, 3), torch.ones(4), torch.ones(3)
BAD_CALLS = [
    bad("weight", X, FOUR, FOUR, THREE, says=("(2, 4, 3)", "weight", "(3,)")),
    bad("bias", X, FOUR, FOUR, FOUR, THREE, says=("bias", "(3,)")),
    bad("statistics", X, THREE, FOUR, says=("running_mean", "(3,)")),
    bad("no statistics", X, None, None, says=("running_mean is None",)),
    bad("half of them", X, FOUR, None, training=True, says=("both",)),
    bad("gradient", X, torch.ones(4, requires_grad=True), FOUR, says=("running_mean", "gradient")),
    bad("eps", X, FOUR, FOUR, eps=-1.0, says=("-1.0",)),
    bad("eps in training", X, FOUR, FOUR, training=True, eps=0.0, says=("0.0", "positive")),
    bad("one value", X[:1, :, 0], None, None, training=True, says=("(1, 4)", "more than 1")),
]


def bench(
    shape: tuple[int, ...], backward: bool = False, last: bool = False, **options: Any
) -> BenchCase:
    n, residual = torch.Size(shape).numel(), options.get("residual", False)
    words = ["x".join(map(str, shape)), options.get("activation"), "residual" if residual else ""]
    words += ["channels last" if last else "", "backward" if backward else ""]
    # x twice and y, since all of x must be seen before the first y
    tensors = 4 if residual else 3
    if backward:
        # dy and x twice and dx; with a residual its gradient is written and read in place of dy,
        # and y is read once
        tensors += 7 if residual else 5
    make = call(shape, wide=True, **options)
    make = made_last(make) if last else make
    return BenchCase(" ".join(filter(None, words)), make, 2 * tensors * n, 0, backward=backward)


SPEC = Spec(
    "batch_norm",
    CASES,
    ("batch_norm", "batch_norm_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.batch_norm, F.batch_norm)],
    modules=[
        lambda: (fnn.BatchNorm1d(6), nn.BatchNorm1d(6), torch.randn(4, 6)),
        lambda: (fnn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, affine=False), torch.randn(2, 6, 4, 4)),
        lambda: (fnn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None), torch.randn(2, 6, 4, 4)),
        lambda: (fnn.BatchNorm3d(3, track_running_stats=False), nn.BatchNorm3d(3, track_running_stats=False), torch.randn(2, 3, 2, 2, 2)),
    ],
    bench=[
        bench((256, 64, 56, 56), activation="relu", last=True),
        bench((256, 64, 56, 56), activation="relu", last=True, backward=True),
        bench((256, 64, 56, 56), activation="relu", backward=True),
        bench((256, 256, 56, 56), activation="relu", residual=True, last=True, backward=True),
        bench((256, 2048, 7, 7), activation="relu", residual=True, last=True, backward=True),
        bench((256, 2048, 7, 7), activation="relu", residual=True, backward=True),
        bench((65536, 1024), activation="relu", backward=True),
    ],
)  # fmt: skip
