"""One row of the benchmark for an optimizer: fused, torch's fused=True, and its default."""

import statistics
from functools import partial
from typing import Any

import torch

import fastdl
from bench.interleave import interleave, summarize
from bench.machine import Host
from bench.rows import Ceilings, roof_us
from fastdl.contract import BenchCase, Maker, StepSpec

# After a few steps: the distance of parameters that is more than rounding, by type.
FAR = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BASELINE = "torch"


def contenders(spec: StepSpec, case: BenchCase, device: str) -> dict[str, "partial[Any]"]:
    """Steps of three optimizers that begin alike."""
    reference = getattr(torch.optim, spec.reference)
    classes = {
        "fused": getattr(fastdl.optim, spec.reference),
        BASELINE: partial(reference, fused=True),
        "foreach": partial(reference, foreach=True),
    }
    return {name: case.make(Maker(case.dtype, device=device), cls) for name, cls in classes.items()}


def distance(a: "partial[Any]", b: "partial[Any]") -> float:
    """Of the parameters of two optimizers, relative to the largest of each tensor."""
    pairs = zip(*(optimizer_of(step).param_groups[0]["params"] for step in (a, b)), strict=True)
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


def optimizer_of(step: "partial[Any]") -> torch.optim.Optimizer:
    return step.func.__self__


def measure(
    spec: StepSpec, case: BenchCase, machine: Host, ceilings: Ceilings, *, rounds: int = 21,
    warm_s: float = 0.2,
) -> dict[str, Any]:  # fmt: skip
    """The row: right or not, microseconds, ratio to torch's fused step, share of the roof."""
    steps = contenders(spec, case, machine.device)
    with torch.no_grad(), fastdl.policy("fused", on_fallback="error"):
        for step in steps.values():
            for _ in range(3):
                step()
        # torch's fused SGD with momentum is wrong in low precision on a CPU
        wrong = distance(steps["fused"], steps["foreach"])
        if not wrong <= FAR[case.dtype]:
            says = f"off by {wrong:.2e}, allowed is {FAR[case.dtype]:.0e}"
            return {"ok": False, "says": says, "error": wrong}
        launched = fastdl.explain(steps["fused"]).launches
        calls = {
            name: machine.repeated(lambda i, s=step: s(), 1, 5) for name, step in steps.items()
        }
        timer = machine.timer()
        found = interleave(calls, timer, rounds=rounds, warm_s=warm_s, settle=machine.settle)
    times = {name: [us / 5 for us in values] for name, values in found.items()}
    stats = summarize(times, BASELINE)
    us = statistics.median(times["fused"])
    roof = roof_us(0, case.bytes, case.dtype, ceilings) / us
    over = {name: summarize(times, name)["fused"].ratio for name in (BASELINE, "foreach")}
    says = f"{us:9.1f} us  {over[BASELINE]:5.2f}x torch  {over['foreach']:5.2f}x foreach"
    return {
        "ok": True, "dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes,
        "error": wrong, "launches": [*map(str, launched)], "over": over, "roofline": roof,
        "contenders": {name: s._asdict() for name, s in stats.items()},
        "says": f"{says}  {roof:4.0%} of the roof",
    }  # fmt: skip
