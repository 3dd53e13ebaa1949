"""What there is to say about a model: its sites, the plan before a change and the report after."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .._table import lines as table
from .verify import Proof


class Site(NamedTuple):
    """One place in a model: what stands there, which op takes it, and why not if none does.

    `before` and `after` are the largest errors of the original and of the op on the example inputs,
    against float64 and relative to the largest value of the tensor. `route` says who computed the
    op. `op` is empty where no rule knows the place.
    """

    name: str
    pattern: str
    op: str = ""
    reason: str | None = None
    route: str | None = None
    before: float | None = None
    after: float | None = None


class Plan:
    """The sites of a model: those with a reason would stay as they are."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Site:
        return self.sites[index]

    def __str__(self) -> str:
        new = [site for site in self.sites if site.reason is None]
        rest = [site for site in self.sites if site.reason is not None]
        return "\n".join([*_section("to replace", new), *_section("left alone", rest)])

    def to_json(self) -> str:
        return json.dumps({"sites": [site._asdict() for site in self.sites]})


@dataclass
class Report:
    """What was done to a model."""

    replaced: list[Site] = field(default_factory=list)
    skipped: list[Site] = field(default_factory=list)
    rolled_back: list[Site] = field(default_factory=list)
    proof: Proof | None = None

    def __str__(self) -> str:
        lines = _section("replaced", self.replaced) + _section("left alone", self.skipped)
        if self.rolled_back:
            lines += _section("rolled back", self.rolled_back)
        return "\n".join(lines if self.proof is None else [*lines, f"proof: {self.proof}"])

    def to_json(self) -> str:
        groups = {
            name: [site._asdict() for site in getattr(self, name)]
            for name in ("replaced", "skipped", "rolled_back")
        }
        return json.dumps({**groups, "proof": self.proof and self.proof.as_dict()})


def _section(title: str, sites: Sequence[Site]) -> list[str]:
    """A heading with the sites below it, with those columns that say anything."""
    heading = f"{title}: {len(sites)}"
    if not sites:
        return [heading]
    rows = [_cells(site) for site in sites]
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    head = ("name", "pattern", "op", "route", "before", "after", "reason")
    lines = table([head[i] for i in used], [[row[i] for i in used] for row in rows])
    return [heading, *(f"  {line}" for line in lines)]


def _cells(site: Site) -> tuple[str, ...]:
    errors = ("" if e is None else f"{e:.1e}" for e in (site.before, site.after))
    name = site.name or "(the model)"
    return name, site.pattern, site.op, site.route or "", *errors, site.reason or ""
