"""Neighbours in nn.Sequential that run as one op, and stop when something comes between them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastdl

X = (6, 8)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def mlp(width=8, p=0.1):
    return nn.Sequential(
        nn.Linear(width, 16), nn.GELU(), nn.Dropout(p), nn.Linear(16, width), nn.Dropout(p)
    )


def ops_of(model, x):
    """The ops that ran, in the order of their calls."""
    seen = fastdl.explain(model, x)
    return [decision.op for decision in seen.decisions if decision.stage == "call"]


def assert_same(model, other, x):
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-5, atol=1e-5)


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(),
    nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.SELU(), nn.CELU(1.3), nn.Mish(),
    nn.Softplus(2.0, 5.0), nn.Softsign(), nn.Hardswish(inplace=True), nn.Hardsigmoid(),
    nn.Hardtanh(-0.5, 0.4), nn.LogSigmoid(), nn.Tanhshrink(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_joins_its_linear(activation, fused, device):
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(activation)).to(device)
    original, x = copy.deepcopy(model), torch.randn(X, device=device)
    fastdl.optimize(model)
    assert ops_of(model, x) == ["linear"]
    assert_same(model, original, x)


def test_what_does_not_belong_together(fused, device):
    model = nn.Sequential(
        nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.1), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8),
        nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(8, 4), nn.Sigmoid(),
        nn.Tanh(),
    ).to(device)  # fmt: skip
    original, x = copy.deepcopy(model), torch.randn(X, device=device)
    fastdl.optimize(model)
    assert [site.pattern for site in fastdl.report(model).replaced] == [
        "GELU", "Linear + Dropout", "ReLU", "LayerNorm", "Linear", "Linear", "Linear",
        "Linear + Sigmoid", "Tanh",
    ]  # fmt: skip
    assert_same(model, original, x)
    assert_same(model[2:5], original[2:5], x)


def _hook(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(model):
    model[1].register_forward_pre_hook(lambda module, args: args[0] * 2)


def _replace(model):
    model[1] = nn.Tanh()


def _wrap(model):
    class Lora(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.a = base_layer, nn.Parameter(torch.ones(8, 16))

        def forward(self, x):
            return self.base_layer(x) + x @ self.a

    torch.manual_seed(1)
    model[0] = Lora(model[0])


def _parametrize(model):
    parametrize.register_parametrization(model[0], "weight", Negated())


def _prune(model):
    prune.l1_unstructured(model[0], "weight", 0.5)


def _own_forward(model):
    model[1].forward = torch.cos


def _derive(model):
    model[0].__class__ = Doubled


def _reorder(model):
    model[0], model[1] = model[1], nn.Linear(8, 16)
    with torch.no_grad():
        model[1].weight.fill_(0.1)
        model[1].bias.fill_(0.1)


@pytest.mark.parametrize(
    "change",
    [_hook, _pre_hook, _replace, _wrap, _parametrize, _prune, _own_forward, _derive, _reorder],
)
def test_a_later_change_of_children_holds(change, device):
    model = mlp(p=0.0).to(device)
    original, x = copy.deepcopy(model), torch.randn(X, device=device)
    fastdl.optimize(model)
    assert_same(model, original, x)
    change(model)
    change(original)
    model, original = model.to(device), original.to(device)
    assert not torch.equal(model(x), 0 * x)
    assert_same(model, original, x)


def test_global_hooks_see_every_child():
    model, seen = fastdl.optimize(mlp()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    with handle:
        model(torch.randn(X))
    assert seen[:3] == [fastdl.nn.Linear, fastdl.nn.GELU, fastdl.nn.Dropout]


def test_dropout_follows_its_module(fused, device):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to(device)
    x = torch.randn(32, 8, device=device)
    fastdl.optimize(model)
    assert 0.4 < (model(x) == 0).float().mean() < 0.6
    model[1].p = 1.0
    assert (model(x) == 0).all()
    assert (model.eval()(x) != 0).all()


def test_compiles_without_a_break(device):
    model = fastdl.optimize(mlp(p=0.0)).to(device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(X, device=device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    applied = [n for n in graphs[0].graph.nodes if n.name.startswith("autograd_function_apply")]
    assert len(applied) == 2


def test_a_compiled_model(device):
    model, x = torch.compile(mlp(p=0.0).to(device), backend="aot_eager"), torch.randn(X).to(device)
    expected = model(x)
    fastdl.optimize(model, x)
    assert [site.name for site in fastdl.report(model).replaced] == ["_orig_mod.0", "_orig_mod.3"]
    assert type(model.get_submodule("_orig_mod.0")) is fastdl.nn.Linear
    torch.testing.assert_close(model(x), expected)
