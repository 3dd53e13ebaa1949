"""Put fastdl's modules into a model, with a plan before and a report after, and take them out."""

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .._table import progress
from . import libraries
from ._judge import copied, insist_on_copies, no_trace
from ._locate import culprit
from .foreign import forget
from .memory import insist_on_room
from .replay import replay
from .report import Plan, Report, Site
from .rules import Finding, examine, is_ours, is_sequential, swap, swap_back
from .sequential import Sequential, group_length, is_plain
from .speed import measure
from .tree import tree_of
from .verify import Fault, Proof, Reference, arguments

Selector = Sequence[str | type]

LEFT_OUT = "left out by include or exclude"
ALREADY = "it is fastdl's already"
ENGINES = ("modules", "graph")


class VerificationError(RuntimeError):
    """A model could not be proved whatever was rolled back. `proof` says where it differs."""

    def __init__(self, proof: Proof) -> None:
        super().__init__(
            "the model is restored: even with nothing replaced it differs from the original. "
            "Either it does not give the same twice, for example because it draws random numbers "
            f"of its own, or what was replaced earlier is wrong.\n{proof}"
        )
        self.proof = proof


@dataclass
class _Match:
    """A site: its modules, the classes they would take, the Sequential that runs them as one."""

    site: Site
    modules: list[nn.Module]
    targets: list[type]
    parent: nn.Module | None = None
    rolled_back: bool = False

    @property
    def is_new(self) -> bool:
        return self.site.reason is None

    def roll_back(self, reason: str, fault: Fault) -> None:
        self.site = self.site._replace(reason=reason, before=fault.before, after=fault.after)
        self.rolled_back = True


class _Entry(NamedTuple):
    name: str
    module: nn.Module
    finding: Finding
    chosen: bool

    @property
    def swappable(self) -> bool:
        return self.chosen and self.finding.target is not None and self.finding.reason is None


def plan(model: nn.Module, example_inputs: Any = None, *, engine: str = "modules") -> Plan:
    """What `optimize` would replace in a model, and why it would leave the rest.

    With `example_inputs`, each site is also run in both forms on what it is called with. With
    `engine="graph"`, which needs them, the sites are those of `torch.compile(model,
    backend="fastdl")`, each with the line of source that it comes from.
    """
    if engine not in ENGINES:
        raise ValueError(f"plan: engine is {engine!r}, allowed are {' and '.join(ENGINES)}")
    if engine == "graph":
        if example_inputs is None:
            raise ValueError(
                "plan: engine='graph' needs example_inputs: a model's graphs are told by a call"
            )
        from .graph.capture import plan_graphs

        return plan_graphs(model, example_inputs)
    matches = _survey(model)
    if example_inputs is not None:
        _replay(model, matches, example_inputs)
    return Plan([match.site for match in matches], tree_of(model))


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    verify: bool | None = None,
    strict: bool = False,
) -> nn.Module:
    """Put fused modules into a model, in place, and return it.

    A module's class changes and nothing else: parameters, buffers, hooks, names and the state dict
    stay. `report(model)` tells what was done, `restore(model)` undoes it.

    With `example_inputs` (a tensor, a tuple of arguments or a dict of keywords) each site is first
    run in both forms on what it is called with, and left as it was if its errors are too large.
    Then the whole model is verified. If it fails, the sites that make it fail are found by
    bisection and left as they were; if it fails with nothing replaced, nothing changes and
    VerificationError is raised. `verify=False` leaves all this out.

    `include` and `exclude` hold patterns of qualified names, as in fnmatch, and module types; each
    stands for a module and all that is in it. `strict=True` raises a ValueError if a module of a
    kind that fastdl knows cannot be replaced; nothing is changed then.
    """
    if verify is None:
        verify = example_inputs is not None
    if verify and example_inputs is None:
        raise ValueError("optimize: verify=True needs example_inputs")
    matches = _survey(model, include, exclude)
    proof = None
    if verify:
        insist_on_room(model, model)
        _replay(model, matches, example_inputs)
        proof = _prove(model, [match for match in matches if match.is_new], example_inputs)
    if strict:
        _insist(matches)
    for match in matches:
        if match.is_new:
            _apply(match)
    _reports[model] = _report_of(model, matches, proof)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give every module of fastdl's its class of torch again, in place, and return the model."""
    for module in model.modules():
        swap_back(module)
    _reports.pop(model, None)
    return model


def report(model: nn.Module, example_inputs: Any = None) -> Report:
    """What `optimize` did to a model. For a copy of it, what the classes of its modules tell.

    With `example_inputs`, on a GPU, time and memory of the original and of the model are measured.
    For a model compiled with the backend "fastdl", what became of its graphs.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        from .graph.record import is_compiled, report_of

        of_graphs = report_of(model) if is_compiled(model) else None
        if of_graphs is not None:
            return of_graphs
    known = _reports.get(model)
    found = known if known is not None else _report_of(model, _survey(model), None)
    if example_inputs is not None:
        found.speed = measure(restore(copied(model)), copied(model), *arguments(example_inputs))
    return found


# What optimize did, for as long as the model lives.
_reports: "weakref.WeakKeyDictionary[nn.Module, Report]" = weakref.WeakKeyDictionary()


def _survey(
    model: nn.Module, include: Selector | None = None, exclude: Selector | None = None
) -> list[_Match]:
    forget()
    libraries.load()
    entries = {id(e.module): e for e in _walk(model, include, exclude)}
    groups: dict[int, list[_Match]] = {}
    for parent in model.modules():
        if is_sequential(parent):
            for match in _groups(parent, entries):
                groups.setdefault(id(match.modules[0]), []).append(match)
    grouped = {id(m) for matches in groups.values() for match in matches for m in match.modules}
    found = []
    for key, entry in entries.items():
        if key in groups:
            found += groups[key]
        elif key not in grouped:
            found.append(_single(entry))
    return found


def _walk(
    module: nn.Module,
    include: Selector | None,
    exclude: Selector | None,
    name: str = "",
    chosen: bool = False,
    seen: set[int] | None = None,
) -> Iterator[_Entry]:
    """Findings in the order of named_modules, each module once."""
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, ParametrizationList):
        return
    seen.add(id(module))
    chosen = chosen or include is None or _selects(include, name, module)
    if exclude is not None and _selects(exclude, name, module):
        chosen, include = False, ()  # nothing below it is chosen again
    finding = examine(module)
    if finding is not None:
        yield _Entry(name, module, finding, chosen)
        if not finding.descend:
            return
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        yield from _walk(child, include, exclude, path, chosen, seen)


def _selects(selector: Selector, name: str, module: nn.Module) -> bool:
    return any(
        fnmatchcase(name, entry) if isinstance(entry, str) else isinstance(module, entry)
        for entry in selector
    )


def _groups(parent: nn.Module, entries: dict[int, _Entry]) -> Iterator[_Match]:
    """Neighbours in a Sequential that it can run as one op."""
    children = [entries.get(id(child)) for child in parent.children()]
    kinds = [
        entry.finding.target if entry and entry.swappable and is_plain(entry.module) else None
        for entry in children
    ]
    start = 0
    while start < len(children):
        length = group_length(kinds, start)
        members = [entry for entry in children[start : start + length] if entry]
        if length > 1:
            yield _group(parent, members)
        start += length


def _group(parent: nn.Module, members: list[_Entry]) -> _Match:
    modules = [entry.module for entry in members]
    done = all(is_ours(module) for module in (parent, *modules))
    site = Site(
        members[0].name,
        " + ".join(entry.finding.pattern for entry in members),
        members[0].finding.op,
        ALREADY if done else None,
    )
    return _Match(site, modules, [_target(entry) for entry in members], parent)


def _target(entry: _Entry) -> type:
    assert entry.finding.target is not None
    return entry.finding.target


def _single(entry: _Entry) -> _Match:
    finding = entry.finding
    site = Site(entry.name, finding.pattern, finding.op, finding.reason)
    if is_ours(entry.module):
        site = site._replace(reason=ALREADY)
    elif finding.reason is None and not entry.chosen:
        site = site._replace(reason=LEFT_OUT)
    return _Match(site, [entry.module], [finding.target] if finding.target else [])


def _apply(match: _Match, copies: Mapping[int, nn.Module] | None = None) -> None:
    """Swap the classes of a site, or of the copies of its modules, by their ids."""
    pairs = list(zip(match.modules, match.targets, strict=True))
    if match.parent is not None:
        pairs.append((match.parent, Sequential))
    for module, target in pairs:
        module = module if copies is None else copies[id(module)]
        if not is_ours(module):
            swap(module, target)


def _replay(model: nn.Module, matches: list[_Match], example_inputs: Any) -> None:
    """Run the new sites on their inputs; those that fail get a reason."""
    new = [match for match in matches if match.is_new]
    args, kwargs = arguments(example_inputs)
    sites, targets = [match.modules for match in new], [match.targets for match in new]
    outcomes = replay(model, sites, targets, args, kwargs)
    for index, match in enumerate(new):
        if index not in outcomes:
            match.site = match.site._replace(route="not called with these inputs")
            continue
        route, before, after, allowed, fault = outcomes[index]
        match.site = Site(*match.site[:3], fault, route, before, after, allowed)
        match.rolled_back = fault is not None


def _insist(matches: list[_Match]) -> None:
    refused = [
        match.site
        for match in matches
        if match.site.op and match.site.reason not in (None, ALREADY, LEFT_OUT)
    ]
    if refused:
        lines = [f"{site.name} ({site.pattern}): {site.reason}" for site in refused]
        raise ValueError("optimize: cannot replace\n  " + "\n  ".join(lines))


def _prove(model: nn.Module, matches: Sequence[_Match], example_inputs: Any) -> Proof:
    """Verify a copy of the model in which the sites are replaced, and roll back those with which it
    fails, one by one.
    """
    with no_trace(model), progress("verify") as tell:
        reference = Reference(model, *arguments(example_inputs), tell=tell)

        def attempt(chosen: Sequence[_Match]) -> Proof:
            memo: dict[int, Any] = {}
            twin = copied(model, memo)
            for match in chosen:
                _apply(match, memo)
            try:
                return reference.compare(twin)
            except Exception as error:  # whatever a kernel does, its site can be told
                return Proof.of_failure(error)

        kept, good = list(matches), 0
        while (fault := (proof := attempt(kept)).fault()) is not None:
            if good == 0 and not (unchanged := attempt(())):
                raise VerificationError(unchanged)
            good, found = culprit(kept, lambda some: attempt(some).fault(), fault, good)
            kept.pop(good).roll_back(f"with it the whole model fails: {found.reason}", found)
        insist_on_copies(model)
        return proof


def _report_of(model: nn.Module, matches: list[_Match], proof: Proof | None) -> Report:
    result = Report(tree_of(model), proof=proof)
    for match in matches:
        site, first = match.site, match.modules[0]
        if match.rolled_back:
            result.rolled_back.append(site)
        elif is_ours(first) and (match.parent is None or is_ours(match.parent)):
            result.replaced.append(site._replace(reason=None))
        elif site.reason is None:
            result.skipped.append(site._replace(reason="fastdl.optimize(model) would replace it"))
        else:
            result.skipped.append(site)
    return result
