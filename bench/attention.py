"""Attention as users write it with torch, and torch's other ways to it."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

Form = Callable[..., Any]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torch's call, with a mask for what it lacks; by hand what no mask can say."""
    (left, right), by_hand = window_size, bool(softcap) or sinks is not None
    right = 0 if is_causal else right
    alone = left < 0 and attn_mask is None and alibi_slopes is None and not by_hand
    is_causal = is_causal and alone
    if alibi_slopes is not None or left >= 0 or (right >= 0 and not is_causal):
        attn_mask = joined(query, key, attn_mask, (left, right), alibi_slopes)
    if not by_hand:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    group = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(group, -3) if group > 1 else x for x in (key, value))
    s = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        s = s.masked_fill(~attn_mask, float("-inf")) if boolean else s + attn_mask
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].to(s.dtype).expand(*s.shape[:-1], 1)], -1)
    p = torch.softmax(s, -1, dtype=torch.float32).to(query.dtype)
    return F.dropout(p[..., : key.shape[-2]], dropout_p) @ value


def joined(
    q: Tensor, k: Tensor, mask: Tensor | None, limits: tuple[int, int], slopes: Tensor | None
) -> Tensor:
    """One mask, or bias, of all that hides keys or counts distances."""
    seen, bias = seen_within(q.shape[-2], k.shape[-2], *limits, q.device), mask
    if mask is not None and mask.dtype == torch.bool:
        seen, bias = seen & mask, None
    if slopes is not None:
        i, j = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
        alibi = -slopes[:, None, None] * (i[:, None] - j).abs()
        bias = alibi if bias is None else bias + alibi
    return seen if bias is None else bias.to(q.dtype).masked_fill(~seen, float("-inf"))


@functools.lru_cache(maxsize=1)
def seen_within(Sq: int, Sk: int, left: int, right: int, device: torch.device) -> Tensor:
    """Made once: models keep their masks."""
    i, j = torch.arange(Sq, device=device)[:, None], torch.arange(Sk, device=device)
    seen = torch.ones(Sq, Sk, dtype=torch.bool, device=device)
    seen = seen & (j >= i - left) if left >= 0 else seen
    return seen & (j <= i + right) if right >= 0 else seen


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's older call, with a mask of sequences."""
    i, j = (torch.arange(x.shape[0], device=x.device) for x in (query, key))
    of_i, of_j = (
        torch.searchsorted(cu[1:], place.to(cu.dtype), right=True)
        for cu, place in ((cu_seq_q, i), (cu_seq_k, j))
    )
    # sequences end together
    i = (i - cu_seq_q[1:][of_i] + cu_seq_k[1:][of_i])[:, None]
    (left, right), seen = window_size, of_i[:, None] == of_j
    seen = seen & (j >= i - left) if left >= 0 else seen
    seen = seen & (j <= i + right) if right >= 0 else seen
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    o = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
    return o[0].transpose(0, 1)


def attention_rivals(call: "partial[Any]", compiled: bool) -> dict[str, Form]:
    """torch's call held to each of its kernels, and FlexAttention."""
    options, rivals = call.keywords, {}
    if not options.get("softcap") and options.get("sinks") is None:
        rivals = {name: held_to(backend) for name, backend in BACKENDS.items()}
    if compiled and options.get("sinks") is None:
        rivals["flex"] = when_called(
            lambda: flex_form(call, torch.compile(flex_attention, dynamic=False))
        )
    return rivals


def when_called(make: Callable[[], Form]) -> Form:
    """A form that is made at its first call."""
    made = functools.cache(make)
    return lambda *args, **options: made()(*args, **options)


def held_to(backend: SDPBackend) -> Form:
    def form(*args: Any, **options: Any) -> Tensor:
        with sdpa_kernel([backend]):
            return torch_attention(*args, **options)

    return form


def flex_form(call: "partial[Any]", flex: Form) -> Form:
    """FlexAttention for calls with these options. The blocks that it skips are found once, here."""
    (q, k), options = call.args[:2], call.keywords
    left, right = options.get("window_size", (-1, -1))
    right, given = 0 if options.get("is_causal") else right, options.get("attn_mask")
    boolean = given is not None and given.dtype == torch.bool

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= i - left if left >= 0 else j >= 0
        seen = seen & (j <= i + right) if right >= 0 else seen
        return seen & at(given, b, h, i, j) if boolean else seen

    hides = boolean or left >= 0 or right >= 0
    own = given.shape[:2] if boolean else (1, 1)
    sizes = (*(None if n == 1 else n for n in own), q.shape[-2], k.shape[-2])
    blocks = create_block_mask(sees, *sizes, device=q.device) if hides else None
    return partial(_flex, flex, blocks)


def _flex(
    flex: Form, blocks: Any, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Any = None,
    is_causal: bool = False, window_size: Any = None, scale: float | None = None,
    enable_gqa: bool = False, softcap: float = 0.0, alibi_slopes: Any = None,
) -> Tensor:  # fmt: skip
    bias = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + at(bias, b, h, i, j)
        return s if alibi_slopes is None else s - alibi_slopes[h] * (i - j).abs()

    changes = softcap or bias is not None or alibi_slopes is not None
    return flex(q, k, v, score if changes else None, blocks, scale=scale, enable_gqa=enable_gqa)


def at(x: Tensor, *place: Tensor) -> Tensor:
    """An element of what broadcasts to [batch, head, query, key]."""
    return x[tuple(0 if n == 1 else i for n, i in zip(x.shape, place, strict=True))]


def varlen_rivals(call: "partial[Any]", compiled: bool) -> dict[str, Form]:
    return {"varlen": varlen_attn}
