"""One form for the many ways to call a torch function.

x + y, x.add(y), torch.add(x, y) and x += y are all "add".
"""

import functools
import inspect
import operator
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.fx.operator_schemas import get_signature_for_torch_op

# Elsewhere in torch the same name may mean something else.
_MODULES = frozenset(
    {"torch", "torch.functional", "torch.nn.functional", "torch._C", "torch._C._nn"}
)

_SAME = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
}

# Functions whose arguments have other names than the method's.
_RENAMED = {"split": {"tensor": "input", "split_size_or_sections": "split_size"}}

# Functions that are another one with an argument fixed.
_FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "square": ("pow", {"exponent": 2}),
    "relu6": ("hardtanh", {"min_val": 0.0, "max_val": 6.0}),
    "float": ("to", {"dtype": torch.float32}),
    "double": ("to", {"dtype": torch.float64}),
    "half": ("to", {"dtype": torch.float16}),
    "bfloat16": ("to", {"dtype": torch.bfloat16}),
}


_TRANSPOSES = ("transpose", "swapaxes", "swapdims")


class Call(NamedTuple):
    """A call under torch's name, every argument by name, defaults filled in."""

    op: str
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    inplace: bool


class Calls(dict[Node, Call | None]):
    """The calls of a graph's nodes, None where a node is not one of torch's functions."""

    def __missing__(self, node: Node) -> Call | None:
        self[node] = normalize(node)
        return self[node]


def normalize(node: Node) -> Call | None:
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return _transpose(node.args[0], -2, -1)
    name, signatures = _callee(node)
    if not name:
        return None
    op, inplace = _without_inplace(name, node)
    arguments, defaults = _bind(signatures, node.args, node.kwargs)
    if "out" in arguments:
        return None
    inplace = arguments.pop("inplace", False) is True or inplace
    arguments.pop("_stacklevel", None)  # where a warning points to
    op = _SAME.get(op, op)
    if op in _RENAMED:
        names = _RENAMED[op]
        arguments, defaults = (
            {names.get(name, name): x for name, x in of.items()} for of in (arguments, defaults)
        )
    if op == "type_as" and isinstance(other := arguments.get("other"), Node):
        op, arguments = "to", {"input": arguments["input"], "dtype": _dtype_of(other)}
        arguments, defaults = _bind(_aten_signatures(op), (), arguments)
    if op in _FIXED:
        op, fixed = _FIXED[op]
        arguments, defaults = _bind(_aten_signatures(op), (), {**arguments, **fixed})
    arguments = map_aggregate(arguments, constant)
    if op in _TRANSPOSES and not inplace:
        return _transpose(*arguments.values())
    if node.target is operator.getitem:
        source, index = node.args
        return Call(op, {"input": source, "index": _last_alone(source, index)}, {}, False)
    return Call(op, arguments, defaults, inplace)


def _last_alone(source: Any, index: Any) -> Any:
    """x[..., i] for x[:, :, i] of three dimensions."""
    rank = getattr(value(source), "ndim", None) if isinstance(source, Node) else None
    if not isinstance(index, tuple) or len(index) != rank:
        return index
    *before, last = index
    return (..., last) if all(i == slice(None) for i in before) else index


def _transpose(x: Any, *dims: Any) -> Call | None:
    """Dimensions in order and from the last, where their number is known."""
    rank = getattr(value(x), "ndim", None) if isinstance(x, Node) else None
    if rank is not None and all(isinstance(dim, int) for dim in dims):
        dims = tuple(sorted(dim - rank if dim >= 0 else dim for dim in dims))
    return Call(
        "transpose", dict(zip(("input", "dim0", "dim1"), (x, *dims), strict=True)), {}, False
    )


def value(node: Node) -> Any:
    """What the node computes, on fake tensors."""
    return node.meta.get("example_value")


def lineage(node: Node) -> dict[str, Any]:
    """Where a node comes from: what takes its place comes from there too."""
    keys = ("stack_trace", "nn_module_stack", "source_fn_stack")
    return {key: node.meta[key] for key in keys if key in node.meta}


def _dtype_of(node: Node) -> Any:
    return getattr(value(node), "dtype", node)


def _callee(node: Node) -> tuple[str, Sequence[inspect.Signature]]:
    target = node.target
    if node.op == "call_method":
        return str(target), _aten_signatures(str(target).rstrip("_"))
    if node.op != "call_function":
        return "", ()
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2], _signatures(target)
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        return name, _aten_signatures(_SAME.get(op := _of_operator(name), op))
    method = isinstance(target, types.MethodDescriptorType) and hasattr(torch.Tensor, name)
    if method or getattr(target, "__module__", None) in _MODULES:
        return name, _signatures(target) or _aten_signatures(name.rstrip("_"))
    return "", ()


def _without_inplace(name: str, node: Node) -> tuple[str, bool]:
    if getattr(node.target, "__module__", None) == "_operator":
        op = _of_operator(name)
        return op, op != name
    inplace = name.endswith("_") and not name.startswith("__")
    return name.rstrip("_") if inplace else name, inplace


def _of_operator(name: str) -> str:
    """operator.iadd is operator.__iadd__, and "add" in place."""
    augmented = hasattr(operator, f"__{name}__") and hasattr(operator, f"__{name[1:]}__")
    return name[1:] if name.startswith("i") and augmented else name


@functools.cache
def _signatures(target: Any) -> Sequence[inspect.Signature]:
    if isinstance(target, types.FunctionType):
        return (inspect.signature(target),)
    return get_signature_for_torch_op(target) or ()


@functools.cache
def _aten_signatures(name: str) -> Sequence[inspect.Signature]:
    packet = getattr(torch.ops.aten, name, None)
    try:
        return () if packet is None else get_signature_for_torch_op(packet) or ()
    except NameError:  # a type that torch's schemas have and Python has not, such as Stream
        return ()


def _bind(
    signatures: Sequence[inspect.Signature], args: tuple[Any, ...], kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name and the defaults, of the first signature that takes them."""
    for signature in signatures:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            continue
        bound.apply_defaults()
        return dict(bound.arguments), {n: p.default for n, p in signature.parameters.items()}
    names = ("input", *map(str, range(1, len(args))))
    return {**dict(zip(names, args, strict=False)), **kwargs}, {}


def constant(argument: Any) -> Any:
    """A Python number for a node that holds one: with dynamic shapes Dynamo does so to floats."""
    if not isinstance(argument, Node):
        return argument
    number = value(argument)
    known: Any = None
    if isinstance(number, (bool, int, float)):
        known = number
    elif isinstance(number, torch.SymInt):
        known = number.node.maybe_as_int()
    elif isinstance(number, torch.SymFloat):
        known = number.node.maybe_as_float()
    return argument if known is None else known
