"""Modules of other libraries: which form fits one, and the class that runs it.

Attributes, types and shapes say what a module may be. Each guess runs beside the module's own
forward on a small copy (probe.py), and the first that agrees in every digit is taken.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import Any

import torch
from torch import nn

from .. import nn as fused
from ..nn._children import is_plain
from ..ops.activation import ACTIVATIONS, BY_MODULE, apply_definition
from . import probe
from .structures import (
    Act,
    AddNorm,
    Elementwise,
    Eps,
    Form,
    Norm,
    Perceptron,
    Transposed,
    original_class,
)

NAMES = [name for name in ACTIVATIONS if name != "none"]

# Where a norm's eps is written in its forward. None is torch's own.
EPS: tuple[Eps, ...] = (1e-5, 1e-6, 1e-8, 1e-12, None)

_KNOWN: dict[Any, Form | None] = {}


def recognise(module: nn.Module) -> Form | None:
    """The form of a module of another library, if it has one."""
    if len(module._modules) > 6 or len(module._parameters) > 2 or module._buffers:
        return None
    key = _signature(module)
    if key not in _KNOWN:
        _KNOWN[key] = _probe(module)
    return _KNOWN[key]


def _probe(module: nn.Module) -> Form | None:
    forward: Any = original_class(type(module)).forward  # type: ignore[attr-defined]
    for form in _candidates(module):
        if probe.same(module, forward, form.run, form.inputs, form.rounds):
            return form
    return None


def _signature(module: nn.Module) -> Any:
    """What a form may depend on: alike layers of a model are probed once."""
    plain = (int, float, str, bool, type(None), torch.dtype)
    return (
        type(module),
        type(module).forward,
        tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) or callable(v)),
        tuple((n, p if p is None else p.shape) for n, p in module._parameters.items()),
        tuple((n, m if m is None else _signature(m)) for n, m in module._modules.items()),
    )


def _candidates(module: nn.Module) -> Iterator[Form]:
    children = {name: child for name, child in module._modules.items() if child is not None}
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if children and not parameters:
        yield from _with_children(module, children)
    elif not children:
        yield from _leaves(module, parameters)


def _leaves(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Form]:
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    eps = [name for name, value in vars(module).items() if _may_be_eps(value)]
    match sorted(shapes, key=lambda name: -len(shapes[name])):
        case []:
            yield from map(Elementwise, NAMES)
            for name in eps:
                yield Norm(None, None, name)
        case [weight] if len(shapes[weight]) == 1:
            for value in eps or EPS:
                for offset, cast in product((0.0, 1.0), ("torch", "llama")):
                    yield Norm(weight, None, value, offset=offset, cast=cast)
                if value is not None:
                    yield Norm(weight, None, value, mean=True)
        case [a, b] if len(shapes[a]) == 1 and shapes[a] == shapes[b]:
            for value, (weight, bias) in product(eps or EPS[:-1], ((a, b), (b, a))):
                yield Norm(weight, bias, value, mean=True)
        case [weight, *bias] if len(shapes[weight]) == 2:
            if all(shapes[name] == shapes[weight][1:] for name in bias):
                yield Transposed(weight, bias[0] if bias else None)


def _may_be_eps(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1e-2


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> Iterator[Form]:
    """Perceptrons and their parts."""
    linears, kinds, drops, norms = [], set(), [], []
    acts = [Act(name, v, _of_function(v)) for name, v in vars(module).items() if _is_function(v)]
    acts = [act for act in acts if act.name]
    for name, child in children.items():
        cls = original_class(type(child))
        if not is_plain(child):
            return
        if cls in (nn.Linear, fused.Linear):
            linears.append(name)
        elif cls in (nn.Dropout, fused.Dropout, nn.Identity):
            drops.append(name)
        elif cls in (nn.LayerNorm, fused.LayerNorm):
            norms.append(name)
        elif cls in BY_MODULE:
            acts.append(Act(name, cls, None))
        elif isinstance(form := recognise(child), Transposed):
            linears.append(name)
            kinds.add(cls)
        elif isinstance(form, Elementwise):
            acts.append(Act(name, cls, form.name))
        else:
            return
    if len(kinds) > 1 or len(acts) > 1 or len(norms) > 1 or len(drops) > 2:
        return
    transposed = next(iter(kinds), None)
    if norms and not acts and len(linears) == 1 and len(drops) < 2:
        yield AddNorm(linears[0], drops[0] if drops else None, norms[0], transposed)
    drops += norms  # what else is called in these places
    for act in acts or [Act(None, None, name) for name in NAMES]:
        yield from _perceptrons(linears, act, drops, transposed)


def _perceptrons(
    linears: list[str], act: Act, drops: list[str], transposed: type | None
) -> Iterator[Perceptron]:
    """Every way to put the parts together. Those whose shapes do not fit fail the probe."""
    make = functools.partial(Perceptron, transposed=transposed)
    places = [
        (middle, end)
        for middle, end in product([None, *drops], repeat=2)
        if {middle, end} - {None} == set(drops)
    ]
    for middle, end in places:
        match linears:
            case [first] if not middle or not end:
                if end is None:
                    yield make(first, act, middle=middle)
                    yield make(first, act, gate="first half", middle=middle)
                    yield make(first, act, gate="second half", middle=middle)
            case [a, b]:
                for first, down in ((a, b), (b, a)):
                    for gate in (None, "first half", "second half"):
                        yield make(first, act, gate=gate, middle=middle, down=down, end=end)
            case [_, _, _]:
                for first, gated, down in permutations(linears):
                    yield make(first, act, gated, None, middle, down, end)


def _is_function(value: Any) -> bool:
    return (
        callable(value) and not isinstance(value, (nn.Module, type)) and hasattr(value, "__name__")
    )


@functools.lru_cache(maxsize=256)
def _of_function(function: Callable[..., Any]) -> str | None:
    """The name of an activation that a function is."""
    x = torch.cat([torch.linspace(-9, 9, 127, dtype=torch.float64), torch.tensor([-1e3, 1e3])])
    try:
        found = function(x)
    except Exception:
        return None
    for name in NAMES:
        a, b = ACTIVATIONS[name].defaults
        if isinstance(found, torch.Tensor) and found.shape == x.shape:
            expected = apply_definition(x, name, a, b)
            if bool((found - expected).abs().max() <= probe.CLOSE * expected.abs().max()):
                return name
    return None


@functools.cache
def with_form(cls: Any, form: Form) -> Any:
    """A class that runs a form, and the class's own forward where the form does not fit a call."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = NotImplemented if kwargs else form.run(self, *args)
        return cls.forward(self, *args, **kwargs) if found is NotImplemented else found

    def reduce(self: Any, protocol: Any) -> Any:
        # the class cannot be found by its name
        function, args, *rest = cls.__reduce_ex__(self, protocol)
        if args[:1] != (made,):
            return function, args, *rest
        return _new, (cls, form), *rest

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fastdl_original": cls,
        "_fastdl_form": form,
    }
    made = type(cls.__name__, (cls,), body)
    return made


def _new(cls: Any, form: Form) -> Any:
    made = with_form(cls, form)
    return made.__new__(made)
