"""A plugin for pytest: bench/test_ops.py sees a GPU of straw, and few and small cases."""

import contextlib
import dataclasses
from functools import partial

import torch
from bench import rows
from pytest_benchmark.fixture import BenchmarkFixture
from tests.straw import Straw, small

import fastdl.functional as FF
from fastdl.contract import SPECS
from fastdl.contract.evaluate import Error

CASES = {
    "linear": lambda t: partial(FF.linear, t(5, 16), t(8, 16), t(8), activation="relu"),
    "layer_norm": lambda t: partial(FF.layer_norm, t(6, 24), (24,), t(24), t(24)),
    "softmax": lambda t: partial(FF.softmax, t(8, 24), -1),
}

WRONG = Error(2.0, 0.1, 0.2)

STRAW, PATCHES = Straw(), contextlib.ExitStack()
# at once: conftest asks for a GPU first of all
for patch in STRAW.patches(is_available=lambda: True):
    PATCHES.enter_context(patch)


def pytest_configure():
    torch.compile = lambda form, **options: form
    rows.measure = partial(rows.measure, rounds=2, warm_s=0)
    rows.ceilings = partial(rows.ceilings, size=64, copy_bytes=1 << 16)
    for name, spec in SPECS.items():
        found = [small(name, CASES[name], name == "softmax")] if name in CASES else []
        SPECS[name] = dataclasses.replace(spec, bench=found)
    right = rows.error
    rows.error = lambda case, device: WRONG if "layer" in case.name else right(case, device)


def pedantic(fixture, target, **options):
    """What is timed waits for the GPU."""
    before = STRAW.synchronized
    target()
    assert STRAW.synchronized > before
    return PEDANTIC(fixture, target, **options)


PEDANTIC = BenchmarkFixture.pedantic
BenchmarkFixture.pedantic = pedantic


def pytest_collection_modifyitems(items):
    for item in items:
        item.module.CALLS, item.module.ROUNDS = 2, 2


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"straw: {STRAW.replays} replays, {STRAW.synchronized} waits")


def pytest_unconfigure():
    PATCHES.close()
