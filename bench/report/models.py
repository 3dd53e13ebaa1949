"""Whole models: what each contender did to them."""

from collections.abc import Iterable

from bench.report.details import compared, not_measured
from bench.report.results import Machine, Model, Ratio, Stats
from fastdl.page import cell, error_text, table

EAGER, COMPILED, CALLED, CAPTURED = "eager", "compile", "python", "graph"
OURS = ("modules", "graph", "then compile")


def tables(machine: Machine) -> str:
    """A line a model and contender."""
    if not machine.models:
        return not_measured()
    rows = [row for model in machine.models for row in _rows(model)]
    head = ("model", "contender", "ms", "against eager", "against torch.compile", "in a CUDA graph",
            "memory", "sites", "graphs", "breaks", "compile s", "error", "eager's", "allowed",
            "held against", "run")  # fmt: skip
    return (
        '<p class="dim">Steps called from Python, each waited for. Contenders: fastdl.optimize '
        "(modules), its backend (graph), torch.compile, and the backend that goes on to inductor "
        f"(then compile). Each was proved before.</p>{table(head, rows, 'tall')}"
    )


def _rows(model: Model) -> Iterable[list[str]]:
    called = model.ways[CALLED]
    for name, stats in called[EAGER].items():
        facts = model.facts.get(name, {})
        of_compile = called.get(COMPILED, {}).get(name)
        captured = model.ways.get(CAPTURED, {}).get(EAGER, {}).get(name)
        over = memory(model, name)
        yield [
            cell(f"{model.name} ({model.dtype})", style="whole"),
            cell(name, style="mark done" if name in OURS else "whole"),
            cell(f"{stats.us / 1e3:,.2f}", True), compared(_ratio(stats)),
            compared(_ratio(of_compile)), compared(_ratio(captured)),
            cell("not measured" if over is None else f"{over:.2f}×", True),
            *(_fact(facts, key, "{:,.0f}") for key in ("sites", "graphs", "breaks")),
            _fact(facts, "compile_s", "{:,.1f}"),
            *(cell(error_text(facts[key]) if key in facts else "-", True)
              for key in ("after", "before", "allowed")),
            cell(model.proof, style="whole"), cell(model.run, style="name whole"),
        ]  # fmt: skip


def _ratio(stats: Stats | None) -> Ratio | None:
    return stats and Ratio(*stats[1:4])


def _fact(facts: dict[str, float], key: str, form: str) -> str:
    return cell(form.format(facts[key]) if key in facts else "-", True)


def memory(model: Model, name: str) -> float | None:
    """At the peak, over that of the model as it is."""
    peaks = model.peaks
    return peaks[name] / peaks[EAGER] if name in peaks and peaks.get(EAGER) else None
