"""The model that a command names: package.module:make_model, imported and called."""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Folders whose files are left out where an error's way through the code is told.
NOT_THEIRS = (
    *(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__, importlib.__file__)),
    "<frozen ",
)

MODEL = "mypackage.models:make_model"
EXAMPLE = f"fastdl plan {MODEL}"


class UsageError(Exception):
    """What was typed, why it cannot be done, and what to type instead."""


class UserCodeError(Exception):
    """What the user's own code raised, and where."""


def load(path: str, *, meta: bool = False, command: str = "plan") -> tuple[nn.Module, Any]:
    """The model that package.module:name is or makes, and the example inputs it comes with, or
    None. With `meta` it is made on the meta device: shapes without memory. `command` is what the
    user typed.
    """
    made = _named(path, f"fastdl {command}")
    if not isinstance(made, nn.Module):
        with torch.device("meta") if meta else contextlib.nullcontext():
            made = _called(made, path, f"fastdl {command}")
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{path} returned a {type(made).__name__}, not an nn.Module, nor a model and its "
            "example inputs as a tuple"
        )
    return model, inputs


def _named(path: str, command: str) -> Any:
    """What the path names."""
    module_name, colon, name = path.partition(":")
    if module_name.endswith(".py") or os.sep in module_name:
        dotted = module_name.removesuffix(".py").replace(os.sep, ".").strip(".")
        raise UsageError(f"{path} names a file. Type: {command} {dotted}:{name or 'make_model'}")
    if not (module_name and colon and name):
        raise UsageError(f"{path} is not package.module:make_model. For example: {command} {MODEL}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with blamed(f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # an import in the user's code
            raise UsageError(
                f"there is no module {error.name}, neither in {here} nor installed. "
                f"For example: {command} {MODEL}"
            ) from None
    if not hasattr(module, name):
        public = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        near = difflib.get_close_matches(name, public, 1, cutoff=0.5)
        meant = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise UsageError(f"{module_name} has no {name}{meant}")
    return getattr(module, name)


def _called(factory: Any, path: str, command: str) -> Any:
    if not callable(factory):
        raise UsageError(f"{path} is a {type(factory).__name__}, not a function that makes a model")
    try:
        _signature(factory).bind()
    except TypeError as error:
        raise UsageError(f"{path} takes arguments ({error}). {_advice(path, command)}") from None
    advice = _advice(path, command) if inspect.isclass(factory) else ""
    with blamed(path, advice):
        return factory()


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except ValueError:  # one written in C
        return inspect.Signature()


def _advice(path: str, command: str) -> str:
    """How to write a factory for something that takes arguments."""
    module, _, name = path.partition(":")
    return (
        "Write a function that takes none, in models.py:\n"
        f"  from {module} import {name}\n"
        f"  def make_model():\n"
        f"      return {name}(...)\n"
        f"and type: {command} models:make_model"
    )


@contextlib.contextmanager
def blamed(what: str, advice: str = "") -> Iterator[None]:
    """Says of an error in the user's code where it came from, in two lines."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        lines = [f"{what} raised {type(error).__name__}: {error}", *_places(error)]
        raise UserCodeError("\n".join([*lines, *filter(None, [advice])])) from error


def _places(error: Exception) -> list[str]:
    """Where the user's code was entered, and where it failed."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(NOT_THEIRS)]
    shown = [theirs[0], theirs[-1]] if len(theirs) > 1 else theirs or frames[-1:]
    return [f"  {f.filename}:{f.lineno}, in {f.name}: {f.line}" for f in shown]
