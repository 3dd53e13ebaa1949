"""Proof that two models compute the same: outputs and every gradient, with float64 as the judge."""

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._table import lines as table, progress, silent
from ..ops._route import policy
from ._judge import Run, copied, eager, insist_on_copies, no_trace, run, without_dropout
from ._locate import first_difference
from ._modes import Float64, Steady, widen
from .memory import insist_on_room
from .rules import original

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

# Where the original itself is off by this part of a tensor's largest value, little can be said.
WEAK = 0.1

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

    @property
    def relative(self) -> tuple[float, float, float]:
        """Before, after and allowed as parts of the tensor's scale."""
        return self.before / self.scale, self.after / self.scale, self.allowed / self.scale


class Fault(NamedTuple):
    """What is wrong, and the errors before and after relative to the tensor's scale."""

    reason: str
    before: float
    after: float


class Proof:
    """What `verify` found. True in a condition if the models agree.

    If they do not, `first` is the name of the first module that makes them differ, or of the last
    where only gradients do; "" is the model itself, and None if no module could be told.
    """

    first: str | None = None

    def __init__(
        self,
        outputs: dict[str, Comparison],
        gradients: dict[str, Comparison],
        narrow: str | None = None,
    ) -> None:
        self.outputs, self.gradients, self._narrow = outputs, gradients, narrow

    @classmethod
    def of_failure(cls, error: Exception) -> "Proof":
        """The proof of a model that raised."""
        return cls({"output": Comparison(0.0, 0.0, 0.0, 1.0, raised(error))}, {})

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons.values())

    @property
    def judge_is_fp64(self) -> bool:
        return self._narrow is None

    @property
    def comparisons(self) -> dict[str, Comparison]:
        return self.outputs | {f"gradient of {name}": c for name, c in self.gradients.items()}

    def fault(self) -> Fault | None:
        """The first tensor that differs."""
        for name, c in self.comparisons.items():
            if c.reason is not None:
                return Fault(f"{name}: {c.reason}", *c.relative[:2])
        return None

    @property
    def weak(self) -> list[str]:
        """Tensors in which the original is so far from the judge that faults can hide."""
        return [name for name, c in self.comparisons.items() if c.before > WEAK * c.scale]

    def worst(self) -> tuple[float, float, float]:
        """Errors before, after and allowed where `after` is largest, of the tensor's scale."""
        return max((c.relative for c in self.comparisons.values()), key=lambda errors: errors[1])

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        everything = self.comparisons
        failed = {name: c for name, c in everything.items() if not c.ok}
        verdict = f"{len(failed)} of {len(everything)} differ" if failed else "the models agree"
        counted = f"{len(self.outputs)} outputs and buffers, {len(self.gradients)} gradients"
        lines = [f"{verdict}: {counted}", f"rule: {RULE}", self._judge_line()]
        if self.weak:
            lines.append(
                f"weak: the original is off by over {WEAK:.0%} of the largest value in "
                f"{len(self.weak)} tensors, such as {self.weak[0]}: there faults can hide"
            )
        if self.first is not None:
            lines.append(f"first to differ: {self.first or '(the model itself)'}")
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
            "weak": self.weak,
            "first": self.first,
            "outputs": rows(self.outputs),
            "gradients": rows(self.gradients),
        }


def raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {error}"


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
    buffers nor the random state is changed. Copies that cannot fit are a MemoryError.

    If the models differ, parts of `model_b` are tried in copies of `model_a`, and `proof.first`
    names the first module that makes them differ (the last, where only gradients do).
    """
    insist_on_room(model_a, model_b)
    args, kwargs = arguments(inputs)
    with no_trace(model_a, model_b), progress("verify") as tell:
        reference = Reference(model_a, args, kwargs, loss, tell)
        proof = reference.compare(copied(model_b))
        if loss is None:
            insist_on_copies(model_a, model_b)
        if not proof:
            backwards = all(c.ok for c in proof.outputs.values())
            with eager():  # each of many copies would be compiled anew
                proof.first = first_difference(model_a, model_b, reference.compare, backwards)
    return proof


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


class Reference:
    """What a model and its judge gave, which ran once, for comparison with other models."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any], Tensor] | None = None,
        tell: Callable[[int, int, str], None] = silent,
    ) -> None:
        self._call, self._tell, self._done = (args, kwargs, loss), tell, 0
        judge = Float64()
        # each copy is an argument and nothing else, and goes before the next one is made
        with policy("definition"), eager():
            self._judged = self._run(widen(original(model)), "the judge", judge)
            self._original = self._run(original(model), "the original")
        self._narrow = judge.narrow

    def compare(self, twin: nn.Module) -> Proof:
        """Run a copy of the other model, which is used up, and compare."""
        result = self._run(twin, "the other model")
        return _compare_runs(self._original, result, self._judged, self._narrow)

    def _run(self, twin: nn.Module, what: str, judge: Float64 | None = None) -> Run:
        self._tell(self._done, max(3, self._done + 1), what)
        self._done += 1
        if any(module.training for module in twin.modules()):
            without_dropout(twin)
        with Steady():
            mode = judge or contextlib.nullcontext()
            return run(twin, *self._call, mode, wide=judge is not None)


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
