"""Tests and timings on a GPU, in stages that can be stopped and taken up again.

    PYTHONPATH=. python bench/gpu.py [--stage exact --stage layer_norm] [--again] [--list]
    PYTHONPATH=. python bench/gpu.py --within 25 --compare results-of-last-week

Stages run in processes of their own and write bench/results/<gpu>/<stage>.json row by row.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastdl
from bench import gate, marks, model_lines
from bench.machine import Host, better_ptxas, folder_name, machine
from bench.stages import STAGES, TIMED, Context, Work, table_digest
from bench.store import RESULTS, Row, Store, provenance, read

FAILED, USAGE, UNFINISHED, SPENT = 1, 2, 3, 4

# Processes at once for rows that nobody times: compiling is most of their work.
MOST_JOBS = 8


def run_stage(
    stage: str, context: Context, store: Store, clock: Callable[[], float] = time.monotonic
) -> int:
    """Work off the rows of a stage that are not done, as far as there is time. Those that failed
    before come last. A row may leave its process unfit for others: SPENT, if there are any.
    """
    until = clock() + 60 * context.options.minutes
    code, undone = 0, 0
    again, (part, parts) = context.options.again, context.options.part
    mine = [row for i, row in enumerate(STAGES[stage].rows(context)) if i % parts == part]
    left = [row for row in mine if again or not store.done(row[0])]
    left.sort(key=lambda row: store.tried(row[0]))
    for index, (name, work) in enumerate(left):
        if clock() >= until:
            undone += 1
            continue
        if not store.done(name):
            store.put(name, {"ok": False, "says": "begun, and not finished"})
        row = guarded(work, context.machine)
        store.put(name, row)
        code = code if row["ok"] or "missing" in row else FAILED
        print(f"{stage}  {name}: {row['says']}  ({max(until - clock(), 0):.0f} s left)", flush=True)
        if row.get("fatal"):
            return FAILED
        new = any(not store.tried(name) for name, _ in left[index + 1 :])
        if row.get("spent") and new and clock() < until:
            return SPENT
    if undone:
        print(f"{stage}: no time for {undone} more; run it again to go on", flush=True)
    return code or (UNFINISHED if undone else 0)


def guarded(work: Work, machine: Host) -> Row:
    """The row, or the error as a row: the next one may run, unless the device is lost."""
    try:
        return work()
    except Exception as error:
        row = {"ok": False, "says": f"{type(error).__name__}: {error}"}
    try:
        machine.settle()
        machine.release()
    except RuntimeError:
        row["fatal"] = True
    return row


def run_all(options: argparse.Namespace, folder: Path) -> int:
    """Processes of its own for each stage: a device error in one does not reach the next."""
    before = gate.read(options.compare) if options.compare else None
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **better_ptxas()}
    end = time.monotonic() + 60 * options.within
    codes = {}
    for stage in options.stage or STAGES:
        seconds = min(60 * options.minutes, end - time.monotonic())
        if seconds <= 0:
            codes[stage] = UNFINISHED
            continue
        print(f"--- {stage}: {STAGES[stage].about}", flush=True)
        codes[stage] = run_parts(stage, options, environment, seconds)
    print(summary(folder, codes))
    bad = [code for code in codes.values() if code not in (0, UNFINISHED)]
    if before is not None:
        verdict = gate.compared(before, gate.read(folder))
        print(f"\n{verdict}")
        bad += [FAILED] * (not verdict.ok)
    return FAILED if bad else max(codes.values(), default=0)


def run_parts(
    stage: str, options: argparse.Namespace, environment: dict[str, str], seconds: float
) -> int:
    """The rows of a stage, in several processes at once where nothing is timed."""
    jobs = options.jobs or min(MOST_JOBS, max((os.cpu_count() or 2) // 2, 1))
    jobs = jobs if STAGES[stage].together else 1
    with ThreadPoolExecutor(jobs) as threads:
        running = [
            threads.submit(run_part, stage, options, environment, seconds, f"{part}/{jobs}")
            for part in range(jobs)
        ]
        codes = [one.result() for one in running]
    bad = [code for code in codes if code not in (0, UNFINISHED)]
    return max(bad or codes)


def run_part(
    stage: str, options: argparse.Namespace, environment: dict[str, str], seconds: float, part: str
) -> int:
    """One process after another, as long as they end unfit for the rows that are left."""
    until = time.monotonic() + seconds
    code = run_child(stage, options, environment, seconds, part, options.again)
    while code == SPENT:
        code = run_child(stage, options, environment, max(until - time.monotonic(), 0), part)
    return code


def run_child(
    stage: str, options: argparse.Namespace, environment: dict[str, str], seconds: float,
    part: str, again: bool = False,
) -> int:  # fmt: skip
    command = [sys.executable, __file__, "--child", stage, "--minutes", str(seconds / 60)]
    command += ["--part", part, "--out", str(options.out)] + ["--again"] * again
    command += ["--no-compile"] * options.no_compile
    try:
        # a row that was begun may finish
        return subprocess.run(command, env=environment, timeout=seconds + 90).returncode
    except subprocess.TimeoutExpired:
        print(f"{stage}: stopped; run it again to go on", flush=True)
        return UNFINISHED


def summary(folder: Path, codes: dict[str, int]) -> str:
    """All stages that were asked for, rows that failed first, then the timings and the marks."""
    lines = ["", f"{'stage':12} {'rows':>5} {'failed':>7}"]
    timings, tables = [], {}
    for stage, code in codes.items():
        table = tables[stage] = (read(folder / f"{stage}.json") or {"rows": {}})["rows"]
        failed = [f"  {name}: {row['says']}" for name, row in table.items() if not row["ok"]]
        state = {0: "", UNFINISHED: "not finished"}.get(code, "FAILED")
        lines += [f"{stage:12} {len(table):5} {len(failed):7}  {state}", *failed]
        timings += [
            f"{stage:12} {name:36} {row['says']}" for name, row in table.items() if "passes" in row
        ]
    if "models" in tables:
        timings += ["", *model_lines.table(tables["models"])]
    if tables.keys() & set(TIMED):
        timings += ["", *map(str, marks.table(tables))]
    return "\n".join([*lines, "", *timings])


def listing(context: Context) -> str:
    lines = []
    for stage in context.options.stage or STAGES:
        names = [name for name, _ in STAGES[stage].rows(context)]
        lines += [f"{stage} ({len(names)} rows): {STAGES[stage].about}"]
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument("--list", action="store_true", help="say what would run; needs no GPU")
    parser.add_argument("--minutes", type=float, default=8, help="for each stage; default: 8")
    parser.add_argument("--within", type=float, default=math.inf, help="minutes for all stages")
    parser.add_argument("--jobs", type=int, help="processes at once where nothing is timed")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: bench/results")
    worse = "earlier results, a file or a folder: fail where a ratio got worse than noise allows"
    parser.add_argument("--compare", type=Path, metavar="OLD", help=worse)
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=_part, default=(0, 1), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    context = Context(machine(), options)
    if options.list:
        print(listing(context))
        return 0
    if not context.machine.is_gpu:
        print("gpu: torch sees no GPU; --list shows what would run on one", file=sys.stderr)
        return USAGE
    folder = options.out / folder_name(context.machine.name)
    if options.child is None:
        try:
            return run_all(options, folder)
        except gate.GateError as error:
            print(f"gate: {error}", file=sys.stderr)
            return USAGE
    run = provenance(json.loads(fastdl.env().to_json()))
    if options.child in TIMED:
        run["tuned"] = table_digest(context.machine.name)
    return run_stage(options.child, context, Store(folder, options.child, run))


if __name__ == "__main__":
    sys.exit(main())
