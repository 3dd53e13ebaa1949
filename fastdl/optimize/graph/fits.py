"""Whether a fused op takes these arguments and returns what the calls in its place returned."""

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from ...ops._route import policy
from .hazards import autocast_at, nodes_in, signature
from .match import Match
from .normalize import value

# Arguments that an op adds at its ends: none of them may change the shape or dtype of the result.
_ADDED = ("residual", "scale", "shift")


def mistyped(fused: "partial[Any]") -> str | None:
    """Where the op takes a tensor stands a tensor, and everything else is a constant."""
    parameters = signature(fused.func).parameters
    bound = signature(fused.func).bind(*fused.args, **fused.keywords)
    for name, given in bound.arguments.items():
        annotation = parameters[name].annotation
        nodes = nodes_in(given)
        if "Tensor" not in str(annotation):
            if nodes:
                return f"{name} is not a constant"
        elif not (nodes or given is None) or not all(isinstance(value(n), Tensor) for n in nodes):
            return f"{name} is not a tensor"
    return None


class Fits:
    """What was found for a graph: its layers repeat, so most questions come many times."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def reason(self, fused: "partial[Any]", match: Match) -> str | None:
        """Why the op would return something else, with or without what it adds."""
        wanted = [value(n) for n in match.outputs]
        args, keywords = map_arg(_undropped(fused), value)
        with _where(match.outputs[0]):
            key = str((fused.func, tree_map(_described, (args, keywords, wanted)), _autocast()))
            if key not in self._known:
                self._known[key] = _differs(partial(fused.func, *args, **keywords), wanted)
        return self._known[key]


def _undropped(fused: "partial[Any]") -> tuple[Any, ...]:
    """Arguments without dropout, which changes no shape: its mask takes hundreds of calls."""
    bound = signature(fused.func).bind(*fused.args, **fused.keywords)
    if 0.0 <= bound.arguments.get("dropout_p", -1.0) <= 1.0:
        bound.arguments["dropout_p"] = 0.0
    return bound.args, bound.kwargs


def _described(given: Any) -> Any:
    """All of an argument that a result's shape and dtype depend on."""
    if isinstance(given, Tensor):
        strides = given.stride() if given.layout is torch.strided else given.layout
        return given.dtype, given.device, tuple(given.shape), strides
    return given


def _autocast() -> list[Any]:
    devices = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]


@contextlib.contextmanager
def _where(node: Node) -> Iterator[None]:
    """Calls on fake tensors as they are at this node, which leave no guard on sizes.

    What an op accepts and returns does not depend on who computes.
    """
    with contextlib.ExitStack() as stack:
        if (fake := getattr(tree_leaves(value(node))[0], "fake_mode", None)) is not None:
            stack.enter_context(fake)
            if fake.shape_env is not None:
                stack.enter_context(fake.shape_env.suppress_guards())
        for context in (torch.no_grad(), policy("definition"), autocast_at(node)):
            stack.enter_context(context)
        yield


def _differs(fused: "partial[Any]", wanted: list[Tensor]) -> str | None:
    keywords = {name: arg for name, arg in fused.keywords.items() if name not in _ADDED}
    forms = [fused]
    if len(keywords) < len(fused.keywords):
        forms.append(partial(fused.func, *fused.args, **keywords))
    for form in forms:
        try:
            results = form()
        except Exception as error:
            return f"{fused.func.__name__} does not take these arguments: {error}"
        pairs = itertools.zip_longest(tree_leaves(results), tree_leaves(wanted))
        if not all(itertools.starmap(_alike, pairs)):
            return "an operand changes the shape or dtype of the result"
    return None


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    return (
        (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())
        and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))
    )  # fmt: skip
