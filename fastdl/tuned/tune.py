"""`fastdl.tune`: measure launch configurations on this GPU and keep the winners in a table."""

import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import _launch, _tuned
from ..ops._launch import Config, Device, cdiv
from ..ops._route import policy
from .problems import DEFAULTS, PASSES, PROBLEMS, Call, Problem

# Runs the calls in turn, for so many rounds: microseconds of each call in each round.
Measure = Callable[[Mapping[str, Call], int], dict[str, list[float]]]

DEVICE = "cuda"
# torch has to be faster by more than noise.
FAST, COARSE_ROUNDS, FINE_ROUNDS, FINALISTS = 0.98, 3, 15, 3


@dataclass(frozen=True)
class Row:
    """What the table will hold, and the time of the best configuration."""

    key: str
    entry: dict[str, Any]
    us: float
    torch_us: float
    tried: int

    def __str__(self) -> str:
        winner = "torch" if self.entry["variant"] == "torch" else _brief(self.entry)
        ratio = self.torch_us / self.us
        return (
            f"{self.key:44} {self.us:9.1f} us {self.torch_us:9.1f} us torch {ratio:6.2f}x  {winner}"
        )


@dataclass(frozen=True)
class Report:
    """Printable, also as JSON. `skipped` says what there was no time for, or went wrong."""

    path: Path
    rows: list[Row]
    skipped: list[str]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)

    def __str__(self) -> str:
        lines = [str(row) for row in self.rows] + [f"skipped: {what}" for what in self.skipped]
        return "\n".join([*lines, f"written to {self.path}"])


def _brief(entry: dict[str, Any]) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in entry["blocks"].items())
    numbers = " ".join(f"{name}={entry[name]}" for name in ("num_warps", "num_stages", "splits"))
    return f"{entry['variant']} {blocks} {numbers}"


def tune(
    ops: str | Iterable[str] | None = None,
    *,
    shapes: Iterable[Sequence[int]] | Mapping[str, Iterable[Sequence[int]]] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    budget_s: float = 60,
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Find the fastest configurations for `shapes` and write them to the user's table, or `path`.

    Shapes are (M, N, K) for "linear", (positions, channels out, channels in, taps) for "conv",
    channels of a group, (columns,) for norms, softmax and their backward passes, and
    (rows, columns) for "attention": queries of the heads that share keys, and columns of a head.
    Where torch is faster at a product, a norm or softmax, the table says so: the op runs in torch.
    """
    plan = _plan(ops, shapes, dtypes)
    device = this_gpu()
    if device is None:
        raise RuntimeError("tune: kernels are measured on a GPU, and there is none to run them")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before that")
    target = Path(path) if path is not None else _tuned.user_file(device.name)
    problems = (PROBLEMS[op](dtype, sizes, DEVICE) for op, dtype, sizes in plan)
    rows, skipped = run(problems, device, events, budget_s, progress=progress)
    if rows:
        _save(target, device, rows)
    return Report(target, rows, skipped)


def this_gpu() -> Device | None:
    if not torch.cuda.is_available() or _launch.INTERPRETED:
        return None
    return _launch.gpu_facts(torch.cuda.current_device())


def _plan(ops: Any, shapes: Any, dtypes: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    asked = [ops] if isinstance(ops, str) else list(DEFAULTS if ops is None else ops)
    names = list(dict.fromkeys(op for name in asked for op in PASSES.get(name, (name,))))
    if shapes is None:
        shapes = DEFAULTS
    elif not isinstance(shapes, Mapping):
        if ops is None:
            raise ValueError("tune: got shapes but no ops; name the op that the shapes are for")
        given = list(shapes)
        shapes = dict.fromkeys(names, given)
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name in names:
        if name not in DEFAULTS:
            raise ValueError(f"tune: got op {name!r}, allowed are {', '.join(DEFAULTS)}")
        count = len(next(iter(DEFAULTS[name])))
        for sizes in shapes.get(name, ()):
            if len(sizes) != count or min(sizes) < 1:
                raise ValueError(f"tune: {name} takes {count} positive sizes, got {tuple(sizes)}")
            plan += [(name, d, tuple(sizes)) for d in dtypes or (torch.bfloat16, torch.float16)]
    return plan


def run(
    problems: Iterable[Problem],
    device: Device,
    measure: Measure,
    budget_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[str]]:
    """Solve problems until the budget is spent."""
    until, rows, skipped = clock() + budget_s, [], []
    for problem in problems:
        if clock() >= until:
            skipped.append(f"{problem.key}: no time left")
            continue
        row = search(problem, device, measure, lambda: clock() >= until)
        if row is None:
            skipped.append(f"{problem.key}: no configuration ran and was right")
            continue
        rows.append(row)
        progress(f"{row}  {max(until - clock(), 0):.0f} s left")
    return rows, skipped


def search(
    problem: Problem, device: Device, measure: Measure, late: Callable[[], bool]
) -> Row | None:
    """The fastest of those configurations that compute the right thing, against torch."""
    truth = problem.truth()
    allowed = 2 * _error(problem.torch(), truth) + 1e-6
    proven: dict[str, Config] = {}
    tried = configs(problem.op, problem.dtype, problem.sizes, device)
    for number, config in enumerate(tried):
        if proven and late():
            break
        if _is_right(problem, config, truth, allowed):
            proven[str(number)] = config
    if not proven:
        return None
    calls = {name: _launching(problem, config) for name, config in proven.items()}
    coarse = _medians(measure(calls, COARSE_ROUNDS))
    finalists = sorted(coarse, key=coarse.__getitem__)[:FINALISTS]
    fine = measure({"torch": problem.torch, **{n: calls[n] for n in finalists}}, FINE_ROUNDS)
    medians = _medians(fine)
    best = min(finalists, key=medians.__getitem__)
    entry = _entry(proven[best])
    if problem.replaceable and medians["torch"] < FAST * medians[best]:
        entry = {"blocks": {}, "variant": "torch"}
    return Row(problem.key, entry, medians[best], medians["torch"], len(proven))


def configs(
    op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: Device
) -> Iterator[Config]:
    """The candidates of the op, those that can slice K also in slices that fill the device."""
    for config in _tuned.CANDIDATES[op](dtype, sizes, device):
        yield config
        if config.variant != "tiles":
            continue
        M, N, K = sizes
        tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
        for splits in (2, 4, 8, 16):
            blocks_of_k = K // config["BLOCK_K"]
            if tiles * splits <= 2 * device.sms and blocks_of_k >= 2 * splits:
                yield replace(config, splits=splits)


def _launching(problem: Problem, config: Config) -> Call:
    def call() -> Any:
        with _forced(problem, config):
            return problem.fused()

    return call


@contextmanager
def _forced(problem: Problem, config: Config) -> Iterator[None]:
    with (
        policy("fused", on_fallback="error"),
        _tuned.forced(problem.op, problem.dtype, problem.sizes, config),
    ):
        yield


def _is_right(problem: Problem, config: Config, truth: Any, allowed: float) -> bool:
    try:
        return _error(_launching(problem, config)(), truth) <= allowed
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the device is lost, and would take the blame for all that follow
        return False  # it does not fit this device, which Triton's versions say in many words


def _error(got: Any, truth: Any) -> float:
    """Relative error of the worst of the tensors; inf where it is not a number."""
    pairs = zip(_tensors(got), _tensors(truth), strict=True)
    worst = max(float((g.double() - t).norm() / t.norm().clamp_min(1e-30)) for g, t in pairs)
    return worst if worst == worst else float("inf")


def _tensors(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def _entry(config: Config) -> dict[str, Any]:
    entry = asdict(config)
    del entry["source"]
    return {**entry, "blocks": dict(config.blocks)}


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


def _save(path: Path, device: Device, rows: list[Row]) -> None:
    """Add to what is there: entries of other shapes stay."""
    from .._env import env

    versions = {name: version for name, version in env().versions.items() if version}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries = {**_tuned.read(path), **{row.key: row.entry for row in rows}}
    _tuned.write(path, device.name, {**versions, "date": today}, entries)
