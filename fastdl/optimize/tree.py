"""A model's modules as names, classes and counts: what a page draws after the model is gone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy


class Node(NamedTuple):
    """A module: its key in its parent, its full name, and the parameters in it and below it."""

    key: str
    name: str
    cls: str
    parameters: int
    children: tuple["Node", ...] = ()
    # the name under which a shared module was met before; its children are there
    same_as: str | None = None


class Tree(NamedTuple):
    """All modules of a model, with the dtypes and devices of its parameters."""

    root: Node
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]


def names(node: Node) -> Iterator[str]:
    """The full names of a module and of those in it."""
    yield node.name
    for child in node.children:
        yield from names(child)


def tree_of(model: nn.Module) -> Tree:
    """The modules of a model. Nothing in the result refers to it."""
    parameters = list(model.parameters())
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)
    devices = dict.fromkeys(str(p.device) for p in parameters)
    return Tree(_node("", "", model, {}), tuple(dtypes), tuple(devices))


def _node(key: str, name: str, module: nn.Module, met: dict[int, str]) -> Node:
    cls = _class_name(module)
    count = sum(0 if is_lazy(p) else p.numel() for p in module.parameters())
    if id(module) in met:
        return Node(key, name, cls, count, same_as=met[id(module)])
    met[id(module)] = name
    children = [
        _node(child_key, f"{name}.{child_key}" if name else child_key, child, met)
        for child_key, child in module._modules.items()
        if child is not None
    ]
    return Node(key, name, cls, count, tuple(children))


def _class_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", type(module).__name__)
    return type(module).__name__
