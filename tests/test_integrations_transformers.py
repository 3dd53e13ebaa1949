"""fastdl's attention in the models of transformers, held against transformers' own."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

import fastdl
from fastdl.integrations import transformers as integration

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
SIGHT = {**ENCODER, "image_size": 8, "patch_size": 4}
SPEECH = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32,
    "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
CLIP = {
    "text_config": {**ENCODER, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 2},
    "vision_config": SIGHT,
    "projection_dim": 8,
}

# What the attention of each guards: the model, its configuration.
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": True,
    }),
    "llama: shared heads": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    "gemma2: softcap": ("Gemma2ForCausalLM", "Gemma2Config", {
        **TEXT, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2, "sliding_window": 3,
    }),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **TEXT, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"],
    }),
    "mistral: a window": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 3}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "gpt_oss: sinks": ("GptOssForCausalLM", "GptOssConfig", {
        **TEXT, "sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1,
    }),
    "bert: both ways": ("BertModel", "BertConfig", {
        **ENCODER, "vocab_size": 32, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }),
    "t5: a bias": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTModel", "ViTConfig", {**SIGHT, "hidden_dropout_prob": 0.0}),
    "whisper: between two": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH),
    "clip: two configs": ("CLIPModel", "CLIPConfig", CLIP),
}  # fmt: skip

# On the left, on the right and not at all.
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def registered():
    integration.register()
    yield
    integration.unregister()


def make(name, **more):
    model, config, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = getattr(transformers, model)(getattr(transformers, config)(**options, **more))
        for parameter in built.parameters():  # attention far from uniform
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def inputs_of(name, padded=True):
    model, ids = MODELS[name][0], torch.randint(3, 32, PADDED.shape)
    ids[:, -1] = 2
    pixels = torch.randn(3, 3, 8, 8)
    if model == "ViTModel":
        return {"pixel_values": pixels}
    if model.startswith("Whisper"):
        return {"input_features": torch.randn(3, 4, 12), "decoder_input_ids": ids}
    inputs = {"input_ids": ids, "attention_mask": PADDED if padded else torch.ones_like(PADDED)}
    if model.startswith("T5"):
        inputs["decoder_input_ids"] = ids
    return {**inputs, "pixel_values": pixels} if model == "CLIPModel" else inputs


def results(model, inputs):
    """What can be seen of a run: outputs but for those at padding, and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    kept = {
        "logits": getattr(output, "logits", None),
        "state": getattr(output, "last_hidden_state", None),
        "per text": getattr(output, "logits_per_text", None),
    }
    kept = {key: value for key, value in kept.items() if value is not None}
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs and "per text" not in kept:
        kept = {key: value * PADDED[..., None] for key, value in kept.items()}
    sum((value * value.detach().cos()).sum() for value in kept.values()).backward()
    return kept | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1e-2)
        error = (ours[name] - expected).abs().max().item()
        assert error <= tolerance * scale, (name, error, scale)


def of_attention(model):
    return fastdl.optimize(model, exclude=[nn.Linear, nn.Embedding, nn.LayerNorm, *others(model)])


def others(model):
    """Types of modules without an attention inside."""
    from fastdl.optimize import rules

    return [type(m) for m in model.modules() if type(m) in rules.RULES]


# by name


@pytest.mark.parametrize("name", MODELS)
def test_chosen_by_name(name, registered, fused):
    """Outputs and gradients are those of eager attention, with padding on either side."""
    model, inputs = make(name), inputs_of(name)
    model.set_attn_implementation("eager")
    theirs = results(model, inputs)
    model.set_attn_implementation("fastdl")
    seen = fastdl.explain(model, **inputs)
    assert {d.op for d in seen.decisions} == {"attention"} and seen.fused
    assert_close(results(model, inputs), theirs)
