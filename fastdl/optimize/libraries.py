"""Modules of other libraries: `fastdl.integrations` says which class each of them takes.

Such a class runs the library's own code, in which a few names mean something else.
"""

import copy
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

# The libraries whose integration may know a class. Before a library is imported, no model has any.
_KNOWN = ("diffusers", "transformers")


class Taken(NamedTuple):
    """What takes the place of a module's class, or why nothing does."""

    op: str
    target: type | None = None
    reason: str | None = None


# By library: what it has to say about a module, given the class that the module had at first.
EXAMINERS: dict[str, Callable[[nn.Module, type], Taken | None]] = {}

# Attributes of modules that may hold an object whose class is swapped, not the module's.
PARTS: set[str] = set()

# Classes made here -> those they were made from.
MADE: dict[type, type] = {}


def load() -> None:
    """Import the integrations of the libraries in use."""
    root = __package__.rpartition(".")[0]
    for library in _KNOWN:
        if library in sys.modules and library not in EXAMINERS:
            importlib.import_module(f"{root}.integrations.{library}")


def examine(module: nn.Module, cls: type) -> Taken | None:
    """What the integrations say about a module."""
    for examiner in EXAMINERS.values():
        taken = examiner(module, MADE.get(cls, cls))
        if taken is not None:
            return taken
    return None


def swap_part(module: nn.Module, target: type) -> None:
    """Give a module a part of another class. What it had may be another module's, too."""
    for name in PARTS:
        part = vars(module).get(name)
        if type(part) is MADE[target]:
            vars(module)[name] = copy.copy(part)
            vars(module)[name].__class__ = target


def made_parts(module: nn.Module) -> list[Any]:
    """Parts of a module whose class was made here."""
    return [vars(module)[name] for name in PARTS if type(vars(module).get(name)) in MADE]


def rebound(function: types.FunctionType, names: Mapping[str, Any]) -> types.FunctionType:
    """The same code, in which these global names mean something else."""
    # Dynamo looks the names up in the module that __name__ tells, where they mean what they did
    scope = {key: value for key, value in function.__globals__.items() if key != "__name__"}
    copy = types.FunctionType(
        function.__code__,
        {**scope, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    copy.__doc__ = function.__doc__
    return copy


def derive(cls: type, maker: Callable[[type], type], members: Mapping[str, Any]) -> type:
    """A class that passes for `cls`. `maker`, called with it in another process, makes it again."""

    def reduce(self: Any, protocol: Any) -> Any:
        plain = super(derived, self).__reduce_ex__(protocol)
        return (_instance, (maker, cls), *plain[2:])

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    derived: Any = type(cls.__name__, (cls,), {**named, **members, "__reduce_ex__": reduce})
    MADE[derived] = cls
    return derived


def _instance(maker: Callable[[type], type], cls: type) -> Any:
    derived: Any = maker(cls)
    return derived.__new__(derived)
