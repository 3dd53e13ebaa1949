"""What the rows of whole models say: a line for each, and whether the marks are met."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

Rows = Mapping[str, Mapping[str, Any]]

# Steps are timed as called from Python, which is what a user waits for; graphs are told beside.
CALLED, CAPTURED = "python", "graph"


class Mark(NamedTuple):
    """The geometric mean over all models that a contender must reach over another."""

    contender: str
    over: str
    least: float


MARKS = (
    Mark("modules", "eager", 1.5),
    Mark("graph", "eager", 1.5),
    Mark("then compile", "compile", 1.1),
)

# These may be slower than eager, or take more memory, on no model.
NEVER_WORSE = ("modules", "graph", "then compile")


def line(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    stats = row[CALLED]["eager"]
    parts = [f"eager {stats['eager']['us'] / 1e3:.2f} ms"]
    for name in stats:
        if name != "eager":
            less = memory(row, name, "eager")
            of_eager = "" if less is None else f", memory {1 / less:.2f}x"
            parts.append(f"{name} {stats[name]['ratio']:.2f}x{of_eager}")
    both = faster(row, "then compile", "compile")
    parts += [
        "" if both is None else f"then compile over compile {both:.2f}x",
        f"proof: {row['proof']}",
        *(f"NO GRAPH of {name}: {why}" for name, why in row["no_graph"].items()),
        f"RECOMPILED {row['recompiled']} graphs" if row["recompiled"] else "",
        *(f"no {name}: {why}" for name, why in row["refused"].items()),
    ]
    return "; ".join(part for part in parts if part)


def faster(row: Mapping[str, Any], name: str, over: str, way: str = CALLED) -> float | None:
    """How many times as fast, where both were measured."""
    found = _stats(row, name, over, way)
    return found and found["ratio"]


def _stats(row: Mapping[str, Any], name: str, over: str, way: str = CALLED) -> Any:
    return row.get(way, {}).get(over, {}).get(name)


def memory(row: Mapping[str, Any], name: str, over: str) -> float | None:
    """How many times less memory at the peak, where it was measured."""
    peaks = row.get("peak_bytes", {})
    return peaks[over] / peaks[name] if peaks.get(name) and peaks.get(over) else None


def summary(rows: Rows, planned: Collection[str]) -> list[str]:
    """A table of all contenders, then the marks: from what was measured, or not at all."""
    rows = {name: row for name, row in rows.items() if name in planned}
    lines = [_HEAD, *(one for name, row in rows.items() for one in _table(name, row))]
    return [*(lines if len(lines) > 1 else []), "", *_marks(rows, len(planned))]


_HEAD = (
    f"{'model':36} {'contender':12} {'ms':>8} {'x eager':>8} {'quartiles':>11} {'memory':>7} "
    f"{'sites':>5} {'graphs':>6} {'breaks':>6} {'compile s':>9} {'in a graph':>10}"
)


def _table(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    for contender, s in row.get(CALLED, {}).get("eager", {}).items():
        facts, less = row["contenders"][contender], memory(row, contender, "eager")
        captured = faster(row, contender, "eager", CAPTURED)
        cells = (
            f"{name:36}", f"{contender:12}", f"{s['us'] / 1e3:8.2f}", f"{s['ratio']:8.2f}",
            f"{s['low']:5.2f} {s['high']:5.2f}", "      -" if less is None else f"{1 / less:7.2f}",
            f"{facts['sites']:5}", f"{facts['graphs']:6}", f"{facts['breaks']:6}",
            f"{facts['compile_s']:9.1f}", "         -" if captured is None else f"{captured:10.2f}",
        )  # fmt: skip
        yield " ".join(cells)


def _marks(rows: Rows, planned: int) -> Iterator[str]:
    for name in NEVER_WORSE:
        yield _never(f"{name} is never slower than eager", name, rows, planned, _slower)
    for mark in MARKS:
        yield _mean(f"{mark.contender} over {mark.over}", mark, rows, planned, faster)
        captured = _values(mark, rows, partial(faster, way=CAPTURED))
        yield f"  as CUDA graphs: {_figure(captured, planned)}"
    for name in NEVER_WORSE:
        yield _never(f"{name} never takes more memory", name, rows, planned, _larger)
    for mark in MARKS:
        yield _mean(f"memory of {mark.over} over {mark.contender}", mark, rows, planned, memory)


def _never(
    what: str, contender: str, rows: Rows, planned: int,
    worse: Callable[[Mapping[str, Any], str], tuple[float, bool] | None],
) -> str:  # fmt: skip
    found = {name: of for name, row in rows.items() if (of := worse(row, contender)) is not None}
    bad = [f"{name} ({ratio:.3f}x)" for name, (ratio, is_worse) in found.items() if is_worse]
    verdict = _verdict(not bad, len(found), planned)
    return f"{what}: {', '.join([verdict, *bad])}"


def _slower(row: Mapping[str, Any], name: str) -> tuple[float, bool] | None:
    """Slower is what is slower in three of four rounds: less is noise."""
    found = _stats(row, name, "eager")
    return found and (found["ratio"], found["high"] < 1)


def _larger(row: Mapping[str, Any], name: str) -> tuple[float, bool] | None:
    less = memory(row, name, "eager")
    return None if less is None else (1 / less, less < 1)


def _mean(
    what: str, mark: Mark, rows: Rows, planned: int, ratio: Callable[..., float | None]
) -> str:
    values = _values(mark, rows, ratio)
    verdict = _verdict(_geometric(values) >= mark.least, len(values), planned)
    return f"{what}, at least {mark.least}x: {verdict}, {_figure(values, planned)}"


def _values(mark: Mark, rows: Rows, ratio: Callable[..., float | None]) -> list[float]:
    found = [ratio(row, mark.contender, mark.over) for row in rows.values()]
    return [value for value in found if value is not None]


def _figure(values: list[float], planned: int) -> str:
    if not values:
        return "not measured"
    return f"geometric mean {_geometric(values):.3f}x over {len(values)} of {planned} rows"


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _verdict(good: bool, measured: int, planned: int) -> str:
    """No mark is met before every model was measured."""
    if not measured:
        return "not measured"
    if measured < planned:
        return f"open, {measured} of {planned} rows" + ("" if good else ", so far missed")
    return "met" if good else "missed"
