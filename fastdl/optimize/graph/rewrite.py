"""Putting fused ops into a graph of torch's functions."""

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...ops._op import public_name
from ..replay import Outcome
from ..report import Site
from .fits import Fits, mistyped
from .hazards import Hazards
from .match import Match, Pattern, matches, patterns_by_op
from .names import REPLACES, Where, origins, source_of
from .normalize import Calls, lineage, value
from .pair import Key, Pair, pair_of, results_of
from .siblings import join
from .tidy import clean, tidy

# What torch.utils.checkpoint is in a graph.
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass
class Choice:
    """Which sites may be replaced, and who wants to see them.

    `known` is what was found out about single sites: one with a fault stays, so that a smaller one
    may take its place. With `only_known`, no other site is touched. Of `ops`, None allows all.
    `where` tells the names of modules, and `keep` is given both forms of each replaced site.
    """

    known: Mapping[Key, Outcome] = field(default_factory=dict)
    ops: Collection[str] | None = None
    only_known: bool = False
    where: Where = field(default_factory=Where)
    keep: Callable[[Pair], None] | None = None

    def wants(self, op: str, key: Key) -> bool:
        if self.only_known and key not in self.known:
            return False
        return self.ops is None or op in self.ops

    def outcome(self, key: Key) -> Outcome:
        return self.known.get(key, Outcome())


def rewrite(gm: GraphModule, choice: Choice | None = None) -> list[Site]:
    """Replace, in place, what Dynamo's graph spells out by the fused ops."""
    choice = choice or Choice()
    with _no_collection():
        return [site for body, part in parts(gm) for site in _Rewriting(body, part, choice).run()]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """To look for garbage among all that torch has made takes longer than what is done here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parts(gm: GraphModule, name: str = "") -> Iterator[tuple[GraphModule, str]]:
    """The graph and the bodies of its checkpoints, and what their nodes' names begin with. Other
    bodies are those of closed ops.
    """
    yield gm, name
    names = {str(n.target): None for c in checkpoints(gm) for n in c.all_input_nodes}
    bodies = {getattr(gm, target, None): target for target in names}
    for body, target in bodies.items():
        if isinstance(body, GraphModule):
            yield from parts(body, f"{name}{target}.")


def checkpoints(gm: GraphModule) -> list[Any]:
    return list(gm.graph.find_nodes(op="call_function", target=CHECKPOINT))


class _Rewriting:
    """Of one graph: from its last node to the first, so that what is before a node is as it was."""

    def __init__(self, gm: GraphModule, part: str, choice: Choice) -> None:
        tidy(gm.graph)
        self._gm, self._part, self._choice = gm, part, choice
        self._calls, self._fits = Calls(), Fits()
        self._hazards = Hazards(gm.graph, self._calls)
        self._replaced: dict[str, Site] = {}  # by the names of the calls that stood there

    def run(self) -> list[Site]:
        patterns, found = patterns_by_op(), []
        for node in reversed(list(self._gm.graph.nodes)):
            if not node._erased:
                # whatever reads the node has been fused by now
                found += join(node, self._site)
                call = self._calls[node]
                found += self._fuse(node, patterns.get(call.op, []) if call else [])
        clean(self._gm.graph)
        self._gm.graph.lint()
        self._gm.recompile()
        # of a call that was joined with others, the last site is told
        known = set(map(id, self._replaced.values()))
        return [site for site in reversed(found) if site.reason or id(site) in known]

    def _fuse(self, node: Node, patterns: list[Pattern]) -> list[Site]:
        """Replace the largest match that ends at the node. Says why a larger one may not be."""
        refused: dict[int, Site] = {}  # by size, the first one of each
        for pattern in patterns:
            for match in matches(pattern, node, self._calls):
                site = self._site(match)
                if site is None:
                    continue
                if site.reason is None:
                    larger = [old for size, old in refused.items() if size > len(match.nodes)]
                    return [site, *larger[:1]]
                refused.setdefault(len(match.nodes), site)
        return list(refused.values())[:1]

    def _site(self, match: Match) -> Site | None:
        """The match, replaced if nothing forbids it. None if nobody asks for it."""
        node, fused, choice = match.outputs[0], match.call(), self._choice
        op, key = public_name(fused.func), Key(self._part + node.name, match.text)
        if not choice.wants(op, key):
            return None
        known = choice.outcome(key)
        reason = known.fault or mistyped(fused) or self._hazards.reason(match)
        reason = reason or self._fits.reason(fused, match)
        name = choice.where.site_name(node)
        site = Site(name, key.pattern, op, reason, *known[:4], source_of(node))
        if reason is None:
            self._replaced |= dict.fromkeys(origins(match.nodes), site)
            if choice.keep is not None:
                choice.keep(pair_of(key, match.nodes, match.outputs, fused))
            _replace(match, fused)
        return site


def _replace(match: Match, fused: "partial[Any]") -> None:
    graph: Graph = match.place.graph
    with graph.inserting_before(match.place):
        new = graph.call_function(fused.func, fused.args, fused.keywords)
        outputs = results_of(new, len(match.outputs))
    _describe(new, match.last, tuple(value(n) for n in match.outputs))
    new.meta[REPLACES] = origins(sorted(match.nodes))
    for old, output in zip(match.outputs, outputs, strict=True):
        _describe(output, old, value(old))
        old.replace_all_uses_with(output)
    for node in sorted(match.nodes, reverse=True):
        graph.erase_node(node)
    for old, output in zip(match.outputs, outputs, strict=True):
        output.name = old.name  # what was found in the original graph keeps its name


def _describe(new: Node, old: Node, result: Any) -> None:
    new.meta |= lineage(old) | {"example_value": result}
