"""Sites one by one: inputs are caught in a run of the original, and both forms run on them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._route import explain
from ._judge import copied, eager, fresh, no_trace, signs, without_dropout
from .rules import swap
from .sequential import Sequential
from .verify import Proof, prove


class Outcome(NamedTuple):
    """What a replay found: errors as in a Site, and why the site fails, if it does."""

    route: str | None = None
    before: float | None = None
    after: float | None = None
    fault: str | None = None


def replay(
    model: nn.Module,
    sites: list[list[nn.Module]],
    targets: list[list[type]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[int, Outcome]:
    """Run a copy of the original model and judge each site that it calls, by the site's index."""
    memo: dict[int, Any] = {}
    outcomes: dict[int, Outcome] = {}
    with no_trace(), eager():
        twin = copied(model, memo)
        for index, (modules, classes) in enumerate(zip(sites, targets, strict=True)):
            # the memo of deepcopy leads from a module to its copy
            twins = [memo[id(module)] for module in modules]
            _judge_once(twins, classes, partial(outcomes.__setitem__, index))
        args, kwargs = fresh((args, kwargs))
        twin(*args, **kwargs)
    return outcomes


def _judge_once(
    modules: list[nn.Module], classes: list[type], tell: Callable[[Outcome], None]
) -> None:
    """At the first call of a site, judge it on what it is called with."""

    def judge(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        tell(_judged(modules, classes, args, kwargs))

    handle = modules[0].register_forward_pre_hook(judge, with_kwargs=True)


def _judged(
    modules: list[nn.Module], classes: list[type], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outcome:
    before, after = _alone(modules), _alone(modules)
    for module, target in zip(_members(after), classes, strict=True):
        swap(module, target)
    try:
        with no_trace():
            proof = prove(before, after, args, kwargs)
            fault = _first_fault(proof) or _dropout_fault(before, after, args, kwargs)
            route = _route(after, args, kwargs)
    except Exception as error:  # whatever a kernel does, the model must go on
        return Outcome(fault=f"it raised {type(error).__name__}: {error}")
    return Outcome(route, *proof.worst(), fault)


def _alone(modules: list[nn.Module]) -> nn.Module:
    """A copy of a site's modules, without hooks: what they do is not part of the site."""
    copies = [copied(module) for module in modules]
    for module in copies:
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    if len(copies) == 1:
        return copies[0]
    unit = Sequential(*copies)
    unit.training = copies[0].training  # its members keep theirs
    return unit


def _members(unit: nn.Module) -> list[nn.Module]:
    return list(unit) if isinstance(unit, Sequential) else [unit]


def _first_fault(proof: Proof) -> str | None:
    for name, comparison in proof.comparisons.items():
        if not comparison.ok:
            return f"{name}: {comparison.reason}"
    return None


def _route(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Who computes the site."""
    args, kwargs = fresh((args, kwargs))
    with torch.no_grad():
        seen = explain(copied(unit), *args, **kwargs)
    if seen.fused:
        return "fused"
    reasons = [decision.reason.value for decision in seen.decisions if decision.reason]
    return f"torch: {reasons[0]}" if reasons else "torch"


def _dropout_fault(
    before: nn.Module, after: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """For a dropout at the end of a site: it keeps enough, and backward drops the same elements."""
    last = _members(after)[-1]
    rate = last.p if isinstance(last, nn.Dropout) and last.training else 0.0
    if not 0 < rate < 1 or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    without_dropout(before)
    x, x_kept = (torch.randn_like(args[0]).requires_grad_() for _ in range(2))
    x_kept.data.copy_(x.data)
    full, dropped = before(x.clone()), after(x_kept.clone())
    visible = full.detach() != 0
    kept = visible & (dropped.detach() != 0)
    n = int(visible.sum())
    spread = (n * rate * (1 - rate)) ** 0.5
    if abs(int(kept.sum()) - n * (1 - rate)) > 6 * spread + 1:
        return f"dropout keeps {int(kept.sum())} of {n} elements at a rate of {rate}"
    dy = signs(full, 0)
    full.backward(torch.where(kept, dy / (1 - rate), 0.0).to(dy.dtype))
    dropped.backward(dy)
    assert x.grad is not None and x_kept.grad is not None
    error = (x.grad.double() - x_kept.grad.double()).abs().max()
    # a wrong mask is wrong by whole elements
    return "dropout's backward drops other elements" if error > 0.1 * x.grad.abs().max() else None
