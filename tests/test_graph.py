"""The graph engine: what it finds, what it leaves alone, and that the result computes the same."""

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


class Compiled:
    """A function compiled with the backend, and the graphs that it made."""

    def __init__(self, function, **options):
        self.graphs = []
        torch._dynamo.reset()
        self.function = torch.compile(
            function, backend=fastdl.backend, options={"then": self._keep}, **options
        )

    def _keep(self, gm, inputs):
        self.graphs.append(gm)
        return gm.forward

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    @property
    def calls(self):
        """The names of what the last graph calls."""
        nodes = self.graphs[-1].graph.nodes
        called = [n for n in nodes if n.op not in ("placeholder", "output")]
        return [n.target if isinstance(n.target, str) else n.target.__name__ for n in called]

    @property
    def fused(self):
        """The calls of fastdl's ops."""
        nodes = self.graphs[-1].graph.nodes
        return [n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl.")]

    @property
    def reasons(self):
        return [site.reason for site in graph.last_report() if site.reason is not None]


def tensors(*shapes, grad=True, dtype=torch.float32, device="cpu"):
    made = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return [tensor.requires_grad_(grad) for tensor in made]


def check_same(function, *args, atol=1e-5):
    """Outputs, gradients and what is left in the inputs, compiled and not. Returns the compiled."""
    ours = Compiled(function)
    results = []
    for run in (ours, function):
        given = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        # inputs that a function writes to cannot be leaves that require a gradient
        out = run(*(a.view_as(a) if a.requires_grad else a for a in given))
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum(o.float().sin().sum() for o in outs)
        if loss.requires_grad:
            loss.backward()
        results.append([*outs, *given, *(a.grad for a in given)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-4)
    return ours


def only_fused(compiled):
    return [n.target.__name__ for n in compiled.fused]


def only_call(compiled):
    """The one call that a graph consists of, besides taking a tuple apart."""
    assert [c for c in compiled.calls if c != "getitem"] == [compiled.fused[0].target.__name__]
    return compiled.fused[0]


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
    x, w, b, r = tensors((5, 8), (6, 8), (6,), (5, 6))
    combinations = list(itertools.product((None, b), (None, r)))
    compiled = Compiled(
        lambda x: [FF.linear(x, w, b, activation=activation, residual=r) for b, r in combinations]
    )
    with fastdl.policy("definition"):
        compiled(x)
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


# What must be left alone. Each function goes wrong if its rule is missing.

W = torch.randn(8, 8)


def write_to_input(x):
    h = F.linear(x, W)
    x.add_(1)
    return F.gelu(h)


def write_to_view(x):
    h, view = F.linear(x, W), x.view(-1)
    view.mul_(2)
    return F.gelu(h)


def write_item(x):
    h = F.linear(x, W)
    x[0] = 1
    return F.gelu(h)


def write_with_operator(x):
    h = F.linear(x, W)
    x += 1
    return F.gelu(h)


def write_through_out(x):
    h = F.linear(x, W)
    torch.add(x, 1, out=x)
    return F.gelu(h)


def write_inplace_argument(x):
    h = F.linear(x, W)
    F.relu(x, inplace=True)
    return F.gelu(h)


def write_of_a_list(x):
    h = F.linear(x, W)
    torch._foreach_add_([x], 1)
    return F.gelu(h)


@torch.library.custom_op("fastdl_test::bump", mutates_args=("x",))
def bump_op(x: torch.Tensor) -> None:
    x.add_(1)


def write_of_an_op(x):
    h = F.linear(x, W)
    torch.ops.fastdl_test.bump(x)
    return F.gelu(h)


def write_of_an_overload(x):
    h = F.linear(x, W)
    bump_op(x)
    return F.gelu(h)


def write_of_statistics(x):
    h = F.linear(x, W)
    F.batch_norm(W[:3], x[0], x[1], training=True)
    return F.gelu(h)


@torch.compiler.allow_in_graph
def bump(x):
    return x.add_(1)


def write_of_an_unknown_function(x):
    h = F.linear(x, W)
    bump(x)
    return F.gelu(h)


WRITES = [f for name, f in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("function", WRITES)
def test_writes_between(function):
    # written to are tensors of the graph, since its inputs are guarded by a rule of their own
    compiled = check_same(lambda x: function(x * 1), *tensors((3, 8), grad=False))
    assert "gelu" not in str(compiled.fused[0].kwargs)
    assert any("write" in reason for reason in compiled.reasons)


def test_write_between_of_a_checkpoint():
    def f(x):
        h = F.linear(x, W)
        checkpoint(lambda x: x.add_(1), x, use_reentrant=False)
        return F.gelu(h)

    compiled = check_same(f, *tensors((3, 8), grad=False))
    assert "gelu" not in str([n.kwargs for n in compiled.fused])


def test_inputs_may_share_memory_at_the_next_call():
    def f(x, y):
        h = F.linear(x, W)
        y.add_(1)
        return F.gelu(h)

    compiled = Compiled(f)
    compiled(torch.randn(3, 8), torch.randn(24))
    x = torch.randn(3, 8)
    copied = x.clone()
    torch.testing.assert_close(compiled(x, x.view(-1)), F.gelu(F.linear(copied, W)))
    assert len(compiled.graphs) == 1


def test_write_to_something_else_is_no_hazard():
    def f(x):
        h, other = F.linear(x, W), torch.zeros(8)
        other.add_(1)
        return F.gelu(h) + other

    assert only_fused(check_same(f, *tensors((3, 8)))) == ["linear"]


def test_write_to_what_backward_needs():
    # hardtanh in torch keeps its input, the fused op its output
    def f(x, w):
        h = F.hardtanh(F.linear(x, w))
        h.mul_(2)
        return h

    compiled = check_same(f, *tensors((3, 8), (8, 8)))
    assert "h.mul_" in str(compiled.reasons) or "backward may need" in str(compiled.reasons)
    with torch.no_grad():
        compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
        assert compiled.calls == ["linear", "mul_"]


@pytest.mark.parametrize("mode", ["grad", "autocast"])
def test_modes_are_boundaries(mode):
    def f(x, w):
        context = torch.no_grad() if mode == "grad" else torch.autocast("cpu", torch.bfloat16)
        with context:
            h = F.linear(x, w)
        return F.gelu(h)

    compiled = check_same(f, *tensors((3, 8), (8, 8)), atol=1e-2)
    assert any("changes the mode" in reason for reason in compiled.reasons)
    assert only_fused(compiled) == ["linear", "activation"]


def test_intermediate_with_another_reader():
    def f(x, w):
        h = F.linear(x, w)
        return F.gelu(h), h

    compiled = check_same(f, *tensors((3, 8), (8, 8)))
    assert any("also used by output" in reason for reason in compiled.reasons)


def test_prenorm_result_used_too_early():
    def f(x, r):
        h = x + r
        early = h * 2
        return F.layer_norm(h, (8,), early[0]), h

    compiled = check_same(f, *tensors((3, 8), (3, 8)))
    assert compiled.fused[0].kwargs == {}


# In place: absorbed if nobody can tell.


@pytest.mark.parametrize(
    "tail",
    [
        lambda h, r: F.relu(h, inplace=True),
        lambda h, r: h.relu_(),
        lambda h, r: torch.relu_(h),
        lambda h, r: h.add_(r),
        lambda h, r: F.hardtanh(h, inplace=True),
    ],
)
def test_absorbed_in_place(tail):
    compiled = check_same(lambda x, w, r: tail(F.linear(x, w), r), *tensors((3, 8), (8, 8), (3, 8)))
    assert compiled.calls == ["linear"]


def test_absorbed_one_after_the_other():
    def f(x, r):
        return F.relu(F.linear(x, W), inplace=True).add_(r)

    assert check_same(f, *tensors((3, 8), (3, 8), grad=False)).calls == ["linear"]


def test_absorbed_augmented_assignment():
    def f(x, w, r):
        h = F.gelu(F.linear(x, w))
        h += r
        return h

    assert check_same(f, *tensors((3, 8), (8, 8), (3, 8))).calls == ["linear"]


def test_in_place_on_an_input_stays():
    compiled = check_same(lambda x: F.relu(x, inplace=True), *tensors((3, 8), grad=False))
    assert compiled.fused == []
    assert "writes to its input" in compiled.reasons[0]


def test_in_place_with_another_reader_stays():
    # z * sigmoid_(z) is sigmoid(z) squared
    def f(x, w):
        z = F.linear(x, w)
        return z * z.sigmoid_()

    compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
    assert any("has another reader" in reason for reason in compiled.reasons)


def test_in_place_with_a_reader_outside_stays():
    def f(x, w):
        z = F.linear(x, w)
        y = F.relu(z, inplace=True)
        return y + 1, z

    compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
    assert compiled.calls[:2] == ["linear", "relu"]


def test_in_place_does_not_promote():
    def f(x, w, r):
        h = F.linear(x, w)
        h += r
        return h

    x, w = tensors((3, 8), (8, 8), dtype=torch.bfloat16)
    compiled = check_same(f, x, w, *tensors((3, 8)), atol=2e-2)
    assert "changes the shape or dtype" in str(compiled.reasons)


# Shapes, dtypes and kinds of arguments.


@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 1, 8)])
def test_residual_that_enlarges_the_result(shape):
    def f(x, w, r):
        return F.gelu(F.linear(x, w)) + r

    compiled = check_same(f, *tensors((3, 8), (8, 8), shape))
    assert "residual" not in compiled.fused[0].kwargs


def test_residual_that_promotes():
    x, w = tensors((3, 8), (8, 8), dtype=torch.bfloat16)

    def f(x, w, r):
        return F.linear(x, w) + r

    assert "residual" not in check_same(f, x, w, *tensors((3, 8)), atol=2e-2).fused[0].kwargs


def test_modulation_that_enlarges_the_result():
    def f(x, scale, shift):
        return F.layer_norm(x, (8,)) * (1 + scale) + shift

    compiled = check_same(f, *tensors((3, 8), (2, 1, 8), (2, 1, 8)))
    assert compiled.fused[0].kwargs == {}


@pytest.mark.parametrize("addend", [1.0, 2])
def test_number_is_no_residual(addend):
    compiled = check_same(lambda x, w: F.linear(x, w) + addend, *tensors((3, 8), (8, 8)))
    assert compiled.calls == ["linear", "add"]
    assert "residual is not a tensor" in compiled.reasons


def test_unknown_number_is_no_parameter():
    compiled = Compiled(lambda x, slope: F.leaky_relu(x, slope), dynamic=True)
    x = torch.randn(4, 8)
    for slope in (0.1, 0.2):
        torch.testing.assert_close(compiled(x, slope), F.leaky_relu(x, slope))
    assert compiled.reasons == ["name is not a constant"]


def test_scaled_sum_is_no_residual():
    def f(x, w, r):
        return torch.add(F.linear(x, w), r, alpha=2)

    assert check_same(f, *tensors((3, 8), (8, 8), (3, 8))).calls == ["linear", "add"]


def test_option_that_the_op_has_not():
    def f(x, cudnn):
        return torch.layer_norm(x, (8,), None, None, 1e-5, cudnn)

    for cudnn in (True, False):
        compiled = Compiled(f)
        compiled(torch.randn(3, 8), cudnn)
        assert bool(compiled.fused) == cudnn


def test_product_with_a_vector():
    """A call that torch takes and the op may refuse is left, or replaced by what computes it."""
    check_same(lambda x, w: F.gelu(F.linear(x, w)), *tensors((3, 8), (8,)))


def test_transforms_are_left_to_torch():
    w = torch.randn(8, 8)

    def f(x):
        return torch.func.grad(lambda t: F.gelu(F.linear(t, w)).sum())(x)

    compiled = check_same(f, *tensors((3, 8), grad=False))
    assert compiled.fused == []
    assert "torch.func" in compiled.reasons[0]


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
