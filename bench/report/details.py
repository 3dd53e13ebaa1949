"""The parts of the page that are tables: runs, marks, what failed, and every case in full."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from bench.marks import Verdict
from bench.report.marks import kind
from bench.report.results import (
    COMPILED,
    OURS,
    WAYS,
    Machine,
    Pass,
    Ratio,
    Timed,
    by,
    geometric,
    times,
)
from fastdl.page import cell, error_text, table

# The line on which ratios stand, in powers of two.
LOW, HIGH = -2.0, 3.0


def not_measured() -> str:
    return '<p class="dim">not measured</p>'


def ratio_bar(ratio: Ratio) -> str:
    """From 1 to the median, and a line from quartile to quartile."""

    def at(value: float) -> float:
        return 100 * (min(max(math.log2(value), LOW), HIGH) - LOW) / (HIGH - LOW)

    one, median, low, high = map(at, (1, *ratio))
    left, width = min(one, median), abs(one - median)
    told = f"{ratio.ratio:.3f}×, quartiles {ratio.low:.3f}× to {ratio.high:.3f}×"
    return (
        f'<span class="ratio {"done" if ratio.ratio >= 1 else "undone"}" title="{told}">'
        f'<i style="left:{left:.1f}%;width:{width:.1f}%"></i>'
        f'<b style="left:{low:.1f}%;width:{max(high - low, 0.5):.1f}%"></b>'
        f'<u style="left:{one:.1f}%"></u></span>'
    )


def compared(ratio: Ratio | None, other: str = "") -> str:
    """A cell: the bar, its numbers, and over what."""
    if ratio is None:
        return cell("not measured", style="dim whole")
    numbers = f"<b>{ratio.ratio:.2f}×</b> {escape(other)}"
    return (
        f'<td class="whole">{ratio_bar(ratio)}{numbers} '
        f'<span class="dim">{ratio.low:.2f} to {ratio.high:.2f}</span></td>'
    )


# where it comes from


def runs(machine: Machine) -> str:
    """What was measured with what, a column a run."""
    if not machine.runs:
        return ""
    rows = []
    for id, run in machine.runs.items():
        devices = "; ".join(_device(device) for device in run["devices"]) or "no GPU"
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v is not None)
        rest = {k: v for k, v in run.items() if k not in ("devices", "versions", "commit")}
        told = ", ".join(f"{k} {v}" for k, v in rest.items() if v not in (None, False))
        rows.append([
            cell(id, style="name whole"), cell(devices, style="says"),
            cell(versions, style="says"),
            cell(str(run.get("commit") or "not in a checkout"), style="name says"),
            cell(told, style="says"),
        ])  # fmt: skip
    return table(("run", "GPU", "versions", "commit", "and"), rows)


def _device(device: dict[str, object]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
    return f"{device['name']} ({facts})" if facts else str(device["name"])


def stages(machine: Machine) -> str:
    rows = [
        [cell(name, style="name whole"), cell(f"{rows:,}", True), cell(f"{right:,}", True)]
        for name, (rows, right) in machine.stages.items()
    ]
    return f"<h3>Stages</h3>{table(('stage', 'rows', 'right'), rows, 'tall')}" if rows else ""


def failed(machine: Machine) -> str:
    """Rows that failed, and contenders that were none, each with its reason."""
    rows = [
        [cell(one.stage, style="name whole"), cell(one.name), cell("failed", style="mark undone"),
         cell(one.says, style="says")]
        for one in machine.failed
    ]  # fmt: skip
    refused = [
        (one.op if isinstance(one, Timed) else one.name, contender, why)
        for one in (*machine.timed, *machine.models)
        for contender, why in one.refused.items()
    ]
    for (contender, why), same in by(refused, lambda one: one[1:]).items():
        ops = by(same, lambda one: one[0])
        where = ", ".join(f"{op} ({len(found)})" for op, found in ops.items())
        rows.append([cell(""), cell(where, style="says"), cell(f"no {contender}", style="whole"),
                     cell(why, style="says")])  # fmt: skip
    if not rows:
        return ""
    bad = f"{len(machine.failed)} failed, {len(rows) - len(machine.failed)} refused"
    opened = " open" if machine.failed else ""
    return (
        f"<details{opened}><summary>Rows that failed, contenders that were refused: {bad}</summary>"
        f"{table(('stage', 'row', '', 'why'), rows, 'tall')}</details>"
    )


def marks(rows: Sequence[Verdict]) -> str:
    """Folded where nothing is measured: then they only say what is wanted."""
    cells = [
        [cell(row.what, style="says"), cell(row.required), cell(row.measured),
         cell(row.verdict, style=f"mark {kind(row)}"), cell(row.reason, style="says")]
        for row in rows
    ]  # fmt: skip
    verdicts = by(rows, lambda row: row.verdict)
    counts = ", ".join(f"{len(same)} {verdict}" for verdict, same in verdicts.items())
    head = ("mark", "required", "measured", "verdict", "reason")
    shown = "" if verdicts.keys() == {"not measured"} else " open"
    return (
        f"<h3>Pass marks</h3><details{shown}><summary>{escape(counts)}</summary>"
        f'<div class="marks">{table(head, cells, "tall")}</div></details>'
    )


# every case


def cases(machine: Machine) -> str:
    """A fold for each op: in short, then all contenders, then inputs."""
    if not machine.timed:
        return not_measured()
    return "".join(
        _op(op, same) for op, same in by(machine.timed, lambda one: one.op).items()
    )  # fmt: skip


def _op(op: str, same: Sequence[Timed]) -> str:
    parts = [(one, part) for one in same for part in one.passes.values()]
    mean = geometric([part.way.ours.ratio for _, part in parts])
    short = [_short(one, part) for one, part in parts]
    whole = [row for one, part in parts for row in _contenders(one, part)]
    inputs = [_inputs(one) for one in same]
    shorts = ("case", "pass", "us", "against torch's fastest", "against torch.compile",
              "called from Python", "TFLOP/s", "GB/s", "of the roof", "memory")  # fmt: skip
    wholes = ("case", "pass", "contender", "us", "ratio", "low", "high", "drift", "called us",
              "peak MB", "no graph")  # fmt: skip
    heads = ("case", "dtype", "shapes", "seeds", "sets", "bytes", "FLOP", "errors", "facts",
             "refused", "run")  # fmt: skip
    return (
        f"<details><summary><b>{escape(op)}</b> · {len(same)} cases, geometric mean "
        f"{times(mean)} torch's fastest call</summary>{table(shorts, short)}"
        f"<details><summary>All contenders: medians and quartiles</summary>"
        f"{table(wholes, whole, 'tall')}</details>"
        f"<details><summary>Shapes, seeds, errors, launches</summary>"
        f"{table(heads, inputs, 'tall')}</details></details>"
    )


def _short(one: Timed, part: Pass) -> list[str]:
    way, rates = part.way, part.rates
    called = part.ways.get("python")
    share = rates.get("roofline")
    peak = part.memory(way.baseline)
    how = "" if part.how == WAYS[0] else " (from Python)"
    return [
        cell(one.case, style="whole"), cell(part.name), cell(f"{way.ours.us:,.1f}{how}", True),
        compared(Ratio(*way.ours[1:4]), way.baseline), compared(way.over.get(COMPILED)),
        compared(Ratio(*called.ours[1:4]) if called else None, called.baseline if called else ""),
        *(cell(f"{rates[key]:,.1f}" if rates.get(key) else "-", True)
          for key in ("tflops", "gb_per_s")),
        cell("-" if share is None else f"{share:.0%}", True),
        cell("-" if peak is None else times(peak), True),
    ]  # fmt: skip


def _contenders(one: Timed, part: Pass) -> Iterable[list[str]]:
    called = part.ways.get("python")
    for name, stats in part.way.contenders.items():
        from_python = called and called.contenders.get(name)
        peak = part.peaks.get(name)
        yield [
            cell(one.case, style="whole"), cell(part.name),
            cell(name, style="mark done" if name == OURS else "whole"),
            cell(f"{stats.us:,.2f}", True), *(cell(f"{value:.3f}", True) for value in stats[1:]),
            cell(f"{from_python.us:,.2f}" if from_python else "not measured", True),
            cell("not measured" if peak is None else f"{peak / 2**20:,.1f}", True),
            cell(part.no_graph.get(name, "")),
        ]  # fmt: skip


def _inputs(one: Timed) -> list[str]:
    wrong = ", ".join(f"{name} {error_text(error)}" for name, error in one.error.items())
    facts = dict(one.facts)
    sets = facts.pop("sets", "not said")
    told = "; ".join(f"{key} {value}" for key, value in facts.items())
    return [
        cell(one.case, style="whole"), cell(one.dtype), cell(", ".join(one.shapes), style="says"),
        cell(", ".join(map(str, one.seeds)) or "not said"), cell(sets, True),
        cell(f"{one.bytes:,.0f}", True), cell(f"{one.flops:,.0f}", True),
        cell(wrong, style="whole"), cell(told, style="says"),
        cell("; ".join(f"{name}: {why}" for name, why in one.refused.items()), style="says"),
        cell(one.run, style="name whole"),
    ]  # fmt: skip
