"""Whether a module computes what a form says: both run on a small copy of it, in float64."""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._route import policy
from .._judge import eager, no_trace, tensors_in
from .._modes import Float64
from .form import Draw, Form

# Small inputs show eps, large ones what is clamped.
MAGNITUDES = (1e-3, 1.0, 1e3)

CLOSE = 1e-9

Forward = Callable[..., Any]
Given = list[Tensor | None]


class Marker(nn.Module):
    """Stands where a dropout was. No two are alike, nor is one like anything else."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.factor = 1.7 + 0.1 * number

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor + 0.3 if self.training else input


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """What probes need around them."""
    with no_trace(), eager(), policy("definition"):
        yield


class Probe:
    """A module's own forward, to compare forms with: outputs, all gradients and buffers, in both
    modes.
    """

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self.module, self.forward = module, forward
        self._known: dict[Any, list[Any] | None] = {}

    @functools.cached_property
    def _shape(self) -> nn.Module:
        return small_copy(self.module, torch.float64)

    def agrees(self, form: Form) -> bool:
        """Whether the form computes what the module does."""
        try:
            sizes = all(self._same(form, False, size) for size in MAGNITUDES)
            return sizes and self._same(form, True, 1.0)
        except Exception:  # the sizes are not what they seemed to be
            return False

    def _same(self, form: Form, training: bool, size: float) -> bool:
        drawn = form.inputs(self._shape, _drawing(torch.float64))
        inputs = [None if x is None else x * size for x in drawn]
        expected = self._own(inputs, training, size)
        if expected is None:
            return False
        twin = small_copy(self.module, torch.float64).train(training)
        found = _derived(twin, form.run, inputs)
        return (
            found is not None and len(found) == len(expected) and all(map(_close, found, expected))
        )

    def _own(self, inputs: Given, training: bool, size: float) -> list[Any] | None:
        """What the module's own forward gives; None where it takes other arguments, or leaves
        something in the module, which no form would.
        """
        key = training, size, tuple(None if x is None else x.shape for x in inputs)
        if key not in self._known:
            twin = small_copy(self.module, torch.float64).train(training)
            kept = _held(twin)
            try:
                found = _derived(twin, self.forward, inputs)
            except Exception:
                found = None
            self._known[key] = found if _held(twin) == kept else None
        return self._known[key]

    def strays(self, form: Form) -> float:
        """The part of all elements that come out different in bfloat16: a quarter, where something
        is rounded once more or less.
        """
        outputs = []
        with torch.no_grad():
            for forward in (self.forward, form.run):
                twin = small_copy(self.module, torch.bfloat16).eval()
                output = forward(twin, *form.inputs(twin, _drawing(torch.bfloat16, rows=64)))
                outputs.append([t.double() for _, t in tensors_in(output, "")])
        pairs = zip(*outputs, strict=True)
        return max((a != b).double().mean().item() for a, b in pairs)


def _held(module: nn.Module) -> list[Any]:
    """What modules hold: which objects, and how many there are in each."""
    return [
        (name, id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for m in module.modules()
        for name, value in vars(m).items()
    ]


def _derived(twin: nn.Module, forward: Forward, inputs: Given) -> list[Any] | None:
    """Outputs, gradients and buffers of a run; None where a form declines."""
    args = [None if x is None else x.clone().requires_grad_() for x in inputs]
    with Float64():
        output = forward(twin, *args)
    if output is NotImplemented:
        return None
    outputs = [t for _, t in tensors_in(output, "")]
    draw = _drawing(torch.float64)
    roots = [draw(*t.shape) for t in outputs]
    leaves = [*(x for x in args if x is not None), *twin.parameters()]
    grads = torch.autograd.grad(outputs, leaves, roots, allow_unused=True)
    return [*outputs, *grads, *twin.buffers()]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a - b).abs().max() <= CLOSE * b.abs().max()) if a.numel() else True  # NaN is not


def _drawing(dtype: torch.dtype, rows: int = 3) -> Draw:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        # 0 stands for what is counted, such as tokens
        wanted = [n or rows for n in shape]
        return torch.randn(wanted, generator=generator, dtype=torch.float64).to(dtype)

    return draw


def small_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU whose sizes are smaller in proportion, with random parameters.

    It needs no memory to speak of, and the original may be sharded or on the meta device.
    """
    # past two dimensions are windows
    sizes = {n for t in _tensors(module) for n in t.shape[:2] if n > 1}
    sizes |= {
        n for m in module.modules() if isinstance(m, nn.LayerNorm) for n in m.normalized_shape
    }
    divisor = _divisor(sizes, module)
    small = {n: n // divisor for n in sizes}
    draw = _drawing(torch.float64)

    def shrink(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return small.get(value, value)
        if isinstance(value, (list, dict, set)):
            return copy.copy(value)  # what a forward puts there is not the original's
        return tuple(map(shrink, value)) if isinstance(value, tuple) else value

    def fresh(t: Tensor) -> Tensor:
        drawn = draw(*(small.get(n, n) for n in t.shape))
        return drawn.to(dtype) if t.is_floating_point() else torch.zeros_like(drawn, dtype=t.dtype)

    seen: dict[int, nn.Module] = {}

    def renew(old: nn.Module) -> nn.Module:
        if id(old) in seen:
            return seen[id(old)]
        if isinstance(old, (nn.modules.dropout._DropoutNd, nn.Identity)):
            return seen.setdefault(id(old), Marker(len(seen)))
        new = seen[id(old)] = old.__class__.__new__(old.__class__)
        new.__dict__.update({key: shrink(value) for key, value in vars(old).items()})
        for name, value in vars(old).items():
            if name.startswith("_") and name.endswith("hooks"):
                new.__dict__[name] = type(value)()
        new._parameters = {
            name: None if p is None else nn.Parameter(fresh(p))
            for name, p in old._parameters.items()
        }
        # a variance is positive
        new._buffers = {n: None if b is None else fresh(b).abs() for n, b in old._buffers.items()}
        new._modules = {n: None if m is None else renew(m) for n, m in old._modules.items()}
        return new

    return renew(module)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _divisor(sizes: set[int], module: nn.Module) -> int:
    """The largest number that divides all sizes, leaves at least 4 of each, and groups whole."""
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    common = math.gcd(*sizes, *(norm.num_channels // norm.num_groups for norm in norms)) or 1
    smallest = min(sizes, default=1)
    return max(d for d in range(1, common + 1) if d == 1 or (common % d == 0 and 4 * d <= smallest))
