"""Attention: softmax(logits) v, with everything that people put into the logits."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_flash
from ._op import (
    LibraryOp,
    Op,
    autocast_to_lower,
    copied,
    differentiating,
    gradients,
    second_derivative,
)
from ._rng import draw_seed, dropout
from ._route import Reason
from ._toolchain import register_a_is_safe
from .attention_launch import LN2, NEVER, Given, Gradients, backward, forward, like, like_backward

TENSORS = Given._fields.index("max_q")


def definition(*args: Any) -> Any:
    """softmax(logits) v, with `return_lse` (the last argument) the logsumexp of the logits too.

    logits = softcap tanh(q kᵀ scale / softcap) + bias - slope |i - j|, -inf where hidden. A sink
    is one more, without a value.
    """
    a, return_lse = _out_of_pages(Given(*args[:-1])), args[-1]
    wide, group = torch.promote_types(a.q.dtype, torch.float32), a.q.shape[1] // a.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (a.k, a.v))
    seen = _seen(a)
    if seen is not None:
        matters = seen.any(-2)[..., None]  # what nobody sees may hold NaN
        k, v = torch.where(matters, k, 0.0), torch.where(matters, v, 0.0)
    s = (a.q @ k.transpose(-2, -1)).to(wide) * a.scale
    if a.softcap:
        s = a.softcap * torch.tanh(s / a.softcap)
    if a.mask is not None and a.mask.dtype != torch.bool:
        s = s + a.mask
    if a.slopes is not None:
        s = s + _alibi(a.slopes, *_positions(a))
    if seen is not None:
        s = s.masked_fill(~seen, NEVER)
    if a.sinks is not None:
        s = torch.cat([a.sinks[:, None, None].to(wide).expand(*s.shape[:-1], 1), s], -1)
    shares = _softmax(s) if seen is not None or a.mask is not None else torch.softmax(s, -1)
    shares = shares if a.sinks is None else shares[..., 1:]
    o = dropout(shares, a.seed, a.p, math.prod(shares.shape[:-1])).to(v.dtype) @ v
    return (o, torch.logsumexp(s, -1)) if return_lse else o


def _softmax(s: Tensor) -> Tensor:
    """Zeros where all logits are -inf."""
    blind = (s == NEVER).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def _places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, as a column, and of keys, in their tensors."""
    i, j = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    return i[:, None], j


def _positions(a: Given) -> tuple[Tensor, Tensor]:
    """Places counted from the beginning of a sequence. Packed sequences end together."""
    i, j = _places(a.q, a.k)
    if a.cu_q is None or a.cu_k is None:
        return i, j
    of_i, of_j = _sequence_of(a.cu_q, i), _sequence_of(a.cu_k, j)
    shift = _lengths(a.cu_k, a.used_k) - _lengths(a.cu_q)
    return i - a.cu_q[of_i] + shift[of_i], j - a.cu_k[of_j]


def _seen(a: Given) -> Tensor | None:
    """Whether a query sees a key, [batch, head, query, key] or what broadcasts to it; None: all."""
    limits = [a.mask] if a.mask is not None and a.mask.dtype == torch.bool else []
    if a.cu_q is not None or a.left >= 0 or a.right >= 0:
        i, j = _positions(a)
        limits += [j >= i - a.left] if a.left >= 0 else []
        limits += [j <= i + a.right] if a.right >= 0 else []
        if a.cu_q is not None and a.cu_k is not None:
            of_i, of_j = map(_sequence_of, (a.cu_q, a.cu_k), _places(a.q, a.k))
            # beyond the last sequence there are none
            limits.append((of_i == of_j) & (j < _lengths(a.cu_k, a.used_k)[of_j]))
    return functools.reduce(torch.logical_and, limits) if limits else None


def _alibi(slopes: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What ALiBi adds to logits."""
    return -slopes[:, None, None] * (i - j).abs()


def _sequence_of(cu: Tensor, place: Tensor) -> Tensor:
    """Which sequence a place in a packed tensor belongs to; past the last one, their number."""
    return torch.searchsorted(cu[1:], place.to(cu.dtype), right=True)


def _lengths(cu: Tensor, used: Tensor | None = None) -> Tensor:
    """Of all sequences, and 0 for what belongs to none."""
    lengths = cu.diff()
    lengths = lengths if used is None else torch.minimum(lengths, used.to(lengths.dtype))
    return F.pad(lengths, (0, 1))


def _out_of_pages(a: Given) -> Given:
    """Pages gathered into a packed tensor in which all sequences have room for as many keys."""
    if a.table is None:
        return a
    table = a.table.clamp(0, a.k.shape[0] - 1).long()
    k, v = (x[table].permute(2, 0, 1, 3, 4).flatten(1, 3)[None] for x in (a.k, a.v))
    room = table.shape[1] * a.k.shape[2]
    cu_k = torch.arange(table.shape[0] + 1, device=table.device, dtype=torch.int32) * room
    return a._replace(k=k, v=v, cu_k=cu_k, table=None)


def vendor(*args: Any) -> Any:
    """torch's call, for what it has."""
    a, return_lse = Given(*args[:-1]), args[-1]
    causal = (a.left, a.right) == (-1, 0)
    limited = not causal and (a.left >= 0 or a.right >= 0)
    more = (a.slopes, a.sinks, a.seed, a.cu_q)
    if return_lse or limited or a.softcap or any(t is not None for t in more):
        return None
    mask = a.mask
    if causal and mask is not None:
        seen = _seen(a)
        assert seen is not None
        mask, causal = seen if mask.dtype == torch.bool else mask.masked_fill(~seen, NEVER), False
    return F.scaled_dot_product_attention(
        a.q, a.k, a.v, mask, is_causal=causal, scale=a.scale,
        enable_gqa=a.q.shape[1] != a.k.shape[1],
    )  # fmt: skip


def _torch_forward(*args: Any) -> tuple[Tensor, Tensor]:
    if attention_flash.serves(Given(*args)):
        return attention_flash.forward(Given(*args))
    o, lse = like(*args)
    result, natural = definition(*args, True)
    return o.copy_(result), lse.copy_(natural / LN2)


def _decline(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Reason | None:
    if k.numel() == 0 or v.numel() == 0:
        return Reason.EMPTY
    return Reason.SIZE if max(q.shape[3], v.shape[3]) > 512 else None


def _decline_forward(*args: Any) -> Reason | None:
    faster = attention_flash.is_faster("forward", Given(*args))
    return Reason.MEASURED if faster else _decline(*args)


def _decline_backward(do: Tensor, dlse: Any, o: Tensor, lse: Tensor, *rest: Any) -> Reason | None:
    *args, _ = rest
    faster = dlse is None and attention_flash.is_faster("backward", Given(*args))
    return Reason.MEASURED if faster else _decline(*args)


def _torch_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *rest: Any
) -> Gradients:
    *args, needs = rest
    if dlse is None and attention_flash.serves(Given(*args)):
        return attention_flash.backward(do, o, lse, Given(*args), needs)
    made = like_backward(do, dlse, o, lse, *rest)
    wanted = _wanted(needs)
    upstream = do if dlse is None else (do, dlse)
    found = gradients(definition, (*args, dlse is not None), upstream, wanted)
    return copied(made, (found[i] for i in DIFFERENTIABLE))


# q, k, v, the mask where it is a bias, and the sinks.
DIFFERENTIABLE = tuple(map(Given._fields.index, ("q", "k", "v", "mask", "sinks")))


def _wanted(needs: Any) -> list[bool]:
    """`needs` of those that are differentiable, among all arguments of the definition."""
    by_place = dict(zip(DIFFERENTIABLE, needs, strict=True))
    return [by_place.get(i, False) for i in range(len(Given._fields) + 1)]


FORWARD = LibraryOp(
    "attention", forward, like=like, torch_form=_torch_forward, decline=_decline_forward
)
BACKWARD = LibraryOp(
    "attention_backward",
    backward,
    like=like_backward,
    torch_form=_torch_backward,
    decline=_decline_backward,
)

# The definition keeps all probabilities; more than this of them is a mistake.
LARGEST_DEFINITION = 1 << 33


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *given, return_lse = args
        o, lse = FORWARD.overload(*given)
        ctx.save_for_backward(*given[:TENSORS], o, lse)
        ctx.options, ctx.return_lse = tuple(given[TENSORS:]), return_lse
        ctx.set_materialize_grads(False)
        return (o, lse * LN2) if return_lse else o

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None = None) -> Any:
        *tensors, o, lse = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        if do is None:
            do = torch.zeros_like(o)
        if differentiating():
            _require_small(Given(*args))
            both = (*args, dlse is not None)
            upstream = do if dlse is None else (do, dlse)
            return tuple(second_derivative("attention", definition, both, upstream, _wanted(needs)))
        found = BACKWARD.overload(do, dlse, o, lse, *args, needs)
        by_place = dict(zip(DIFFERENTIABLE, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(args) + 1))


def _require_small(a: Given) -> None:
    count = a.q.shape[:3].numel() * a.k.shape[2]
    if count > LARGEST_DEFINITION:
        raise RuntimeError(
            f"attention: the second derivative needs all {count} probabilities at once,"
            f" {count * 4 / 2**30:.0f} GiB each time they are kept; differentiate shorter sequences"
        )


def _inference(*args: Any) -> Any:
    *given, return_lse = args
    o, lse = FORWARD.overload(*given)
    return (o, lse * LN2) if return_lse else o


def _unsafe(*args: Any) -> Reason | None:
    """Kernels keep probabilities in registers and multiply them by values."""
    return None if register_a_is_safe(args[0].device) else Reason.TOOLCHAIN


OP = Op("attention", definition, AttentionFunction, _inference, vendor, _unsafe)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(query @ key.T * scale + mask) @ value for [..., heads, position, column].

    Causal masks and windows count positions of queries and keys from the first (top-left). In this
    order: softcap * tanh(logits / softcap), + a float `attn_mask`, - alibi_slopes[head] * |i - j|,
    -inf where `attn_mask` is False or i is beyond window_size = (left, right) of j (-1: no limit).
    A sink per head is one more logit without a value. A query that sees nothing gets 0. With
    `return_lse` also the natural logsumexp of the logits, in float32.
    """
    _check(query, key, value, attn_mask, dropout_p, enable_gqa, window_size, alibi_slopes, sinks)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    q, k, v = _four_dimensions(query, key, value)
    mask = _mask_for(attn_mask, query, q, k)
    left, right = window_size
    right = 0 if is_causal else right
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        mask, alibi_slopes = _with_alibi(mask, alibi_slopes, q, k), None
    seed = draw_seed(q.device) if dropout_p > 0 else None
    out = OP(
        q, k, v, mask, alibi_slopes, sinks, seed, None, None, None, None, 0, 0, left, right,
        q.shape[-1] ** -0.5 if scale is None else float(scale), float(softcap), dropout_p, 0,
        return_lse,
    )  # fmt: skip
    if query.dim() == 4 == max(key.dim(), value.dim()):
        return out
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    lead = (*lead, q.shape[1]) if max(query.dim(), key.dim(), value.dim()) > 2 else lead
    if not return_lse:
        return out.reshape(*lead, *out.shape[-2:])
    o, lse = out
    return o.reshape(*lead, *o.shape[-2:]), lse.reshape(*lead, lse.shape[-1])


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Attention of sequences packed one after another: query [places, heads, column].

    Sequence n has the places cu_seq_q[n] to cu_seq_q[n + 1], of its keys seqused_k[n] count. With a
    `block_table` [sequences, pages], key and value are pages [page, place, head, column]. The last
    query stands at the last key (bottom-right): window_size=(-1, 0) is causal. `return_lse`, or
    return_aux.lse, adds the logsumexp [heads, places]. One split gives a sequence the same bits in
    every batch.
    """
    paged = block_table is not None
    _check_varlen(query, key, value, cu_seq_q, cu_seq_k, enable_gqa, seqused_k, block_table)
    _check_window("varlen_attn", window_size)
    query, key, value = autocast_to_lower(query, key, value)
    k, v = (x.transpose(1, 2) if paged else x.transpose(0, 1)[None] for x in (key, value))
    out = OP(
        query.transpose(0, 1)[None], k, v, None, None, None, None,
        cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, *window_size,
        query.shape[-1] ** -0.5 if scale is None else float(scale), float(softcap), 0.0,
        num_splits or 0, True,
    )  # fmt: skip
    o, lse = out[0][0].transpose(0, 1), out[1][0]
    return (o, lse) if return_lse or (return_aux is not None and return_aux.lse) else o


def _autocast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    if mask is None or mask.dtype == torch.bool:
        return (*autocast_to_lower(q, k, v), mask)
    return autocast_to_lower(q, k, v, mask)


def _four_dimensions(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """[batch, head, position, column], of one batch and, but for queries, one number of heads."""
    dims = max(q.dim(), k.dim(), v.dim(), 4)
    q, k, v = (x[(None,) * (dims - x.dim())] if x.dim() < dims else x for x in (q, k, v))
    heads = max(k.shape[-3], v.shape[-3])
    k, v = (x.repeat_interleave(heads // x.shape[-3], -3) if x.shape[-3] != heads else x
            for x in (k, v))  # fmt: skip
    if q.shape[-3] < heads:
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
    if dims == 4 and q.shape[0] == k.shape[0] == v.shape[0]:
        return q, k, v
    batches = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    return tuple(x.expand(*batches, *x.shape[-3:]).flatten(0, -4) for x in (q, k, v))


def _mask_for(mask: Tensor | None, query: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as [1 or batch, 1 or head, 1 or query, key]."""
    if mask is None:
        return None
    if mask.dim() > 4 or (mask.dim() == 4 and query.dim() > 4):
        mask = mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask if mask.shape[-1] == k.shape[-2] else mask.expand(*mask.shape[:-1], k.shape[-2])


def _with_alibi(mask: Tensor | None, slopes: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Slopes that learn, as a bias: the kernels give it a gradient."""
    i, j = _places(q, k)
    bias = _alibi(slopes, i, j)[None]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, NEVER) if mask.dtype == torch.bool else bias + mask


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, enable_gqa: bool,
    window: tuple[int, int], slopes: Tensor | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    op = "scaled_dot_product_attention"
    if min(q.dim(), k.dim(), v.dim()) < 2:
        raise RuntimeError(f"{op}: {_shapes(q, k, v)}; they must have at least 2 dimensions")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise RuntimeError(
            f"{op}: query is {q.dtype} on {q.device}, key {k.dtype} on {k.device},"
            f" value {v.dtype} on {v.device}; they must match"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise RuntimeError(
            f"{op}: {_shapes(q, k, v)}; query and key must have as many columns,"
            " key and value as many positions"
        )
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in (q, k, v)]
    whole = all(heads[0] in (1, n) or n == 1 for n in heads[1:]) and len({*heads} - {1}) < 2
    if not whole and not (enable_gqa and all(n and heads[0] % n == 0 for n in heads[1:])):
        raise RuntimeError(
            f"{op}: {_shapes(q, k, v)}; heads must match,"
            " or those of query be a multiple with enable_gqa=True"
        )
    if mask is not None:
        _check_mask(mask, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, allowed is 0 to 1")
    _check_window(op, window)
    for name, x in (("alibi_slopes", slopes), ("sinks", sinks)):
        if x is not None and tuple(x.shape) != (heads[0],):
            raise RuntimeError(f"{op}: {name} is {tuple(x.shape)}, query has {heads[0]} heads")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"query is {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    op = "scaled_dot_product_attention"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"{op}: attn_mask is {mask.dtype}; allowed are bool and floating types")
    whole = (*q.shape[:-1], k.shape[-2])
    if mask.dim() > len(whole) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], whole[::-1], strict=False)
    ):
        raise RuntimeError(
            f"{op}: attn_mask is {tuple(mask.shape)}, which does not broadcast to {tuple(whole)}"
        )


def _check_window(op: str, window: tuple[int, int]) -> None:
    if len(window) != 2 or min(window) < -1:
        raise ValueError(
            f"{op}: window_size is {window}; allowed are two numbers from -1 (no limit)"
        )


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, enable_gqa: bool,
    used: Tensor | None, table: Tensor | None,
) -> None:  # fmt: skip
    op, dims = "varlen_attn", 3 if table is None else 4
    if q.dim() != 3 or not (k.dim() == v.dim() == dims):
        raise RuntimeError(
            f"{op}: {_shapes(q, k, v)}; allowed are"
            " (places, heads, columns), and pages of them with a block_table"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise RuntimeError(
            f"{op}: query is {q.dtype}, key {k.dtype}, value {v.dtype}; they must match"
        )
    heads, kv_heads = q.shape[1], k.shape[-2]
    if heads != kv_heads and not (enable_gqa and heads % kv_heads == 0):
        raise ValueError(
            f"{op}: query has {heads} heads, key {kv_heads}; they must match, or those of query be"
            " a multiple with enable_gqa=True"
        )
    if table is not None and used is None:
        raise RuntimeError(f"{op}: block_table needs seqused_k")
    if table is None and cu_k is None:
        raise RuntimeError(f"{op}: cu_seq_k is None, which only a block_table allows")
    if table is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(f"{op}: block_table is for inference; use torch.no_grad()")
