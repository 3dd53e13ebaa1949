"""Finding a spelling in a graph."""

import functools
import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from ...ops._op import SPELLINGS, Spelling
from .normalize import Call, Calls, value

_COMMUTATIVE = frozenset({"add", "mul"})
_MISSING = object()


class _Tracer(GraphAppendingTracer):
    """Nodes that stand in a list. There are thousands: a graph would name each, and print it."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.nodes: list[Node] = []

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any) -> Node:
        self.nodes.append(Node(self.graph, str(len(self.nodes)), kind, target, args, kwargs))
        return self.nodes[-1]


class Pattern:
    """A spelling as a graph. Parameters that have a default keep it; the others match anything.

    What it computes of the shapes and dtypes of tensors (`x.shape[-1] // 2`) matches the result.
    """

    def __init__(self, spelling: Spelling) -> None:
        tracer = _Tracer(fx.Graph())
        self.parameters = {
            name: tracer.create_node("placeholder", name, (), {})
            for name, parameter in inspect.signature(spelling.pattern).parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        result = spelling.pattern(*(fx.Proxy(n, tracer) for n in self.parameters.values()))
        self.outputs = [p.node for p in (result if isinstance(result, tuple) else (result,))]
        self.root = self.outputs[0]
        self.spelling = spelling
        for node in tracer.nodes:
            node.meta["fact"] = _is_fact(node)
        self.ops = [n for n in tracer.nodes if n.op != "placeholder" and not n.meta["fact"]]
        self.calls = Calls()

    @property
    def op(self) -> str:
        return self._call(self.root).op

    def _call(self, node: Node) -> Call:
        call = self.calls[node]
        assert call is not None, f"{node.format_node()} is not a function of torch"
        return call

    def __str__(self) -> str:
        return " -> ".join(self._call(n).op for n in self.ops)


def _is_fact(node: Node) -> bool:
    """Whether a node of a pattern stands for no tensor: a shape or dtype, and what follows."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype")
    inputs = node.all_input_nodes
    return bool(inputs) and all(n.meta["fact"] for n in inputs)


class Match:
    """Where a pattern was found: for each of its nodes, what stands for it in the graph.

    The fused call comes to its `place`.
    """

    def __init__(self, pattern: Pattern, found: dict[Node, Any]) -> None:
        self.pattern = pattern
        self.nodes: list[Node] = list(dict.fromkeys(found[n] for n in pattern.ops))
        self.outputs: list[Node] = [found[n] for n in pattern.outputs]
        self.place = self.last = max(self.nodes)
        self.bindings: dict[str, Any] = {
            name: found.get(n) for name, n in pattern.parameters.items()
        }

    @property
    def text(self) -> str:
        """What is replaced."""
        return str(self.pattern)

    def call(self) -> "partial[Any]":
        """The public op that computes the same."""
        return self.pattern.spelling.call(**self.bindings)


_pattern = functools.cache(Pattern)


def patterns_by_op() -> dict[str, list[Pattern]]:
    """All spellings by the function that comes last, large ones first."""
    table: dict[str, list[Pattern]] = {}
    for pattern in map(_pattern, SPELLINGS):
        table.setdefault(pattern.op, []).append(pattern)
    for patterns in table.values():
        patterns.sort(key=lambda p: -len(p.ops))
    return table


def matches(pattern: Pattern, root: Node, calls: Calls) -> Iterator[Match]:
    """Every way in which the pattern matches with its last node at `root`."""
    for found in _match(pattern.root, root, {}, (pattern.calls, calls)):
        yield Match(pattern, found)


Found = dict[Node, Any]


def _match(wanted: Any, given: Any, found: Found, calls: tuple[Calls, Calls]) -> Iterator[Found]:
    if isinstance(wanted, (list, tuple)) and isinstance(given, (list, tuple)):
        if len(wanted) == len(given):
            yield from _match_all(list(zip(wanted, given, strict=True)), found, calls)
    elif isinstance(wanted, slice) and isinstance(given, slice):
        yield from _match(_parts(wanted), _parts(given), found, calls)
    elif not isinstance(wanted, Node):
        if same(wanted, given):
            yield found
    elif wanted.meta["fact"]:
        if _is(given, _evaluate(wanted, found)):
            yield found
    elif wanted in found:
        if same(found[wanted], given):
            yield found
    elif wanted.op == "placeholder":
        yield {**found, wanted: given}
    elif isinstance(given, Node):
        ours, theirs = calls[0][wanted], calls[1][given]
        if ours is not None and theirs is not None and ours.op == theirs.op:
            for pairs in _pairings(ours, theirs):
                yield from _match_all(pairs, {**found, wanted: given}, calls)


def _parts(part: slice) -> tuple[Any, ...]:
    return part.start, part.stop, part.step


def _evaluate(fact: Node, found: Found) -> Any:
    """What a pattern computes of shapes, for the tensors found so far."""

    def known(node: Node) -> Any:
        if node.meta["fact"]:
            return _evaluate(node, found)
        given = found.get(node)
        return value(given) if isinstance(given, Node) else given

    assert callable(fact.target)
    try:
        return fact.target(*map_arg(fact.args, known))
    except (AttributeError, IndexError, TypeError):  # not a tensor, or of no such dimension
        return _MISSING


def _is(given: Any, fact: Any) -> bool:
    """Whether an argument is this number or dtype, for all sizes that are left open."""
    given = value(given) if isinstance(given, Node) else given
    sizes = (int, torch.SymInt)
    if isinstance(given, sizes) and isinstance(fact, sizes):
        return statically_known_true(given == fact)
    return type(given) is type(fact) and bool(given == fact)


def _match_all(
    pairs: list[tuple[Any, Any]], found: Found, calls: tuple[Calls, Calls]
) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    (wanted, given), *others = pairs
    for extended in _match(wanted, given, found, calls):
        yield from _match_all(others, extended, calls)


def _pairings(ours: Call, theirs: Call) -> Iterator[list[tuple[Any, Any]]]:
    """The arguments of both calls side by side. What only one knows must have its default."""
    pairs = {}
    for name in ours.arguments | theirs.arguments:
        wanted = ours.arguments.get(name, _MISSING)
        given = theirs.arguments.get(name, _MISSING)
        if wanted is _MISSING and not same(given, theirs.defaults.get(name, _MISSING)):
            return
        if given is _MISSING and not same(wanted, ours.defaults.get(name, _MISSING)):
            return
        if wanted is not _MISSING and given is not _MISSING:
            pairs[name] = (wanted, given)
    yield list(pairs.values())
    if ours.op in _COMMUTATIVE and {"input", "other"} <= pairs.keys():
        (a, x), (b, y) = pairs["input"], pairs["other"]
        yield list({**pairs, "input": (a, y), "other": (b, x)}.values())


def same(a: Any, b: Any) -> bool:
    """Whether these are the same node or equal constants; a dimension equals a list of it."""
    if isinstance(a, Node) or isinstance(b, Node) or isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) or isinstance(b, (list, tuple)):
        a, b = (x if isinstance(x, (list, tuple)) else (x,) for x in (a, b))
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        # people write sqrt(2 / pi) with ten digits
        return math.isclose(a, b, rel_tol=1e-9)
    return type(a) is type(b) and bool(a == b)
