"""Multi-head attention and the transformer layers around it.

The layers run the ops of their children: a projection, its activation, dropout and residual are one
op. A child that has a hook, was replaced, wrapped or parametrized is called as torch calls it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from ..ops.activation import ACTIVATIONS, BY_MODULE
from ..ops.multi_head_attention import Finish, Given, attend, nested
from ._children import is_one_of, run_linear
from .activation import Dropout
from .linear import Linear
from .norm import LayerNorm

# What `activation` of a layer may be, and its name.
_FUNCTIONS: dict[Any, str] = {
    getattr(home, name): name
    for name in (*ACTIVATIONS, "relu6")
    for home in (F, torch, FF)
    if hasattr(home, name)
}


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` on the fused kernels."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if nested(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        given = _given(self, query, key, value, attn_mask, key_padding_mask, is_causal)
        given = given._replace(need_weights=need_weights, average_attn_weights=average_attn_weights)
        return attend(given, self.batch_first)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` on the fused kernels."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if _has_other_blocks(self) or nested(src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attention(y: Tensor, residual: Tensor) -> Tensor:
            masks = src_mask, src_key_padding_mask, is_causal
            return _attended(self.self_attn, self.dropout1, y, y, residual, *masks)

        x = _sublayer(self, self.norm1, attention, src)
        return _sublayer(self, self.norm2, _feed_forward(self, self.dropout2), x)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer` on the fused kernels."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if _has_other_blocks(self) or nested(tgt, memory):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip

        def self_attention(y: Tensor, residual: Tensor) -> Tensor:
            masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            return _attended(self.self_attn, self.dropout1, y, y, residual, *masks)

        def cross_attention(y: Tensor, residual: Tensor) -> Tensor:
            masks = memory_mask, memory_key_padding_mask, memory_is_causal
            return _attended(self.multihead_attn, self.dropout2, y, memory, residual, *masks)

        x = _sublayer(self, self.norm1, self_attention, tgt)
        x = _sublayer(self, self.norm2, cross_attention, x)
        return _sublayer(self, self.norm3, _feed_forward(self, self.dropout3), x)


def _given(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    padding: Tensor | None, is_causal: bool,
) -> Given:  # fmt: skip
    """The module's attention, without its weights."""
    return Given(
        query, key, value, attn.embed_dim, attn.num_heads, attn.in_proj_weight, attn.in_proj_bias,
        attn.bias_k, attn.bias_v, attn.add_zero_attn, attn.dropout, attn.out_proj.weight,
        attn.out_proj.bias, attn.training, padding, False, mask, not attn._qkv_same_embed_dim,
        attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight, is_causal=is_causal,
    )  # fmt: skip


_BLOCKS = {
    "_sa_block": (
        nn.TransformerEncoderLayer._sa_block,
        nn.TransformerDecoderLayer._sa_block,
    ),
    "_mha_block": (nn.TransformerDecoderLayer._mha_block,),
    "_ff_block": (
        nn.TransformerEncoderLayer._ff_block,
        nn.TransformerDecoderLayer._ff_block,
    ),
}


def _has_other_blocks(layer: nn.Module) -> bool:
    """Whether one of the methods that torch's forward calls was replaced."""
    return any(
        name in vars(layer) or getattr(type(layer), name, known[0]) not in known
        for name, known in _BLOCKS.items()
    )


def _sublayer(
    layer: Any, norm: nn.Module, block: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """norm(x + block(x)), or x + block(norm(x)). A block adds its second argument itself."""
    if layer.norm_first:
        return block(_normalized(norm, x), x)
    return _normalized(norm, block(x, x))


def _normalized(norm: Any, x: Tensor) -> Tensor:
    if is_one_of(norm, nn.LayerNorm, LayerNorm):
        return FF.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm(x)


def _attended(
    attn: Any, dropout: Any, x: Tensor, memory: Tensor, residual: Tensor, mask: Tensor | None,
    padding: Tensor | None, is_causal: bool,
) -> Tensor:  # fmt: skip
    """residual + dropout(attn(x, memory, memory))"""
    if is_one_of(attn, nn.MultiheadAttention, MultiheadAttention) and _drops(dropout):
        given = _given(attn, x, memory, memory, mask, padding, is_causal)
        finish = Finish(residual, dropout.p, dropout.training)
        return attend(given, attn.batch_first, finish)[0]
    y, _ = attn(
        x, memory, memory,
        attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False,
    )  # fmt: skip
    return residual + dropout(y)


def _feed_forward(layer: Any, dropout: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """residual + dropout(linear2(layer.dropout(activation(linear1(x)))))"""

    def block(x: Tensor, residual: Tensor) -> Tensor:
        activation = _activation(layer.activation)
        if activation is not None and _multiplies(layer.linear1) and _drops(layer.dropout):
            y = run_linear(x, layer.linear1, activation, layer.dropout)
        else:
            y = layer.dropout(layer.activation(layer.linear1(x)))
        if _multiplies(layer.linear2) and _drops(dropout):
            return run_linear(y, layer.linear2, None, dropout, residual)
        return residual + dropout(layer.linear2(y))

    return block


def _activation(activation: Any) -> Any:
    """The activation as ops take it, or None if it must be called."""
    if isinstance(activation, nn.Module):
        return activation if is_one_of(activation, *BY_MODULE) else None
    return _FUNCTIONS.get(activation)


def _multiplies(module: Any) -> bool:
    return is_one_of(module, nn.Linear, Linear)


def _drops(module: Any) -> bool:
    return is_one_of(module, nn.Dropout, Dropout)
