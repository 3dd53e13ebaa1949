"""fastdl's attention in the models of transformers, held against transformers' own."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import fastdl
from fastdl.integrations import transformers as integration

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
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
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
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
        "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "scale_attn_weights": False,
    }),
    "llama: shared heads": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    "gemma2: softcap": ("Gemma2ForCausalLM", "Gemma2Config", {
        **TEXT, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2, "sliding_window": 3,
    }),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **TEXT, "num_hidden_layers": 2, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
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

QUICK = ("gpt2", "gemma2: softcap", "mistral: a window", "gpt_oss: sinks", "t5: a bias")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# On the left and on the right.
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


@pytest.fixture
def registered():
    integration.register()
    yield
    integration.unregister()


def make(name, **more):
    model, config, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = getattr(transformers, model)(getattr(transformers, config)(**{**options, **more}))
        for parameter in built.parameters():  # attention far from uniform
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def inputs_of(name, padded=True):
    model, ids = MODELS[name][0], torch.randint(3, 32, PADDED.shape)
    ids[:, -1] = 2
    pixels = torch.randn(2, 3, 8, 8)
    if model == "ViTModel":
        return {"pixel_values": pixels}
    if model.startswith("Whisper"):
        return {"input_features": torch.randn(2, 4, 12), "decoder_input_ids": ids}
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


def ran(op):
    """What a call gives, and the ops of fastdl that it ran."""
    result = []
    seen = fastdl.explain(lambda: result.append(op()))
    return result[0], [decision.op for decision in seen.decisions if decision.stage == "call"]


# Nothing but attention is replaced: the rest has tests of its own.
REST = [nn.Linear, nn.Embedding, nn.LayerNorm, nn.GELU, nn.Conv1d, nn.Conv2d, nn.Dropout, nn.Tanh]
REST += [nn.SiLU, nn.ReLU, "*norm", "*output", "*.c_*"]


def attentions(model):
    return [name for name, m in model.named_modules() if "Attention" in type(m).__name__]


def optimized(model, **options):
    fastdl.optimize(model, include=attentions(model) or None, exclude=REST, **options)
    assert {s.op for s in fastdl.report(model).replaced} == {"scaled_dot_product_attention"}
    return model


# by name


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in MODELS])
def test_chosen_by_name(name, registered, fused):
    """Outputs and gradients are those of eager attention, with padding on either side."""
    model, inputs = make(name), inputs_of(name)
    model.set_attn_implementation("eager")
    theirs = results(model, inputs)
    model.set_attn_implementation("fastdl")
    ours, ops = ran(lambda: results(model, inputs))
    assert ops and set(ops) == {"attention"}
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["gemma2: softcap", slow("t5: a bias")])
def test_bfloat16(name, registered, fused):
    """Errors against float32 as eager attention's own."""
    model, inputs = make(name), inputs_of(name)
    model.set_attn_implementation("eager")
    judge = results(copy.deepcopy(model), inputs)
    theirs = results(model.bfloat16(), inputs)
    model.set_attn_implementation("fastdl")
    ours = results(model, inputs)
    for key, expected in judge.items():
        errors = [(r[key].float() - expected).abs().max().item() for r in (ours, theirs)]
        assert errors[0] <= 3 * errors[1] + 0.01 * expected.abs().max().item(), (key, errors)


def test_masks_are_left_out_where_possible(registered, monkeypatch):
    model, seen = make("llama: shared heads"), []
    attention = fastdl.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append((kwargs["attn_mask"], kwargs["is_causal"], kwargs["window_size"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(fastdl.functional, "scaled_dot_product_attention", spy)
    model.set_attn_implementation("fastdl")
    model(**inputs_of("llama: shared heads", padded=False))
    assert seen == [(None, True, (-1, -1))]


def call(**kwargs):
    """fastdl's attention as a causal module calls it, and eager attention with the same masks."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    ours = integration.attention(module, q, k, k, None, scaling=0.3, **kwargs)
    place = torch.arange(6)
    seen = place <= place[:, None]
    if "sliding_window" in kwargs:
        seen = seen & (place > place[:, None] - kwargs["sliding_window"])
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    return ours, modeling_llama.eager_attention_forward(module, q, k, k, mask, scaling=0.3)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"sliding_window": 9}])
def test_a_call_without_a_mask(options, fused):
    (out, weights), theirs = call(output_attentions=True, **options)
    torch.testing.assert_close(out, theirs[0])
    torch.testing.assert_close(weights, theirs[1])
    assert out.is_contiguous() and call(**options)[0][1] is None


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks", "head_mask"])
def test_what_cannot_be_honoured_is_refused(name):
    with pytest.raises(ValueError, match=f"Module passes {name}.*set_attn_implementation"):
        call(**{name: torch.ones(4)})


def test_a_window_without_a_mask_needs_as_many_keys(registered):
    with pytest.raises(ValueError, match="a window of 3 on 1 queries and 6 keys"):
        x = torch.randn(1, 1, 6, 8)
        integration.attention(nn.Module(), x[:, :, :1], x, x, None, sliding_window=3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, registered, fused):
    """Without a mask: a static cache has more keys than there are queries when it is filled, and
    a query alone is the last one.
    """
    model = make("llama: shared heads")
    inputs = inputs_of("llama: shared heads", padded=False)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    theirs = model.generate(**inputs, **options)
    model.set_attn_implementation("fastdl")
    ours, ops = ran(lambda: model.generate(**inputs, **options))
    assert torch.equal(ours, theirs) and ops == ["attention"] * 3


def test_registering_twice_and_unregistering():
    names = transformers.AttentionInterface().valid_keys()
    integration.register()
    integration.register()
    assert transformers.AttentionInterface().valid_keys() == [*names, "fastdl"]
    integration.unregister()
    integration.unregister()
    assert transformers.AttentionInterface().valid_keys() == names
    with pytest.raises(ValueError, match="fastdl"):
        make("llama: shared heads").set_attn_implementation("fastdl")


def test_nothing_of_transformers_is_imported():
    code = """
import sys, torch, fastdl, fastdl.integrations.transformers
model = torch.nn.Linear(2, 2)
fastdl.optimize(model), fastdl.integrations.diffusers
assert not {"transformers", "diffusers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# by optimize

EAGER_ONLY = ("gemma2: softcap", "gpt_oss: sinks")
CASES = [(name, "eager") for name in MODELS]
CASES += [(name, "sdpa") for name in MODELS if name not in EAGER_ONLY]


@pytest.mark.parametrize(
    ("name", "kind"),
    [case if case == ("gpt_oss: sinks", "eager") else slow(*case) for case in CASES],
)
def test_optimized(name, kind, fused):
    """The config stays, outputs and gradients too, and restore gives the classes back."""
    model, inputs = make(name), inputs_of(name)
    model.set_attn_implementation(kind)
    theirs, config = results(model, inputs), model.config.to_dict()
    classes = [type(module) for module in model.modules()]
    text = repr(model)
    optimized(model)
    ours, ops = ran(lambda: results(model, inputs))
    assert ops and set(ops) == {"attention"}
    assert model.config.to_dict() == config and repr(model) == text
    assert_close(ours, theirs)
    fastdl.restore(model)
    again, ops = ran(lambda: results(model, inputs))
    assert not ops and all(torch.equal(again[key], theirs[key]) for key in theirs)
    assert [type(module) for module in model.modules()] == classes


def attention_sites(sites):
    return [site for site in sites if "Attention" in site.pattern]


@pytest.mark.parametrize("kind", ["eager", slow("sdpa")])
def test_sites_are_judged_one_by_one(kind, fused):
    """With a cache, whose tensors have a history when the second layer is called."""
    model = make("llama: shared heads", num_hidden_layers=2).train()
    model.set_attn_implementation(kind)
    inputs = inputs_of("llama: shared heads", padded=False)
    report = fastdl.report(optimized(model, example_inputs=inputs))
    assert [site.name for site in report.replaced] == [
        f"model.layers.{i}.self_attn" for i in range(2)
    ]
    for site in report.replaced:
        assert site.pattern == "LlamaAttention" and site.route == "fused"
        assert 0 < site.after < 1e-5
    assert report.proof.ok and not report.rolled_back


def test_a_wrong_attention_is_rolled_back(monkeypatch, fused):
    model, inputs = make("llama: shared heads"), inputs_of("llama: shared heads")
    attention = integration.attention

    def wrong(*args, **kwargs):
        return attention(*args, **{**kwargs, "scaling": 0.9})

    monkeypatch.setattr(integration, "attention", wrong)
    fastdl.optimize(model, inputs, include=attentions(model), exclude=REST)
    (site,) = fastdl.report(model).rolled_back
    assert site.name == "model.layers.0.self_attn" and "the error is too large" in site.reason


def test_weights_are_given_where_they_were(fused):
    """By the eager function, as before."""
    model, inputs = make("llama: shared heads"), inputs_of("llama: shared heads")
    model.set_attn_implementation("eager")
    theirs = model(**inputs, output_attentions=True)
    optimized(model)
    ours, ops = ran(lambda: model(**inputs, output_attentions=True))
    assert not ops and torch.equal(ours.attentions[0], theirs.attentions[0])
    _, ops = ran(lambda: model(**inputs))
    assert ops == ["attention"]


def test_a_later_choice_is_honoured(registered):
    model, inputs = optimized(make("llama: shared heads")), inputs_of("llama: shared heads")
    called = []
    sdpa = transformers.AttentionInterface()["sdpa"]

    def mine(*args, **kwargs):
        called.append(kwargs["scaling"])
        return sdpa(*args, **kwargs)

    transformers.AttentionInterface.register("mine", mine)
    try:
        model.set_attn_implementation("mine")
        _, ops = ran(lambda: model(**inputs))
    finally:
        transformers.AttentionInterface._global_mapping.pop("mine")
    assert called and not ops


def test_what_was_chosen_stays(registered):
    model = make("llama: shared heads")
    model.config._attn_implementation = "flex_attention"
    (site,) = attention_sites(fastdl.plan(model))
    assert site.reason == 'its attention was chosen: "flex_attention"'
    model.config._attn_implementation = "fastdl"
    (site,) = attention_sites(fastdl.plan(model))
    assert site.reason == "its attention is fastdl's by name"


def test_what_sdpa_refuses_is_refused():
    model, inputs = optimized(make("llama: shared heads")), inputs_of("llama: shared heads")
    with pytest.raises(ValueError, match="softcap"):
        model(**inputs, softcap=2.0)


def swapped(model):
    """Modules of a class that passes for the one it derives from."""
    classes = [(m, type(m), type(m).__mro__[1]) for m in model.modules()]
    return [m for m, cls, base in classes if cls.__name__ == base.__name__]


def test_one_module_of_a_config(fused):
    """include and exclude choose modules, though all share a config."""
    model = make("llama: shared heads", num_hidden_layers=2)
    fastdl.optimize(model, include=["*.1.self_attn"], exclude=REST)
    assert swapped(model) == [model.model.layers[1].self_attn]
    _, ops = ran(lambda: model(**inputs_of("llama: shared heads")))
    assert ops == ["attention"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_it(copied, fused):
    model, inputs = make("llama: shared heads"), inputs_of("llama: shared heads")
    twin = copied(optimized(model))
    assert len(swapped(twin)) == 1 and len(attention_sites(fastdl.report(twin).replaced)) == 1
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert not swapped(fastdl.restore(twin)) and swapped(model)


def test_what_is_saved_does_not_name_fastdl(tmp_path):
    model, inputs = make("llama: shared heads"), inputs_of("llama: shared heads")
    optimized(model).save_pretrained(tmp_path)
    assert "fastdl" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not swapped(loaded)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_dropout(fused):
    """Shares are dropped in training, and in evaluation they are not."""
    model = make("llama: shared heads", attention_dropout=0.5)
    inputs = inputs_of("llama: shared heads")
    theirs = model(**inputs).logits
    torch.testing.assert_close(optimized(model)(**inputs).logits, theirs, rtol=1e-4, atol=1e-4)
    model.train()
    first, second = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = model(**inputs).logits
    torch.manual_seed(3)
    assert torch.equal(first, model(**inputs).logits)


@pytest.mark.slow
def test_compiled_in_one_graph(fused):
    model, inputs = optimized(make("llama: shared heads")), inputs_of("llama: shared heads")
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert not any("scaled_dot_product" in name for name in names)
    assert any("autograd" in name.lower() for name in names)
