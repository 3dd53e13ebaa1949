"""What `torch.compile(model, backend="fastdl", options={...})` may say."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ... import functional
from ...ops import activation_functions

_ACTIVATIONS = activation_functions.__name__


class Options(NamedTuple):
    """`then` gets the rewritten graph: None and "eager" run it as it is, another name or function
    is a backend. `ops` are the only ops that may be put in. `verify` proves each graph.
    """

    then: str | Callable[..., Any] | None = None
    ops: frozenset[str] | None = None
    verify: bool = False


def parse(given: Mapping[str, Any] | None) -> Options:
    given = dict(given or {})
    unknown = sorted(str(name) for name in given if name not in Options._fields)
    if unknown:
        allowed = ", ".join(Options._fields)
        raise ValueError(
            f"fastdl backend: unknown options {', '.join(unknown)}; allowed: {allowed}"
        )
    options = Options(**given)
    if not (options.then is None or isinstance(options.then, str) or callable(options.then)):
        raise TypeError(
            f"fastdl backend: then is {options.then!r}, allowed are None, the name of a backend "
            'such as "inductor", and a function of a graph and its inputs'
        )
    if not isinstance(options.verify, bool):
        raise TypeError(f"fastdl backend: verify is {options.verify!r}, allowed are True and False")
    return options._replace(ops=None if options.ops is None else known_ops(options.ops))


def known_ops(names: Iterable[str]) -> frozenset[str]:
    """The names, all of which are ops that a site can have."""
    if isinstance(names, str):
        raise TypeError(f"fastdl backend: ops is {names!r}, allowed is a list: [{names!r}]")
    names, allowed = list(names), _ops()
    for name in names:
        if name not in allowed:
            raise ValueError(f"fastdl backend: ops: there is no op {name!r}. {_advice(name)}")
    return frozenset(names)


def _advice(name: Any) -> str:
    if getattr(getattr(functional, str(name), None), "__module__", "") == _ACTIVATIONS:
        return "Every activation that stands alone is the op 'activation'."
    near = difflib.get_close_matches(str(name), _ops(), 3, cutoff=0.5)
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{meant}Allowed are {', '.join(sorted(_ops()))}."


def _ops() -> list[str]:
    """fastdl.functional's own functions, but of the activations the one that stands for all."""
    return [
        name
        for name, function in vars(functional).items()
        if inspect.isfunction(function)
        and function.__module__.startswith(functional.__name__.rpartition(".")[0])
        and function.__module__ != _ACTIVATIONS
    ]
