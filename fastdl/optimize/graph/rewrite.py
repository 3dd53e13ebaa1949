"""Putting fused ops into a graph of torch's functions."""

import contextlib
import inspect
import operator
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ...ops._route import policy
from ..report import Site
from .hazards import Hazards, autocast_at, nodes_in
from .match import Match, Pattern, matches, patterns_by_op
from .normalize import Calls, clean, value

# Arguments that an op adds at its ends: none of them may change the shape or dtype of the result.
_ADDED = ("residual", "scale", "shift")


def rewrite(gm: GraphModule) -> list[Site]:
    """Replace, in place, what Dynamo's graph spells out by the fused ops."""
    return [site for part in parts(gm) for site in _rewrite(part)]


def parts(gm: GraphModule) -> list[GraphModule]:
    """The graph and the bodies of its checkpoints. Other bodies are those of closed ops."""
    named = [getattr(gm, str(n.target), None) for c in checkpoints(gm) for n in c.all_input_nodes]
    bodies = dict.fromkeys(body for body in named if isinstance(body, GraphModule))
    return [gm, *(part for body in bodies for part in parts(body))]


def checkpoints(gm: GraphModule) -> list[Node]:
    target = torch.ops.higher_order.tag_activation_checkpoint
    return list(gm.graph.find_nodes(op="call_function", target=target))


def _rewrite(gm: GraphModule) -> list[Site]:
    clean(gm.graph)
    calls = Calls()
    hazards, patterns = Hazards(gm.graph, calls), patterns_by_op()
    found = []
    for node in reversed(list(gm.graph.nodes)):
        if not node._erased:
            found += _fuse(node, patterns, calls, hazards)
    clean(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return found[::-1]


def _fuse(
    node: Node, patterns: dict[str, list[Pattern]], calls: Calls, hazards: Hazards
) -> list[Site]:
    """Replace the largest match that ends at the node. Says why a larger one may not be."""
    refused: dict[int, Site] = {}  # by size, the first one of each
    call = calls[node]
    for pattern in patterns.get(call.op, ()) if call is not None else ():
        for match in matches(pattern, node, calls):
            fused = match.call()
            reason = _mistyped(fused) or hazards.reason(match) or _differs(fused, match)
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


@cache
def _signature(op: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(op, eval_str=True)


def _mistyped(fused: "partial[Any]") -> str | None:
    """Where the op takes a tensor stands a tensor, and everything else is a constant."""
    signature = _signature(fused.func)
    for name, given in signature.bind(*fused.args, **fused.keywords).arguments.items():
        annotation = signature.parameters[name].annotation
        nodes = nodes_in(given)
        if "Tensor" not in str(annotation):
            if nodes:
                return f"{name} is not a constant"
        elif not (nodes or given is None) or not all(isinstance(value(n), Tensor) for n in nodes):
            return f"{name} is not a tensor"
    return None


def _differs(fused: "partial[Any]", match: Match) -> str | None:
    """Whether the op would return another shape or dtype, with or without what it adds."""
    keywords = {name: arg for name, arg in fused.keywords.items() if name not in _ADDED}
    try:
        whole = _run(fused, match.outputs[0])
        plain = _run(partial(fused.func, *fused.args, **keywords), match.outputs[0])
    except Exception as error:
        return f"{fused.func.__name__} does not take these arguments: {error}"
    wanted = [value(n) for n in match.outputs]
    for results in (whole, plain):
        results = results if isinstance(results, tuple) else (results,)
        if not all(map(_alike, results, wanted)):
            return "an operand changes the shape or dtype of the result"
    return None


def _run(fused: "partial[Any]", at: Node) -> Any:
    """The op on fake tensors, leaving no guard on their sizes.

    What it accepts and returns does not depend on who computes.
    """
    args, keywords = map_arg((fused.args, fused.keywords), value)
    with contextlib.ExitStack() as stack:
        if (fake := getattr(value(at), "fake_mode", None)) is not None:
            stack.enter_context(fake)
            if fake.shape_env is not None:
                stack.enter_context(fake.shape_env.suppress_guards())
        for context in (torch.no_grad(), policy("definition"), autocast_at(at)):
            stack.enter_context(context)
        return fused.func(*args, **keywords)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (
        (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())
        and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))
    )  # fmt: skip


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
