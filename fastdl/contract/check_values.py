"""Checks of values, gradients and memory. Each raises where the op is wrong."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops._route import policy
from .case import DTYPES, Case, Guard, Layout, Maker, Spec
from .evaluate import (
    FORWARD,
    GRADIENT,
    LibraryCalls,
    Run,
    accuracy,
    compare,
    cotangents,
    floats,
    run,
)
from .registry import check, same


@check("cases", dtypes=(torch.float32, torch.bfloat16), more=(torch.bfloat16,))
def memory(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Nothing beside the outputs is written, and all of them is."""
    maker = Maker(dtype, device=device, layout="guarded")
    with guarded_allocations() as guards:
        first = run(case, maker, "fused")
    untouched = Maker(dtype, device=device)
    case.make(untouched)
    same([x.detach() for x in maker.leaves], [x.detach() for x in untouched.leaves], "input")
    for guard in (*maker.guards, *guards):
        assert guard.intact(), "wrote past a tensor"
    for tensor in (*first.outputs, *first.gradients):
        assert not tensor.isnan().any(), "an element was not written, or read past its tensor"


@check("cases", slow="but core")
def repeatable(spec: Spec, case: Case, device: str) -> None:
    """The same call gives the same bits."""
    first, second = (run(case, Maker(device=device), "fused") for _ in range(2))
    same(second.outputs + second.gradients, first.outputs + first.gradients, "second run")


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[Guard]]:
    """New tensors of an op come filled with NaN, and with NaN before and after them."""
    guards: list[Guard] = []

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            if not plain.is_floating_point() or not plain.numel():
                return plain
            guards.append(Guard(plain))
            return guards[-1].tensor

        return wrapped

    with (
        mock.patch.object(torch, "empty_like", guarded(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty)),
    ):
        yield guards


@check("cases", dtypes=DTYPES, more=(torch.float16, torch.bfloat16))
def accurate(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients are as close to fp64 as the definition's are, within the rule."""
    for what, error in zip(("output", "gradient"), accuracy(case, dtype, device), strict=True):
        error.require(what)


@check("exact", dtypes=DTYPES)
def exact(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Small integers come out exactly, forward and backward: what indexing and masks do wrong, shows."""
    ours = run(case, Maker(dtype, device=device, integers=True), "fused")
    truth = run(case, Maker(dtype, torch.float64, device=device, integers=True), "definition")
    same([y.double() for y in ours.outputs], truth.outputs, "output")
    same([g.double() for g in ours.gradients], truth.gradients, "gradient")


def agrees(ours: Run, case: Case, device: str) -> None:
    """A float32 run that made its tensors differently is right by the rule of accuracy."""
    definition = run(case, Maker(device=device), "definition")
    truth = run(case, Maker(dtype=torch.float64, device=device), "definition")
    compare(ours.outputs, definition.outputs, truth.outputs, FORWARD).require("output")
    compare(ours.gradients, definition.gradients, truth.gradients, GRADIENT).require("gradient")


def _in_layout(layout: Layout, case: Case, device: str) -> None:
    maker = Maker(device=device, layout=layout)
    agrees(run(case, maker, "fused"), case, device)


@check("cases", slow="but core")
def transposed(spec: Spec, case: Case, device: str) -> None:
    """Inputs and parameters with their dimensions stored in another order."""
    _in_layout("transposed", case, device)


@check("cases", slow="but core")
def sliced(spec: Spec, case: Case, device: str) -> None:
    """Every second element of wider storage, the others NaN."""
    _in_layout("sliced", case, device)


@check("core")
def expanded(spec: Spec, case: Case, device: str) -> None:
    """One row standing for all of them, with a stride of 0."""

    def leaf(t: Tensor) -> Tensor:
        return t[:1].expand_as(t) if t.dim() > 1 else t

    def values(mode: Any, dtype: torch.dtype) -> list[Tensor]:
        maker = Maker(dtype=dtype, device=device, grad=False)
        maker.arranged = leaf
        return run(case, maker, mode).outputs

    error = compare(
        values("fused", torch.float32),
        values("definition", torch.float32),
        values("definition", torch.float64),
        FORWARD,
    )
    error.require("output")


@check("core")
def offset(spec: Spec, case: Case, device: str) -> None:
    """Data that does not start at a multiple of 16 bytes."""
    _in_layout("offset", case, device)


@check("core")
def channels_last(spec: Spec, case: Case, device: str) -> None:
    """Four dimensions with channels last; the output has the strides that torch's has."""
    _in_layout("channels_last", case, device)
    maker = Maker(device=device, layout="channels_last")
    ours = run(case, maker, "fused", backward=False)
    if not any(leaf.dim() == 4 for leaf in maker.leaves):
        return
    twin = Maker(device=device, layout="channels_last")
    torchs = run(case, twin, "definition", backward=False)
    assert [y.stride() for y in ours.outputs] == [y.stride() for y in torchs.outputs]


@check("core", slow=True)
def far_apart(spec: Spec, case: Case, device: str) -> None:
    """Rows of the input 2**31 elements apart: offsets need 64 bits."""
    _in_layout("far", case, device)


@check("cases", slow="but core")
def second_derivative(spec: Spec, case: Case, device: str) -> None:
    """Gradients of gradients are the definition's."""

    def differentiate(mode: Any, dtype: torch.dtype) -> list[Tensor]:
        maker = Maker(dtype=dtype, device=device)
        with policy(mode):
            torch.manual_seed(7)
            outputs = floats(case.make(maker)())
            backs = [c.requires_grad_() for c in cotangents(maker, outputs)]
            leaves = [*maker.leaves, *backs]
            found = torch.autograd.grad(
                outputs, maker.leaves, backs, create_graph=True, allow_unused=True
            )
            first = [g for g in found if g is not None and g.requires_grad]
            if not first:
                return []
            sent = cotangents(maker, first)
            return list(
                torch.autograd.grad(first, leaves, sent, allow_unused=True, materialize_grads=True)
            )

    ours, definition, truth = (
        differentiate(mode, dtype)
        for mode, dtype in (
            ("fused", torch.float32),
            ("definition", torch.float32),
            ("definition", torch.float64),
        )
    )
    compare(ours, definition, truth, GRADIENT).require("second derivative")


@check("core")
def needed(spec: Spec, case: Case, device: str) -> None:
    """Whichever inputs need gradients, these and no others get them, and values do not depend on it."""
    full = run(case, Maker(device=device), "fused")
    silent = run(case, Maker(device=device, grad=False), "fused")
    same(silent.outputs, [y.detach() for y in full.outputs], "without gradients")
    count = len(full.maker.leaves)
    alone = [[i == j for i in range(count)] for j in range(count)]
    others = [[not wanted for wanted in chosen] for chosen in alone if count > 2]
    for chosen in alone + others:
        maker = Maker(device=device)
        with policy("fused", on_fallback="error"):
            torch.manual_seed(7)
            call = case.make(maker)
            for leaf, wanted in zip(maker.leaves, chosen, strict=True):
                leaf.requires_grad_(wanted)
            outputs = floats(call())
            with LibraryCalls() as seen:
                torch.autograd.backward(outputs, cotangents(maker, outputs))
        for backward in seen.calls:
            computed = [t for t in pytree.tree_leaves(backward.result) if t is not None]
            assert len(computed) <= sum(chosen), "backward computes what nobody asks for"
        for leaf, wanted, expected in zip(maker.leaves, chosen, full.gradients, strict=True):
            assert (leaf.grad is not None) == wanted, f"gradients where {chosen} need one"
            if wanted:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)


@check("core")
def double(spec: Spec, case: Case, device: str) -> None:
    """float64 is for truth: it gives the definition's bits, and no kernel sees it."""
    truth = run(case, Maker(torch.float64, device=device), "definition")
    with LibraryCalls() as seen, policy("fused"):
        maker = Maker(torch.float64, device=device)
        torch.manual_seed(7)
        outputs = floats(case.make(maker)())
    assert not seen.calls, "a library op was given float64"
    if "dropout" not in case.name:  # torch's own dropout has another mask
        same(outputs, truth.outputs, "output")


@check("core")
def statistics(spec: Spec, case: Case, device: str) -> None:
    """What is kept for backward and is smaller than the output, means and the like, is float32."""
    with LibraryCalls() as seen:
        done = run(case, Maker(torch.bfloat16, device=device), "fused", backward=False)
    returned = {output.data_ptr() for output in done.outputs}
    for call in seen.calls:
        output, *kept = floats(call.result)
        for tensor in kept:
            if 0 < tensor.numel() < output.numel() and tensor.data_ptr() not in returned:
                assert tensor.dtype == torch.float32, f"{call.name} keeps {tensor.dtype}"


@check("empty")
def empty(spec: Spec, case: Case, device: str) -> None:
    """Sizes of 0 give what torch gives, and gradients too."""
    ours = run(case, Maker(device=device), "fused")
    torchs = run(case, Maker(device=device), "definition")
    for got, expected in zip(
        ours.outputs + ours.gradients, torchs.outputs + torchs.gradients, strict=True
    ):
        torch.testing.assert_close(got, expected, equal_nan=True)


@check("core")
def not_finite(spec: Spec, case: Case, device: str) -> None:
    """NaN and infinities come out where the definition, in fp64, lets them out."""
    for value in (float("nan"), float("inf"), float("-inf")):

        def values(mode: Any, dtype: torch.dtype, value: float = value) -> list[Tensor]:
            maker = Maker(dtype=dtype, device=device)
            call = case.make(maker)
            with torch.no_grad(), policy(mode, on_fallback="error"):
                maker.leaves[0].view(-1)[1] = value
                torch.manual_seed(7)
                return floats(call())

        for got, expected in zip(
            values("fused", torch.float32), values("definition", torch.float64), strict=True
        ):
            bad = (got.isnan() != expected.isnan()) | (got.isinf() != expected.isinf())
            assert not bad.any(), f"{int(bad.sum())} elements differ for {value}"


@check("core")
def strided_cotangents(spec: Spec, case: Case, device: str) -> None:
    """Gradients that arrive expanded, as from sum(), or with strides, are read right."""

    def gradients(send: Callable[[Tensor], Tensor]) -> list[Tensor]:
        maker = Maker(device=device)
        with policy("fused", on_fallback="error"):
            torch.manual_seed(7)
            outputs = floats(case.make(maker)())
            return list(torch.autograd.grad(outputs, maker.leaves, [send(y) for y in outputs]))

    ones = gradients(lambda y: torch.ones_like(y, memory_format=torch.contiguous_format))
    same(gradients(lambda y: y.new_ones(()).expand(y.shape)), ones, "expanded")
    same(gradients(lambda y: y.new_ones((*y.shape, 2))[..., 0]), ones, "strided")
