"""Sites one by one: inputs are caught in a run of the original, and both forms run on them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._table import progress
from ..ops._route import explain
from ._judge import copied, eager, fresh, no_trace, signs, without_dropout
from .rules import swap
from .sequential import Sequential
from .verify import Reference, raised

# The rate of dropout is measured on so many elements, or on so many more runs.
ENOUGH, DRAWS = 30_000, 8


class Outcome(NamedTuple):
    """What a replay found: errors as in a Site, and why the site fails, if it does."""

    route: str | None = None
    before: float | None = None
    after: float | None = None
    allowed: float | None = None
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
    with no_trace(model), eager(), progress("replay") as tell:
        twin = copied(model, memo)

        def note(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            tell(len(outcomes), len(sites), "sites")

        for index, (modules, classes) in enumerate(zip(sites, targets, strict=True)):
            # the memo of deepcopy leads from a module to its copy
            twins = [memo[id(module)] for module in modules]
            _judge_once(twins, classes, partial(note, index))
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
    if getattr(classes[0], "gives_less", False):
        before, after = _First(before), _First(after)
    return judged(before, after, args, kwargs)


def judged(
    before: nn.Module, after: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outcome:
    """Run copies of both forms of a site on copies of what it is called with."""
    try:
        with no_trace():
            proof = Reference(before, args, kwargs).compare(copied(after))
            found = proof.fault()
            fault = found.reason if found else _dropout_fault(before, after, args, kwargs)
            route = _route(after, args, kwargs)
    except Exception as error:  # whatever a kernel does, the model must go on
        return Outcome(fault=raised(error))
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


class _First(nn.Module):
    """The first output of a module, for a form that gives no other."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unit(*args, **kwargs)[0]


def _members(unit: nn.Module) -> list[nn.Module]:
    return list(unit) if isinstance(unit, Sequential) else [unit]


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
    n, n_kept = int(visible.sum()), int(kept.sum())
    with torch.no_grad():
        for _ in range(min(DRAWS, ENOUGH // max(n, 1))):  # of few elements any number may be kept
            n += int(visible.sum())
            n_kept += int((visible & (after(x.clone()) != 0)).sum())
    spread = (n * rate * (1 - rate)) ** 0.5
    if abs(n_kept - n * (1 - rate)) > 6 * spread + 1:
        return f"dropout keeps {n_kept} of {n} elements at a rate of {rate}"
    dy = signs(full, 0)
    full.backward(torch.where(kept, dy / (1 - rate), 0.0).to(dy.dtype))
    dropped.backward(dy)
    assert x.grad is not None and x_kept.grad is not None
    error = (x.grad.double() - x_kept.grad.double()).abs().max()
    # a wrong mask is wrong by whole elements
    return "dropout's backward drops other elements" if error > 0.1 * x.grad.abs().max() else None
