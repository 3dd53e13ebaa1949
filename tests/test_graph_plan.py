"""Plans, reports and dumps of the graph engine."""

import copy
import functools
import gc
import json
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdl
from fastdl.cli import main
from fastdl.optimize.graph.match import Match
from fastdl.optimize.graph.show import show
from test_models import MODELS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.fc(self.norm(x)))


class Broken(nn.Module):
    """Two graphs, with a checkpoint in the second and running statistics in the first."""

    def __init__(self):
        super().__init__()
        self.bn, self.blocks = nn.BatchNorm1d(8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.blocks[0](self.bn(x))
        torch._dynamo.graph_break()
        return checkpoint(self.blocks[1], x, use_reentrant=False)


def compiled(model, **options):
    return torch.compile(model, backend=fastdl.backend, options=options)


def test_plan():
    plan = fastdl.plan(Broken(), torch.randn(5, 8), engine="graph")
    assert [(s.name.partition(" ")[0], s.op) for s in plan] == [
        ("bn", "batch_norm"),
        ("blocks.0.norm", "layer_norm"),
        ("blocks.0", "linear"),
        ("blocks.1.norm", "layer_norm"),
        ("blocks.1", "linear"),
    ]
    for site in plan:
        assert site.reason is None
        assert site.route == "fused"
        assert site.after <= site.allowed
        assert site.before < 1e-5
    places = [site.source.partition("  ") for site in plan]
    assert [text for _, _, text in places] == [
        "x = self.blocks[0](self.bn(x))",
        *["return x + self.drop(self.fc(self.norm(x)))"] * 4,
    ]
    assert all(place.startswith("tests/test_graph_plan.py:") for place, _, _ in places)
    assert json.loads(plan.to_json())["sites"][0]["source"] == plan[0].source
    assert plan[0].source in str(plan)


def test_plan_leaves_no_trace():
    model, x = Broken(), torch.randn(5, 8)
    state, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.blocks[0].fc.weight.grad = torch.ones(8, 8)
    user = compiled(model)
    user(x[:3])
    graphs = len(fastdl.report(user).compiled.graphs)
    model.load_state_dict(state)
    torch.set_rng_state(seed)
    with fastdl.policy("definition"):
        fastdl.plan(model, x, engine="graph")
        fastdl.plan(user, x, engine="graph")
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.blocks[0].fc.weight.grad, torch.ones(8, 8))
    assert model.bn.weight.grad is None
    user(x[:3])  # it neither compiles anew, nor has the plan taught it that sizes change
    assert len(fastdl.report(user).compiled.graphs) == graphs


def test_plan_teaches_dynamo_nothing():
    """A size that the plan has seen does not make the user's first graph a dynamic one."""
    model, sizes = Block(), []

    def look(gm, inputs):
        sizes.extend(x for x in inputs if isinstance(x, torch.SymInt))
        return gm.forward

    fastdl.plan(model, torch.randn(5, 8), engine="graph")
    torch.compile(model, backend=look)(torch.randn(3, 8))
    assert not sizes


def test_plan_says_what_it_needs():
    with pytest.raises(ValueError, match="engine='graph' needs example_inputs"):
        fastdl.plan(Block(), engine="graph")
    with pytest.raises(ValueError, match="engine is 'graphs', allowed are modules and graph"):
        fastdl.plan(Block(), engine="graphs")


def plant(monkeypatch):
    """A norm with another eps."""
    right = Match.call

    def call(self):
        fused = right(self)
        if fused.func.__name__ != "layer_norm":
            return fused
        return functools.partial(fused.func, *fused.args[:4], 1e-2)

    monkeypatch.setattr(Match, "call", call)


def test_a_planted_fault_is_in_the_plan(monkeypatch):
    plant(monkeypatch)
    with fastdl.policy("definition"):
        plan = fastdl.plan(Block(), torch.randn(5, 8), engine="graph")
    norm, linear = plan
    assert "the error is too large" in norm.reason
    assert norm.after > norm.allowed > norm.before
    assert linear.reason is None
    assert linear.route == "torch: the policy asks for the definition"
    assert [site.op for site in plan.groups["left alone"]] == ["layer_norm"]


def test_the_page_and_the_tree():
    with fastdl.policy("definition"):
        plan = fastdl.plan(Broken(), torch.randn(5, 8), engine="graph")
    page = plan.to_html()
    assert "test_graph_plan.py:" in page
    line = next(part for part in page.split("<details") if 'data-path="blocks.' in part)
    assert "to replace</span>" in line


# The report of a compiled model.


@pytest.mark.parametrize("in_place", [False, True])
def test_report_of_a_compiled_model(in_place, monkeypatch):
    plant(monkeypatch)
    model = Broken()
    if in_place:
        model.compile(backend=fastdl.backend, options={"verify": True})
        user = model
    else:
        user = compiled(model, verify=True)
    with fastdl.policy("definition"):
        user(torch.randn(5, 8))
    report = fastdl.report(user)
    assert sorted(site.op for site in report.replaced) == ["batch_norm", "linear", "linear"]
    assert [site.op for site in report.rolled_back] == ["layer_norm"] * 2
    assert report.rolled_back[0].name.startswith("blocks.0.norm")
    found = report.compiled
    assert len(found.graphs) == 2
    (stop,) = found.breaks
    assert "torch._dynamo.graph_break()" in stop.place
    assert stop.place.startswith("tests/test_graph_plan.py:")
    assert "graph_break" in stop.reason
    for g in found.graphs:
        assert 0 < g.engine_s < g.whole_s
        assert 0 < g.proof_s < g.whole_s
    assert 0 < found.share < 1
    text = str(report)
    assert "graphs: 2" in text
    assert f"graph break at {stop.place}" in text
    assert f"{found.share:.1%}" in text
    assert json.loads(report.to_json())["compiled"]["graphs"][1]["proof"]["ok"]
    assert "The graphs" in report.to_html()


def test_graphs_of_functions_below_a_break_are_the_models():
    def below(x):
        torch._dynamo.graph_break()
        return F.layer_norm(x, (8,))

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block()

        def forward(self, x):
            return self.inner(below(F.relu(x)))

    user = compiled(Calls())
    user(torch.randn(5, 8))
    names = [site.name for site in fastdl.report(user).replaced]
    assert any(name.startswith("inner.norm ") for name in names)
    assert len(names) == 4


def test_a_reset_of_dynamo_begins_a_new_report():
    user = compiled(Block())
    for rows in (3, 3):
        torch._dynamo.reset()
        user(torch.randn(rows, 8))
    assert len(fastdl.report(user).compiled.graphs) == 1


def test_reports_of_others_are_as_before():
    user = torch.compile(Block(), backend="eager")
    user(torch.randn(5, 8))
    assert fastdl.report(user).compiled is None
    assert fastdl.report(Block()).compiled is None


def test_what_is_recorded_keeps_no_model_alive():
    user = compiled(Block(), verify=True)
    user(torch.randn(5, 8))
    gone = weakref.ref(user._orig_mod)
    torch._dynamo.reset()
    del user
    gc.collect()
    assert gone() is None


# The dump.


def test_dump():
    with fastdl.policy("definition"):
        text = fastdl.plan(Broken(), torch.randn(5, 8), engine="graph").dump
    lines = [line.strip() for line in text.splitlines()]
    assert any(line.startswith("given blocks.0.fc.weight") for line in lines)
    call, _, kind = next(line for line in lines if line.startswith("* ")).partition("  # ")
    assert call.startswith("* batch_norm = batch_norm(l_x_, bn.running_mean, ")
    assert kind.startswith("float32 [5, 8]   tests/test_graph_plan.py:")
    index = next(i for i, line in enumerate(lines) if line.startswith("* ") and "residual=" in line)
    was = [line.partition(" = ") for line in lines[index + 1 : index + 4]]
    assert all(name.startswith("was ") for name, _, _ in was)
    assert [call.partition("(")[0] for _, _, call in was[:2]] == ["linear", "dropout"]
    assert was[2][2] == "batch_norm + dropout"
    assert "before, wrap_body_0: 4 calls" in lines
    assert "after, wrap_body_0: 2 calls" in lines
    assert "L_self" not in text
    assert "l_self" not in text


def test_dump_of_what_python_writes():
    texts = []

    def look(gm, inputs):
        texts.append(show(gm, gm))
        return gm.forward

    def f(x, y):
        a = x[:, 1:3, ..., None]
        b = torch.cat([x, y], dim=-1).view(-1, *x.shape[1:])
        return -a, x @ y.transpose(0, 1) ** 2, b.to(torch.bfloat16)

    torch.compile(f, backend=look)(torch.randn(3, 3), torch.randn(3, 3))
    (text,) = texts
    for part in (
        "x[:, 1:3, ..., None]", "cat([x, y], dim=-1)", ".view(-1, 3)", "x @ ", " ** 2",
        "y.transpose(0, 1)", "to(torch.bfloat16)  ", "# bfloat16 [6, 3]", "return (",
    ):  # fmt: skip
        assert part in text, (part, text)


# The command line.

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.fc(x))

def with_inputs():
    return Net(), torch.ones(4, 8)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "of_graphs.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "of_graphs:with_inputs"
    sys.modules.pop("of_graphs", None)


def test_command_line(factory, capsys):
    assert main(["plan", factory, "--engine", "graph", "--dump", "--html", "page.html"]) == 0
    said = capsys.readouterr().out
    assert "of_graphs.py:11  return self.norm(self.fc(x))" in said
    assert "2 to replace, 0 left alone" in said
    assert "after: 2 calls" in said
    with open("page.html", encoding="utf-8") as page:
        assert "of_graphs.py:11" in page.read()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dump"], "Type: fastdl plan ... --engine graph --dump"),
        (["--engine", "graph", "--optimize"], "leave out --optimize"),
        (["--engine", "graph", "--meta"], "leave out --meta"),
        (["--engine", "graph", "--dump", "--json"], "leave out --json"),
        (["--engine", "graphs"], "invalid choice: 'graphs'"),
    ],
)
def test_command_line_refuses(arguments, said, factory, capsys):
    assert main(["plan", factory, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_command_line_needs_inputs(factory, capsys):
    assert main(["plan", "of_graphs:Net", "--engine", "graph"]) == 2
    assert "return the model and its example inputs" in capsys.readouterr().err


# Models that nobody here wrote.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_models(name):
    make, inputs, _ = MODELS[name]
    model = make()
    given = inputs()
    plan = fastdl.plan(model, given, engine="graph")
    ops = {site.op for site in plan if site.reason is None}
    wanted = {"llama": {"rms_norm", "gated_mlp", "linear"}, "resnet": {"batch_norm", "conv2d"}}
    assert wanted[name] <= ops
    assert all(site.source for site in plan) or name == "resnet"  # Sequential is torch's code
    user = compiled(model, verify=True)
    args, kwargs = ((), given) if isinstance(given, dict) else ((given,), {})
    user(*args, **kwargs)
    report = fastdl.report(user)
    assert all(g.proof.ok for g in report.compiled.graphs)
    assert not report.rolled_back
    assert wanted[name] <= {site.op for site in report.replaced}
