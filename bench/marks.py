"""The marks that timings are held against: met, missed, or not measured."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from bench import model_lines, models
from bench.model_lines import CAPTURED
from fastdl.contract import SPECS, STEPS

Row = Mapping[str, Any]


class Figure(NamedTuple):
    """A ratio, and the most that it may be within its noise."""

    ratio: float
    high: float


class Mark(NamedTuple):
    """What rows of a stage must reach: each of them, or their geometric mean."""

    what: str
    stage: str
    rows: str  # a pattern for names
    figure: Callable[[Row], Figure | None]
    least: float
    mean: bool = False
    within_noise: bool = False
    reason: str = ""  # why it is missed, once somebody has found out


class Verdict(NamedTuple):
    """A mark and what became of it."""

    what: str
    required: str
    measured: str
    verdict: str
    reason: str

    def __str__(self) -> str:
        said = ", ".join(filter(None, [self.verdict, self.measured, self.reason]))
        return f"{self.what}, {self.required}: {said}"


def over(contender: str, of: str = "") -> Callable[[Row], Figure | None]:
    """How many times as fast as a contender, or as the fastest of torch's own calls: in the pass of
    this name, else in the one that the row counts.
    """

    def figure(row: Row) -> Figure | None:
        timed = _timed(row, of)
        found = timed["over"].get(contender or timed["baseline"]) if timed else None
        return found and Figure(found["ratio"], found["high"])

    return figure


def _timed(row: Row, of: str = "") -> Any:
    passes = row.get("passes", {})
    found = passes.get(of or next(iter(passes), ""))
    return found and found[found["how"]]


def roof(row: Row) -> Figure | None:
    """The share of what the GPU could do at best."""
    passes = list(row.get("passes", {}).values())
    return Figure(passes[0]["roofline"], passes[0]["roofline"]) if passes else None


def routed(row: Row) -> Figure | None:
    """How many times as fast as the fastest of torch's own calls, routed by the tuned table."""
    timed = _timed(row)
    found = timed and timed["contenders"].get("routed", timed["contenders"]["fused"])
    return found and Figure(found["ratio"], found["high"])


def less_memory(contender: str) -> Callable[[Row], Figure | None]:
    def figure(row: Row) -> Figure | None:
        for found in row.get("passes", {}).values():
            peaks = found["peak_bytes"]
            if peaks.get(contender) and peaks.get("fused"):
                ratio = peaks[contender] / peaks["fused"]
                return Figure(ratio, ratio)
        return None

    return figure


def _plain(figure: Callable[..., float | None], *args: str, **options: str) -> Any:
    def of(row: Row) -> Figure | None:
        ratio = figure(row, *args, **options)
        return ratio and Figure(ratio, ratio)

    return of


def _faster(name: str, than: str) -> Callable[[Row], Figure | None]:
    """Of whole models."""

    def figure(row: Row) -> Figure | None:
        found = model_lines.stats(row, name, than)
        return found and Figure(found["ratio"], found["high"])

    return figure


def _ops() -> list[Mark]:
    alone = "^(full|causal|shared keys)[^b]*"
    widths = {"layer_norm": "^(32768x1024|16384x4096|4096x16384)$"}
    widths |= {"rms_norm": widths["layer_norm"], "softmax": "^(32768x1024|8192x4096|2048x32768)$"}
    flash, fastest, torchs = over("flash"), over(""), over("torch")
    return [
        Mark("linear: the product alone over torch's", "linear", "^[68].*none$", torchs, 0.92),
        Mark("linear: a few rows over torch's", "linear", "^16x", torchs, 0.9),
        Mark("linear: relu over torch's single call", "linear", "relu$", over("addmm"), 0.95),
        Mark("linear: activation over torch.compile", "linear", "elu$", over("compile"), 1.0),
        Mark("attention: forward over FlashAttention-2", "attention", f"{alone}$", flash, 1.05),
        Mark("attention: backward over FlashAttention-2", "attention", f"{alone} backward$",
             over("flash", "backward"), 0.9),
        Mark("attention: forward over cuDNN", "attention", f"{alone}$", over("cudnn"), 0.7),
        Mark("attention: decoding, of the roof", "attention", "^decoding", roof, 0.85),
        Mark("attention: bias, window, softcap over torch's best", "attention",
             "^(bias|window|softcap)", fastest, 2.0),
        *[Mark(f"{op}: forward, of the roof", op, rows, roof, 0.85) for op, rows in widths.items()],
        *[Mark(f"{op}: backward is never slower than torch's", op, "backward$",
               over("torch", "backward"), 1.0, within_noise=True) for op in widths],
        Mark("rms_norm: residual and norm over eager", "rms_norm", " residual$", torchs, 1.8),
        Mark("group_norm: with silu, both passes over eager", "group_norm", "silu backward$",
             torchs, 1.5),
        Mark("batch_norm: residual and relu, both passes over eager", "batch_norm",
             "relu residual.*backward$", torchs, 1.5),
        Mark("cross_entropy: 128k classes over eager", "cross_entropy", "^4096x131072", torchs,
             2.0),
        Mark("linear_cross_entropy: over eager", "linear_cross_entropy", "", torchs, 1 / 1.1),
        Mark("linear_cross_entropy: over torch's in chunks", "linear_cross_entropy", "",
             over("chunked"), 1.0, within_noise=True),
        Mark("linear_cross_entropy: memory of torch's in chunks over ours", "linear_cross_entropy",
             "", less_memory("chunked"), 1.0),
        Mark("AdamW: over torch's fused step", "adamw", "", torchs, 0.95),
        Mark("AdamW: of the roof", "adamw", "^64M", roof, 0.85),
        Mark("conv: channels last, over eager", "conv", "(elu|silu|residual)6? last$", torchs, 1.0,
             within_noise=True),
        Mark("conv: planes, over eager", "conv", "(elu|silu|gelu|residual)$", torchs, 1.3),
        Mark("layer_norm_lstm: over a loop in Python", "layer_norm_lstm", "", torchs, 20.0),
        *[Mark(f"{op}: as routed, never slower than torch's best", op, "", routed, 1.0,
               within_noise=True) for op in (*SPECS, *STEPS)],
    ]  # fmt: skip


def _models() -> list[Mark]:
    means = (("modules", "eager", 1.5), ("graph", "eager", 1.5), ("then compile", "compile", 1.1))
    marks = []

    def mark(what: str, figure: Any, least: float = 1.0, **options: Any) -> None:
        marks.append(Mark(what, "models", "", figure, least, **options))

    for name, than, least in means:
        memory, speed = (partial(_plain, f, name) for f in (model_lines.memory, model_lines.faster))
        mark(f"{name} is never slower than eager", _faster(name, "eager"), within_noise=True)
        mark(f"{name} over {than}", speed(than), least, mean=True)
        mark(f"{name} over {than}, as CUDA graphs", speed(than, way=CAPTURED), least, mean=True)
        mark(f"{name} never takes more memory than eager", memory("eager"))
        mark(f"memory of {than} over {name}", memory(than), least, mean=True)
    return marks


MARKS = [*_ops(), *_models()]


def table(tables: Mapping[str, Mapping[str, Row]]) -> list[Verdict]:
    """All marks, from the rows of each stage: from what was measured, or not at all."""
    return [judged(mark, tables.get(mark.stage, {}), planned(mark)) for mark in MARKS]


def planned(mark: Mark) -> list[str]:
    """The rows that a mark is about. It is not met before all of them are measured."""
    if mark.stage == "models":
        names = [case.name for case in models.cases()]
    else:
        names = [case.name for case in {**SPECS, **STEPS}[mark.stage].bench]
    return [name for name in names if re.search(mark.rows, name)]


def judged(mark: Mark, rows: Mapping[str, Row], names: list[str]) -> Verdict:
    found = {name: mark.figure(rows[name]) for name in names if name in rows}
    figures = {name: figure for name, figure in found.items() if figure is not None}
    least = f"at least {mark.least:.3g}x" + (" within noise" if mark.within_noise else "")
    if not figures:
        return Verdict(mark.what, least, "", "not measured", "")
    mean = math.exp(math.fsum(math.log(f.ratio) for f in figures.values()) / len(figures))
    count = f"over {len(figures)} of {len(names)} rows"
    bad = [f"{name} ({f.ratio:.3f}x)" for name, f in figures.items() if not _good(f, mark)]
    if mark.mean:
        bad = [] if mean >= mark.least else ["the mean"]
        measured = f"geometric mean {mean:.3f}x {count}"
    else:
        lowest = min(f.ratio for f in figures.values())
        measured = f"lowest {lowest:.3f}x, geometric mean {mean:.3f}x {count}"
        measured += f"; missed by {', '.join(bad)}" if bad else ""
    if len(figures) < len(names):
        verdict = "open, so far missed" if bad else "open"
    else:
        verdict = "missed" if bad else "met"
    return Verdict(mark.what, least, measured, verdict, mark.reason if bad else "")


def _good(figure: Figure, mark: Mark) -> bool:
    """Slower is what is slower in three of four rounds: less is noise."""
    return (figure.high if mark.within_noise else figure.ratio) >= mark.least
