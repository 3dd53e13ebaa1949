"""The stages of a run on a GPU: their rows, and what each row does. Correctness first, then what
timings stand on, then the timings, what matters most first.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, NamedTuple

import torch

import fastdl
from bench import far, models, rows, sanitize, steps, streams
from bench.exact import check_exact, exact_cases
from bench.exact_attention import attention_cases, check_attention
from bench.exact_conv import check_conv, conv_cases
from bench.machine import Host
from bench.report.static import checked
from bench.store import Row
from fastdl.contract import SPECS, STEPS, Case, Spec
from fastdl.contract.case import DTYPES
from fastdl.contract.checks import CHECKS
from fastdl.tuned import Device, device_of, packaged_file
from fastdl.tuned.problems import DEFAULTS, PASSES

Work = Callable[[], Row]
Rows = Iterator[tuple[str, Work]]


@dataclass
class Context:
    """What a stage needs to know."""

    machine: Host
    options: argparse.Namespace

    @property
    def facts(self) -> Device:
        """Of the GPU, or to list what would run, of one that is not here."""
        if not self.machine.is_gpu:
            return Device("none", "cuda", 90, sms=132, shared=232448)
        return device_of(torch.empty(0, device=self.machine.device))

    @cached_property
    def ceilings(self) -> rows.Ceilings:
        found = rows.ceilings(self.machine)
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in found.matmul.items()
        )
        print(f"ceilings: copy {found.copy / 1e12:.2f} TB/s, {rates}", flush=True)
        return found


class Stage(NamedTuple):
    """Rows `together` may run beside one another: nothing is timed."""

    rows: Callable[[Context], Rows]
    about: str
    together: bool = False


def check_rows(context: Context) -> Rows:
    for op in SPECS:
        for dtype in DTYPES:
            work = partial(checked, op, device=context.machine.device, dtypes=[dtype])
            yield f"{op} {str(dtype).removeprefix('torch.')}", work


def exact_rows(context: Context) -> Rows:
    for case in exact_cases(context.facts):
        yield case.name, partial(check_exact, case, context.machine.device)
    for layer in conv_cases(context.facts):
        yield layer.name, partial(check_conv, layer, context.machine.device)
    for case in attention_cases(context.facts):
        yield case.name, partial(check_attention, case, context.machine.device)


def far_rows(context: Context) -> Rows:
    for name, case in far.CASES.items():
        yield name, partial(far.check, case, context.machine, far.ELEMENTS)


def core_cases() -> Iterator[tuple[str, Spec, Case]]:
    """The few cases that stand for each op."""
    for op, spec in SPECS.items():
        for case in spec.core:
            yield f"{op}, {case.name}", spec, case


def graph_rows(context: Context) -> Rows:
    for name, _, case in core_cases():
        yield name, partial(streams.check_graph, case, context.machine)


def stream_rows(context: Context) -> Rows:
    for name, _, case in core_cases():
        yield name, partial(streams.check_streams, case, context.machine)


def inductor_rows(context: Context) -> Rows:
    def work(spec: Spec, case: Case) -> Row:
        CHECKS["inductor"].function(spec, case, context.machine.device)
        return {"ok": True, "says": "compiled, and the same"}

    for name, spec, case in core_cases():
        yield name, partial(work, spec, case)


def sanitizer_rows(context: Context) -> Rows:
    for op in SPECS:
        yield op, partial(sanitize.check, op)


def ceilings_rows(context: Context) -> Rows:
    def work() -> Row:
        return {"ok": True, "says": "", **context.ceilings._asdict()}

    yield "ceilings", work


def tune_rows(context: Context) -> Rows:
    """Each op has an equal share of the time that is left."""
    path = packaged_file(context.machine.name)

    def work(op: str, share: int) -> Row:
        seconds = 60 * context.options.minutes / share
        options = {"again": context.options.again, "progress": partial(print, flush=True)}
        report = fastdl.tune(op, budget_s=seconds, path=path, **options)
        table = json.loads(path.read_text()) if path.exists() else {}
        says = f"{len(report.rows)} entries in {path.name}, {len(report.skipped)} skipped"
        return {"ok": report.ok, "says": says, "table": table, "skipped": report.skipped}

    passes = {one for of_op in PASSES.values() for one in of_op}
    ops = [op for op in DEFAULTS if op in PASSES or op not in passes]
    for number, op in enumerate(ops):
        yield op, partial(work, op, len(ops) - number)


def op_rows(op: str, context: Context) -> Rows:
    for case in SPECS[op].bench:

        def work(case: Any = case) -> Row:
            compiled = not context.options.no_compile
            return rows.measure(case, context.machine, context.ceilings, compiled=compiled)

        yield case.name, work


def step_rows(name: str, context: Context) -> Rows:
    for case in STEPS[name].bench:

        def work(case: Any = case) -> Row:
            return steps.measure(STEPS[name], case, context.machine, context.ceilings)

        yield case.name, work


def model_rows(context: Context) -> Rows:
    compiled = not context.options.no_compile
    for case in models.cases():
        yield case.name, partial(models.measure, case, context.machine, compiled=compiled)


STAGES = {
    "check": Stage(check_rows, "the contract of every op: errors and exact integers", True),
    "exact": Stage(exact_rows, "every launch configuration of products and attention, bit by bit",
                   True),
    "far": Stage(far_rows, "tensors of more than 2**31 elements"),
    "graphs": Stage(graph_rows, "CUDA graphs, replayed on other inputs", True),
    "streams": Stage(stream_rows, "several streams at once"),
    "inductor": Stage(inductor_rows, "torch.compile with inductor, both passes", True),
    "sanitizer": Stage(sanitizer_rows, "compute-sanitizer's memcheck, where it runs", True),
    "ceilings": Stage(ceilings_rows, "what the GPU does at best"),
    "tune": Stage(tune_rows, "launch configurations for the table that ships"),
    **{op: Stage(partial(op_rows, op), f"timings of {op}") for op in SPECS},
    **{name: Stage(partial(step_rows, name), f"timings of the steps of {name}") for name in STEPS},
    "models": Stage(model_rows, "whole models: as they are, with fastdl, compiled, with both"),
}  # fmt: skip

TIMED = (*SPECS, *STEPS, "models")


def table_digest(name: str) -> str | None:
    """Of the tuned table that comes with fastdl: timings depend on it."""
    path = packaged_file(name)
    return sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
