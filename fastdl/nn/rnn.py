"""Recurrent networks and their cells."""

import importlib.abc
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F

_CONFIG = "torch._dynamo.config"


class LSTM(nn.LSTM):
    """:class:`torch.nn.LSTM` on the fused kernels, in compiled graphs too.

    Dynamo, which breaks its graph at all such modules, is told to enter them once one of ours is
    made: torch's own are then traced as well.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "LSTM":
        let_dynamo_enter()
        return super().__new__(cls)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _run(self, F.lstm, input, hx, proj_size=self.proj_size)


class GRU(nn.GRU):
    """:class:`torch.nn.GRU` on the fused kernels; for compiled graphs see :class:`LSTM`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "GRU":
        let_dynamo_enter()
        return super().__new__(cls)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _run(self, F.gru, input, hx)


class RNN(nn.RNN):
    """:class:`torch.nn.RNN` on the fused kernels; for compiled graphs see :class:`LSTM`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "RNN":
        let_dynamo_enter()
        return super().__new__(cls)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return _run(self, F.rnn, input, hx, nonlinearity=self.nonlinearity)


class LayerNormLSTM(nn.Module):
    """An LSTM whose gates are of norm(W_ih x) + norm(W_hh h), with c = norm(f c + i g)."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.eps, self._names = eps, list[str]()
        directions, gates = 1 + bidirectional, 4 * hidden_size
        for layer, suffix in itertools.product(range(num_layers), ("", "_reverse")[:directions]):
            width = input_size if layer == 0 else hidden_size * directions
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gates, width),
                "weight_hh": (gates, hidden_size),
            }
            for part, n in (("ih", gates), ("hh", gates), ("c", hidden_size)):
                shapes |= {f"norm_{part}_weight": (n,), f"norm_{part}_bias": (n,)}
            for name, shape in shapes.items():
                self._names.append(f"{name}_l{layer}{suffix}")
                values = torch.empty(shape, device=device, dtype=dtype)
                setattr(self, self._names[-1], nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as in torch's LSTM; norms that change nothing."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith("norm"):
                nn.init.constant_(parameter, float("weight" in name))
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return F.layer_norm_lstm(
            input, hx, [getattr(self, name) for name in self._names],
            eps=self.eps, num_layers=self.num_layers, bidirectional=self.bidirectional,
            batch_first=self.batch_first, dropout=self.dropout, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        words = [
            f"{n}={getattr(self, n)}" for n, usual in shown.items() if getattr(self, n) != usual
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *words, f"eps={self.eps}"])


class LSTMCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        hx = None if hx is None else tuple(hx)
        return _run_cell(self, F.lstm_cell, input, hx, 2)


class GRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _run_cell(self, F.gru_cell, input, None if hx is None else (hx,), 1)


class RNNCell(nn.RNNCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        cells = {"tanh": F.rnn_tanh_cell, "relu": F.rnn_relu_cell}
        if self.nonlinearity not in cells:
            raise RuntimeError(
                f"RNNCell: nonlinearity is {self.nonlinearity!r}, allowed are 'tanh' and 'relu'"
            )
        call = cells[self.nonlinearity]
        return _run_cell(self, call, input, None if hx is None else (hx,), 1)


def _run(module: Any, call: Callable[..., Any], input: Any, hx: Any, **options: Any) -> Any:
    # read anew: torch.func.functional_call puts others in their place
    weights = [getattr(module, name) for name in module._flat_weights_names]
    options |= {
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "dropout": module.dropout,
        "training": module.training,
    }
    if not isinstance(input, PackedSequence):
        return call(input, hx, weights, batch_first=module.batch_first, **options)
    data, batch_sizes, order, back = input
    hx = _reordered(hx, order)
    y, hidden = call(data, hx, weights, batch_sizes=batch_sizes, **options)
    return PackedSequence(y, batch_sizes, order, back), _reordered(hidden, back)


def _reordered(hx: Any, order: Tensor | None) -> Any:
    """The sequences of states in another order."""
    if hx is None or order is None:
        return hx
    if isinstance(hx, Tensor):
        return hx.index_select(1, order)
    return tuple(state.index_select(1, order) for state in hx)


def _run_cell(
    cell: Any, call: Callable[..., Any], input: Tensor, hx: Sequence[Tensor] | None, states: int
) -> Any:
    """With zeros for a missing state, and one row for a vector."""
    for name, given in (("input", input), *((f"hx[{i}]", h) for i, h in enumerate(hx or ()))):
        if given.dim() not in (1, 2):
            raise ValueError(
                f"{type(cell).__name__}: {name} is {tuple(given.shape)}, "
                "allowed are 1 or 2 dimensions"
            )
    batched = input.dim() == 2
    x = input if batched else input[None]
    if hx is None:
        hx = [x.new_zeros(len(x), cell.hidden_size)] * states
    elif not batched:
        hx = [h[None] for h in hx]
    found = call(
        x, hx[0] if states == 1 else tuple(hx),
        cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh,
    )  # fmt: skip
    if batched:
        return found
    return found[0] if states == 1 else tuple(h[0] for h in found)


def let_dynamo_enter() -> None:
    """Let Dynamo enter what derives from torch's recurrent modules, now or once it is loaded."""
    loaded: Any = sys.modules.get(_CONFIG)
    if loaded is not None:
        loaded.allow_rnn = True
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Waits for Dynamo, which is slow to import."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then(module: Any) -> None:
            execute(module)
            module.allow_rnn = True

        spec.loader.exec_module = then
        return spec
