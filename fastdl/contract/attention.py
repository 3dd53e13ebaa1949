"""The contract of attention."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from .. import functional as FF, nn as fnn
from .case import BenchCase, Case, Maker, Spec, bad_calls_of

Make = Callable[[Maker], "partial[Any]"]


def some(t: Maker, *shape: int, share: float = 0.6) -> Tensor:
    """A mask in which about this share is True, the same for every dtype and device."""
    mixed = torch.arange(math.prod(shape)) * 7919 % 1009  # vmap forbids to draw
    return (mixed < 1009 * share).view(shape).to(t.device)


def call(
    B: int = 1, H: int = 2, Sq: int = 37, D: int = 16, *, kv: int | None = None,
    Sk: int | None = None, DV: int | None = None, mask: Sequence[int] | None = None,
    bias: Sequence[int] | None = None, sinks: bool = False, alibi: bool = False, **options: Any,
) -> Make:  # fmt: skip
    kv, Sk, DV = kv or H, Sk or Sq, DV or D

    def make(t: Maker) -> "partial[Any]":
        q, k, v = t(B, H, Sq, D), t(B, kv, Sk, D), t(B, kv, Sk, DV)
        given: dict[str, Any] = {"enable_gqa": True} if kv != H else {}
        if mask is not None:
            given["attn_mask"] = some(t, *mask)
        if bias is not None:
            given["attn_mask"] = t(*bias)
        if sinks:
            given["sinks"] = t(H)
        if alibi:
            given["alibi_slopes"] = torch.linspace(0.5, 0.1, H).to(t.device)
        return partial(FF.scaled_dot_product_attention, q, k, v, **given, **options)

    return make


def bent(fill: Callable[[Tensor], Tensor], *bias: int, **options: Any) -> Make:
    """With a bias that has no gradient, made by `fill` from what is True for some queries and keys."""
    inner = call(**options)

    def make(t: Maker) -> "partial[Any]":
        given = inner(t)
        return partial(given.func, *given.args, fill(some(t, *bias)), **given.keywords)

    return make


def blind(seen: Tensor) -> Tensor:
    """A mask in which every third query sees nothing."""
    seen = seen.clone()
    seen[..., ::3, :] = False
    return seen


def packed(
    lengths: Sequence[int], keys: Sequence[int] | None = None, *, H: int = 2, kv: int | None = None,
    D: int = 16, spare: int = 0, used: Sequence[int] | None = None, **options: Any,
) -> Make:  # fmt: skip
    keys, kv = keys or lengths, kv or H

    def make(t: Maker) -> "partial[Any]":
        q = t(sum(lengths) + spare, H, D)
        k, v = t(sum(keys) + spare, kv, D), t(sum(keys) + spare, kv, D)
        given: dict[str, Any] = {"enable_gqa": kv != H, **options}
        if used is not None:
            given["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=t.device)
        return partial(
            FF.varlen_attn,
            q,
            k,
            v,
            ends(t, lengths),
            ends(t, keys),
            max(lengths),
            max(keys),
            **given,
        )

    return make


def ends(t: Maker, lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(t.device)


CAUSAL: dict[str, Any] = {"is_causal": True}
MODELS = [
    Case("GPT-2", "the diagonal", call(B=3, **CAUSAL)),
    Case("Llama", "heads that share keys", call(B=3, H=4, kv=2, Sq=21, **CAUSAL)),
    Case("Gemma-2", "a window and softcap", call(H=4, kv=2, window_size=(11, 0), softcap=2.0, scale=0.3)),
    Case("T5 encoder", "a bias and its gradient over the batch", call(B=3, Sq=21, bias=(1, 2, 21, 21), scale=1.0)),
    Case("T5 decoder", "a bias under a causal mask", call(B=2, bias=(1, 2, 37, 37), scale=1.0, **CAUSAL)),
    Case("gpt-oss", "sinks, a window, shared keys", call(H=4, kv=2, sinks=True, window_size=(16, 0))),
    Case("BERT", "a mask of keys", call(B=3, Sq=21, mask=(3, 1, 1, 21))),
    Case("Swin", "a bias of each window", call(B=2, Sq=49, D=32, bias=(2, 2, 49, 49))),
    Case("Whisper", "few queries, many keys", call(Sq=5, Sk=61, scale=1.0), spelled=True),
    Case("ALiBi", "slopes", call(alibi=True, **CAUSAL)),
    Case("ViT", "a head of 72", call(Sq=18, D=72), spelled=True),
    Case("UNet", "a head of 40, and text", call(Sq=20, Sk=27, D=40), spelled=True),
    Case("MLA", "values narrower than keys", call(Sq=21, D=48, DV=20, **CAUSAL)),
    Case("decoding", "keys in splits", call(H=4, kv=1, Sq=1, Sk=100)),
    Case("several tokens", "splits of packed heads", call(H=4, kv=1, Sq=3, Sk=100, sinks=True)),
]  # fmt: skip

OPTIONS = [
    Case("plain", "the end of queries and keys", call(Sq=35, Sk=50), spelled=True),
    Case("more queries than keys", "top-left: the last ones see all", call(Sq=50, Sk=21, **CAUSAL)),
    Case("more keys than queries", "top-left: the last keys see nobody", call(Sq=21, Sk=50, **CAUSAL)),
    Case("window", "both edges", call(Sq=50, window_size=(5, 9))),
    Case("window ahead", "the left edge alone", call(Sq=50, Sk=70, window_size=(40, -1))),
    Case("window of itself", "one key each", call(Sq=21, window_size=(0, 0))),
    Case("mask", "a mask of each query", call(B=3, Sq=21, mask=(1, 1, 21, 21))),
    Case("mask of heads", "a mask that every query shares", call(Sq=21, mask=(1, 2, 1, 21))),
    Case("blind queries", "rows that see nothing are 0", bent(blind, 1, 2, 21, 21, Sq=21)),
    Case("blind bias", "rows of -inf are 0", bent(lambda m: torch.where(blind(m), 0.0, -torch.inf), 1, 2, 21, 21, Sq=21)),
    Case("lowest bias", "rows of finfo.min are averages", bent(lambda m: torch.where(blind(m), 0.0, torch.finfo(torch.float32).min), 1, 1, 21, 21, Sq=21)),
    Case("bias of a batch", "a gradient summed over heads", call(B=2, Sq=21, bias=(2, 1, 21, 21))),
    Case("bias of keys", "a gradient summed over all else", call(B=2, H=4, kv=2, Sq=21, bias=(1, 1, 1, 21))),
    Case("bias of keys by head", "summed over batch and queries", call(B=3, Sq=21, bias=(1, 2, 1, 21), softcap=1.5)),
    Case("bias of queries", "a key that stands for all", call(Sq=21, bias=(1, 2, 21, 1), sinks=True)),
    Case("one key", "a size of 1", call(Sq=5, Sk=1, D=24)),
    Case("one column", "a head of 1", call(Sq=18, D=1)),
    Case("no scale", "a scale of 0 is uniform", call(Sq=18, scale=0.0)),
    Case("negative scale", "the smallest product is the largest logit", call(Sq=18, scale=-0.5)),
    Case("lse", "its gradient", call(Sq=21, return_lse=True)),
    Case("three dimensions", "no batch", lambda t: partial(FF.scaled_dot_product_attention, t(2, 21, 16), t(2, 30, 16), t(2, 30, 16))),
    Case("dropout", "the mask in backward, under checkpointing", call(B=3, Sq=21, dropout_p=0.3), core=True),
    Case("dropout of shared keys", "the mask of each head", call(H=4, kv=2, Sq=21, bias=(1, 4, 1, 21), dropout_p=0.2, **CAUSAL)),
    Case("all", "everything at once", call(B=3, H=4, kv=2, Sq=21, Sk=37, D=24, DV=16, bias=(1, 4, 21, 37), sinks=True, alibi=True, softcap=2.0, window_size=(30, 3), return_lse=True), core=True),
    Case("32 keys", "exact sums over blocks", call(Sq=40, Sk=32, scale=0.0), exact=True),
]  # fmt: skip

PACKED = [
    Case("packed", "sequences apart from each other", packed([5, 30, 1, 17], kv=1, window_size=(-1, 0)), core=True),
    Case("packed, empty ones", "no queries, no keys, and rows of nobody", packed([5, 0, 18, 9], [7, 6, 0, 20], spare=3, return_lse=True)),
    Case("packed, causal", "bottom-right: the last query sees all", packed([5, 20, 9], [20, 9, 9], window_size=(-1, 0))),
    Case("packed, window", "edges counted from the end", packed([18, 4, 40], [30, 33, 20], kv=1, window_size=(6, 2), softcap=2.0)),
    Case("packed, partly used", "keys beyond their number", packed([5, 4], [20, 33], used=[17, 9], window_size=(-1, 0))),
    Case("packed, splits", "merging sequences", packed([1, 1, 1], [70, 0, 33], H=4, kv=1, num_splits=3)),
]  # fmt: skip

EMPTY = [
    Case("no queries", "an empty result", call(Sq=0, Sk=5)),
    Case("no batch", "no heads to launch", call(B=0)),
    Case("no keys", "zeros", lambda t: partial(FF.scaled_dot_product_attention, t(1, 2, 5, 8), t(1, 2, 0, 8), t(1, 2, 0, 8))),
]  # fmt: skip


bad = bad_calls_of("scaled_dot_product_attention")
X = torch.ones(2, 4, 6, 8)
BAD_CALLS = [
    bad("columns", X, X[..., :7], X, says=("(2, 4, 6, 8)", "(2, 4, 6, 7)")),
    bad("heads", X, X[:, :3], X[:, :3], says=("(2, 3, 6, 8)", "enable_gqa")),
    bad("dtypes", X, X.double(), X, says=("float32", "float64")),
    bad("dimensions", X[0, 0, 0], X[0, 0, 0], X[0, 0, 0], says=("(8,)",)),
    bad("mask", X, X, X, torch.ones(5, 6, dtype=torch.bool), says=("(5, 6)",)),
    bad("type of mask", X, X, X, torch.ones(6, 6, dtype=torch.int32), says=("int32", "bool")),
]  # fmt: skip


def bench(
    name: str, B: int, H: int, S: int, D: int, *, kv: int | None = None, Sq: int | None = None,
    seen: float = 1.0, backward: bool = False, dtype: torch.dtype = torch.bfloat16, **options: Any,
) -> BenchCase:  # fmt: skip
    """`seen` is the share of the pairs of queries and keys that the mask leaves."""
    Sq, kv = Sq or S, kv or H
    moved = dtype.itemsize * B * D * (2 * H * Sq + 2 * kv * S)
    if "bias" in options:
        moved += dtype.itemsize * torch.Size(options["bias"]).numel()
    make = call(B, H, Sq, D, kv=kv, Sk=S, **options)
    flops = int(4 * B * H * Sq * S * D * seen)
    if backward:
        # five products after two; q, k, v, o and do are read, dq, dk and dv written
        moved, flops = 3 * moved, flops * 7 // 2
    label = f"{name} {B}x{H}x{S}x{D}{' backward' if backward else ''}"
    return BenchCase(label, make, moved, flops, dtype, backward)


def bench_packed(H: int, S: int, D: int, parts: Sequence[int]) -> BenchCase:
    """Causal sequences of these parts of S, packed."""
    lengths = [S * part // sum(parts) for part in parts]
    flops = sum(2 * H * n * n * D for n in lengths)
    make = packed(lengths, H=H, D=D, window_size=(-1, 0))
    return BenchCase(f"packed {H}x{S}x{D}", make, 8 * H * S * D, flops)


BENCH = [
    *(bench("full", 16384 // S, 16, S, 128) for S in (512, 2048, 8192)),
    *(bench("causal", 16384 // S, 16, S, 128, seen=0.5, **CAUSAL) for S in (512, 2048, 8192, 16384)),
    *(bench("causal", 16384 // S, 32, S, 64, seen=0.5, **CAUSAL) for S in (2048, 8192)),
    bench("causal", 4, 16, 4096, 128, seen=0.5, backward=True, **CAUSAL),
    bench("causal", 4, 32, 4096, 64, seen=0.5, backward=True, **CAUSAL),
    bench("full", 4, 16, 4096, 128, backward=True),
    bench("shared keys", 4, 32, 4096, 128, kv=8, seen=0.5, **CAUSAL),
    bench("shared keys", 4, 32, 4096, 128, kv=8, seen=0.5, backward=True, **CAUSAL),
    bench("window", 2, 16, 8192, 128, seen=0.121, window_size=(1023, 0)),
    bench("softcap", 4, 16, 4096, 128, seen=0.5, softcap=50.0, **CAUSAL),
    bench("bias", 8, 16, 1024, 64, bias=(1, 16, 1024, 1024)),
    bench("bias", 8, 16, 1024, 64, bias=(1, 16, 1024, 1024), backward=True),
    bench("mask of keys", 16, 12, 512, 64, mask=(16, 1, 1, 512)),
    bench("head of 72", 16, 16, 1024, 72),
    bench_packed(16, 16384, 128, (1, 2, 3, 4, 6)),
    bench("decoding", 64, 32, 8192, 128, kv=8, Sq=1),
    bench("decoding", 1, 32, 131072, 128, kv=8, Sq=1),
]  # fmt: skip

SPEC = Spec(
    "attention",
    [*MODELS, *OPTIONS, *PACKED],
    ("attention", "attention_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[
        (FF.varlen_attn, varlen_attn),
        (FF.multi_head_attention_forward, F.multi_head_attention_forward),
    ],
    modules=[
        lambda: (
            fnn.TransformerEncoderLayer(8, 2, 16),
            nn.TransformerEncoderLayer(8, 2, 16),
            torch.randn(4, 3, 8),
        ),
    ],
    bench=BENCH,
)
