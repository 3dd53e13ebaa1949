"""What the command line shows: drawn by rich on a terminal that has it, else plain lines."""

import importlib.util
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\s?(x|%|us|ms|s|MB)?|nan|inf|-|")
_BAD = re.compile(r"\b(FAIL|failed|differs?|missing|wrong|too large)\b")

# Lines in a pipe come this many seconds apart, so that a log stays short.
INTERVAL = 10.0


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, those of numbers flush right."""
    right = numeric(head, rows)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def numeric(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers and nothing else."""
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    return [any(column) and all(map(_NUMBER.fullmatch, column)) for column in columns]


def show(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table."""
    console = _console()
    widths, gap = _widths(head, rows, console.width - 2) if console else (None, 0)
    if console is None or widths is None:
        print("\n".join([*filter(None, [title]), *lines(head, rows)]))
        return
    from rich import box
    from rich.table import Table

    if title:
        console.print(f"\n[bold]{title}")
    padding = (0, gap - 1, 0, 0)
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, header_style="cyan")
    for name, flush, width in zip(head, numeric(head, rows), widths, strict=True):
        table.add_column(name, justify="right" if flush else "left", width=width)
    for row in rows:
        table.add_row(*map(_coloured, row))
    console.print(table)


def _widths(
    head: Sequence[str], rows: Sequence[Sequence[str]], available: int
) -> tuple[list[int] | None, int]:
    """Widths and gaps of columns that fit in, with cells broken between words. None: none do."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    words = [max(len(w) for cell in cells for w in cell.split() or [""]) for cells in columns]
    gap = 2 if sum(words) + 2 * len(words) <= available else 1
    while sum(widths) + gap * len(widths) > available:
        spare, widest = max((width - words[i], i) for i, width in enumerate(widths))
        if not spare:
            return None, gap
        widths[widest] -= 1
    return widths, gap


def _coloured(cell: str) -> Any:
    from rich.text import Text

    style = "red" if _BAD.search(cell) else "green" if cell in ("ok", "yes", "fused") else ""
    return Text(cell, style)


def heading(text: str) -> None:
    """Print a heading, with an empty line before it."""
    console = _console()
    if console is None:
        print(f"\n{text}\n{'-' * len(text)}")
        return
    print()
    console.rule(f"[bold]{text}", align="left", style="cyan")


def paragraph(text: str) -> None:
    """Print text, on a terminal with its long lines wrapped between words."""
    if not sys.stdout.isatty():
        print(text)
        return
    width = shutil.get_terminal_size().columns
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print("\n".join(textwrap.wrap(line, width, subsequent_indent=indent)) or line)


def _console() -> Any:
    """rich's console, or None where output is not a terminal or rich is not installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(highlight=False)


class Progress:
    """How far long work is, on stderr: one line rewritten, or in a pipe a line now and then."""

    def __init__(
        self,
        what: str,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.file, self.clock = what, file or sys.stderr, clock
        self.begun = self.said = clock()
        self.on_terminal = self.file.isatty()

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        now = self.clock()
        if now - self.said < (0.1 if self.on_terminal else INTERVAL):
            return
        self.said = now
        left = (now - self.begun) / max(done, 1) * (total - done)
        self._write(f"{self.what}: {done} of {total}, {duration(left)} left  {detail}".rstrip())

    def line(self, text: str) -> None:
        """A line that stays."""
        self.file.write(f"\r\x1b[K{text}\n" if self.on_terminal else f"{text}\n")
        self.file.flush()

    def _write(self, text: str) -> None:
        if self.on_terminal:
            text = "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1]
        else:
            text += "\n"
        self.file.write(text)
        self.file.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.on_terminal:
            self.file.write("\r\x1b[K")
            self.file.flush()


def progress(what: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
    """How far a call is that nobody asked to report: shown on a terminal, and nowhere else."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    return Progress(what) if shown else nullcontext(silent)


def silent(done: int, total: int, detail: str = "") -> None:
    """Progress that nobody sees."""


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
