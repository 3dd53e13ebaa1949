"""Attention as people write it is found in graphs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
from fastdl.contract.evaluate import FORWARD, GRADIENT, compare
from fastdl.optimize import graph
from graph_forms import Compiled


def qkv(dtype=torch.float32):
    return [torch.randn(2, 2, 20, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


TRIL = torch.tril(torch.ones(1, 1, 32, 32))
KEYS = torch.arange(20) < torch.tensor([20, 13])[:, None, None, None]
BIAS = torch.randn(2, 1, 1, 20).to(torch.bfloat16)  # the same in both dtypes
BACK = torch.randn(2, 2, 20, 16).to(torch.bfloat16)


def nanogpt(q, k, v):
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(TRIL[:, :, :20, :20] == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    att = F.dropout(att, 0.0, True)
    return att @ v


def hugging_face(q, k, v):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = weights + BIAS.to(q.dtype)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, v)


def bert(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(16) + BIAS.to(q.dtype)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


def scaled_queries(q, k, v):
    return ((q * 16**-0.5) @ k.mT).softmax(-1) @ v


def divided_queries(q, k, v):
    return torch.softmax(torch.matmul(q / 4.0, k.transpose(-2, -1)), dim=-1).matmul(v)


def in_float32(q, k, v):
    scores = (q @ k.transpose(-2, -1) * 0.25).float()
    return scores.softmax(-1).type_as(q) @ v


def annotated(q, k, v):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(16)
    scores = scores.masked_fill(~KEYS, -1e9)
    return torch.matmul(scores.softmax(dim=-1), v)


def without_batches(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.25
    return torch.bmm(F.softmax(scores, dim=-1), v)


def call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def call_with_a_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=KEYS, scale=0.3)


def call_with_shared_keys(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def repeated(x):
    """Heads 0 0 1 1, as Hugging Face repeats them."""
    x = torch.cat([x[:, :, :, :8], x[:, :, :, 8:]], 2)[:, :, :20]
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)


def more_queries(q):
    return torch.cat([q, q.flip(2)], 1)[..., :8]


def capped(q, k, v):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = torch.tanh(weights / 2.0) * 2.0 + BIAS.to(q.dtype)
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


def groups_by_hand(q, k, v):
    q, k, v = more_queries(q), repeated(k), repeated(v)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25 + BIAS.to(q.dtype)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v)


def groups_of_a_call(q, k, v):
    return F.scaled_dot_product_attention(more_queries(q), repeated(k), repeated(v))


def groups_by_name(q, k, v):
    k, v = (x[..., :8].repeat_interleave(2, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(more_queries(q), k, v, is_causal=True)


GROUPED = [groups_by_hand, groups_of_a_call, groups_by_name]
WRITTEN = [
    capped, *GROUPED,
    nanogpt, hugging_face, bert, scaled_queries, divided_queries, in_float32, annotated,
    without_batches, call, call_with_a_mask, call_with_shared_keys,
]  # fmt: skip


def run(function, inputs):
    o = function(*inputs)
    back = torch.cat([BACK, BACK], 1)[..., :8] if o.shape[1] == 4 else BACK
    return [o, *torch.autograd.grad(o, inputs, back.to(o.dtype).view(o.shape))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", WRITTEN)
def test_is_found(written, dtype):
    inputs = qkv(dtype)
    compiled = torch.compile(written, backend=fastdl.backend, fullgraph=True)
    found = run(compiled, inputs)
    sites = [site for site in graph.last_report() if site.reason is None]
    assert len(sites) == 1 and "attention" in sites[0].op, sites
    torchs = run(written, inputs)
    truth = run(written, [x.detach().double().requires_grad_() for x in inputs])
    compare(found[:1], torchs[:1], truth[:1], FORWARD).require("output")
    compare(found[1:], torchs[1:], truth[1:], GRADIENT).require("gradient")


@pytest.mark.parametrize("written", GROUPED)
def test_shared_heads_are_not_copied(written):
    compiled = Compiled(written)
    compiled(*qkv())
    assert not {"repeat_interleave", "expand"} & {*compiled.calls}


def test_heads_in_another_order_are_copied():
    def written(q, k, v):
        k, v = (x[..., :8].repeat(1, 2, 1, 1) for x in (k, v))  # heads 0 1 0 1
        return F.scaled_dot_product_attention(more_queries(q), k, v)

    inputs = qkv()
    compiled = Compiled(written)
    torch.testing.assert_close(compiled(*inputs), written(*inputs))
    assert compiled.calls.count("repeat") == 2


def read_twice(q, k, v):
    shares = torch.softmax(q @ k.transpose(-2, -1), -1)
    return shares @ v, shares


def seen_a_little(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(~KEYS, -3.0), -1) @ v


def of_queries(q, k, v):
    return torch.softmax(q @ k.mT, -2) @ v


def learned_scale(q, k, v):
    return torch.softmax((q @ k.mT) * q.mean(), -1) @ v


@pytest.mark.parametrize("written", [read_twice, seen_a_little, of_queries, learned_scale])
def test_is_left_alone(written):
    compiled = torch.compile(written, backend=fastdl.backend)
    compiled(*qkv())
    sites = [site for site in graph.last_report() if site.reason is None]
    assert [site.op for site in sites if "softmax" not in site.op] == []


def test_in_a_module_of_torch():
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 20, 16)
    compiled = torch.compile(layer, backend=fastdl.backend)
    torch.testing.assert_close(
        compiled(x, x, x, need_weights=False), layer(x, x, x, need_weights=False)
    )
    assert [site.op for site in graph.last_report()] == ["multi_head_attention_forward"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_in_a_layer_that_torch_computes_in_one_call(norm_first, activation, fused):
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, activation=activation, norm_first=norm_first, batch_first=True
    ).eval()
    with torch.no_grad():
        for parameter in layer.parameters():  # biases and shifts are zero when they are made
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2, 20, 16)
        compiled = Compiled(layer)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
        assert compiled.calls == ["encoder_layer"]
        # with a mask it is torch's
        hidden = torch.zeros(20, 20).bool().triu(1)
        hidden[0, 1:] = True
        compiled = Compiled(layer)
        torch.testing.assert_close(compiled(x, hidden), layer(x, hidden), atol=1e-5, rtol=1e-4)
        assert compiled.fused == []
