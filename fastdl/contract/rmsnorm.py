"""The contract of RMS normalization."""

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
    rows: tuple[int, ...], shape: tuple[int, ...], weight: bool = True, eps: float | None = 1e-6,
    residual: bool = False, mean: float = 0.0, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    def make(t: Maker) -> "partial[Any]":
        x, given = t(*rows, *shape, shift=mean), dict(options)
        factor = t(*shape) if weight else None
        if residual:
            given["residual"] = t(*rows, *shape)
        return partial(FF.rms_norm, x, shape, factor, eps, **given)

    return make


CASES = [
    *_rows.cases(call),
    Case("no weight", "a missing weight", call((9,), (32,), weight=False), spelled=True),
    Case("one column", "a row that is its own mean, and eps", call((9,), (1,), eps=0.1)),
    Case("heads", "four dimensions, of which the last is normalized", call((2, 5, 3), (16,)), spelled=True),
    Case("wide, all", "an offset and a residual of rows beyond the registers", call((5,), (200,), residual=True, prenorm=True, weight_offset=1.0)),
    Case("wide, no weight", "a missing weight of rows beyond the registers", call((3,), (200,), weight=False)),
    Case("wide, rounded", "the cast of rows beyond the registers", call((3,), (200,), cast="llama")),
    Case("gemma", "an offset that backward forgets", call((9,), (40,), weight_offset=1.0, cast="gemma")),
    Case("offset", "an offset other than 1", call((9,), (40,), weight_offset=-0.5, cast="torch")),
    Case("offset, no weight", "an offset of nothing", call((9,), (40,), weight=False, weight_offset=1.0)),
    Case("llama", "a cast before the weight", call((9,), (40,), cast="llama"), core=True),
    Case("all", "everything at once", call((3, 5), (24,), residual=True, prenorm=True, weight_offset=1.0, cast="llama")),
    Case("mean far from 0", "rows that are centered", call((9,), (90,), mean=100.0)),
    Case("wide, mean far from 0", "wide rows that are centered", call((3,), (400,), mean=100.0)),
    Case("eps of torch", "a missing eps", call((9,), (40,), eps=None), spelled=True),
]  # fmt: skip

bench = partial(_rows.bench, call)
SPEC = Spec(
    "rms_norm",
    CASES,
    ("rms_norm", "rms_norm_backward"),
    empty=_rows.empty(call),
    bad_calls=_rows.bad_calls("rms_norm"),
    signatures=[(FF.rms_norm, F.rms_norm)],
    modules=[
        lambda: (fnn.RMSNorm(8), nn.RMSNorm(8), torch.randn(4, 8)),
        lambda: (fnn.RMSNorm((2, 4), eps=0.1), nn.RMSNorm((2, 4), eps=0.1), torch.randn(3, 2, 4)),
        lambda: (fnn.RMSNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False), torch.randn(4, 8)),
    ],
    one_pass=_rows.one_pass(call),
    bench=[
        bench(262144, 128),
        bench(32768, 1024),
        bench(16384, 4096),
        bench(4096, 16384),
        bench(1024, 65536),
        bench(16384, 4096, cast="llama"),
        bench(16384, 4096, residual=True),
        bench(16384, 4096, residual=True, cast="llama"),
        bench(16384, 1024, backward=True),
        bench(16384, 4096, backward=True),
    ],
)  # fmt: skip
