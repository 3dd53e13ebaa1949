"""Without a GPU the suite runs each case once, in the interpreter, and times nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gate

OLD, NEW, FOUND = pytest.StashKey(), pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption(
        "--compare",
        metavar="OLD",
        type=Path,
        help="fail where a fused op got slower beside torch than in an older run: a file of "
        "--benchmark-json, a table of bench/results, or a folder of them",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[NEW] = []
    old = config.getoption("--compare")
    if torch.cuda.is_available():
        os.environ.update(better_ptxas())
        config.stash[OLD] = older(old) if old else None
        return
    if old:
        raise pytest.UsageError("--compare: torch sees no GPU, so nothing is timed here to compare")
    config.stash[OLD] = None
    # read when a kernel is decorated: before any test module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # as --benchmark-disable: one call, no table
    config.option.benchmark_disable = True


def better_ptxas():
    """Asked in a process of its own: this one has to know it before it imports fastdl."""
    ask = "import json; from bench.machine import better_ptxas; print(json.dumps(better_ptxas()))"
    done = subprocess.run(
        [sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def older(path):
    """The ratios of an older run; what is wrong with them is said before anything is timed."""
    here = torch.cuda.get_device_properties(torch.cuda.current_device()).name
    try:
        ratios = gate.read(path)
        gate.require_shared({key.gpu for key in ratios}, {here})
    except gate.GateError as error:
        raise pytest.UsageError(f"--compare: {error}") from None
    return ratios


@pytest.fixture
def measured(request):
    """Where a test leaves what it says of the fused form."""
    return request.config.stash[NEW]


def pytest_sessionfinish(session):
    config = session.config
    if config.stash[OLD] is None or config.option.collectonly:
        return
    found = config.stash[FOUND] = gate.compared(config.stash[OLD], gate.of_suite(config.stash[NEW]))
    if not found.ok and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line("no GPU: each case ran once and was right; nothing was timed")
    if FOUND in terminalreporter.config.stash:
        terminalreporter.write_line(str(terminalreporter.config.stash[FOUND]))
