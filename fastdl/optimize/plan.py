"""Put fastdl's modules into a model, with a plan before and a report after, and take them out."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from . import libraries
from .replay import replay
from .report import Plan, Report, Site
from .rules import Finding, examine, is_ours, is_sequential, swap, swap_back
from .sequential import Sequential, group_length, is_plain
from .verify import Proof, arguments, verify

Selector = Sequence[str | type]

LEFT_OUT = "left out by include or exclude"
ALREADY = "it is fastdl's already"


class VerificationError(RuntimeError):
    """The optimized model differs from the original, and was restored. `proof` says where."""

    def __init__(self, proof: Proof) -> None:
        super().__init__(f"the optimized model differs from the original; it is restored.\n{proof}")
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


class _Entry(NamedTuple):
    name: str
    module: nn.Module
    finding: Finding
    chosen: bool

    @property
    def swappable(self) -> bool:
        return self.chosen and self.finding.target is not None and self.finding.reason is None


def plan(model: nn.Module, example_inputs: Any = None) -> Plan:
    """What `optimize` would replace in a model, and why it would leave the rest.

    With `example_inputs`, each site is also run in both forms on what it is called with.
    """
    matches = _survey(model)
    if example_inputs is not None:
        _replay(model, matches, example_inputs)
    return Plan([match.site for match in matches])


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
    Then the whole model is verified; if it fails it is restored, and VerificationError is raised.
    `verify=False` leaves all this out.

    `include` and `exclude` hold patterns of qualified names, as in fnmatch, and module types; each
    stands for a module and all that is in it. `strict=True` raises a ValueError if a module of a
    kind that fastdl knows cannot be replaced; nothing is changed then.
    """
    if verify is None:
        verify = example_inputs is not None
    if verify and example_inputs is None:
        raise ValueError("optimize: verify=True needs example_inputs")
    matches = _survey(model, include, exclude)
    if verify:
        _replay(model, matches, example_inputs)
    if strict:
        _insist(matches)
    changed = [module for match in matches if match.is_new for module in _apply(match)]
    proof = _prove(model, changed, example_inputs) if verify else None
    _reports[model] = _report_of(matches, proof)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give every module of fastdl's its class of torch again, in place, and return the model."""
    for module in model.modules():
        swap_back(module)
    _reports.pop(model, None)
    return model


def report(model: nn.Module) -> Report:
    """What `optimize` did to a model. For a copy of it, what the classes of its modules tell."""
    known = _reports.get(model)
    return known if known is not None else _report_of(_survey(model), None)


# What optimize did, for as long as the model lives.
_reports: "weakref.WeakKeyDictionary[nn.Module, Report]" = weakref.WeakKeyDictionary()


def _survey(
    model: nn.Module, include: Selector | None = None, exclude: Selector | None = None
) -> list[_Match]:
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


def _apply(match: _Match) -> Iterator[nn.Module]:
    """Swap the classes of a site. Yields what was changed."""
    pairs = list(zip(match.modules, match.targets, strict=True))
    if match.parent is not None:
        pairs.append((match.parent, Sequential))
    for module, target in pairs:
        if not is_ours(module):
            swap(module, target)
            yield module


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
        route, before, after, fault = outcomes[index]
        match.site = match.site._replace(route=route, before=before, after=after, reason=fault)
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


def _prove(model: nn.Module, changed: list[nn.Module], example_inputs: Any) -> Proof:
    """Verify the model against its original. If it fails, or cannot run, nothing changes."""
    proof = None
    try:
        proof = verify(model, model, example_inputs)
    finally:
        if not proof:
            for module in changed:
                swap_back(module)
    if not proof:
        raise VerificationError(proof)
    return proof


def _report_of(matches: list[_Match], proof: Proof | None) -> Report:
    result = Report(proof=proof)
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
