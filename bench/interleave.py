"""Contenders timed in turn, A B A B: a drift of clocks and power meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Call = Callable[[], Any]


class Timer(NamedTuple):
    """`start` runs a call and returns a mark; `finish` turns all marks into microseconds."""

    start: Callable[[Call], Any]
    finish: Callable[[list[Any]], list[float]]


class Stats(NamedTuple):
    """Of one contender. `ratio` is the baseline's time over its own: above 1 is faster."""

    us: float
    ratio: float
    low: float
    high: float
    drift: float


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    rounds: int = 21,
    warm_s: float = 0.2,
    clock: Callable[[], float] = time.monotonic,
    settle: Call = lambda: None,
) -> dict[str, list[float]]:
    """Microseconds of each call in each round. Clocks and power get `warm_s` to settle before."""
    until = clock() + warm_s
    while True:
        for call in calls.values():
            call()
        settle()
        if clock() >= until:
            break
    marks: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            marks[name].append(timer.start(call))
    return {name: timer.finish(of_one) for name, of_one in marks.items()}


def summarize(times: Mapping[str, list[float]], baseline: str) -> dict[str, Stats]:
    """Medians, and median and quartiles of the ratios by round: a drift does not touch those."""
    return {name: _stats(values, times[baseline]) for name, values in times.items()}


def _stats(values: list[float], baseline: list[float]) -> Stats:
    ratios = [b / v for b, v in zip(baseline, values, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    third = max(len(values) // 3, 1)
    drift = statistics.median(values[-third:]) / statistics.median(values[:third])
    return Stats(statistics.median(values), statistics.median(ratios), low, high, drift)


def host_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Wall clock, for calls that have done their work when they return."""

    def start(call: Call) -> float:
        before = clock()
        call()
        return 1e6 * (clock() - before)

    return Timer(start, list)
