"""Graphs without calls that compute nothing, and with linear layers where products are written."""

import contextlib
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .hazards import UnknownStorage, storages, written
from .normalize import Call, Calls, constant, lineage, normalize, value

# Functions that return their input where there is nothing to do, or a view that is all of it.
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"})
_RETURNS_INPUT = _DROPOUTS | {"to", "contiguous"}
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "expand", "expand_as", "view_as", "squeeze"}
)

_TRANSPOSES = frozenset({"t", "transpose", "permute"})
_PRODUCTS = frozenset({"addmm", "matmul", "mm", "linear"})
_SCALINGS = frozenset({"mul", "div"})
_REPLACED = _RETURNS_INPUT | _VIEWS | _TRANSPOSES | _PRODUCTS | _SCALINGS
_REPLACED |= {"add", "getitem", "unsqueeze"}


def tidy(graph: Graph) -> None:
    """Bring a graph to the form that spellings are written in."""
    writes = [written(node, Calls()) for node in graph.nodes]
    others = [value(n) for node in graph.nodes for n in _shared(node)]
    # from the last to the first: what a call returned is told by the memory of its input
    _apply((_nothing, partial(_times_one, seen=[*writes, others])), list(reversed(graph.nodes)))
    _apply((_product, _bias, _repeat), list(graph.nodes))
    clean(graph)


def _shared(node: Node) -> list[Node]:
    """What the caller has too: inputs, and outputs."""
    if node.op == "output":
        return node.all_input_nodes
    return [node] if node.op in ("placeholder", "get_attr") else []


def _apply(rules: Sequence[Callable[[Node, Call], Node | None]], nodes: list[Node]) -> None:
    """Put what the first rule that knows a node returns in its place."""
    for node in nodes:
        # the arguments of a node change with those before it: none of this can be remembered
        call = None if node._erased else normalize(node)
        if call is None or call.inplace:
            continue
        new = next((new for rule in rules if (new := rule(node, call)) is not None), None)
        if new is not None:
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)


def clean(graph: Graph) -> None:
    """Drop what nobody reads: numbers, and the calls that `tidy` replaces.

    Tracing a fused op leaves such a number behind: whether a transform is active.
    """
    for node in reversed(graph.nodes):
        if not node.users and (_is_number(node) or _is_spent(node)):
            graph.erase_node(node)


def _is_number(node: Node) -> bool:
    numbers = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)
    if node.op not in ("call_function", "call_method") or not isinstance(value(node), numbers):
        return False
    # an item of unknown value has named a symbol, which shapes further down may use
    return not node.is_impure() and (node.target != "item" or constant(node) is not node)


def _is_spent(node: Node) -> bool:
    call = normalize(node)
    return call is not None and not call.inplace and call.op in _REPLACED


def _nothing(node: Node, call: Call) -> Node | None:
    """The input of a call that returns it: a cast to the dtype it has, dropout in evaluation."""
    source = call.arguments.get("input")
    if not isinstance(source, Node) or call.op not in _RETURNS_INPUT | _VIEWS:
        return None
    if call.op in _VIEWS:
        # the caller would get one tensor twice, not a tensor and a view of it
        returned = any(user.op == "output" for user in node.users)
        # a view that is taken without gradients passes none on
        if returned or (value(source).requires_grad and value(node).grad_fn is None):
            return None
    if call.op in _DROPOUTS:
        idle = call.arguments.get("training", call.arguments.get("train")) is False
        return source if idle or call.arguments.get("p") == 0 else None
    return source if _is_all_of(value(node), value(source)) else None


def _is_all_of(result: Any, source: Any) -> bool:
    if result is source:
        return True
    if not (type(result) is type(source) is FakeTensor) or result.layout is not torch.strided:
        return False
    return (
        result.dtype == source.dtype
        and result.dim() == source.dim()
        and result.untyped_storage()._cdata == source.untyped_storage()._cdata
        and result.requires_grad == source.requires_grad
        and all(map(_equal, result.shape, source.shape))
        and all(map(_equal, result.stride(), source.stride()))
        and _equal(result.storage_offset(), source.storage_offset())
    )


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _times_one(node: Node, call: Call, seen: Sequence[Any]) -> Node | None:
    """x / 1.0 is a copy: it may go where nobody writes to either, and the caller has neither."""
    source, other = call.arguments.get("input"), call.arguments.get("other")
    if call.op == "mul" and isinstance(other, Node):
        source, other = other, source
    if call.op not in _SCALINGS or not isinstance(source, Node) or None in seen:
        return None
    if type(other) not in (int, float) or other != 1 or call.arguments.get("rounding_mode"):
        return None
    x, y = value(source), value(node)
    if not isinstance(x, Tensor) or x.dtype != y.dtype or x.requires_grad != y.requires_grad:
        return None
    try:
        return None if storages(seen) & storages((x, y)) else source
    except UnknownStorage:
        return None


def _product(node: Node, call: Call) -> Node | None:
    """A linear layer for addmm(bias, x, w), and for x @ w where w is a parameter."""
    given = call.arguments
    if call.op == "addmm":
        if given.get("beta") != 1 or given.get("alpha") != 1:
            return None
        bias, x, w = given["input"], given["mat1"], given["mat2"]
        if value(bias).dim() != 1 or not _equal(value(bias).shape[0], value(w).shape[1]):
            return None
        return _of_rows(node, x, w, bias) or _linear(node, x, w, bias, value(node))
    if call.op in ("matmul", "mm"):
        x, w = given.get("input"), given.get("other", given.get("mat2"))
        if not isinstance(x, Node) or not isinstance(w, Node) or value(x).dim() < 2:
            return None
        if _is_matrix_of_parameters(w):
            return _linear(node, x, w, None, value(node))
    return None


def _is_matrix_of_parameters(node: Node) -> bool:
    base = _transposed(node) or node
    return isinstance(value(base), nn.Parameter) and value(base).dim() == 2


def _transposed(node: Node) -> Node | None:
    """The matrix that a node is the transpose of."""
    call = normalize(node)
    if call is None or call.op not in _TRANSPOSES:
        return None
    source = call.arguments.get("input")
    if not isinstance(source, Node) or value(source).dim() != 2:
        return None
    return None if _is_all_of(value(node), value(source)) else source


def _of_rows(node: Node, rows: Node, w: Node, bias: Node) -> Node | None:
    """x.view(-1, K) times w, viewed as x was again: no view is needed around a linear layer."""
    call, users = normalize(rows), list(node.users)
    x = call.arguments.get("input") if call is not None and call.op in _VIEWS else None
    if not isinstance(x, Node) or len(users) != 1 or value(x).dim() < 2:
        return None
    last = normalize(users[0])
    shape = (*value(x).shape[:-1], value(w).shape[1])
    again = last is not None and last.op in _VIEWS and len(value(users[0]).shape) == len(shape)
    if not again or not _equal(value(x).shape[-1], value(w).shape[0]):
        return None
    if not all(map(_equal, value(users[0]).shape, shape)):
        return None
    new = _linear(node, x, w, bias, value(users[0]))
    users[0].replace_all_uses_with(new)
    return new


def _repeat(node: Node, call: Call) -> Node | None:
    """repeat_interleave of heads, for x[:, :, None].expand(b, h, n, s, d).reshape(b, h n, s, d)."""
    expanded = call.arguments.get("input")
    if call.op != "reshape" or not isinstance(expanded, Node) or value(expanded).dim() != 5:
        return None
    inner = normalize(expanded)
    one = inner.arguments.get("input") if inner is not None and inner.op == "expand" else None
    x = one.args[0] if isinstance(one, Node) and one.op != "placeholder" and one.args else None
    if not isinstance(one, Node) or not isinstance(x, Node) or not _is_at_two(one):
        return None
    b, h, s, d = value(x).shape
    groups = value(expanded).shape[2]
    shapes = value(expanded).shape, (b, h, groups, s, d), value(node).shape, (b, h * groups, s, d)
    if not isinstance(groups, int) or value(node).dim() != 4:
        return None
    if not all(_equal(m, n) for i in (0, 2) for m, n in zip(*shapes[i : i + 2], strict=True)):
        return None
    return _insert(node, value(node), torch.repeat_interleave, x, groups, 1)


def _is_at_two(node: Node) -> bool:
    """Whether the node is x[:, :, None, :, :] or x.unsqueeze(2) of four dimensions."""
    call, everything = normalize(node), slice(None)
    if call is None or not isinstance(node.args[0], Node):
        return False
    x = value(node.args[0])
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    if call.op == "unsqueeze":
        return call.arguments["dim"] in (2, -3)
    index = node.args[1] if node.target is operator.getitem else ()
    wanted = (everything, everything, None, everything, everything)
    return isinstance(index, tuple) and len(index) > 2 and index == wanted[: len(index)]


def _linear(node: Node, x: Node, w: Node, bias: Node | None, result: Any) -> Node:
    """F.linear(x, w.t(), bias) where the node stands."""
    base = _transposed(w)
    if base is None:
        with getattr(value(w), "fake_mode", None) or contextlib.nullcontext():
            base = _insert(node, value(w).t(), torch.t, w)
    return _insert(node, result, F.linear, x, base, bias)


def _bias(node: Node, call: Call) -> Node | None:
    """A linear layer with the bias that is added right after it."""
    if call.op != "add" or call.arguments.get("alpha", 1) != 1:
        return None
    operands = call.arguments.get("input"), call.arguments.get("other")
    for layer, bias in (operands, operands[::-1]):
        if not isinstance(layer, Node) or not isinstance(bias, Node) or node.prev is not layer:
            continue
        made, b, y = normalize(layer), value(bias), value(layer)
        free = made is not None and made.op == "linear" and made.arguments.get("bias") is None
        if not free or len(layer.users) != 1 or not isinstance(b, nn.Parameter):
            continue
        if b.dim() == 1 and b.dtype == y.dtype and _equal(b.shape[0], y.shape[-1]):
            return _insert(node, value(node), F.linear, *layer.args[:2], bias)
    return None


def _insert(node: Node, result: Any, function: Callable[..., Any], *args: Any) -> Node:
    """A call before a node, from the same line of source."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args)
    new.meta |= lineage(node) | {"example_value": result}
    return new
