"""Graphs in the form that spellings are written in: what computes nothing goes, products are
linear layers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_forms import check_same, only_fused, tensors


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


class Columns(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2 has it."""

    def __init__(self, size=8, out=16):
        super().__init__()
        self.weight, self.bias = parameter(size, out), parameter(out)

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.weight.shape[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_addmm_of_rows(dynamic):
    layer = Columns()
    x, r = tensors((2, 3, 8), (2, 3, 16))
    if dynamic:
        for tensor in (x, r):
            torch._dynamo.mark_dynamic(tensor, 1)
    compiled = check_same(lambda x, r: F.gelu(layer(x)) + r, x, r)
    assert compiled.calls == ["t", "linear"]


W, B = parameter(8, 16), parameter(16)
SQUARE = parameter(8, 8)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x @ W + B,
        lambda x: B + torch.matmul(x, W),
        lambda x: torch.addmm(B, x[0], W),
        lambda x: torch.mm(x[0], W).add(B),
    ],
)
def test_product_with_a_parameter(product):
    compiled = check_same(lambda x: torch.relu(product(x)), *tensors((2, 3, 8)))
    assert only_fused(compiled) == ["linear"]
    assert compiled.fused[0].args[2] is not None
    assert compiled.fused[0].kwargs == {"activation": "relu"}


@pytest.mark.parametrize("transposed", [lambda: SQUARE.t(), lambda: SQUARE.T, lambda: SQUARE.mT])
def test_product_with_a_transposed_parameter(transposed):
    """Square: the wrong one of both would go unnoticed by its shape."""
    compiled = check_same(lambda x: F.silu(x @ transposed()), *tensors((2, 3, 8)))
    assert only_fused(compiled) == ["linear"]
    assert "t" not in compiled.calls


def test_other_products_stay():
    x, y, z = tensors((3, 8), (8, 8), (3, 8))
    compiled = check_same(lambda x, y, z: (x @ y, torch.addmm(z, x, W[:, :8], beta=2)), x, y, z)
    assert compiled.calls == ["matmul", "getitem", "addmm"]
    # a matrix that is added is no bias
    assert check_same(lambda x, z: torch.addmm(z, x, W[:, :8]), x, z).fused == []


def test_bias_of_another_shape_is_added():
    bias = parameter(3, 1)
    compiled = check_same(lambda x: F.relu(x @ W + bias), *tensors((3, 8)))
    assert all(call.args[2:3] in ((), (None,)) for call in compiled.fused)


def test_dropout_that_drops_nothing():
    def f(x):
        x = F.dropout(F.dropout(x, 0.5, training=False), 0.0, training=True)
        return F.gelu(F.dropout2d(x, 0.1, training=False))

    assert check_same(f, *tensors((3, 8, 2, 2))).calls == ["activation"]


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: x / 1.0,
        lambda x: 1 * x,
        lambda x: x.view(3, 8),
        lambda x: x.reshape(x.shape),
        lambda x: x.expand(-1, 8),
        lambda x: x.contiguous().float(),
        lambda x: x.flatten(1),
    ],
)
def test_what_computes_nothing(nothing):
    x, w = tensors((3, 8), (8, 8))
    compiled = check_same(lambda x, w: F.gelu(nothing(F.linear(x, w))), x, w)
    assert compiled.calls == ["linear"]


def test_a_copy_that_is_written_to_stays():
    def f(x):
        y = x * 1.0
        y.add_(1)
        return x.sin(), y

    assert "mul" in check_same(f, *tensors((3, 8))).calls


def test_a_copy_of_what_is_written_to_stays():
    def f(x):
        h = x.sin()
        y = h / 1.0
        h.add_(1)
        return y.cos() + h

    assert "truediv" in check_same(f, *tensors((3, 8), grad=False)).calls


def test_a_copy_that_is_returned_stays():
    """The caller may write to it."""
    compiled = check_same(lambda x: (x / 1.0, x.view(3, 8)), *tensors((3, 8)))
    assert compiled.calls == ["truediv", "view"]


def test_a_copy_of_what_the_caller_has_stays():
    """The caller may write to it before backward runs."""

    def f(x):
        h = x.cos()
        return (x * 1.0).sin(), (h / 1.0).exp(), h

    compiled = check_same(f, *tensors((3, 8)))
    assert compiled.calls == ["cos", "mul", "sin", "truediv", "exp"]
    x = torch.randn(3, requires_grad=True)
    y = x + 0
    out = compiled(y)[0]
    with torch.no_grad():
        y.zero_()
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.cos())


def test_a_view_for_no_grad_stays():
    def f(x):
        with torch.no_grad():
            y = x.view(3, 8)
        return y.sin() + x

    assert "view" in check_same(f, *tensors((3, 8))).calls


def test_division_of_integers_stays():
    x = torch.arange(6)
    assert check_same(lambda x: (x / 1).sin(), x).calls == ["truediv", "sin"]
