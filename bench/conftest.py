"""Without a GPU the suite runs each case once, in the interpreter, and times nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if torch.cuda.is_available():
        os.environ.update(better_ptxas())
        return
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


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line("no GPU: each case ran once and was right; nothing was timed")
