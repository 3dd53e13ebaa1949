"""The contract of layer normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as FF, nn as fnn
from . import _rows
from .case import Case, Maker, Spec


def call(
    rows: tuple[int, ...], shape: tuple[int, ...], weight: bool = True, bias: bool = True,
    residual: bool = False, scale: tuple[int, ...] | None = None,
    shift: tuple[int, ...] | None = None, mean: float = 0.0, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*rows, *shape, shift=mean), dict(options)
        args = (t(*shape) if weight else None, t(*shape) if bias else None)
        if residual:
            given["residual"] = t(*rows, *shape)
        if scale is not None:
            given["scale"] = t(*scale)
        if shift is not None:
            given["shift"] = t(*shift)
        return partial(FF.layer_norm, x, shape, *args, **given)

    return make


CASES = [
    *_rows.cases(call),
    Case("no weight", "missing factors", call((9,), (32,), weight=False, bias=False), spelled=True),
    Case("no bias", "a missing bias", call((9,), (40,), bias=False), spelled=True),
    Case("no weight, bias", "a missing weight", call((9,), (40,), weight=False)),
    Case("one column", "variance 0, and eps", call((9,), (1,))),
    Case("wide by groups", "scales of rows beyond the registers", call((2, 3), (200,), scale=(2, 1, 200), shift=(2, 1, 200), residual=True), spelled=True),
    Case("modulated by batch", "groups of rows", call((4, 11), (40,), scale=(4, 1, 40), shift=(4, 1, 40)), core=True, spelled=True),
    Case("modulated by row", "one group a row", call((6, 5), (40,), scale=(6, 5, 40), shift=(40,)), spelled=True),
    Case("modulated by column", "one group in all, and a broadcast column", call((6,), (40,), scale=(1, 1), shift=(40,))),
    Case("scale alone", "a missing shift", call((6, 5), (40,), scale=(6, 1, 40))),
    Case("shift alone", "a missing scale", call((6, 5), (40,), weight=False, shift=(6, 1, 40))),
    Case("all", "everything at once", call((3, 5), (24,), residual=True, prenorm=True, scale=(3, 1, 24), shift=(3, 1, 24))),
    Case("mean far from 0", "cancellation in the variance", call((9,), (90,), mean=100.0)),
    Case("wide, mean far from 0", "cancellation when blocks are merged", call((3,), (400,), mean=100.0)),
]  # fmt: skip

bench = partial(_rows.bench, call)
SPEC = Spec(
    "layer_norm",
    CASES,
    ("layer_norm", "layer_norm_backward"),
    empty=_rows.empty(call),
    bad_calls=_rows.bad_calls("layer_norm"),
    signatures=[(FF.layer_norm, F.layer_norm)],
    modules=[
        lambda: (fnn.LayerNorm(8), nn.LayerNorm(8), torch.randn(4, 8)),
        lambda: (fnn.LayerNorm((2, 4), bias=False), nn.LayerNorm((2, 4), bias=False), torch.randn(3, 2, 4)),
        lambda: (fnn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, elementwise_affine=False), torch.randn(4, 8)),
    ],
    one_pass=_rows.one_pass(call),
    bench=[
        bench(65536, 256),
        bench(32768, 1024),
        bench(16384, 4096),
        bench(4096, 16384),
        bench(1024, 65536),
        bench(16384, 4096, residual=True),
        bench(16384, 1024, backward=True),
        bench(16384, 4096, backward=True),
    ],
)  # fmt: skip
