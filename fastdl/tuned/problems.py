"""What `fastdl.tune` measures: an op of some sizes, torch's and the truth; and which by default."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..ops import _tuned
from ..ops._route import policy

Call = Callable[[], Any]

# All larger numbers of rows of attention have one entry.
MANY = 128


class Asked(NamedTuple):
    """What an op asks the tables for. Sizes of one class have one key."""

    op: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def key(self) -> str:
        return _tuned.key_of(*self)


class Problem(NamedTuple):
    """One entry to be found. `torch` is what users write, and `truth` is in fp64. `replaceable`:
    the table can send the op to torch. `whole`: it computes all that torch's call does.
    """

    op: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    fused: Call
    torch: Call
    truth: Call
    replaceable: bool = True
    whole: bool = True

    @property
    def asked(self) -> Asked:
        return Asked(self.op, self.dtype, self.sizes)


def _linear(dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    M, N, K = sizes
    x, w = _normal(M, K, dtype=dtype, device=device), _normal(N, K, dtype=dtype, device=device)
    w, b = w / K**0.5, _normal(N, dtype=dtype, device=device)
    return Problem(
        "linear", dtype, sizes,
        lambda: FF.linear(x, w, b, activation="gelu"),
        lambda: F.gelu(F.linear(x, w, b)),
        lambda: F.gelu(F.linear(x.double(), w.double(), b.double())),
    )  # fmt: skip


def _conv(last: bool, dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Images of at most 32 by 32 where positions can be shared out so, and a kernel that is square
    if it can be. There are as many outputs as positions.
    """
    positions, outs, channels, taps = sizes
    height = _factor(positions, 32)
    width = _factor(positions // height, 32)
    side = math.isqrt(taps)
    kernel = (side, side) if side**2 == taps else (1, taps)
    padding = tuple((n - 1) // 2 for n in kernel)
    rows, columns = (
        n + k - 1 - 2 * p for n, k, p in zip((height, width), kernel, padding, strict=True)
    )
    image = (positions // (height * width), channels, rows, columns)
    x = _normal(*image, dtype=dtype, device=device)
    w = _normal(outs, channels, *kernel, dtype=dtype, device=device)
    w, b = w / (taps * channels) ** 0.5, _normal(outs, dtype=dtype, device=device)
    if last:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return Problem(
        "conv" if last else "conv_nchw", dtype, sizes,
        lambda: FF.conv2d(x, w, b, padding=padding, activation="relu"),
        lambda: F.relu(F.conv2d(x, w, b, padding=padding)),
        lambda: F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=padding)),
        replaceable=False,
    )  # fmt: skip


def _factor(n: int, most: int) -> int:
    """The largest factor of n that is no larger."""
    return next(f for f in range(min(n, most), 0, -1) if n % f == 0)


def _norm(
    op: str, factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    """A norm with so many factors: a weight, and a bias. Softmax has none."""
    x, *rest = _norm_inputs(factors, dtype, sizes, device)
    fused, torchs, over = getattr(FF, op), getattr(F, op), _over(op, sizes)
    return Problem(
        op, dtype, sizes,
        lambda: fused(x, over, *rest),
        lambda: torchs(x, over, *rest),
        lambda: torchs(x.double(), over, *(t.double() for t in rest)),
    )  # fmt: skip


def _norm_backward(
    op: str, factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    inputs = _norm_inputs(factors, dtype, sizes, device)
    dy = torch.randn_like(inputs[0])

    def gradients(home: Any, wide: bool = False) -> Call:
        leaves = [t.double() if wide else t for t in inputs]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad(), policy("fused" if home is FF else "auto"):
            y = getattr(home, op)(leaves[0], _over(op, sizes), *leaves[1:])
        return lambda: torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True)

    return Problem(
        f"{op}_backward", dtype, sizes,
        gradients(FF), gradients(F), gradients(F, wide=True),
        replaceable=False,
    )  # fmt: skip


def _over(op: str, sizes: tuple[int, ...]) -> Any:
    """How an op is told to go over rows of this size."""
    return -1 if op == "softmax" else sizes


def _norm_inputs(
    factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> list[Tensor]:
    (cols,) = sizes
    # beyond the L2 of any GPU, and a few rows even where they are few
    rows = max((1 << 26) // cols, 64) if device != "cpu" else 5
    shapes = ((rows, cols), *[(cols,)] * factors)
    return [_normal(*shape, dtype=dtype, device=device) for shape in shapes]


_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention


def _attention(dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Many rows: causal prompts. Few: one token of each of the heads that share long keys."""
    (rows, D), small = sizes, device == "cpu"
    if rows < MANY:
        B, kv, group, Sq, Sk = (1, 1, rows, 1, 64) if small else (4, 8, rows, 1, 8192)
    else:
        B, kv, group, Sq, Sk = (1, 1, 1, 65, 65) if small else (4, 16, 1, 2048, 2048)
    q, k, v = _heads(dtype, (B, kv * group, Sq, D), (B, kv, Sk, D), device)

    def call(attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return attention(*inputs, is_causal=Sq > 1, enable_gqa=group > 1)

    def truth() -> Tensor:
        return torch.cat(
            [call(_sdpa, *(x[b : b + 1].double() for x in (q, k, v))) for b in range(B)]
        )

    return Problem(
        "attention", dtype, (min(rows, MANY), D),
        lambda: call(FF.scaled_dot_product_attention, q, k, v), lambda: call(_sdpa, q, k, v), truth,
        replaceable=rows >= MANY,
    )  # fmt: skip


def _attention_backward(
    op: str, wanted: slice, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    """The gradients that one kernel computes, or all of them, as torch's kernels do."""
    (rows, D), small = sizes, device == "cpu"
    S = rows if rows < MANY else 65 if small else 2048
    B, H = (1, 1) if small else (4, 16)
    inputs = _heads(dtype, (B, H, S, D), (B, H, S, D), device)
    do = torch.randn_like(inputs[0])

    def gradients(attention: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> Call:
        leaves = [x.detach().requires_grad_() for x in inputs]

        @functools.cache  # not before it is forbidden to fall back
        def output() -> Tensor:
            with torch.enable_grad():
                return attention(*leaves, is_causal=True)

        return lambda: torch.autograd.grad(output(), leaves[wanted], do, retain_graph=True)

    def truth() -> list[Tensor]:
        wide = [[x[b : b + 1].double() for x in (*inputs, do)] for b in range(B)]
        found = [gradients(_sdpa, rest, do)() for *rest, do in wide]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    return Problem(
        op, dtype, (min(rows, MANY), D),
        gradients(FF.scaled_dot_product_attention, inputs, do), gradients(_sdpa, inputs, do), truth,
        replaceable=op == "attention_backward" and rows >= MANY, whole=op == "attention_backward",
    )  # fmt: skip


def _heads(
    dtype: torch.dtype, of_q: tuple[int, ...], of_k: tuple[int, ...], device: str
) -> list[Tensor]:
    return [_normal(*shape, dtype=dtype, device=device) for shape in (of_q, of_k, of_k)]


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _recurrent(op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Both passes of a layer with as many features as units, which one entry decides."""
    T, B, H = sizes
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[op]
    shapes = ((gates * H, H), (gates * H, H), (gates * H,), (gates * H,))
    inputs = [_normal(T, B, H, dtype=dtype, device=device)]
    inputs += [_normal(*shape, dtype=dtype, device=device) / H**0.5 for shape in shapes]
    dy = torch.randn_like(inputs[0])

    def torchs(x: Tensor, hx: None, weights: list[Tensor]) -> Any:
        zeros = x.new_zeros(1, B, H)
        states: Any = (zeros, zeros) if op == "lstm" else zeros
        call = getattr(torch._VF, "rnn_tanh" if op == "rnn" else op)
        return call(x, states, weights, True, 1, 0.0, True, False, False)

    def passes(layer: Callable[..., Any], wide: bool = False) -> Call:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]

        def call() -> Any:
            with torch.enable_grad():
                y = layer(leaves[0], None, leaves[1:])[0]
            return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

        return call

    return Problem(op, dtype, sizes, passes(getattr(FF, op)), passes(torchs), passes(torchs, True))


PROBLEMS: dict[str, Callable[[torch.dtype, tuple[int, ...], str], Problem]] = {
    "linear": _linear,
    "conv": functools.partial(_conv, True),
    "conv_nchw": functools.partial(_conv, False),
    "layer_norm": functools.partial(_norm, "layer_norm", 2),
    "layer_norm_backward": functools.partial(_norm_backward, "layer_norm", 2),
    "rms_norm": functools.partial(_norm, "rms_norm", 1),
    "rms_norm_backward": functools.partial(_norm_backward, "rms_norm", 1),
    "softmax": functools.partial(_norm, "softmax", 0),
    "softmax_backward": functools.partial(_norm_backward, "softmax", 0),
    "lstm": functools.partial(_recurrent, "lstm"),
    "gru": functools.partial(_recurrent, "gru"),
    "rnn": functools.partial(_recurrent, "rnn"),
    "attention": _attention,
    "attention_dq": functools.partial(_attention_backward, "attention_dq", slice(0, 1)),
    "attention_dkdv": functools.partial(_attention_backward, "attention_dkdv", slice(1, 3)),
    "attention_backward": functools.partial(_attention_backward, "attention_backward", slice(0, 3)),
}

# What one name stands for where an op has several kernels to tune.
PASSES = {
    "conv": ("conv", "conv_nchw"),
    "attention": ("attention", "attention_dq", "attention_dkdv", "attention_backward"),
}

# What is measured with the choices for others: they come first.
AFTER_OTHERS = frozenset({"attention_backward"})

# What is tuned if no shapes are given, with all that the benchmark times: projections of
# transformers, also of few rows, and of recurrent layers; widths of norms, of vocabularies; heads.
_PROJECTIONS = ((4096, 1024), (1024, 4096), (8192, 8192), (6144, 4096), (28672, 4096))
_PRODUCTS: list[tuple[int, ...]] = [
    *((m, *sizes) for m in (16, 8192) for sizes in _PROJECTIONS),
    (8192, 4096, 14336), (2048, 6144, 4096), (65536, 1024, 1024), (256, 512, 512),
    (200704, 256, 64), (16384, 512, 128), (16384, 2048, 512), (4096, 8192, 2048),
]  # fmt: skip
_WIDTHS: list[tuple[int, ...]] = [
    (n,) for n in (256, 1024, 2048, 4096, 8192, 16384, 128, 512, 65536)
]
_VOCABULARIES: list[tuple[int, ...]] = [(1 << n,) for n in (15, 17, 18)]
# Positions, channels out and in, taps: of residual networks, of diffusion, and of sound.
_LAYERS: list[tuple[int, ...]] = [
    (1 << 18, 64, 64, 9), (1 << 16, 128, 128, 9), (1 << 14, 256, 256, 9), (1 << 15, 320, 320, 9),
    (200704, 256, 64, 1), (802816, 64, 3, 49), (24000, 512, 80, 3),
]  # fmt: skip
# steps, rows, units
_SEQUENCES: list[tuple[int, ...]] = [
    *((256, B, H) for B in (16, 64, 256) for H in (128, 256, 512, 1024)),
    *((1024, B, 128) for B in (1, 16, 64)),
    (64, 256, 128), (256, 1, 512), (64, 64, 1024), (64, 256, 2048),
]  # fmt: skip
DEFAULTS: dict[str, list[tuple[int, ...]]] = {
    "linear": _PRODUCTS,
    "conv": _LAYERS,
    "conv_nchw": _LAYERS,
    "layer_norm": _WIDTHS,
    "layer_norm_backward": _WIDTHS,
    "rms_norm": _WIDTHS,
    "rms_norm_backward": _WIDTHS,
    "softmax": [*_WIDTHS, *_VOCABULARIES],
    "softmax_backward": [*_WIDTHS, *_VOCABULARIES],
    "lstm": _SEQUENCES,
    "gru": _SEQUENCES,
    "rnn": _SEQUENCES,
    "attention": [(1, 128), (4, 128), (8, 128), (MANY, 64), (MANY, 128)],
    "attention_dq": [(MANY, 64), (MANY, 128)],
    "attention_dkdv": [(MANY, 64), (MANY, 128)],
    "attention_backward": [(MANY, 64), (MANY, 128)],
}
