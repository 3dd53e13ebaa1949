"""A site as two small graphs of the same inputs: the calls that stand there, and the fused op."""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .hazards import nodes_in


class Key(NamedTuple):
    """A site by its last node, after the names of the bodies around it, and by what is there."""

    node: str
    pattern: str


class Pair(NamedTuple):
    """Both forms of a site. Right before its last node, all inputs are there and as they were."""

    key: Key
    last: str
    inputs: tuple[str, ...]
    before: GraphModule
    after: GraphModule


def pair_of(
    key: Key, nodes: Sequence[Node], outputs: Sequence[Node], fused: "partial[Any]"
) -> Pair:
    """Both forms of a site that has not been replaced yet."""
    nodes = sorted(nodes)
    read = {given for node in nodes for given in node.all_input_nodes}
    read |= set(nodes_in((fused.args, fused.keywords)))
    inputs = sorted(read.difference(nodes))

    before, known = _with_inputs(inputs)
    for node in nodes:
        known[node] = before.node_copy(node, known.__getitem__)
    before.output(tuple(known[node] for node in outputs))

    after, known = _with_inputs(inputs)
    args, keywords = map_arg((fused.args, fused.keywords), known.__getitem__)
    call = after.call_function(fused.func, args, keywords)
    after.output(tuple(results_of(call, len(outputs))))

    part = key.node[: key.node.rfind(".") + 1]
    forms = (GraphModule(nn.Module(), graph) for graph in (before, after))
    return Pair(key, part + nodes[-1].name, tuple(part + n.name for n in inputs), *forms)


def results_of(call: Node, count: int) -> list[Node]:
    """Nodes for each result of a call that gives so many."""
    if count == 1:
        return [call]
    return [call.graph.call_function(operator.getitem, (call, i)) for i in range(count)]


def _with_inputs(nodes: Sequence[Node]) -> tuple[Graph, dict[Node, Node]]:
    graph = Graph()
    return graph, {node: graph.placeholder(node.name) for node in nodes}
