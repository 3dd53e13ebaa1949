"""The pass marks, as `bench.marks` tells them, fit to be shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import marks

KINDS = {"met": "done", "missed": "undone", "open": "kept"}


class Mark(NamedTuple):
    mark: str
    required: str
    measured: str
    verdict: str
    reason: str

    @property
    def kind(self) -> str:
        """As the page's style calls the verdict."""
        return KINDS.get(self.verdict, "dim")


def of(folder: Path) -> list[Mark]:
    """Each mark with its verdict for what was measured in this folder."""
    told = getattr(marks, "table", None)
    return [_mark(row) for row in told(folder)] if told else []


def _mark(row: Sequence[object]) -> Mark:
    return Mark(*("" if value is None else str(value) for value in row))
