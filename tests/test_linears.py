"""Linear layers of one input: one launch, and a backward pass that computes what it must."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastdl
import fastdl.functional as FF
from fastdl.contract.evaluate import Allocated, LibraryCalls
from fastdl.tuned import Config, forced

IN, WIDTHS = 32, (48, 16, 16)


def made(rows=(7,), widths=WIDTHS, dtype=torch.float32, device="cpu"):
    def draw(*shape):
        return torch.randint(-1, 2, shape).to(dtype).to(device).requires_grad_()

    return draw(*rows, IN), [draw(n, IN) for n in widths], [draw(n) for n in widths]


def by_hand(x, weights, biases):
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def kernels(call):
    return [launch.kernel.name for launch in fastdl.explain(call).launches]


def blocks(m, n, k, **more):
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 2, **more}


ROUTES = {
    "tiles": (Config(blocks(16, 32, 16, SWAP=0), variant="tiles"), ["linears_fwd"]),
    "swapped": (Config(blocks(32, 16, 16, SWAP=1), variant="tiles"), ["linears_fwd"]),
    "slices": (
        Config(blocks(16, 16, 16, SWAP=0), variant="tiles", splits=2),
        ["linears_fwd", "linears_finish"],
    ),
    "persistent": (Config(blocks(16, 64, 16), variant="persistent"), ["linears_persistent"]),
    "torch's products": (Config({}, variant="gemm"), []),
}


@pytest.mark.parametrize("widths", [WIDTHS, (16, 48)])
@pytest.mark.parametrize("route", ROUTES)
def test_every_way_is_exact(route, widths, device):
    """Whole numbers, and blocks that are wider than weights, and narrower."""
    config, names = ROUTES[route]
    x, weights, biases = made((50,), widths, torch.float16, device)
    call = partial(FF.linears, x, weights, biases)
    with forced("linear", torch.float16, (50, sum(widths), IN), config):
        assert device != "cpu" or kernels(call) == names
        for got, wanted in zip(call(), by_hand(x, weights, biases), strict=True):
            assert torch.equal(got, wanted) and got.is_contiguous()


def test_where_rows_are_not_alike_torch_multiplies(fused):
    x, weights, biases = made()
    weights[1] = torch.ones(16, 2 * IN)[:, :IN]
    assert kernels(lambda: FF.linears(x, weights, biases)) == []
    weights[1] = torch.ones(IN, 16).t()
    assert kernels(lambda: FF.linears(x, weights, biases)) == []


def test_a_measurement_decides():
    x, weights, biases = made((50,))
    with forced("linear", torch.float32, (50, 80, IN), Config({}, variant="torch")):
        seen = fastdl.explain(FF.linears, x, weights, biases)
    assert not seen.fused and "measured faster" in str(seen)


def test_weights_are_read_at_each_call(fused, device):
    x, weights, biases = made(device=device)
    FF.linears(x, weights, biases)
    with torch.no_grad():
        weights[1] += 1
        biases[2] -= 1
    for got, wanted in zip(
        FF.linears(x, weights, biases), by_hand(x, weights, biases), strict=True
    ):
        assert torch.equal(got, wanted)


def backward_call(call, leaves, outputs=None):
    """Gradients of the leaves, and what the one call of the backward op returned."""
    results = call()
    sent = [y for i, y in enumerate(results) if outputs is None or i in outputs]
    with LibraryCalls() as seen:
        grads = torch.autograd.grad(sum(y.square().sum() for y in sent), leaves, allow_unused=True)
    (backward,) = (c for c in seen.calls if c.name == "linears_backward")
    return grads, backward.result


def test_frozen_parameters_cost_nothing(fused, device):
    x, weights, biases = made(device=device)
    weights[1].requires_grad_(False)
    biases[0].requires_grad_(False)
    leaves = [x, weights[0], weights[2], biases[1], biases[2]]
    grads, result = backward_call(lambda: FF.linears(x, weights, biases), leaves)
    assert [r is not None for r in result] == [True, True, False, False, True, True, True]
    total = sum(y.square().sum() for y in by_hand(x, weights, biases))
    wanted = torch.autograd.grad(total, leaves)
    assert all(map(torch.equal, grads, wanted))


def test_frozen_weights_keep_no_input(fused, device):
    x, weights, _ = made(device=device)
    for weight in weights:
        weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = FF.linears(x, weights)
    assert not any(t.shape == x.shape for t in kept)
    (dx,) = torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
    assert torch.equal(dx, sum(w.sum(0) for w in weights).expand(x.shape))


def test_second_derivative_with_frozen_weights(device):
    """Backward keeps no input then, and needs none."""
    x, weights, _ = made(device=device)
    for weight in weights:
        weight.requires_grad_(False)
    outputs = FF.linears(x, weights)
    backs = [torch.ones_like(y, requires_grad=True) for y in outputs]
    (dx,) = torch.autograd.grad(outputs, x, backs, create_graph=True)
    for got, w in zip(torch.autograd.grad(dx.square().sum(), backs), weights, strict=True):
        torch.testing.assert_close(got, 2 * dx.detach() @ w.T)


def test_an_output_that_nobody_uses_costs_nothing(fused, device):
    x, weights, biases = made(device=device)
    leaves = [x, *weights, *biases]
    grads, result = backward_call(lambda: FF.linears(x, weights, biases), leaves, outputs=(1,))
    assert [r is not None for r in result] == [True, False, False, True, True, False, False]
    y = F.linear(x, weights[1], biases[1])
    wanted = torch.autograd.grad(y.square().sum(), [x, weights[1], biases[1]])
    assert all(map(torch.equal, [grads[0], grads[2], grads[5]], wanted))
    assert [g is None for g in grads] == [False, True, False, True, True, False, True]


def test_the_gradient_of_the_input_is_added_up_in_place(fused):
    """Of three weights, separate products are three tensors, and their sums two."""
    x, weights, _ = made((64,))
    bytes = {}
    for name, function in (
        ("one", FF.linears),
        ("three", lambda x, ws: by_hand(x, ws, [None] * 3)),
    ):
        outputs = function(x, weights)
        backs = [torch.ones_like(y) for y in outputs]
        with Allocated() as allocated:
            torch.autograd.grad(outputs, [x, *weights], backs)
        bytes[name] = allocated.bytes
    assert bytes["one"] == x.nbytes + sum(w.nbytes for w in weights)
    assert bytes["three"] == bytes["one"] + 4 * x.nbytes


@pytest.mark.parametrize("used", [(0, 1, 2), (2,)])
def test_second_derivative(used, device):
    """Of the outputs that are used; a frozen weight is not in the way."""
    x, weights, biases = made(device=device)
    weights[0].requires_grad_(False)

    def penalty(function):
        outputs = function(x, weights, biases)
        value = sum(outputs[i].pow(3).sum() for i in used)
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weights[2], biases[2]])

    for got, wanted in zip(penalty(FF.linears), penalty(by_hand), strict=True):
        torch.testing.assert_close(got, wanted)


def test_under_autocast_outputs_are_torchs(device, fused):
    x, weights, biases = made(device=device)
    with torch.autocast(device, torch.bfloat16):
        outputs = FF.linears(x, weights, biases)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert {p.grad.dtype for p in (x, *weights, *biases)} == {torch.float32}


def test_gate_and_up_are_one_launch(fused):
    x, (gate, up), _ = made(widths=(16, 16))
    down = torch.randn(IN, 16)
    names = kernels(lambda: FF.gated_mlp(x, gate, up, down))
    assert [name for name in names if name.startswith("linear")] == ["linears_fwd", "linear_fwd"]
