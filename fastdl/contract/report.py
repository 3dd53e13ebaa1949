"""`fastdl.check`: the contract on the user's machine, as a table of errors against fp64."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from ..ops import _launch
from . import SPECS
from .case import DTYPES, Spec
from .checks import CHECKS, cases_of
from .evaluate import Error, accuracy
from .traffic import ALLOWED, passes

Progress = Callable[[int, int, str], None]


@dataclass
class Row:
    """One op in one dtype: the worst errors over its cases, and what failed."""

    op: str
    dtype: str
    cases: int
    forward: Error
    gradient: Error
    # bytes moved over the least possible, forward and backward, where they are counted
    moved: tuple[float, float] | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures


@dataclass
class CheckReport:
    """The accuracy table."""

    device: str
    interpreted: bool
    rows: list[Row]

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1)

    def table(self) -> list[tuple[str, ...]]:
        head = ("op", "dtype", "cases", "forward", "torch's", "gradient", "torch's", "bytes", "")
        return [head] + [
            (
                row.op,
                row.dtype,
                str(row.cases),
                *(f"{e:.1e}" for e in (row.forward.ours, row.forward.definition)),
                *(f"{e:.1e}" for e in (row.gradient.ours, row.gradient.definition)),
                "not counted" if row.moved is None else "{:.2f} {:.2f}".format(*row.moved),
                "ok" if row.ok else f"{len(row.failures)} failed",
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        where = "Triton's interpreter" if self.interpreted else self.device
        lines.append(
            f"Largest errors against float64, ours and torch's in the same dtype, in {where}."
        )
        if self.interpreted:
            lines.append(
                "Bytes are those moved over the least possible, forward and backward, where one pass is enough."
            )
        lines += [
            f"{row.op} {row.dtype}: {failure}" for row in self.rows for failure in row.failures
        ]
        return "\n".join(lines)


def check(
    ops: Sequence[str] | None = None,
    device: str | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    thorough: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Hold ops against their contract: accuracy in each dtype and exact integers; with `thorough`, every check."""
    device = device or ("cuda" if torch.cuda.is_available() and not _launch.INTERPRETED else "cpu")
    if device == "cpu" and not _launch.INTERPRETED:
        raise RuntimeError(
            "check: kernels run on a GPU, or with TRITON_INTERPRET=1 set before Python starts, on a CPU"
        )
    specs = [_spec(op) for op in dict.fromkeys(ops or SPECS)]
    todo = [(spec, dtype) for spec in specs for dtype in dtypes]
    steps = sum(len(spec.cases) + len(cases_of(spec, "one_pass")) for spec, _ in todo)
    if thorough:
        steps += sum(1 for spec in specs for _ in _other_checks(spec, device))
    tick = _Ticker(progress, steps)
    rows = [_row(spec, dtype, device, tick) for spec, dtype in todo]
    if thorough:
        for spec, row in zip(specs, rows[:: len(dtypes)], strict=True):
            row.failures += _failures(_other_checks(spec, device), tick)
    return CheckReport(device, _launch.INTERPRETED, rows)


def _spec(op: str) -> Spec:
    if op not in SPECS:
        raise ValueError(f"check: no op named {op!r}; there are {', '.join(SPECS)}")
    return SPECS[op]


class _Ticker:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _row(spec: Spec, dtype: torch.dtype, device: str, tick: _Ticker) -> Row:
    name = str(dtype).removeprefix("torch.")
    row = Row(spec.name, name, len(spec.cases), Error(), Error())
    for case in spec.cases:
        tick(f"{spec.name} {name} {case.name}")
        try:
            forward, gradient = accuracy(case, dtype, device)
            if case.exact:
                CHECKS["exact"].function(spec, case, device, dtype)
        except Exception as error:
            row.failures.append(f"{case.name}: {error}")
            continue
        row.forward, row.gradient = row.forward.worst(forward), row.gradient.worst(gradient)
        for what, found in (("output", forward), ("gradient", gradient)):
            if not found.ok:
                row.failures.append(
                    f"{case.name}: {what} off by {found.ours:.2e}, allowed {found.allowed:.2e}"
                )
    _count(row, spec, dtype, tick)
    return row


def _count(row: Row, spec: Spec, dtype: torch.dtype, tick: _Ticker) -> None:
    """The worst ratios of bytes over the cases that are one pass."""
    for case in cases_of(spec, "one_pass"):
        tick(f"{spec.name} {row.dtype} bytes of {case.name}")
        try:
            found = passes(case, dtype)
        except Exception as error:
            row.failures.append(f"bytes of {case.name}: {error}")
            continue
        forward, backward = row.moved or (0.0, 0.0)
        row.moved = max(forward, found[0]), max(backward, found[1])
        if max(found) > ALLOWED:
            row.failures.append(f"{case.name}: moves {max(found):.2f} times the bytes that it must")


Step = tuple[str, Callable[[], None]]


def _other_checks(spec: Spec, device: str) -> Iterator[Step]:
    for check in CHECKS.values():
        if check.scope == "op":
            yield check.name, partial(check.function, spec, device)
        elif check.name not in ("accurate", "exact", "moved_once"):
            for case in cases_of(spec, check.scope):
                for args in [[dtype] for dtype in check.dtypes] or [[]]:
                    step = partial(check.function, spec, case, device, *args)
                    yield f"{check.name}, {case.name}", step


def _failures(steps: Iterator[Step], tick: _Ticker) -> list[str]:
    failures = []
    for name, step in steps:
        tick(name)
        try:
            step()
        except Exception as error:
            failures.append(f"{name}: {error}")
    return failures
