"""From the names of ops to the table of their binaries."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..contract import SPECS, STEPS
from .binary import Facts
from .devices import target_of
from .pool import Pool, WorkerError, pool
from .record import Specialisation
from .table import Result, Row

Progress = Callable[[int, int], None]


def compile_all(
    ops: Iterable[str] | None,
    targets: Sequence[str],
    limit: int | None,
    configs: Sequence[Mapping[str, Any]] | None,
    progress: Progress | None,
) -> Result:
    known = [*SPECS, *STEPS]
    names = known if ops is None else list(ops)
    for name in names:
        if name not in known:
            raise ValueError(f"targets: no op {name!r}, allowed are {', '.join(known)}")
    pairs = [(op, target_of(target).name) for target in targets for op in names]
    wanted = [
        {"op": op, "target": target, "limit": limit, "configs": configs} for op, target in pairs
    ]
    with pool() as workers:
        recorded = workers.map(Pool.request, wanted)
        jobs = [
            (Specialisation.load(spec), target)
            for (_, target), specs in zip(pairs, recorded, strict=True)
            for spec in specs
        ]
        rows = []
        for row in workers.map(_compile, jobs):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(jobs))
    return Result(rows)


def _compile(workers: Pool, job: tuple[Specialisation, str]) -> Row:
    spec, target = job
    try:
        found = workers.request({"compile": dataclasses.asdict(spec), "target": target})
    except WorkerError as error:
        return Row(spec, target, Facts(error=str(error)))
    return Row(spec, target, Facts.load(found))
