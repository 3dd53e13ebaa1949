"""What is drawn of a machine's results: speed-ups, memory, rates, and speed over size."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.report import svg
from bench.report.results import (
    COMPILED,
    OURS,
    Against,
    Machine,
    Ratio,
    Timed,
    against,
    by,
    geometric,
    times,
)
from bench.report.svg import Colour, Picture, Tips

COLOURS = {"forward": svg.OURS, "step": svg.OURS, "both": svg.BLUE, "backward": svg.VIOLET}
CONTENDERS = {OURS: svg.OURS, "torch": svg.TORCH, COMPILED: svg.COMPILE}
OTHERS = (svg.BLUE, svg.VIOLET, svg.ROSE, svg.WORSE, svg.INK)

# A curve has at least so many sizes.
SIZES = 3


class Dot(NamedTuple):
    """A case in a row of a picture, with its quartiles, and what it is."""

    row: str
    part: str
    ratio: Ratio
    says: str


def speed(machine: Machine, slug: str, compiled: bool) -> Picture | None:
    """How many times as fast, by op and pass: bars are geometric means over the cases."""
    dots = [
        Dot(one.timed.op, one.part.name, one.ratio, says(one))
        for one in against(machine.timed, compiled)
    ]
    name = f"{slug}-{'compile' if compiled else 'speed'}"
    return bars(name, dots, f"times as fast as {_rival(compiled)}") if dots else None


def says(one: Against) -> str:
    ratio = one.ratio
    return (
        f"{one.timed.op} {one.timed.case}, {one.part.name}: {times(ratio.ratio)} {one.other}, "
        f"quartiles {times(ratio.low)} to {times(ratio.high)}, {one.part.way.ours.us:.1f} us"
    )


def memory(machine: Machine, slug: str, compiled: bool) -> Picture | None:
    """Memory at the peak, over that of the same rivals."""
    dots = []
    for one in against(machine.timed, compiled):
        # nothing has no logarithm: a call that takes no memory stands in the tables alone
        if over := one.part.memory(one.other):
            told = f"{one.timed.op} {one.timed.case}, {one.part.name}: {times(over)} the memory of"
            ratio = Ratio(over, over, over)
            dots.append(Dot(one.timed.op, one.part.name, ratio, f"{told} {one.other}"))
    label = f"memory at the peak, times that of {_rival(compiled)}"
    name = f"{slug}-memory-{'compile' if compiled else 'torch'}"
    return bars(name, dots, label, less=True) if dots else None


def _rival(compiled: bool) -> str:
    return "torch.compile" if compiled else "torch's fastest call"


@svg.styled
def bars(name: str, dots: Sequence[Dot], label: str, less: bool = False) -> Picture:
    """A bar for each row and part, from 1 on; `less` than 1 is good or bad."""
    tips, groups = Tips(), by(dots, lambda dot: (dot.row, dot.part))
    drawn, axes = svg.figure(4.9, 0.6 + 0.17 * len(groups) + 0.07 * len({d.row for d in dots}))
    at, labels, last = 0.0, {}, ""
    for (row, part), group in groups.items():
        at -= 1.0 if row == last else 1.4
        labels.setdefault(row, []).append(at)
        last = row
        mean = geometric([dot.ratio.ratio for dot in group])
        good = mean <= 1 if less else mean >= 1
        colour = COLOURS[part] if good else svg.WORSE
        told = tips(f"{row}, {part}: geometric mean {times(mean)} over {len(group)} cases")
        axes.barh(at, mean - 1, 0.8, 1, color=colour.drawn, alpha=0.45)[0].set_gid(told)
        for dot in group:
            _dot(axes, dot, at, COLOURS[part], tips)
    axes.axvline(1, color=svg.INK.drawn, linewidth=1)
    axes.set_yticks([sum(all) / len(all) for all in labels.values()], [*map(svg.label, labels)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 0.9, -0.5)
    axes.grid(axis="y", visible=False)
    _doubling(axes, [value for dot in dots for value in dot.ratio])
    axes.set_xlabel(label)
    _legend(axes, [(part, COLOURS[part]) for part in COLOURS if any(d.part == part for d in dots)])
    return svg.picture(drawn, name, label, tips)


def _dot(axes: Any, dot: Dot, at: float, colour: Colour, tips: Tips) -> None:
    ratio = dot.ratio
    axes.plot((ratio.low, ratio.high), (at, at), color=colour.drawn, linewidth=1)
    mark = axes.plot(ratio.ratio, at, "o", color=colour.drawn, markersize=3.2)
    mark[0].set_gid(tips(dot.says))


def _doubling(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, wide enough for 1 and all values."""
    axes.set_xscale("log", base=2)
    low, high = min(0.9, *values) / 1.1, max(1.1, *values) * 1.1
    every = 1 if high / low < 64 else 2
    ticks = [2.0**power for power in range(-20, 40, every) if low <= 2.0**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xlim(low, high)


def _legend(axes: Any, entries: Iterable[tuple[str, Colour]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour.drawn, label=name, markersize=5)
        for name, colour in entries
    ]
    axes.figure.legend(handles=handles, loc="outside upper center", ncols=6)


# rates


@svg.styled
def roofline(machine: Machine, slug: str) -> Picture | None:
    """Counted arithmetic over counted bytes, against what was reached and what the GPU can do."""
    computing = [one for one in machine.timed if one.flops and one.bytes]
    if not computing:
        return None
    tips = Tips()
    drawn, axes = svg.figure(4.9, 4.2)
    styles = _styles(by(computing, lambda one: one.op))
    for one in computing:
        us = one.counted.way.ours.us
        told = (
            f"{one.op} {one.case}, {one.counted.name}: {one.flops / us / 1e6:.1f} TFLOP/s at "
            f"{one.flops / one.bytes:.3g} FLOP a byte{_of_roof(one)}"
        )
        mark = axes.plot(one.flops / one.bytes, one.flops / us / 1e6, **styles[one.op])
        mark[0].set_gid(tips(told))
    _roof(axes, computing)
    axes.set_xlabel("FLOP a byte, as counted")
    axes.set_ylabel("TFLOP/s")
    _labelled(axes, styles)
    about = "arithmetic reached, under what the GPU can do"
    return svg.picture(drawn, f"{slug}-roofline", about, tips)


def _of_roof(one: Timed) -> str:
    share = one.counted.rates.get("roofline")
    return f", {share:.0%} of the roof" if share is not None else ""


def _styles(ops: Iterable[str]) -> dict[str, dict[str, Any]]:
    palette = (svg.OURS, svg.BLUE, svg.VIOLET, svg.COMPILE, svg.ROSE, svg.WORSE)
    return {
        op: {"color": palette[i % 6].drawn, "marker": "oD^sv"[i // 6 % 5], "linestyle": "",
             "markersize": 4.5, "alpha": 0.85}
        for i, op in enumerate(ops)
    }  # fmt: skip


def _roof(axes: Any, computing: Sequence[Timed]) -> None:
    """The ceilings, each the best that was measured beside these rows."""
    copy = max(one.copy for one in computing)
    rates = {dtype: max(one.matmul for one in same)
             for dtype, same in by(computing, lambda one: one.dtype).items()}  # fmt: skip
    xs = [one.flops / one.bytes for one in computing]
    low, high = min(xs) / 2, max(*xs, 4 * max(rates.values()) / copy)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for dtype, rate in rates.items():
        knee = rate / copy
        line = (low, min(low, knee) * copy / 1e12), (knee, rate / 1e12), (high, rate / 1e12)
        axes.plot(*zip(*line, strict=True), color=svg.INK.drawn, linewidth=1.2)
        axes.text(
            high,
            rate / 1e12,
            f"{svg.label(dtype)} {rate / 1e12:.0f} TFLOP/s",
            ha="right",
            va="bottom",
        )
    axes.text(0.02, 0.95, f"copy {copy / 1e12:.2f} TB/s", transform=axes.transAxes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _labelled(axes: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=svg.label(op), **style) for op, style in styles.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=3)


@svg.styled
def traffic(machine: Machine, slug: str) -> Picture | None:
    """Bytes a second of what only moves bytes, under the rate of a copy."""
    moving = [one for one in machine.timed if one.bytes and not one.computes]
    if not moving:
        return None
    tips, ops = Tips(), by(moving, lambda one: one.op)
    drawn, axes = svg.figure(4.9, 0.9 + 0.24 * len(ops))
    for at, (op, group) in enumerate(ops.items()):
        for one in group:
            rate = one.bytes / one.counted.way.ours.us / 1e6
            colour = COLOURS[one.counted.name].drawn
            mark = axes.plot(rate, -at, "o", color=colour, markersize=4.5, alpha=0.85)
            told = f"{op} {one.case}, {one.counted.name}: {rate:.2f} TB/s{_of_roof(one)}"
            mark[0].set_gid(tips(told))
    copy = max(one.copy for one in moving) / 1e12
    axes.axvline(copy, color=svg.INK.drawn, linewidth=1.2)
    axes.text(copy, 0.75, f"copy {copy:.2f} ", ha="right", va="center")
    axes.set_yticks([-at for at in range(len(ops))], [*map(svg.label, ops)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.5 - len(ops), 1.1)
    axes.set_xlim(0)
    axes.set_xlabel("TB/s, of bytes that must be moved")
    parts = {one.counted.name for one in moving}
    _legend(axes, [(part, COLOURS[part]) for part in COLOURS if part in parts])
    about = "bytes a second, under the rate of a copy"
    return svg.picture(drawn, f"{slug}-traffic", about, tips)


# speed over size


class Curve(NamedTuple):
    """Cases that differ in one dimension of their first input."""

    what: str
    part: str
    points: list[tuple[int, Timed]]


def curves(timed: Iterable[Timed]) -> Iterator[Curve]:
    """Cases whose names differ in numbers alone, along the dimension that differs most, one curve
    for each last dimension.
    """
    sized = [(one, size) for one in timed if (size := _sizes(one))]

    def alike(pair: tuple[Timed, list[int]]) -> tuple[Any, ...]:
        one, size = pair
        return one.op, re.sub(r"\d+", "#", one.case), one.counted.name, one.dtype, len(size)

    for (op, case, part, *_), group in by(sized, alike).items():
        columns = list(zip(*(size for _, size in group), strict=True))
        dim = max(range(len(columns)), key=lambda i: (len(set(columns[i])), i))
        is_last = dim == len(columns) - 1
        # nothing is left to tell curves apart where the last dimension is the one they go along
        widths: dict[int | None, list[tuple[Timed, list[int]]]] = {}
        for one, size in group:
            widths.setdefault(None if is_last else size[-1], []).append((one, size))
        for width, same in widths.items():
            points = {size[dim]: one for one, size in same}
            if len(points) >= SIZES:
                words = [word for word in re.sub(r"[#x.+]+", " ", case).split() if word != op]
                what = " ".join([op, *words]) + (f" of {width}" if width else "")
                yield Curve(what, part, sorted(points.items(), key=lambda point: point[0]))


def _sizes(one: Timed) -> list[int]:
    """Of the first input that is a tensor."""
    found = re.search(r"\[([0-9, ]+)\]", one.shapes[0]) if one.shapes else None
    return [int(n) for n in re.findall(r"[0-9]+", found[1])] if found else []


@svg.styled
def over_size(curve: Curve, slug: str, number: int) -> Picture:
    """What each contender reaches, in TFLOP/s or GB/s."""
    tips = Tips()
    drawn, axes = svg.figure(3.6, 2.7)
    computes = sum(one.computes for _, one in curve.points) * 2 > len(curve.points)
    unit = "TFLOP/s" if computes else "GB/s"
    names = {name: None for _, one in curve.points for name in one.counted.way.contenders}
    others = iter(OTHERS * len(names))
    for name in sorted(names, key=lambda name: name == OURS):
        colour = CONTENDERS.get(name) or next(others)
        line = [
            (size, one, _rate(one, name, computes))
            for size, one in curve.points
            if name in one.counted.way.contenders
        ]
        axes.plot(
            [size for size, *_ in line], [rate for *_, rate in line], color=colour.drawn,
            label=svg.label(name), linewidth=2 if name == OURS else 1.2,
            zorder=3 if name == OURS else 2,
        )  # fmt: skip
        for size, one, rate in line:
            mark = axes.plot(size, rate, "o", color=colour.drawn, markersize=3.5)
            us = one.counted.way.contenders[name].us
            mark[0].set_gid(tips(f"{name}, {one.case}: {rate:.4g} {unit}, {us:.1f} us"))
    sizes = [size for size, _ in curve.points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [short(size) for size in sizes])
    axes.set_ylim(0)
    axes.set_ylabel(unit)
    axes.figure.legend(loc="outside lower center", ncols=4)
    about = f"{unit} of {curve.what}, {curve.part}, over size"
    return svg.picture(drawn, f"{slug}-curve-{number}", about, tips)


def _rate(one: Timed, name: str, computes: bool) -> float:
    us = one.counted.way.contenders[name].us
    return one.flops / us / 1e6 if computes else one.bytes / us / 1e3


def short(count: int) -> str:
    """A size as people say it: 512, 16k, 1M."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
