"""What there is to say about a model: its sites, the plan before a change and the report after."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .._table import lines as table
from .compiled import Compiled
from .speed import Speed
from .tree import Tree
from .verify import Proof

HEAD = ("name", "pattern", "op", "route", "before", "after", "reason", "source")


class Site(NamedTuple):
    """One place in a model: what stands there, which op takes it, and why not if none does.

    `before` and `after` are the largest errors of the original and of the op on the example inputs,
    against float64 and relative to the largest value of the tensor; `allowed` is what `after` may
    be. `route` says who computed the op. `op` is empty where no rule knows the place. `source` is
    the user's line that made the call, where a graph tells it.
    """

    name: str
    pattern: str
    op: str = ""
    reason: str | None = None
    route: str | None = None
    before: float | None = None
    after: float | None = None
    allowed: float | None = None
    source: str | None = None


class Story:
    """What a plan and a report share: sites in groups, and the page that shows them."""

    tree: Tree
    proof: Proof | None = None
    speed: Speed | None = None
    compiled: Compiled | None = None

    @property
    def groups(self) -> dict[str, list[Site]]:
        """The sites by what becomes of them."""
        raise NotImplementedError

    def to_json(self) -> str:
        raise NotImplementedError

    def to_html(self) -> str:
        """One page that needs nothing else: the model's tree with all that is known of it."""
        from ._page import page

        return page(self)

    def _repr_html_(self) -> str:
        from ._page import compact

        return compact(self)


class Plan(Story):
    """The sites of a model: those with a reason would stay as they are. `dump` is the text of its
    graphs before and after, of the graph engine.
    """

    def __init__(self, sites: Sequence[Site], tree: Tree, dump: str = "") -> None:
        self.sites, self.tree, self.dump = tuple(sites), tree, dump

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Site:
        return self.sites[index]

    @property
    def groups(self) -> dict[str, list[Site]]:
        new = [site for site in self.sites if site.reason is None]
        rest = [site for site in self.sites if site.reason is not None]
        return {"to replace": new, "left alone": rest}

    def __str__(self) -> str:
        return "\n".join(_sections(self.groups))

    def to_json(self) -> str:
        return json.dumps({"sites": [site._asdict() for site in self.sites]})


@dataclass
class Report(Story):
    """What was done to a model."""

    tree: Tree
    replaced: list[Site] = field(default_factory=list)
    skipped: list[Site] = field(default_factory=list)
    rolled_back: list[Site] = field(default_factory=list)
    proof: Proof | None = None
    speed: Speed | None = None
    compiled: Compiled | None = None

    @property
    def groups(self) -> dict[str, list[Site]]:
        groups = {"replaced": self.replaced, "left alone": self.skipped}
        return {**groups, "rolled back": self.rolled_back} if self.rolled_back else groups

    def __str__(self) -> str:
        lines = _sections(self.groups)
        if self.proof is not None:
            lines.append(f"proof: {self.proof}")
        if self.speed is not None:
            lines.append(str(self.speed))
        if self.compiled is not None:
            lines.append(str(self.compiled))
        return "\n".join(lines)

    def to_json(self) -> str:
        groups = {
            name: [site._asdict() for site in getattr(self, name)]
            for name in ("replaced", "skipped", "rolled_back")
        }
        proof = self.proof and self.proof.as_dict()
        speed = self.speed and self.speed.as_dict()
        compiled = self.compiled and self.compiled.as_dict()
        return json.dumps({**groups, "proof": proof, "speed": speed, "compiled": compiled})


def alike(sites: Iterable[Site]) -> dict[Site, list[Site]]:
    """Sites that differ in numbers only, such as those of many layers, under one with the name of
    all, layers.*.norm, and with the largest of their errors.
    """
    found: dict[Site, list[Site]] = {}
    for site in sites:
        # a call in a graph is named "layers.0.norm (rms_norm_1)"
        module, *call = site.name.split(" ")
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", module)
        told = re.sub(r"_\d+\)", ")", "".join(call))
        key = Site(f"{name} {told}", *site[1:5], source=site.source)
        found.setdefault(key, []).append(site)
    return {worst(same)._replace(name=_name_of_all(same)): same for same in found.values()}


def _name_of_all(sites: Sequence[Site]) -> str:
    """Their name, with a * for what differs."""
    if len(sites) == 1:
        return sites[0].name
    modules, calls = zip(*(site.name.partition(" ")[::2] for site in sites), strict=True)
    parts = zip(*(module.split(".") for module in modules), strict=True)
    name = ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
    return f"{name} {re.sub(r'_[0-9]+[)]', ')', calls[0])}".rstrip()


def worst(sites: Sequence[Site]) -> Site:
    """The site with the largest error."""
    return max(sites, key=lambda site: site.after or 0.0)


def _sections(groups: dict[str, list[Site]]) -> list[str]:
    return [line for title, sites in groups.items() for line in _section(title, sites)]


def _section(title: str, sites: Sequence[Site]) -> list[str]:
    """A heading with the sites below it, with those columns that say anything."""
    heading = f"{title}: {len(sites)}"
    if not sites:
        return [heading]
    return [heading, *(f"  {line}" for line in table(*columns(sites)))]


def columns(sites: Iterable[Site]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of sites, with those columns that say anything."""
    rows = [_cells(site) for site in sites]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows)]
    return [HEAD[i] for i in used], [[row[i] for i in used] for row in rows]


def _cells(site: Site) -> tuple[str, ...]:
    errors = ("" if e is None else f"{e:.1e}" for e in (site.before, site.after))
    name = site.name or "(the model)"
    return (
        name,
        site.pattern,
        site.op,
        site.route or "",
        *errors,
        site.reason or "",
        site.source or "",
    )
