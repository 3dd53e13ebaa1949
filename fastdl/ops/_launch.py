"""Launching kernels: the facts of the device, compiled kernels kept by signature, and the
interpreter.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

HAVE_TRITON = importlib.util.find_spec("triton") is not None

# Triton reads the same variable, when a kernel is decorated: changing it later has no effect on
# either.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class Device:
    """What launch configurations depend on."""

    name: str
    backend: str
    arch: int | str
    sms: int
    shared: int

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors are copied by hardware."""
        return self.backend == "cuda" and int(self.arch) >= 90


# Few processors, so that persistent loops go round more than once on the small shapes of a test.
INTERPRETER = Device("interpreter", "interpreter", 90, sms=3, shared=232448)


class Margin(NamedTuple):
    """How much faster than torch kernels were measured: the median of torch's time over theirs in
    the same round, and its quartiles.
    """

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x torch's speed ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Config:
    """How an op is launched: which of its kernels, block sizes, warps and stages, and who says so.

    `variant` names the kernel where an op has several; "torch" means that torch measured faster,
    and `margin` by how much.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    variant: str = ""
    splits: int = 1
    source: str = "rule"
    margin: Margin | None = field(default=None, compare=False)

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for."""

    kernel: "Kernel"
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    config: Config

    def __str__(self) -> str:
        blocks = " ".join(f"{k}={v}" for k, v in self.config.blocks.items())
        return (
            f"{self.kernel.name} grid={self.grid} {blocks} warps={self.config.num_warps} "
            f"stages={self.config.num_stages} [{self.config.source}]"
        )


class Lookup(NamedTuple):
    """One question to the tables of measurements and its answer; `at` launches were recorded by
    then.
    """

    op: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    found: Config | None
    at: int


@dataclass
class _Recorder:
    launches: list[Launch] = field(default_factory=list)
    device: Device | None = None  # set: nothing is launched, and this device is assumed


class _State(threading.local):
    recorder: _Recorder | None = None
    lookups: list[Lookup] | None = None


_state = _State()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def device_types() -> tuple[str, ...]:
    """The device types on which kernels can run just now."""
    if _state.recorder is not None and _state.recorder.device is not None:
        return ("meta",)
    return ("cuda", "cpu") if INTERPRETED else ("cuda",)


def device_of(tensor: Tensor) -> Device:
    """The facts that launch configurations for `tensor` depend on."""
    if _state.recorder is not None and _state.recorder.device is not None:
        return _state.recorder.device
    return INTERPRETER if INTERPRETED else gpu_facts(tensor.device.index)


@functools.cache
def gpu_facts(index: int) -> Device:
    facts: Any = torch.cuda.get_device_properties(index)  # its stub lacks fields
    if torch.version.hip:
        return Device(
            facts.name, "hip", facts.gcnArchName.split(":")[0], facts.multi_processor_count, 65536
        )
    arch = facts.major * 10 + facts.minor
    shared = facts.shared_memory_per_block_optin
    return Device(facts.name, "cuda", arch, facts.multi_processor_count, shared)


@contextlib.contextmanager
def recording(device: Device | None = None) -> Iterator[list[Launch]]:
    """Collect launches. With `device`, ops run on meta tensors as that device would, and launch
    nothing.
    """
    outer, _state.recorder = _state.recorder, _Recorder(device=device)
    try:
        yield _state.recorder.launches
    finally:
        _state.recorder = outer


@contextlib.contextmanager
def asking() -> Iterator[list[Lookup]]:
    """Collect what ops ask the tables of measurements."""
    outer, _state.lookups = _state.lookups, []
    try:
        yield _state.lookups
    finally:
        _state.lookups = outer


def note(op: str, dtype: torch.dtype, sizes: tuple[int, ...], found: Config | None) -> None:
    """Tell whoever collects lookups."""
    if _state.lookups is not None:
        at = len(_state.recorder.launches) if _state.recorder is not None else 0
        _state.lookups.append(Lookup(op, dtype, sizes, found, at))


def is_dry() -> bool:
    return _state.recorder is not None and _state.recorder.device is not None


class Kernel:
    """A kernel of `fastdl/kernels`, found at its first launch, with the binaries compiled for it so
    far.
    """

    def __init__(self, path: str) -> None:
        self.module, self.name = path.split(".")
        self.compiled: dict[Any, Any] = {}

    @functools.cached_property
    def fn(self) -> Any:
        module = importlib.import_module(f"..kernels.{self.module}", __package__)
        fn = getattr(module, self.name)
        if not INTERPRETED:
            _settle_key(fn)
        return fn


def _settle_key(fn: Any) -> None:
    """Compute the key of a kernel in Triton's disk cache, those of the functions that it calls
    first: it depends on which of them have one by then, and would miss in the next process.
    """
    function = getattr(fn, "fn", None)
    if function is None or getattr(fn, "hash", "") is not None:
        return
    names = function.__code__.co_names
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [value for value in used if isinstance(value, ModuleType)]
    used += [getattr(module, name, None) for module in modules for name in names]
    for value in used:
        if hasattr(type(value), "cache_key") and value is not fn:
            _settle_key(value)
    fn.cache_key  # noqa: B018 (it is computed and kept)


def launch(
    kernel: Kernel, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Launch over `grid`. `args` are the run-time arguments in order; blocks of `config` are
    constants too.
    """
    recorder = _state.recorder
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, args, constants, config))
        if recorder.device is not None:
            return
    if INTERPRETED:
        from ._interpreter import run

        run(kernel.fn[grid], *args, **constants, **config.blocks)
        return
    device = next(a.device.index for a in args if isinstance(a, Tensor))
    if device == torch.cuda.current_device():
        _run(kernel, grid, device, args, constants, config)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, device, args, constants, config)


def _run(
    kernel: Kernel, grid: tuple[int, ...], device: int, args: Any, constants: Any, config: Config
) -> None:
    # Triton's own launcher binds and specialises all arguments anew at each call; this key costs a
    # third of it.
    key = (
        device,
        config.num_warps,
        config.num_stages,
        *map(_specialisation, args),
        *constants.items(),
        *config.blocks.items(),
    )
    known = kernel.compiled.get(key)
    if known is None:
        named = {**constants, **config.blocks}
        binary = kernel.fn[grid](
            *args, **named, num_warps=config.num_warps, num_stages=config.num_stages
        )
        kernel.compiled[key] = binary, [named[name] for name in kernel.fn.arg_names[len(args) :]]
    else:
        binary, values = known
        binary[(*grid, 1, 1)[:3]](*args, *values)


def _specialisation(arg: Any) -> Any:
    """All that Triton compiles an argument for: its type, 16-byte alignment, being 1, needing 64
    bits.
    """
    kind = type(arg)
    if kind is int:
        return 1 if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31)
    if kind is float or arg is None:
        return kind
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return arg.base.dtype, tuple(arg.block_shape)  # a tensor descriptor
