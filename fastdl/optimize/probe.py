"""Whether a module computes what a form says: both run on a small copy of it, in float64."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._route import policy
from ._judge import Float64, eager, no_trace, tensors_in

# Small inputs show eps, large ones what is clamped.
MAGNITUDES = (1e-3, 1.0, 1e3)

CLOSE = 1e-9

# In bfloat16 one rounding more or less is seen in a quarter of all elements.
FEW_DIFFER = 0.02

Forward = Callable[..., Any]
Draw = Callable[..., Tensor]


class Marker(nn.Module):
    """Stands where a dropout was. It is no function that a form could take for another."""

    def forward(self, input: Tensor) -> Tensor:
        return input * 1.7 + 0.3 if self.training else input


def same(
    module: nn.Module,
    original: Forward,
    fused: Forward,
    inputs: Callable[[nn.Module, Draw], tuple[Tensor, ...]],
    rounds_alike: bool,
) -> bool:
    """Whether two forwards of a module agree: outputs and all gradients, in both modes. With
    `rounds_alike` they also round in the same places.
    """
    with no_trace(), eager(), policy("definition"):
        try:
            return all(
                _agree(module, original, fused, inputs, training, magnitude)
                for training in (False, True)
                for magnitude in MAGNITUDES
            ) and (not rounds_alike or _round_alike(module, original, fused, inputs))
        except Exception:  # it takes other arguments, or has not the sizes that it seemed to have
            return False


def _agree(
    module: nn.Module, original: Forward, fused: Forward, inputs: Any, training: bool, size: float
) -> bool:
    results = []
    for forward in (original, fused):
        twin = small_copy(module, torch.float64).train(training)
        draw = _drawing(torch.float64)
        args = tuple((arg * size).requires_grad_() for arg in inputs(twin, draw))
        with Float64():
            output = forward(twin, *args)
        if output is NotImplemented:
            return False
        outputs = [t for _, t in tensors_in(output, "")]
        leaves = [*args, *twin.parameters()]
        roots = [draw(*t.shape) for t in outputs]
        grads = torch.autograd.grad(outputs, leaves, roots, allow_unused=True)
        results.append([*outputs, *grads])
    return len(results[0]) == len(results[1]) and all(
        _close(a, b) for a, b in zip(*results, strict=True)
    )


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a - b).abs().max() <= CLOSE * b.abs().max()) if a.numel() else True


def _round_alike(module: nn.Module, original: Forward, fused: Forward, inputs: Any) -> bool:
    outputs = []
    for forward in (original, fused):
        twin = small_copy(module, torch.bfloat16).eval()
        with torch.no_grad():
            output = forward(twin, *inputs(twin, _drawing(torch.bfloat16, rows=64)))
        outputs.append([t for _, t in tensors_in(output, "")])
    return all(
        a.dtype == b.dtype and bool((a != b).double().mean() <= FEW_DIFFER)
        for a, b in zip(*outputs, strict=True)
    )


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
    sizes = {n for t in _tensors(module) for n in t.shape if n > 1}
    divisor = _divisor(sizes)
    small = {n: n // divisor for n in sizes}
    draw = _drawing(torch.float64)

    def shrink(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return small.get(value, value)
        return tuple(map(shrink, value)) if isinstance(value, tuple) else value

    def fresh(t: Tensor) -> Tensor:
        return draw(*(small.get(n, n) for n in t.shape)).to(dtype)

    seen: dict[int, nn.Module] = {}

    def renew(old: nn.Module) -> nn.Module:
        if id(old) in seen:
            return seen[id(old)]
        if isinstance(old, nn.modules.dropout._DropoutNd):
            return seen.setdefault(id(old), Marker())
        new = seen[id(old)] = old.__class__.__new__(old.__class__)
        new.__dict__.update({key: shrink(value) for key, value in vars(old).items()})
        for name, value in vars(old).items():
            if name.startswith("_") and name.endswith("hooks"):
                new.__dict__[name] = type(value)()
        new._parameters = {
            name: None if p is None else nn.Parameter(fresh(p))
            for name, p in old._parameters.items()
        }
        new._buffers = {n: None if b is None else fresh(b) for n, b in old._buffers.items()}
        new._modules = {n: None if m is None else renew(m) for n, m in old._modules.items()}
        return new

    return renew(module)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _divisor(sizes: set[int]) -> int:
    """The largest number that divides all sizes and leaves at least 4 of each."""
    common = math.gcd(*sizes) if sizes else 1
    return max(
        d
        for d in range(1, common + 1)
        if (common % d == 0 and min(sizes, default=1) >= 4 * d) or d == 1
    )
