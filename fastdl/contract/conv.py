"""The contract of convolutions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from ..ops.conv_norm import BatchNorm
from .batchnorm import statistics
from .case import BadCall, BenchCase, Case, Maker, Spec

Shape = tuple[int, ...]


def call(
    x: Shape, weight: Shape, op: Callable[..., Tensor] = FF.conv2d, bias: bool = True,
    residual: Shape | None = None, last: int = 0, norm: bool | None = None, **options: Any,
) -> "Callable[[Maker], partial[Any]]":  # fmt: skip
    """`last`: the input, or input and weight, have their channels last; so have all results. With a
    batch norm, `norm` says whether it trains.
    """

    def make(t: Maker) -> "partial[Any]":
        taps = partial(t, scale=1 / math.sqrt(math.prod(weight[1:])))
        outs = weight[1] * options.get("groups", 1) if op is FF.conv_transpose2d else weight[0]
        given = (_drawn(t, x, last > 0), _drawn(taps, weight, last > 1), t(outs) if bias else None)
        after: dict[str, Any] = {}
        if residual is not None:
            after["residual"] = _drawn(t, residual, last > 0)
        if norm is not None:
            mean, var = (None, None) if norm else statistics(outs, t)
            after["norm"] = BatchNorm(mean, var, t(outs), t(outs), norm)
        return partial(op, *given, **options, **after)

    return make


def _drawn(t: Callable[..., Tensor], shape: Shape, last: bool) -> Tensor:
    if not last:
        return t(*shape)
    n, c, h, w = shape
    return t(n, h, w, c).permute(0, 3, 1, 2)


def prelu(t: Maker) -> "partial[Any]":
    module = nn.PReLU(device=t.device, dtype=t.dtype)
    made = call((2, 3, 5, 4), (4, 3, 2, 2), residual=(2, 4, 4, 3), activation=module)
    return made(t)


STRIDED: dict[str, Any] = {
    "groups": 2,
    "stride": (2, 1),
    "padding": (1, 2),
    "dilation": (2, 3),
}
UP: dict[str, Any] = {"op": FF.conv_transpose2d, "stride": 2, "output_padding": 1}

CASES = [
    Case("planes", "the bias of a channel, the end of its plane", call((2, 3, 9, 8), (11, 3, 3, 3), activation="relu"), exact=True, spelled=True),
    Case("residual", "a residual inside of the activation, and z with it", call((2, 3, 9, 8), (11, 3, 3, 3), residual=(2, 11, 7, 6), activation="gelu"), core=True, spelled=True),
    Case("channels last", "rows of channels", call((3, 5, 5, 8), (37, 5, 3, 3), last=1, residual=(3, 37, 3, 6), activation="gelu"), spelled=True),
    Case("residual alone", "a missing bias and activation", call((2, 3, 5, 4), (4, 3, 3, 3), bias=False, residual=(2, 4, 3, 2)), exact=True, spelled=True),
    Case("nothing after", "torch's own, and its gradients", call((2, 3, 5, 4), (4, 3, 3, 3), padding=(0, 1)), exact=True, spelled=True),
    Case("implicit", "groups, stride, padding, dilation, tails of all", call((2, 36, 7, 5), (20, 18, 2, 2), activation="relu", **STRIDED), core=True, exact=True),
    Case("implicit, channels last", "taps of gathered rows, many tiles", call((3, 16, 5, 7), (36, 16, 3, 2), last=1, padding=1, residual=(3, 36, 5, 8), activation="silu"), spelled=True),
    Case("pointwise", "a residual inside of the activation of a product", call((2, 24, 5, 7), (20, 24, 1, 1), last=1, residual=(2, 20, 5, 7), activation="gelu"), spelled=True),
    Case("pointwise, split", "slices of K, finished", call((1, 520, 1, 3), (20, 520, 1, 1), last=1, residual=(1, 20, 1, 3), activation="relu"), exact=True),
    Case("pointwise, strided", "a kernel of 1 that skips", call((2, 24, 5, 7), (20, 24, 1, 1), last=1, stride=2), exact=True),
    Case("depthwise", "taps of a channel", call((2, 11, 6, 7), (11, 1, 3, 2), padding=(1, 0), groups=11, activation="relu"), exact=True, spelled=True),
    Case("depthwise, channels last", "several channels out of one", call((2, 18, 7, 6), (36, 1, 3, 2), last=1, groups=18, stride=(2, 1), padding=(2, 1), dilation=(2, 1), residual=(2, 36, 4, 7), activation="silu")),
    Case("transposed", "sizes that grow", call((2, 6, 5, 4), (6, 3, 3, 3), groups=2, activation=("leaky_relu", 0.5), **UP), exact=True, spelled=True),
    Case("one dimension", "a line as a plane", call((2, 6, 11), (8, 6, 3), FF.conv1d, padding=2, activation="gelu"), spelled=True),
    Case("one dimension, same", "an even kernel, which pads one side more", call((2, 18, 11), (8, 18, 4), FF.conv1d, padding="same", activation="relu"), exact=True),
    Case("one dimension, depthwise", "channels of a line", call((2, 6, 41), (6, 1, 4), FF.conv1d, padding=3, groups=6), exact=True, spelled=True),
    Case("no batch", "an image alone", call((3, 9, 8), (6, 3, 3, 3), residual=(6, 7, 6), activation="relu"), exact=True),
    Case("broadcast residual", "a residual that torch would broadcast", call((2, 3, 5, 4), (4, 3, 3, 3), residual=(4, 1, 1), activation="gelu")),
    Case("norm", "given statistics before a residual", call((2, 3, 9, 8), (11, 3, 3, 3), norm=False, residual=(2, 11, 7, 6), activation="relu"), spelled=True),
    Case("norm, implicit", "given statistics without a bias", call((2, 36, 7, 5), (20, 18, 2, 2), bias=False, norm=False, activation="silu", **STRIDED), spelled=True),
    Case("norm, transposed", "given statistics of a group", call((2, 6, 5, 4), (6, 3, 3, 3), groups=2, norm=False, **UP), spelled=True),
    Case("norm, training", "statistics of a batch", call((3, 6, 11), (8, 6, 3), FF.conv1d, norm=True, activation="relu")),
    Case("module and residual", "a module that kernels do not know", prelu),
]  # fmt: skip

EMPTY = [
    Case("no images", "gradients of weights are zeros", call((0, 3, 5, 4), (4, 3, 3, 3), activation="gelu")),
]  # fmt: skip


def bad(
    name: str, says: tuple[str, ...], *shapes: Shape, op: str = "conv2d", **options: Any
) -> BadCall:
    def run(home: Any) -> Callable[[], Any]:
        return lambda: getattr(home, op)(*map(torch.ones, shapes), **options)

    return BadCall(name, run(FF), run(F), says)


X, W = (2, 4, 5, 5), (6, 4, 3, 3)
BAD_CALLS = [
    bad("channels", ("(2, 3, 5, 5)", "(6, 4, 3, 3)"), (2, 3, 5, 5), W),
    bad("groups", ("groups is 3",), X, W, groups=3),
    bad("bias", ("(5,)", "(6,)"), X, W, (5,)),
    bad("dimensions", ("(4, 5)", "(6, 4, 3, 3)"), (4, 5), W),
    bad("stride", ("stride is [0, 0]",), X, W, stride=0),
    bad("padding", ("padding is [-1, -1]",), X, W, padding=-1),
    bad("too small", ("(2, 4, 2, 2)", "must fit"), (2, 4, 2, 2), W),
    bad("same", ("'same'", "[2, 2]"), X, W, padding="same", stride=2),
    bad("word", ("'full'", "'same'"), X, W, padding="full"),
    bad("numbers", ("(1, 1, 1)", "2 numbers"), X, W, stride=(1, 1, 1)),
    bad("output padding", ("output_padding is [2, 2]",), X, (4, 6, 3, 3), op="conv_transpose2d", stride=2, output_padding=2),
]  # fmt: skip


def bench(
    name: str, x: Shape, weight: Shape, backward: bool = False, transposed: bool = False,
    residual: bool = False, norm: bool | None = None, **options: Any,
) -> BenchCase:  # fmt: skip
    """Bytes of 16-bit tensors, each once, and flops of the products."""
    stride, padding = options.get("stride", 1), options.get("padding", 0)
    outs = weight[1] if transposed else weight[0]
    sizes = zip(x[2:], weight[2:], strict=True)
    if transposed:
        shape = (x[0], outs, *((n - 1) * stride - 2 * padding + k for n, k in sizes))
        options["op"] = FF.conv_transpose2d
    else:
        shape = (x[0], outs, *((n + 2 * padding - k) // stride + 1 for n, k in sizes))
    n_x, n_w, n_y = map(math.prod, (x, weight, shape))
    flops = 2 * n_w * (n_x // x[1] if transposed else n_y // outs)
    bytes = 2 * (n_x + n_w + outs + n_y * (2 if residual else 1))
    if backward:
        # two products of the same size; x, dy, z and the weight read, dz written and read twice
        bytes, flops = bytes + 2 * (2 * n_x + 2 * n_w + 5 * n_y), 3 * flops
    words = [name, "x".join(map(str, x)), "k" + "x".join(map(str, weight[2:]))]
    words += ["norm"] * (norm is not None) + [str(options.get("activation") or "")]
    words += ["residual"] * residual
    words += ["last"] * bool(options.get("last")) + ["backward"] * backward
    make = call(x, weight, residual=shape if residual else None, norm=norm, **options)
    return BenchCase(" ".join(filter(None, words)), make, bytes, flops, backward=backward)


RELU: dict[str, Any] = {"activation": "relu"}
LAST: dict[str, Any] = {"last": 2}
X3, W3 = (64, 64, 56, 56), (64, 64, 3, 3)
BENCH = [
    bench("resnet", X3, W3, padding=1, **RELU, **LAST),
    bench("resnet", X3, W3, padding=1, **RELU),
    bench("resnet", X3, W3, padding=1, backward=True, **RELU, **LAST),
    bench("resnet", X3, W3, padding=1, backward=True, **RELU),
    bench("resnet", (64, 256, 14, 14), (256, 256, 3, 3), padding=1, **RELU, **LAST),
    bench("resnet", (64, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, **RELU, **LAST),
    bench("resnet", (64, 64, 56, 56), (256, 64, 1, 1), residual=True, **RELU, **LAST),
    bench("resnet", (64, 64, 56, 56), (256, 64, 1, 1), residual=True, **RELU),
    bench("resnet", X3, W3, padding=1, norm=False, **RELU, **LAST),
    bench("resnet", X3, W3, padding=1, norm=False, **RELU),
    bench("resnet", (64, 64, 56, 56), (256, 64, 1, 1), norm=False, residual=True, **RELU, **LAST),
    bench("mobilenet", (64, 96, 56, 56), (96, 1, 3, 3), padding=1, groups=96, norm=False, activation="relu6", **LAST),
    bench("convnext", (64, 96, 56, 56), (96, 1, 7, 7), padding=3, groups=96, **LAST),
    bench("convnext", (64, 384, 14, 14), (384, 1, 7, 7), padding=3, groups=384, **LAST),
    bench("convnext", (64, 96, 56, 56), (96, 1, 7, 7), padding=3, groups=96),
    bench("unet", (8, 320, 64, 64), (320, 320, 3, 3), padding=1, activation="silu", **LAST),
    bench("unet", (8, 320, 64, 64), (320, 320, 3, 3), padding=1, activation="silu"),
    bench("dcgan", (128, 512, 8, 8), (512, 256, 4, 4), transposed=True, stride=2, padding=1, **RELU, **LAST),
    bench("whisper", (8, 80, 3000), (512, 80, 3), op=FF.conv1d, padding=1, activation="gelu"),
]  # fmt: skip


def module(name: str, channels: int, x: Shape, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        return *(getattr(h, name)(channels, 6, 3, **options) for h in (fnn, nn)), torch.randn(x)

    return make


SPEC = Spec(
    "conv",
    CASES,
    ("conv", "conv_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[
        (FF.conv1d, lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None),
        (FF.conv2d, lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None),
        (FF.conv_transpose2d, lambda input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1: None),
    ],
    modules=[
        module("Conv2d", 4, (2, 4, 7, 6)),
        module("Conv2d", 4, (4, 7, 6), padding="same", bias=False),
        module("Conv2d", 4, (2, 4, 7, 6), padding=(1, 2), padding_mode="reflect", groups=2),
        module("Conv1d", 4, (2, 4, 7), dilation=2, padding=1, padding_mode="circular"),
        module("ConvTranspose2d", 4, (2, 4, 7, 6), stride=2, output_padding=1),
    ],
    bench=BENCH,
)  # fmt: skip
