"""Where timings run: a GPU, or for dry runs and tests the host."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.interleave import Call, Timer, host_timer
from fastdl.tuned import slug

# Runs one call on one of several sets of inputs.
OnSet = Callable[[int], Any]


class Host:
    """No graphs and no cache to empty: for tests, where nothing is claimed about time."""

    device, name, cold_bytes = "cpu", "host", 1

    def timer(self) -> Timer:
        return host_timer()

    def settle(self) -> None:
        pass

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


class Gpu(Host):
    """The current CUDA device."""

    device = "cuda"

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

    def captured(self, call: OnSet, sets: int, times: int) -> Call:
        """The same calls as one CUDA graph: no launch gaps."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(sets):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
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


def machine() -> Host:
    return Gpu() if torch.cuda.is_available() else Host()


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
