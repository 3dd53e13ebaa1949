"""The page: what was measured on each machine, and what is known without one."""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from bench.marks import Verdict
from bench.report import details, models, pictures, svg
from bench.report.details import not_measured
from bench.report.results import Errors, Machine, against, by, geometric
from bench.report.svg import Picture
from bench.store import ROOT
from fastdl.page import CSS, Scale, cell, document, error_text, table

OWN_CSS = (
    svg.CSS
    + """
.fastdl h3 { font-size:.95rem; margin:1.2rem 0 .4rem }
.fastdl section { border-top:1px solid var(--line); margin-top:2.5rem }
.fastdl .pair { display:grid; gap:1rem; align-items:start;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr)) }
.fastdl .many { display:grid; gap:1rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr)) }
.fastdl figure { margin:0; background:var(--card); border:1px solid var(--line);
  border-radius:8px; padding:.6rem; min-width:0 }
.fastdl figcaption { font-weight:600; margin-bottom:.3rem }
.fastdl figure svg { display:block; width:100%; height:auto; max-width:36rem; margin:0 auto }
.fastdl details { margin:.4rem 0 } .fastdl summary { cursor:pointer; padding:.2rem 0 }
.fastdl nav a { margin-right:.9rem; white-space:nowrap } .fastdl a { color:inherit }
.fastdl .card .mark { color:var(--is,inherit); font-weight:700 }
.fastdl .tall table { border-collapse:separate; border-spacing:0 }
.fastdl .tall th { position:sticky; top:0; z-index:1; background:var(--card) }
.fastdl .tall :is(td,th):first-child { position:sticky; left:0; background:var(--card) }
.fastdl .tall th:first-child { z-index:2 }
.fastdl .says { min-width:14rem; max-width:44rem;
  overflow-wrap:anywhere }
.fastdl .ratio { display:block; position:relative; height:10px; margin:5px 0;
  background:var(--soft); border-radius:2px; width:9rem }
.fastdl .ratio i { position:absolute; top:1px; height:8px; background:var(--is,var(--done));
  border-radius:2px; opacity:.55 }
.fastdl .ratio b { position:absolute; top:4px; height:2px; background:var(--is,var(--done)) }
.fastdl .ratio u { position:absolute; top:-2px; height:14px; width:1px; background:var(--ink) }
"""
)


def page(machines: Sequence[Machine], marks: Callable[[Path], list[Verdict]], results: Path) -> str:
    """The whole of it. `marks` are those of a GPU's folder, or without one, of all results."""
    gpus = [machine for machine in machines if machine.is_gpu]
    rest = [machine for machine in machines if not machine.is_gpu]
    parts = [_head(gpus, results)]
    parts += [_gpu(gpu, f"g{number}", marks(gpu.folder)) for number, gpu in enumerate(gpus)]
    if not gpus:
        parts.append(_nothing(marks(results)))
    parts += [_static(machine) for machine in rest]
    notes = [note for machine in machines for note in machine.notes]
    if notes:
        told = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f'<section><h2>Left out</h2><ul class="notes">{told}</ul></section>')
    return document("fastdl: what was measured", CSS + OWN_CSS, "".join(parts))


def _head(gpus: Sequence[Machine], results: Path) -> str:
    told = escape(str(results.relative_to(ROOT) if results.is_relative_to(ROOT) else results))
    links = [f'<a href="#g{number}">{escape(gpu.name)}</a>' for number, gpu in enumerate(gpus)]
    links.append('<a href="#static">without a GPU</a>')
    return (
        "<h1>fastdl <span>what was measured</span></h1>"
        f'<p class="dim">Made by <code>fastdl report</code> from {told}. Every speed-up is '
        "the median, over rounds in which all contenders take turns, of their times in that "
        "round; its quartiles are over the same rounds.</p>"
        f"<nav>{''.join(links)}</nav>"
    )


def _nothing(marks: Sequence[Verdict]) -> str:
    """What a GPU's section has, with nothing to put there."""
    sections = ("Speed", "Roofline", "Speed over size", "Memory", "Whole models")
    told = "".join(f"<h3>{name}</h3>{not_measured()}" for name in sections)
    return (
        "<section><h2>On a GPU</h2><p>There are no results of a GPU. On a machine that has one, "
        f"type: <code>make gpu</code></p>{details.marks(marks)}{told}</section>"
    )


def _gpu(machine: Machine, slug: str, marks: Sequence[Verdict]) -> str:
    rivals = (("Against torch's fastest call", False), ("Against torch.compile", True))
    drawn = [(title, pictures.speed(machine, slug, compiled)) for title, compiled in rivals]
    peaks = [(title, pictures.memory(machine, slug, compiled)) for title, compiled in rivals]
    rates = [
        ("Roofline", pictures.roofline(machine, slug)),
        ("What moves bytes", pictures.traffic(machine, slug)),
    ]
    curves = [
        (f"{curve.what}, {curve.part}", pictures.over_size(curve, slug, number))
        for number, curve in enumerate(pictures.curves(machine.timed))
    ]
    return (
        f'<section id="{slug}"><h2>{escape(machine.name)}</h2>'
        f"{details.runs(machine)}{_cards(machine, marks)}"
        f"{details.failed(machine)}{details.marks(marks)}"
        f"<h3>Speed</h3>{BARS if machine.timed else ''}{_figures(drawn, 'pair')}"
        f"<h3>Roofline</h3>{_figures(rates, 'pair')}"
        f"<h3>Speed over size</h3>{SIZES if curves else ''}{_figures(curves, 'many')}"
        f"<h3>Memory</h3>{_figures(peaks, 'pair')}"
        f"<h3>Whole models</h3>{models.tables(machine)}"
        f"<h3>Accuracy</h3>{accuracy(machine)}"
        f"<h3>Every case</h3>{details.cases(machine)}"
        f"{details.stages(machine)}</section>"
    )


BARS = (
    '<p class="dim">A dot is a case with its quartiles, a bar the geometric mean of the cases. '
    "Point at one to read what it is; the numbers are in the tables below.</p>"
)
SIZES = (
    '<p class="dim">Cases that differ in their sizes alone, along the dimension of the first input '
    "that differs most.</p>"
)


def _figures(drawn: Sequence[tuple[str, Picture | None]], style: str) -> str:
    shown = [
        f"<figure>{f'<figcaption>{escape(title)}</figcaption>' if title else ''}"
        f"{picture.inline()}</figure>"
        for title, picture in drawn
        if picture is not None
    ]
    return f'<div class="{style}">{"".join(shown)}</div>' if shown else not_measured()


def _cards(machine: Machine, marks: Sequence[Verdict]) -> str:
    """What one wants to know first."""
    cards = [(f"{len(machine.timed):,}", "cases timed", "")]
    for than, compiled in (("torch's fastest", False), ("torch.compile", True)):
        ratios = [one.ratio.ratio for one in against(machine.timed, compiled)]
        if ratios:
            mean = geometric(ratios)
            kind = "done" if mean >= 1 else "undone"
            cards.append((f"{mean:.2f}×", f"{than}, geometric mean", kind))
            slower = sum(ratio < 1 for ratio in ratios)
            cards.append((f"{slower} of {len(ratios)}", f"slower than {than}", ""))
    if machine.failed:
        cards.append((f"{len(machine.failed)}", "rows failed", "undone"))
    met = sum(mark.verdict == "met" for mark in marks)
    cards += [(f"{met} of {len(marks)}", "pass marks met", "")] if marks else []
    shown = "".join(
        f'<div class="card {kind}"><b class="mark">{text}</b>{escape(what)}</div>'
        for text, what, kind in cards
    )
    return f'<div class="cards">{shown}</div>'


# accuracy and machine code

NUMBER = re.compile(r"\b[0-9]{1,12}\b")


def _static(machine: Machine) -> str:
    return (
        '<section id="static"><h2>Without a GPU</h2>'
        f"{details.runs(machine)}{details.failed(machine)}"
        f"<h3>Accuracy</h3>{accuracy(machine)}<h3>Machine code</h3>{code(machine)}</section>"
    )


def accuracy(machine: Machine) -> str:
    """Errors of each op and dtype, ours beside torch's."""
    if not machine.checked:
        return not_measured()
    where = "in Triton's interpreter" if machine.interpreted else f"on {machine.name}"
    scale = Scale(error for row in machine.checked for of in (row.forward, row.gradient)
                  for error in of)  # fmt: skip
    rows = [
        [cell(row.op, style="name whole"), cell(row.dtype), cell(f"{row.cases}", True),
         *_errors(row.forward, scale), *_errors(row.gradient, scale),
         cell(f"{len(row.failures)} failed", style="mark undone") if row.failures
         else cell("ok", style="mark done")]
        for row in machine.checked
    ]  # fmt: skip
    head = (
        "op",
        "dtype",
        "cases",
        "output: ours",
        "torch's",
        "",
        "gradient: ours",
        "torch's",
        "",
        "",
    )
    return (
        f'<p class="dim">The largest errors against float64 over the cases of the contract, '
        f"{escape(where)}. Bars, on a log scale: torch's in the same dtype above, ours below; the "
        f"tick is what is allowed.</p>{table(head, rows, 'tall')}"
    )


def _errors(errors: Errors, scale: Scale) -> list[str]:
    bars = f"<td>{scale.bars(errors.torch, errors.ours, errors.allowed)}</td>"
    return [cell(error_text(errors.ours), True), cell(error_text(errors.torch), True), bars]


def code(machine: Machine) -> str:
    """What the compiler made of each op's kernels, by target, then binary by binary."""
    if not machine.binaries:
        return not_measured()
    target, head = machine.head[0], machine.head
    groups = by(machine.binaries, lambda line: (line[0], line[1][0]))
    short = [_summary(op, target, [cells for _, cells in group], head)
             for (op, target), group in groups.items()]  # fmt: skip
    whole = [
        [cell(op, style="name whole"), *(cell(text, style="whole") for text in cells)]
        for op, cells in machine.binaries
    ]
    columns = ("op", target, "binaries", "registers", "spills", "shared memory", "16-byte loads",
               "16-byte stores", "tensor cores", "verdict")  # fmt: skip
    return (
        '<p class="dim">Read from what the compiler made for GPUs that are not here: registers a '
        "thread, instructions that spill them and bytes of shared memory a program, each the most "
        "of an op's binaries; how many of its loads and stores move 16 bytes a thread; and its "
        "instructions of tensor cores. TFLOP/s beside a main loop are what its instructions would "
        "allow at best; they are not measured.</p>"
        f"{table(columns, short, 'tall')}"
        f"<details><summary>Every binary ({len(whole):,}), with its 16-byte accesses</summary>"
        f"{table(('op', *map(escape, head)), whole, 'tall')}</details>"
    )


def _summary(
    op: str, target: str, lines: Iterable[Sequence[str]], head: Sequence[str]
) -> list[str]:
    named = [dict(zip(head, cells, strict=True)) for cells in lines]

    def most(column: str) -> str:
        counts = [int(n) for one in named for n in NUMBER.findall(one.get(column, ""))]
        return f"{max(counts):,}" if counts else "not said"

    kinds = sorted({one.get("tensor cores", "-") for one in named} - {"-"})
    wrong = sorted({one.get("verdict", "not said") for one in named} - {"ok"})
    said = cell("; ".join(wrong), style="says mark undone" if any("FAIL" in w for w in wrong)
                else "says") if wrong else cell("ok", style="mark done")  # fmt: skip
    return [
        cell(op, style="name whole"), cell(target), cell(f"{len(named)}", True),
        *(cell(most(column), True) for column in ("regs", "spill", "shared")),
        *(cell(_wide(one.get(column, "") for one in named), True)
          for column in ("16 B loads", "16 B stores")),
        cell(", ".join(kinds) or "-", style="says"), said,
    ]  # fmt: skip


def _wide(shares: Iterable[str]) -> str:
    """The sum of shares such as 3/4."""
    counted = [tuple(map(int, numbers)) for share in shares
               if len(numbers := NUMBER.findall(share)) == 2]  # fmt: skip
    return "/".join(f"{sum(column):,}" for column in zip(*counted, strict=True)) or "not said"
