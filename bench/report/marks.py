"""The marks, for what was measured in a folder of results."""

from pathlib import Path
from typing import Any

from bench.marks import MARKS, Verdict, judged, planned
from bench.store import read

KINDS = {"met": "done", "missed": "undone", "open": "kept"}


def of(folder: Path) -> list[Verdict]:
    """Each mark with its verdict."""
    stages = {mark.stage for mark in MARKS}
    tables = {stage: _rows(folder / f"{stage}.json") for stage in stages}
    return [_judged(mark, tables[mark.stage]) for mark in MARKS]


def kind(verdict: Verdict) -> str:
    """As the page's style calls it."""
    return KINDS.get(verdict.verdict, "dim")


def _rows(path: Path) -> dict[str, Any]:
    table = read(path)
    rows = table["rows"] if table else {}
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def _judged(mark: Any, rows: dict[str, Any]) -> Verdict:
    try:
        return judged(mark, rows, planned(mark))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return judged(mark, {}, [])._replace(reason=f"rows of {mark.stage} are damaged: {error!r}")
