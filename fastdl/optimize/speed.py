"""Time and memory of a model before and after, on its example inputs."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._table import lines as table
from ..ops import _launch
from ._judge import fresh, no_trace, tensors_in

WARM, ROUNDS = 3, 21

Call = Callable[[], Any]


class Pass(NamedTuple):
    """Medians of the original and of the optimized model: milliseconds, and bytes at the peak on
    top of the model itself.
    """

    ms_before: float
    ms_after: float
    bytes_before: int
    bytes_after: int

    @property
    def faster(self) -> float:
        return self.ms_before / self.ms_after


class Speed:
    """What was measured by pass, or why nothing was."""

    def __init__(self, passes: Mapping[str, Pass], device: str = "", reason: str = "") -> None:
        self.passes, self.device, self.reason = dict(passes), device, reason

    def __str__(self) -> str:
        if self.reason:
            return f"time and memory: not measured: {self.reason}"
        head = ("pass", "before", "after", "faster by", "memory before", "memory after")
        rows = [(name, *self.cells(name)) for name in self.passes]
        return "\n".join([f"time and memory on {self.device}:", *table(head, rows)])

    def cells(self, name: str) -> tuple[str, ...]:
        p = self.passes[name]
        times = (f"{p.ms_before:.2f} ms", f"{p.ms_after:.2f} ms", f"{p.faster:.2f}x")
        return *times, *(f"{size / 2**20:.1f} MB" for size in (p.bytes_before, p.bytes_after))

    def as_dict(self) -> dict[str, Any]:
        passes = {name: p._asdict() for name, p in self.passes.items()}
        return {"device": self.device, "passes": passes, "reason": self.reason}


class Gpu:
    """The current CUDA device. A call's time is what its caller waits for, launches included."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def seconds(self, call: Call) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def peak_bytes(self, call: Call) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def measure(
    before: nn.Module,
    after: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gpu: Gpu | None = None,
) -> Speed:
    """Measure two models in turn, before and after in each round; they are not kept."""
    if gpu is None:
        reason = _why_not(after)
        if reason:
            return Speed({}, reason=reason)
        gpu = Gpu()
    with no_trace():
        args, kwargs = fresh((args, kwargs))
        passes = {"forward": [_forward(model, args, kwargs) for model in (before, after)]}
        if any(parameter.requires_grad for parameter in after.parameters()):
            both = [_backward(model, args, kwargs) for model in (before, after)]
            passes["forward and backward"] = both
        return Speed({name: _measured(gpu, *calls) for name, calls in passes.items()}, gpu.name)


def _why_not(model: nn.Module) -> str:
    if not torch.cuda.is_available():
        return "there is no GPU"
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cuda":
        return f"the model is on {parameter.device}; move it and its inputs to the GPU"
    return "kernels run in Triton's interpreter" if _launch.INTERPRETED else ""


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def call() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return call


def _backward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def call() -> None:
        tensors = [t for _, t in tensors_in(model(*args, **kwargs), "") if t.requires_grad]
        torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
        model.zero_grad(set_to_none=True)

    return call


def _measured(gpu: Gpu, before: Call, after: Call) -> Pass:
    for _ in range(WARM):
        before()
        after()
    rounds = [(gpu.seconds(before), gpu.seconds(after)) for _ in range(ROUNDS)]
    ms_before, ms_after = (1e3 * statistics.median(of_one) for of_one in zip(*rounds, strict=True))
    return Pass(ms_before, ms_after, gpu.peak_bytes(before), gpu.peak_bytes(after))
