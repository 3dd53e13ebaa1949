"""A site as two small graphs of the same inputs: the calls that stand there, and the fused op."""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .hazards import nodes_in
from .names import origins


class Key(NamedTuple):
    """A site by its last node, after the names of the bodies around it, and by what is there."""

    node: str
    pattern: str


class Pair(NamedTuple):
    """Both forms of a site. Right before its last node, all inputs are there and as they were."""

    key: Key
    op: str
    last: str
    inputs: tuple[str, ...]
    before: GraphModule
    after: GraphModule


def pair_of(
    key: Key, op: str, nodes: Sequence[Node], outputs: Sequence[Node], fused: "partial[Any]"
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
    results = [call]
    if len(outputs) > 1:
        count = range(len(outputs))
        results = [after.call_function(operator.getitem, (call, i)) for i in count]
    after.output(tuple(results))

    part = key.node[: key.node.rfind(".") + 1]
    forms = (GraphModule(nn.Module(), graph) for graph in (before, after))
    return Pair(key, op, part + origins(nodes)[-1], tuple(part + n.name for n in inputs), *forms)


def _with_inputs(nodes: Sequence[Node]) -> tuple[Graph, dict[Node, Node]]:
    graph = Graph()
    return graph, {node: graph.placeholder(node.name) for node in nodes}
