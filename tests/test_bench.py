"""The benchmark, without a GPU: its statistics, its rows, its stages and its suite."""

import argparse
import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from bench import gpu, rows
from bench.exact import Exact, check_exact, exact_cases, integers
from bench.interleave import Timer, host_timer, interleave, summarize
from bench.machine import Gpu, Host
from bench.store import Store, code_digest, provenance

import fastdl
import fastdl.functional as FF
from fastdl.contract import SPECS, BenchCase
from fastdl.tuned import Device
from fastdl.tuned.tune import configs

ROOT = Path(__file__).resolve().parents[1]
H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
CEILINGS = rows.Ceilings(4e12, {"bfloat16": 8e14, "float16": 8e14, "float32": 5e13})


class Clock:
    """Time passes only when a call says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *seconds):
        """A call that takes these times in turn, then the last of them for ever."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_interleave_goes_round_and_round():
    order, clock = [], Clock()
    calls = {name: lambda name=name: order.append(name) or clock.taking(1)() for name in "ab"}
    times = interleave(calls, host_timer(clock), rounds=3, warm_s=3, clock=clock)
    assert order == list("ab") * 5  # two rounds until 3 s are over, three that count
    assert times == {"a": [1e6] * 3, "b": [1e6] * 3}


def test_ratios_by_round_do_not_see_a_drift():
    slower = [1.0 + 0.1 * i for i in range(21)]
    times = {"torch": [20 * s for s in slower], "fused": [10 * s for s in slower]}
    stats = summarize(times, "torch")
    assert stats["fused"].ratio == stats["fused"].low == stats["fused"].high == pytest.approx(2)
    assert stats["fused"].us == pytest.approx(20)
    assert stats["fused"].drift == pytest.approx(2.7 / 1.3)
    assert stats["torch"].ratio == 1


def test_one_slow_round_is_no_median():
    times = {"torch": [10.0] * 9, "fused": [5.0] * 8 + [500.0]}
    assert summarize(times, "torch")["fused"].ratio == 2


def test_timers_finish_all_marks_at_once():
    finished = []
    timer = Timer(lambda call: call(), lambda marks: finished.append(marks) or [1.0] * len(marks))
    interleave({"a": lambda: "mark"}, timer, rounds=2, warm_s=0)
    assert finished == [["mark", "mark"]]


def small(op, make, backward=False, dtype=torch.bfloat16):
    return BenchCase(f"small {op}", make, 1000, 1000, dtype=dtype, backward=backward)


SMALL = [
    small("linear", lambda t: partial(FF.linear, t(5, 16), t(8, 16), t(8), activation="relu")),
    small("layer norm", lambda t: partial(FF.layer_norm, t(6, 24), (24,), t(24), t(24)), True),
    small("dropout", lambda t: partial(FF.dropout, t(64), p=0.5)),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_row(case):
    row = rows.measure(case, Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["ok"], row["says"]
    assert row["how"] == "graph" and not row["no_graph"]
    assert {"torch", "fused"} <= row["graph"]["contenders"].keys() == row["peak_bytes"].keys()
    assert row["flops"] == (3000 if case.backward else 1000)
    assert 0 < row["roofline"] < 1
    json.dumps(row)


def test_vendor_is_torchs_single_call():
    row = rows.measure(SMALL[0], Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["graph"]["contenders"].keys() == {"torch", "fused", "vendor"}
    x, w, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    call = partial(FF.linear, x, w, b, activation="relu")
    torch.testing.assert_close(rows.vendor(call, False)(x, w, b, "relu"), call())


def test_a_row_that_cannot_be_captured_says_so():
    class NoGraphs(Host):
        def captured(self, *args):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    row = rows.measure(SMALL[0], NoGraphs(), CEILINGS, compiled=False, rounds=2, warm_s=0)
    assert row["how"] == "python" and "NO GRAPH" in row["says"]
    assert set(row["no_graph"].values()) == {"operation not permitted"}


@pytest.fixture
def straw(monkeypatch):
    """A GPU whose streams, events and graphs do nothing but keep count."""
    cuda = mock.MagicMock()
    facts = types.SimpleNamespace(name="Straw 1", L2_cache_size=100)
    cuda.get_device_properties.return_value = facts
    cuda.Event.return_value.elapsed_time.return_value = 0.5
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 400
    for name in ("Event", "Stream", "stream", "current_stream", "CUDAGraph", "graph", "synchronize",
                 "empty_cache", "reset_peak_memory_stats", "memory_allocated", "current_device",
                 "max_memory_allocated", "get_device_properties"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(Gpu, "device", "cpu")
    return cuda


def test_a_row_on_a_gpu(straw):
    gpu = Gpu()
    assert (gpu.name, gpu.cold_bytes) == ("Straw 1", 300)
    row = rows.measure(SMALL[2], gpu, CEILINGS, compiled=False, rounds=3, warm_s=0)
    # a set is 128 bytes: 3 are cold; 500 us for all of them, so 2 times round make a graph
    assert (row["sets"], row["calls"], row["cold"], row["how"]) == (3, 6, True, "graph")
    assert row["graph"]["contenders"]["fused"]["us"] == pytest.approx(500 / 6)
    assert row["peak_bytes"] == {"torch": 300, "fused": 300}
    assert straw.CUDAGraph.return_value.replay.call_count >= 2 * 3


def test_a_wrong_row_is_not_timed(monkeypatch):
    case = small("wrong", lambda t: partial(FF.relu, t(64)))
    monkeypatch.setattr(rows, "error", lambda *args: rows.Error(2.0, 0.1, 0.2))
    row = rows.measure(case, Host(), CEILINGS)
    assert not row["ok"] and "2.00e+00" in row["says"] and "graph" not in row


@pytest.mark.parametrize("op", SPECS)
def test_every_bench_case_has_a_plain_torch_form(op):
    for case in SPECS[op].bench:
        call = case.make(rows.Maker(case.dtype, device="meta"))
        outputs = rows.floats(rows.TORCH[call.func](*call.args, **call.keywords))
        assert outputs[0].shape[0] == call.args[0].shape[0]


def test_ceilings():
    found = rows.ceilings(Host(), size=64, copy_bytes=1 << 16)
    assert found.copy > 0 and found.matmul.keys() == {"bfloat16", "float16", "float32"}


def test_the_roof_is_the_slower_of_two():
    assert rows.roof_us(8e8, 0, torch.bfloat16, CEILINGS) == pytest.approx(1)
    assert rows.roof_us(8e8, 4e7, torch.bfloat16, CEILINGS) == pytest.approx(10)


def test_exact_cases_cover_every_configuration():
    cases = list(exact_cases(H200))
    assert len({case.name for case in cases}) == len(cases)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bases = [c for c in configs("linear", dtype, (300, 272, 208), H200) if c.splits == 1]
        assert {base.variant for base in bases} <= {case.config.variant for case in cases}
        for base in bases:
            assert any(base == case.config for case in cases)
    assert any(case.config.splits > 1 for case in cases)


@pytest.mark.parametrize("sizes", [(20, 24, 72), (3, 9, 33)], ids=str)
def test_configurations_are_exact(sizes):
    applied = 0
    for config in configs("linear", torch.bfloat16, sizes, H200):
        case = Exact(torch.bfloat16, False, config, sizes)
        row = check_exact(case, "cpu", repeats=1)
        assert row["ok"], (config, row)
        applied += row["applies"]
    assert applied >= 8


def test_exact_sees_a_wrong_element(monkeypatch):
    def broken(case, device):
        *inputs, want = integers(case, device)
        want[0, 0] += 1
        return *inputs, want

    monkeypatch.setattr("bench.exact.integers", broken)
    config = next(iter(configs("linear", torch.float32, (8, 8, 8), H200)))
    row = check_exact(Exact(torch.float32, False, config, (8, 8, 8)), "cpu", repeats=2)
    assert not row["ok"] and row["wrong"] == 2


def context(**options):
    given = {"minutes": 1, "again": False, "no_compile": True, "stage": None, **options}
    return gpu.Context(Host(), argparse.Namespace(**given))


@pytest.fixture
def stage(monkeypatch):
    """A stage of two rows that counts its calls, the second of which fails the first time."""
    ran = []

    def second():
        ran.append("second")
        if ran.count("second") == 1:
            raise ValueError("not today")
        return {"ok": True, "says": "right"}

    def two(context):
        yield "first", lambda: ran.append("first") or {"ok": True, "says": "right"}
        yield "second", second

    monkeypatch.setitem(gpu.STAGES, "two", two)
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
    store.put = lambda *row: put(*row) or clock.taking(61)()
    assert gpu.run_stage("two", context(), store, clock) == gpu.UNFINISHED
    assert stage == ["first"]
    assert "no time for 1 more" in capsys.readouterr().out


def test_damaged_results_are_measured_again(tmp_path):
    (tmp_path / "two.json").write_text("{")
    assert not Store(tmp_path, "two", {}).done("first")


def test_provenance():
    found = provenance(json.loads(fastdl.env().to_json()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["code"] == code_digest()
    json.dumps(found)


def run(*command, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs everything on a GPU")
def test_gpu_lists_and_refuses(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} (" in f"\n{listed}" for name in gpu.STAGES)
    assert "persistent" in listed and "8192x8192x8192" in listed
    done = run("bench/gpu.py")
    assert done.returncode == gpu.USAGE and "sees no GPU" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="times everything on a GPU")
def test_suite_runs_once_and_times_nothing_without_a_gpu():
    done = run(
        "-m",
        "pytest",
        "bench",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "linear-residual or layer_norm-odd",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was timed" in done.stdout
    assert "Min" not in done.stdout and "OPS" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the path of a GPU without one")
def test_dispatch_takes_the_path_of_a_gpu(device):
    done = run("bench/dispatch.py", "--calls=20", "--rounds=3", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    us = {
        line[24:].split("   ")[0].strip(): float(line[:8]) for line in done.stdout.splitlines()[1:]
    }
    assert us["F.layer_norm"] < us["layer_norm"] < us["layer_norm, both passes"]
    assert us["layer_norm"] < 1000  # the interpreter takes longer
    refused = run("bench/dispatch.py", TRITON_INTERPRET="1")
    assert refused.returncode == 2 and "TRITON_INTERPRET" in refused.stderr
