"""Other kernel libraries of straw: their public names and signatures, computed by torch."""

import importlib.machinery
import sys
import types

import torch
import torch.nn.functional as F


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place, "the gradient of the output would be lost"
    h = X.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (h.to(X.dtype) * (W.float() + offset)).to(X.dtype)
    assert casting_mode == "gemma"
    return (h * (W.float() + offset)).to(X.dtype)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    S = X + R
    return liger_rms_norm(S, W, eps, offset, casting_mode, in_place), S


class Swiglu(torch.autograd.Function):
    """Its gradients overwrite what it was given."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.given = a.detach(), b.detach()
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.given
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (a, b)]
            found = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, dc)
        return a.copy_(found[0]), b.copy_(found[1])


def liger_swiglu(a, b):
    return Swiglu.apply(a, b)


def liger_geglu(a, b):
    return F.gelu(a, approximate="tanh") * b


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    assert q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3] and k.shape[1] == 1

    def turned(x):
        x1, x2 = x.chunk(2, -1)
        return (x * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)

    return turned(q), turned(k)


def liger_cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None,
    return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    z = input.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss + lse_square_scale * torch.logsumexp(z, 1).square().mean()


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
    chunk_mem_const=1,
):  # fmt: skip
    return liger_cross_entropy(
        F.linear(input, weight, bias), target, ce_weight, ignore_index=ignore_index,
        lse_square_scale=lse_square_scale, label_smoothing=label_smoothing, reduction=reduction,
        softcap=softcap,
    )  # fmt: skip


def liger_softmax(x):
    return torch.softmax(x, -1)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert X.shape[1] == num_channels
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def liger_kl_div(
    input, target, size_average=True, reduce=True, reduction="mean", log_target=False, eps=1e-10
):
    return F.kl_div(input.float(), target.float(), reduction=reduction, log_target=log_target)


def _attention(q, k, v, scale, causal, window_size, softcap=0.0, slopes=None):
    """Of [token, head, column]. Queries and keys end together."""
    q, k, v = (t.float().transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    last = k.shape[1] - q.shape[1]
    i, j = torch.arange(q.shape[1])[:, None] + last, torch.arange(k.shape[1])
    left, right = window_size
    right = 0 if causal else right
    s = s if slopes is None else s - slopes[:, None, None] * (i - j).abs()
    hidden = (j < i - left if left >= 0 else j < 0) | (j > i + right if right >= 0 else j < 0)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), -1).matmul(v).transpose(0, 1)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    of_all = [_attention(*given, *options) for given in zip(q, k, v, strict=True)]
    return torch.stack(of_all).to(q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    assert q.shape[1] == 1
    return flash_attn_func(
        q, k_cache, v_cache, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    found = []
    ends = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    for i in range(len(ends[0]) - 1):
        of_q, of_k = (slice(*end[i : i + 2]) for end in ends)
        options = (softmax_scale, causal, window_size, softcap, alibi_slopes)
        found.append(_attention(q[of_q], k[of_k], v[of_k], *options))
    return torch.cat(found).to(q.dtype)


def rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
    prenorm=False, weight_offset=0.0,
):  # fmt: skip
    h = x if residual is None else x + residual
    y = liger_rms_norm(h, weight, eps, weight_offset, "gemma", in_place=False)
    return (y, h) if prenorm else y


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and weight.dtype == torch.float32
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def softmax(x):
    assert x.dim() == 2
    return torch.softmax(x, -1)


def cross_entropy(
    x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
    inplace_backward=False,
):  # fmt: skip
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)


_FLASH = (flash_attn_func, flash_attn_with_kvcache, flash_attn_varlen_func)
MODULES = {
    "liger_kernel": (),
    "liger_kernel.transformers": (),
    "liger_kernel.transformers.functional": [
        function for name, function in globals().items() if name.startswith("liger_")
    ],
    "flash_attn": _FLASH,
    "quack": (rmsnorm, softmax, cross_entropy),
    "quack.rmsnorm": (rmsnorm, layernorm_fwd),
}


def install(monkeypatch, *packages):
    for name, functions in MODULES.items():
        if name.split(".")[0] in packages:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            vars(module).update({function.__name__: function for function in functions})
            monkeypatch.setitem(sys.modules, name, module)
