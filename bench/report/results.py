"""What was measured, as page and pictures know it. `read` makes it of what lies on disk."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.interleave import Stats
from bench.report.static import FOLDER as STATIC

# Ways of calling: captured in a CUDA graph, or from Python with its launches.
WAYS = ("graph", "python")
PASSES = ("forward", "backward", "both", "step")
OURS, COMPILED = "fused", "compile"


class Ratio(NamedTuple):
    """A median with its quartiles, as Stats has them."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Way:
    """All contenders, called in one way."""

    baseline: str
    contenders: dict[str, Stats]
    over: dict[str, Ratio]

    @property
    def ours(self) -> Stats:
        return self.contenders[OURS]


@dataclass(frozen=True)
class Pass:
    """One pass of a case. `rates` are tflops, gb_per_s and roofline, where they are counted."""

    name: str
    how: str
    calls: int
    ways: dict[str, Way]
    peaks: dict[str, float]
    no_graph: dict[str, str]
    rates: dict[str, float]

    @property
    def way(self) -> Way:
        return self.ways[self.how]

    def memory(self, over: str) -> float | None:
        """Our memory at the peak over another's."""
        peaks = self.peaks
        return peaks[OURS] / peaks[over] if OURS in peaks and peaks.get(over) else None


@dataclass(frozen=True)
class Timed:
    """A case of an op that was measured."""

    op: str
    case: str
    run: str
    dtype: str
    shapes: list[str]
    seeds: list[int]
    bytes: float
    flops: float
    error: dict[str, float]
    copy: float
    matmul: float
    facts: dict[str, str]
    refused: dict[str, str]
    passes: dict[str, Pass]

    @property
    def counted(self) -> Pass:
        """The pass that bytes and flops are of: the first."""
        return next(iter(self.passes.values()))

    @property
    def computes(self) -> bool:
        """Whether arithmetic is what limits it at best, and not memory."""
        return self.flops / self.matmul > self.bytes / self.copy


@dataclass(frozen=True)
class Model:
    """A whole model: ways of calling, what each contender is compared with, contenders."""

    name: str
    run: str
    ok: bool
    proof: str
    dtype: str
    ways: dict[str, dict[str, dict[str, Stats]]]
    facts: dict[str, dict[str, float]]
    peaks: dict[str, float]
    refused: dict[str, str]


class Errors(NamedTuple):
    """The largest errors against float64 over an op's cases: ours, torch's, what is allowed."""

    ours: float
    torch: float
    allowed: float


class Checked(NamedTuple):
    """An op's accuracy in one dtype."""

    op: str
    dtype: str
    cases: int
    forward: Errors
    gradient: Errors
    failures: list[str]
    run: str


class Failed(NamedTuple):
    stage: str
    name: str
    says: str


@dataclass
class Machine:
    """All results in one folder: of a GPU, or of what needs none."""

    folder: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows, and those right
    timed: list[Timed] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    interpreted: bool = False
    head: list[str] = field(default_factory=list)
    binaries: list[tuple[str, list[str]]] = field(default_factory=list)  # op, cells
    failed: list[Failed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        return self.folder.name != STATIC

    @property
    def name(self) -> str:
        if not self.is_gpu:
            return "without a GPU"
        devices = [d["name"] for run in self.runs.values() for d in run["devices"]]
        return devices[0] if devices else self.folder.name


# what several parts ask of results


class Against(NamedTuple):
    """How many times as fast we are as another, in one pass of a case."""

    timed: Timed
    part: Pass
    other: str
    ratio: Ratio


def against(timed: list[Timed], compiled: bool) -> Iterator[Against]:
    """By case and pass: against torch's fastest call, or against torch.compile."""
    for one in timed:
        for part in one.passes.values():
            way = part.way
            if not compiled:
                yield Against(one, part, way.baseline, Ratio(*way.ours[1:4]))
            elif COMPILED in way.over:
                yield Against(one, part, COMPILED, way.over[COMPILED])


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def by(items: Any, key: Callable[[Any], Any]) -> Mapping[Any, list[Any]]:
    """Groups in the order in which they first come."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
