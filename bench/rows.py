"""One row of the benchmark: a case in all its passes, timed as fused and as all others have it."""

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config

import fastdl
from bench.contenders import OFF, OWN, Prepared, prepare, reason
from bench.error import error
from bench.interleave import Stats, interleave, summarize
from bench.machine import Host
from bench.passes import Inputs, Pass, passes_of
from fastdl.contract import SPECS, BenchCase

# One graph is at least this long, and has at most so many calls.
GRAPH_US, MOST_CALLS, CALLS_FROM_PYTHON = 1000.0, 512, 50

# The definition is not timed where one call takes longer than this, and so many times torch's.
LONG_US, SLOW = 5_000.0, 10

# A time that changes by more than this from the first third of the rounds to the last is told.
DRIFT = 0.05


class Ceilings(NamedTuple):
    """What this GPU does at best, measured in the same run: bytes and, by dtype, flops a second."""

    copy: float
    matmul: dict[str, float]


class Times(NamedTuple):
    """Microseconds a call, by way of calling, contender and round, and bytes by contender."""

    us: dict[str, dict[str, list[float]]]
    calls: int
    no_graph: dict[str, str]
    peaks: dict[str, int]


def measure(
    case: BenchCase, machine: Host, ceilings: Ceilings, *, compiled: bool = True,
    rounds: int = 21, warm_s: float = 0.2,
) -> dict[str, Any]:  # fmt: skip
    """The row: right or not, times in a graph and called from Python, memory, share of the roof."""
    wrong = error(case, machine.device)
    if not wrong.ok:
        says = f"off by {wrong.ours:.2e}, allowed is {wrong.allowed:.2e}"
        return {"ok": False, "says": says, "error": vars(wrong)}
    inputs = Inputs(case, machine)
    refused: dict[str, str] = {}
    passes = {}
    with fastdl.policy("fused", on_fallback="error"):
        explained = fastdl.explain(inputs.first)
        for what in passes_of(case):
            with retained(what):
                prepared = prepare(case, machine, inputs, what, compiled)
                times = timed(prepared, machine, rounds, warm_s)
            for name, why in prepared.refused.items():
                refused.setdefault(name, why if what != "backward" else f"backward: {why}")
            passes[what] = summary(times)
            del prepared
            machine.release()
    row = {
        "ok": True, "op": op_of(case, inputs), "dtype": str(case.dtype).removeprefix("torch."),
        "backward": case.backward, "shapes": inputs.shapes, "seeds": inputs.seeds,
        "bytes": case.bytes, "flops": case.flops, "error": vars(wrong), **told(explained),
        "sets": len(inputs), "cold": inputs.cold, "refused": refused,
        "ceilings": ceilings._asdict(), "passes": passes,
    }  # fmt: skip
    return finished(row, ceilings)


def retained(what: str) -> Any:
    """What torch.compile's forward keeps is there for more than one backward pass."""
    if what != "backward":
        return contextlib.nullcontext()
    return torch._functorch.config.patch(donated_buffer=False)


def op_of(case: BenchCase, inputs: Inputs) -> str:
    found = (spec.name for spec in SPECS.values() if case in spec.bench)
    return next(found, inputs.first.func.__name__)


def told(explained: Any) -> dict[str, Any]:
    """Who computed an op, and with which launches."""
    launches = [str(launch) for launch in explained.launches]
    route = [line for line in str(explained).splitlines() if line.strip() not in launches]
    return {"launches": launches, "route": "; ".join(route)}


def finished(row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """With rates of the fused form, of the pass whose bytes and flops are counted."""
    counted = next(iter(row["passes"].values()))
    us = counted[counted["how"]]["contenders"]["fused"]["us"]
    counted |= rates(row["flops"], row["bytes"], row["dtype"], us, ceilings)
    return {**row, "says": line(row)}


def rates(
    flops: float, moved: float, dtype: str, us: float, ceilings: Ceilings
) -> dict[str, float]:
    """Of a call that takes so long. `roofline` is its share of what the GPU does at best: no
    version is faster than the slower of its arithmetic and its memory traffic.
    """
    roof_us = 1e6 * max(flops / ceilings.matmul[dtype], moved / ceilings.copy)
    return {"tflops": flops / us / 1e6, "gb_per_s": moved / us / 1e3, "roofline": roof_us / us}


def timed(prepared: Prepared, machine: Host, rounds: int, warm_s: float) -> Times:
    """All contenders in turn, captured and called. What one keeps is let go before the next way."""
    sets, timer = len(prepared.inputs), machine.timer()

    def look(call: Pass) -> float:
        """Microseconds of a call, roughly."""
        once = machine.repeated(call, sets, sets)
        once()
        us = min(timer.finish([timer.start(once) for _ in range(3)])) / sets
        call.forget()
        return us

    def turns(calls: Mapping[str, Callable[[], Any]], n: int) -> dict[str, list[float]]:
        found = interleave(calls, timer, rounds=rounds, warm_s=warm_s, settle=machine.settle)
        return {name: [us / n for us in values] for name, values in found.items()}

    us = look(prepared.calls["fused"])
    _leave_out_slow(prepared, look, machine)
    prepared.forget()
    calls = min(sets * max(1, math.ceil(GRAPH_US / (us * sets))), max(MOST_CALLS, sets))
    graphs, no_graph = _captured(prepared, machine, sets, calls)
    found = {}
    if {"torch", "fused"} <= graphs.keys():
        found["graph"] = turns(graphs, calls)
    graphs.clear()
    prepared.forget()
    machine.release()
    few = min(calls, max(sets, CALLS_FROM_PYTHON))
    found["python"] = turns(_called(prepared, machine, sets, few), few)
    peaks = {name: machine.peak_bytes(partial(call, 0)) for name, call in prepared.calls.items()}
    prepared.forget()
    return Times(found, calls, no_graph, peaks)


def _leave_out_slow(prepared: Prepared, look: Callable[[Pass], float], machine: Host) -> None:
    """A definition that takes minutes to time tells nobody anything."""
    if "definition" not in prepared.calls:
        return
    try:
        us = look(prepared.calls["definition"])
        times = us / look(prepared.calls["torch"]) if us > LONG_US else 0
        why = f"{times:.0f} times as slow as torch, not timed" if times > SLOW else ""
    except RuntimeError as problem:
        why = reason(problem)
    if why:
        prepared.refused["definition"] = why
        del prepared.calls["definition"]
        machine.release()


def _captured(
    prepared: Prepared, machine: Host, sets: int, calls: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """A CUDA graph of each contender, and why others have none."""
    graphs, no_graph = {}, {}
    for name, call in prepared.calls.items():
        try:
            graphs[name] = machine.captured(call, sets, calls)
        except RuntimeError as problem:
            no_graph[name] = str(problem).splitlines()[0]
        if name in no_graph:
            call.forget()
            machine.release()
    return graphs, no_graph


def _called(prepared: Prepared, machine: Host, sets: int, few: int) -> dict[str, Callable[[], Any]]:
    """Calls from Python, each tried once beside what the others keep: memory may not do for all."""
    found = {}
    for name, call in [*prepared.calls.items()]:
        run = machine.repeated(call, sets, few)
        try:
            run()
            machine.settle()
            found[name] = run
        except RuntimeError as problem:
            if name in ("torch", "fused"):
                raise
            prepared.refused[name] = reason(problem)
        if name not in found:
            prepared.calls.pop(name).forget()
            machine.release()
    return found


def summary(times: Times) -> dict[str, Any]:
    """A pass, without its rates."""
    ways = {how: _compared(us) for how, us in times.us.items()}
    how = "graph" if "graph" in ways else "python"
    return {
        "how": how, "calls": times.calls, "no_graph": times.no_graph, **ways,
        "peak_bytes": times.peaks,
    }  # fmt: skip


def _compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios of all to the fastest of torch's own calls, and of the fused form to each."""
    own = {name: statistics.median(us) for name, us in times.items() if name in OWN}
    best = min(own, key=own.__getitem__)
    stats = summarize(times, best)
    over = {name: summarize(times, name)["fused"] for name in times if name != "fused"}
    return {
        "baseline": best,
        "contenders": {name: of._asdict() for name, of in stats.items()},
        "over": {name: {k: getattr(of, k) for k in ("ratio", "low", "high")}
                 for name, of in over.items()},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    first, *others = row["passes"].items()
    wrong = [name for name, why in row["refused"].items() if OFF in why]
    parts = [
        *_line(first[1]),
        *(f"{name}: {'  '.join(_line(found))}" for name, found in others),
        "" if row["cold"] else "in L2",
        f"WRONG: {', '.join(wrong)}" if wrong else "",
    ]
    return "  ".join(part for part in parts if part)


def _line(found: dict[str, Any]) -> list[str]:
    """Of one pass."""
    way, peaks = found[found["how"]], found["peak_bytes"]
    fused, base, over = Stats(**way["contenders"]["fused"]), way["baseline"], way["over"]
    python = found["python"]
    called = python["over"]
    beside = [name for name in over if name not in OWN or name == "torch"]
    parts = [
        f"{fused.us:9.1f} us",
        f"{fused.ratio:5.2f}x {base}",
        *(f"{over[name]['ratio']:5.2f}x {name}" for name in beside if name != base),
        f"{found['roofline']:4.0%} of the roof" if "roofline" in found else "",
        f"called {called[base]['ratio']:5.2f}x" if base in called and way is not python else "",
        f"memory {peaks['fused'] / max(peaks[base], 1):4.2f}x" if base in peaks else "",
        "NO GRAPH" if found["no_graph"].keys() & {"torch", "fused"} else "",
        drifted(way["contenders"], ("fused", base)),
    ]
    return [part for part in parts if part]


def drifted(contenders: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> str:
    """Times that changed while they were measured: ratios by round do not see it, `us` does."""
    apart = {name: contenders[name]["drift"] - 1 for name in names}
    told = [f"{name} {by:+.0%}" for name, by in apart.items() if abs(by) > DRIFT]
    return f"DRIFT of {', '.join(told)}" if told else ""


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
