"""The contract of elementwise activations and dropout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from ..ops.activation import ACTIVATIONS
from .case import BadCall, BenchCase, Case, Maker, Spec


def call(*shape: int, scale: float = 3.0, op: Any = FF.activation, **options: Any) -> Any:
    def make(t: Maker) -> "partial[Any]":
        return partial(op, t(*shape, scale=scale), **options)

    return make


# Piecewise linear with whole slopes and bounds: integers stay integers.
EXACT = {"relu", "relu2"}

CASES = [
    *(
        Case(
            name,
            f"{name} and its derivative",
            call(37, 43, name=name),
            core=name in ("relu", "gelu", "mish"),
            exact=name in EXACT,
            spelled=True,
        )
        for name in ACTIVATIONS
        if name != "none"
    ),
    Case("relu6", "an alias", call(7, 9, name="relu6")),
    Case("far from 0", "overflow of exponentials", call(1030, scale=60.0, name="mish")),
    Case("gelu far from 0", "overflow of cubes", call(1030, scale=60.0, name="gelu_tanh")),
    Case("softplus far from 0", "overflow below a large threshold", call(300, scale=40.0, name=("softplus", 1.0, 1e4))),
    Case("near 0", "cancellation", call(1030, scale=1e-3, name="tanh")),
    Case("elu near 0", "cancellation", call(1030, scale=1e-3, name="elu")),
    Case("channels last", "strides of the output", call(2, 5, 3, 4, name="silu"), core=True),
    Case("one element", "a size of 1", call(1, name="silu")),
    Case("0-d", "no dimensions", call(name="silu")),
    Case("parameters", "slope, alpha, beta, threshold, bounds", call(300, name=("hardtanh", -0.5, 2.0)), spelled=True),
    Case("celu", "alpha", call(300, name=("celu", 0.7)), spelled=True),
    Case("dropout", "one mask in both passes", call(5, 1031, op=FF.dropout, p=0.3), core=True),
    Case("dropout and gelu", "mask after activation", call(1031, name="gelu", dropout_p=0.5)),
    Case("dropout and relu", "a derivative taken at the output", call(1031, name="relu", dropout_p=0.5)),
]  # fmt: skip

EMPTY = [Case("no elements", "no launch", call(0, 5, name="gelu"))]


def bad(name: str, ours: Callable[[], Any], torchs: Callable[[], Any], *says: str) -> BadCall:
    return BadCall(name, ours, torchs, says)


def unknown() -> None:
    raise ValueError


X = torch.ones(3)
BAD_CALLS = [
    bad("unknown activation", lambda: FF.activation(X, "swish2"), unknown, "swish2", "silu"),
    bad("probability", lambda: FF.dropout(X, 1.5), lambda: F.dropout(X, 1.5), "1.5", "0 and 1"),
    bad("approximation", lambda: FF.gelu(X, "erf"), lambda: F.gelu(X, approximate="erf"), "erf", "tanh"),
]  # fmt: skip

NAMES = "relu silu leaky_relu elu selu celu mish hardswish hardsigmoid hardtanh relu6 sigmoid tanh softsign tanhshrink dropout"
CLASSES = "ReLU SiLU LeakyReLU ELU SELU CELU Mish Hardswish Hardsigmoid Hardtanh ReLU6 Sigmoid Tanh Softsign Tanhshrink GELU Softplus LogSigmoid Dropout"


def module(name: str) -> Callable[[], Any]:
    return lambda: (getattr(fnn, name)(), getattr(nn, name)(), torch.randn(4, 8))


N = 1 << 26
SPEC = Spec(
    "activation",
    CASES,
    ("activation", "activation_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[
        *((getattr(FF, name), getattr(F, name)) for name in NAMES.split()),
        (FF.gelu, lambda input, approximate="none": None),
        (FF.softplus, lambda input, beta=1, threshold=20: None),
        (FF.logsigmoid, lambda input: None),
    ],
    modules=[module(name) for name in CLASSES.split()],
    one_pass=[
        Case("gelu", "bytes", call(65, 257, name="gelu")),
        Case("relu", "bytes", call(65, 257, name="relu")),
        Case("dropout", "bytes", call(65, 257, op=FF.dropout, p=0.3)),
    ],
    bench=[
        BenchCase("64M gelu", call(N, name="gelu"), 4 * N, 0),
        BenchCase("64M gelu backward", call(N, name="gelu"), 10 * N, 0, backward=True),
        BenchCase("64M dropout", call(N, op=FF.dropout, p=0.1), 4 * N, 0),
    ],
)
