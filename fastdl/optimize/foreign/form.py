"""What modules of other libraries compute, told from their attributes, types and shapes.

A form is a guess: probe.py decides. Its `run` looks again at each call, and returns NotImplemented
where the module is no longer what it was: then the module's own forward runs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn._children import is_plain
from ...ops.activation import BY_MODULE
from ..libraries import MADE

Draw = Callable[..., Tensor]
Inputs = tuple[Tensor | None, ...]


def original_class(cls: type) -> Any:
    """The class that a class with a form was made of, else the class itself."""
    return MADE.get(cls, cls)


def form_of(cls: type) -> "Form | None":
    return vars(cls).get("_fastdl_form")


@dataclass(frozen=True)
class Form:
    """How a module's forward is fastdl's. Fields name its attributes."""

    # Whether where it rounds is part of what it is.
    rounds: ClassVar[bool] = False

    @property
    def op(self) -> str:
        raise NotImplementedError

    def inputs(self, module: Any, draw: Draw) -> Inputs:
        """Arguments of a call. A size of 0 is any."""
        raise NotImplementedError

    def run(self, module: Any, *args: Any) -> Any:
        raise NotImplementedError


def one_tensor(args: tuple[Any, ...], weight: Tensor | None) -> bool:
    """Whether a call is f(x), with x in the dtype of the weight or cast to the same by autocast."""
    return (
        len(args) == 1
        and isinstance(args[0], Tensor)
        and (weight is None or args[0].dtype == weight.dtype or in_autocast(args[0]))
    )


def in_autocast(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


@dataclass(frozen=True)
class Act:
    """An activation: a module or a function that stands as an attribute, or none of these, where it
    is written in forward. `name` is None for a module of torch's, whose parameters count.
    """

    attribute: str | None
    kind: Any
    name: str | None

    def of(self, module: Any) -> Any:
        """What fastdl's functions take for it; NotImplemented if it has been exchanged."""
        if self.attribute is None:
            return self.name
        found = getattr(module, self.attribute, None)
        if not isinstance(found, nn.Module):
            return self.name if found is self.kind else NotImplemented
        if not is_plain(found):
            return NotImplemented
        if self.name is None:
            return found if type(found) in BY_MODULE else NotImplemented
        return self.name if original_class(type(found)) is self.kind else NotImplemented


def parameters(cls: Any) -> dict[str, Any]:
    """The names of the arguments of a class's forward after self, with their defaults."""
    _, *rest = inspect.signature(original_class(cls).forward).parameters.values()
    return {p.name: p.default for p in rest if p.kind is p.POSITIONAL_OR_KEYWORD}
