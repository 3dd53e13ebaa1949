"""Every op against torch and torch.compile, for the history that pytest-benchmark keeps.

Its contenders run minutes apart: ratios are taken from bench/gpu.py, which times them in turn.
"""

import pytest
import torch

import fastdl
from bench import rows
from bench.machine import machine
from fastdl.contract import SPECS, Maker
from fastdl.contract.evaluate import accuracy

pytest.importorskip("pytest_benchmark")

HAVE_GPU = torch.cuda.is_available()
CALLS = 20


def params():
    """The benchmark's cases on a GPU, else the small ones that stand for the op in the contract."""
    for spec in SPECS.values():
        for case in spec.bench if HAVE_GPU else spec.core:
            for contender in ("torch", "compile", "fused") if HAVE_GPU else ("fused",):
                yield pytest.param(case, contender, id=f"{spec.name}-{case.name}-{contender}")


@pytest.fixture(autouse=True)
def _fused_or_error():
    with fastdl.policy("fused", on_fallback="error"):
        yield


@pytest.mark.parametrize("case, contender", list(params()))
def test_op(benchmark, case, contender):
    if HAVE_GPU:
        timed(benchmark, case, contender)
    else:
        once(benchmark, case)


def once(benchmark, case):
    forward, gradient = accuracy(case, torch.float32, "cpu")
    assert forward.ok and gradient.ok
    benchmark(case.make(Maker(torch.float32)))


def timed(benchmark, case, contender):
    wrong = rows.error(case, "cuda")
    assert wrong.ok, wrong
    prepared = rows.prepare(case, machine(), compiled=contender == "compile")
    if contender not in prepared.calls:
        pytest.skip(f"no {contender} for this case")
    run = machine().repeated(prepared.calls[contender], prepared.sets, CALLS)

    def calls():
        run()
        torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(calls, rounds=20, iterations=1, warmup_rounds=3)
    benchmark.extra_info.update(facts(benchmark, case, contender, prepared))


def facts(benchmark, case, contender, prepared):
    us = 1e6 * benchmark.stats.stats.median / CALLS
    flops, moved = rows.work(case, prepared.first)
    environment = fastdl.env()
    launches = fastdl.explain(prepared.first).launches if contender == "fused" else []
    return {
        "us": us,
        "tflops": flops / us / 1e6,
        "gb_per_s": moved / us / 1e3,
        "gpu": environment.devices[torch.cuda.current_device()]["name"],
        "versions": environment.versions,
        "config": [str(launch) for launch in launches],
    }
