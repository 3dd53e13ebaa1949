"""A transformer's layer as torch computes it in one call, where nobody needs gradients."""

import inspect
from functools import partial

import torch
from torch import Tensor

from ._op import SPELLINGS, form_of, same_call
from .attention import scaled_dot_product_attention
from .layernorm import layer_norm
from .linear import linear


@form_of("multi_head_attention_forward")
def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """nn.TransformerEncoderLayer of [batch, position, feature], without a mask."""
    if mask is not None or src.dim() != 3:
        raise RuntimeError("encoder_layer takes three dimensions and no mask")
    norm = partial(layer_norm, normalized_shape=(embed_dim,), eps=eps)
    first = partial(norm, weight=norm_weight_1, bias=norm_bias_1)
    second = partial(norm, weight=norm_weight_2, bias=norm_bias_2)
    activation = "gelu" if use_gelu else "relu"

    packed = linear(first(src) if norm_first else src, qkv_weight, qkv_bias)
    q, k, v = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    heads = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if norm_first:
        x = linear(heads, proj_weight, proj_bias, residual=src)
        hidden = linear(second(x), ffn_weight_1, ffn_bias_1, activation=activation)
        return linear(hidden, ffn_weight_2, ffn_bias_2, residual=x)
    x = first(linear(heads, proj_weight, proj_bias), residual=src)
    hidden = linear(x, ffn_weight_1, ffn_bias_1, activation=activation)
    return second(linear(hidden, ffn_weight_2, ffn_bias_2), residual=x)


SPELLINGS.append(
    same_call(
        lambda *args: torch._transformer_encoder_layer_fwd(*args),
        encoder_layer,
        inspect.signature(encoder_layer).parameters,
    )
)
