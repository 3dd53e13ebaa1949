"""The ways in which people write attention."""

import functools
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import SPELLINGS, Spelling, form_of, named
from .attention import scaled_dot_product_attention
from .multi_head_attention import multi_head_attention_forward

# Beside so low a logit float32 has no digit left for another.
LOW = -1e8


@form_of("scaled_dot_product_attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    fill: float = float("-inf"),
    dropout_p: float = 0.0,
    training: bool = True,
    softcap: float = 0.0,
    groups: int = 1,
    columns: bool = True,
) -> Tensor:
    """Attention written out: `fill` where a key is hidden, keys transposed if they are `columns`.
    Each head of keys and values serves `groups` neighbouring heads of queries.
    """
    if hidden is not None and hidden.dtype != torch.bool:
        raise RuntimeError(f"hidden is {hidden.dtype}, allowed is bool")
    if fill > LOW:
        raise RuntimeError(f"hidden logits of {fill} are seen a little")
    mask = bias
    if hidden is not None:
        mask = ~hidden if fill == float("-inf") else torch.where(hidden, fill, 0.0)
    key, p = key.transpose(-2, -1) if columns else key, dropout_p if training else 0.0
    if groups != 1:
        _insist_on_groups(query, key, groups)
    return scaled_dot_product_attention(
        query, key, value, mask, p, scale=scale, enable_gqa=groups != 1, softcap=softcap
    )


def _insist_on_groups(query: Tensor, key: Tensor, groups: int) -> None:
    if key.dim() != 4 or key.shape[1] * groups != query.shape[1]:
        raise RuntimeError(f"{groups} heads to each of {tuple(key.shape)} for {tuple(query.shape)}")


Step = Callable[..., Any]


# How the scale is written, and what it is then.
_SCALES: list[tuple[Step, Step]] = [
    (lambda q, k, by: q @ k, lambda by: 1.0),
    (lambda q, k, by: (q @ k) * by, lambda by: by),
    (lambda q, k, by: (q @ k) / by, lambda by: 1.0 / by),
    (lambda q, k, by: (q * by) @ k, lambda by: by),
    (lambda q, k, by: (q / by) @ k, lambda by: 1.0 / by),
    (lambda q, k, by: torch.bmm(q, k) * by, lambda by: by),
    (lambda q, k, by: torch.bmm(q, k) / by, lambda by: 1.0 / by),
    (lambda q, k, by: torch.bmm(q * by, k), lambda by: by),
    (lambda q, k, by: torch.bmm(q, k), lambda by: 1.0),
]  # fmt: skip

_MASKS: list[Step] = [
    lambda s, bias, hidden, fill: s,
    lambda s, bias, hidden, fill: s + bias,
    lambda s, bias, hidden, fill: s.masked_fill(hidden, fill),
]

# Softmax as it is, and in float32.
_SOFTMAXES: list[Step] = [
    lambda s, dtype: torch.softmax(s, -1),
    lambda s, dtype: torch.softmax(s, -1, dtype=torch.float32),
    lambda s, dtype: torch.softmax(s, -1, dtype=torch.float32).to(dtype),
    lambda s, dtype: torch.softmax(s.to(torch.float32), -1).to(dtype),
]


class Way(NamedTuple):
    """The choices that people have."""

    scale: tuple[Step, Step]
    mask: Step
    softmax: Step
    drops: bool
    caps: bool = False
    repeats: bool = False


def _repeated(heads: Any, groups: Any) -> Any:
    return heads.repeat_interleave(groups, 1)


def _spell(way: Way) -> Spelling:
    products, factor = way.scale
    last = torch.bmm if "bmm" in products.__code__.co_names else torch.matmul

    def pattern(
        q: Any, k: Any, v: Any, by: Any, bias: Any, hidden: Any, fill: Any, dtype: Any, p: Any,
        training: Any, cap: Any, groups: Any,
    ) -> Any:  # fmt: skip
        columns = _repeated(k, groups).transpose(-2, -1) if way.repeats else k
        logits = products(q, columns, by)
        logits = torch.tanh(logits / cap) * cap if way.caps else logits
        shares = way.softmax(way.mask(logits, bias, hidden, fill), dtype)
        shares = F.dropout(shares, p, training) if way.drops else shares
        return last(shares, _repeated(v, groups) if way.repeats else v)

    def call(
        q: Any, k: Any, v: Any, by: Any, bias: Any, hidden: Any, fill: Any, dtype: Any, p: Any,
        training: Any, cap: Any, groups: Any,
    ) -> partial[Any]:  # fmt: skip
        numeric = by is None or isinstance(by, (int, float))
        options = {
            "scale": factor(by) if numeric else by, "bias": bias, "hidden": hidden, "fill": fill,
            "dropout_p": p, "training": training, "softcap": cap, "groups": groups,
        }  # fmt: skip
        given = {name: x for name, x in options.items() if x is not None}
        return partial(attention, q, k, v, **given, **({"columns": False} if way.repeats else {}))

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(Way(*choices))
    for choices in itertools.product(_SCALES, _MASKS, _SOFTMAXES, (False, True))
)
# a cap, and heads that share keys, are written by few
SPELLINGS.extend(
    _spell(Way(scale, mask, softmax, drops, caps, repeats))
    for scale, mask, softmax, drops, (caps, repeats) in itertools.product(
        _SCALES[:3],
        _MASKS[:2],
        _SOFTMAXES,
        (False, True),
        [(False, True), (True, False), (True, True)],
    )
)

# As the definition has it, so that keys need not be transposed.
SPELLINGS.extend(
    [
        Spelling(
            lambda q, k, v, by: torch.softmax((q @ k.transpose(-2, -1)) * by, -1) @ v,
            lambda q, k, v, by: partial(scaled_dot_product_attention, q, k, v, scale=by),
        ),
        Spelling(
            lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), -1) @ v,
            lambda q, k, v: partial(scaled_dot_product_attention, q, k, v, scale=1.0),
        ),
    ]
)


def _call(
    q: Any, k: Any, v: Any, mask: Any, p: Any, is_causal: Any, scale: Any, gqa: Any
) -> partial[Any]:
    options = {"scale": scale, "enable_gqa": gqa}
    given = {name: x for name, x in options.items() if x is not None}
    return partial(scaled_dot_product_attention, q, k, v, mask, p or 0.0, bool(is_causal), **given)


SPELLINGS.append(
    Spelling(
        lambda q, k, v, mask, p, is_causal, scale, gqa: F.scaled_dot_product_attention(
            q, k, v, mask, p, is_causal, scale=scale, enable_gqa=gqa
        ),
        _call,
    )
)


@form_of("scaled_dot_product_attention")
def attention_of_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, groups: int,
) -> Tensor:  # fmt: skip
    """Attention in which each head of keys and values serves `groups` heads of queries."""
    _insist_on_groups(query, key, groups)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=True
    )


SPELLINGS.append(
    Spelling(
        lambda q, k, v, mask, p, is_causal, scale, groups: F.scaled_dot_product_attention(
            q, _repeated(k, groups), _repeated(v, groups), mask, p, is_causal, scale=scale
        ),
        lambda q, k, v, mask, p, is_causal, scale, groups: partial(
            attention_of_groups, q, k, v, mask, p or 0.0, bool(is_causal), scale, groups
        ),
    )
)


@functools.wraps(multi_head_attention_forward)
def multi_head_attention(*args: Any, **options: Any) -> Tensor:
    """What multi_head_attention_forward returns first."""
    return multi_head_attention_forward(*args, **options)[0]


def _of_heads(*given: Any) -> Any:
    # nn.MultiheadAttention is one call in Dynamo's graphs
    arguments = dict(zip(_OF_HEADS, given, strict=True))
    return F.multi_head_attention_forward(**arguments, need_weights=False)[0]


_OF_HEADS = [
    name
    for name in inspect.signature(F.multi_head_attention_forward).parameters
    if name != "need_weights"
]


def _call_of_heads(**given: Any) -> partial[Any]:
    return partial(multi_head_attention, **given, need_weights=False)


SPELLINGS.append(Spelling(named(_OF_HEADS, _of_heads), _call_of_heads))
