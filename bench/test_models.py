"""Whole models, for the history that pytest-benchmark keeps.

Its contenders run minutes apart: ratios are taken from bench/gpu.py, which times them in turn.
"""

import pytest
import torch

from bench import models
from bench.families import MissingLibrary
from bench.machine import machine

pytest.importorskip("pytest_benchmark")

HAVE_GPU = torch.cuda.is_available()


def params():
    """All contenders on a GPU, else the modules in small models."""
    for case in models.cases():
        for contender in models.CONTENDERS if HAVE_GPU else ("modules",):
            yield pytest.param(case, contender, id=f"{case.name}-{contender}")


@pytest.mark.parametrize("case, contender", list(params()))
def test_model(benchmark, case, contender):
    size, dtype = (case.large, torch.bfloat16) if HAVE_GPU else (case.family.small, torch.float32)
    here = machine()
    with models.alone(here):
        try:
            step = case.step(size, here.device, dtype)
        except MissingLibrary as missing:
            pytest.skip(str(missing))
        names = list(dict.fromkeys(("eager", contender)))
        ready, refused, _ = models.contenders(case, step, names, here)
        assert not refused

        def waited():
            ready[contender].step.both()
            here.settle()

        benchmark.group = case.name
        benchmark.pedantic(waited, rounds=20, iterations=1, warmup_rounds=3)
        benchmark.extra_info.update(ready[contender].facts)
