"""Where timings run: a GPU, or for dry runs and tests the host."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastdl
from bench.interleave import Call, Timer, host_timer
from fastdl.tuned import slug

# Runs one call on one of several sets of inputs.
OnSet = Callable[[int], Any]


class Host:
    """No graphs and no cache to empty: for tests, where nothing is claimed about time."""

    device, name, cold_bytes, is_gpu = "cpu", "host", 1, False

    def timer(self) -> Timer:
        return host_timer()

    def stream(self) -> Any:
        """Where calls go now."""
        return None

    def settle(self) -> None:
        pass

    def other_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, work goes to a stream of its own. May be entered again."""
        return contextlib.nullcontext()

    def repeated(self, call: OnSet, sets: int, times: int) -> Call:
        """`times` calls in a row, over all sets in turn."""

        def run() -> None:
            for i in range(times):
                call(i % sets)

        return run

    def captured(self, call: OnSet, sets: int, times: int) -> Call:
        return self.repeated(call, sets, times)

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0

    def release(self) -> None:
        """Give back the memory of what nobody holds any more."""
        gc.collect()


class Gpu(Host):
    """The current CUDA device."""

    device, is_gpu = "cuda", True

    def __init__(self) -> None:
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = facts.name
        # three times the L2: nothing that was read is still there when its turn comes again
        self.cold_bytes = 3 * (facts.L2_cache_size or 64 << 20)

    def timer(self) -> Timer:
        def start(call: Call) -> tuple[Any, Any]:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            return first, last

        def finish(marks: list[Any]) -> list[float]:
            torch.cuda.synchronize()
            return [1e3 * first.elapsed_time(last) for first, last in marks]

        return Timer(start, finish)

    def settle(self) -> None:
        torch.cuda.synchronize()

    def other_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.Stream())

    def stream(self) -> Any:
        return torch.cuda.current_stream()

    def captured(self, call: OnSet, sets: int, times: int) -> Call:
        """The same calls as one CUDA graph: no launch gaps. What they keep from one call to the
        next is made before, and on the stream that is captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(sets):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(times):
                call(i % sets)
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """Memory that the call takes on top of what is there, in a run of its own."""
        call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak

    def release(self) -> None:
        super().release()
        torch.cuda.empty_cache()


def machine() -> Host:
    return Gpu() if torch.cuda.is_available() else Host()


# What runs right with this ptxas: a product, and attention, which needs it.
PROBE = """
import torch, fastdl, fastdl.functional as FF
F = torch.nn.functional
with fastdl.policy("fused", on_fallback="error"):
    x = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(FF.linear(x, x[0, 0]), F.linear(x, x[0, 0]))
    got, want = (of.scaled_dot_product_attention(x, x, x) for of in (FF, F))
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
"""


def better_ptxas() -> dict[str, str]:
    """What to set before the first kernel is compiled: a ptxas without the known mistake, if the
    one in use has it and the driver loads the other's code.
    """
    environment = fastdl.env()
    if not any("ptxas" in problem for problem in environment.problems):
        return {}
    print(f"ptxas {environment.ptxas} miscompiles products with operand A in registers on sm_90")
    if environment.better_ptxas is None:
        print(
            "no newer ptxas is installed, so attention would run in torch and its rows fail: "
            "pip install 'fastdl-kernels[hopper]'",
            flush=True,
        )
        return {}
    use = {"TRITON_PTXAS_PATH": environment.better_ptxas}
    command = [sys.executable, "-c", PROBE]
    try:
        works = subprocess.run(command, env={**os.environ, **use}, timeout=300).returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    print(f"{environment.better_ptxas}: {'used' if works else 'does not work here'}", flush=True)
    return use if works else {}


def folder_name(name: str) -> str:
    return slug(name)


@contextlib.contextmanager
def poisoned() -> Any:
    """NaN in every new torch.empty: an element that nobody wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def as_tuple(value: Any) -> Sequence[torch.Tensor]:
    return value if isinstance(value, (tuple, list)) else (value,)
