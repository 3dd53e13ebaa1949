"""One row of the benchmark: a case timed as fused, as torch's own calls, and compiled."""

import math
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import fastdl
from bench.error import error
from bench.forms import RIVALS, TORCH
from bench.interleave import Stats, interleave, summarize
from bench.machine import Host, OnSet, as_tuple
from fastdl.contract import BenchCase, Maker
from fastdl.contract.evaluate import cotangents, floats

# One graph is at least this long, and has at most so many calls.
GRAPH_US, MOST_CALLS, MOST_SETS, CALLS_FROM_PYTHON = 1000.0, 512, 64, 50

# Rivals may round otherwise than torch's plain form: relative distance of outputs and gradients.
ALIKE, OFF = 0.02, "off by"


class Ceilings(NamedTuple):
    """What this GPU does at best, measured in the same run: bytes and, by dtype, flops a second."""

    copy: float
    matmul: dict[str, float]


class Prepared(NamedTuple):
    """The contenders of a case, each a function of the number of a set of inputs, and why others
    are none.
    """

    calls: dict[str, OnSet]
    refused: dict[str, str]
    sets: int
    set_bytes: int
    first: "partial[Any]"


def prepare(case: BenchCase, machine: Host, compiled: bool = True) -> Prepared:
    """Several sets of inputs, so that none is in the cache when its turn comes."""
    makers, calls = [], []

    def add() -> None:
        maker = Maker(case.dtype, device=machine.device, grad=case.backward, seed=len(makers))
        calls.append(case.make(maker))
        makers.append(maker)

    add()
    set_bytes = sum(leaf.nbytes for leaf in makers[0].leaves)
    for _ in range(min(math.ceil(machine.cold_bytes / set_bytes), MOST_SETS) - 1):
        add()
    first = calls[0]
    plain = TORCH[first.func]
    forms = {"torch": plain, "fused": first.func}
    if compiled:
        torch._dynamo.reset()
        forms["compile"] = torch.compile(plain, dynamic=False)
    rivals = RIVALS[first.func](first, compiled) if first.func in RIVALS else {}
    passes = _both if case.backward else _forward
    found = {name: passes(form, calls, makers) for name, form in {**forms, **rivals}.items()}
    others = [name for name in found if name not in ("torch", "fused")]
    fits = {name: unfit(found[name], found["torch"] if name in rivals else None) for name in others}
    refused = {name: why for name, why in fits.items() if why}
    left = {name: call for name, call in found.items() if name not in refused}
    return Prepared(left, refused, len(calls), set_bytes, first)


def unfit(call: OnSet, alike: OnSet | None) -> str:
    """Why a call is no contender: torch refuses it, or it computes something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = as_tuple(call(0))
    except Exception as problem:
        if "CUDA error" in str(problem):
            raise  # the device is lost, and would take the blame for all that follow
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    pairs = zip(got, as_tuple(alike(0)), strict=True) if alike else ()
    apart = [float((a.double() - b).norm() / b.double().norm()) for a, b in pairs]
    return "" if all(x < ALIKE for x in apart) else f"{OFF} {max(apart):.2g}"


def _forward(form: Callable[..., Any], calls: list["partial[Any]"], makers: Any) -> OnSet:
    def call(i: int) -> Any:
        with torch.no_grad():
            return form(*calls[i].args, **calls[i].keywords)

    return call


def _both(form: Callable[..., Any], calls: list["partial[Any]"], makers: list[Maker]) -> OnSet:
    """Forward, and the gradients of all inputs."""
    shapes = floats(calls[0]())
    # a gradient comes in the layout of its output
    upstream = [
        [
            torch.empty_like(y).copy_(c)
            for c, y in zip(cotangents(maker, shapes), shapes, strict=True)
        ]
        for maker in makers
    ]

    def call(i: int) -> Any:
        outputs = floats(form(*calls[i].args, **calls[i].keywords))
        return torch.autograd.grad(outputs, makers[i].leaves, upstream[i])

    return call


def measure(
    case: BenchCase, machine: Host, ceilings: Ceilings, *, compiled: bool = True,
    rounds: int = 21, warm_s: float = 0.2,
) -> dict[str, Any]:  # fmt: skip
    """The row: right or not, times in a graph and called from Python, memory, share of the roof."""
    wrong = error(case, machine.device)
    if not wrong.ok:
        says = f"off by {wrong.ours:.2e}, allowed is {wrong.allowed:.2e}"
        return {"ok": False, "says": says, "error": vars(wrong)}
    with fastdl.policy("fused", on_fallback="error"):
        prepared = prepare(case, machine, compiled)
        launched = fastdl.explain(prepared.first).launches
        times, calls, no_graph = _times(prepared, machine, rounds, warm_s)
        peaks = {n: machine.peak_bytes(partial(c, 0)) for n, c in prepared.calls.items()}
    flops, moved = case.flops, case.bytes
    row = {
        "ok": True, "dtype": str(case.dtype).removeprefix("torch."), "backward": case.backward,
        "bytes": moved, "flops": flops, "error": vars(wrong), "launches": [*map(str, launched)],
        "sets": prepared.sets, "calls": calls, "no_graph": no_graph,
        "refused": prepared.refused,
        "cold": prepared.sets * prepared.set_bytes >= machine.cold_bytes, "peak_bytes": peaks,
    }  # fmt: skip
    row |= {how: _summary(of_how) for how, of_how in times.items()}
    row["how"] = "graph" if "graph" in row else "python"
    us = row[row["how"]]["contenders"]["fused"]["us"]
    row["roofline"] = roof_us(flops, moved, case.dtype, ceilings) / us
    row["says"] = line(row)
    return row


def _times(prepared: Prepared, machine: Host, rounds: int, warm_s: float) -> Any:
    """Microseconds a call, by way of calling and contender."""
    timer, sets = machine.timer(), prepared.sets
    once = machine.repeated(prepared.calls["fused"], sets, sets)
    once()
    us = min(timer.finish([timer.start(once) for _ in range(3)])) / sets
    calls = min(sets * max(1, math.ceil(GRAPH_US / (us * sets))), max(MOST_CALLS, sets))
    graphs, no_graph = {}, {}
    for name, call in prepared.calls.items():
        try:
            graphs[name] = machine.captured(call, sets, calls)
        except RuntimeError as problem:
            no_graph[name] = str(problem).splitlines()[0]
    few = min(calls, max(sets, CALLS_FROM_PYTHON))
    python = {n: machine.repeated(c, sets, few) for n, c in prepared.calls.items()}
    ways = {"python": (python, few)}
    if {"torch", "fused"} <= graphs.keys():
        ways["graph"] = (graphs, calls)
    times = {}
    for how, (contenders, n) in ways.items():
        found = interleave(contenders, timer, rounds=rounds, warm_s=warm_s, settle=machine.settle)
        times[how] = {name: [us / n for us in values] for name, values in found.items()}
    return times, calls, no_graph


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios are to the fastest of torch's own calls, and to the compiled ones apart."""
    own = {n: statistics.median(t) for n, t in times.items() if n not in ("fused", "compile")}
    best = min(own, key=own.__getitem__)
    stats = summarize(times, best)
    found = {"baseline": best, "contenders": {n: s._asdict() for n, s in stats.items()}}
    for other in {"torch", "compile"} & times.keys() - {best}:
        found[f"over_{other}"] = summarize(times, other)["fused"].ratio
    return found


def roof_us(flops: float, moved: float, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """No version is faster than the slower of its arithmetic and its memory traffic."""
    rate = ceilings.matmul[str(dtype).removeprefix("torch.")]
    return 1e6 * max(flops / rate, moved / ceilings.copy)


def line(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    found, peaks = row[row["how"]], row["peak_bytes"]
    fused: Stats = Stats(**found["contenders"]["fused"])
    wrong = [name for name, why in row["refused"].items() if why.startswith(OFF)]
    parts = [
        f"{fused.us:9.1f} us",
        f"{fused.ratio:5.2f}x {found['baseline']}",
        f"{found['over_torch']:5.2f}x torch" if "over_torch" in found else "",
        f"{found['over_compile']:5.2f}x compile" if "over_compile" in found else "",
        f"{row['roofline']:4.0%} of the roof",
        f"called {row['python']['contenders']['fused']['ratio']:5.2f}x",
        f"memory {peaks['fused'] / max(peaks[found['baseline']], 1):4.2f}x",
        "" if row["how"] == "graph" else "NO GRAPH",
        "" if row["cold"] else "in L2",
        f"WRONG: {', '.join(wrong)}" if wrong else "",
    ]
    return "  ".join(part for part in parts if part)


def ceilings(machine: Host, size: int = 8192, copy_bytes: int = 1 << 30) -> Ceilings:
    """The rate of a large copy, read and write, and of a square product of random numbers."""
    timer = machine.timer()

    def best(call: Callable[[], Any], times: int = 10) -> float:
        values = interleave({"": call}, timer, rounds=times, warm_s=0.2, settle=machine.settle)
        return sorted(values[""])[times // 2] / 1e6

    with torch.no_grad():
        source = torch.ones(copy_bytes // 4, device=machine.device)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / best(lambda: target.copy_(source))
        rates = {}
        for dtype, n in ((torch.bfloat16, size), (torch.float16, size), (torch.float32, size // 2)):
            a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))
            rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(partial(torch.mm, a, b))
    return Ceilings(copy, rates)
