"""Modules that are verbs: `fastdl.optimize(model)` is a call, `fastdl.optimize.graph` a module
inside.
"""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any


class _Verb(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._verb(*args, **kwargs)


def make_callable(module: str, verb: Callable[..., Any]) -> None:
    """Calling the module calls `verb`."""
    this: Any = sys.modules[module]
    this.__class__ = _Verb
    this._verb = verb
    this.__signature__ = inspect.signature(verb)
    this.__doc__ = verb.__doc__
