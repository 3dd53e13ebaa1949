"""Which binaries an op needs: the calls of its contract, on meta tensors, launching nothing."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import functional as FF
from ..contract import DTYPES, SPECS, STEPS, Maker
from ..ops import _launch, _tuned
from ..ops._route import policy
from ..ops.activation import ACTIVATIONS
from .devices import Target


@dataclass(frozen=True)
class Specialisation:
    """All that Triton compiles a launch for, in a form that travels between processes.

    An argument is "bfloat16 16" for a pointer (aligned to 16 bytes), "bfloat16 128x64" for a tensor
    descriptor, "i32" or "i64 16" for a whole number (a multiple of 16), "1", "float" or "none".
    """

    op: str
    kernel: str
    args: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> "Specialisation":
        constants = tuple((name, value) for name, value in data["constants"])
        return cls(**{**data, "args": tuple(data["args"]), "constants": constants})

    @property
    def name(self) -> str:
        return self.kernel.partition(".")[2]

    @property
    def dtype(self) -> str:
        """That of the first tensor."""
        return next(arg.split()[0] for arg in self.args if hasattr(torch, arg.split()[0]))

    @property
    def aligned(self) -> bool:
        """Whether all addresses and strides allow 16-byte accesses."""
        return all(" " in arg or arg in ("1", "none", "float") for arg in self.args)

    @property
    def config(self) -> str:
        words = [
            value if isinstance(value, str) else f"{name.removeprefix('BLOCK_')}={int(value)}"
            for name, value in self.constants
        ]
        return " ".join([*words, f"w{self.num_warps}", f"s{self.num_stages}"])


def specialisation(op: str, launch: _launch.Launch) -> Specialisation:
    constants = {**launch.constants, **launch.config.blocks}
    return Specialisation(
        op,
        f"{launch.kernel.module}.{launch.kernel.name}",
        tuple(map(_describe, launch.args)),
        tuple(constants.items()),
        launch.config.num_warps,
        launch.config.num_stages,
    )


def _describe(arg: Any) -> str:
    if arg is None:
        return "none"
    if isinstance(arg, Tensor):
        return _dtype(arg) + (" 16" if arg.data_ptr() % 16 == 0 else "")
    if isinstance(arg, float):
        return "float"
    if isinstance(arg, int):
        if arg == 1:
            return "1"
        return ("i32" if -(2**31) <= arg < 2**31 else "i64") + (" 16" if arg % 16 == 0 else "")
    return f"{_dtype(arg.base)} {'x'.join(map(str, arg.block_shape))}"  # a tensor descriptor


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def specialisations(
    op: str, target: Target, configs: Iterable[Mapping[str, Any]] | None = None
) -> list[Specialisation]:
    """What the op compiles: for the benchmark's shapes, all that tuning may pick, and every case.

    With `configs`, entries of a tuned table, only what these compile on the benchmark's shapes.
    """
    found: dict[Specialisation, None] = {}
    runs = _runs(op) if configs is None else _forced(op, configs)
    with (
        policy("fused", on_fallback="error"),
        # torch refuses to answer for meta tensors
        mock.patch.object(torch, "is_autocast_enabled", lambda *device: False),
        _launch.recording(target.device) as launches,
    ):
        for run in runs:
            run()
            found.update((specialisation(op, launch), None) for launch in launches)
            launches.clear()
    return list(found)


def _linear(m: int, n: int, k: int, **options: Any) -> Callable[[Maker], "partial[Any]"]:
    def make(t: Maker) -> "partial[Any]":
        return partial(FF.linear, t(m, k), t(n, k), t(n), residual=t(m, n), **options)

    return make


# Calls that need more registers than the benchmark's: all there is to finish, and odd rows.
HEAVY = {
    "linear": [
        *(_linear(4096, 4096, 1024, activation=name, dropout_p=0.1) for name in ACTIVATIONS),
        _linear(4096, 4095, 1024, activation="gelu", dropout_p=0.1),
        _linear(4095, 4095, 1023, activation="gelu", dropout_p=0.1),
    ]
}


def _runs(op: str) -> Iterator[Callable[[], None]]:
    if op in STEPS:
        yield from _steps(op)
        return
    spec = SPECS[op]
    yield from _benchmark(op)
    for make in HEAVY.get(op, ()):
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_run, make, dtype)
    yield from _candidates(op)
    for case in spec.cases:
        for dtype in DTYPES:
            yield partial(_run, case.make, dtype)


def _steps(op: str) -> Iterator[Callable[[], None]]:
    """An optimizer's steps: they have no gradients."""
    for make in [*(case.make for case in STEPS[op].bench), *STEPS[op].variants]:
        for dtype in DTYPES:
            yield make(Maker(dtype, device="meta"))


def _benchmark(op: str) -> Iterator[Callable[[], None]]:
    for case in SPECS[op].bench:
        for dtype in DTYPES:
            yield partial(_run, case.make, dtype)
            yield partial(_run, case.make, dtype, grad=False)
        yield partial(_run, case.make, torch.float32, tf32=True)


def _tuned_calls(op: str) -> Iterator[tuple[Any, torch.dtype]]:
    for make in [*(case.make for case in SPECS[op].bench), *HEAVY.get(op, ())[-2:]]:
        for dtype in DTYPES:
            yield make, dtype


def _candidates(op: str) -> Iterator[Callable[[], None]]:
    """The benchmark's calls under each configuration that tuning may pick for what they look up."""
    for make, dtype in _tuned_calls(op):
        offers: dict[Any, list[_launch.Config]] = {}
        yield partial(_run_with, partial(_note, offers), make, dtype)
        # that run has filled the offers by now
        for asked, configs in offers.items():
            for config in configs:
                yield partial(_run_with, partial(_answer, config, asked), make, dtype)


def _forced(op: str, configs: Iterable[Mapping[str, Any]]) -> Iterator[Callable[[], None]]:
    """The benchmark's calls under each of these entries of a tuned table."""
    for config in configs:
        answer = partial(_answer, _launch.Config(**config), (op,))
        for make, dtype in _tuned_calls(op):
            yield partial(_run_with, answer, make, dtype)


def _note(offers: dict[Any, list[_launch.Config]], *asked: Any) -> None:
    key, *sizes = asked
    offers[asked] = _tuned.CANDIDATES[key](*sizes)


def _answer(config: _launch.Config, wanted: tuple[Any, ...], *asked: Any) -> _launch.Config | None:
    return config if asked[: len(wanted)] == wanted else None


def _run_with(lookup: Callable[..., Any], make: Any, dtype: torch.dtype) -> None:
    with mock.patch.object(_tuned, "lookup", lookup):
        _run(make, dtype, tf32=dtype == torch.float32)


def _run(
    make: Callable[[Maker], "partial[Any]"],
    dtype: torch.dtype,
    grad: bool = True,
    tf32: bool = False,
) -> None:
    call = make(Maker(dtype, device="meta", grad=grad))
    options = {name: _on_meta(value, dtype) for name, value in call.keywords.items()}
    with _precision("tf32" if tf32 else "ieee"):
        out = call.func(*call.args, **options)
        outputs = [y for y in pytree.tree_leaves(out) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _on_meta(option: Any, dtype: torch.dtype) -> Any:
    if isinstance(option, nn.Module):
        return copy.deepcopy(option).to(device="meta", dtype=dtype)
    return option


@contextlib.contextmanager
def _precision(value: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = value
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def pick(found: list[Specialisation], limit: int | None) -> list[Specialisation]:
    """At most `limit` of them: kernels first, then types, alignments and configurations of each."""
    if limit is None or len(found) <= limit:
        return found
    picked: dict[Specialisation, None] = {}
    seen: set[Any] = set()

    def news(s: Specialisation) -> int:
        return sum(weight for feature, weight in _features(s) if feature not in seen)

    while len(picked) < limit:
        best = max((s for s in found if s not in picked), key=news)
        picked[best] = None
        seen.update(feature for feature, _ in _features(best))
    return list(picked)


def _features(s: Specialisation) -> list[tuple[Any, int]]:
    blocks = tuple(value for _, value in s.constants if isinstance(value, int))
    launch = (blocks, s.num_warps, s.num_stages)
    return [
        ((s.kernel,), 1000),
        ((s.kernel, s.dtype == "float32"), 100),
        ((s.kernel, s.aligned), 40),
        ((s.kernel, launch), 20),
        ((s.kernel, s.dtype), 5),
        ((s.kernel, s.aligned, tuple(arg == "none" for arg in s.args)), 3),
        ((s.kernel, s.constants), 1),
    ]
