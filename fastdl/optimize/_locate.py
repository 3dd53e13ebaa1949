"""Which part makes two models differ: parts of the one are tried in a copy of the other."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._judge import copied
from .rules import original

Part = TypeVar("Part")
Fault = TypeVar("Fault")


def culprit(
    parts: Sequence[Part],
    probe: Callable[[Sequence[Part]], Fault | None],
    fault: Fault,
    good: int = 0,
) -> tuple[int, Fault]:
    """The part with which parts, added one by one, begin to fail, and the fault of it.

    The probe says what is wrong with a beginning of the parts. All of them fail with the fault that
    is given; the first `good` are known to pass.
    """
    bad = len(parts)
    while bad - good > 1:
        middle = (good + bad) // 2
        found = probe(parts[:middle])
        if found is None:
            good = middle
        else:
            bad, fault = middle, found
    return bad - 1, fault


def first_difference(
    a: nn.Module, b: nn.Module, compare: Callable[[nn.Module], Any], backwards: bool
) -> str | None:
    """The name of the first module of b, in the order of calls, that makes a model of a's differ.

    If none of its children does alone, it is the module itself. `backwards` asks for the last one.
    None if no child of b has a name that a knows, or if a differs from itself. `compare` runs a
    model and is true if it agrees with a.
    """
    a, b = (getattr(model, "_orig_mod", model) for model in (a, b))
    # a scripted module cannot take what another one holds
    known = {
        name
        for name, module in a.named_modules(remove_duplicate=False)
        if not isinstance(module, torch.jit.ScriptModule)
    }
    children = {key for key, _ in b.named_children()}
    if children and not children & known:
        return None
    order: dict[str, int] = {}
    if not compare(_noting_calls(original(a), order)):
        return None

    def probe(names: Sequence[str]) -> bool | None:
        try:
            return None if compare(_mixed(a, b, names)) else True
        except Exception:  # a module that does not fit into the other model is another one
            return True

    def rank(name: str) -> float:
        return order.get(name, math.inf)

    name = ""
    while True:
        paths = (f"{name}.{key}".lstrip(".") for key, _ in b.get_submodule(name).named_children())
        parts = sorted((path for path in paths if path in known), key=rank, reverse=backwards)
        if not parts or probe(parts) is None:
            return name
        name = parts[culprit(parts, probe, True)[0]]


def _noting_calls(model: nn.Module, order: dict[str, int]) -> nn.Module:
    """A model that notes the rank of each module's first call when it runs. What is not called
    itself, such as a ModuleList, ranks with the first in it.
    """

    def called(name: str, *_: Any) -> None:
        steps = name.split(".")
        for end in range(1, len(steps) + 1):
            order.setdefault(".".join(steps[:end]), len(order))

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # it takes no hook
            module.register_forward_pre_hook(partial(called, name))
    return model


def _mixed(a: nn.Module, b: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of a that has some of b's modules. Parameters that are the same in both stay a's, so
    that those that are tied stay tied.
    """
    twin = original(a)
    mine = dict(twin.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {
        id(parameter): mine[name]
        for name, parameter in b.named_parameters(remove_duplicate=False)
        if name in mine and _same_parameter(parameter, mine[name])
    }
    for name in names:
        theirs, place = copied(b.get_submodule(name), memo), twin.get_submodule(name)
        # the object stays: others may hold it too
        place.__class__, place.__dict__ = type(theirs), vars(theirs)
    return twin


def _same_parameter(x: Tensor, y: Tensor) -> bool:
    alike = x.shape == y.shape and x.dtype == y.dtype and x.requires_grad == y.requires_grad
    return alike and (x is y or torch.equal(x, y))
