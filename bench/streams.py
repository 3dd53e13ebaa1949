"""CUDA graphs and streams: a case gives the same in a graph that is replayed on other inputs, and
on several streams at once.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastdl
from bench.machine import Host
from bench.passes import as_leaves
from bench.store import Row
from fastdl.contract import Case, Maker
from fastdl.contract.evaluate import cotangents, floats, tensors

STREAMS, ROUNDS = 3, 10

Tensors = list[Tensor]


class Pass:
    """A call of a case with its gradients, on inputs that stay where they are."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.maker = Maker(device=device, seed=seed)
        self.given = case.make(self.maker)
        # made once, outside of a graph
        self.upstream: Tensors | None = None

    def __call__(self) -> Tensors:
        # made here, because autograd goes back on the stream on which a leaf was made
        call, leaves = as_leaves(self.given)
        with fastdl.policy("fused", on_fallback="error"):
            outputs = floats(call())
            if self.upstream is None:
                self.upstream = cotangents(self.maker, outputs)
            found = torch.autograd.grad(outputs, leaves, self.upstream, allow_unused=True)
        return [y.detach() for y in outputs] + [g for g in found if g is not None]

    @property
    def inputs(self) -> Tensors:
        return [x.detach() for x in tensors((self.given.args, self.given.keywords))]


def check_graph(case: Case, machine: Host) -> Row:
    """Captured on some inputs, replayed on others, and again: as a plain call on those, with the
    same random numbers.
    """
    static, other = Pass(case, machine.device), Pass(case, machine.device, seed=1)
    found: Tensors = []

    def call(_: int) -> None:
        found[:] = static()

    replay = machine.captured(call, 1, 1)
    for there, new in zip(static.inputs, other.inputs, strict=True):
        there.copy_(new)
    for seed in (3, 4):
        torch.manual_seed(seed)
        want = other()
        torch.manual_seed(seed)
        replay()
        wrong = differing(found, want)
        if wrong:
            return {"ok": False, "says": f"replayed on other inputs: {wrong}"}
    return {"ok": True, "says": "replayed twice on other inputs"}


def check_streams(case: Case, machine: Host) -> Row:
    """On several streams in turn, while none is waited for and memory goes back and forth."""
    passes = [Pass(case, machine.device, seed) for seed in range(STREAMS)]
    seeded = [partial(_seeded, one, seed) for seed, one in enumerate(passes)]
    wanted = [one() for one in seeded]
    machine.settle()
    streams = [machine.other_stream() for _ in passes]
    kept: list[tuple[int, Tensors]] = []
    for _ in range(ROUNDS):
        for index, stream in enumerate(streams):
            with stream:
                kept.append((index, seeded[index]()))
                # what was just given back is written to: nobody may still read it
                _churn(kept[-1][1])
    machine.settle()
    wrong = next((w for index, got in kept if (w := differing(got, wanted[index]))), "")
    says = f"{STREAMS} streams, {ROUNDS} rounds"
    return {"ok": not wrong, "says": f"{says}: {wrong}" if wrong else says}


def _seeded(call: Callable[[], Tensors], seed: int) -> Tensors:
    torch.manual_seed(seed)
    return call()


def _churn(like: Tensors) -> None:
    for tensor in like:
        torch.full_like(tensor, float("nan"))


def differing(got: Tensors, want: Tensors) -> str:
    """The first tensor that is another one, by the tolerances of torch; libraries may choose other
    kernels in a graph.
    """
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        try:
            torch.testing.assert_close(a, b, equal_nan=True)
        except AssertionError as error:
            return f"tensor {index}: {' '.join(str(error).split())}"
    return ""
