"""The graph engine: what it finds, and that the result computes the same."""

import copy
import importlib
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdl
import fastdl.functional as FF
from fastdl.contract import SPECS, Maker
from fastdl.optimize import graph
from graph_forms import Compiled, check_same, only_call, only_fused, tensors

ACTIVATIONS = {
    None: None,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
}


# Every definition comes back as its fused op.


def spelled_cases():
    for spec in SPECS.values():
        for case in spec.cases:
            if case.spelled:
                yield pytest.param(spec, case, id=f"{spec.name}-{case.name}")


@pytest.mark.parametrize(("spec", "case"), list(spelled_cases()))
def test_contract_case_comes_back(spec, case):
    call = case.make(Maker())
    compiled = Compiled(lambda: call.func(*call.args, **call.keywords), fullgraph=True)
    with fastdl.policy("definition"):
        compiled()
    assert only_call(compiled).target.__name__ in (spec.name, call.func.__name__)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_comes_back(activation):
    w, b, r, *inputs = tensors((6, 8), (6,), (5, 6), *[(5, 8)] * 4)
    combinations = list(itertools.product((None, b), (None, r)))
    compiled = Compiled(
        lambda *inputs: [
            FF.linear(x, w, b, activation=activation, residual=r)
            for x, (b, r) in zip(inputs, combinations, strict=True)
        ]
    )
    with fastdl.policy("definition"):
        compiled(*inputs)
    assert compiled.calls == ["linear"] * 4
    for call, (bias, residual) in zip(compiled.fused, combinations, strict=True):
        assert call.target is FF.linear
        assert (call.args[2] is None) == (bias is None)
        assert ("residual" in call.kwargs) == (residual is not None)
        given = call.kwargs.get("activation")
        name = "hardtanh" if activation == "relu6" else activation
        assert (given[0] if isinstance(given, tuple) else given) == name


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a is not None])
def test_activation_comes_back(activation):
    compiled = Compiled(lambda x: ACTIVATIONS[activation](x))
    compiled(torch.randn(3, 4))
    assert only_call(compiled).target is FF.activation


@pytest.mark.parametrize("activation", [("leaky_relu", 0.3), ("elu", 0.7), ("softplus", 2.0, 9.0)])
def test_parameters_of_activations_come_back(activation):
    x, w = tensors((5, 8), (6, 8))
    compiled = Compiled(lambda x: FF.linear(x, w, activation=activation))
    with fastdl.policy("definition"):
        compiled(x)
    assert only_call(compiled).kwargs["activation"] == activation


@pytest.mark.parametrize("residual", [None, "residual", "prenorm"])
@pytest.mark.parametrize("modulation", [(), ("scale",), ("scale", "shift")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_comes_back(residual, modulation, dtype):
    x, r, scale, shift = tensors((2, 3, 8), (2, 3, 8), (2, 1, 8), (2, 1, 8), dtype=dtype)
    w, b = tensors((8,), (8,))  # float32 beside bfloat16: the definition casts up and down
    given = {"scale": scale, "shift": shift}
    options = {name: given[name] for name in modulation}
    if residual is not None:
        options |= {"residual": r, "prenorm": residual == "prenorm"}
    weights = [(w, b), (w, None), (None, None)]
    compiled = Compiled(lambda x: [FF.layer_norm(x, (8,), *both, **options) for both in weights])
    with fastdl.policy("definition"):
        compiled(x)
    assert [c for c in compiled.calls if c != "getitem"] == ["layer_norm"] * 3
    for call, both in zip(compiled.fused, weights, strict=True):
        assert call.target is FF.layer_norm
        assert [arg is None for arg in call.args[2:4]] == [factor is None for factor in both]
        expected = {*modulation} | ({"residual"} if residual else set())
        assert set(call.kwargs) - {"prenorm"} == expected
        assert call.kwargs.get("prenorm", False) == (residual == "prenorm")


@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamic_shapes_leave_nothing_behind(dynamic):
    x, r, w, b = tensors((4, 8), (4, 8), (8,), (8,))
    compiled = Compiled(lambda x, r: FF.layer_norm(x, (8,), w, b, residual=r), dynamic=dynamic)
    with fastdl.policy("definition"):
        compiled(x, r)
    assert compiled.calls == ["layer_norm"]


# Other ways to write the same.


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("gelu", lambda x: nn.GELU()(x)),
        ("gelu", lambda x: torch._C._nn.gelu(x, approximate="none")),
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3)))),
        ),
        (
            "gelu_tanh",
            lambda x: (
                0.5
                * x
                * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))
            ),
        ),
        ("silu", lambda x: torch.sigmoid(x) * x),
        ("silu", lambda x: x.mul(x.sigmoid())),
        ("relu", lambda x: x.relu()),
        ("relu", lambda x: torch.relu(x)),
        ("relu2", lambda x: torch.square(x.relu())),
        ("quick_gelu", lambda x: x * (x * 1.702).sigmoid()),
        ("mish", lambda x: x * F.softplus(x).tanh()),
    ],
)
def test_other_spellings(name, write):
    x, w = tensors((5, 8), (6, 8))
    compiled = Compiled(lambda x: write(F.linear(x, w)).add(1 * x[:, :6]))
    compiled(x)
    (call,) = compiled.fused
    assert call.kwargs["activation"] == name
    assert "residual" in call.kwargs


def test_ops_that_are_one_call_of_torch():
    x, w, g, b = tensors((2, 4, 9), (4, 1, 3), (4,), (4,))
    compiled = check_same(lambda x, g, b: F.relu(F.instance_norm(x, None, None, g, b)), x, g, b)
    assert compiled.calls == ["instance_norm"]
    causal = check_same(lambda x, w, b: F.silu(F.conv1d(x, w, b, 1, 2, 1, 4)[:, :, :9]), x, w, b)
    assert causal.calls == ["causal_conv1d"]


def test_another_constant_is_another_function():
    def f(x, w):
        h = F.linear(x, w)
        return h * torch.sigmoid(1.7 * h)  # quick_gelu has 1.702

    compiled = check_same(f, *tensors((3, 8), (8, 8)))
    assert only_fused(compiled) == ["linear", "glu"]


def test_dropout_is_absorbed():
    x, w, r = tensors((64, 8), (16, 8), (64, 16))
    compiled = Compiled(lambda x, training: F.dropout(F.linear(x, w), 0.5, training) + r)
    y = compiled(x, True)
    assert only_call(compiled).kwargs["dropout_p"] == 0.5
    assert 0.3 < (y == r).float().mean() < 0.7
    torch.testing.assert_close(compiled(x, False), F.linear(x, w) + r)


# What is replaced computes the same.


class Block(nn.Module):
    """A pre-norm transformer block without its attention."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.mix(self.norm1(x)).relu_()
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def models():
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(inplace=True))
    return {
        "mlp": (mlp, 2),
        "block": (Block(8), 5),
        "blocks": (nn.Sequential(*map(Block, [8] * 2)), 10),
    }


@pytest.mark.parametrize("name", ["mlp", "block", "blocks"])
def test_models(name, fused, device):
    model, sites = models()[name]
    model.to(device)
    ours = copy.deepcopy(model)
    compiled = Compiled(ours)
    for rows in (3, 4, 6):  # the third runs the dynamic graph of the second
        (x,) = tensors((rows, 8), grad=False, device=device)
        got, wanted = compiled(x), model(x)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        got.square().sum().backward()
        wanted.square().sum().backward()
    assert len(compiled.graphs) == 2
    assert sum(site.reason is None for site in graph.last_report()) == sites
    for ours_, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_gradient_of_a_gradient(fused, device):
    x, w = tensors((3, 4), (5, 4), device=device)

    def f(x):
        return F.gelu(F.linear(x, w)).sum()

    with fastdl.policy("fused"):
        (ours,) = torch.autograd.grad(Compiled(f)(x), x, create_graph=True)
        (twice,) = torch.autograd.grad(ours.square().sum(), x)
    (theirs,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(theirs.square().sum(), x)[0])


def test_checkpointed_bodies_are_rewritten():
    block = Block(8)
    compiled = check_same(lambda x: checkpoint(block, x, use_reentrant=False), *tensors((3, 8)))
    assert compiled.calls == ["wrap_body_0", "tag_activation_checkpoint", "getitem"]
    assert sum(site.reason is None for site in graph.last_report()) == 5


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where):
    block, x = Block(8), torch.randn(3, 8)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    compiled = Compiled(block if where == "around" else f)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        got = compiled(x)
    torch.testing.assert_close(got, f(x), atol=3e-2, rtol=3e-2)
    # the norm's residual is bfloat16 and what it is added to float32
    assert len(compiled.fused) >= 4


def aot_graphs(function, *args):
    """The forward and backward graphs behind AOT autograd, as one string each."""
    aot_autograd = importlib.import_module("torch._dynamo.backends.common").aot_autograd
    graphs = []

    def record(gm, inputs):
        graphs.append(str(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    options = {"then": aot_autograd(fw_compiler=record, bw_compiler=record)}
    out = torch.compile(function, backend=fastdl.backend, options=options)(*args)
    out.sum().backward()
    return graphs


def test_fused_ops_stand_in_aot_graphs(fused, device):
    x, w, b = tensors((3, 8), (8, 8), (8,), device=device)
    forward, backward = aot_graphs(lambda x: F.layer_norm(F.gelu(F.linear(x, w, b)), (8,)), x)
    for op in ("linear", "layer_norm"):
        assert f"torch.ops.fastdl.{op}.default" in forward
        assert f"torch.ops.fastdl.{op}_backward.default" in backward
    assert "aten.gelu" not in forward + backward


@pytest.mark.parametrize("then", ["aot_eager", "inductor"])
def test_then(then, fused, device):
    x, w, b = tensors((3, 8), (8, 8), (8,), device=device)

    def f(x):
        return F.gelu(F.linear(x, w, b))

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=fastdl.backend, options={"then": then})
    torch.testing.assert_close(compiled(x), f(x), atol=1e-5, rtol=1e-4)
    got, wanted = (torch.autograd.grad(g(x).sin().sum(), (x, w, b)) for g in (compiled, f))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_fused_ops_stand_in_what_inductor_runs(fused, device):
    """Forward and backward, with dynamic shapes: equal numbers would not show them gone."""
    run_and_get_code = importlib.import_module("torch._inductor.utils").run_and_get_code
    x, w, b = tensors((3, 8), (8, 8), (8,), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: F.layer_norm(F.gelu(F.linear(x, w, b)), (8,)),
        backend=fastdl.backend,
        options={"then": "inductor"},
        dynamic=True,
    )
    _, code = run_and_get_code(lambda: torch.autograd.grad(compiled(x).sin().sum(), (x, w, b)))
    for op in ("linear", "linear_backward", "layer_norm", "layer_norm_backward"):
        assert f"torch.ops.fastdl.{op}.default" in "".join(code), op


def test_a_fused_op_in_the_model_stays_and_leaves_nothing(fused, device):
    x, w = tensors((3, 8), (8, 8), grad=False, device=device)
    compiled = Compiled(lambda x: F.relu(FF.linear(x, w, activation="gelu")))
    torch.testing.assert_close(compiled(x), F.relu(F.gelu(F.linear(x, w))))
    assert compiled.calls == ["linear.default", "getitem", "activation"]


# Order and preference.


def test_largest_match_wins():
    def f(x, w, r):
        return r + 0.5 * (h := F.linear(x, w)) * (1 + torch.erf(h / 2**0.5))

    compiled = check_same(f, *tensors((3, 8), (8, 8), (3, 8)))
    assert compiled.calls == ["linear"]
    (site,) = graph.last_report()
    assert site.op == "linear"
    assert site.pattern.startswith("linear -> ")


def test_sum_of_two():
    def f(x, v, w):
        return F.linear(x, v) + F.linear(x, w)

    compiled = check_same(f, *tensors((3, 8), (8, 8), (8, 8)))
    assert compiled.calls == ["linear", "linear"]
    assert [("residual" in n.kwargs) for n in compiled.fused] == [False, True]


# The backend itself.


def test_report():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8))
    compiled = Compiled(model)
    compiled(torch.randn(2, 8))
    assert [(s.op, s.reason) for s in graph.last_report()] == [
        ("linear", None),
        ("layer_norm", None),
    ]
    assert [s.name.partition(" ")[0] for s in graph.last_report()] == ["1", "2"]
    assert graph.sites(compiled.graphs[-1]) == graph.last_report()


def test_unknown_option():
    with pytest.raises(Exception, match="unknown options"):
        torch.compile(nn.ReLU(), backend=fastdl.backend, options={"next": "inductor"})(
            torch.ones(2)
        )


def test_is_a_backend_by_name():
    from importlib.metadata import entry_points

    if not entry_points(group="torch_dynamo_backends", name="fastdl"):
        pytest.skip("fastdl is not installed")
    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(F.relu, backend="fastdl")(x), F.relu(x))


def test_compiler_is_not_imported_before_it_is_used():
    code = "import sys, fastdl, fastdl.optimize.graph; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
