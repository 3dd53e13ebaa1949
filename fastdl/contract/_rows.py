"""What the contracts of norms of rows share. `call` makes a call of rows of a shape."""

from collections.abc import Callable
from typing import Any

import torch

from .case import BadCall, BenchCase, Case, bad_calls_of

Call = Callable[..., Any]


def cases(call: Call) -> list[Case]:
    return [
        Case("odd rows", "masks of rows and columns", call((37,), (45,)), spelled=True),
        Case("two dimensions", "several normalized dimensions", call((3, 4), (5, 7)), spelled=True),
        Case("no rows before", "normalizing all there is", call((), (33,)), spelled=True),
        Case("one row", "a size of 1", call((1,), (64,)), spelled=True),
        Case("many rows", "several rows a program, and a tail", call((131,), (24,)), spelled=True),
        Case("wide", "rows beyond the registers, with a tail", call((5,), (300,)), core=True, spelled=True),
        Case("beyond 65536", "a block that Triton would refuse", call((2,), (65600,))),
        Case("residual", "h, and its gradient in two places", call((37,), (45,), residual=True, prenorm=True), core=True, spelled=True),
        Case("residual alone", "a gradient of h that never comes", call((7,), (40,), residual=True), spelled=True),
        Case("prenorm alone", "h when there is no residual", call((7,), (40,), prenorm=True)),
        Case("large eps", "eps inside of the root", call((9,), (40,), eps=0.5)),
    ]  # fmt: skip


def empty(call: Call) -> list[Case]:
    return [
        Case("no rows", "gradients of weights are zeros", call((0,), (8,))),
        Case("no columns", "a reduced dimension of 0", call((4,), (0,))),
    ]


def bad_calls(op: str) -> list[BadCall]:
    bad, x = bad_calls_of(op), torch.ones(2, 4)
    return [
        bad("shape", x, (3,), says=("(2, 4)", "(3,)")),
        bad("no shape", x, (), says=("(2, 4)", "()")),
        bad("weight", x, (4,), torch.ones(3), says=("(4,)", "(3,)")),
    ]


def one_pass(call: Call) -> list[Case]:
    return [
        Case("tall", "bytes", call((256,), (64,))),
        Case("tall, all", "bytes", call((256,), (64,), residual=True, prenorm=True)),
    ]


def bench(
    call: Call, rows: int, cols: int, backward: bool = False, cast: str = "", residual: bool = False
) -> BenchCase:
    words = [f"{rows}x{cols}", cast, "residual" * residual, "backward" * backward]
    tensors = (4 if residual else 2) + (3 if backward else 0)  # backward reads two and writes one
    options: dict[str, Any] = {"cast": cast} if cast else {}
    make = call((rows,), (cols,), residual=residual, prenorm=residual, **options)
    name = " ".join(word for word in words if word)
    return BenchCase(name, make, 2 * tensors * rows * cols, 0, backward=backward)
