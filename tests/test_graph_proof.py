"""Proof of graphs: faults that are planted are caught, rolled back and reported."""

import copy
import functools
import inspect
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdl
import fastdl.functional as FF
from fastdl.optimize import graph
from fastdl.optimize.graph.match import SPELLINGS, Match
from fastdl.optimize.graph.options import known_ops
from fastdl.optimize.graph.show import public_name


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def verified(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=fastdl.backend, options={"verify": True, **options})


def plant(monkeypatch, op, wrong, only=lambda fused: True):
    """Let every spelling of an op call what `wrong` makes of the right call."""
    right = Match.call

    def call(self):
        fused = right(self)
        return wrong(fused) if public_name(fused.func) == op and only(fused) else fused

    monkeypatch.setattr(Match, "call", call)


def with_result(change):
    """A fault that runs the op and changes its result."""

    def wrong(fused):
        @functools.wraps(fused.func)
        def function(x, *args, **kwargs):
            return change(fused.func(x, *args, **kwargs), x)

        return functools.partial(function, *fused.args, **fused.keywords)

    return wrong


def with_arguments(**changed):
    return lambda fused: functools.partial(fused.func, *fused.args, **fused.keywords | changed)


def other_eps(fused):
    return functools.partial(fused.func, *fused.args[:4], 1e-2)


def without_residual(fused):
    kept = {name: x for name, x in fused.keywords.items() if name != "residual"}
    return functools.partial(fused.func, *fused.args, **kept)


def gives_gelu(fused):
    return fused.keywords.get("activation") == "gelu"


def adds(fused):
    return "residual" in fused.keywords


def outcomes(model, *args):
    """Output and gradients."""
    model.zero_grad()
    out = model(*args)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


FAULTS = {
    "eps": ("layer_norm", other_eps, lambda fused: True),
    "activation": ("linear", with_arguments(activation="gelu_tanh"), gives_gelu),
    "residual": ("linear", without_residual, adds),
    "gradient": ("layer_norm", with_result(lambda y, x: 2 * y - y.detach()), lambda fused: True),
    "nan": ("linear", with_result(lambda y, x: y * float("nan")), adds),
    "raises": ("linear", with_result(lambda y, x: y.view(-1, 5)), adds),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_rolled_back(name, monkeypatch):
    op, wrong, only = FAULTS[name]
    if name == "raises":  # at run time, not on the fake tensors of the engine's own check
        right = wrong

        def wrong(fused):
            made = right(fused)
            return functools.partial(
                functools.wraps(fused.func)(
                    lambda *a, **k: (fused.func if _is_fake(a) else made.func)(*a, **k)
                ),
                *fused.args, **fused.keywords,
            )  # fmt: skip

    plant(monkeypatch, op, wrong, only)
    model, x = Small(), torch.randn(5, 8)
    compiled = verified(model)
    with fastdl.policy("definition"):
        got = outcomes(compiled, x)
    report = fastdl.report(compiled)
    assert {site.op for site in report.rolled_back} == {op}
    assert all(site.reason and site.source for site in report.rolled_back)
    if name != "raises":
        assert all(site.before is not None for site in report.rolled_back)
    assert report.replaced  # what is right is kept
    for ours, theirs in zip(got, outcomes(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _is_fake(args):
    return isinstance(args[0], torch._subclasses.FakeTensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_one_dtype(dtype, monkeypatch):
    wrong = with_result(lambda y, x: y * 1.1 if x.dtype == torch.bfloat16 else y)
    plant(monkeypatch, "layer_norm", wrong)
    model, x = Small().to(dtype), torch.randn(5, 8, dtype=dtype)
    compiled = verified(model)
    with fastdl.policy("definition"):
        compiled(x)
    wanted = {"layer_norm"} if dtype == torch.bfloat16 else set()
    assert {site.op for site in fastdl.report(compiled).rolled_back} == wanted


def test_a_graph_without_gradients_is_judged_by_its_outputs(monkeypatch):
    plant(monkeypatch, "layer_norm", with_result(lambda y, x: 2 * y - y.detach()))
    compiled = verified(Small())
    with fastdl.policy("definition"), torch.no_grad():
        compiled(torch.randn(5, 8))
    assert not fastdl.report(compiled).rolled_back


def test_a_smaller_match_takes_the_place_of_a_wrong_one(monkeypatch):
    plant(monkeypatch, "linear", with_result(lambda y, x: y + 1), gives_gelu)
    compiled = verified(Small())
    with fastdl.policy("definition"):
        compiled(torch.randn(5, 8))
    report = fastdl.report(compiled)
    assert [site.pattern for site in report.rolled_back] == ["linear -> gelu"]
    assert [s.pattern for s in report.replaced] == ["layer_norm", "linear", "gelu", "linear -> add"]


def in_company(y, x):
    """Wrong where the input comes from another op, which alone it never does."""
    alone = x.grad_fn is None or x.grad_fn.name() in ("CloneBackward0", "AccumulateGrad")
    return y if alone else y * 1.5


def test_a_fault_that_only_the_whole_graph_shows(monkeypatch):
    plant(monkeypatch, "linear", with_result(in_company), adds)
    model, x = Small(), torch.randn(5, 8)
    compiled = verified(model)
    with fastdl.policy("definition"):
        got = outcomes(compiled, x)
    report = fastdl.report(compiled)
    assert [site.pattern for site in report.rolled_back] == ["linear -> add"]
    assert "with it the whole graph fails" in report.rolled_back[0].reason
    assert report.compiled.graphs[0].proof.ok
    for ours, theirs in zip(got, outcomes(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_without_verify_the_same_fault_stays(monkeypatch):
    """What is planted here is a fault indeed."""
    plant(monkeypatch, "layer_norm", other_eps)
    model, x = Small(), torch.randn(5, 8)
    compiled = verified(model, verify=False)
    with fastdl.policy("definition"):
        assert (compiled(x) - model(x)).abs().max() > 1e-4


calls = []


@torch._dynamo.allow_in_graph
def never_twice(x):
    calls.append(None)
    return x * 10.0 ** len(calls)


def test_a_graph_that_differs_from_itself_runs_as_it_was():
    class Fickle(Small):
        def forward(self, x):
            return never_twice(super().forward(x))

    model, x = Fickle(), torch.randn(5, 8)
    compiled = verified(model)
    with pytest.warns(UserWarning, match="a graph of the model runs as it was: even with nothing"):
        compiled(x)
    report = fastdl.report(compiled)
    assert not report.replaced
    assert len(report.rolled_back) == 3
    assert "graph 1 runs as it was" in str(report)
    calls.clear()
    got = compiled(x)
    calls.clear()
    assert torch.equal(got, model(x))


def test_a_proof_that_fails_leaves_the_graph(monkeypatch):
    def no_room(*models):
        raise MemoryError("no room")

    monkeypatch.setattr("fastdl.optimize.graph.judge.insist_on_room", no_room)
    model, x = Small(), torch.randn(5, 8)
    compiled = verified(model)
    with pytest.warns(UserWarning, match="its proof failed: .*no room"):
        got = compiled(x)
    assert torch.equal(got, model(x))
    assert not fastdl.report(compiled).replaced


# No trace.


class Stateful(nn.Module):
    """Running statistics, random numbers of dropout, and writes to its own tensors."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        y = self.drop(self.bn(self.fc(x)).relu_())
        self.seen.add_(y.detach().sum(0))
        return y


def test_a_proof_leaves_no_trace():
    models = [Stateful()]
    models.append(copy.deepcopy(models[0]))
    x, results = torch.randn(6, 8), []
    for model, verify in zip(models, (True, False), strict=True):
        compiled = verified(model, verify=verify)
        torch.manual_seed(3)
        random.seed(3)
        model.fc.weight.grad = torch.ones(8, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = compiled(x)
        y.sum().backward()
        states = (torch.get_rng_state(), random.getstate(), torch.is_grad_enabled())
        tensors = [y, x, *model.state_dict().values(), *(p.grad for p in model.parameters())]
        results.append((states, [t.clone() for t in tensors]))
        # what is dropped is random: the proof is of the graph without it
        assert len(fastdl.report(compiled).rolled_back) == 0
        assert fastdl.report(compiled).replaced
    (states, tensors), (states_of_other, others) = results
    assert torch.equal(states[0], states_of_other[0])
    assert states[1:] == states_of_other[1:]
    assert all(map(torch.equal, tensors, others))


def test_every_dropout_is_off_in_a_proof():
    def f(x, w):
        q = F.dropout(F.linear(x, w), 0.5)
        return F.scaled_dot_product_attention(q, q, q, None, 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=fastdl.backend, options={"verify": True})
    with fastdl.policy("definition"):
        compiled(torch.randn(1, 2, 5, 8), torch.randn(8, 8, requires_grad=True))
    sites = graph.last_report()
    assert {site.op for site in sites} == {"linear", "scaled_dot_product_attention"}
    assert all(site.reason is None and site.before < 1e-5 for site in sites)


def test_writes_inside_of_a_site_go_to_copies():
    def f(x, w, r):
        y = F.linear(x, w).relu_()
        y += r
        r.add_(1)
        return y

    given = [torch.randn(4, 8), torch.randn(8, 8), torch.randn(4, 8)]
    expected = [t.clone() for t in given]
    wanted = f(*expected)
    torch._dynamo.reset()
    got = torch.compile(f, backend=fastdl.backend, options={"verify": True})(*given)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(given, expected)
    assert [site.reason for site in graph.last_report()] == [None]


def test_an_operand_may_be_computed_inside_of_a_site():
    def f(x, w):
        y = F.linear(x, w)
        r = torch.cumsum(x, 1)
        return y + r

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=fastdl.backend, options={"verify": True})
    compiled(torch.randn(4, 8), torch.randn(8, 8, requires_grad=True))
    (site,) = graph.last_report()
    assert (site.pattern, site.reason) == ("linear -> add", None)
    assert site.after is not None


# Modes, bodies, shapes, and who comes next.


def test_sites_are_judged_in_their_modes(monkeypatch):
    seen = []

    def note(y, x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            amp = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
            seen.append((amp, x.requires_grad))
        return y

    plant(monkeypatch, "linear", with_result(note))

    class Modes(Small):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.fc1(x)
            with torch.no_grad():
                z = self.fc2(y.float())
            return y.float().sum() + z.sum()

    x = torch.randn(3, 8, requires_grad=True)
    compiled = verified(Modes())
    with warnings.catch_warnings(), fastdl.policy("definition"):
        warnings.simplefilter("error", UserWarning)
        compiled(x)
    report = fastdl.report(compiled)
    assert len(report.replaced) == 2
    assert not report.rolled_back
    assert (torch.bfloat16, True) in seen
    assert (False, False) in seen
    assert (torch.bfloat16, False) not in seen[:2]


def test_bodies_of_checkpoints_are_judged(monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Small(), Small()

        def forward(self, x):
            return checkpoint(self.two, self.one(x), use_reentrant=False)

    plant(monkeypatch, "layer_norm", other_eps)
    model, x = Checkpointed(), torch.randn(5, 8)
    compiled = verified(model)
    with fastdl.policy("definition"):
        got = outcomes(compiled, x)
    report = fastdl.report(compiled)
    assert {site.name.partition(" ")[0] for site in report.rolled_back} == {"one.norm", "two.norm"}
    assert all(site.reason.startswith("output[0]: ") for site in report.rolled_back)
    assert len(report.replaced) == 4
    assert all(site.after is not None for site in report.replaced)
    for ours, theirs in zip(got, outcomes(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_dynamic_shapes(monkeypatch):
    class Sized(Small):
        def forward(self, x):
            return super().forward(x.flatten().view(x.shape[0], 8))

    plant(monkeypatch, "layer_norm", other_eps)
    model = Sized()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fastdl.backend, options={"verify": True}, dynamic=True)
    with warnings.catch_warnings(), fastdl.policy("definition"):
        warnings.simplefilter("error", UserWarning)
        for rows in (4, 7):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x), model(x))
    report = fastdl.report(compiled)
    assert len(report.compiled.graphs) == 1
    assert [site.op for site in report.rolled_back] == ["layer_norm"]
    assert len(report.replaced) == 2


def test_two_graphs_around_a_break(monkeypatch):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Small(), Small()

        def forward(self, x):
            x = self.one(x)
            torch._dynamo.graph_break()
            return self.two(x)

    plant(monkeypatch, "layer_norm", other_eps)
    model, x = Broken(), torch.randn(5, 8)
    compiled = verified(model)
    with fastdl.policy("definition"):
        got = outcomes(compiled, x)
    report = fastdl.report(compiled)
    assert len(report.compiled.graphs) == 2
    assert all(g.proof.ok for g in report.compiled.graphs)
    assert {site.name.partition(" ")[0] for site in report.rolled_back} == {"one.norm", "two.norm"}
    for ours, theirs in zip(got, outcomes(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "then", ["eager", *(pytest.param(n, marks=pytest.mark.slow) for n in ("aot_eager", "inductor"))]
)
def test_then_with_verify(then, monkeypatch):
    plant(monkeypatch, "layer_norm", other_eps)
    model, x = Small(), torch.randn(5, 8)
    compiled = verified(model, then=then)
    got = outcomes(compiled, x)
    assert [site.op for site in fastdl.report(compiled).rolled_back] == ["layer_norm"]
    for ours, theirs in zip(got, outcomes(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Options.


def test_ops_limits_what_is_replaced():
    model = Small()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fastdl.backend, options={"ops": ["layer_norm"]})
    compiled(torch.randn(5, 8))
    assert [site.op for site in fastdl.report(compiled).replaced] == ["layer_norm"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"next": "inductor"}, "unknown options next; allowed: then, ops, verify"),
        ({"ops": ["layernorm"]}, "there is no op 'layernorm'. Did you mean 'layer_norm'"),
        ({"ops": ["gelu"]}, "Every activation that stands alone is the op 'activation'"),
        ({"ops": "linear"}, r"allowed is a list: \['linear'\]"),
        ({"verify": "yes"}, "verify is 'yes', allowed are True and False"),
        ({"then": 3}, "then is 3"),
    ],
)
def test_options_that_are_refused(options, said):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=said):
        torch.compile(nn.ReLU(), backend=fastdl.backend, options=options)(torch.ones(2))


def test_every_spelling_has_a_public_op():
    """Functions that stand for an op as it is written are known by the op's name."""
    found = set()
    for spelling in SPELLINGS:
        names = inspect.signature(spelling.pattern).parameters
        try:
            found.add(public_name(spelling.call(**dict.fromkeys(names, 1)).func))
        except TypeError:  # a parameter that the pattern fixes
            continue
    assert known_ops(found) == found
    assert {"rms_norm", "linear_cross_entropy", "scaled_dot_product_attention", "linear"} <= found
    assert all(hasattr(FF, name) for name in found)
