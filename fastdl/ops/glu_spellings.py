"""How people write gated units, and the perceptrons around them."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ._op import SPELLINGS, Spelling
from .activation import ACTIVATIONS, spelled, with_parameters
from .glu import glu
from .mlp import gated_mlp

Written = Callable[..., Tensor]


class Halves(NamedTuple):
    """A way to take the halves of a tensor. `n` is the dimension; where that is fixed, the size of
    a half, if anybody wrote it down.
    """

    take: Callable[[Any, Any], Any]
    dim: int | None


def _split(dim: int) -> list[Halves]:
    return [
        Halves(lambda x, n: x.split(x.shape[dim] // 2, dim), dim),
        Halves(lambda x, n: x.split([n, n], dim), dim),
    ]


_HALVES = [
    Halves(lambda x, n: x.chunk(2, n), None),
    *_split(-1),
    *_split(1),
    Halves(lambda x, n: (x[..., :n], x[..., n:]), -1),
    Halves(lambda x, n: (x[:, :n], x[:, n:]), 1),
]


def gated(value: Any, gate: Any, act: Written, a: Any, b: Any) -> Any:
    return value * act(gate, a, b)


def _options(name: str, a: Any, b: Any) -> dict[str, Any]:
    return {"activation": None if name == "none" else with_parameters(name, a, b)}


def _spell_halves(halves: Halves, gate_first: bool, name: str, act: Written) -> Spelling:
    def pattern(x: Any, n: Any, a: Any, b: Any) -> Any:
        both = halves.take(x, n)
        value, gate = (both[1], both[0]) if gate_first else (both[0], both[1])
        return gated(value, gate, act, a, b)

    def call(x: Any, n: Any, a: Any, b: Any) -> partial[Any]:
        options = _options(name, a, b) | ({"gate_first": True} if gate_first else {})
        return partial(glu, x, n if halves.dim is None else halves.dim, **options)

    return Spelling(pattern, call)


def _spell_pair(name: str, act: Written) -> Spelling:
    def pattern(value: Any, gate: Any, a: Any, b: Any) -> Any:
        return gated(value, gate, act, a, b)

    def call(value: Any, gate: Any, a: Any, b: Any) -> partial[Any]:
        return partial(glu, value, gate=gate, **_options(name, a, b))

    return Spelling(pattern, call)


def _spell_mlp(name: str, act: Written, adds: bool) -> Spelling:
    """The whole perceptron, of three weights."""

    def pattern(
        x: Any, wg: Any, wu: Any, wd: Any, bg: Any, bu: Any, bd: Any, a: Any, b: Any, residual: Any
    ) -> Any:
        hidden = gated(F.linear(x, wu, bu), F.linear(x, wg, bg), act, a, b)
        y = F.linear(hidden, wd, bd)
        return y + residual if adds else y

    def call(
        x: Any, wg: Any, wu: Any, wd: Any, bg: Any, bu: Any, bd: Any, a: Any, b: Any, residual: Any
    ) -> partial[Any]:
        options = _options(name, a, b) | ({"residual": residual} if adds else {})
        return partial(gated_mlp, x, wg, wu, wd, bg, bu, bd, **options)

    return Spelling(pattern, call)


SPELLINGS.append(Spelling(lambda x, dim: F.glu(x, dim), lambda x, dim: partial(glu, x, dim)))
for _name in ACTIVATIONS:
    for _act in spelled(_name):
        # a product of halves is a gate without an activation
        SPELLINGS.extend(
            _spell_halves(halves, gate_first, _name, _act)
            for halves, gate_first in itertools.product(_HALVES, (False, True))
            if not (_name == "none" and gate_first)
        )
        if _name != "none":
            SPELLINGS.append(_spell_pair(_name, _act))
            SPELLINGS.extend(_spell_mlp(_name, _act, adds) for adds in (False, True))
