"""Gated units: how models write them, and the perceptron that keeps or recomputes its middle."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.contract.evaluate import Allocated, LibraryCalls
from fastdl.optimize import graph

IN, HIDDEN = 8, 12


def newton(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": newton,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh(),
    "mish": F.mish,
    "relu2": lambda x: F.relu(x).square(),
    "softplus": F.softplus,
}


def run(function, given):
    outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in given if t.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)]


def tensors(*shapes):
    return [(0.4 * torch.randn(*shape)).requires_grad_() for shape in shapes]


def is_ours(target):
    return getattr(target, "__module__", "").startswith("fastdl.")


def fused_calls(function, *given):
    """The fused calls of the compiled function, which computes what the function does."""
    kept = []

    def keep(gm, inputs):
        graph.backend(gm, inputs)
        kept.extend(n for n in gm.graph.nodes if is_ours(n.target))
        return gm.forward

    found = run(torch.compile(function, backend=keep, fullgraph=True), given)
    for got, wanted in zip(found, run(function, given), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    return kept


def names(calls):
    return [call.target.__name__ for call in calls]


def chunked(x):
    value, gate = x.chunk(2, dim=-1)
    return value, gate


HALVES = {
    "chunk": chunked,
    "chunk of 3-D": lambda x: torch.chunk(x[None], 2, 2),
    "split": lambda x: x.split(HIDDEN, dim=-1),
    "torch.split": lambda x: torch.split(x, HIDDEN, dim=-1),
    "sizes": lambda x: torch.split(x, [HIDDEN, HIDDEN], -1),
    "slices": lambda x: (x[..., :HIDDEN], x[..., HIDDEN:]),
    "slices by shape": lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
    "columns": lambda x: (x[:, :HIDDEN], x[:, HIDDEN:]),
}


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("halves", HALVES)
def test_halves_are_found(halves, gate_first):
    def written(x):
        first, second = HALVES[halves](x)
        return second * F.silu(first) if gate_first else F.silu(second) * first

    (call,) = fused_calls(written, *tensors((5, 2 * HIDDEN)))
    assert call.target is FF.glu
    assert call.kwargs.get("gate") is None
    assert call.kwargs.get("gate_first", False) == gate_first
    assert call.kwargs["activation"] == "silu"


@pytest.mark.parametrize("name", ACTS)
def test_every_activation_is_found(name):
    def written(x, u, g):
        value, gate = x.chunk(2, -1)
        return value * ACTS[name](gate), u * ACTS[name](g), ACTS[name](g) * u

    halves, first, second = fused_calls(written, *tensors((5, 8), (5, 4), (5, 4)))
    for call in (halves, first, second):
        given = call.kwargs["activation"]
        assert call.target is FF.glu
        assert (given[0] if isinstance(given, tuple) else given) == name
    assert "gate" not in halves.kwargs
    for call in (first, second):
        assert [n.name for n in (call.args[0], call.kwargs["gate"])] == ["l_u_", "l_g_"]


def test_function_and_product_of_halves_are_found():
    def written(x):
        a, b = x.chunk(2, dim=1)
        return F.glu(x, 1), a * b

    torchs, product = fused_calls(written, *tensors((2, 6, 3)))
    assert (torchs.args[1], torchs.kwargs) == (1, {})
    assert (product.args[1], product.kwargs) == (1, {"activation": None})


WEIGHTS = {"wg": (HIDDEN, IN), "wu": (HIDDEN, IN), "wd": (IN, HIDDEN)}
BIASES = {"bg": (HIDDEN,), "bu": (HIDDEN,), "bd": (IN,)}


def perceptron(act, residual=False, negates=False):
    def written(x, wg, wu, wd, bg=None, bu=None, bd=None):
        hidden = act(F.linear(x, wg, bg)) * F.linear(x, wu, bu)
        hidden = -hidden if negates else hidden
        y = F.linear(hidden, wd, bd)
        return x + y if residual else y

    return written


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "quick_gelu"])
def test_the_perceptron_is_found(name, bias, residual):
    shapes = [(5, IN), *WEIGHTS.values(), *(BIASES.values() if bias else ())]
    (call,) = fused_calls(perceptron(ACTS[name], residual), *tensors(*shapes))
    assert call.target is FF.gated_mlp
    assert call.kwargs["activation"] == name
    assert ("residual" in call.kwargs) == residual
    assert [n is not None for n in call.args[4:]] == [bias] * 3


def test_the_gate_is_not_left_alone():
    given = tensors((5, IN), *WEIGHTS.values())
    calls = fused_calls(perceptron(F.gelu, negates=True), *given)
    assert names(calls) == ["linears", "glu", "linear"]
    assert all("activation" not in call.kwargs for call in calls if call.target is FF.linear)


def test_fused_layers_are_found():
    """Phi's order, and that of diffusers."""

    def phi(x, w, wd):
        gate, up = F.linear(x, w).chunk(2, dim=-1)
        return F.linear(up * F.silu(gate), wd)

    def geglu(x, w, wd):
        hidden, gate = F.linear(x, w).chunk(2, dim=-1)
        return F.linear(hidden * F.gelu(gate), wd)

    given = tensors((5, IN), (2 * HIDDEN, IN), (IN, HIDDEN))
    for written, gate_first in ((phi, True), (geglu, False)):
        calls = fused_calls(written, *given)
        assert names(calls) == ["linear", "glu", "linear"]
        assert calls[1].kwargs.get("gate_first", False) == gate_first


def test_silu_stays_silu():
    def written(x, w):
        h = F.linear(x, w)
        return x * torch.sigmoid(x), torch.sigmoid(h) * h

    alone, after_linear = fused_calls(written, *tensors((5, 8), (6, 8)))
    assert (alone.target, alone.args[1]) == (FF.activation, "silu")
    assert (after_linear.target, after_linear.kwargs["activation"]) == (FF.linear, "silu")


def test_halves_that_are_read_elsewhere_are_two_tensors():
    def written(x):
        value, gate = x.chunk(2, -1)
        return value * F.silu(gate), gate

    (call,) = fused_calls(written, *tensors((5, 8)))
    assert call.kwargs["gate"] is not None


@pytest.mark.parametrize(
    "written",
    [
        lambda x, s: x * torch.sigmoid(s),  # squeeze and excitation
        lambda x, s: (x * torch.sigmoid(s.double())).float(),
    ],
)
def test_broadcast_and_promoted_gates_are_left_to_torch(written):
    given = tensors((2, 3, 4, 4), (2, 3, 1, 1))
    assert names(fused_calls(written, *given)) == ["activation"]


@pytest.mark.parametrize(
    "written",
    [
        lambda x: x[..., :4] * F.silu(x[..., 4:8]),
        lambda x: x[..., :4] * F.silu(x[..., -4:]),
        lambda x: x.split([4, 4, 8], -1)[0] * F.silu(x.split([4, 4, 8], -1)[1]),
        lambda x: x.split(4, -1)[0] * F.silu(x.split(4, -1)[1]),
        lambda x: x.chunk(4, -1)[0] * F.silu(x.chunk(4, -1)[1]),
        lambda x: x.split([1, 8, 7], -1)[0] * F.silu(x.split([1, 8, 7], -1)[1]),
    ],
)
def test_other_parts_are_no_halves(written):
    for call in fused_calls(written, *tensors((5, 16))):
        assert call.target is FF.activation or "gate" in call.kwargs


def test_a_result_that_is_part_and_argument_stays():
    def written(x, w):
        h = F.linear(x, w)
        r = F.relu(x)
        return h + h, r * r

    assert names(fused_calls(written, *tensors((5, 8), (8, 8)))) == ["linear", "activation"]


def test_products_in_place_are_left_alone():
    def written(x, w):
        up, gate = F.linear(x, w), F.linear(x, 2 * w)
        up *= F.silu(gate)
        return up

    calls = fused_calls(written, *tensors((5, 8), (6, 8)))
    assert "glu" not in names(calls)  # what it writes to may be read by backward


# The perceptron.


@pytest.fixture
def args(device):
    shapes = [(5, IN), *WEIGHTS.values(), *BIASES.values()]
    return [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]


def kept_elements(call):
    """What backward keeps, beside the arguments of the call."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("joined", [False, True])
def test_recomputing_keeps_the_input_alone(args, joined, fused):
    x, *rest = args
    if joined:
        wg, wu, wd, bg, bu, bd = (t.detach() for t in rest)
        rest = [torch.cat((wg, wu)), None, wd, torch.cat((bg, bu)), None, bd]
        rest = [t if t is None else t.requires_grad_() for t in rest]
    given = [x, *rest]
    leaves = [t for t in given if t is not None]
    inputs = {t.data_ptr() for t in leaves}
    results, middle = [], []
    for recompute in (False, True):
        y = FF.gated_mlp(*given, recompute=recompute)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
        kept = kept_elements(lambda r=recompute: FF.gated_mlp(*given, recompute=r))
        middle.append(sum(n for at, n in kept.items() if at not in inputs))
    assert middle == [3 * 5 * HIDDEN, 0]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_recomputing_under_transforms_and_twice(args, fused):
    x, *rest = args

    def loss(x, recompute):
        return FF.gated_mlp(x, *rest, recompute=recompute).sin().sum()

    with fastdl.policy("auto"):
        for way in (
            lambda r: torch.func.grad(lambda x: loss(x, r))(x.detach()),
            lambda r: torch.vmap(lambda x: loss(x, r))(x.detach()),
        ):
            torch.testing.assert_close(way(True), way(False))
        twice = []
        for recompute in (False, True):
            (first,) = torch.autograd.grad(loss(x, recompute), x, create_graph=True)
            twice += [torch.autograd.grad(first.square().sum(), [x, *rest[:3]])]
        for got, expected in zip(*twice, strict=True):
            torch.testing.assert_close(got, expected)


def test_recomputing_compiled(args, fused):
    def function(*given):
        return FF.gated_mlp(*given, recompute=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, args), run(function, args), strict=True):
        torch.testing.assert_close(got, expected)


def test_backward_writes_one_gradient_of_both_halves(device, fused):
    x = torch.randn(64, 2 * HIDDEN, device=device, requires_grad=True)
    y = FF.glu(x, activation="silu", gate_first=True)
    ones = torch.ones_like(y)
    with Allocated() as seen:
        torch.autograd.grad(y, x, ones)
    assert seen.bytes == x.nbytes


def test_a_frozen_gate_is_not_differentiated(device, fused):
    value, gate = (torch.randn(4, 6, device=device) for _ in range(2))
    for frozen in (value, gate):
        leaf = (gate if frozen is value else value).requires_grad_()
        with LibraryCalls() as seen:
            FF.glu(value, gate=gate, activation="gelu").sum().backward()
        grads = seen.calls[-1].result
        assert [g is not None for g in grads] == [leaf is value, leaf is gate]
        leaf.requires_grad_(False)


def test_infinite_gate_without_an_activation(device, fused):
    x = torch.tensor([2.0, torch.inf], device=device, requires_grad=True)
    FF.glu(x, activation=None).backward()
    assert x.grad.tolist() == [torch.inf, 2.0]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_module_holds_three_torch_layers(device, recompute, fused):
    ours = fastdl.nn.GatedMLP(
        6, 10, 4, activation="gelu", bias=False, recompute=recompute, device=device
    )
    x = torch.randn(3, 6, device=device)
    hidden = nn.functional.gelu(ours.gate_proj(x)) * ours.up_proj(x)
    torch.testing.assert_close(ours(x), ours.down_proj(hidden))
    assert set(ours.state_dict()) == {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    assert f"activation='gelu', recompute={recompute}" in repr(ours)


def test_glu_modules_are_replaced(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.GLU())
    x = torch.randn(3, 4)
    expected = model(x)
    fastdl.optimize(model)
    assert type(model[1]) is fastdl.nn.GLU
    torch.testing.assert_close(model(x), expected)
