"""Every launch configuration of the products on small integers, where every rounding is exact."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch

import fastdl
import fastdl.functional as FF
from bench.machine import poisoned
from fastdl.tuned import Config, Device, forced
from fastdl.tuned.choose import configs

# (M, N, K): whole tiles, tails in rows of 16, tails everywhere, few rows, many steps.
SHAPES = ((512, 512, 512), (300, 272, 208), (130, 77, 199), (5, 528, 1040), (64, 96, 8192))
# Of some, the widths of three weights.
THIRDS = {(512, 512, 512): (256, 128, 128), (300, 272, 208): (144, 112, 16)}
THIRDS |= {(5, 528, 1040): (336, 96, 96)}
# A race shows now and then.
REPEATS = 100
# Whole numbers up to here are exact in bfloat16, and so is every partial sum in fp32 and tf32.
LARGEST = 256


class Exact(NamedTuple):
    """One configuration at one shape: of `linear`, or of `linears` with these widths."""

    dtype: torch.dtype
    tf32: bool
    config: Config
    sizes: tuple[int, int, int]
    widths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        M, N, K = self.sizes
        sizes = f"{M}x{'+'.join(map(str, self.widths or (N,)))}x{K}"
        return f"{named(self.dtype, self.tf32)} {sizes} {described(self.config)}"


def named(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def described(config: Config) -> str:
    blocks = [f"{name}={value}" for name, value in config.blocks.items()]
    numbers = f"warps={config.num_warps} stages={config.num_stages} splits={config.splits}"
    return " ".join([*filter(None, [config.variant]), *blocks, numbers])


def exact_cases(facts: Device, shapes: Any = SHAPES) -> Iterator[Exact]:
    some = shapes[1:2]  # float16 takes the same path as bfloat16
    kinds = ((torch.bfloat16, False, shapes), (torch.float16, False, some))
    kinds += ((torch.float32, False, shapes), (torch.float32, True, shapes))
    for dtype, tf32, of_kind in kinds:
        for sizes in of_kind:
            for config in fewest_and_most_splits(configs("linear", dtype, sizes, facts)):
                for widths in ((), THIRDS[sizes]) if sizes in THIRDS else ((),):
                    yield Exact(dtype, tf32, config, sizes, widths)


def fewest_and_most_splits(found: Iterable[Config]) -> Iterator[Config]:
    for _, group in groupby(found, key=lambda config: replace(config, splits=1)):
        splits = list(group)
        yield from {config.splits: config for config in (splits[0], splits[-1])}.values()


def check_exact(case: Exact, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Compare with a product in fp64, bit by bit, so many times."""
    x, w, b, residual, want = integers(case, device)
    call: Callable[[], torch.Tensor] = partial(
        FF.linear, x, w, b, activation="relu", residual=residual
    )
    if case.widths:
        call = partial(side_by_side, x, w.split(case.widths), b.split(case.widths))
    with (
        torch.no_grad(),
        fastdl.policy("fused", on_fallback="error"),
        forced("linear", case.dtype, case.sizes, case.config),
        fp32_products(case.tf32),
        poisoned(),
    ):
        launched = [launch.config for launch in fastdl.explain(call).launches[:1]]
        # torch's product leaves no launch of its own to be seen
        same = [replace(config, source=case.config.source) for config in launched] == [case.config]
        if not same and case.config.variant != "gemm":
            return {"ok": True, "applies": False, "says": "does not apply to these strides"}
        return {**repeated(call, want, repeats), "applies": True}


def side_by_side(*args: Any) -> torch.Tensor:
    return torch.cat(FF.linears(*args), 1)


def repeated(call: Callable[[], torch.Tensor], want: torch.Tensor, repeats: int) -> dict[str, Any]:
    """What so many runs give, bit by bit."""
    wrong = torch.zeros((), dtype=torch.int64, device=want.device)
    for _ in range(repeats):
        wrong += (call() != want).sum()
    return verdict(int(wrong), repeats)


def verdict(wrong: int, repeats: int) -> dict[str, Any]:
    says = f"{wrong} wrong elements in {repeats} runs" if wrong else f"{repeats} times exact"
    return {"ok": not wrong, "wrong": wrong, "repeats": repeats, "says": says}


def integers(case: Exact, device: str) -> tuple[torch.Tensor, ...]:
    """Inputs of -1, 0 and 1, zeros so many that sums stay small, and relu(x Wᵀ + b) + residual, or
    what `linears` gives.
    """
    M, N, K = case.sizes
    draw, dense = drawing(case.dtype, device), dense_enough(K)
    x, w = draw(M, K, keep=dense), draw(N, K, keep=dense)
    b, residual = draw(N, low=-8, high=8), draw(M, N, low=-8, high=8)
    want = x.double() @ w.double().T + b.double()
    want = want if case.widths else torch.relu(want) + residual.double()
    assert want.abs().max() <= LARGEST, "the inputs are too large to be exact"
    return x, w, b, residual, want.to(case.dtype)


def dense_enough(K: int) -> float:
    """The share of numbers that are not 0, so that sums of K products stay small."""
    return min(1.0, 25.0 / K**0.5)


def drawing(dtype: torch.dtype, device: str) -> Callable[..., torch.Tensor]:
    """Whole numbers, the same in every type."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, low: int = -1, high: int = 1, keep: float = 1.0) -> torch.Tensor:
        values = torch.randint(low, high + 1, shape, generator=generator)
        kept = torch.rand(shape, generator=generator) < keep
        return (values * kept).to(dtype).to(device)

    return draw


@contextmanager
def fp32_products(tf32: bool) -> Iterator[None]:
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
