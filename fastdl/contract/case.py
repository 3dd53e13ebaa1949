"""What an op declares to be checked: cases, and how their tensors are made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Elements of NaN on either side of a guarded tensor: a block of a kernel that lacks its mask.
GUARD = 4096

# Tensors from this many values on are drawn where they are used.
LARGE = 1 << 20


class Guard:
    """A tensor between NaNs with bits of their own: a NaN that was read from one guard and written
    to another shows.
    """

    made = 0
    _INTEGERS: ClassVar = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def __init__(self, like: Tensor) -> None:
        Guard.made += 1
        nan = torch.full((1,), float("nan"), dtype=like.dtype, device=like.device)
        # the lowest of the bits that bfloat16 keeps of a NaN, then those above
        self._bits = nan.view(self._integers(like)) | 1 + Guard.made % 31 << self._shift(like.dtype)
        self.buffer = self._bits.repeat(like.numel() + 2 * GUARD).view(like.dtype)
        self.tensor = self.buffer.as_strided(like.shape, like.stride(), GUARD)

    def _integers(self, like: Tensor) -> torch.dtype:
        return self._INTEGERS[like.element_size()]

    @staticmethod
    def _shift(dtype: torch.dtype) -> int:
        return {torch.bfloat16: 0, torch.float16: 3, torch.float32: 16, torch.float64: 45}[dtype]

    def intact(self) -> bool:
        bits = self.buffer.view(self._integers(self.buffer))
        return bool((bits[:GUARD] == self._bits).all() and (bits[-GUARD:] == self._bits).all())


Layout = Literal["dense", "transposed", "sliced", "offset", "channels_last", "guarded", "far"]


class Maker:
    """Makes the tensors of a case. The same seed gives the same values in every dtype and layout, and
    all but large ones on every device.

    `rounded` is the dtype under test; the tensors hold its values in `dtype`, which is float64 for the truth.
    """

    def __init__(
        self,
        rounded: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        *,
        device: str = "cpu",
        layout: Layout = "dense",
        integers: bool = False,
        grad: bool = True,
        seed: int = 0,
    ) -> None:
        self.rounded, self.dtype, self.device = rounded, dtype or rounded, device
        self.layout, self.integers, self.grad = layout, integers, grad
        self.generator = torch.Generator().manual_seed(seed)
        self._large = (
            torch.Generator(device).manual_seed(seed) if device == "cuda" else self.generator
        )
        self.arranged: Callable[[Tensor], Tensor] = lambda leaf: leaf
        self.leaves: list[Tensor] = []
        self.guards: list[Guard] = []

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """A leaf tensor of scale * normal values + shift, or of small integers."""
        values = self.values(shape, scale, shift)
        leaf = self.arranged(self._laid_out(values)) if values.numel() else values
        self.leaves.append(leaf.detach().requires_grad_(self.grad))
        return self.leaves[-1]

    def values(self, shape: Sequence[int], scale: float = 1.0, shift: float = 0.0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = self._large if math.prod(shape) >= LARGE else self.generator
        where: Any = {"generator": generator, "device": generator.device}
        if self.integers:
            drawn = torch.randint(-1, 2, tuple(shape), **where).float()
        else:
            drawn = torch.randn(tuple(shape), **where) * scale + shift
        return drawn.to(self.rounded).to(self.dtype).to(self.device)

    def _laid_out(self, values: Tensor) -> Tensor:
        shape = values.shape
        if self.layout == "transposed" and values.dim() > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "sliced" and values.dim():
            wide = values.new_full((*shape[:-1], 2 * shape[-1] + 1), float("nan"))
            return wide[..., 1::2].copy_(values)
        if self.layout == "offset":
            return values.new_empty(values.numel() + 1)[1:].view(shape).copy_(values)
        if self.layout == "channels_last" and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if self.layout == "guarded":
            self.guards.append(Guard(values.contiguous()))
            return self.guards[-1].tensor.copy_(values)
        if self.layout == "far" and values.dim() > 1 and not self.leaves:
            # rows 2**31 elements apart; the memory between them is never touched
            apart = 2**31 // (shape[0] - 1) + 64
            buffer = values.new_empty(apart * (shape[0] - 1) + values[0].numel())
            strides = (apart, *values[0].contiguous().stride())
            return buffer.as_strided(shape, strides).copy_(values)
        return values


@dataclass(frozen=True)
class Case:
    """One call of an op. `make(t)` returns it as a partial; `guards` says which mistake it would show."""

    name: str
    guards: str
    make: "Callable[[Maker], partial[Any]]"
    # One of the few on which the slow checks run: compilation, export, transforms, checkpointing ...
    core: bool = False
    # Small integers in, exact integers out, forward and backward.
    exact: bool = False
    # Written with torch's options alone: its definition must compile back into one fused call.
    spelled: bool = False


@dataclass(frozen=True)
class BenchCase:
    """One row of the benchmark, with the bytes and flops that cannot be done without.

    `backward` times both passes; bytes and flops are of both, then.
    """

    name: str
    make: "Callable[[Maker], partial[Any]]"
    bytes: int
    flops: int
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False


@dataclass(frozen=True)
class BadCall:
    """A call that must fail like torch's, with a sentence that holds all of `says`."""

    name: str
    call: Callable[[], Any]
    like: Callable[[], Any]
    says: tuple[str, ...]


def bad_calls_of(op: str) -> Callable[..., BadCall]:
    """Makes calls of the op that must fail as those of torch's function of that name do."""

    def bad(name: str, *args: Any, says: tuple[str, ...], **options: Any) -> BadCall:
        def of(home: Any) -> Callable[[], Any]:
            # older torch lacks some functions
            return lambda: getattr(home, op)(*args, **options)

        return BadCall(name, of(FF), of(F), says)

    return bad


@dataclass(frozen=True)
class Spec:
    """All that is checked of one op."""

    name: str
    cases: Sequence[Case]
    # Library ops that must stand in compiled graphs, forward and backward.
    library_ops: tuple[str, str]
    empty: Sequence[Case] = ()
    bad_calls: Sequence[BadCall] = ()
    # (ours, torch's): the signature begins with torch's; more is keyword-only
    signatures: Sequence[tuple[Callable[..., Any], Callable[..., Any]]] = ()
    # (ours, torch's) modules in the same state, and an input or a tuple of them
    modules: Sequence[Callable[[], tuple[nn.Module, nn.Module, Any]]] = ()
    bench: Sequence[BenchCase] = ()
    # Kernels read every input of these once and write every output once: the bytes are counted.
    one_pass: Sequence[Case] = ()

    @property
    def core(self) -> list[Case]:
        return [case for case in self.cases if case.core]
