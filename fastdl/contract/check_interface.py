"""Checks of what users call: signatures, errors, modules."""

import inspect
import pickle
from copy import deepcopy

import torch

from ..ops._op import LIBRARY_OPS
from .case import Spec
from .registry import check, named


@check("op")
def signatures(spec: Spec, device: str) -> None:
    """Calls written for torch mean the same here: its parameters come first, in order; ours are keywords."""
    for ours, torchs in spec.signatures:
        got = list(inspect.signature(ours).parameters.values())
        expected = list(inspect.signature(torchs).parameters.values())
        for a, b in zip(got, expected, strict=False):
            same = a.name == b.name and a.default == b.default
            assert same, f"{ours.__name__} has {a} where torch has {b}"
        rest = got[len(expected) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in rest), f"{ours.__name__}: {rest}"


@check("op")
def errors(spec: Spec, device: str) -> None:
    """Bad arguments raise what torch raises, and the message says what was given and what is allowed."""
    for bad in spec.bad_calls:
        try:
            bad.like()
        except Exception as expected:
            kind = type(expected)
        else:
            raise AssertionError(f"{bad.name}: torch does not raise")
        try:
            bad.call()
        except kind as got:
            for word in bad.says:
                assert word in str(got), f"{bad.name}: {word!r} is not in {got}"
        else:
            raise AssertionError(f"{bad.name}: nothing is raised")


@check("op")
def modules(spec: Spec, device: str) -> None:
    """Modules have torch's constructor and state, print like torch's, and survive copying and pickling."""
    for make in spec.modules:
        ours, torchs, x = make()
        assert isinstance(ours, type(torchs))
        assert inspect.signature(type(ours)) == inspect.signature(type(torchs))
        ours.load_state_dict(torchs.state_dict())
        assert repr(ours) == repr(torchs)
        ours, torchs = ours.to(device).eval(), torchs.to(device).eval()
        given = [t.to(device) for t in (x if isinstance(x, tuple) else (x,))]
        for twin in (ours, deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(twin(*given), torchs(*given), msg=named(repr(ours)))


@check("op")
def registered(spec: Spec, device: str) -> None:
    """The ops that the spec names are in the library."""
    for op in spec.library_ops:
        assert op in LIBRARY_OPS, f"{op} is not in the library, which has {', '.join(LIBRARY_OPS)}"
