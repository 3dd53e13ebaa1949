"""The contracts of LSTM, GRU and plain recurrent networks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as FF
from ..ops.rnn import recurrence
from ..ops.rnn_launch import GATES
from .case import BadCall, BenchCase, Case, Maker, Spec

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "lstm": FF.lstm,
    "gru": FF.gru,
    "tanh": FF.rnn,
    "relu": FF.rnn,
}


def weights_of(
    t: Maker, mode: str, F: int, H: int, bias: bool, layers: int, directions: int
) -> list[Tensor]:
    """In the order of `_flat_weights`, of a size that keeps sums near 1."""
    found = []
    for i in range(layers * directions):
        width = F if i < directions else H * directions
        found += [t(GATES[mode] * H, n, scale=n**-0.5) for n in (width, H)]
        found += [t(GATES[mode] * H, scale=0.3) for _ in range(2 * bias)]
    return found


def call(
    mode: str, T: int, B: int, F: int, H: int, *, bias: bool = True, layers: int = 1,
    state: bool = True, lengths: Sequence[int] = (), batch_first: bool = False,
    bidirectional: bool = False,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        options: dict[str, Any] = {"nonlinearity": mode} if mode in ("tanh", "relu") else {}
        options |= {
            "num_layers": layers,
            "bidirectional": bidirectional,
            "batch_first": batch_first,
        }
        if lengths:
            sizes = [sum(n > step for n in lengths) for step in range(T)]
            x, options["batch_sizes"] = t(sum(sizes), F), torch.tensor(sizes)
        else:
            x = t(B, T, F) if batch_first else t(T, B, F)
        directions, hx = 1 + bidirectional, None
        if state:
            states = [t(layers * directions, B, H) for _ in range(1 + (mode == "lstm"))]
            hx = tuple(states) if mode == "lstm" else states[0]
        weights = weights_of(t, mode, F, H, bias, layers, directions)
        return partial(FUNCTIONS[mode], x, hx, weights, **options)

    return make


# Lengths of five sequences: one ends early, and one tile of four rows ends before the other.
LENGTHS = (3, 3, 2, 1, 1)

# In the interpreter tiles have 4 rows, programs hold weights of 16 units, and steps go by 16 units.
LSTM = [
    Case("walk", "masks of rows and units", call("lstm", 3, 5, 6, 9), core=True),
    Case("steps", "tiles of units, and sums over several blocks", call("lstm", 2, 5, 3, 20)),
    Case("packed, walk", "sequences that end and begin", call("lstm", 3, 5, 3, 7, lengths=LENGTHS, bidirectional=True)),
    Case("packed, steps", "sequences that end and begin", call("lstm", 3, 5, 2, 18, lengths=LENGTHS, bidirectional=True)),
    Case("layers", "which state and weight is whose", call("lstm", 2, 3, 3, 5, layers=2, bias=False, batch_first=True, bidirectional=True)),
]  # fmt: skip

GRU = [
    Case("walk", "masks of rows and units", call("gru", 3, 5, 6, 9), core=True),
    Case("steps", "tiles of units, and sums over several blocks", call("gru", 2, 5, 3, 20)),
    Case("packed, walk", "sequences that end and begin", call("gru", 3, 5, 3, 7, lengths=LENGTHS, bidirectional=True)),
    Case("no biases", "a bias inside of the gate that is not there", call("gru", 2, 5, 3, 5, bias=False, state=False)),
]  # fmt: skip


def normed(
    T: int, B: int, F: int, H: int, *, layers: int = 1, state: bool = True,
    bidirectional: bool = False, batch_first: bool = False, eps: float = 1e-5,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    """With gains around 1."""

    def make(t: Maker) -> "partial[Any]":
        x, directions = t(B, T, F) if batch_first else t(T, B, F), 1 + bidirectional
        hx = (t(layers * directions, B, H), t(layers * directions, B, H)) if state else None
        weights = []
        for i in range(layers * directions):
            width = F if i < directions else H * directions
            weights += [t(4 * H, n, scale=n**-0.5) for n in (width, H)]
            for n in (4 * H, 4 * H, H):
                weights += [t(n, scale=0.2, shift=1.0), t(n, scale=0.3)]
        return partial(
            FF.layer_norm_lstm, x, hx, weights,
            eps=eps, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first,
        )  # fmt: skip

    return make


NORMED = [
    # where all of a row is alike, a small eps makes much of the rounding of its mean
    Case("walk", "masks of rows and units, and eps", normed(3, 5, 6, 9, eps=0.01), core=True),
    Case("steps", "products that are given", normed(3, 5, 3, 20)),
    Case("layers", "which state and weight is whose", normed(2, 3, 4, 8, layers=2, bidirectional=True, batch_first=True)),
    Case("steps, both directions", "where a step came from", normed(2, 2, 2, 17, bidirectional=True, state=False)),
]  # fmt: skip

# Of sizes at which no sum is so near to 0 that rounding decides of the gradient of relu.
RNN = [
    Case("tanh, walk", "masks of rows and units", call("tanh", 3, 5, 6, 9), core=True),
    Case("tanh, steps", "tiles of units, and sums over several blocks", call("tanh", 2, 5, 3, 36)),
    Case("relu, walk", "which row and unit is whose", call("relu", 3, 5, 4, 4, lengths=LENGTHS, bidirectional=True), exact=True),
    Case("relu, steps", "which row and unit is whose", call("relu", 2, 5, 2, 34), exact=True),
]  # fmt: skip


def tall(mode: str) -> Case:
    """The recurrence without its input's product."""

    def make(t: Maker) -> "partial[Any]":
        T, B, H = 26, 8, 16
        xp, h0, c0 = t(T * B, GATES[mode] * H), t(B, H), t(B, H) if mode == "lstm" else None
        weight = t(GATES[mode] * H, H, scale=0.2)
        return partial(recurrence, xp, h0, c0, weight, None, None, mode, False)

    return Case("tall", "bytes", make)


def bad(name: str, mode: str, change: Callable[[Any, Any], Any], says: tuple[str, ...]) -> BadCall:
    """A call like a module's of 4 features and 5 units, with another input or state."""
    module: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN}[mode](4, 5)
    x, h = torch.randn(3, 2, 4), torch.randn(1, 2, 5)
    x, hx = change(x, (h, h) if mode == "lstm" else h)
    return BadCall(
        name, lambda: FUNCTIONS[mode](x, hx, module._flat_weights), lambda: module(x, hx), says
    )


def bad_calls(mode: str) -> list[BadCall]:
    def state(h: Tensor) -> Any:
        return (h, h) if mode == "lstm" else h

    return [
        bad("features", mode, lambda x, hx: (x[..., :3], hx), ("(3, 2, 3)", "4")),
        bad("dimensions", mode, lambda x, hx: (x[None], hx), ("(1, 3, 2, 4)", "2")),
        bad("dtype", mode, lambda x, hx: (x.half(), hx), ("float16", "float32")),
        bad("batch", mode, lambda x, hx: (x, state(torch.randn(1, 3, 5))), ("(1, 3, 5)", "(1, 2, 5)")),
        bad("no steps", mode, lambda x, hx: (x[:0], hx), ("(0, 2, 4)",)),
        bad("unbatched", mode, lambda x, hx: (x[0], hx), ("(1, 2, 5)", "(1, 5)")),
    ]  # fmt: skip


def bench(mode: str, T: int, B: int, H: int, backward: bool = False) -> BenchCase:
    """As many features as units. Bytes: x and h of all steps, the sums between them, the weights."""
    gates, rows = GATES[mode], T * B
    weights = 2 * gates * H * H
    bytes, flops = 2 * (rows * H * 2 + weights), 2 * rows * weights
    if backward:
        # x, h, the gradients of both, and the gates that are kept; weights again, and their gradients
        bytes, flops = bytes + 2 * (rows * H * (4 + gates) + 2 * weights), 3 * flops
    name = f"{mode} {T}x{B}x{H}{' backward' if backward else ''}"
    return BenchCase(name, call(mode, T, B, H, H, state=False), bytes, flops, backward=backward)


def norm_bench(T: int, B: int, H: int, backward: bool = False) -> BenchCase:
    """As without norms; backward reads the normalized products, too, and writes their gradients."""
    plain = bench("lstm", T, B, H, backward)
    name = f"{T}x{B}x{H}{' backward' if backward else ''}"
    bytes = plain.bytes + backward * 2 * T * B * H * 8
    return BenchCase(name, normed(T, B, H, H, state=False), bytes, plain.flops, backward=backward)


EMPTY = [Case("no rows", "an empty result", call("lstm", 2, 0, 3, 4))]
OPS = ("recurrence", "recurrence_backward")

LSTM_SPEC = Spec(
    "lstm", LSTM, OPS, empty=EMPTY, bad_calls=bad_calls("lstm"),
    one_pass=[tall("lstm")],
    bench=[
        bench("lstm", 256, 64, 128), bench("lstm", 256, 64, 128, True),
        bench("lstm", 1024, 16, 128, True), bench("lstm", 64, 256, 128, True),
        bench("lstm", 256, 1, 512), bench("lstm", 256, 64, 512, True),
        bench("lstm", 64, 64, 1024, True), bench("lstm", 64, 256, 2048, True),
    ],
)  # fmt: skip
NORM_SPEC = Spec(
    "layer_norm_lstm", NORMED, ("layer_norm_lstm", "layer_norm_lstm_backward"),
    empty=[Case("no rows", "an empty result", normed(2, 0, 3, 4))],
    bench=[
        norm_bench(256, 64, 128), norm_bench(256, 64, 128, True),
        norm_bench(256, 64, 512, True), norm_bench(64, 64, 2048, True),
    ],
)  # fmt: skip
GRU_SPEC = Spec(
    "gru", GRU, OPS, bad_calls=bad_calls("gru"),
    # no one_pass: the gradient of n's share of h is a result of no op, and still must be written
    bench=[
        bench("gru", 256, 64, 128), bench("gru", 256, 64, 128, True),
        bench("gru", 256, 64, 512, True), bench("gru", 64, 64, 1024, True),
    ],
)  # fmt: skip
RNN_SPEC = Spec(
    "rnn", RNN, OPS, bad_calls=bad_calls("tanh"),
    one_pass=[tall("tanh")],
    bench=[
        bench("tanh", 256, 64, 128), bench("tanh", 256, 64, 256, True),
        bench("relu", 256, 64, 512, True),
    ],
)  # fmt: skip
