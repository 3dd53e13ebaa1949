"""Candidates compiled before they are measured, by processes beside this one, into Triton's cache.

What the compiler says of them decides which are measured at all.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..ops import _launch
from ..ops._launch import Config, Device, Launch
from ..ops._route import policy
from ..targets.binary import Facts
from ..targets.pool import Pool, WorkerError, pool
from ..targets.record import Specialisation, specialisation
from .choose import shortlist
from .problems import PROBLEMS, Asked
from .search import Offer, forced

# So many problems are compiled for while one is measured, by so many processes.
NEXT, PROCESSES = 4, 16


@contextmanager
def compiled(
    wanted: Sequence[Asked], device: Device, processes: int | None = None
) -> Iterator[Callable[[Asked], Offer]]:
    """What to measure for each of them, asked for in their order. The next are compiled then."""
    with pool(processes, most=PROCESSES) as workers:
        ahead = _Ahead(workers, wanted, device)
        yield ahead.offer


class Plan(NamedTuple):
    """What is compiled for a problem: before candidates are tried, and for each of them."""

    before: list[Specialisation]
    candidates: list[tuple[Config, list[Specialisation]]]


class _Ahead:
    def __init__(self, workers: Pool, wanted: Sequence[Asked], device: Device) -> None:
        self.workers, self.wanted, self.device = workers, list(wanted), device
        self.jobs: dict[Specialisation, Future[Facts]] = {}
        self.plans: dict[Asked, Plan] = {}

    def offer(self, asked: Asked) -> Offer:
        place = self.wanted.index(asked)
        for one in self.wanted[place : place + 1 + NEXT]:
            if one not in self.plans:
                self.plans[one] = launches_of(one, self.device)
                self._start(self.plans[one])
        facts = [
            (config, [self.jobs[spec].result() for spec in specs])
            for config, specs in self.plans[asked].candidates
        ]
        return sifted(facts, self.device)

    def _start(self, plan: "Plan") -> None:
        for spec in (*plan.before, *(spec for _, specs in plan.candidates for spec in specs)):
            if spec not in self.jobs:
                self.jobs[spec] = self.workers.start(_facts, (spec, self.device))


def _facts(workers: Pool, job: tuple[Specialisation, Device]) -> Facts:
    """A compiler that crashes costs what it compiled."""
    spec, device = job
    request = {"compile": dataclasses.asdict(spec), "device": dataclasses.asdict(device)}
    try:
        return Facts.load(workers.request(request))
    except WorkerError as error:
        return Facts(error=str(error))


def launches_of(asked: Asked, device: Device) -> Plan:
    """What a launch with each of the candidates compiles, without those that do not apply to these
    strides or this GPU. Two that launch the same are one.
    """
    found: dict[Any, tuple[Config, list[Specialisation]]] = {}
    with (
        # torch refuses to answer for meta tensors
        mock.patch.object(torch, "is_autocast_enabled", lambda *device: False),
        _launch.recording(device) as launches,
    ):
        problem = PROBLEMS[asked.op](asked.dtype, asked.sizes, "meta")
        with policy("fused", on_fallback="error"):
            problem.fused()  # some run forward when they are first called
        before = [specialisation(asked.op, launch) for launch in launches]
        for config in shortlist(*asked, device):
            launches.clear()
            with forced(asked, config):
                problem.fused()
            if config.blocks and not any(_is_launched(config, launch) for launch in launches):
                continue
            specs = [specialisation(asked.op, launch) for launch in launches]
            grids = [launch.grid for launch in launches]
            found.setdefault((*specs, *grids), (config, list(dict.fromkeys(specs))))
    return Plan(list(dict.fromkeys(before)), list(found.values()))


def _is_launched(config: Config, launch: Launch) -> bool:
    """Ops may take fewer stages, and name blocks that a configuration leaves out."""
    found = launch.config
    same = (found.variant, found.num_warps, found.splits)
    blocks = config.blocks.items() <= found.blocks.items()
    return blocks and same == (config.variant, config.num_warps, config.splits)


def sifted(facts: Sequence[tuple[Config, Sequence[Facts]]], device: Device) -> Offer:
    """Without those that do not compile or need more shared memory than there is; and without those
    that keep registers in memory, unless all do.
    """
    dropped, fitting = [], []
    for config, parts in facts:
        error = next((part.error for part in parts if part.error), "")
        shared = max((part.shared for part in parts), default=0)
        if error:
            dropped.append(f"{_named(config)}: {error}")
        elif shared > device.shared:
            dropped.append(f"{_named(config)}: {shared} bytes of shared memory")
        else:
            fitting.append((config, sum(part.spills for part in parts)))
    least = min((spills for _, spills in fitting), default=0)
    kept = [config for config, spills in fitting if spills == 0 or least > 0]
    dropped += [
        f"{_named(config)}: {spills} spills" for config, spills in fitting if spills and not least
    ]
    return Offer(kept, dropped)


def _named(config: Config) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks.items())
    return f"{config.variant} {blocks} warps={config.num_warps} stages={config.num_stages}".strip()
