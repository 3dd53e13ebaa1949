"""The registry of checks: what each runs on."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import _launch
from .case import Case, Spec

Scope = Literal["cases", "exact", "core", "empty", "one_pass", "op"]
Slow = Literal[True, False, "but core"]


class Check(NamedTuple):
    """A check and the cases it runs on; "op" checks run once, on the spec.

    `slow` is how much of it the quick suite leaves out: all, none, or all but core cases. `more`
    are dtypes that tell little beyond the others, which it leaves out but for core cases, too.
    """

    name: str
    function: Callable[..., None]
    scope: Scope
    dtypes: tuple[torch.dtype, ...]  # none: it has a dtype of its own
    more: tuple[torch.dtype, ...]
    slow: Slow

    def is_slow(self, case: Case | None, dtype: torch.dtype | None) -> bool:
        is_core = case is None or case.core
        return self.slow is True or (
            not is_core and (self.slow == "but core" or dtype in self.more)
        )


CHECKS: dict[str, Check] = {}


def check(
    scope: Scope,
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    more: tuple[torch.dtype, ...] = (),
    slow: Slow = False,
) -> Any:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        CHECKS[name] = Check(name, function, scope, dtypes, more, slow)
        return function

    return register


def cases_of(spec: Spec, scope: Scope) -> list[Case]:
    """The cases of a spec on which checks of this scope run."""
    assert 1 <= len(spec.core) <= 5, f"{spec.name}: mark one to five cases as core"
    return {
        "cases": list(spec.cases),
        "exact": [case for case in spec.cases if case.exact],
        "core": spec.core,
        "empty": list(spec.empty),
        # bytes are counted in the interpreter
        "one_pass": list(spec.one_pass) if _launch.INTERPRETED else [],
        "op": [],
    }[scope]


def named(name: str) -> Callable[[str], str]:
    """A message that begins with what it is about."""
    return lambda text: f"{name}: {text}"


def same(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Bit equality."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=named(what))
