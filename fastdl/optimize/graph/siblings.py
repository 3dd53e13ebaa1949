"""Linear layers of one input become one call, placed where the first of them stands.

Only calls of one block are joined: what a later one makes would be kept from the first one on, as
keys and values of all layers that are made from one encoder's output. A block is over where a
product reads what its calls have made. Views, norms and rotations of queries may stand before the
call that makes the keys.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import Node

from ...ops.linear import linear
from ...ops.linears import MOST, linears
from ..report import Site
from .match import Match

# Replaces a match, and says why not; None where nobody wants to know of it.
Attempt = Callable[[Match], Site | None]

_PRODUCTS = ("linear", "matmul", "mm", "einsum", "conv", "attention", "attn")


class Siblings(Match):
    """Calls of `linear` with the same input and nothing after it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = self.outputs = list(nodes)
        self.place, self.last = nodes[0], nodes[-1]
        inputs, weights, biases = zip(*(node.args for node in nodes), strict=True)
        self.bindings = {"input": inputs[0], "weights": list(weights)}
        if any(bias is not None for bias in biases):
            self.bindings["biases"] = list(biases)

    @property
    def text(self) -> str:
        return " | ".join("linear" for _ in self.nodes)

    def call(self) -> "partial[Any]":
        return partial(linears, *self.bindings.values())


def join(node: Node, attempt: Attempt) -> list[Site]:
    """Join the linear layers that read what the node makes. All of them are calls of ours."""
    calls = sorted(user for user in node.users if _is_plain(user, node))
    return [
        site for run in _blocks(calls) for group in _shares(run) for site in _try(group, attempt)
    ]


def _is_plain(user: Node, input: Node) -> bool:
    return (
        user.target is linear and len(user.args) == 3 and user.args[0] is input and not user.kwargs
    )


def _blocks(calls: Sequence[Node]) -> Iterator[list[Node]]:
    """Calls between which no product stands of what the earlier ones made."""
    if not calls:
        return
    block: list[Node] = []
    made: set[Node] = set()
    node, others = calls[0], frozenset(calls)
    while node.prev is not calls[-1]:
        if node in others:
            block.append(node)
            made.add(node)
        elif not made.isdisjoint(node.all_input_nodes):
            made.add(node)
            if _is_product(node):
                yield block
                block, made = [], set()
        node = node.next
    yield block


def _is_product(node: Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return isinstance(node.target, HigherOrderOperator) or any(word in name for word in _PRODUCTS)


def _shares(block: list[Node]) -> Iterator[list[Node]]:
    """As few groups as can be, of sizes as equal as can be: four are two and two."""
    count = math.ceil(len(block) / MOST)
    for i in range(count):
        yield block[i * len(block) // count : (i + 1) * len(block) // count]


def _try(group: list[Node], attempt: Attempt) -> list[Site]:
    """Where the whole group must not be joined, perhaps a smaller one may."""
    found: list[Site] = []
    for some in (group, group[:-1], group[1:]):
        site = attempt(Siblings(some)) if len(some) > 1 else None
        if site is not None and site.reason is None:
            return [site, *found[:1]]
        found += [site] if site is not None else []
    return found[:1]
