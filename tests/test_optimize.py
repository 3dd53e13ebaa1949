"""The module engine: what it replaces, what it leaves alone, and that nothing else changes."""

import copy
import gc
import io
import json
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastdl
from fastdl.optimize.plan import VerificationError

X = (6, 8)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Twice(nn.Module):
    """Calls one layer on the rows it is given, and then on fewer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.fc(x)[1:])


class Grows(nn.Module):
    """Gives something else at each call, of whichever copy."""

    calls = 0

    def forward(self, x):
        Grows.calls += 1
        return x * 3.0**Grows.calls


class Derived(nn.Linear):
    def forward(self, x):
        return super().forward(x).neg()


def mlp(width=8, p=0.1):
    return nn.Sequential(
        nn.Linear(width, 16), nn.GELU(), nn.Dropout(p), nn.Linear(16, width), nn.Dropout(p)
    )


def patterns(sites):
    return [(site.name, site.pattern) for site in sites]


def ops_of(model, x):
    """The ops that ran, in the order of their calls."""
    seen = fastdl.explain(model, x)
    return [decision.op for decision in seen.decisions if decision.stage == "call"]


def assert_same(model, other, x):
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-5, atol=1e-5)


# the swap


def test_plan_changes_nothing(device):
    model = Block().to(device)
    plan = fastdl.plan(model)
    assert patterns(plan) == [
        ("norm", "LayerNorm"),
        ("qkv", "Linear"),
        ("proj", "Linear"),
        ("mlp.0", "Linear + GELU + Dropout"),
        ("mlp.3", "Linear + Dropout"),
    ]
    assert [site.op for site in plan] == ["layer_norm", *["linear"] * 4]
    assert type(model.norm) is nn.LayerNorm and type(model.mlp) is nn.Sequential


def test_optimize_and_restore(device, fused):
    model, x = Block().to(device), torch.randn(2, *X, device=device)
    original = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    assert fastdl.optimize(model) is model
    assert type(model.norm) is fastdl.nn.LayerNorm
    assert patterns(fastdl.report(model).replaced) == patterns(fastdl.plan(original))
    assert ops_of(model, x) == ["layer_norm", *["linear"] * 4]
    assert fastdl.verify(original, model, x).ok

    assert fastdl.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert not fastdl.report(model).replaced


def test_nothing_but_classes_changes():
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.qkv.register_forward_hook(lambda *args: calls.append("hook"))
    parameters, text = dict(model.named_parameters()), repr(model)
    names, kept = list(model.state_dict()), {m: dict(vars(m)) for m in model.modules()}
    fastdl.optimize(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == names and repr(model) == text
    assert all(vars(m) == kept[m] for m in model.modules())
    assert isinstance(model.qkv, nn.Linear) and isinstance(model.mlp, nn.Sequential)
    before = model.mlp[0].weight.clone()
    model(torch.randn(2, *X)).sum().backward()
    optimizer.step()
    assert calls == ["hook"] and not torch.equal(model.mlp[0].weight, before)
    fastdl.restore(model).load_state_dict(Block().state_dict())


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_stay_optimized(copied):
    model, x = fastdl.optimize(Block()), torch.randn(2, *X)
    twin = copied(model)
    assert type(twin.mlp) is type(model.mlp) and type(twin.norm) is fastdl.nn.LayerNorm
    assert_same(model, twin, x)
    assert patterns(fastdl.report(twin).replaced) == patterns(fastdl.report(model).replaced)
    assert type(fastdl.restore(twin).norm) is nn.LayerNorm
    assert type(model.norm) is fastdl.nn.LayerNorm


def test_twice_is_once():
    model = fastdl.optimize(Block())
    first = fastdl.report(model)
    classes = [type(module) for module in model.modules()]
    assert all("already" in site.reason for site in fastdl.plan(model))
    fastdl.optimize(model, strict=True)
    assert [type(module) for module in model.modules()] == classes
    assert patterns(fastdl.report(model).replaced) == patterns(first.replaced)


def test_a_layer_alone_is_a_model():
    layer = fastdl.optimize(nn.Linear(8, 4))
    assert type(layer) is fastdl.nn.Linear
    assert "(the model)" in str(fastdl.report(layer))


def test_tied_and_shared_modules():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(8, 8)})
    model["head"].weight = shared.weight
    fastdl.optimize(model)
    assert patterns(fastdl.report(model).replaced) == [("a", "Linear"), ("head", "Linear")]
    assert model["a"] is model["b"] and model["head"].weight is shared.weight


def test_frozen_weights_stay_frozen(fused, device):
    model = mlp(p=0.0).to(device)
    model[0].requires_grad_(False)
    fastdl.optimize(model)
    model(torch.randn(*X, device=device)).sum().backward()
    assert model[0].weight.grad is None and model[3].weight.grad is not None


# what is left alone


def _with_forward(layer):
    layer.forward = lambda x: x
    return layer


def _quantized():
    return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4))


def _weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "pruned"),
        (_weight_norm, "hook computes it"),
        (lambda: nn.LazyLinear(4), "lazy"),
        (lambda: Derived(4, 4), "Derived is derived from Linear"),
        (lambda: _with_forward(nn.Linear(4, 4)), "replaced on the instance"),
        (lambda: nn.Linear(4, 4, dtype=torch.float64), "float64"),
        (lambda: nn.LayerNorm(4).double(), "float64"),
    ],
)
def test_left_alone_with_a_reason(make, reason):
    model = nn.ModuleList([make()])
    cls = type(model[0])
    (site,) = fastdl.plan(model)
    assert site.op and reason in site.reason
    with pytest.raises(ValueError, match=r"cannot replace\n  0 \("):
        fastdl.optimize(model, strict=True)
    fastdl.optimize(model)
    assert type(model[0]) is cls
    assert fastdl.report(model).skipped == [site]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(nn.Linear(4, 4)), "TorchScript"),
        (_quantized, "quantized"),
        (lambda: nn.Bilinear(4, 4, 4), "no rule"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unknown_kinds_are_reported_and_not_insisted_on(make, reason):
    model = nn.ModuleList([make()])
    (site,) = fastdl.optimize(model, strict=True) and fastdl.plan(model)
    assert not site.op and reason in site.reason


def test_a_class_patched_by_another_library(monkeypatch):
    forward = nn.LayerNorm.forward

    def patched(self, input):
        return forward(self, input)

    monkeypatch.setattr(nn.LayerNorm, "forward", patched)
    (site,) = fastdl.plan(nn.LayerNorm(4))
    assert "was replaced by" in site.reason


def test_a_lazy_module_once_it_is_initialised():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    model(torch.randn(X))
    assert patterns(fastdl.plan(model)) == [("0", "Linear + ReLU")]


def test_weights_of_a_tensor_subclass_are_left_alone():
    class Packed(torch.Tensor):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    (site,) = fastdl.plan(layer)
    assert "Packed" in site.reason


def test_attention_keeps_the_layer_whose_weights_it_takes():
    model = fastdl.optimize(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), strict=True)
    assert not isinstance(model.self_attn.out_proj, fastdl.nn.Linear)
    assert isinstance(model.linear1, fastdl.nn.Linear)
    x = torch.randn(2, 5, 8)
    assert fastdl.verify(model, model, x).ok and fastdl.verify(model.eval(), model, x).ok


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"include": ["mlp"]}, ["mlp.0", "mlp.3"]),
        ({"include": ["mlp.?"], "exclude": ["mlp.1"]}, ["mlp.0", "mlp.2", "mlp.3"]),
        ({"include": [nn.LayerNorm]}, ["norm"]),
        ({"exclude": ["*.0", nn.LayerNorm]}, ["qkv", "proj", "mlp.1", "mlp.2", "mlp.3"]),
        ({"exclude": [Block]}, []),
        ({"include": [], "strict": True}, []),
    ],
)
def test_include_and_exclude(options, replaced):
    model, x = Block(), torch.randn(2, *X)
    original = copy.deepcopy(model)
    report = fastdl.report(fastdl.optimize(model, **options))
    assert [site.name for site in report.replaced] == replaced
    assert all("left out" in site.reason for site in report.skipped)
    assert_same(model, original, x)


# with example inputs


def test_every_site_is_judged_on_its_inputs(device, fused):
    model = Block().to(device)
    fastdl.optimize(model, torch.randn(2, *X, device=device))
    report = fastdl.report(model)
    assert len(report.replaced) == 5 and not report.rolled_back and report.proof.ok
    for site in report.replaced:
        assert site.route == "fused" and 0 < site.before < 1e-5 and 0 < site.after < 1e-5
    assert "proof" in str(report)


def test_a_site_that_fails_is_rolled_back(monkeypatch):
    forward = fastdl.nn.LayerNorm.forward
    monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", lambda m, x: forward(m, x) * 1.001)
    model, x = Block(), torch.randn(2, *X)
    (site, *_) = fastdl.plan(model, x)
    assert "too large" in site.reason and site.after > 1e-4 > site.before
    with pytest.raises(ValueError, match="norm"):
        fastdl.optimize(model, x, strict=True)
    assert type(model.qkv) is nn.Linear

    report = fastdl.report(fastdl.optimize(model, x))
    assert report.rolled_back == [site] and type(model.norm) is nn.LayerNorm
    assert len(report.replaced) == 4 and report.proof.ok
    assert "rolled back: 1" in str(report)


def test_wrong_gradients_and_errors_are_rolled_back(monkeypatch):
    def detached(module, x):
        return F.linear(x, module.weight, module.bias.detach())

    def raising(module, x):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(fastdl.nn.Linear, "forward", detached)
    monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", raising)
    report = fastdl.report(fastdl.optimize(Block(), torch.randn(2, *X)))
    reasons = {site.name: site.reason for site in report.rolled_back}
    assert reasons.keys() == {"norm", "qkv", "proj"}
    assert "gradient of bias" in reasons["qkv"] and "no kernel image" in reasons["norm"]


def test_a_group_that_fails_stays_apart(monkeypatch):
    forward = fastdl.functional.linear

    def wrong(*args, activation=None, **kwargs):
        return forward(*args, activation="relu" if activation else None, **kwargs)

    monkeypatch.setattr(fastdl.functional, "linear", wrong)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    report = fastdl.report(fastdl.optimize(model, torch.randn(X)))
    assert patterns(report.rolled_back) == [("0", "Linear + GELU")]
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, fastdl.nn.Linear]
    assert type(model) is nn.Sequential


def test_a_fault_that_no_replay_sees_is_rolled_back(monkeypatch):
    forward = fastdl.nn.Linear.forward

    def wrong_for_five_rows(module, x):
        return forward(module, x) * (1.01 if len(x) == 5 else 1)

    monkeypatch.setattr(fastdl.nn.Linear, "forward", wrong_for_five_rows)
    model = fastdl.optimize(nn.Sequential(nn.LayerNorm(8), Twice()), torch.randn(X))
    report = fastdl.report(model)
    (site,) = report.rolled_back
    assert site.name == "1.fc" and "whole model" in site.reason and "output" in site.reason
    assert site.after > 1e-3 > site.before > 0
    assert type(model[1].fc) is nn.Linear and type(model[0]) is fastdl.nn.LayerNorm
    assert report.proof.ok
    assert type(fastdl.optimize(model, verify=False)[1].fc) is fastdl.nn.Linear


def test_a_model_that_does_not_give_the_same_twice_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8), Grows())
    with pytest.raises(VerificationError, match="same twice") as error:
        fastdl.optimize(model, torch.randn(X))
    assert not error.value.proof.ok and type(model[0]) is nn.Linear


def test_dropout_keeps_what_it_should(monkeypatch):
    def half(x, p, training, inplace):
        return F.dropout(x, p / 2, training)

    monkeypatch.setattr(fastdl.functional, "dropout", half)
    report = fastdl.report(fastdl.optimize(nn.Sequential(nn.Dropout(0.4)), torch.randn(64, 64)))
    assert "keeps" in report.rolled_back[0].reason


class OtherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, dy):
        return F.dropout(dy, ctx.p), None


def test_dropout_has_one_mask_forward_and_backward(monkeypatch):
    monkeypatch.setattr(
        fastdl.functional,
        "dropout",
        lambda x, p, training, inplace: OtherMask.apply(x, p) if training and p else x,
    )
    report = fastdl.report(fastdl.optimize(nn.Sequential(nn.Dropout(0.4)), torch.randn(64, 64)))
    assert "backward" in report.rolled_back[0].reason


def test_sites_that_are_not_called():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_module("spare", nn.LayerNorm(8))
    report = fastdl.report(fastdl.optimize(model, torch.randn(X)))
    routes = {site.name: site.route for site in report.replaced}
    assert routes == {"0": "fused", "0.spare": "not called with these inputs"}


def test_optimizing_leaves_no_trace():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(X, generator=torch.Generator().manual_seed(1))
    fastdl.optimize(model, x)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_pre_hooks
    with pytest.raises(RuntimeError):
        fastdl.optimize(model, torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), rng) and type(model[0]) is fastdl.nn.Linear


def test_verify_needs_inputs():
    with pytest.raises(ValueError, match="example_inputs"):
        fastdl.optimize(nn.Linear(8, 8), verify=True)


# reports


def test_plan_and_report_as_text_and_json():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.PReLU(), Derived(8, 8))
    plan = fastdl.plan(model)
    assert json.loads(plan.to_json())["sites"] == [site._asdict() for site in plan]
    lines = str(plan).splitlines()
    assert lines[0] == "to replace: 1" and lines[2].split()[:4] == ["0", "Linear", "+", "GELU"]
    assert "left alone: 2" in lines

    fastdl.optimize(model, torch.randn(X))
    report = fastdl.report(model)
    told = json.loads(report.to_json())
    assert told["replaced"] == [site._asdict() for site in report.replaced]
    assert [site["name"] for site in told["skipped"]] == ["2", "3"]
    assert told["rolled_back"] == [] and told["proof"]["ok"]
    assert len({len(line) for line in str(report).splitlines()[1:3]}) <= 2


def test_a_report_does_not_keep_the_model_alive():
    model = fastdl.optimize(mlp(), torch.randn(X))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_sites_name_the_function_of_their_class():
    classes = {
        nn.BCEWithLogitsLoss(): "binary_cross_entropy_with_logits",
        nn.KLDivLoss(): "kl_div",
        nn.CrossEntropyLoss(): "cross_entropy",
        nn.BatchNorm2d(3): "batch_norm",
        nn.LSTMCell(2, 3): "lstm_cell",
    }
    sites = fastdl.plan(nn.ModuleList(classes))
    assert [site.op for site in sites] == [*classes.values()]
