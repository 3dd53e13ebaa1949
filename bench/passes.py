"""The passes of a case: its inputs, and a form run forward, backward, or both, on one of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor

from bench.machine import Host
from fastdl.contract import BenchCase, Maker
from fastdl.contract.evaluate import cotangents, floats, tensors

Form = Callable[..., Any]

MOST_SETS = 64


class Inputs:
    """Several sets of inputs of a case, so that none is in the cache when its turn comes."""

    def __init__(self, case: BenchCase, machine: Host) -> None:
        self.stream = machine.stream
        self._makers: list[Maker] = []
        self._calls: list[partial[Any]] = []
        self._add(case, machine.device)
        self.set_bytes = sum(leaf.nbytes for leaf in self._makers[0].leaves)
        wanted = math.ceil(machine.cold_bytes / self.set_bytes)
        for _ in range(min(wanted, MOST_SETS) - 1):
            self._add(case, machine.device)
        self.cold = len(self) * self.set_bytes >= machine.cold_bytes
        self._upstream: list[list[Tensor]] = []
        self._here: dict[Any, tuple[partial[Any], list[Tensor]]] = {}

    def _add(self, case: BenchCase, device: str) -> None:
        maker = Maker(case.dtype, device=device, grad=case.backward, seed=len(self))
        self._calls.append(case.make(maker))
        self._makers.append(maker)

    def __len__(self) -> int:
        return len(self._makers)

    @property
    def first(self) -> "partial[Any]":
        return self._calls[0]

    @property
    def shapes(self) -> list[str]:
        """Of the tensors of a call, in order."""
        return shapes_of((self.first.args, self.first.keywords))

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self)))

    def call(self, i: int) -> "tuple[partial[Any], list[Tensor]]":
        """A set of inputs, and those of them that have gradients: leaves of this stream's own.

        Autograd runs a node, that of a leaf or a view too, on the stream on which it was made, and
        a CUDA graph captures no other stream than its own.
        """
        key = self.stream(), i
        if key not in self._here:
            self._here[key] = as_leaves(self._calls[i])
        return self._here[key]

    def upstream(self, i: int) -> list[Tensor]:
        """Gradients to send back. Each comes in the layout of its output."""
        if not self._upstream:
            with torch.no_grad():
                outputs = floats(self.first())
            values = cotangents(self._makers[0], outputs)
            self._upstream = [
                [torch.empty_like(y).copy_(c) for c, y in zip(values, outputs, strict=True)]
                for _ in range(len(self))
            ]
        return self._upstream[i]


def shapes_of(values: Any) -> list[str]:
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors(values)]


def as_leaves(call: "partial[Any]") -> "tuple[partial[Any], list[Tensor]]":
    """The call on leaves in the same memory, and those that have gradients."""
    found: dict[int, Tensor] = {}

    def leaf(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        return found.setdefault(id(x), x.detach().requires_grad_())

    args, keywords = torch.utils._pytree.tree_map(leaf, (call.args, call.keywords))
    return partial(call.func, *args, **keywords), list(found.values())


class Pass:
    """One pass of a form, called with the number of a set of inputs."""

    def __init__(self, form: Form, inputs: Inputs) -> None:
        self.form, self.inputs = form, inputs

    def forget(self) -> None:
        """Let go of what was kept between calls."""


class Forward(Pass):
    def __call__(self, i: int) -> Any:
        call, _ = self.inputs.call(i)
        with torch.no_grad():
            return self.form(*call.args, **call.keywords)


class Both(Pass):
    """Forward, and the gradients of all inputs."""

    def __call__(self, i: int) -> Any:
        call, leaves = self.inputs.call(i)
        outputs = floats(self.form(*call.args, **call.keywords))
        return torch.autograd.grad(outputs, leaves, self.inputs.upstream(i))


class Backward(Pass):
    """The gradients alone. What forward left is kept, for each stream: see `Inputs.call`."""

    def __init__(self, form: Form, inputs: Inputs) -> None:
        super().__init__(form, inputs)
        self._kept: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}

    def __call__(self, i: int) -> Any:
        key = self.inputs.stream(), i
        if key not in self._kept:
            call, leaves = self.inputs.call(i)
            self._kept[key] = floats(self.form(*call.args, **call.keywords)), leaves
        upstream = self.inputs.upstream(i)
        return torch.autograd.grad(*self._kept[key], upstream, retain_graph=True)

    def forget(self) -> None:
        self._kept.clear()


PASSES: dict[str, type[Pass]] = {"forward": Forward, "both": Both, "backward": Backward}


def passes_of(case: BenchCase) -> tuple[str, ...]:
    """The first is the one whose bytes and flops are counted."""
    return ("both", "backward") if case.backward else ("forward",)
