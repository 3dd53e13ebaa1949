"""LSTM, GRU and plain recurrent networks: layers, directions, and what torch calls them with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _route, _tuned
from ._launch import device_of
from ._op import autocast_to_lower
from ._route import Reason
from .activation import dropout as drop
from .layernorm import layer_norm
from .linear import linear
from .rnn import recurrence
from .rnn_launch import GATES, OPS
from .rnn_norm import OP as norm_lstm

States = tuple[Tensor, ...]


class _Network:
    """The arguments of a call, checked, the time in front."""

    def __init__(
        self, op: str, mode: str, input: Tensor, hx: States | None, weights: Sequence[Tensor],
        num_layers: int, bidirectional: bool, batch_first: bool, dropout: float, proj_size: int,
        batch_sizes: Tensor | None, training: bool, eps: float | None = None,
    ) -> None:  # fmt: skip
        self.eps = eps  # of layer norms, which None says are not there
        self.op, self.mode, self.layers, self.directions = op, mode, num_layers, 1 + bidirectional
        self.dropout, self.proj_size, self.training = dropout, proj_size, training
        self.batch_first, self.batch_sizes = batch_first and batch_sizes is None, batch_sizes
        parts = num_layers * self.directions
        self.has_biases = len(weights) >= 4 * parts
        self.parts = 8 if eps is not None else 2 + 2 * self.has_biases + (proj_size > 0)
        if len(weights) != self.parts * parts:
            raise RuntimeError(
                f"{op}: there are {len(weights)} weights for num_layers={num_layers}, "
                f"bidirectional={bool(bidirectional)}, proj_size={proj_size}; allowed are 2, or "
                "4 with biases, or 8 with layer norms, for each layer and direction, and one more "
                "with a projection"
            )
        self.weights, self.hidden = list(weights), weights[1].shape[0] // GATES[mode]
        self._check_input(input)
        self.unbatched = batch_sizes is None and input.dim() == 2
        self.batch_dim = 0 if self.batch_first else 1
        self.input = input.unsqueeze(self.batch_dim) if self.unbatched else input
        self.states = self._states(hx)

    def _check_input(self, input: Tensor) -> None:
        op, width = self.op, self.weights[0].shape[1]
        dims = (2, 3) if self.batch_sizes is None else (2,)
        if input.dim() not in dims:
            kind = ValueError if self.batch_sizes is None else RuntimeError
            raise kind(f"{op}: input is {tuple(input.shape)}, allowed are {dims} dimensions")
        if input.shape[-1] != width:
            raise RuntimeError(
                f"{op}: input is {tuple(input.shape)}, weights take {width} features"
            )
        if input.dtype != self.weights[0].dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"{op}: input is {input.dtype}, weights are {self.weights[0].dtype}; "
                "they must match"
            )
        if self.batch_sizes is None and input.shape[0 if not self.batch_first else -2] == 0:
            raise RuntimeError(f"{op}: input is {tuple(input.shape)}, it must have a step at least")

    def _states(self, hx: States | None) -> States:
        """h and c of all layers and directions, zeros if they are not given."""
        shapes = [self._shape(self.proj_size or self.hidden)]
        if self.mode == "lstm":
            shapes.append(self._shape(self.hidden))
        if hx is None:
            return tuple(self.input.new_zeros(shape) for shape in shapes)
        if self.mode == "lstm" and len(hx) != 2:
            raise RuntimeError(f"{self.op}: hx has {len(hx)} tensors, allowed are h_0 and c_0")
        for name, state, shape in zip(("h_0", "c_0"), hx, shapes, strict=False):
            allowed = (shape[0], shape[2]) if self.unbatched else shape
            if tuple(state.shape) != tuple(allowed):
                raise RuntimeError(
                    f"{self.op}: {name} is {tuple(state.shape)}, for input "
                    f"{tuple(self.input.shape)} allowed is {tuple(allowed)}"
                )
        return tuple(t.unsqueeze(1) for t in hx) if self.unbatched else tuple(hx)

    def _shape(self, width: int) -> tuple[int, int, int]:
        if self.batch_sizes is not None:
            batch = int(self.batch_sizes[0])
        else:
            batch = self.input.shape[self.batch_dim]
        return self.layers * self.directions, batch, width

    def decline(self) -> Reason | None:
        """Why torch's own call should run, by what is known before shapes are."""
        tensors = (self.input, *self.states, *self.weights)
        reason = _route.decide(self.op, *tensors)
        if reason is None:
            reason = Reason.OPTION if self.proj_size else self._measured()
            if reason is not None:
                _route.report(self.op, "call", reason)
        return reason

    def _measured(self) -> Reason | None:
        """cuDNN is fast: it takes a measurement to go another way. In a graph the op is to be
        whole, where torch would write out all steps of its own.
        """
        if _route.current_policy().mode != "auto" or torch.compiler.is_compiling():
            return None
        sizes = (self._steps(), self.states[0].shape[1], self.hidden)
        tuned = _tuned.lookup(OPS[self.mode], self.input.dtype, sizes, device_of(self.input))
        if tuned is None:
            return Reason.UNMEASURED
        return Reason.MEASURED if tuned.variant == "torch" else None

    def _steps(self) -> int:
        if self.batch_sizes is not None:
            return self.batch_sizes.shape[0]
        return self.input.shape[1 - self.batch_dim]

    def vendor(self) -> tuple[Tensor, States]:
        name = {"tanh": "rnn_tanh", "relu": "rnn_relu"}.get(self.mode, self.mode)
        hx: Any = self.states if self.mode == "lstm" else self.states[0]
        options = (self.has_biases, self.layers, self.dropout, self.training, self.directions == 2)
        call = getattr(torch._VF, name)
        if self.batch_sizes is not None:
            y, *states = call(self.input, self.batch_sizes, hx, self.weights, *options)
        else:
            y, *states = call(self.input, hx, self.weights, *options, self.batch_first)
        return y, tuple(states)

    def fused(self) -> tuple[Tensor, States]:
        """A product for all steps of a layer and direction, then its recurrence."""
        given = autocast_to_lower(self.input, *self.states, *self.weights)
        x, states = given[0], given[1 : 1 + len(self.states)]
        weights, ends = given[1 + len(states) :], []
        x = x.transpose(0, 1) if self.batch_first else x
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        for layer in range(self.layers):
            if layer and self.dropout:
                x = drop(x, self.dropout, self.training)
            found = [
                self._direction(x, states, weights, layer * self.directions + direction)
                for direction in range(self.directions)
            ]
            x = found[0][0] if len(found) == 1 else torch.cat([y for y, *_ in found], -1)
            ends += [end for _, *end in found]
        last = tuple(torch.stack(parts).to(x.dtype) for parts in zip(*ends, strict=True))
        y = x if self.batch_sizes is not None else x.view(*shape[:-1], x.shape[-1])
        return (y.transpose(0, 1) if self.batch_first else y), last

    def _direction(self, x: Tensor, states: Any, weights: Any, i: int) -> Any:
        """h of all steps, then the last states."""
        w_ih, w_hh, *biases = weights[i * self.parts :][: self.parts]
        h0, c0 = states[0][i], states[1][i] if len(states) == 2 else None
        reverse = self.directions == 2 and i % 2 == 1
        if self.eps is not None:
            gain, bias = biases[:2]
            xp = layer_norm(linear(x, w_ih), w_ih.shape[:1], gain, bias, self.eps)
            xp = xp.to(w_hh.dtype).view(self._steps(), h0.shape[0], w_ih.shape[0])
            y, *ends = norm_lstm(xp, h0, c0, w_hh, *biases[2:], self.eps, reverse)
            return y.flatten(0, 1), *ends
        b_ih, b_hh = biases or (None, None)
        if self.mode != "gru" and b_ih is not None:
            b_ih, b_hh = b_ih + b_hh, None
        xp = linear(x, w_ih, b_ih)
        return recurrence(xp, h0, c0, w_hh, b_hh, self.batch_sizes, self.mode, reverse)

    def __call__(self) -> tuple[Tensor, States]:
        calls_torch = False
        if self.eps is None:
            calls_torch = self.decline() in _route.FOR_VENDOR or bool(self.proj_size)
        y, states = self.vendor() if calls_torch else self.fused()
        if self.unbatched:
            y, states = y.squeeze(self.batch_dim), tuple(s.squeeze(1) for s in states)
        return y, states


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    training: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What :class:`torch.nn.LSTM` computes with these weights, in the order of `_flat_weights`.

    With `batch_sizes` input and output are the data of a packed sequence.
    """
    y, (h, c) = _Network(
        "lstm", "lstm", input, hx, weights, num_layers, bidirectional, batch_first, dropout,
        proj_size, batch_sizes, training,
    )()  # fmt: skip
    return y, (h, c)


def layer_norm_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM whose gates are of norm(W_ih x) + norm(W_hh h), with c = norm(f c + i g).

    The weights of a layer and direction are w_ih, w_hh, then weight and bias of these norms in
    turn: two over all gates, one over the units.
    """
    y, (h, c) = _Network(
        "layer_norm_lstm", "lstm", input, hx, weights, num_layers, bidirectional, batch_first,
        dropout, 0, None, training, eps,
    )()  # fmt: skip
    return y, (h, c)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """What :class:`torch.nn.GRU` computes with these weights, in the order of `_flat_weights`."""
    y, (h,) = _Network(
        "gru", "gru", input, None if hx is None else (hx,), weights, num_layers, bidirectional,
        batch_first, dropout, 0, batch_sizes, training,
    )()  # fmt: skip
    return y, h


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """What :class:`torch.nn.RNN` computes with these weights, in the order of `_flat_weights`."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity is {nonlinearity!r}, allowed are 'tanh' and 'relu'")
    y, (h,) = _Network(
        "rnn", nonlinearity, input, None if hx is None else (hx,), weights, num_layers,
        bidirectional, batch_first, dropout, 0, batch_sizes, training,
    )()  # fmt: skip
    return y, h


def _cell(
    mode: str, input: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> States | None:  # fmt: skip
    """One step, or None where torch's own cell should take it."""
    op = f"{OPS[mode]}_cell"
    for name, x in (("input", input), ("hx", states[0])):
        if x.dim() != 2:
            raise RuntimeError(f"{op}: {name} is {tuple(x.shape)}, allowed are two dimensions")
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        weights += [w_ih.new_zeros(w_ih.shape[:1]) if b is None else b for b in (b_ih, b_hh)]
    network = _Network(
        op, mode, input[None], tuple(h[None] for h in states), weights, 1, False, False, 0.0, 0,
        None, False,
    )  # fmt: skip
    if network.decline() in _route.FOR_VENDOR:
        return None
    return tuple(h[0] for h in network.fused()[1])


def _next_h(mode: str, vendor: Callable[..., Tensor], *given: Any) -> Tensor:
    """A cell whose state is h alone."""
    input, hx, *weights = given
    found = _cell(mode, input, (hx,), *weights)
    return vendor(*given) if found is None else found[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next h and c."""
    found = _cell("lstm", input, tuple(hx), w_ih, w_hh, b_ih, b_hh)
    if found is None:
        return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    h, c = found
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """The next h."""
    return _next_h("gru", torch.gru_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """The next h."""
    return _next_h("tanh", torch.rnn_tanh_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """The next h."""
    return _next_h("relu", torch.rnn_relu_cell, input, hx, w_ih, w_hh, b_ih, b_hh)
