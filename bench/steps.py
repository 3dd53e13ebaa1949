"""One row of the benchmark for an optimizer: fused, torch's fused=True, and its default."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdl
from bench.interleave import interleave
from bench.machine import Host
from bench.rows import Ceilings, Times, finished, summary, told
from fastdl.contract import BenchCase, Maker, StepSpec

# After a few steps: the distance of parameters that is more than rounding, by type.
FAR = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Steps in a row of one contender.
CALLS = 5


def contenders(spec: StepSpec, case: BenchCase, device: str) -> dict[str, "partial[Any]"]:
    """Steps of three optimizers that begin alike."""
    reference = getattr(torch.optim, spec.reference)
    classes = {
        "fused": getattr(fastdl.optim, spec.reference),
        "torch": partial(reference, fused=True),
        "foreach": partial(reference, foreach=True),
    }
    return {name: case.make(Maker(case.dtype, device=device), cls) for name, cls in classes.items()}


def distance(a: "partial[Any]", b: "partial[Any]") -> float:
    """Of the parameters of two optimizers, relative to the largest of each tensor."""
    pairs = zip(*(parameters_of(step) for step in (a, b)), strict=True)
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


def parameters_of(step: "partial[Any]") -> list[Tensor]:
    return step.func.__self__.param_groups[0]["params"]


def measure(
    spec: StepSpec, case: BenchCase, machine: Host, ceilings: Ceilings, *, rounds: int = 21,
    warm_s: float = 0.2,
) -> dict[str, Any]:  # fmt: skip
    """The row: right or not, microseconds, ratio to torch's steps, share of the roof."""
    steps = contenders(spec, case, machine.device)
    with torch.no_grad(), fastdl.policy("fused", on_fallback="error"):
        for step in steps.values():
            for _ in range(3):
                step()
        # torch's fused SGD with momentum is wrong in low precision on a CPU
        wrong, allowed = distance(steps["fused"], steps["foreach"]), FAR[case.dtype]
        if not wrong <= allowed:
            says = f"off by {wrong:.2e}, allowed is {allowed:.0e}"
            return {"ok": False, "says": says, "error": {"ours": wrong, "allowed": allowed}}
        explained = fastdl.explain(steps["fused"])
        times = timed(steps, machine, rounds, warm_s)
    dtype = str(case.dtype).removeprefix("torch.")
    row = {
        "ok": True, "op": spec.name, "dtype": dtype, "backward": False,
        "shapes": [f"{dtype}{list(p.shape)}" for p in parameters_of(steps["fused"])],
        "seeds": [0], "bytes": case.bytes, "flops": case.flops,
        "error": {"ours": wrong, "allowed": allowed}, **told(explained), "sets": 1,
        "cold": case.bytes >= machine.cold_bytes, "refused": {},
        "ceilings": ceilings._asdict(), "passes": {"step": summary(times)},
    }  # fmt: skip
    return finished(row, ceilings)


def timed(steps: dict[str, "partial[Any]"], machine: Host, rounds: int, warm_s: float) -> Times:
    """Called from Python, as optimizers are."""
    calls: dict[str, Callable[[], Any]] = {
        name: machine.repeated(lambda i, s=step: s(), 1, CALLS) for name, step in steps.items()
    }
    timer = machine.timer()
    found = interleave(calls, timer, rounds=rounds, warm_s=warm_s, settle=machine.settle)
    us = {name: [us / CALLS for us in values] for name, values in found.items()}
    peaks = {name: machine.peak_bytes(step) for name, step in steps.items()}
    return Times({"python": us}, CALLS, {}, peaks)
