"""Every launch configuration of gathered convolutions on small integers, bit by bit against fp64.

The vendor's convolution, which a table may also name, is not ours to prove.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import fastdl
import fastdl.functional as FF
from bench.exact import (
    LARGEST,
    REPEATS,
    dense_enough,
    described,
    drawing,
    fp32_products,
    named,
    repeated,
)
from bench.machine import poisoned
from fastdl.tuned import Config, Device, forced
from fastdl.tuned.choose import configs


class Layer(NamedTuple):
    """A convolution. `norm`: with a batch norm of given statistics, whose scales are 1 and -1."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1
    norm: bool = False

    @property
    def options(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


# Whole tiles, tails everywhere, groups that are apart, a kernel of 1, many steps.
LAYERS = (
    Layer("even", (8, 64, 32, 32), (256, 64, 3, 3), padding=(1, 1)),
    Layer("tails", (3, 48, 13, 11), (80, 48, 3, 3), stride=2, padding=(1, 1), norm=True),
    Layer("groups", (2, 64, 9, 10), (96, 32, 3, 2), padding=(2, 1), dilation=2, groups=2),
    Layer("one", (4, 64, 15, 17), (72, 64, 1, 1), norm=True),
    Layer("deep", (1, 1024, 9, 8), (136, 1024, 3, 3), padding=(1, 1)),
)


class ExactConv(NamedTuple):
    """One configuration on one layer."""

    dtype: torch.dtype
    tf32: bool
    last: bool
    config: Config
    layer: Layer

    @property
    def op(self) -> str:
        return "conv" if self.last else "conv_nchw"

    @property
    def name(self) -> str:
        words = (named(self.dtype, self.tf32), self.op, self.layer.name, described(self.config))
        return " ".join(words)


def conv_cases(facts: Device, layers: Any = LAYERS) -> Iterator[ExactConv]:
    """float16 takes the same path as bfloat16; without TF32 nothing is gathered in float32."""
    kinds = ((torch.bfloat16, False, layers), (torch.float16, False, layers[1:2]))
    for dtype, tf32, of_kind in (*kinds, (torch.float32, True, layers)):
        for layer in of_kind:
            for last in (True, False):
                op = "conv" if last else "conv_nchw"
                for config in configs(op, dtype, (), facts):
                    if config.variant == "implicit":
                        yield ExactConv(dtype, tf32, last, config, layer)


def check_conv(case: ExactConv, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Compare with a convolution in fp64, bit by bit, so many times."""
    call, want = integers(case, device)
    outs, channels, *taps = case.layer.weight
    sizes = (want.numel() // outs, outs // case.layer.groups, channels, math.prod(taps))
    with (
        torch.no_grad(),
        fastdl.policy("fused", on_fallback="error"),
        forced(case.op, case.dtype, sizes, case.config),
        fp32_products(case.tf32),
        poisoned(),
    ):
        launch = fastdl.explain(call).launches[-1]
        if replace(launch.config, source=case.config.source) != case.config:
            return {"ok": False, "says": f"launched as {launch}"}
        return repeated(call, want, repeats)


def integers(case: ExactConv, device: str) -> tuple["partial[torch.Tensor]", torch.Tensor]:
    """A call on small integers, and relu(norm(conv(x) + b) + residual)."""
    layer = case.layer
    draw, keep = drawing(case.dtype, device), dense_enough(math.prod(layer.weight[1:]))
    x, w = draw(*layer.x, keep=keep), draw(*layer.weight, keep=keep)
    x = x.contiguous(memory_format=torch.channels_last) if case.last else x
    outs = layer.weight[0]
    b = draw(outs, low=-8, high=8)
    norm = None
    if layer.norm:
        mean, shift = draw(outs, low=-4, high=4), draw(outs, low=-4, high=4)
        norm = (mean, torch.ones_like(b), draw(outs, low=0) * 2 - 1, shift, False, 0.0, 0.0)
    z = F.conv2d(x.double(), w.double(), b.double(), **layer.options)
    residual = draw(*z.shape, low=-8, high=8)
    if norm is not None:
        mean, _, scale, shift = (t.double()[:, None, None] for t in norm[:4])
        z = (z - mean) * scale + shift
    want = torch.relu(z + residual.double())
    assert want.abs().max() <= LARGEST, "the inputs are too large to be exact"
    options = {**layer.options, "norm": norm, "activation": "relu", "residual": residual}
    return partial(FF.conv2d, x, w, b, **options), want.to(case.dtype)
