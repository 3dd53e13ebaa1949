"""What forbids to replace a match.

Dynamo's graphs are not functional, and a fused op reads later than its parts did.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .match import Match
from .normalize import Calls, value

# Arguments that norms write to without a word of it in their names or signatures.
_STATISTICS = ("running_mean", "running_var")

# The package of the fused ops.
_OURS = __name__.partition(".")[0]

# They act on no tensor, and on nothing that a tensor depends on.
_HARMLESS = frozenset({"_log_api_usage_once", "_check", "_assert", "_assert_scalar"})

Storages = frozenset[int]


class UnknownStorage(Exception):
    """A tensor whose memory cannot be told, such as the wrappers of torch.func."""


def storages(values: Any) -> Storages:
    """The memory that tensors live in, as the fake tensors of tracing share it."""
    found: set[int] = set()
    for tensor in tree_leaves(values):
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            found |= storages([getattr(tensor, name) for name in inner])
        elif isinstance(tensor, Tensor):
            try:
                found.add(tensor.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):
                raise UnknownStorage from None
    return frozenset(found)


def nodes_in(arguments: Any) -> list[Node]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Node)]


class Hazards:
    """Who writes where in a graph, and where the mode of autograd or autocast changes."""

    def __init__(self, graph: Graph, calls: Calls) -> None:
        self._calls = calls
        self._writes = [(node, w) for node in graph.nodes if (w := written(node, calls))]
        self._given = [value(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")]

    @functools.cached_property
    def _inputs(self) -> Storages:
        return storages(self._given)

    def reason(self, match: Match) -> str | None:
        """Why the match must stay as it is."""
        try:
            return (
                self._escapes(match)
                or self._crosses_a_mode(match)
                or self._writes_inside(match)
                or self._written_between(match)
                or self._written_after(match)
            )
        except UnknownStorage:
            return "a torch.func transform is active"

    def _escapes(self, match: Match) -> str | None:
        for node in nodes_in(list(match.bindings.values())):
            if node in match.nodes:
                return f"{node.name} is an argument of the fused call and a part of it"
            if not node < match.place:
                return f"{node.name} is computed after the first of these calls"
        for node in match.nodes:
            outside = [user for user in node.users if user not in match.nodes]
            if outside and node not in match.outputs:
                return f"{node.name} is also used by {outside[0].name}"
            if any(user < match.place for user in outside):
                return f"{node.name} is used before the last of these calls"
        return None

    def _crosses_a_mode(self, match: Match) -> str | None:
        for node in _between(match):
            if _changes_mode(node):
                return f"{node.name} changes the mode between these calls"
        return None

    def _bound(self, match: Match) -> list[Node]:
        return [n for n in nodes_in(list(match.bindings.values())) if isinstance(value(n), Tensor)]

    def _writes_inside(self, match: Match) -> str | None:
        """An op in place may go if what it writes to is ours and has no other reader."""
        bound = storages([value(n) for n in self._bound(match)])
        for node in match.nodes:
            call = self._calls[node]
            if call is None or not call.inplace:
                continue
            target = storages(value(node))
            if target & bound:
                return f"{node.name} writes to its input"
            before = [n for n in match.nodes if n < node]
            if any(storages(value(n)) & target and len(n.users) > 1 for n in before):
                return f"{node.name} writes to a tensor that has another reader"
        return None

    def _written_between(self, match: Match) -> str | None:
        """What the match makes itself has no reader outside, so nobody else can write to it."""
        bound = self._bound(match)
        memory = storages([value(n) for n in bound])
        for node in _between(match):
            targets = written(node, self._calls)
            if targets is None:
                return f"{node.name} may write to a tensor of these calls"
            if storages(targets) & memory or self._may_alias(node, targets, bound):
                return f"{node.name} writes to a tensor of these calls"
        return None

    def _may_alias(self, node: Node, targets: list[Tensor], bound: list[Node]) -> bool:
        """Two inputs of a graph may share memory at the next call: only the first one was seen."""
        call = self._calls[node]
        if call is not None and call.arguments.keys() >= {*_STATISTICS}:
            return False  # running statistics share it with nothing
        inputs = [t for n in bound if storages(t := value(n)) & self._inputs]
        return any(
            storages(target) & self._inputs
            and (target.dtype, target.device) == (given.dtype, given.device)
            for target in targets
            for given in inputs
        )

    def _written_after(self, match: Match) -> str | None:
        """A fused op may save for backward what its parts did not."""
        kept = [value(n) for n in (*self._bound(match), *match.outputs)]
        if not any(y.requires_grad for n in match.outputs for y in tree_leaves(value(n))):
            return None
        memory = storages(kept)
        for node, targets in self._writes:
            if not node._erased and match.last < node and storages(targets) & memory:
                return f"{node.name} writes to a tensor that backward may need"
        return None


def _between(match: Match) -> Iterator[Node]:
    """What stands between the first and the last node of a match and is not of it."""
    node = min(match.nodes).next
    while node < match.last:
        if node not in match.nodes:
            yield node
        node = node.next


def written(node: Node, calls: Calls) -> list[Tensor] | None:
    """The tensors that a node writes to, as fake tensors. None if nobody knows."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, HigherOrderOperator):
        return _written_by_body(node)
    if node.op == "call_function" and _is_foreign(node.target):
        return None
    targets = _statistics(node) if _root(node.target) == _OURS else _targets(node, calls)
    return [t for n in nodes_in(targets) for t in tree_leaves(value(n)) if isinstance(t, Tensor)]


def _root(function: Any) -> str:
    return (getattr(function, "__module__", None) or "builtins").partition(".")[0]


def _is_foreign(function: Any) -> bool:
    return _root(function) not in (_OURS, "torch", "_operator", "builtins", "math")


@functools.cache
def signature(op: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(op, eval_str=True)


def _statistics(node: Node) -> list[Any]:
    """All that a fused op may write to: running statistics."""
    assert callable(node.target)
    given = signature(node.target).bind(*node.args, **node.kwargs).arguments
    return [given.get(name) for name in ("running_mean", "running_var", "norm")]


def _targets(node: Node, calls: Calls) -> Any:
    if isinstance(node.target, OpOverload):
        return _by_schema(node, [node.target])
    if isinstance(node.target, OpOverloadPacket):
        return _by_schema(node, [getattr(node.target, o) for o in node.target.overloads()])
    call = calls[node]
    given = {} if call is None else call.arguments
    targets = [node.kwargs.get("out"), *map(given.get, _STATISTICS)]
    if given.get("max_norm") is not None:  # an embedding normalizes the rows that it reads
        targets.append(given.get("weight"))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    of_python = name == "setitem" or name.startswith(("__i", "__set"))
    if of_python or (call is not None and call.inplace):
        targets += [node.args[:1], given.get("input")]
    return targets


def _by_schema(node: Node, overloads: list[OpOverload]) -> list[Any]:
    """What any of the overloads would write to."""
    found = []
    for overload in overloads:
        arguments = overload._schema.arguments
        given = {**{a.name: v for a, v in zip(arguments, node.args, strict=False)}, **node.kwargs}
        writes = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        found += [given.get(name) for name in writes]
    return found


def _written_by_body(node: Node) -> list[Tensor] | None:
    """A body shares its fake tensors with the graph around it."""
    owner = node.graph.owning_module
    named = [getattr(owner, str(n.target), None) for n in node.all_input_nodes]
    bodies = [body for body in named if isinstance(body, GraphModule)]
    found: list[Tensor] = []
    calls = Calls()
    for body in bodies:
        for inner in body.graph.nodes:
            targets = written(inner, calls)
            if targets is None:
                return None
            found += targets
    return found if bodies else None


def _changes_mode(node: Node) -> bool:
    """Calls that neither take nor return a tensor or number act on global state."""
    if node.op != "call_function" or value(node) is not None:
        return False
    if getattr(node.target, "__name__", "") in _HARMLESS:
        return False
    return not any(isinstance(value(n), Tensor) for n in node.all_input_nodes)


@contextlib.contextmanager
def autocast_at(node: Node) -> Iterator[None]:
    """The autocast regions that are open where the node stands."""
    find, amp = node.graph.find_nodes, torch.amp.autocast_mode
    with contextlib.ExitStack() as stack:
        for enter in find(op="call_function", target=amp._enter_autocast):
            if enter < node and not any(leave < node for leave in enter.users):
                stack.enter_context(torch.autocast(*enter.args))
        yield
