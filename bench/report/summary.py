"""Results in short: lines for the terminal and for README, which say the same."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from bench.report.models import CALLED, EAGER, OURS, memory
from bench.report.results import Against, Checked, Machine, Timed, against, by, geometric, times
from fastdl.contract import SPECS, STEPS

NOT_MEASURED = "not measured"


class Table(NamedTuple):
    head: Sequence[str]
    rows: list[tuple[str, ...]]


SPEED = ("op", "cases", "× torch's fastest call", "× torch.compile", "of the roof", "memory")


def speed(machine: Machine) -> Table:
    """A line an op: geometric means over its cases and passes, with the worst and the best."""
    timed = by(machine.timed, lambda one: one.op)
    ops = dict.fromkeys((*SPECS, *STEPS, *timed))
    return Table(SPEED, [_speed(op, timed.get(op, [])) for op in ops])


def _speed(op: str, timed: list[Timed]) -> tuple[str, ...]:
    shares = [r for one in timed if (r := one.counted.rates.get("roofline")) is not None]
    peaks = [
        over
        for one in timed
        for part in one.passes.values()
        if (over := part.memory(part.way.baseline))
    ]
    return (
        op, str(len(timed)), *(_mean(list(against(timed, compiled))) for compiled in (False, True)),
        f"{statistics.median(shares):.0%}" if shares else NOT_MEASURED,
        times(geometric(peaks)) if peaks else NOT_MEASURED,
    )  # fmt: skip


def _mean(found: list[Against]) -> str:
    ratios = [one.ratio.ratio for one in found]
    if not ratios:
        return NOT_MEASURED
    return f"{times(geometric(ratios))} ({min(ratios):.2f} to {max(ratios):.2f})"


CASES = ("case", "pass", "us", "× torch's fastest", "over", "× compile", "of the roof", "memory")


def cases(timed: list[Timed]) -> Table:
    """A line a case and pass."""
    rows = []
    for one in timed:
        for part in one.passes.values():
            way, share = part.way, part.rates.get("roofline")
            over, peak = way.over.get("compile"), part.memory(way.baseline)
            rows.append((
                one.case, part.name, f"{way.ours.us:.1f}", times(way.ours.ratio), way.baseline,
                times(over.ratio) if over else "-", "-" if share is None else f"{share:.0%}",
                "-" if peak is None else times(peak),
            ))  # fmt: skip
    return Table(CASES, rows)


MODELS = ("model", "eager ms", "modules", "graph", "torch.compile", "graph, then inductor",
          "memory of modules")  # fmt: skip


def models(machine: Machine) -> Table:
    """A line a model: how many times as fast as eager, called from Python."""
    rows = []
    for model in machine.models:
        stats, peak = model.ways[CALLED][EAGER], memory(model, OURS[0])
        names = ("modules", "graph", "compile", "then compile")
        ratios = (times(stats[n].ratio) if n in stats else NOT_MEASURED for n in names)
        rows.append((
            model.name, f"{stats[EAGER].us / 1e3:.2f}", *ratios,
            NOT_MEASURED if peak is None else times(peak),
        ))  # fmt: skip
    return Table(MODELS, rows)


ACCURACY = ("dtype", "ops", "output: median", "largest", "gradient: median", "largest",
            "within what is allowed")  # fmt: skip


def accuracy(machine: Machine) -> Table:
    """A line a dtype: our error against float64 over torch's."""
    rows = []
    for dtype, same in by(machine.checked, lambda one: one.dtype).items():
        right = sum(not one.failures for one in same)
        cells = [cell for what in ("forward", "gradient") for cell in _over(same, what)]
        rows.append((dtype, str(len(same)), *cells, f"{right} of {len(same)}"))
    return Table(ACCURACY, rows)


def _over(same: list[Checked], what: str) -> tuple[str, str]:
    pairs = [getattr(one, what) for one in same]
    ratios = [errors.ours / errors.torch for errors in pairs if errors.torch]
    if not ratios:
        return NOT_MEASURED, NOT_MEASURED
    return times(statistics.median(ratios)), times(max(ratios))
