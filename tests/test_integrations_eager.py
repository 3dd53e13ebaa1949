"""Attention modules written as those of transformers: whose function they call decides."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import fastdl
from test_integrations_transformers import optimized, ran


class Module(nn.Module):
    """As attention modules of transformers are written."""

    def __init__(self):
        super().__init__()
        self.config = transformers.LlamaConfig(attn_implementation="eager")
        self.num_key_value_groups = 1

    def forward(self, x):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return function(self, x, x, x, None, scaling=1.0, dropout=0.0)[0]


ALL_ATTENTION_FUNCTIONS = transformers.AttentionInterface()
eager_attention_forward = modeling_llama.eager_attention_forward


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_without_a_mask(kind, fused):
    """sdpa is causal then, and eager attention sees all."""
    module, x = Module(), torch.randn(1, 2, 5, 8)
    module.config._attn_implementation = kind
    theirs = module(x)
    optimized(module)
    ours, ops = ran(lambda: module(x))
    assert ops == ["attention"]
    torch.testing.assert_close(ours, theirs)


def other_math(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, **kwargs):
    scores = query @ key.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.sigmoid() @ value).transpose(1, 2), None


def other_option(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, slopes=None):
    return modeling_llama.eager_attention_forward(
        module, query, key, value, attention_mask, scaling, dropout
    )


def other_keyword(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, **kwargs):
    return other_option(module, query, key, value, attention_mask, scaling, kwargs.get("p", 0.0))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other_math, "its eager attention is not what fastdl's computes"),
        (other_option, "its eager attention takes slopes"),
        (other_keyword, "its eager attention takes kwargs"),
    ],
)
def test_another_eager_attention_stays(function, reason, monkeypatch):
    monkeypatch.setitem(globals(), "eager_attention_forward", function)
    assert [site.reason for site in fastdl.plan(Module())] == [reason]


def test_another_sdpa_stays(monkeypatch):
    """A model may have one in its own table."""
    module, table = Module(), transformers.AttentionInterface()
    module.config._attn_implementation = "sdpa"
    monkeypatch.setitem(globals(), "ALL_ATTENTION_FUNCTIONS", table)
    assert [site.reason for site in fastdl.plan(module)] == [None]
    table["sdpa"] = other_math
    assert [site.reason for site in fastdl.plan(module)] == ['its model has an "sdpa" of its own']
