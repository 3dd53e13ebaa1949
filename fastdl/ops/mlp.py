"""Perceptrons of two linear layers, and of three with a gate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._route import under_a_transform
from .activation import Activations
from .glu import glu
from .linear import linear
from .linears import linears


def mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: Activations = "gelu",
    recompute: bool = False,
) -> Tensor:
    """act(input W1ᵀ + b1) W2ᵀ + b2. With `recompute`, backward computes the hidden layer again
    instead of keeping it.
    """
    run = _recomputed if recompute else _run
    return run(_mlp, input, w1, b1, w2, b2, activation)


def _mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: Activations,
) -> Tensor:
    return linear(linear(input, w1, b1, activation=activation), w2, b2)


def gated_mlp(
    input: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: Activations = "silu",
    recompute: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """(act(input Wgᵀ + bg) (input Wuᵀ + bu)) Wdᵀ + bd + residual.

    Gate and up are one launch. Their weights may be one tensor: w_gate is then [2 hidden, in], the
    gate's rows first, b_gate is [2 hidden], and w_up and b_up are None.

    Without `recompute`, gate, up and their gated product are kept for backward: three rows as long
    as the hidden layer for each row of input. With it nothing but the input is kept, and backward
    runs the forward pass again, a third more of forward's and backward's products.
    """
    _check(w_gate, w_up, b_up)
    run = _recomputed if recompute else _run
    return run(
        _gated_mlp, input, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, residual
    )  # fmt: skip


def _gated_mlp(
    input: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, b_gate: Tensor | None,
    b_up: Tensor | None, b_down: Tensor | None, activation: Activations, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    if w_up is None:
        joined = linear(input, w_gate, b_gate)
        hidden = glu(joined, activation=activation, gate_first=True)
    else:
        gate, up = linears(input, (w_gate, w_up), (b_gate, b_up))
        hidden = glu(up, activation=activation, gate=gate)
    return linear(hidden, w_down, b_down, residual=residual)


def _check(w_gate: Tensor, w_up: Tensor | None, b_up: Tensor | None) -> None:
    if w_up is None and (b_up is not None or w_gate.shape[0] % 2):
        raise RuntimeError(
            f"gated_mlp: w_gate is {tuple(w_gate.shape)}, w_up is None, and b_up"
            f" {'is None' if b_up is None else 'is not'}; without w_up, allowed is a w_gate of an"
            " even number of rows that holds both, and no b_up"
        )
    if w_up is not None and w_up.shape != w_gate.shape:
        raise RuntimeError(
            f"gated_mlp: w_gate is {tuple(w_gate.shape)}, w_up is {tuple(w_up.shape)};"
            " they must match"
        )


def _run(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Keeps the arguments alone. Transforms do not take the hooks that this needs."""
    if under_a_transform():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)
