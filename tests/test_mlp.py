"""The perceptron, made of two linear layers."""

import pytest
import torch
from torch import nn

import fastdl
import fastdl.functional as FF


def gradients(mlp, *args, **options):
    leaves = [a for a in args if a is not None]
    return torch.autograd.grad(mlp(*args, **options).sum(), leaves)


def saved_elements(call):
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept)


@pytest.fixture
def args(device):
    shapes = ((5, 12), (20, 12), (20,), (7, 20), (7,))
    return [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", ["gelu", "relu", ("leaky_relu", 0.2), nn.Softplus(2.0)])
def test_is_two_linear_layers(args, activation, fused):
    def by_hand(x, w1, b1, w2, b2):
        hidden = FF.activation(nn.functional.linear(x, w1, b1), activation)
        return nn.functional.linear(hidden, w2, b2)

    torch.testing.assert_close(FF.mlp(*args, activation=activation), by_hand(*args))
    for got, expected in zip(
        gradients(FF.mlp, *args, activation=activation), gradients(by_hand, *args), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_recomputing_changes_memory_and_nothing_else(args, fused):
    saved = {}
    for recompute in (False, True):
        saved[recompute] = saved_elements(lambda r=recompute: FF.mlp(*args, recompute=r))
    assert saved[True] < saved[False]
    for got, expected in zip(
        gradients(FF.mlp, *args, recompute=True), gradients(FF.mlp, *args), strict=True
    ):
        assert torch.equal(got, expected)


def test_the_module_holds_two_torch_layers(device, fused):
    mlp = fastdl.nn.MLP(6, 10, activation="silu", device=device)
    twin = nn.Sequential(mlp.fc1, nn.SiLU(), mlp.fc2)
    x = torch.randn(3, 6, device=device)
    torch.testing.assert_close(mlp(x), twin(x))
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert "activation='silu'" in repr(mlp)
