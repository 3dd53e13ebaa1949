"""The benchmark, without a GPU: its statistics, its suite, and what a call costs the host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.interleave import Timer, host_timer, interleave, summarize

ROOT = Path(__file__).resolve().parents[1]


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
