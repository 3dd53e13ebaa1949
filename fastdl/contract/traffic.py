"""Bytes that kernels move, counted in Triton's interpreter over the lanes that no mask hides."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops import _launch
from ..ops._route import policy
from .case import Case, Maker, Spec
from .evaluate import LibraryCalls, cotangents, floats
from .registry import check

# Passes beside the one, such as partial sums, are small.
ALLOWED = 1.1

# A tensor this many times smaller than the largest of its launch stays in the cache.
SMALL = 8


class Traffic(ExitStack):
    """Counts inside of a with block."""

    def __init__(self) -> None:
        super().__init__()
        self._moved: Counter[tuple[int, int]] = Counter()  # by launch and memory

    def __enter__(self) -> "Traffic":
        from triton.runtime.interpreter import InterpreterBuilder

        super().__enter__()
        self._launches = self.enter_context(_launch.recording())
        self._calls = self.enter_context(LibraryCalls()).calls
        for name, mask in (("create_masked_load", 1), ("create_masked_store", 2)):
            access = self._counted(getattr(InterpreterBuilder, name), mask)
            self.enter_context(mock.patch.object(InterpreterBuilder, name, access))
        return self

    def _counted(self, access: Callable[..., Any], mask: int) -> Callable[..., Any]:
        def counted(builder: Any, pointers: Any, *args: Any) -> Any:
            lanes = args[mask - 1].data.reshape(-1)
            if lanes.any():
                home = self._owner(int(pointers.data.reshape(-1)[lanes.argmax()]))
                size = pointers.get_element_ty().primitive_bitwidth // 8
                self._moved[len(self._launches) - 1, home] += int(lanes.sum()) * size
            return access(builder, pointers, *args)

        return counted

    def _owner(self, address: int) -> int:
        """The start of the memory that holds the address, among the tensors of this launch."""
        memory = (t.untyped_storage() for t in _tensors(self._launches[-1].args))
        return next(m.data_ptr() for m in memory if 0 <= address - m.data_ptr() < m.nbytes())

    @property
    def moved(self) -> int:
        """Bytes; of a small tensor that many programs read, each byte once a launch."""
        total = 0
        for (launch, home), bytes in self._moved.items():
            sizes = {_home(t): _bytes(t) for t in _tensors(self._launches[launch].args)}
            small = SMALL * sizes[home] <= max(sizes.values())
            total += min(bytes, sizes[home]) if small else bytes
        return total

    @property
    def least(self) -> int:
        """Bytes of what the ops were given and gave, as far as kernels touched it, each once."""
        touched = {home for _, home in self._moved}
        tensors = {
            (t.data_ptr(), t.shape): t
            for call in self._calls
            for t in _tensors((call.args, call.result))
            if _home(t) in touched
        }
        return sum(map(_bytes, tensors.values()))


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _home(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def passes(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes moved over the least possible, forward and backward."""
    maker = Maker(dtype)
    with policy("fused", on_fallback="error"):
        call = case.make(maker)
        with Traffic() as forward:
            outputs = floats(call())
        sent = cotangents(maker, outputs)
        with Traffic() as backward:
            torch.autograd.backward(outputs, sent)
    return forward.moved / forward.least, backward.moved / backward.least


@check("one_pass", dtypes=(torch.bfloat16,))
def moved_once(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Forward and backward move each byte once, but for a tenth."""
    for what, ratio in zip(("forward", "backward"), passes(case, dtype), strict=True):
        assert ratio <= ALLOWED, f"{what} moves {ratio:.2f} times the bytes that it must"
