"""The contract of linear layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from ..ops.activation import ACTIVATIONS
from .case import BadCall, BenchCase, Case, Maker, Spec

# Weights of this size keep outputs near 1.
SMALL = 0.2


def call(
    m: tuple[int, ...], n: int, k: int, bias: bool = True, residual: bool = False, **options: Any
) -> "Callable[[Maker], partial[Any]]":
    def make(t: Maker) -> "partial[Any]":
        args = (t(*m, k), t(n, k, scale=SMALL), t(n) if bias else None)
        given = {**options, "residual": t(*m, n)} if residual else options
        return partial(FF.linear, *args, **given)

    return make


def broadcast_residual(t: Maker) -> "partial[Any]":
    return partial(FF.linear, t(3, 5, 24), t(40, 24), t(40), residual=t(5, 1))


def prelu(t: Maker) -> "partial[Any]":
    module = nn.PReLU(device=t.device, dtype=t.dtype)
    return partial(FF.linear, t(9, 16), t(20, 16), t(20), activation=module, residual=t(9, 20))


def tied(t: Maker) -> "partial[Any]":
    x = t(24, 24)
    return partial(FF.linear, x, x)


CASES = [
    Case("rows and columns past a block", "masks at the edges", call((37,), 70, 45), core=True, exact=True, spelled=True),
    Case("no bias", "a missing bias", call((9,), 40, 33, bias=False), exact=True, spelled=True),
    Case("several leading dimensions", "the shape of the output", call((3, 2, 7), 33, 20, activation="relu"), exact=True, spelled=True),
    Case("one vector", "a 1-d input", call((), 17, 9), exact=True),
    Case("one of everything", "sizes of 1, which Triton specialises", call((1,), 1, 1), exact=True, spelled=True),
    Case("residual", "adding after the activation", call((37,), 41, 24, residual=True, activation="relu"), exact=True, core=True, spelled=True),
    Case("broadcast residual", "a residual that torch would broadcast", broadcast_residual),
    Case("few rows, split", "slices of K and their sum", call((3,), 20, 520, activation="gelu"), spelled=True),
    Case("few rows, exact", "slices of K and their sum", call((2,), 9, 300), exact=True),
    Case("many tiles", "the order of tiles", call((150,), 140, 40), exact=True),
    Case("persistent", "descriptors, and programs with several tiles", call((520,), 264, 48, activation="silu"), spelled=True),
    Case("persistent, exact", "descriptors, and programs with several tiles", call((520,), 264, 32), exact=True),
    Case("dropout", "one mask in both passes", call((37,), 42, 24, activation="gelu", dropout_p=0.4), core=True),
    Case("dropout and residual", "the mask before the residual", call((5, 8), 24, 24, residual=True, dropout_p=0.5)),
    Case("dropout of everything", "no division by 1 - p", call((5,), 8, 8, dropout_p=1.0)),
    Case("not training", "no mask when not training", call((5,), 8, 8, dropout_p=0.5, training=False), exact=True),
    Case("activation module", "parameters of a torch module", call((9,), 20, 16, activation=nn.LeakyReLU(0.3))),
    Case("unknown module", "a module that kernels do not know", prelu),
    Case("input is weight", "gradients of one tensor in two places", tied),
    *(
        Case(f"{name}", f"the epilogue and derivative of {name}", call((19,), 36, 24, activation=name), spelled=name != "none")
        for name in [*ACTIVATIONS, "relu6"]
        if name not in ("none", "relu6")
    ),
    Case("relu6", "an alias", call((19,), 36, 24, activation="relu6"), spelled=False),
    Case("softplus with parameters", "beta and threshold", call((19,), 36, 24, activation=("softplus", 2.0, 1.5)), spelled=True),
    Case("rising slope", "a negative slope, where the output does not tell the sign", call((19,), 36, 24, activation=("leaky_relu", -0.5))),
]  # fmt: skip

EMPTY = [
    Case("no rows", "gradients of weights are zeros", call((0,), 8, 5)),
    Case("no outputs", "an empty result", call((3,), 0, 5)),
    Case("no inputs", "act(bias), not garbage", call((3,), 8, 0, activation="gelu")),
]


def shapes(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(*size) for size in sizes]


def bad(name: str, makes: Callable[[], list[Any]], says: tuple[str, ...]) -> BadCall:
    return BadCall(name, lambda: FF.linear(*makes()), lambda: F.linear(*makes()), says)


def different_devices() -> None:
    raise RuntimeError


BAD_CALLS = [
    bad("inner sizes", lambda: shapes((3, 4), (5, 6)), ("(3, 4)", "(5, 6)")),
    bad("bias size", lambda: shapes((3, 4), (5, 4), (6,)), ("(5, 4)", "(6,)")),
    bad("dtypes", lambda: [torch.randn(3, 4), torch.randn(5, 4).half()], ("float32", "float16")),
    # torch raises this between real devices; with meta, the only other one here, it does not
    BadCall(
        "devices",
        lambda: FF.linear(torch.randn(3, 4), torch.randn(5, 4, device="meta")),
        different_devices,
        ("cpu", "meta"),
    ),
]


def cost(m: int, n: int, k: int, residual: bool = False) -> tuple[int, int]:
    """Bytes of 16-bit tensors, each once, and flops of the product."""
    return 2 * (m * k + n * k + n + m * n * (2 if residual else 1)), 2 * m * n * k


def bench(m: int, n: int, k: int, backward: bool = False, **options: Any) -> BenchCase:
    act = options.get("activation") or "none"
    name = f"{m}x{n}x{k} {act}{' backward' if backward else ''}"
    bytes, flops = cost(m, n, k)
    if backward:
        # two products of the same size; x, dy, z and the weight read, dz written and read twice
        bytes, flops = bytes + 2 * (2 * m * k + 2 * n * k + 5 * m * n), 3 * flops
    return BenchCase(name, call((m,), n, k, **options), bytes, flops, backward=backward)


SPEC = Spec(
    "linear",
    CASES,
    ("linear", "linear_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[(FF.linear, lambda input, weight, bias=None: None)],
    modules=[lambda: (fnn.Linear(8, 6), nn.Linear(8, 6), torch.randn(4, 8))],
    bench=[
        bench(8192, 8192, 8192),
        bench(8192, 4096, 1024, activation="gelu"),
        bench(8192, 4096, 1024, activation="relu"),
        bench(8192, 1024, 4096),
        bench(8192, 4096, 1024, activation="gelu", backward=True),
        bench(65536, 1024, 1024, activation="gelu"),
        bench(16, 8192, 8192),
        bench(256, 512, 512, activation="relu"),
    ],
)
