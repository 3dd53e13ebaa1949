"""Without a GPU the suite runs each case once, in the interpreter, and times nothing."""

import os

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if torch.cuda.is_available():
        return
    # read when a kernel is decorated: before any test module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # as --benchmark-disable: one call, no table
    config.option.benchmark_disable = True


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line("no GPU: each case ran once and was right; nothing was timed")
