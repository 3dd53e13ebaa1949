"""The contract of softmax and log-softmax."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from .attention import blind, some
from .case import BadCall, BenchCase, Case, Maker, Spec


def call(
    *shape: int, dim: int = -1, log: bool = False, mean: float = 0.0, spread: float = 1.0,
    mask: tuple[int, ...] | None = None, bias: tuple[int, ...] | None = None,
    seen: Callable[[Tensor], Tensor] = lambda mask: mask, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    """With a boolean mask, changed by `seen`, or one that is added and has a gradient."""

    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape, scale=spread, shift=mean), dict(options)
        if mask is not None:
            given["mask"] = seen(some(t, *mask))
        if bias is not None:
            given["mask"] = t(*bias)
        return partial(FF.log_softmax if log else FF.softmax, x, dim, **given)

    return make


def late(mask: Tensor) -> Tensor:
    """Nothing is seen in the first blocks, and something in the last column."""
    mask = mask.clone()
    mask[..., :150], mask[..., -1] = False, True
    return mask


CASES = [
    Case("odd rows", "masks of rows and columns", call(37, 45), core=True, spelled=True),
    Case("log of rows", "another gradient", call(37, 45, log=True), spelled=True),
    Case("channels", "columns, and outputs that are not channels_last", call(3, 5, 3, 4, dim=1, log=True, scale=0.5), core=True, spelled=True),
    Case("columns", "a tail of columns", call(3, 37, 11, dim=1), spelled=True),
    Case("first dimension", "columns without a batch", call(40, 6, dim=0, scale=-2.0), spelled=True),
    Case("many rows", "several rows a program, and a tail", call(51, 24), spelled=True),
    Case("wide", "rows beyond the registers, with a tail", call(5, 300, mean=30.0), spelled=True),
    Case("wide, all", "a first block of which nothing is seen", call(5, 300, log=True, scale=0.5, mask=(300,), seen=late)),
    Case("wide columns", "columns beyond the registers", call(2, 90, 9, dim=1, scale=0.5, mask=(90, 9)), spelled=True),
    Case("beyond 65536", "a block that Triton would refuse", call(2, 65600)),
    Case("no dimensions", "one element", call(dim=0)),
    Case("one of one", "rows of 1, whose gradient is 0", call(9, 1)),
    Case("far from 0", "exponentials that overflow", call(9, 40, mean=200.0, spread=60.0)),
    Case("in float32", "a cast of the input", call(9, 40, dtype=torch.float32, scale=0.5), spelled=True),
    Case("bias", "a mask that is added, and its gradient over the batch", call(4, 3, 5, 20, bias=(3, 5, 20), scale=0.5), core=True, spelled=True),
    Case("bias of columns", "a bias of another place in each sample", call(2, 6, 3, 5, dim=1, bias=(2, 6, 1, 5))),
    Case("mask of heads", "rows that share a mask with others", call(2, 3, 5, 20, log=True, mask=(2, 1, 5, 20)), spelled=True),
    Case("mask of windows", "a mask that is broadcast more than the kernels follow", call(2, 3, 2, 5, 9, mask=(3, 1, 5, 9))),
    Case("hidden rows", "a fill that is finite, and gradients of what is hidden", call(9, 40, mask=(9, 40), seen=blind, fill=-1e4)),
    Case("wide, hidden rows", "gradients of what is hidden in long rows", call(6, 200, log=True, mask=(6, 200), seen=blind, fill=-1e4)),
]  # fmt: skip

EMPTY = [
    Case("no rows", "no launch", call(0, 8)),
    Case("no columns", "a reduced dimension of 0", call(4, 0)),
    Case("no rows, a bias", "the gradient of the bias is zeros", call(0, 8, bias=(8,))),
]


def bad(name: str, *args: Any, says: tuple[str, ...], **options: Any) -> BadCall:
    return BadCall(name, lambda: FF.softmax(*args, **options), lambda: F.softmax(*args), says)


X = torch.ones(2, 4)
BAD_CALLS = [
    bad("dimension", X, 5, says=("softmax", "5", "-2 to 1")),
    bad("name of a dimension", X, "rows", says=("'rows'", "int")),
    bad("integers", X.long(), 1, says=("Long",)),
    BadCall(
        "mask",
        lambda: FF.log_softmax(X, 1, mask=torch.ones(3)),
        lambda: F.log_softmax(X + torch.ones(3), 1),
        ("log_softmax", "(3,)", "(2, 4)"),
    ),
    BadCall(
        "mask of integers",
        lambda: FF.softmax(X, 1, mask=torch.ones(4).long()),
        lambda: X.masked_fill(torch.ones(4).long(), 0.0),
        ("int64", "bool"),
    ),
]


def bench(*shape: int, backward: bool = False, **options: Any) -> BenchCase:
    size = torch.Size(shape).numel()
    # forward reads one and writes one, backward reads two and writes one
    moved = 2 * size * (5 if backward else 2)
    words = ["x".join(map(str, shape)), "log" if options.get("log") else ""]
    words += [f"dim={options['dim']}" if "dim" in options else "", "backward" if backward else ""]
    if options.get("mask") is not None:
        words.append("masked")
        moved += torch.Size(options["mask"]).numel() * (2 if backward else 1)
    make = call(*shape, **options)
    return BenchCase(" ".join(filter(None, words)), make, moved, 0, backward=backward)


SPEC = Spec(
    "softmax",
    CASES,
    ("softmax", "softmax_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[
        (FF.softmax, F.softmax),
        (FF.log_softmax, F.log_softmax),
        (FF.softmin, F.softmin),
    ],
    modules=[
        lambda: (fnn.Softmax(1), nn.Softmax(1), torch.randn(4, 8)),
        lambda: (fnn.LogSoftmax(0), nn.LogSoftmax(0), torch.randn(4, 8)),
        lambda: (fnn.Softmin(1), nn.Softmin(1), torch.randn(4, 8)),
        lambda: (fnn.Softmax2d(), nn.Softmax2d(), torch.randn(2, 3, 4, 5)),
    ],
    one_pass=[
        Case("rows", "rows in one pass", call(256, 100)),
        Case("columns", "columns in one pass", call(4, 30, 64, dim=1, log=True)),
        Case("masked", "a mask of all", call(256, 100, scale=0.5, mask=(256, 100))),
    ],
    bench=[
        bench(32768, 1024),
        bench(8192, 4096),
        bench(2048, 32768),
        bench(512, 131072),
        bench(256, 262144),
        bench(8192, 4096, log=True),
        bench(32768, 1024, backward=True),
        bench(8192, 4096, backward=True),
        bench(512, 131072, backward=True),
        bench(16, 64, 256, 256, dim=1, backward=True),
        bench(8, 21, 512, 512, dim=1, log=True),
        bench(4, 16, 2048, 2048, scale=0.125, mask=(4, 1, 2048, 2048)),
    ],
)  # fmt: skip
