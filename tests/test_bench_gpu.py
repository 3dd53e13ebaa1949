"""`make gpu` without a GPU: its stages, how they resume, and all of it on a machine of straw."""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import shutil
import subprocess
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench import far, gpu, models, rows, sanitize, stages, streams
from bench.families import Family, Size, images, mlp
from bench.machine import Host, better_ptxas
from bench.store import Store, code_digest, provenance

import fastdl
import fastdl.functional as FF
from fastdl.contract import SPECS, BenchCase, Case
from fastdl.tuned import device_of
from test_bench import Clock

ROOT = Path(__file__).resolve().parents[1]


class Straw(Host):
    """A GPU that is not one."""

    name, is_gpu = "Straw 1", True


def context(**options):
    given = {"minutes": 1, "again": False, "no_compile": True, "stage": None, "part": (0, 1)}
    return stages.Context(Host(), argparse.Namespace(**{**given, **options}))


def of(rows):
    """A stage with these rows."""
    return stages.Stage(lambda context: iter(rows), "for a test")


@pytest.fixture
def stage(monkeypatch):
    """A stage of two rows that counts its calls, the second of which fails the first time."""
    ran = []

    def second():
        ran.append("second")
        if ran.count("second") == 1:
            raise ValueError("not today")
        return {"ok": True, "says": "right"}

    first = ("first", lambda: ran.append("first") or {"ok": True, "says": "right"})
    monkeypatch.setitem(gpu.STAGES, "two", of([first, ("second", second)]))
    return ran


def test_stages_resume(stage, tmp_path):
    def store(run="a"):
        return Store(tmp_path, "two", {"code": run})

    assert gpu.run_stage("two", context(), store()) == gpu.FAILED
    assert "not today" in gpu.summary(tmp_path, {"two": gpu.FAILED})
    assert gpu.run_stage("two", context(), store()) == 0
    assert stage == ["first", "second", "second"]
    assert gpu.run_stage("two", context(again=True), store()) == 0
    assert gpu.run_stage("two", context(), store("other code")) == 0
    assert stage[3:] == ["first", "second"] * 2
    table = json.loads((tmp_path / "two.json").read_text())
    assert list(table["runs"].values()) == [{"code": "other code"}]


def test_stages_stop_in_time(stage, tmp_path, capsys):
    clock = Clock()
    store = Store(tmp_path, "two", {})
    put = store.put

    def slow(*row):
        put(*row)
        clock.now += 61

    store.put = slow
    assert gpu.run_stage("two", context(), store, clock) == gpu.UNFINISHED
    assert stage == ["first"]
    assert "no time for 1 more" in capsys.readouterr().out


def test_damaged_results_are_measured_again(tmp_path):
    (tmp_path / "two.json").write_text("{")
    assert not Store(tmp_path, "two", {}).done("first")


def test_a_stage_is_shared_among_processes(stage, tmp_path):
    other = Store(tmp_path, "two", {})  # opened before the first one writes
    assert gpu.run_stage("two", context(part=(0, 2)), Store(tmp_path, "two", {})) == 0
    assert gpu.run_stage("two", context(part=(1, 2)), other) == gpu.FAILED
    assert stage == ["first", "second"]
    assert other.done("first") and other.tried("second") and not other.done("second")


def put_many(folder, name):
    store = Store(folder, "two", {})
    for i in range(20):
        store.put(f"{name} {i}", {"ok": True, "says": ""})


def test_processes_do_not_lose_each_others_rows(tmp_path):
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=put_many, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Store(tmp_path, "two", {}).table["rows"]) == 60


def test_provenance():
    found = provenance(json.loads(fastdl.env().to_json()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["code"] == code_digest()
    json.dumps(found)


def better_by(monkeypatch, path, returncode):
    """What is set where the ptxas in use is bad, another is installed, and the probe ends so."""
    problem = "ptxas 12.8.93 can miscompile products"
    found = types.SimpleNamespace(problems=[problem], ptxas="12.8.93", better_ptxas=path)
    done = types.SimpleNamespace(returncode=returncode)
    monkeypatch.setattr(fastdl, "env", lambda: found)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    return better_ptxas()


def test_a_better_ptxas_is_used_where_it_works(monkeypatch, capsys):
    assert better_by(monkeypatch, "/bin/ptxas", 0) == {"TRITON_PTXAS_PATH": "/bin/ptxas"}
    assert better_by(monkeypatch, "/bin/ptxas", 1) == {}
    assert better_by(monkeypatch, None, 0) == {}
    assert "fastdl-kernels[hopper]" in capsys.readouterr().out
    monkeypatch.setattr(fastdl, "env", lambda: types.SimpleNamespace(problems=[]))
    assert better_ptxas() == {}


def test_every_stage_has_the_better_ptxas(monkeypatch, tmp_path, capsys):
    seen = []

    def child(command, env, timeout):
        seen.append((command[command.index("--child") + 1], env["TRITON_PTXAS_PATH"]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu, "better_ptxas", lambda: {"TRITON_PTXAS_PATH": "/bin/ptxas"})
    monkeypatch.setattr(subprocess, "run", child)
    assert gpu.run_all(gpu.parse([f"--out={tmp_path}"]), tmp_path) == 0
    assert seen == [(stage, "/bin/ptxas") for stage in gpu.STAGES]
    assert {"exact", "attention", "tune"} <= gpu.STAGES.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs everything on a GPU")
def test_gpu_lists_and_refuses(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} (" in f"\n{listed}" for name in gpu.STAGES)
    assert "persistent" in listed and "8192x8192x8192" in listed
    assert gpu.main([]) == gpu.USAGE
    assert "sees no GPU" in capsys.readouterr().err


def seen_by_children(monkeypatch, tmp_path, *options, codes=0):
    """The commands that children are started with."""
    seen = []

    def child(command, env, timeout):
        seen.append(command)
        return types.SimpleNamespace(returncode=codes)

    monkeypatch.setattr(gpu, "better_ptxas", dict)
    monkeypatch.setattr(gpu.subprocess, "run", child)
    code = gpu.run_all(gpu.parse([*options, f"--out={tmp_path}"]), tmp_path)
    return code, seen


def test_what_is_not_timed_runs_in_several_processes(monkeypatch, tmp_path):
    both = ("--stage=check", "--stage=layer_norm", "--jobs=3")
    code, seen = seen_by_children(monkeypatch, tmp_path, *both)
    parts = [command[command.index("--part") + 1] for command in seen]
    assert sorted(parts[:3]) == ["0/3", "1/3", "2/3"] and parts[3:] == ["0/1"] and code == 0
    assert not any(stages.STAGES[name].together for name in (*stages.TIMED, "ceilings", "tune"))


def test_one_failed_part_fails_the_stage(monkeypatch, tmp_path):
    codes = iter([0, gpu.FAILED, gpu.UNFINISHED])
    monkeypatch.setattr(gpu, "run_child", lambda *args, **options: next(codes))
    options = gpu.parse(["--jobs=3"])
    assert gpu.run_parts("check", options, {}, 60) == gpu.FAILED
    codes = iter([0, gpu.UNFINISHED, 0])
    assert gpu.run_parts("check", options, {}, 60) == gpu.UNFINISHED


def test_an_end_for_all_stages(monkeypatch, tmp_path):
    code, seen = seen_by_children(monkeypatch, tmp_path, "--within=0", "--stage=check")
    assert code == gpu.UNFINISHED and not seen


def test_correctness_comes_before_timings():
    order = list(stages.STAGES)
    first = ["check", "exact", "far", "graphs", "streams", "inductor", "sanitizer"]
    assert order[:9] == [*first, "ceilings", "tune"] and order[-1] == "models"
    assert {*SPECS, "adamw", "sgd"} == {*order[9:-1]}


FAR = ("layer_norm", "linear, large output", "cross_entropy", "embedding", "rotary")


@pytest.mark.parametrize(
    "name", [n if n in FAR else pytest.param(n, marks=pytest.mark.slow) for n in far.CASES]
)
def test_far_rows(name, monkeypatch):
    case = far.CASES[name]
    found = far.check(case, Host(), elements=5 * case.size)
    assert found["ok"] and found["rows"] == 5, found["says"]

    def last_is_wrong(*args):
        y = case.call(*args)
        return y + torch.cat([torch.zeros_like(y[:-1]), torch.ones_like(y[-1:])])

    # the definition runs on few rows
    broken = case._replace(call=lambda *a: (last_is_wrong if len(a[0]) == 5 else case.call)(*a))
    monkeypatch.setattr(far, "_defined", partial(defined_by, case))
    found = far.check(broken, Host(), elements=5 * case.size)
    assert not found["ok"] and "output off by" in found["says"]


def defined_by(case, _, *args):
    return far_defined(case, *args)


far_defined = far._defined


def the_core(op):
    return SPECS[op].core[0]


class Stale(Host):
    """Its graphs keep what they were captured on."""

    def captured(self, call, sets, times):
        call(0)
        return lambda: None


def test_graphs_see_other_inputs():
    assert streams.check_graph(the_core("linear"), Host())["ok"]
    found = streams.check_graph(the_core("linear"), Stale())
    assert not found["ok"] and "replayed on other inputs" in found["says"]


def test_graphs_draw_anew():
    dropout = Case("dropout", "", lambda t: partial(FF.dropout, t(64), p=0.5))
    assert streams.check_graph(dropout, Host())["ok"]
    assert not streams.check_graph(dropout, Stale())["ok"]


def test_streams_do_not_mix(monkeypatch):
    monkeypatch.setattr(streams, "ROUNDS", 2)
    assert streams.check_streams(the_core("linear"), Host())["ok"]
    calls = []
    plain = streams.Pass.__call__

    def spoiled(self):
        calls.append(1)
        return [y + (len(calls) > 7) for y in plain(self)]

    monkeypatch.setattr(streams.Pass, "__call__", spoiled)
    found = streams.check_streams(the_core("linear"), Host())
    assert not found["ok"] and "tensor 0" in found["says"]


def test_the_sanitizers_word():
    assert sanitize.judged(0, "========= ERROR SUMMARY: 0 errors")["ok"]
    bad = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    found = sanitize.judged(sanitize.FOUND, bad)
    assert not found["ok"] and "Invalid __global__ read" in found["says"] and "missing" not in found
    found = sanitize.judged(255, "========= Error: Device not supported. Please refer to\n")
    assert found["missing"] and "Device not supported" in found["says"]
    found = sanitize.judged(1, "Traceback\nValueError: no such op")
    assert not found["ok"] and "no such op" in found["says"] and "missing" not in found


@pytest.mark.slow
def test_what_runs_under_the_sanitizer(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nwhile [ "$1" != "3" ]; do shift; done; shift; exec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    assert sanitize.check("layer_norm") == {"ok": True, "says": "no bad access"}
    assert "KeyError" in sanitize.check("no_op")["says"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize.check("layer_norm")["says"] == "not run: it is not installed"


NORM = BenchCase("6x24", lambda t: partial(FF.layer_norm, t(6, 24), (24,), t(24)), 600, 600)
BOTH = replace(NORM, name="6x24 backward", backward=True)
DRIVEN = ("check", "exact", "far", "graphs", "streams", "sanitizer", "ceilings", "tune",
          "layer_norm", "models")  # fmt: skip


def tuning_on_straw(monkeypatch, folder):
    """Tuning of one op, whose candidates the interpreter runs, each faster than torch."""
    tune, search = (importlib.import_module(f"fastdl.tuned.{name}") for name in ("tune", "search"))
    choose = importlib.import_module("fastdl.tuned.choose")
    here = device_of(torch.empty(0))

    def timer(calls, rounds):
        for call in calls.values():
            call()
        return {name: [30.0 if name == "torch" else 10.0] * rounds for name in calls}

    def offer(asked):
        return search.Offer(choose.shortlist(*asked, here)[:2])

    for module in (tune, stages):
        monkeypatch.setattr(module, "DEFAULTS", {"layer_norm": [(24,)]})
    monkeypatch.setattr(stages, "PASSES", {})
    monkeypatch.setattr(tune, "this_gpu", lambda: here)
    monkeypatch.setattr(tune, "offers_for", lambda *given: contextlib.nullcontext(offer))
    monkeypatch.setattr(tune, "events", timer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(search, "DEVICE", "cpu")
    monkeypatch.setattr(stages, "packaged_file", lambda name: folder / "table.json")


@pytest.fixture
def straw(monkeypatch, tmp_path):
    """Few and small rows of every kind, children in this process, and the folder of results."""

    def child(command, env, timeout):
        return types.SimpleNamespace(returncode=gpu.main(command[2:]))

    cases = [Case("6x24", "", NORM.make, core=True, exact=False)]
    spec = replace(SPECS["layer_norm"], cases=cases, one_pass=(), bench=(NORM, BOTH))
    few = types.SimpleNamespace(name="mlp, training")
    small = Size(mlp, images(6, 32))
    few = models.Case("mlp, training", Family(small, small), True)
    exact = list(stages.exact_cases(stages.Context(Host(), None).facts, ((64, 48, 32),)))[:2]
    for name, value in (
        ("SPECS", {"layer_norm": spec}), ("exact_cases", lambda facts: exact),
        ("check_exact", partial(stages.check_exact, repeats=3)),
        ("conv_cases", lambda facts: []), ("attention_cases", lambda facts: []),
    ):  # fmt: skip
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setitem(SPECS, "layer_norm", spec)
    monkeypatch.setattr(far, "CASES", {"layer_norm": far.CASES["layer_norm"]})
    monkeypatch.setattr(far, "ELEMENTS", 5 * 4096)
    monkeypatch.setattr(streams, "ROUNDS", 2)
    monkeypatch.setattr(models, "cases", lambda: iter([few]))
    measure = models.measure
    quick = {"rounds": 2, "warm_s": 0}
    monkeypatch.setattr(models, "measure", partial(measure, dtype=torch.float32, **quick))
    monkeypatch.setattr(rows, "measure", partial(rows.measure, **quick))
    monkeypatch.setattr(rows, "ceilings", partial(rows.ceilings, size=64, copy_bytes=1 << 16))
    tuning_on_straw(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu, "machine", Straw)
    monkeypatch.setattr(gpu, "better_ptxas", dict)
    children = types.SimpleNamespace(run=child, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", children)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return tmp_path / "straw-1"


def drive(folder, *options, names=DRIVEN):
    chosen = [f"--stage={name}" for name in names]
    return gpu.main([*chosen, "--no-compile", "--jobs=1", f"--out={folder.parent}", *options])


def test_all_of_it_on_a_machine_of_straw(straw, capsys):
    # the sanitizer is not installed, which is no fault of the ops
    assert drive(straw) == 0
    said = capsys.readouterr().out
    tables = {path.stem: json.loads(path.read_text()) for path in straw.glob("*.json")}
    assert tables.keys() == set(DRIVEN)
    for name, table in tables.items():
        (run,) = table["runs"].values()
        assert {"versions", "devices", "commit", "code"} <= run.keys()
        good = [row["ok"] for row in table["rows"].values()]
        assert good and all(good) == (name != "sanitizer"), table["rows"]
    assert tables["layer_norm"]["rows"].keys() == {"6x24", "6x24 backward"}
    assert [*tables["layer_norm"]["rows"]["6x24 backward"]["passes"]] == ["both", "backward"]
    checked = tables["check"]["rows"]
    assert [*checked] == [f"layer_norm {dtype}" for dtype in ("float32", "float16", "bfloat16")]
    assert all(len(row["report"]["rows"]) == 1 for row in checked.values())
    entries = tables["tune"]["rows"]["layer_norm"]["table"]["entries"]
    assert entries["layer_norm/bfloat16/32"]["margin"]["ratio"] == 3
    (run,) = tables["layer_norm"]["runs"].values()
    assert run["tuned"]  # the table that was there when it was timed
    assert "of the roof" in said and "not run: it is not installed" in said
    # a second time there is nothing to do, but to try the sanitizer
    assert drive(straw) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if " s left)" in line] == [
        line for line in again.splitlines() if line.startswith("sanitizer  layer_norm: not run")
    ]


def test_a_ratio_that_got_worse_fails(straw, tmp_path, monkeypatch, capsys):
    one = partial(drive, straw, names=["layer_norm"])
    assert one() == 0
    old = shutil.copytree(straw, tmp_path / "old" / straw.name)
    assert one(f"--compare={old}") == 0
    measure = rows.measure

    def slower(*args, **options):
        row = measure(*args, **options)
        for found in row["passes"].values():
            for way in ("graph", "python"):
                for stats in (found[way]["contenders"]["fused"], *found[way]["over"].values()):
                    stats |= {key: stats[key] / 1000 for key in ("ratio", "low", "high")}
        return row

    monkeypatch.setattr(rows, "measure", slower)
    assert one(f"--compare={old}", "--again") == gpu.FAILED
    assert "6x24 backward" in capsys.readouterr().out
