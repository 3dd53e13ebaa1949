"""The contract of group normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of


def with_channels_last(t: Tensor) -> Tensor:
    """A tensor of any number of dimensions in that layout."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def channels_last(function: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> Any:
    """The call with x, and what is as large, in that layout."""

    def laid_out(t: Any) -> Any:
        large = isinstance(t, Tensor) and t.shape == x.shape
        return with_channels_last(t) if large else t

    return function(
        laid_out(x), *map(laid_out, args), **{k: laid_out(v) for k, v in options.items()}
    )


def made_last(make: "Callable[[Maker], partial[Any]]") -> "Callable[[Maker], partial[Any]]":
    """The case made of tensors in that layout: a timing has no copies."""

    def arranged(t: Maker) -> "partial[Any]":
        t.arranged = with_channels_last
        return make(t)

    return arranged


def call(
    shape: tuple[int, ...], groups: int, weight: bool = True, bias: bool = True,
    residual: bool = False, scale: tuple[int, ...] | None = None,
    shift: tuple[int, ...] | None = None, mean: float = 0.0, last: bool = False, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape, shift=mean), dict(options)
        args = (t(shape[1]) if weight else None, t(shape[1]) if bias else None)
        if residual:
            given["residual"] = t(*shape)
        if scale is not None:
            given["scale"] = t(*scale)
        if shift is not None:
            given["shift"] = t(*shift)
        if last:
            return partial(channels_last, FF.group_norm, x, groups, *args, **given)
        return partial(FF.group_norm, x, groups, *args, **given)

    return make


# In the interpreter groups of 128 elements are whole, in backward of 64. Tiles are of 256, with 16
# channels where these are last.
CASES = [
    Case("whole", "masks of groups, channels and pixels", call((4, 6, 2, 5), 2), core=True, spelled=True),
    Case("whole, modulated", "scales of samples, and their gradients", call((3, 6, 2, 3), 3, scale=(3, 6, 1, 1), shift=(6, 1, 1), activation="silu", residual=True), spelled=True),
    Case("tiles", "parts of groups that are merged", call((3, 2, 12, 75), 1, activation="silu"), core=True, spelled=True),
    Case("tiles, modulated", "scales of larger groups, and the residual of an activation", call((2, 6, 6, 7), 2, scale=(2, 6, 1, 1), shift=(2, 6, 1, 1), activation="gelu", residual=True), spelled=True),
    Case("tiles, one group", "channels that are merged in blocks", call((2, 40, 4), 1, residual=True, activation="relu"), spelled=True),
    Case("channels last", "strides, and groups that end within a tile", call((2, 20, 37), 4, last=True, residual=True, activation="relu"), core=True),
    Case("channels last, modulated", "scales in that layout", call((3, 10, 7), 2, last=True, scale=(10, 1), shift=(3, 1, 1), activation="tanh")),
    Case("one pixel", "two dimensions", call((3, 12), 3), spelled=True),
    Case("five dimensions", "cancellation in the variance", call((2, 4, 3, 2, 3), 2, mean=100.0), spelled=True),
    Case("no weight", "missing factors, and eps inside of the root", call((2, 4, 15), 2, weight=False, bias=False, eps=0.5), spelled=True),
    Case("no weight, bias", "a missing weight", call((2, 6, 5), 2, weight=False, activation="silu")),
    Case("no weight, scale", "a missing weight and shift", call((2, 6, 30), 2, weight=False, bias=False, scale=(2, 6, 1), residual=True)),
    Case("scale of pixels", "factors that the kernels do not take", call((2, 6, 5), 2, scale=(2, 6, 5), residual=True, activation="silu")),
    Case("tiles, mean far from 0", "cancellation where parts are merged", call((1, 2, 300), 1, mean=100.0)),
]  # fmt: skip

EMPTY = [
    Case("no samples", "gradients of weights are zeros", call((0, 4, 3), 2)),
]


bad = bad_calls_of("group_norm")
X = torch.ones(2, 4, 3)
BAD_CALLS = [
    bad("one dimension", X[0, 0], 1, says=("(3,)", "(N, C, ...)")),
    bad("groups", X, 3, says=("(2, 4, 3)", "3")),
    bad("no groups", X, 0, says=("num_groups is 0",)),
    bad("weight", X, 2, torch.ones(3), says=("(2, 4, 3)", "(3,)")),
    bad("bias", X, 2, None, torch.ones(3), says=("bias", "(3,)")),
    bad("one value", X[:1, :, 0], 4, says=("(1, 4)", "more than 1")),
]


def bench(
    shape: tuple[int, ...], groups: int, backward: bool = False, last: bool = False, **options: Any
) -> BenchCase:
    n = torch.Size(shape).numel()
    words = ["x".join(map(str, shape)), "channels last" if last else "", options.get("activation")]
    words += ["modulated" if "scale" in options else "", "backward" if backward else ""]
    # forward reads one and writes one; backward reads two and writes one
    tensors = 5 if backward else 2
    make = call(shape, groups, **options)
    make = made_last(make) if last else make
    return BenchCase(" ".join(filter(None, words)), make, 2 * tensors * n, 0, backward=backward)


SPEC = Spec(
    "group_norm",
    CASES,
    ("group_norm", "group_norm_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.group_norm, F.group_norm)],
    modules=[
        lambda: (fnn.GroupNorm(2, 6), nn.GroupNorm(2, 6), torch.randn(2, 6, 5)),
        lambda: (fnn.GroupNorm(3, 6, affine=False), nn.GroupNorm(3, 6, affine=False), torch.randn(2, 6, 4, 4)),
    ],
    bench=[
        bench((16, 320, 64, 64), 32, activation="silu"),
        bench((16, 320, 64, 64), 32, activation="silu", backward=True),
        bench((16, 320, 64, 64), 32, activation="silu", backward=True, last=True),
        bench((16, 1280, 16, 16), 32, activation="silu", backward=True),
        bench((64, 1280, 8, 8), 32, activation="silu", backward=True),
        bench((16, 640, 32, 32), 32, activation="silu", backward=True, scale=(16, 640, 1, 1), shift=(16, 640, 1, 1)),
        bench((1, 128, 512, 512), 32, activation="silu"),
        bench((1, 128, 512, 512), 32, activation="silu", last=True),
    ],
    one_pass=[Case("whole groups", "passes over a group", call((256, 2, 32), 1, weight=False, bias=False, activation="silu"))],
)  # fmt: skip
