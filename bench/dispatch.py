"""What a call costs the host: our ops, torch's, and the floors that any op of this kind has.

Without a GPU the path is the one of a GPU, down to Triton's launcher, with a driver that does
nothing: the driver's own 2 to 3 us a launch are missing there.
"""

import argparse
import contextlib
import cProfile
import os
import pstats
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import fastdl
import fastdl.functional as FF
from bench.interleave import host_timer, interleave, summarize
from fastdl.tuned import Device

# Seen on another CPU, in us: ratios travel, times do not.
EXPECTED = {
    "torch.add": 1.8,
    "library op, no gradient": 3.1,
    "Function over a library op": 8.0,
    "Triton's own launcher, 14 arguments": 10.0,
}

library = torch.library.Library("fastdl_dispatch", "DEF")
library.define("add(Tensor x, Tensor y) -> Tensor")
for _key in ("CPU", "CUDA"):
    library.impl("add", lambda x, y: torch.add(x, y), _key)


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return torch.ops.fastdl_dispatch.add.default(x, y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, dy


def contenders(device: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape, device=device) for shape in ((16, 64), (64,), (64,)))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    lw = torch.randn(64, 64, device=device)
    linear = [t.clone().requires_grad_() for t in (x, lw, b)]
    return {
        "torch.add": lambda: torch.add(x, x),
        "library op, no gradient": lambda: torch.ops.fastdl_dispatch.add.default(x, x),
        "Function over a library op": lambda: Added.apply(leaves[0], x),
        "F.layer_norm": lambda: F.layer_norm(x, (64,), w, b),
        "layer_norm": lambda: FF.layer_norm(x, (64,), w, b),
        "F.layer_norm, with gradient": lambda: F.layer_norm(leaves[0], (64,), *leaves[1:]),
        "layer_norm, with gradient": lambda: FF.layer_norm(leaves[0], (64,), *leaves[1:]),
        "F.layer_norm, both passes": lambda: both(F.layer_norm, leaves, (64,)),
        "layer_norm, both passes": lambda: both(FF.layer_norm, leaves, (64,)),
        "F.gelu": lambda: F.gelu(x),
        "gelu": lambda: FF.gelu(x),
        "F.gelu(F.linear)": lambda: F.gelu(F.linear(x, lw, b)),
        "linear with gelu": lambda: FF.linear(x, lw, b, activation="gelu"),
        "linear with gelu, with gradient": lambda: FF.linear(*linear, activation="gelu"),
    }


def both(norm: Callable[..., Any], leaves: list[torch.Tensor], *shape: Any) -> Any:
    y = norm(leaves[0], *shape, *leaves[1:])
    return torch.autograd.grad(y, leaves, y.detach())


class NoDriver:
    """Triton's driver for an H200 that is not here: kernels compile, and go nowhere."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", 90, 32), self

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Ops on CPU tensors take the path of a GPU."""
    from triton.runtime import driver

    launch = sys.modules["fastdl.ops._launch"]  # replaced are its questions to the device
    device = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
    with (
        mock.patch.object(driver, "_active", NoDriver()),
        mock.patch.object(launch, "device_types", lambda: ("cuda", "cpu")),
        mock.patch.object(launch, "gpu_facts", lambda index: device),
        mock.patch.object(torch.cuda, "current_device", lambda: None),
    ):
        yield


def triton_launcher(device: str) -> Callable[[], Any]:
    """The kernel of layer_norm through Triton's own launcher, as it was last launched."""
    x, w, b = (torch.randn(*shape, device=device) for shape in ((16, 64), (64,), (64,)))
    launch = fastdl.explain(FF.layer_norm, x, (64,), w, b).launches[0]
    kernel, config = launch.kernel.fn, launch.config
    options = {**launch.constants, **config.blocks}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return lambda: kernel[launch.grid](*launch.args, **options)


def times(calls: dict[str, Callable[[], Any]], number: int, rounds: int) -> dict[str, float]:
    """Microseconds a call, in turn."""

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(number):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return run

    for call in calls.values():
        call()  # compile
    loops = {name: repeated(call) for name, call in calls.items()}
    found = interleave(loops, host_timer(), rounds=rounds, warm_s=0)
    stats = summarize(found, next(iter(found)))
    return {name: stat.us / number for name, stat in stats.items()}


def profile(call: Callable[[], Any], number: int) -> None:
    recorder = cProfile.Profile()
    recorder.enable()
    for _ in range(number):
        call()
    recorder.disable()
    pstats.Stats(recorder).sort_stats("tottime").print_stats(18)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="a round; default: 500")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", metavar="NAME", help="also where the time of one call goes")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter is no path to measure; unset it")
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu:
        torch.set_num_threads(1)  # threads would cost more than what is measured
    with contextlib.nullcontext() if gpu else without_gpu():
        calls = contenders(device)
        calls["Triton's own launcher, 14 arguments"] = triton_launcher(device)
        found = times(calls, options.calls, options.rounds)
        if options.profile:
            profile(calls[options.profile], options.calls)
    missing = "" if gpu else ", the driver's launch missing from ours"
    print(f"host time a call in us on this {'machine' if gpu else f'CPU{missing}'}")
    for name, us in found.items():
        expected = f"   {EXPECTED[name]:5.1f} seen elsewhere" if name in EXPECTED else ""
        print(f"{us:8.1f}  {us / found['torch.add']:6.1f} x add  {name}{expected}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
