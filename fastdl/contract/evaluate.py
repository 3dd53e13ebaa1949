"""Running a case, and comparing two runs."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops._op import LIBRARY_OPS, NAMESPACE, Op
from ..ops._route import policy
from .case import Case, Maker

# Our error may be this many times the definition's own, plus FLOOR, or FLOOR of the largest value
# where all values are below 1.
FORWARD, GRADIENT, FLOOR = 2.0, 3.0, 1e-5


@dataclass
class Run:
    """Outputs of a case, and the gradients of its leaves."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    maker: Maker


class LibraryCall(NamedTuple):
    """A call of one of our library ops, as torch's dispatcher sees it."""

    overload: Any
    args: tuple[Any, ...]
    result: Any

    @property
    def name(self) -> str:
        return self.overload.name().split("::")[1]


class LibraryCalls(TorchDispatchMode):
    """Collects the calls of library ops inside of a with block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LibraryCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            self.calls.append(LibraryCall(func, args, result))
        return result


class Allocated(TorchDispatchMode):
    """Counts the bytes that are allocated inside of a with block, by library ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.made: list[Tensor] = []
        self._given: list[Tensor] = []  # kept, so that no memory is counted twice or missed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            with self:
                return LIBRARY_OPS[func.name().split("::")[1]].launch(*args)
        self._given += self._unknown((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = self._unknown(result)
        self.made += made
        self.bytes += sum(tensor.untyped_storage().nbytes() for tensor in made)
        return result

    def _unknown(self, values: Any) -> list[Tensor]:
        """Tensors in memory that was not seen before."""
        known = {t.untyped_storage().data_ptr() for t in (*self.made, *self._given)}
        found: dict[int, Tensor] = {}
        for tensor in tensors(values):
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return [tensor for home, tensor in found.items() if home not in known]


def tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


class NoVendor(Exception):
    """An op has no vendor call for the options that it was given."""


@contextlib.contextmanager
def vendors() -> Iterator[None]:
    """Inside of a with block, ops run their vendor calls, or raise NoVendor."""

    def run(op: Op, *args: Any) -> Any:
        found = None if op.vendor is None else op.vendor(*args)
        if found is None:
            raise NoVendor(op.name)
        return found

    with mock.patch.object(Op, "__call__", run):
        yield


def floats(result: Any) -> list[Tensor]:
    return [t for t in tensors(result) if t.is_floating_point()]


def cotangents(maker: Maker, outputs: list[Tensor]) -> list[Tensor]:
    """Gradients to send back: the same values in every dtype."""
    twin = Maker(maker.rounded, maker.dtype, device=maker.device, integers=maker.integers, seed=99)
    return [twin.values(y.shape) for y in outputs]


def run(case: Case, maker: Maker, mode: Any, backward: bool = True) -> Run:
    """Call the case under a policy that forbids falling back, and differentiate it."""
    with policy(mode, on_fallback="error"):
        torch.manual_seed(7)  # the seeds of dropout
        outputs = floats(case.make(maker)())
        if not (backward and maker.leaves and any(y.requires_grad for y in outputs)):
            return Run(outputs, [], maker)
        gradients = torch.autograd.grad(
            outputs, maker.leaves, cotangents(maker, outputs), allow_unused=True
        )
    return Run(outputs, [g for g in gradients if g is not None], maker)


@dataclass
class Error:
    """The largest deviation from the truth, of ours and of the definition in the same dtype."""

    ours: float = 0.0
    definition: float = 0.0
    allowed: float = 0.0

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed

    def require(self, what: str) -> None:
        """Raise unless the error is within the rule."""
        assert self.ok, f"{what}: our error is {self.ours:.2e}, allowed is {self.allowed:.2e}"

    def worst(self, other: "Error") -> "Error":
        return max(self, other, key=Error.share)

    def share(self) -> float:
        """How much of the allowance is used."""
        if not self.allowed:
            return math.inf if self.ours else 0.0
        return self.ours / self.allowed


def deviation(got: Tensor, truth: Tensor) -> float:
    """The largest distance; infinite where one has a NaN or another infinity and the other has not."""
    got, truth = got.detach().to(truth.dtype), truth.detach()
    if got.shape != truth.shape:
        return math.inf
    if not got.numel():
        return 0.0
    same = (got == truth) | (got.isnan() & truth.isnan())
    distance = torch.where(same, 0.0, (got - truth).abs())
    return float(distance.nan_to_num(math.inf, math.inf).max())


def _size(tensor: Tensor) -> float:
    """The largest finite value."""
    finite = tensor.detach()[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 1.0


def compare(
    ours: list[Tensor], definition: list[Tensor], truth: list[Tensor], factor: float
) -> Error:
    """The worst of several tensors, under the rule."""
    assert len(ours) == len(definition) == len(truth), "a tensor is missing"
    worst = Error()
    largest = max(map(_size, truth), default=0.0)
    for got, low, true in zip(ours, definition, truth, strict=True):
        assert got.dtype == low.dtype, f"dtype {got.dtype}, torch gives {low.dtype}"
        assert got.shape == low.shape, f"shape {tuple(got.shape)}, torch gives {tuple(low.shape)}"
        low_error = deviation(low, true)
        # all that is left of a gradient of 0 may be what did not cancel
        size = _size(true) or largest
        # where the definition overflows, its error is infinite
        astray = got.dtype == torch.float32 and 1e-3 * max(size, 0.1) < low_error < math.inf
        assert not astray, f"in float64 the definition computes something else: {low_error:.1e} off"
        floor = FLOOR * min(1.0, size)
        worst = worst.worst(Error(deviation(got, true), low_error, factor * low_error + floor))
    return worst


def accuracy(case: Case, dtype: torch.dtype, device: str) -> tuple[Error, Error]:
    """Errors of outputs and of gradients."""
    ours = run(case, Maker(dtype, device=device), "fused")
    definition = run(case, Maker(dtype, device=device), "definition")
    truth = run(case, Maker(dtype, torch.float64, device=device), "definition")
    return (
        compare(ours.outputs, definition.outputs, truth.outputs, FORWARD),
        compare(ours.gradients, definition.gradients, truth.gradients, GRADIENT),
    )
