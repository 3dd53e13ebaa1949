"""Every op, in every pass and by every contender, for the history that pytest-benchmark keeps.

What it times itself is minutes apart and from Python: ratios and device times are of the row in
which all contenders of a case take turns, as bench/gpu.py has it.
"""

import functools
import json

import pytest
import torch

import fastdl
from bench import contenders, rows
from bench.machine import machine
from bench.passes import Inputs, passes_of
from bench.store import provenance
from fastdl.contract import SPECS, Maker
from fastdl.contract.evaluate import accuracy

pytest.importorskip("pytest_benchmark")

HAVE_GPU = torch.cuda.is_available()
CALLS, ROUNDS = 20, 20


def params():
    """The benchmark's cases on a GPU, else the small ones that stand for the op in the contract."""
    for spec in SPECS.values():
        for case in spec.core if not HAVE_GPU else ():
            yield pytest.param(spec.name, case, "", "fused", id=f"{spec.name}-{case.name}")
        for case in spec.bench if HAVE_GPU else ():
            for what in passes_of(case):
                for name in contenders.names(case):
                    id = f"{spec.name}-{case.name}-{what}-{name}"
                    yield pytest.param(spec.name, case, what, name, id=id)


@pytest.fixture(autouse=True)
def _fused_or_error():
    with fastdl.policy("fused", on_fallback="error"):
        yield


@pytest.mark.parametrize("op, case, what, contender", list(params()))
def test_op(benchmark, measured, op, case, what, contender):
    if HAVE_GPU:
        timed(benchmark, op, case, what, contender)
        if contender == "fused":
            measured.append(benchmark.extra_info)
    else:
        once(benchmark, case)


def once(benchmark, case):
    forward, gradient = accuracy(case, torch.float32, "cpu")
    assert forward.ok and gradient.ok
    benchmark(case.make(Maker(torch.float32)))


def timed(benchmark, op, case, what, contender):
    row = row_of(case)
    assert row["ok"], row["says"]
    if contender not in row["passes"][what]["python"]["contenders"]:
        pytest.skip(f"no {contender}: {row['refused'].get(contender, 'not timed')}")
    here = machine()
    with rows.retained(what):
        prepared = contenders.prepare(case, here, inputs_of(case), what, only=contender)
        assert contender in prepared.calls, prepared.refused
        run = here.repeated(prepared.calls[contender], len(prepared.inputs), CALLS)

        def calls():
            run()
            torch.cuda.synchronize()

        benchmark.group = f"{op} {case.name} {what}"
        benchmark.pedantic(calls, rounds=ROUNDS, iterations=1, warmup_rounds=3)
    benchmark.extra_info.update(facts(row, what, contender), op=op, case=case.name)


@functools.lru_cache(maxsize=1)
def row_of(case):
    """Measured once for all tests of a case, which come one after another. An error is a row."""
    inputs_of.cache_clear()
    machine().release()
    try:
        return rows.measure(case, machine(), ceilings())
    except Exception as error:
        return {"ok": False, "says": f"{type(error).__name__}: {error}"}


@functools.lru_cache(maxsize=1)
def inputs_of(case):
    return Inputs(case, machine())


@functools.lru_cache
def ceilings():
    return rows.ceilings(machine())


@functools.lru_cache
def run():
    return provenance(json.loads(fastdl.env().to_json()))


def facts(row, what, contender):
    """Of one contender, from the row of its case."""
    found = row["passes"][what]
    way = found[found["how"]]
    us = way["contenders"][contender]["us"]
    ours = contender == "fused"
    rates = rows.rates(row["flops"], row["bytes"], row["dtype"], us, ceilings())
    return {
        **run(),
        "pass": what,
        "contender": contender,
        "gpu": machine().name,
        "how": found["how"],
        "device_us" if found["how"] == "graph" else "python_us": us,
        "baseline": way["baseline"],
        **{key: way["contenders"][contender][key] for key in ("ratio", "low", "high", "drift")},
        **(rates if what == next(iter(row["passes"])) else {}),
        "peak_bytes": found["peak_bytes"][contender],
        "config": row["launches"] if ours else [],
        "route": row["route"] if ours else "",
        **{key: row[key] for key in ("dtype", "shapes", "seeds", "cold")},
    }
