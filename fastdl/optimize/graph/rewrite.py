"""Putting fused ops into a graph of torch's functions."""

import contextlib
import gc
import operator
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..report import Site
from .fits import Fits, mistyped
from .hazards import Hazards
from .match import Match, Pattern, matches, patterns_by_op
from .normalize import Calls, clean, value


def rewrite(gm: GraphModule) -> list[Site]:
    """Replace, in place, what Dynamo's graph spells out by the fused ops."""
    with _no_collection():
        return [site for part in _parts(gm) for site in _rewrite(part)]


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


def _parts(gm: GraphModule) -> Iterator[GraphModule]:
    """The graph and the bodies of its checkpoints. Other bodies are those of closed ops."""
    yield gm
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
    ):
        body = getattr(gm, str(node.args[0].target), None)
        if isinstance(body, GraphModule):
            yield from _parts(body)


def _rewrite(gm: GraphModule) -> list[Site]:
    clean(gm.graph)
    calls = Calls()
    hazards, fits, patterns = Hazards(gm.graph, calls), Fits(), patterns_by_op()
    found = []
    for node in reversed(list(gm.graph.nodes)):
        if not node._erased:
            found += _fuse(node, patterns, calls, hazards, fits)
    clean(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return found[::-1]


def _fuse(
    node: Node, patterns: dict[str, list[Pattern]], calls: Calls, hazards: Hazards, fits: Fits
) -> list[Site]:
    """Replace the largest match that ends at the node. Says why a larger one may not be."""
    refused: dict[int, Site] = {}  # by size, the first one of each
    call = calls[node]
    for pattern in patterns.get(call.op, ()) if call is not None else ():
        for match in matches(pattern, node, calls):
            fused = match.call()
            reason = mistyped(fused) or hazards.reason(match) or fits.reason(fused, match)
            site = Site(_name(node), str(pattern), fused.func.__name__, reason)
            if reason is None:
                _replace(match, fused)
                larger = [old for size, old in refused.items() if size > len(match.nodes)]
                return [site, *larger[:1]]
            refused.setdefault(len(match.nodes), site)
    return list(refused.values())[:1]


def _name(node: Node) -> str:
    """The module that the call stands in and the call: "encoder.0.fc1 (linear)"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [re.sub(r"^[LG]\['\w+'\]\.?", "", str(entry[0])) for entry in stack.values()]
    return f"{path[-1]} ({node.name})" if path and path[-1] else node.name


def _replace(match: Match, fused: "partial[Any]") -> None:
    graph: Graph = match.last.graph
    with graph.inserting_before(match.last):
        new = graph.call_function(fused.func, fused.args, fused.keywords)
        outputs = [new]
        if len(match.outputs) > 1:
            count = range(len(match.outputs))
            outputs = [graph.call_function(operator.getitem, (new, i)) for i in count]
    _describe(new, match.last, tuple(value(n) for n in match.outputs))
    for old, output in zip(match.outputs, outputs, strict=True):
        _describe(output, old, value(old))
        old.replace_all_uses_with(output)
    for node in sorted(match.nodes, reverse=True):
        graph.erase_node(node)


def _describe(new: Node, old: Node, result: Any) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["example_value"] = result
