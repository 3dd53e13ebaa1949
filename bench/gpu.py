"""Tests and timings on a GPU, in stages that can be stopped and taken up again.

    PYTHONPATH=. python bench/gpu.py [--stage exact --stage layer_norm] [--again] [--list]

Each stage runs in a process of its own and writes bench/results/<gpu>/<stage>.json row by row.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import fastdl
from bench import marks, models, rows, steps
from bench.exact import check_exact, exact_cases
from bench.exact_attention import attention_cases, check_attention
from bench.exact_conv import check_conv, conv_cases
from bench.machine import Host, better_ptxas, folder_name, machine
from bench.store import RESULTS, Row, Store, provenance, read
from fastdl.contract import SPECS, STEPS
from fastdl.tuned import Device, device_of, packaged_file

FAILED, USAGE, UNFINISHED, SPENT = 1, 2, 3, 4

Work = Callable[[], Row]


@dataclass
class Context:
    """What a stage needs to know."""

    machine: Host
    options: argparse.Namespace

    @property
    def facts(self) -> Device:
        """Of the GPU, or to list what would run, of one that is not here."""
        if not torch.cuda.is_available():
            return Device("none", "cuda", 90, sms=132, shared=232448)
        return device_of(torch.empty(0, device="cuda"))

    @cached_property
    def ceilings(self) -> rows.Ceilings:
        found = rows.ceilings(self.machine)
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in found.matmul.items()
        )
        print(f"ceilings: copy {found.copy / 1e12:.2f} TB/s, {rates}", flush=True)
        return found


def check_stage(context: Context) -> Iterator[tuple[str, Work]]:
    """The contract of every op."""

    def work(op: str) -> Row:
        report = fastdl.check([op], device=context.machine.device)
        return {"ok": report.ok, "says": str(report), "report": json.loads(report.to_json())}

    for op in SPECS:
        yield op, partial(work, op)


def exact_stage(context: Context) -> Iterator[tuple[str, Work]]:
    """Every launch configuration of products, convolutions and attention, bit by bit."""
    for case in exact_cases(context.facts):
        yield case.name, partial(check_exact, case, context.machine.device)
    for layer in conv_cases(context.facts):
        yield layer.name, partial(check_conv, layer, context.machine.device)
    for case in attention_cases(context.facts):
        yield case.name, partial(check_attention, case, context.machine.device)


def ceilings_stage(context: Context) -> Iterator[tuple[str, Work]]:
    """What the GPU does at best."""

    def work() -> Row:
        found = context.ceilings
        return {"ok": True, "says": "", **found._asdict()}

    yield "ceilings", work


def timing_stage(op: str) -> Callable[[Context], Iterator[tuple[str, Work]]]:
    def stage(context: Context) -> Iterator[tuple[str, Work]]:
        compiled = not context.options.no_compile
        for case in SPECS[op].bench:

            def work(case: Any = case) -> Row:
                found = rows.measure(case, context.machine, context.ceilings, compiled=compiled)
                return {**found, "ceilings": context.ceilings._asdict()}

            yield case.name, work

    stage.__doc__ = f"Timings of {op}."
    return stage


def steps_stage(name: str) -> Callable[[Context], Iterator[tuple[str, Work]]]:
    def stage(context: Context) -> Iterator[tuple[str, Work]]:
        for case in STEPS[name].bench:

            def work(case: Any = case) -> Row:
                return steps.measure(STEPS[name], case, context.machine, context.ceilings)

            yield case.name, work

    stage.__doc__ = f"Timings of the steps of {name}."
    return stage


def models_stage(context: Context) -> Iterator[tuple[str, Work]]:
    """Whole models: as they are, with fastdl's modules and graphs, compiled, and with both."""
    compiled = not context.options.no_compile
    for case in models.cases():
        yield case.name, partial(models.measure, case, context.machine, compiled=compiled)


def tune_stage(context: Context) -> Iterator[tuple[str, Work]]:
    """Launch configurations for the table that ships."""

    def work(op: str, share: int) -> Row:
        path = packaged_file(context.machine.name)
        show = partial(print, flush=True)
        seconds = 60 * context.options.minutes / share
        again = context.options.again
        report = fastdl.tune(op, budget_s=seconds, path=path, again=again, progress=show)
        table = json.loads(path.read_text()) if path.exists() else {}
        says = f"{len(report.rows)} entries in {path.name}, {len(report.skipped)} skipped"
        return {"ok": report.ok, "says": says, "table": table, "skipped": report.skipped}

    norms = ("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward")
    ops = ("linear", "conv", "attention", *norms)
    for number, op in enumerate(ops):
        yield op, partial(work, op, len(ops) - number + 1)


STAGES: dict[str, Callable[[Context], Iterator[tuple[str, Work]]]] = {
    "check": check_stage,
    "exact": exact_stage,
    "ceilings": ceilings_stage,
    **{op: timing_stage(op) for op in SPECS},
    **{name: steps_stage(name) for name in STEPS},
    "models": models_stage,
    "tune": tune_stage,
}


def run_stage(
    stage: str, context: Context, store: Store, clock: Callable[[], float] = time.monotonic
) -> int:
    """Work off the rows of a stage that are not done, as far as there is time. Those that failed
    before come last. A row may leave its process unfit for others: SPENT, if there are any.
    """
    until = clock() + 60 * context.options.minutes
    code, undone, missing = 0, 0, 0
    again = context.options.again
    left = [row for row in STAGES[stage](context) if again or not store.done(row[0])]
    left.sort(key=lambda row: store.tried(row[0]))
    for index, (name, work) in enumerate(left):
        if clock() >= until:
            undone += 1
            continue
        if not store.done(name):
            store.put(name, {"ok": False, "says": "begun, and not finished"})
        row = guarded(work)
        store.put(name, row)
        missing += "missing" in row
        code = code if row["ok"] or "missing" in row else FAILED
        print(f"{stage}  {name}: {row['says']}  ({max(until - clock(), 0):.0f} s left)", flush=True)
        if row.get("fatal"):
            return FAILED
        new = any(not store.tried(name) for name, _ in left[index + 1 :])
        if row.get("spent") and new and clock() < until:
            return SPENT
    if undone:
        print(f"{stage}: no time for {undone} more; run it again to go on", flush=True)
    return code or (UNFINISHED if undone or missing else 0)


def guarded(work: Work) -> Row:
    """The row, or the error as a row: the next one may run, unless the device is lost."""
    try:
        return work()
    except Exception as error:
        row = {"ok": False, "says": f"{type(error).__name__}: {error}"}
    gc.collect()  # models are cycles, and hold their memory
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        row["fatal"] = True
    return row


def run_all(options: argparse.Namespace, folder: Path) -> int:
    """One process a stage: a device error in one does not reach the next."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **better_ptxas()}
    codes = {}
    for stage in options.stage or STAGES:
        print(f"--- {stage}", flush=True)
        until = time.monotonic() + 60 * options.minutes
        codes[stage] = run_child(stage, options, environment, 60 * options.minutes, options.again)
        while codes[stage] == SPENT:
            seconds = max(until - time.monotonic(), 0)
            codes[stage] = run_child(stage, options, environment, seconds)
    print(summary(folder, codes))
    bad = [code for code in codes.values() if code not in (0, UNFINISHED)]
    return FAILED if bad else max(codes.values(), default=0)


def run_child(
    stage: str, options: argparse.Namespace, environment: dict[str, str], seconds: float,
    again: bool = False,
) -> int:  # fmt: skip
    command = [sys.executable, __file__, "--child", stage, "--minutes", str(seconds / 60)]
    command += ["--out", str(options.out)] + ["--again"] * again
    command += ["--no-compile"] * options.no_compile
    try:
        # a row that was begun may finish
        return subprocess.run(command, env=environment, timeout=seconds + 90).returncode
    except subprocess.TimeoutExpired:
        print(f"{stage}: stopped; run it again to go on", flush=True)
        return UNFINISHED


def summary(folder: Path, codes: dict[str, int]) -> str:
    """All stages that were asked for, rows that failed first, then the timings."""
    lines = ["", f"{'stage':12} {'rows':>5} {'failed':>7}"]
    timings = []
    for stage, code in codes.items():
        table = (read(folder / f"{stage}.json") or {"rows": {}})["rows"]
        failed = [f"  {name}: {row['says']}" for name, row in table.items() if not row["ok"]]
        state = {0: "", UNFINISHED: "not finished"}.get(code, "FAILED")
        lines += [f"{stage:12} {len(table):5} {len(failed):7}  {state}", *failed]
        timings += [
            f"{stage:12} {name:36} {row['says']}"
            for name, row in table.items()
            if "roofline" in row
        ]
        if stage == "models":
            timings += ["", *marks.summary(table, [case.name for case in models.cases()])]
    return "\n".join([*lines, "", *timings])


def listing(context: Context) -> str:
    lines = []
    for stage in context.options.stage or STAGES:
        names = [name for name, _ in STAGES[stage](context)]
        lines += [f"{stage} ({len(names)} rows): {STAGES[stage].__doc__}"]
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument("--list", action="store_true", help="say what would run; needs no GPU")
    parser.add_argument("--minutes", type=float, default=8, help="for each stage; default: 8")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: bench/results")
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    context = Context(machine(), options)
    if options.list:
        print(listing(context))
        return 0
    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU; --list shows what would run on one", file=sys.stderr)
        return USAGE
    folder = options.out / folder_name(context.machine.name)
    if options.child is None:
        return run_all(options, folder)
    run = provenance(json.loads(fastdl.env().to_json()))
    return run_stage(options.child, context, Store(folder, options.child, run))


if __name__ == "__main__":
    sys.exit(main())
