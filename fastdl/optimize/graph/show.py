"""A graph before and after, as a person reads it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ...ops._op import public_name
from .names import REPLACES, qualified, source_of
from .normalize import value
from .rewrite import checkpoints, parts

_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and_": "&", "or_": "|", "iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/=",
}  # fmt: skip

# Comments stand below each other up to here.
WIDTH = 72


def show(before: GraphModule, after: GraphModule) -> str:
    """Both graphs, one call a line. In the second, fused calls have a mark, the name of the result
    that they give, and below them the calls that they replace.
    """
    written = list(_parts(before))
    calls = {
        part.name + node.name: _call(node, part.names) for part in written for node in part.calls
    }
    lines = []
    for title, found in (("before", written), ("after", list(_parts(after)))):
        for part in found:
            inside = f", {part.name.rstrip('.')}" if part.name else ""
            lines.append(f"{title}{inside}: {len(part.calls)} calls")
            given = part.given() if title == "before" else ()
            lines += _aligned([*given, *part.lines(calls)])
    return "\n".join(lines)


# A call, what it gives, and where the user wrote it.
Line = tuple[str, str, str]


class _Part(NamedTuple):
    """A graph or the body of a checkpoint, and what its nodes are called."""

    gm: GraphModule
    name: str
    names: dict[Node, str]

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.gm.graph.nodes if node.op.startswith("call_")]

    def given(self) -> Iterator[Line]:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            yield f"given {self.names[node]}", _kind(value(node)), ""

    def lines(self, replaced: Mapping[str, str]) -> Iterator[Line]:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                yield f"return {_argument(node.args[0], self.names)}", "", ""
            elif node.op.startswith("call_"):
                mark = "* " if REPLACES in node.meta else ""
                place, *_ = (source_of(node) or "").split("  ")
                yield f"{mark}{_call(node, self.names)}", _kind(value(node)), place
                for name in node.meta.get(REPLACES, ()):
                    yield f"      was {replaced[self.name + name]}", "", ""


def _parts(gm: GraphModule) -> Iterator[_Part]:
    inputs: dict[str, list[str]] = {}
    for part, name in parts(gm):
        names = _names(part, inputs.get(name))
        for node in checkpoints(part):
            # a body is given what its call is
            inputs[f"{name}{node.args[0].target}."] = [_argument(a, names) for a in node.args[1:]]
        yield _Part(part, name, names)


def _names(gm: GraphModule, inputs: Sequence[str] | None) -> dict[Node, str]:
    """What each node is called: an input as the user calls it, what is fused as what it gives."""
    names = {node: node.name for node in gm.graph.nodes}
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = inputs if inputs is not None else [qualified(node) for node in placeholders]
    taken = set(names.values())
    for node, name in zip(placeholders, known, strict=True):
        names[node] = node.name if name in taken else name
    return names


def _aligned(lines: list[Line]) -> Iterator[str]:
    width = min(max((len(call) for call, kind, _ in lines if kind), default=0), WIDTH)
    for call, kind, source in lines:
        indent = "  " if call.startswith("* ") else "    "
        comment = "   ".join(filter(None, (kind, source)))
        room = width + 4 - len(indent)
        yield f"{indent}{call.ljust(room)}  # {comment}" if comment else f"{indent}{call}"


def _call(node: Node, names: dict[Node, str]) -> str:
    args = [_argument(arg, names) for arg in node.args]
    target = node.target
    name = target if isinstance(target, str) else _function(target)
    of_python = getattr(target, "__module__", None) == "_operator"
    if of_python and name == "getitem":
        return f"{names[node]} = {args[0]}[{args[1].removeprefix('(').removesuffix(')')}]"
    if of_python and name in _SIGNS and len(args) == 2:
        return f"{names[node]} = {args[0]} {_SIGNS[name]} {args[1]}"
    if target is getattr and len(args) == 2:
        return f"{names[node]} = {args[0]}.{node.args[1]}"
    keywords = [f"{key}={_argument(arg, names)}" for key, arg in node.kwargs.items()]
    if node.op == "call_method":
        owner, *args = args
        name = f"{owner}.{name}"
    return f"{names[node]} = {name}({', '.join([*args, *keywords])})"


def _function(target: Any) -> str:
    name = public_name(target) if hasattr(target, "__name__") else str(target)
    return name.lstrip("_") or name


def _argument(argument: Any, names: dict[Node, str]) -> str:
    if isinstance(argument, Node):
        return names[argument]
    if isinstance(argument, (tuple, list)):
        inner = ", ".join(_argument(item, names) for item in argument)
        if isinstance(argument, list):
            return f"[{inner}]"
        return f"({inner},)" if len(argument) == 1 else f"({inner})"
    if isinstance(argument, dict):
        pairs = (f"{key!r}: {_argument(item, names)}" for key, item in argument.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(argument, slice):
        ends = ["" if end is None else _argument(end, names)
                for end in (argument.start, argument.stop, argument.step)]  # fmt: skip
        return ":".join(ends if ends[2] else ends[:2])
    if argument is Ellipsis:
        return "..."
    if isinstance(argument, (torch.dtype, torch.device)):
        return str(argument)
    return repr(argument)


def _kind(result: Any) -> str:
    """Dtypes and shapes: float32 [2, 9, 32]."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    kinds = (
        f"{str(t.dtype).removeprefix('torch.')} [{', '.join(map(str, t.shape))}]" for t in tensors
    )
    return ", ".join(kinds)
