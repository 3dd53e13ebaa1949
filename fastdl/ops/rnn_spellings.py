"""Recurrent networks and cells as torch calls them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._op import SPELLINGS, Spelling, form_of, named, same_call
from .rnn_network import gru, gru_cell, lstm, lstm_cell, rnn, rnn_relu_cell, rnn_tanh_cell

_NETWORK = [
    "input", "hx", "weights", "has_biases", "num_layers", "dropout", "training", "bidirectional",
    "batch_first",
]  # fmt: skip
_CELL = ["input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"]


@form_of("lstm")
def lstm_of_torch(
    input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """lstm with its three results side by side; the sizes of states tell those of a projection."""
    h, c = hx
    projected = h.shape[-1] if h.shape[-1] != c.shape[-1] else 0
    y, states = lstm(input, (h, c), weights, proj_size=projected, **options)
    return y, *states


def _spell_network(torchs: Callable[..., Any], ours: Callable[..., Any], **more: Any) -> Spelling:
    def call(has_biases: bool, **given: Any) -> "partial[Any]":
        # with the data of a packed sequence the second argument is not the states
        if type(given["batch_first"]) is not bool:
            raise TypeError(f"batch_first is {given['batch_first']!r}")
        return partial(ours, **given, **more)

    return Spelling(named(_NETWORK, lambda *args: torchs(*args)), call)


SPELLINGS.extend(
    [
        _spell_network(torch.lstm, lstm_of_torch),
        _spell_network(torch.gru, gru),
        _spell_network(torch.rnn_tanh, rnn),
        _spell_network(torch.rnn_relu, rnn, nonlinearity="relu"),
        same_call(torch.lstm_cell, lstm_cell, _CELL),
        same_call(torch.gru_cell, gru_cell, _CELL),
        same_call(torch.rnn_tanh_cell, rnn_tanh_cell, _CELL),
        same_call(torch.rnn_relu_cell, rnn_relu_cell, _CELL),
    ]
)
