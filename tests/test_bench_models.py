"""Rows of whole models in the benchmark, without a GPU: who is timed, who is refused, the marks."""

import json
import sys
import types

import pytest
import torch
from bench import gpu, model_lines, models
from bench.families import Family, MissingLibrary, Size, images, mlp
from bench.machine import Host
from bench.store import Store
from bench.zoo import DECODE, FAMILIES
from torch import nn

import fastdl
from test_bench_gpu import context, of
from test_bench_marks import made_up

CASES = {case.name: case for case in models.cases()}
PLAIN = {"eager", "modules", "graph"}


def measured(case, **options):
    given = {"size": case.family.small, "dtype": torch.float32, "rounds": 3, "warm_s": 0}
    return models.measure(case, Host(), **{"compiled": False, **given, **options})


def flat(name="mlp", training=True, make=mlp):
    family = Family(Size(make, images(6, 32)))
    return models.Case(name, family, training)


def test_what_matters_most_is_planned_first():
    names = list(CASES)
    assert names[:3] == ["llama, training", "llama, inference", "llama, decode"]
    timed = {name for name, family in FAMILIES.items() if family.large}
    both = {f"{name}, {pass_}" for name in timed for pass_ in ("training", "inference")}
    assert set(names) == {*both, "llama, decode"}
    assert len(names) == len(set(names)) and len(timed) == 15


@pytest.fixture
def light(monkeypatch):
    """Contenders that are the model itself, where it does not matter who they are."""
    monkeypatch.setattr(models, "CONTENDERS", dict.fromkeys(models.CONTENDERS, same))
    monkeypatch.setattr(models, "INDUCTOR", ("then compile",))


def same(model, sites):
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_row(training):
    row = measured(flat(training=training))
    json.dumps(row)
    assert row["ok"] and not row["refused"] and not row["recompiled"]
    assert row["proof"] == models.HERE
    assert row["shapes"] == ["float32[6, 32]"] and row["seeds"] == [0] and row["parameters"] > 0
    for way in ("python", "graph"):
        assert row[way]["eager"].keys() == PLAIN
    facts = row["contenders"]
    assert [facts[name]["sites"] for name in ("eager", "modules", "graph")] == [0, 3, 3]
    assert [facts[name]["graphs"] for name in ("eager", "modules", "graph")] == [0, 0, 1]
    assert all(one["breaks"] == 0 and one["judge_is_fp64"] for one in facts.values())
    assert "modules" in row["says"] and "WRONG" not in row["says"]


def test_contenders_are_equal_copies_and_the_first_one_is_untouched():
    case = flat()
    step = case.step(case.family.small, "cpu", torch.float32)
    kept = {name: p.detach().clone() for name, p in step.named_parameters()}
    with models.alone(Host()):
        ready, refused, _ = models.contenders(case, step, ["eager", "modules"], Host())
        assert not refused
        models_ = [ready[name].step.model for name in ready]
        assert [type(m[0]) is nn.Linear for m in models_] == [True, False]
        owned = [{p.data_ptr() for p in m.parameters()} for m in (step, *models_)]
        assert not owned[0] & owned[1] and not owned[1] & owned[2]
        for one in ready.values():
            one.step.both()
            for name, p in one.step.named_parameters():
                assert p.grad is None and torch.equal(p, kept[name])


class Broken(nn.Module):
    """A graph break between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.last(y)


def test_graphs_and_breaks_are_counted():
    facts = measured(flat("broken", make=Broken))["contenders"]["graph"]
    assert (facts["graphs"], facts["breaks"], facts["sites"]) == (2, 1, 2)


@pytest.mark.parametrize("limit", [2, pytest.param(64, marks=pytest.mark.slow)])
def test_layers_that_share_code_are_all_compiled_or_that_is_said(limit, monkeypatch):
    class Between(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(width, width + 1)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.layer(x).tanh()

    def deep():
        return nn.Sequential(*(Between(width) for width in range(32, 35 if limit == 2 else 42)))

    forms = {name: models.CONTENDERS[name] for name in ("eager", "graph")}
    monkeypatch.setattr(models, "CONTENDERS", forms)
    monkeypatch.setitem(models.LIMITS, "recompile_limit", limit)
    row = measured(flat("deep", make=deep))
    if limit == 2:
        assert not row["ok"] and "RecompileLimit" in row["refused"]["graph"]
    else:
        assert limit == 64 and row["ok"] and not row["refused"], row["says"]
        assert row["contenders"]["graph"]["graphs"] == 10


def wrong(model, sites, gradient=False):
    """Off in an output, or in one gradient only."""

    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            y = self._orig_mod(x)
            if not gradient:
                return y + 0.01
            return y + 0.01 * (y - y.detach())

    return Off()


@pytest.mark.parametrize("gradient", [False, True], ids=["output", "gradient"])
def test_a_wrong_contender_is_refused_and_not_timed(gradient, light, monkeypatch):
    monkeypatch.setitem(
        models.CONTENDERS, "modules", lambda model, sites: wrong(model, sites, gradient)
    )
    row = measured(flat())
    assert not row["ok"]
    assert (
        row["python"]["eager"].keys() == row["contenders"].keys() == {"eager", "graph", "compile"}
    )
    assert row["refused"]["modules"].startswith("WRONG: ")
    assert ("gradient" in row["refused"]["modules"]) == gradient
    assert "no modules: WRONG" in row["says"]


@pytest.mark.parametrize("name", ["graph", "compile"])
def test_a_contender_that_raises_is_named(name, light, monkeypatch):
    def raises(model, sites):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setitem(models.CONTENDERS, name, raises)
    row = measured(flat())
    assert row["refused"] == {name: "OutOfMemoryError: no room"}
    assert row["ok"] == (name == "compile")  # torch's own is not ours to mend
    assert name not in row["python"]["eager"]
    assert f"no {name}: OutOfMemoryError: no room" in row["says"]


def test_a_lost_device_or_a_model_that_does_not_run_is_no_row(light, monkeypatch):
    def lost(model, sites):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(models.CONTENDERS, "modules", lost)
    with pytest.raises(RuntimeError, match="illegal"):
        measured(flat())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measured(flat(make=lambda: nn.Linear(7, 7)))


def test_no_room_for_a_float64_copy_is_proved_small(light, monkeypatch):
    class Crowded(models.Reference):
        def __init__(self, step, *rest):
            if next(step.parameters()).shape[1] > 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(step, *rest)

    monkeypatch.setattr(models, "Reference", Crowded)
    family = Family(Size(mlp, images(6, 32)), Size(lambda: mlp(40), images(6, 40)))
    row = measured(models.Case("mlp", family, True), size=family.large)
    assert row["ok"] and row["proof"] == models.SMALL and models.SMALL in row["says"]
    monkeypatch.setitem(models.CONTENDERS, "graph", wrong)
    row = measured(models.Case("mlp", family, True), size=family.large)
    assert row["refused"]["graph"].startswith("WRONG")


def test_a_step_that_cannot_be_captured_says_so(light):
    class NoGraphs(Host):
        def captured(self, *args):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    row = models.measure(
        flat(), NoGraphs(), compiled=False, size=flat().family.small, rounds=2, warm_s=0
    )
    assert row["ok"] and row["spent"] and "graph" not in row
    assert row["no_graph"] == {"eager": "operation not permitted"}
    assert "NO GRAPH of eager: operation not permitted" in row["says"]


def test_memory_is_given_back_and_peaks_are_told(light):
    class Counting(Host):
        released, peaks = 0, iter((400, 100, 200, 300))

        def release(self):
            self.released += 1

        def peak_bytes(self, call):
            call()
            return next(self.peaks)

    host = Counting()
    row = models.measure(flat(), host, compiled=False, size=flat().family.small, rounds=2, warm_s=0)
    assert host.released == 2  # before and after
    assert row["peak_bytes"] == {
        "eager": 400, "modules": 100, "graph": 200, "compile": 300
    }  # fmt: skip
    assert "memory 0.25x" in row["says"] and "memory 0.50x" in row["says"]
    assert model_lines.memory(row, "modules", "eager") == 4


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingLibrary, match="diffusers is not installed"):
        FAMILIES["unet"].small.make()
    row = measured(CASES["unet, training"])
    assert row == {
        "ok": False, "missing": "diffusers", "says": "not measured: diffusers is not installed"
    }  # fmt: skip
    monkeypatch.setitem(gpu.STAGES, "models", of([("unet", lambda: row)]))
    store = Store(tmp_path, "models", {})
    assert gpu.run_stage("models", context(), store) == 0
    assert not store.done("unet") and "diffusers is not installed" in capsys.readouterr().out


@pytest.fixture
def stage(monkeypatch):
    """The stage with rows that keep count: the first fails, the second spoils its process."""
    ran = []

    def work(name):
        ran.append(name)
        if name == "fails" and ran.count(name) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ok": True, "says": "", "spent": name == "spoils"}

    names = ("fails", "spoils", "last")
    monkeypatch.setitem(gpu.STAGES, "models", of([(n, lambda n=n: work(n)) for n in names]))
    return ran


def test_rows_go_on_in_another_process_after_one_that_spoiled_it(stage, tmp_path):
    def store():
        return Store(tmp_path, "models", {"code": "a"})

    assert gpu.run_stage("models", context(), store()) == gpu.SPENT
    assert stage == ["fails", "spoils"]
    assert gpu.run_stage("models", context(), store()) == 0
    assert stage[2:] == ["last", "fails"]  # what failed comes last
    assert gpu.run_stage("models", context(), store()) == 0
    assert len(stage) == 4
    # nothing new is left to be harmed
    assert gpu.run_stage("models", context(again=True), store()) == 0
    assert stage[4:] == ["fails", "spoils", "last"]


def test_a_row_that_was_begun_and_killed_comes_last(stage, tmp_path, monkeypatch):
    store = Store(tmp_path, "models", {})
    monkeypatch.setattr(gpu, "guarded", lambda work, machine: sys.exit("killed"))
    with pytest.raises(SystemExit):
        gpu.run_stage("models", context(), store)
    assert "not finished" in store.table["rows"]["fails"]["says"]
    monkeypatch.undo()
    monkeypatch.setitem(gpu.STAGES, "models", of([(n, dict) for n in ("fails", "last")]))
    seen = []
    done = {"ok": True, "says": ""}
    monkeypatch.setattr(gpu, "guarded", lambda work, machine: seen.append(work) or done)
    order = []
    put = store.put
    store.put = lambda name, row: order.append(name) or put(name, row)
    assert gpu.run_stage("models", context(), store) == 0
    assert list(dict.fromkeys(order)) == ["last", "fails"] and len(seen) == 2


def test_children_are_started_until_one_is_not_spent(monkeypatch, tmp_path):
    codes, seen = [gpu.SPENT, gpu.SPENT, 0], []

    def child(command, env, timeout):
        seen.append("--again" in command)
        return types.SimpleNamespace(returncode=codes.pop(0))

    monkeypatch.setattr(gpu, "better_ptxas", dict)
    monkeypatch.setattr(gpu.subprocess, "run", child)
    options = gpu.parse(["--stage=models", "--again", f"--out={tmp_path}"])
    assert gpu.run_all(options, tmp_path) == 0
    assert seen == [True, False, False]  # the others go on where it stopped


def test_the_summary_shows_the_marks(tmp_path):
    store = Store(tmp_path, "models", {})
    store.put("llama, training", {**made_up(2.0, 3.0, 2.4), "says": "fast"})
    text = gpu.summary(tmp_path, {"models": 0})
    assert "llama, training" in text and "3.00" in text
    assert f"over 1 of {len(CASES)} rows" in text and ": open" in text


def test_sizes_are_listed_without_making_any(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    names = [name for name, _ in gpu.STAGES["models"].rows(context())]
    assert names == list(CASES)


@pytest.mark.parametrize("name", [n for n, f in {**FAMILIES, "decode": DECODE}.items() if f.large])
@pytest.mark.slow
def test_large_models_fit_their_inputs(name):
    family = {**FAMILIES, "decode": DECODE}[name]
    with torch.device("meta"), torch.no_grad():
        model, x = family.large.make(), family.large.inputs()
        output = model(**x) if isinstance(x, dict) else model(x)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert output is not None and sum(p.numel() for p in model.parameters()) < 2e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama, decode", "t5, inference", "clip, training"])
def test_rows_of_real_models(name):
    """With plain torch in the ops: the kernels are not what is tested here."""
    with fastdl.policy("definition"):
        row = measured(CASES[name])
    assert row["ok"] and row["python"]["eager"].keys() == PLAIN, row["says"]
    assert row["contenders"]["graph"]["graphs"] >= 1 and not row["recompiled"]
    assert row["contenders"]["modules"]["sites"] > 2


@pytest.mark.slow
def test_a_row_with_inductor():
    row = measured(flat(), compiled=True)
    assert row["ok"] and not row["refused"] and not row["recompiled"], row["says"]
    assert row["python"]["compile"].keys() == models.CONTENDERS.keys()
    assert row["contenders"]["then compile"]["sites"] == 3
    assert "then compile over compile" in row["says"]
