"""`fastdl.tune`: measure launch configurations on this GPU and keep the winners in a table."""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops import _launch, _tuned
from ..ops._launch import Device
from .problems import AFTER_OTHERS, DEFAULTS, PASSES, Asked
from .search import Offer, Row, events, run


@dataclass(frozen=True)
class Report:
    """Printable, also as JSON. `skipped` says what there was no time for, or went wrong; `known`
    are the keys that the table had.
    """

    path: Path
    rows: list[Row]
    skipped: list[str]
    known: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the table has something for what was asked."""
        return bool(self.rows or self.known)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)

    def __str__(self) -> str:
        lines = [str(row) for row in self.rows] + [f"skipped: {what}" for what in self.skipped]
        if self.known:
            lines.append(f"{len(self.known)} were measured before; `again` measures them anew")
        return "\n".join([*lines, f"written to {self.path}" if self.rows else "nothing measured"])


Shapes = Iterable[Sequence[int]] | Mapping[str, Iterable[Sequence[int]]]


def tune(
    ops: str | Iterable[str] | nn.Module | None = None,
    example_inputs: Any = None,
    *,
    shapes: Shapes | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    budget_s: float = 60,
    path: str | Path | None = None,
    again: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Find the fastest configurations for `shapes` and write them to the user's table, or `path`.

    Of a model with `example_inputs` the shapes are those that it calls, forward and backward, the
    most expensive first; the model stays as it is.

    Shapes are (M, N, K) for "linear", (positions, channels out, channels in, taps) for "conv",
    channels of a group, (columns,) for norms, softmax and their backward passes, (steps, rows,
    units) for recurrent layers, and (rows, columns) for "attention": queries of the heads that
    share keys, and columns of a head. Where torch is faster by more than noise, the table says so:
    the op runs in torch. What the table has is left as it is unless `again`.
    """
    device = this_gpu()
    if isinstance(ops, nn.Module):
        if shapes is not None or dtypes is not None:
            raise ValueError("tune: a model's shapes and dtypes are told by its example_inputs")
        wanted = of_model(ops, example_inputs) if device else []
    else:
        wanted = of_ops(ops, shapes, dtypes)
    if device is None:
        raise RuntimeError("tune: kernels are measured on a GPU, and there is none to run them")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before that")
    target = Path(path) if path is not None else _tuned.user_file(device.name)
    return solve(wanted, target, device, budget_s, again, progress)


def solve(
    wanted: Sequence[Asked],
    target: Path,
    device: Device,
    budget_s: float,
    again: bool,
    progress: Callable[[str], None],
) -> Report:
    """Measure what the table lacks, and write each row as it is found."""
    there = set() if again else _tuned.read(target).keys()
    known = [asked.key for asked in wanted if asked.key in there]
    left = [asked for asked in wanted if asked.key not in there]
    left.sort(key=lambda asked: asked.op in AFTER_OTHERS)
    done, provenance = 0, _provenance()

    def found(row: Row, seconds: float) -> None:
        nonlocal done
        done += 1
        # entries of other shapes stay
        entries = {**_tuned.read(target), row.key: row.entry}
        _tuned.write(target, device.name, provenance, entries)
        progress(f"{done} of {len(left)}: {row}  {seconds:.0f} s left")

    progress(f"tuning {len(left)} shapes, {len(known)} known")
    with offers_for(left, device) as offers:
        rows, skipped = run(left, offers, events, budget_s, found=found)
    return Report(target, rows, skipped, known)


def offers_for(
    wanted: Sequence[Asked], device: Device
) -> AbstractContextManager[Callable[[Asked], Offer]]:
    from .ahead import compiled  # it needs Triton

    return compiled(wanted, device)


def this_gpu() -> Device | None:
    if not torch.cuda.is_available() or _launch.INTERPRETED or not _launch.HAVE_TRITON:
        return None
    return _launch.gpu_facts(torch.cuda.current_device())


def of_model(model: nn.Module, example_inputs: Any) -> list[Asked]:
    """What a model asks the tables for, the most expensive first."""
    from .model import asked_by

    return list(asked_by(model, example_inputs))


def of_ops(ops: Any, shapes: Any, dtypes: Any) -> list[Asked]:
    """Ops by name and their shapes, those by default where none are given."""
    asked = [ops] if isinstance(ops, str) else list(DEFAULTS if ops is None else ops)
    names = list(dict.fromkeys(op for name in asked for op in PASSES.get(name, (name,))))
    if shapes is None:
        shapes = DEFAULTS
    elif not isinstance(shapes, Mapping):
        if ops is None:
            raise ValueError("tune: got shapes but no ops; name the op that the shapes are for")
        given = list(shapes)
        shapes = dict.fromkeys(names, given)
    kinds = list(dtypes or (torch.bfloat16, torch.float16))
    plan: dict[str, Asked] = {}
    for name in names:
        if name not in DEFAULTS:
            raise ValueError(f"tune: got op {name!r}, allowed are {', '.join(DEFAULTS)}")
        count = len(next(iter(DEFAULTS[name])))
        for sizes in shapes.get(name, ()):
            if len(sizes) != count or min(sizes) < 1:
                raise ValueError(f"tune: {name} takes {count} positive sizes, got {tuple(sizes)}")
            for dtype in kinds:
                one = Asked(name, dtype, tuple(sizes))
                plan.setdefault(one.key, one)
    return list(plan.values())


def _provenance() -> dict[str, str]:
    from .._env import env

    versions = {name: version for name, version in env().versions.items() if version}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {**versions, "date": today}
