"""Recurrent networks are found in graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_forms import check_same, only_fused

NETWORKS = [
    (lambda: nn.LSTM(5, 6, 2, batch_first=True), "lstm_of_torch"),
    (lambda: nn.LSTM(5, 6, bidirectional=True), "lstm_of_torch"),
    (lambda: nn.LSTM(5, 6, bias=False), "lstm_of_torch"),
    (lambda: nn.GRU(5, 6, 2, bidirectional=True), "gru"),
    (lambda: nn.RNN(5, 6), "rnn"),
    (lambda: nn.RNN(5, 6, nonlinearity="relu", batch_first=True), "rnn"),
]


def leaves(results):
    return tuple(torch.utils._pytree.tree_leaves(results))


@pytest.mark.parametrize(("make", "op"), NETWORKS)
def test_network(make, op, fused):
    network = make()
    x = torch.randn(3, 4, 5, requires_grad=True)
    compiled = check_same(lambda x: leaves(network(x)), x)
    assert only_fused(compiled) == [op]


@pytest.mark.parametrize("make", [make for make, _ in NETWORKS[:4]])
def test_given_states(make, fused):
    network = make()
    with torch.no_grad():
        states = network(torch.randn(3, 4, 5))[1]
    alone = isinstance(states, torch.Tensor)
    states = [h.detach().requires_grad_() for h in ([states] if alone else states)]
    x = torch.randn(3, 4, 5, requires_grad=True)
    compiled = check_same(
        lambda x, *states: leaves(network(x, states[0] if alone else states)), x, *states
    )
    assert len(compiled.fused) == 1


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(make, fused):
    cell = make(5, 6)
    compiled = check_same(lambda x: leaves(cell(x)), torch.randn(4, 5, requires_grad=True))
    assert len(compiled.fused) == 1
    assert only_fused(compiled)[0].endswith("_cell")


def test_projection():
    """torch computes it, wherever it stands."""
    network = nn.LSTM(5, 6, bidirectional=True, proj_size=3)
    x = torch.randn(3, 4, 5, requires_grad=True)
    assert only_fused(check_same(lambda x: leaves(network(x)), x)) == ["lstm_of_torch"]


def test_of_one_sequence(fused):
    network = nn.GRU(5, 6)
    compiled = check_same(lambda x: network(x)[0], torch.randn(4, 5, requires_grad=True))
    assert only_fused(compiled) == ["gru"]


def test_between_other_ops(fused):
    words, network, head = nn.Embedding(9, 5), nn.LSTM(5, 6), nn.Linear(6, 9)
    ids = torch.randint(9, (4, 3))

    def loss(ids):
        return F.cross_entropy(head(network(words(ids))[0]).flatten(0, 1), ids.flatten())

    ops = only_fused(check_same(loss, ids))
    assert ops == ["embedding", "lstm_of_torch", "linear_cross_entropy_of_rows"]
