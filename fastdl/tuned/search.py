"""The fastest configuration of one problem: those that are right, measured in turn with torch."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import _tuned
from ..ops._launch import Config, Margin
from ..ops._route import policy
from .problems import PROBLEMS, Asked, Call, Problem

# Runs the calls in turn, for so many rounds: microseconds of each call in each round.
Measure = Callable[[Mapping[str, Call], int], dict[str, list[float]]]

DEVICE = "cuda"
COARSE_ROUNDS, FINE_ROUNDS, FINALISTS = 3, 15, 3

# A table's word that the op is to run in torch.
TORCH = Config({}, variant="torch")


class Offer(NamedTuple):
    """Configurations to measure, and what was found wrong with others before that."""

    configs: Sequence[Config]
    dropped: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """What the table will hold, and the time of the best configuration."""

    key: str
    entry: dict[str, Any]
    us: float
    torch_us: float
    tried: int
    dropped: Sequence[str] = ()

    def __str__(self) -> str:
        winner = "torch" if self.entry["variant"] == "torch" else _brief(self.entry)
        count = f"of {self.tried}" + (f", {len(self.dropped)} dropped" if self.dropped else "")
        margin = Margin(**self.entry["margin"]) if "margin" in self.entry else "a part of torch's"
        return (
            f"{self.key:44} {self.us:9.1f} us {self.torch_us:9.1f} us torch "
            f"{margin}  {winner}  {count}"
        )


def _brief(entry: dict[str, Any]) -> str:
    blocks = [f"{name}={value}" for name, value in entry["blocks"].items()]
    numbers = [f"{name}={entry[name]}" for name in ("num_warps", "num_stages", "splits")]
    return " ".join([*filter(None, [entry["variant"]]), *blocks, *numbers])


def made(asked: Asked) -> Problem:
    return PROBLEMS[asked.op](asked.dtype, asked.sizes, DEVICE)


def run(
    wanted: Iterable[Asked],
    offers: Callable[[Asked], Offer],
    measure: Measure,
    budget_s: float,
    *,
    make: Callable[[Asked], Problem] = made,
    clock: Callable[[], float] = time.monotonic,
    found: Callable[[Row, float], None] = lambda row, left: None,
) -> tuple[list[Row], list[str]]:
    """Solve problems until the budget is spent. `found` is told each row and the seconds left."""
    until, rows, skipped = clock() + budget_s, [], []
    for asked in wanted:
        if clock() >= until:
            skipped.append(f"{asked.key}: no time left")
            continue
        try:
            row = search(make(asked), offers(asked), measure, lambda: clock() >= until)
        except torch.OutOfMemoryError:
            skipped.append(f"{asked.key}: not enough memory to measure it")
            continue
        if row is None:
            skipped.append(f"{asked.key}: no configuration ran and was right")
            continue
        rows.append(row)
        found(row, max(until - clock(), 0))
    return rows, skipped


def search(
    problem: Problem, offer: Offer, measure: Measure, late: Callable[[], bool]
) -> Row | None:
    """The fastest of those configurations that compute the right thing, against torch."""
    truth = problem.truth()
    allowed = 2 * _error(problem.torch(), truth) + 1e-6
    proven: dict[str, Config] = {}
    for number, config in enumerate(offer.configs):
        if proven and late():
            break
        if _is_right(_launching(problem, config), truth, allowed):
            proven[str(number)] = config
    if not proven:
        return None
    calls = {name: _launching(problem, config) for name, config in proven.items()}
    coarse = _medians(measure(calls, COARSE_ROUNDS))
    finalists = sorted(coarse, key=coarse.__getitem__)[:FINALISTS]
    # what is measured is what would run: some of torch's calls have to save statistics for backward
    instead = _launching(problem, TORCH)
    replaces = problem.replaceable and _is_right(instead, truth, allowed)
    torchs = instead if replaces else problem.torch
    fine = measure({"torch": torchs, **{n: calls[n] for n in finalists}}, FINE_ROUNDS)
    medians = _medians(fine)
    best = min(finalists, key=medians.__getitem__)
    margin = margin_of(fine["torch"], fine[best])
    # torch is faster by more than noise if it is in three rounds of four
    winner = TORCH if replaces and margin.high < 1 else proven[best]
    entry = _entry(winner, margin if problem.whole else None)
    return Row(
        problem.asked.key, entry, medians[best], medians["torch"], len(proven), offer.dropped
    )


def margin_of(torchs: Sequence[float], ours: Sequence[float]) -> Margin:
    """torch's time over ours by round."""
    ratios = [a / b for a, b in zip(torchs, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Margin(middle, low, high)


def _launching(problem: Problem, config: Config) -> Call:
    def call() -> Any:
        with forced(problem.asked, config):
            return problem.fused()

    return call


@contextmanager
def forced(asked: Asked, config: Config) -> Iterator[None]:
    """Whatever a table says, and no other way than with this configuration."""
    way = policy() if config.variant == "torch" else policy("fused", on_fallback="error")
    with way, _tuned.forced(*asked, config):
        yield


def _is_right(call: Call, truth: Any, allowed: float) -> bool:
    try:
        return _error(call(), truth) <= allowed
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the device is lost, and would take the blame for all that follow
        return False  # it does not fit this device, which Triton's versions say in many words


def _error(got: Any, truth: Any) -> float:
    """Relative error of the worst of the tensors; inf where it is not a number."""
    pairs = zip(_tensors(got), _tensors(truth), strict=True)
    with torch.no_grad():
        worst = max(float((g.double() - t).norm() / t.norm().clamp_min(1e-30)) for g, t in pairs)
    return worst if worst == worst else float("inf")


def _tensors(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def _entry(config: Config, margin: Margin | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"blocks": {}, "variant": "torch"}
    if config.variant != "torch":
        entry = {**asdict(config), "blocks": dict(config.blocks)}
        del entry["source"], entry["margin"]
    if margin is not None:
        # more digits would say nothing
        digits = {name: float(f"{value:.4g}") for name, value in margin._asdict().items()}
        entry["margin"] = digits
    return entry


def events(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """By CUDA events, each call after a sweep of memory: it empties the L2 and hides the launch."""
    sweep = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    marks: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            sweep.zero_()
            start.record()
            call()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * a.elapsed_time(b) for a, b in pairs] for name, pairs in marks.items()}
