"""How far a case is from fp64, by the rule of the contract."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdl
import fastdl.functional as FF
from fastdl.contract import BenchCase, Maker
from fastdl.contract.evaluate import (
    FORWARD,
    GRADIENT,
    Error,
    Run,
    compare,
    cotangents,
    floats,
    run,
)

# Which places of a tensor belong to a head: one for queries, one for keys, one for values.
Cuts = tuple[tuple[slice, ...], ...]


def error(case: BenchCase, device: str) -> Error:
    """Of the whole case, or of some heads where the definition would keep too much."""
    maker = Maker(case.dtype, device=device, grad=case.backward)
    call = case.make(maker)
    fused = run(replace(case, make=lambda t: call), maker, "fused", backward=case.backward)
    if call.func in (FF.scaled_dot_product_attention, FF.varlen_attn) and independent(call):
        return by_heads(case, call, fused)
    found = (
        run(case, Maker(case.dtype, dtype, device=device, grad=case.backward), "definition",
            backward=case.backward)
        for dtype in (case.dtype, torch.float64)
    )  # fmt: skip
    return judged(fused, *found)


def judged(fused: Run, definition: Run, truth: Run) -> Error:
    found = compare(fused.outputs, definition.outputs, truth.outputs, FORWARD)
    gradients = fused.gradients, definition.gradients, truth.gradients
    return found.worst(compare(*gradients, GRADIENT))


def independent(call: "partial[Any]") -> bool:
    """Whether heads are on their own: no other tensor has a part in several."""
    return not any(isinstance(x, Tensor) for x in call.keywords.values())


def by_heads(case: BenchCase, call: "partial[Any]", fused: Run) -> Error:
    found = Error()
    for cuts in some_heads(call):
        outputs = [o[cuts[0]] for o in fused.outputs]
        gradients = [g[cut] for g, cut in zip(fused.gradients, cuts, strict=False)]
        definitions = (defined(case, call, fused, cuts, d) for d in (case.dtype, torch.float64))
        found = found.worst(judged(Run(outputs, gradients, fused.maker), *definitions))
    return found


def some_heads(call: "partial[Any]") -> Iterator[Cuts]:
    """The first and the last key-value head, with the queries that share it."""
    (q, k), packed = call.args[:2], call.func is FF.varlen_attn
    kv, group = k.shape[1], q.shape[1] // k.shape[1]
    for b, h in {(0, 0), (0 if packed else k.shape[0] - 1, kv - 1)}:
        batch = slice(None) if packed else slice(b, b + 1)
        of_q, of_k = (batch, slice(h * group, (h + 1) * group)), (batch, slice(h, h + 1))
        yield of_q, of_k, of_k


def defined(
    case: BenchCase, call: "partial[Any]", fused: Run, cuts: Cuts, dtype: torch.dtype
) -> Run:
    """These heads by the definition, with the cotangents of the whole."""
    leaves = [x.detach()[cut].to(dtype) for x, cut in zip(call.args, cuts, strict=False)]
    leaves = [x.requires_grad_(case.backward) for x in leaves]
    with fastdl.policy("definition"):
        outputs = floats(call.func(*leaves, *call.args[len(cuts) :], **call.keywords))
        if not case.backward:
            return Run(outputs, [], fused.maker)
        upstream = [u[cuts[0]].to(dtype) for u in cotangents(fused.maker, fused.outputs)]
        return Run(outputs, [*torch.autograd.grad(outputs, leaves, upstream)], fused.maker)
