"""Proof that two models compute the same: outputs and every gradient, with float64 as the judge."""

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._table import lines as table
from ..ops._route import policy
from ._judge import Float64, NoDropout, Run, copied, eager, no_trace, run, widen, without_dropout
from .rules import swap_back

RULE = (
    "an error may be 2x the original's for outputs, 3x for gradients, plus 1e-5 of the tensor's "
    "largest value (for a gradient, of at least 1/1000 of the largest gradient). In tensors of "
    "under 32 elements the original's counts as its median over all tensors, or more. NaN and "
    "infinity only where the original or the judge has them."
)
OUTPUT_FACTOR, GRADIENT_FACTOR, SLACK = 2.0, 3.0, 1e-5

# A gradient that is zero in theory is noise: its scale is at least this part of the largest one.
GRADIENT_FLOOR = 1e-3

# The error of so few elements may be small by luck: the original's counts as its usual one.
FEW = 32

SHOWN = 5


class Comparison(NamedTuple):
    """One tensor: the largest errors of the original (before) and of the other model (after)."""

    before: float
    after: float
    allowed: float
    scale: float
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.reason is None


class Proof:
    """What `verify` found. True in a condition if the models agree."""

    def __init__(
        self,
        outputs: dict[str, Comparison],
        gradients: dict[str, Comparison],
        narrow: str | None = None,
    ) -> None:
        self.outputs, self.gradients, self._narrow = outputs, gradients, narrow

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons.values())

    @property
    def judge_is_fp64(self) -> bool:
        return self._narrow is None

    @property
    def comparisons(self) -> dict[str, Comparison]:
        return self.outputs | {f"gradient of {name}": c for name, c in self.gradients.items()}

    def worst(self) -> tuple[float, float]:
        """Errors before and after where the latter is largest, relative to the tensor's scale."""
        relative = [(c.before / c.scale, c.after / c.scale) for c in self.comparisons.values()]
        return max(relative, key=lambda errors: errors[1])

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        everything = self.comparisons
        failed = {name: c for name, c in everything.items() if not c.ok}
        verdict = f"{len(failed)} of {len(everything)} differ" if failed else "the models agree"
        counted = f"{len(self.outputs)} outputs and buffers, {len(self.gradients)} gradients"
        lines = [f"{verdict}: {counted}", f"rule: {RULE}", self._judge_line()]
        closest = sorted(everything.items(), key=lambda item: -item[1].after / _positive(item[1]))
        shown = failed or dict(closest[:SHOWN])
        rows = [
            (name, f"{c.before:.1e}", f"{c.after:.1e}", f"{c.allowed:.1e}", c.reason or "ok")
            for name, c in shown.items()
        ]
        return "\n".join([*lines, *table(("tensor", "before", "after", "allowed", ""), rows)])

    def _judge_line(self) -> str:
        if self._narrow is None:
            return "judge: the original in float64"
        return (
            f"judge: NOT float64 throughout: {self._narrow} gave a narrower float, so the judge "
            "may be as wrong as the judged"
        )

    def to_json(self) -> str:
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        def rows(group: dict[str, Comparison]) -> dict[str, Any]:
            return {name: {**c._asdict(), "ok": c.ok} for name, c in group.items()}

        return {
            "ok": self.ok,
            "rule": RULE,
            "judge_is_fp64": self.judge_is_fp64,
            "outputs": rows(self.outputs),
            "gradients": rows(self.gradients),
        }


def _positive(comparison: Comparison) -> float:
    return comparison.allowed or 1.0


def verify(
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
) -> Proof:
    """Compare outputs, buffers and the gradients of every parameter and float input of two models.

    `model_a` is the reference: it runs on torch's own classes, without fastdl's kernels, so a model
    may be verified against itself. Each error is measured against a copy of it in float64. In each
    tensor the error of `model_b` may be twice that of `model_a` (three times for gradients) plus
    1e-5 of the tensor's largest value, which for a gradient counts as at least a thousandth of the
    largest gradient: one that is zero in theory is noise. In a tensor of under 32 elements the
    error of `model_a` may be small by luck: it counts as at least half a unit in the last place,
    and as its median over all tensors. NaN and infinity may stand only where the reference or the
    judge has them.

    `inputs` is a tensor, a tuple of arguments or a dict of keywords. Backward starts at
    `loss(output)`, or else at the sum of all outputs with fixed random signs. Models in train mode
    are compared with every dropout at 0. All runs are on copies: neither model, its gradients and
    buffers nor the random state is changed.
    """
    args, kwargs = arguments(inputs)
    return prove(model_a, model_b, args, kwargs, loss)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def prove(
    model_a: nn.Module,
    model_b: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None = None,
) -> Proof:
    """`verify` with the arguments of a call."""
    with no_trace():
        twin, judge = _reference(model_a), Float64()
        widen(twin)
        with policy("definition"), eager():
            judged = _run(twin, args, kwargs, loss, judge)
            reference = _run(_reference(model_a), args, kwargs, loss)
        result = _run(copied(model_b), args, kwargs, loss)
    return _compare_runs(reference, result, judged, judge.narrow)


def _reference(model: nn.Module) -> nn.Module:
    """A copy on torch's own classes."""
    twin = copied(model)
    for module in twin.modules():
        swap_back(module)
    return twin


def _run(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    judge: Float64 | None = None,
) -> Run:
    mode = judge or contextlib.nullcontext()
    if not any(module.training for module in twin.modules()):
        return run(twin, args, kwargs, loss, mode, wide=judge is not None)
    without_dropout(twin)
    with NoDropout():
        return run(twin, args, kwargs, loss, mode, wide=judge is not None)


def _compare_runs(a: Run, b: Run, judge: Run, narrow: str | None) -> Proof:
    usual = _usual_error(a, judge)
    outputs = _compare_group(a.outputs, b.outputs, judge.outputs, OUTPUT_FACTOR, usual, 0.0)
    largest = max((_magnitude(g) for g in judge.gradients.values() if g is not None), default=0.0)
    gradients = _compare_group(
        a.gradients,
        b.gradients,
        judge.gradients,
        GRADIENT_FACTOR,
        usual,
        GRADIENT_FLOOR * largest,
    )
    return Proof(outputs, gradients, narrow)


def _usual_error(a: Run, judge: Run) -> float:
    """The median over all tensors of the original's relative error."""
    pairs = [
        (x, of_judge.get(name))
        for of_a, of_judge in ((a.outputs, judge.outputs), (a.gradients, judge.gradients))
        for name, x in of_a.items()
    ]
    errors = [
        _error(x, j) / _magnitude(j)
        for x, j in pairs
        if x is not None and j is not None and x.shape == j.shape and _magnitude(j) > 0
    ]
    return statistics.median(errors) if errors else 0.0


def _compare_group(
    a: Mapping[str, Tensor | None],
    b: Mapping[str, Tensor | None],
    judge: Mapping[str, Tensor | None],
    factor: float,
    usual: float,
    floor: float,
) -> dict[str, Comparison]:
    compared = {}
    for name in [*a, *(b.keys() - a.keys())]:
        x, y, j = a.get(name), b.get(name), judge.get(name)
        if x is None and y is None:
            continue  # neither model has a gradient here
        mismatch = _mismatch(x, y, j)
        if mismatch is None:
            assert x is not None and y is not None and j is not None
            compared[name] = _compare(x, y, j, factor, usual, floor)
        else:
            compared[name] = Comparison(0.0, 0.0, 0.0, 1.0, mismatch)
    return compared


def _mismatch(a: Tensor | None, b: Tensor | None, judge: Tensor | None) -> str | None:
    if b is None:
        return "it is missing"
    if a is None:
        return "the original has none"
    if a.shape != b.shape:
        return f"its shape is {tuple(b.shape)}, the original's is {tuple(a.shape)}"
    if a.dtype != b.dtype:
        return f"its dtype is {b.dtype}, the original's is {a.dtype}"
    return "the judge has none of this shape" if judge is None or judge.shape != a.shape else None


def _compare(
    a: Tensor, b: Tensor, judge: Tensor, factor: float, usual: float, floor: float
) -> Comparison:
    scale = max(_magnitude(judge), floor)
    before, after = _error(a, judge), _error(b, judge)
    expected = before
    if a.numel() < FEW and a.is_floating_point():
        expected = max(before, usual * scale, torch.finfo(a.dtype).eps / 2 * scale)
    allowed = factor * expected + SLACK * scale
    reason = "the error is too large" if after > allowed else None
    if _other_extremes(a, b, judge):
        reason = "NaN or infinity differ"
    return Comparison(before, after, allowed, scale or 1.0, reason)


def _wide(x: Tensor) -> Tensor:
    x = x.to_dense() if x.layout is not torch.strided else x
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _magnitude(x: Tensor) -> float:
    return _largest(_wide(x).abs())


def _error(x: Tensor, judge: Tensor) -> float:
    return _largest((_wide(x) - _wide(judge)).abs())


def _largest(x: Tensor) -> float:
    """The largest finite value."""
    x = torch.where(x.isfinite(), x, 0.0)
    return x.max().item() if x.numel() else 0.0


def _other_extremes(a: Tensor, b: Tensor, judge: Tensor) -> bool:
    """Whether b is NaN or infinite where the others are not, or finite where both are not."""
    a, b, judge = _wide(a), _wide(b), _wide(judge)
    astray = ~b.isfinite() & ~_same(b, a) & ~_same(b, judge)
    hidden = b.isfinite() & ~a.isfinite() & ~judge.isfinite()
    return bool((astray | hidden).any())


def _same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())
