"""Copies of graphs that can be run without a trace."""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from .normalize import normalize

# What torch calls the rate of a dropout.
_RATES = ("dropout_p", "dropout")


@contextlib.contextmanager
def outside_of_compile() -> Iterator[None]:
    """Inside of a backend, where torch says that it is compiling: ops run as they do elsewhere."""
    flag = getattr(torch.compiler, "_is_compiling_flag", False)
    vars(torch.compiler)["_is_compiling_flag"] = False
    try:
        with tracing(None):
            yield
    finally:
        vars(torch.compiler)["_is_compiling_flag"] = flag


def twin(gm: GraphModule) -> GraphModule:
    """A graph of its own, with nodes of the same names, on the same tensors."""
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    for name, body in gm.named_children():
        if isinstance(body, GraphModule):
            setattr(made, name, twin(body))
    return made


def without_dropout(gm: GraphModule) -> GraphModule:
    """The graph and the bodies in it, with every rate of a dropout at 0."""
    for part in gm.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                _without_dropout(node)
            part.recompile()
    return gm


def _without_dropout(node: Node) -> None:
    op, arguments = _call(node)
    names = (*_RATES, "p") if "dropout" in op else _RATES
    for index, name in enumerate(arguments):
        if name in names and isinstance(arguments[name], float):
            if name not in node.kwargs and index < len(node.args):
                node.update_arg(index, 0.0)
            else:
                node.update_kwarg(name, 0.0)


def _call(node: Node) -> tuple[str, dict[str, Any]]:
    """The name of a function of torch or of ours, and its arguments in order."""
    call = normalize(node)
    if call is not None:
        return call.op, call.arguments
    if not inspect.isfunction(node.target):
        return "", {}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except TypeError:  # a node's arguments are not always the function's
        return "", {}
    return node.target.__name__, dict(bound.arguments)


class Held(nn.Module):
    """A graph with its inputs: those that need a gradient are parameters, other tensors buffers.

    So a proof takes gradients of what the graph would, and sees what is written to the rest.
    """

    def __init__(self, unit: GraphModule, inputs: Mapping[str, Any], training: bool) -> None:
        super().__init__()
        self.unit = unit
        self.names = tuple(inputs)
        self.others: dict[str, Any] = {}
        self.leaves: set[str] = set()
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                self.others[name] = value
            elif training and value.requires_grad:
                self._parameters[name] = nn.Parameter(value.detach())  # names may have dots
                if value.is_leaf:
                    self.leaves.add(name)
            else:
                self._buffers[name] = value.detach()
        self.train(training)

    def forward(self) -> Any:
        """The graph's results. A graph that only writes gives nothing: then the buffers tell."""
        result = self.unit(*map(self._input, self.names))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return torch.zeros(())
        return result

    def _input(self, name: str) -> Any:
        parameter = self._parameters.get(name)
        if parameter is not None:  # what is no leaf may be written to
            return parameter if name in self.leaves else parameter.clone()
        return self._buffers[name] if name in self._buffers else self.others[name]


def concrete(value: Any) -> Any:
    """The number that stands for a size when a graph with dynamic shapes is compiled."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value
