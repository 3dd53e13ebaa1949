"""The contract of instance normalization, whose kernels are those of group normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from .batchnorm import statistics
from .case import BenchCase, Case, Maker, Spec, bad_calls_of
from .groupnorm import channels_last


def call(
    shape: tuple[int, ...], weight: bool = True, own: bool = True, residual: bool = False,
    last: bool = False, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape), dict(options)
        factors = (t(shape[1]), t(shape[1])) if weight else (None, None)
        if residual:
            given["residual"] = t(*shape)
        running = (None, None) if own else statistics(shape[1], t)
        args = (x, *running, *factors, own)
        if last:
            return partial(channels_last, FF.instance_norm, *args, **given)
        return partial(FF.instance_norm, *args, **given)

    return make


CASES = [
    Case("whole", "several channels a program, and a tail", call((5, 3, 2, 3)), core=True),
    Case("tiles", "channels that are merged", call((2, 3, 12, 13), activation="leaky_relu", residual=True)),
    Case("channels last", "strides", call((2, 10, 12), last=True, activation="relu")),
    Case("no weight", "missing factors", call((2, 3, 7), weight=False)),
    Case("given statistics", "those of the batch, as batch_norm takes them", call((2, 3, 7), own=False, activation="relu")),
]  # fmt: skip

EMPTY = [
    Case("no samples", "gradients of weights are zeros", call((0, 4, 3))),
]


bad = bad_calls_of("instance_norm")
X = torch.ones(2, 4, 3)
BAD_CALLS = [
    bad("one pixel", X[:, :, :1], says=("(2, 4, 1)", "more than 1")),
    bad("two dimensions", X[0], says=("(4, 3)", "more than 1")),
    bad("weight", X, weight=torch.ones(3), says=("(2, 4, 3)", "(3,)")),
    bad("no statistics", X, use_input_stats=False, says=("running_mean is None",)),
]


def bench(shape: tuple[int, ...], backward: bool = False) -> BenchCase:
    tensors = 5 if backward else 2
    name = "x".join(map(str, shape)) + (" backward" if backward else "")
    bytes = 2 * tensors * torch.Size(shape).numel()
    return BenchCase(name, call(shape, weight=False), bytes, 0, backward=backward)


SPEC = Spec(
    "instance_norm",
    CASES,
    ("group_norm", "group_norm_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.instance_norm, F.instance_norm)],
    modules=[
        lambda: (fnn.InstanceNorm1d(3), nn.InstanceNorm1d(3), torch.randn(2, 3, 5)),
        lambda: (fnn.InstanceNorm2d(3, affine=True), nn.InstanceNorm2d(3, affine=True), torch.randn(3, 5, 5)),
        lambda: (fnn.InstanceNorm3d(3, track_running_stats=True), nn.InstanceNorm3d(3, track_running_stats=True), torch.randn(2, 3, 2, 2, 2)),
    ],
    bench=[bench((16, 64, 128, 128)), bench((16, 64, 128, 128), backward=True)],
)  # fmt: skip
