"""What the rows of whole models say, as lines for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]

# Steps are timed as called from Python, which is what a user waits for; graphs are told beside.
CALLED, CAPTURED = "python", "graph"


def line(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    found = row[CALLED]["eager"]
    parts = [f"eager {found['eager']['us'] / 1e3:.2f} ms"]
    for name in found:
        if name != "eager":
            less = memory(row, name, "eager")
            of_eager = "" if less is None else f", memory {1 / less:.2f}x"
            parts.append(f"{name} {found[name]['ratio']:.2f}x{of_eager}")
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
    found = stats(row, name, over, way)
    return found and found["ratio"]


def stats(row: Mapping[str, Any], name: str, over: str, way: str = CALLED) -> Any:
    """Ratios by round, median and quartiles."""
    return row.get(way, {}).get(over, {}).get(name)


def memory(row: Mapping[str, Any], name: str, over: str) -> float | None:
    """How many times less memory at the peak, where it was measured."""
    peaks = row.get("peak_bytes", {})
    return peaks[over] / peaks[name] if peaks.get(name) and peaks.get(over) else None


def table(rows: Rows) -> list[str]:
    """All contenders of all models, as far as they were measured."""
    lines = [one for name, row in rows.items() for one in _lines(name, row)]
    return [_HEAD, *lines] if lines else []


_HEAD = (
    f"{'model':36} {'contender':12} {'ms':>8} {'x eager':>8} {'quartiles':>11} {'memory':>7} "
    f"{'sites':>5} {'graphs':>6} {'breaks':>6} {'compile s':>9} {'in a graph':>10}"
)


def _lines(name: str, row: Mapping[str, Any]) -> Iterator[str]:
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
