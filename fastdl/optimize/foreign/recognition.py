"""Modules of other libraries: which form fits one, and the class that runs it.

Attributes, types and shapes say what a module may be. Each guess runs beside the module's own
forward on a small copy (probe.py), and the first that agrees in every digit is taken.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...nn._children import is_plain
from ...ops.activation import BY_MODULE
from ..libraries import derive
from .blocks import blocks
from .form import Act, Form, original_class, parameters
from .leaves import NAMES, Elementwise, Transposed, leaves
from .parts import IDENTITIES, KINDS, Parts
from .perceptrons import perceptrons
from .probe import Probe, probing

# What every module has.
_OWN = vars(nn.Module()).keys()

_KNOWN: dict[Any, Form | None] = {}


def recognise(module: nn.Module) -> Form | None:
    """The form of a module of another library, if it has one."""
    if type(module).__module__.startswith("torch."):
        return None  # rules know torch's own
    if len(module._modules) > 16 or len(module._parameters) > 2 or module._buffers:
        return None
    key = _signature(module)
    if key not in _KNOWN:
        _KNOWN[key] = _probe(module)
    return _KNOWN[key]


def forget() -> None:
    """Forget what was found: objects that a module refers to may be gone, or have changed."""
    _KNOWN.clear()


def _probe(module: nn.Module) -> Form | None:
    test = Probe(module, original_class(type(module)).forward)
    with probing():
        fitting = filter(test.agrees, _candidates(module))
        form = next(fitting, None)
        # others may differ in where they round
        return min([form, *fitting], key=test.strays) if form and form.rounds else form


def _signature(module: nn.Module) -> Any:
    """What a form may depend on: alike layers of a model are probed once."""
    plain = (int, float, str, bool, type(None), torch.dtype)
    return (
        type(module),
        type(module).forward,
        tuple(
            (k, v if isinstance(v, plain) or _is_function(v) else id(v))
            for k, v in vars(module).items()
            if k not in _OWN
        ),
        tuple((n, p if p is None else p.shape) for n, p in module._parameters.items()),
        tuple((n, m if m is None else _signature(m)) for n, m in module._modules.items()),
    )


def _candidates(module: nn.Module) -> Iterator[Form]:
    children = {name: child for name, child in module._modules.items() if child is not None}
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if children and not parameters:
        parts = _parts(module, children)
        if parts is not None:
            yield from perceptrons(parts)
            yield from blocks(module, parts)
    elif not children:
        yield from leaves(module, parameters)


def _parts(module: nn.Module, children: dict[str, nn.Module]) -> Parts | None:
    """The children by what they are; None where one of them may do more than its forward."""
    parts = Parts()
    for name, value in vars(module).items():
        if _is_function(value):  # which of them, the probe tells: nobody else should call it
            parts.acts += [Act(name, value, known) for known in NAMES]
    for name, child in children.items():
        cls = original_class(type(child))
        form = recognise(child)
        if not is_plain(child):
            return None
        if cls in BY_MODULE and cls not in IDENTITIES:
            parts.acts.append(Act(name, cls, None))
        elif isinstance(form, Elementwise):
            parts.acts.append(Act(name, cls, form.name))
        elif isinstance(form, Transposed):
            parts.linears.append(name)
            parts.transposed = cls, form
        else:
            kind = next((kind for kind, classes in KINDS.items() if cls in classes), "others")
            getattr(parts, kind).append(name)
    if not parts.acts:
        parts.acts = [Act(None, None, name) for name in NAMES]
    return parts


def _is_function(value: Any) -> bool:
    return (
        callable(value) and not isinstance(value, (nn.Module, type)) and hasattr(value, "__name__")
    )


@functools.cache
def with_form(form: Form, children: tuple[str, ...], cls: Any) -> Any:
    """A class that runs a form, and the class's own forward where the form does not fit a call, or
    where the module has not the children that it had.
    """
    given = parameters(cls)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = args if not kwargs else _in_order(given, args, kwargs)
        found: Any = NotImplemented
        if values is not None and names_of_children(self) == children:
            found = form.run(self, *values)
        return cls.forward(self, *args, **kwargs) if found is NotImplemented else found

    members = {"forward": forward, "_fastdl_form": form}
    return derive(cls, functools.partial(with_form, form, children), members)


def names_of_children(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


def _in_order(
    given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The values of all arguments by position; None where one is missing or not known."""
    names = list(given)[len(args) :]
    if not kwargs.keys() <= set(names):
        return None
    values = (*args, *(kwargs.get(name, given[name]) for name in names))
    return None if any(value is inspect.Parameter.empty for value in values) else values
