"""Multi-head attention: linear layers to the heads, their attention, a linear layer from them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._route import Reason, report
from .activation import dropout
from .attention import scaled_dot_product_attention
from .linear import linear


class Given(NamedTuple):
    """The arguments of torch's function, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class Finish(NamedTuple):
    """What the last linear layer does besides: dropout(y) + residual."""

    residual: Tensor | None = None
    dropout_p: float = 0.0
    training: bool = False


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's function: the output, and with `need_weights` the weights. In its masks True hides.

    A boolean `key_padding_mask` stays one row a batch, unless there is an `attn_mask` that is not
    said to be causal. The weights are computed besides the output: who drops them, keeps nothing of
    them for backward. A query that sees nothing gets 0, its weights are NaN. torch runs
    `need_weights` with dropout, and `static_k` and `static_v`.
    """
    return attend(
        Given(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
            bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
            key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
            k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
        )
    )  # fmt: skip


def attend(
    a: Given, batch_first: bool = False, finish: Finish | None = None
) -> tuple[Tensor, Tensor | None]:
    """torch's function, of batches that may come first, with what follows it."""
    finish = finish or Finish()
    place = 1 if batch_first and a.query.dim() == 3 else 0  # the dimension of positions
    if nested(a.query, a.key, a.value) or not _fits(a, place):
        return _in_torch(a, place, finish)
    p = a.dropout_p if a.training else 0.0
    if a.static_k is not None or a.static_v is not None or (a.need_weights and p > 0):
        report("multi_head_attention", "call", Reason.OPTION)
        return _in_torch(a, place, finish)
    q, k, v = (x.unflatten(-1, (a.num_heads, -1)).movedim(place, -2) for x in _projected(a))
    k, v, masks = _with_more_keys(a, k, v)
    hint = _takes_hint(a)
    mask = _merged(None if hint else masks[0], masks[1])
    weights = _weights(q, k, mask, a.average_attn_weights) if a.need_weights else None
    o = scaled_dot_product_attention(q, k, v, mask, p, hint)
    o = o.movedim(-2, place).flatten(-2)
    return linear(o, a.out_proj_weight, a.out_proj_bias, **finish._asdict()), weights


def nested(*tensors: Tensor) -> bool:
    """Whether one of them is a nested tensor, which is left to torch."""
    if not any(x.is_nested for x in tensors):
        return False
    report("multi_head_attention", "call", Reason.SUBCLASS)
    return True


def _in_torch(a: Given, place: int, finish: Finish) -> tuple[Tensor, Tensor | None]:
    if place:
        a = _each(a, lambda x: x.transpose(0, 1))
    y, weights = F.multi_head_attention_forward(*a)
    y = dropout(y.transpose(0, 1) if place else y, finish.dropout_p, finish.training)
    return y if finish.residual is None else y + finish.residual, weights


def _each(a: Given, change: Callable[[Tensor], Tensor]) -> Given:
    """With query, key and value changed. What was one tensor still is."""
    key = change(a.key)
    value = key if a.value is a.key else change(a.value)
    return a._replace(query=key if a.query is a.key else change(a.query), key=key, value=value)


def _fits(a: Given, place: int) -> bool:
    """Whether the arguments go together. torch says what is wrong with those that do not."""
    q, k, v = a.query, a.key, a.value
    if q.dim() not in (2, 3) or not (q.dim() == k.dim() == v.dim()):
        return False
    batch, of_keys = ([] if x.dim() == 2 else [x.shape[1 - place]] for x in (q, k))
    return (
        q.shape[-1] == a.embed_dim_to_check
        and q.shape[-1] % a.num_heads == 0
        and k.shape[:-1] == v.shape[:-1]
        and batch == of_keys
        and _weights_fit(a)
        and _masks_fit(a, batch, q.shape[place], k.shape[place])
    )


def _weights_fit(a: Given) -> bool:
    E, E_k, E_v = (x.shape[-1] for x in (a.query, a.key, a.value))
    if a.use_separate_proj_weight:
        ok = _have(((E, E), (E, E_k), (E, E_v)), a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    else:
        ok = E == E_k == E_v and _have(((3 * E, E),), a.in_proj_weight)
    if a.in_proj_bias is not None:
        ok = ok and _have(((3 * E,),), a.in_proj_bias)
    if a.bias_k is not None or a.bias_v is not None:
        ok = ok and _have(((1, 1, E), (1, 1, E)), a.bias_k, a.bias_v)
    return ok


def _have(shapes: Sequence[Any], *tensors: Tensor | None) -> bool:
    return all(x is not None and x.shape == s for x, s in zip(tensors, shapes, strict=True))


def _masks_fit(a: Given, batch: Sequence[int], L: int, S: int) -> bool:
    mask, padding = a.attn_mask, a.key_padding_mask
    if any(m is not None and m.dtype != torch.bool and not m.is_floating_point()
           for m in (mask, padding)):  # fmt: skip
        return False
    if padding is not None and padding.shape != (*batch, S):
        return False
    heads = a.num_heads * batch[0] if batch else a.num_heads
    return not a.is_causal if mask is None else mask.shape in ((L, S), (heads, L, S))


def _projected(a: Given) -> tuple[Tensor, ...]:
    """Queries, keys and values. Those of one tensor come from one product."""
    inputs, counts = [a.query, a.key, a.value], [1, 1, 1]
    weights: Sequence[Any] = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    if not a.use_separate_proj_weight:
        assert a.in_proj_weight is not None
        if a.key is a.value:
            inputs, counts = ([a.key], [3]) if a.query is a.key else ([a.query, a.key], [1, 2])
        weights = _split(a.in_proj_weight, counts)
    biases = [None] * len(counts) if a.in_proj_bias is None else _split(a.in_proj_bias, counts)
    found: list[Tensor] = []
    for x, weight, bias, count in zip(inputs, weights, biases, counts, strict=True):
        y = linear(x, weight, bias)
        found += y.unflatten(-1, (count, -1)).unbind(-2) if count > 1 else [y]
    return tuple(found)


def _split(packed: Tensor, counts: list[int]) -> Sequence[Any]:
    E = packed.shape[0] // 3
    return [packed] if len(counts) == 1 else packed.split([n * E for n in counts])


def _with_more_keys(a: Given, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """With the learned key and the key of zeros, which no mask hides, and the masks for them:
    [batch, head, query, key], or what broadcasts to it.
    """
    mask, padding, more = a.attn_mask, a.key_padding_mask, 0
    if a.bias_k is not None and a.bias_v is not None:
        k, v = (torch.cat([x, _as_key(bias, x)], -2) for x, bias in ((k, a.bias_k), (v, a.bias_v)))
        more += 1
    if a.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        more += 1
    mask, padding = (x if x is None or not more else F.pad(x, (0, more)) for x in (mask, padding))
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (*k.shape[:-3], a.num_heads))
    return k, v, (mask, None if padding is None else padding[..., None, None, :])


def _as_key(bias: Tensor, like: Tensor) -> Tensor:
    """One more key, of each head and the same for all batches."""
    *lead, _, D = like.shape
    return bias.to(like.dtype).view(-1, 1, D).expand(*lead, 1, D)


def _takes_hint(a: Given) -> bool:
    """Whether `is_causal` stands for `attn_mask`. Without padding it does so in torch too."""
    if not a.is_causal or a.need_weights:
        return False
    more_keys = a.add_zero_attn or a.bias_k is not None
    learns = a.attn_mask is not None and a.attn_mask.requires_grad
    return a.key_padding_mask is None or not (more_keys or learns)


def _merged(mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Both masks as one in which True is seen."""
    if mask is None or padding is None:
        one = padding if mask is None else mask
        return ~one if one is not None and one.dtype == torch.bool else one
    if mask.dtype == padding.dtype == torch.bool:
        return ~(mask | padding)
    if mask.dtype == torch.bool:
        mask, padding = padding, mask
    if padding.dtype == torch.bool:
        return mask.masked_fill(padding, float("-inf"))
    return mask + padding


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, average: bool) -> Tensor:
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        boolean = mask.dtype == torch.bool
        s = s.masked_fill(~mask, float("-inf")) if boolean else s + mask.to(s.dtype)
    weights = torch.softmax(s, -1)
    return weights.mean(-3) if average else weights
