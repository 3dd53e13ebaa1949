"""The benchmark, without a GPU: its statistics, its rows, its stages and its suite."""

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
from bench import error as error_module, forms, rows, steps
from bench.attention import flex_form
from bench.interleave import Timer, host_timer, interleave, summarize
from bench.machine import Gpu, Host
from torch.nn.attention.flex_attention import flex_attention

import fastdl
import fastdl.functional as FF
from fastdl.contract import SPECS, STEPS, BenchCase
from fastdl.contract.attention import call, packed
from fastdl.contract.evaluate import Error
from fastdl.contract.optim import steps as steps_of
from fastdl.tuned import Device

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
    assert row["flops"] == 1000
    assert 0 < row["roofline"] < 1
    json.dumps(row)


def test_the_rival_of_linear_is_torchs_single_call():
    row = rows.measure(SMALL[0], Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["graph"]["contenders"].keys() == {"torch", "fused", "addmm"}
    x, w, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    call = partial(FF.linear, x, w, b, activation="relu")
    torch.testing.assert_close(forms.linear_rivals(call, False)["addmm"](x, w, b, "relu"), call())
    assert not forms.linear_rivals(partial(call, x.requires_grad_(), w, b), False)


FORMS = {
    "plain": call(Sq=18, Sk=24),
    "shared keys": call(H=4, kv=2, Sq=18, is_causal=True, scale=0.3),
    "window": call(Sq=30, window_size=(5, 3)),
    "window ahead": call(Sq=30, window_size=(-1, 3)),
    "causal window": call(Sq=30, window_size=(7, -1), is_causal=True),
    "softcap": call(H=4, kv=2, Sq=18, softcap=0.5, is_causal=True),
    "bias": call(B=2, Sq=18, bias=(1, 2, 18, 18)),
    "bias, causal": call(B=2, Sq=18, bias=(2, 1, 1, 18), softcap=0.5, is_causal=True),
    "mask of keys": call(B=2, Sq=18, mask=(2, 1, 1, 18)),
    "mask, window": call(B=2, Sq=18, mask=(1, 2, 18, 18), window_size=(9, 9)),
    "alibi": call(Sq=18, alibi=True, is_causal=True),
    "alibi, bias": call(Sq=18, alibi=True, bias=(1, 2, 18, 18)),
    "sinks": call(Sq=18, sinks=True, window_size=(7, 0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_torch_has_for_attention_is_attention(form):
    made = FORMS[form](rows.Maker(torch.float64, grad=False))
    with fastdl.policy("definition"):
        want = made()
    options = made.keywords
    torch.testing.assert_close(forms.torch_attention(*made.args, **options), want)
    if "sinks" not in options:
        flex = flex_form(made, flex_attention)
        torch.testing.assert_close(flex(*made.args, **options), want)


def test_what_torch_has_for_packed_attention_is_attention():
    for make in (packed([5, 30, 1], window_size=(6, 0)), packed([5, 9], [9, 12], H=4, kv=2)):
        made = make(rows.Maker(torch.float64, grad=False))
        with fastdl.policy("definition"):
            want = made()
        torch.testing.assert_close(forms.torch_varlen(*made.args, **made.keywords), want)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both passes"])
def test_a_row_of_attention(backward):
    case = small("attention", call(kv=1, Sq=9, is_causal=True), backward)
    row = rows.measure(case, Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["ok"], row["says"]
    # the other two have no kernels for the host
    assert row["graph"]["contenders"].keys() == {"torch", "fused", "flash"}
    assert row["refused"].keys() == {"cudnn", "efficient"}
    assert all(why.startswith("RuntimeError: No ") for why in row["refused"].values())
    assert row["graph"]["baseline"] in ("torch", "flash")
    assert row["flops"] == 1000


def test_a_packed_row_of_attention():
    case = small("packed", packed([5, 9], window_size=(-1, 0)))
    row = rows.measure(case, Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["ok"] and row["graph"]["contenders"].keys() == {"torch", "fused"}
    assert row["refused"].keys() == {"varlen"}


def test_rivals_that_compute_something_else_are_named_and_not_timed(monkeypatch):
    monkeypatch.setitem(
        rows.RIVALS,
        FF.linear,
        lambda call, compiled: {"rival": lambda x, w, b, activation: x @ w.T},
    )
    row = rows.measure(SMALL[0], Host(), CEILINGS, compiled=False, rounds=3, warm_s=0)
    assert row["graph"]["contenders"].keys() == {"torch", "fused"}
    assert row["refused"]["rival"].startswith("off by") and "WRONG: rival" in row["says"]


def test_ratios_are_to_the_fastest_that_torch_has():
    us = {"torch": 30.0, "fused": 10.0, "flash": 20.0, "flex": 25.0, "compile": 15.0}
    found = rows._summary({name: [value] * 5 for name, value in us.items()})
    assert found["baseline"] == "flash" and found["contenders"].keys() == us.keys()
    assert found["contenders"]["fused"]["ratio"] == 2
    assert (found["over_torch"], found["over_compile"]) == (3, 1.5)


LARGE = {
    "attention": call(B=2, H=4, kv=2, Sq=20, is_causal=True),
    "packed": packed([5, 20], H=4, kv=2, window_size=(-1, 0)),
    "with a bias": call(B=2, Sq=18, bias=(1, 2, 18, 18)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("wrong", [None, 0, 1], ids=["right", "wrong output", "wrong gradient"])
def test_the_error_of_attention_sees_the_last_head(name, wrong, monkeypatch):
    case = small(name, LARGE[name], True, torch.float32)

    def broken(*args, **options):
        found = run(*args, **options)
        if args[2] == "fused":
            tensor = (found.outputs, found.gradients)[wrong][0].detach()
            tensor[-1, -1] += 0.1
        return found

    run = error_module.run
    if wrong is not None:
        monkeypatch.setattr(error_module, "run", broken)
    assert error_module.error(case, "cpu").ok == (wrong is None)


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
    monkeypatch.setattr(rows, "error", lambda *args: Error(2.0, 0.1, 0.2))
    row = rows.measure(case, Host(), CEILINGS)
    assert not row["ok"] and "2.00e+00" in row["says"] and "graph" not in row


@pytest.mark.parametrize("op", SPECS)
def test_every_bench_case_has_a_plain_torch_form(op):
    for case in SPECS[op].bench:
        call = case.make(rows.Maker(case.dtype, device="meta"))
        outputs = rows.floats(rows.TORCH[call.func](*call.args, **call.keywords))
        assert outputs[0].shape[:1] in (call.args[0].shape[:1], ())  # a loss has no dimensions


@pytest.mark.parametrize("name", STEPS)
def test_rows_of_steps(monkeypatch, name):
    spec = STEPS[name]
    ours = getattr(fastdl.optim, spec.reference)
    case = BenchCase("small", steps_of(ours, [(5, 3), (7,)]), 28 * 22, 0, torch.float32)
    row = steps.measure(spec, case, Host(), CEILINGS, rounds=3, warm_s=0)
    json.dumps(row)
    assert row["ok"] and row["contenders"].keys() == {"fused", "torch", "foreach"}
    assert "x torch" in row["says"] and "of the roof" in row["says"] and row["launches"]
    monkeypatch.setattr(steps, "distance", lambda *args: float("nan"))
    wrong = steps.measure(spec, case, Host(), CEILINGS, rounds=3, warm_s=0)
    assert not wrong["ok"] and "off by nan" in wrong["says"]


def test_ceilings():
    found = rows.ceilings(Host(), size=64, copy_bytes=1 << 16)
    assert found.copy > 0 and found.matmul.keys() == {"bfloat16", "float16", "float32"}


def test_the_roof_is_the_slower_of_two():
    assert rows.roof_us(8e8, 0, torch.bfloat16, CEILINGS) == pytest.approx(1)
    assert rows.roof_us(8e8, 4e7, torch.bfloat16, CEILINGS) == pytest.approx(10)


def run(*command, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env
    )


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
