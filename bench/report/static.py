"""Results that need no GPU: errors in Triton's interpreter, and machine code for GPUs not here.

    python -m bench.report.static check [OP ...]

Each stage runs in a process of its own: one needs the interpreter, the other the compiler.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fastdl
from bench.store import RESULTS, ROOT, Row, Store, provenance
from fastdl.contract import SPECS, STEPS
from fastdl.targets.table import HEADER

FOLDER = "static"


class Stage(NamedTuple):
    """What makes the row of an op, which ops have one, and whether kernels are interpreted."""

    work: Callable[[str], Row]
    ops: tuple[str, ...]
    interpreted: bool


def checked(op: str, **options: Any) -> Row:
    """Errors against float64, ours and torch's. Options are those of fastdl.check."""
    report = fastdl.check([op], **options)
    failures = [failure for row in report.rows for failure in row.failures]
    says = "; ".join(failures) or "ok"
    return {"ok": report.ok, "says": says, "report": json.loads(report.to_json())}


def compiled(op: str) -> Row:
    """What the compiler makes of an op's kernels: a line a binary."""
    found = fastdl.targets([op])
    says = f"{len(found.rows)} binaries, {len(found.failures)} failures"
    binaries = [row.cells() for row in found.rows]
    return {"ok": found.ok, "says": says, "head": HEADER, "binaries": binaries}


STAGES = {
    "check": Stage(checked, tuple(SPECS), True),
    "targets": Stage(compiled, (*SPECS, *STEPS), False),
}


def work_off(name: str, ops: Iterable[str], results: Path) -> bool:
    """The rows that are not there, or not of this very code. Whether all are right."""
    stage = STAGES[name]
    store = Store(results / FOLDER, name, provenance(json.loads(fastdl.env().to_json())))
    for op in ops or stage.ops:
        if not store.done(op):
            store.put(op, stage.work(op))
            print(f"{name} {op}: {store.table['rows'][op]['says']}", flush=True)
    return all(store.done(op) for op in ops or stage.ops)


def make(results: Path) -> bool:
    """All stages, each in a process of its own."""
    right = [_child(name, results) for name in STAGES]
    return all(right)


def _child(name: str, results: Path) -> bool:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if STAGES[name].interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", __spec__.name, name, "--results", str(results)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("op", nargs="*", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: bench/results")
    options = parser.parse_args(argv)
    return 0 if work_off(options.stage, options.op, options.results) else 1


if __name__ == "__main__":
    sys.exit(main())
