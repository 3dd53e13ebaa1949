"""fastdl's attention in the models of diffusers, held against diffusers' own."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from torch import nn

import fastdl
from fastdl.integrations import diffusers as integration

PADDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1.0]])
BLOCKS = {"sample_size": 4, "layers_per_block": 1, "norm_num_groups": 4}
PATCHES = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1,
    "sample_size": 8, "patch_size": 4,
}  # fmt: skip
MODELS = {
    "a conditional UNet": ("UNet2DConditionModel", {
        **BLOCKS, "block_out_channels": (8, 8), "cross_attention_dim": 8, "attention_head_dim": 2,
        "in_channels": 4, "out_channels": 4, "mid_block_type": None,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }),
    "a UNet": ("UNet2DModel", {
        **BLOCKS, "block_out_channels": (8, 8), "attention_head_dim": 4, "mid_block_type": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }),
    "a VAE": ("AutoencoderKL", {
        "block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 4,
    }),
    "DiT": ("DiTTransformer2DModel", {**PATCHES, "num_embeds_ada_norm": 10}),
    "PixArt": ("PixArtTransformer2DModel", {
        **PATCHES, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 8,
        "use_additional_conditions": False,
    }),
    "Flux": ("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8,
        "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
    }),
}  # fmt: skip


def make(name):
    model, options = MODELS[name]
    model = getattr(diffusers, model)(**options).eval()
    for parameter in model.parameters():  # zeros where training begins
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(name):
    step, text = torch.tensor([3, 5]), torch.randn(2, 5, 8)
    image, small = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)
    words = {"encoder_hidden_states": text, "encoder_attention_mask": PADDED}
    return {
        "a conditional UNet": {"sample": small, "timestep": step, **words},
        "a UNet": {"sample": small[:, :3], "timestep": step},
        "a VAE": {"sample": small[:, :3]},
        "DiT": {"hidden_states": image, "timestep": step, "class_labels": torch.tensor([1, 2])},
        "PixArt": {
            "hidden_states": image,
            "timestep": step,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            **words,
        },
        "Flux": {
            "hidden_states": torch.randn(2, 6, 4),
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(2, 8),
            "timestep": step / 10,
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    }[name]


def results(model, inputs):
    """What can be seen of a run: the output and every gradient."""
    model.zero_grad()
    sample = model(**inputs).sample
    (sample * sample.detach().cos()).sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"sample": sample, **gradients}


def ran(op):
    """What a call gives, and the ops of fastdl that it ran."""
    result = []
    seen = fastdl.explain(lambda: result.append(op()))
    return result[0], [decision.op for decision in seen.decisions if decision.stage == "call"]


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "processor")]


def sites(model):
    return [site for site in fastdl.plan(model) if site.op == "scaled_dot_product_attention"]


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow(name) if name.startswith("a ") else name for name in MODELS])
def test_use_and_restore(name, fused):
    model, inputs = make(name), inputs_of(name)
    kinds = [type(module.processor) for module in attentions(model)]
    theirs = results(model, inputs)
    assert integration.use(model) is model
    ours, ops = ran(lambda: results(model, inputs))
    assert ops == ["attention"] * len(kinds)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1e-2)
        assert (ours[key] - expected).abs().max() <= 1e-4 * scale, key
    fastdl.restore(model)
    assert [type(module.processor) for module in attentions(model)] == kinds
    again, ops = ran(lambda: results(model, inputs))
    assert not ops and torch.equal(again["sample"], theirs["sample"])


@pytest.mark.parametrize("name", [slow("a conditional UNet"), "DiT", slow("Flux")])
def test_optimize_judges_each(name, fused):
    """Attention alone: the other layers have tests of their own."""
    model, inputs = make(name), inputs_of(name)
    rest = [nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.SiLU, nn.GELU]
    rest += [nn.Dropout, nn.Embedding]
    fastdl.optimize(model, inputs, exclude=rest)
    report = fastdl.report(model)
    assert report.proof.ok and not report.rolled_back
    found = [site for site in report.replaced if site.op == "scaled_dot_product_attention"]
    assert len(found) == len(attentions(model))
    for site in found:
        assert site.route == "fused"
        assert site.pattern in ("Attention", "FluxAttention") and site.after < 1e-4
    assert not ran(lambda: fastdl.restore(model)(**inputs))[1]


def test_a_wrong_attention_is_rolled_back(monkeypatch):
    attention = fastdl.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        fastdl.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attention(*args, **{**kwargs, "scale": 2.0}),
    )
    model, rest = make("Flux"), [nn.Linear, nn.RMSNorm]
    with fastdl.policy("definition"):  # as wrong, and soon
        fastdl.optimize(model, inputs_of("Flux"), include=["*.attn"], exclude=rest)
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    rolled_back = fastdl.report(model).rolled_back
    assert [site.name for site in rolled_back] == names
    assert all("the error is too large" in site.reason for site in rolled_back)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_it(copied, fused):
    model, inputs = integration.use(make("DiT")), inputs_of("DiT")
    twin = copied(model)
    sample, ops = ran(lambda: twin(**inputs).sample)
    assert ops == ["attention"] and torch.equal(sample, model(**inputs).sample)
    assert not ran(lambda: fastdl.restore(twin)(**inputs))[1] and ran(lambda: model(**inputs))[1]


def test_a_processor_that_modules_share():
    """One of them is optimized: the others keep theirs."""
    model = make("PixArt")
    one, other = attentions(model)
    other.processor = one.processor
    fastdl.optimize(model, include=["*.attn1"], exclude=[nn.Linear, nn.Dropout])
    assert fastdl.report(model).replaced and type(other.processor) is not type(one.processor)
    assert "PixArt" in repr(model) and not ran(lambda: other(torch.randn(1, 3, 16)))[1]


def test_the_first_processor(fused):
    """AttnProcessor, with torch's scale, computes what AttnProcessor2_0 does."""
    module = Attention(16, heads=2, dim_head=8, processor=AttnProcessor())
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 1, 5)
    mask[0, :, 3:] = -10000.0
    theirs = module(x, attention_mask=mask)
    ours, ops = ran(lambda: integration.use(module)(x, attention_mask=mask))
    assert ops == ["attention"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_qk": False}, "its scale is 1 and not"),
        ({"qk_norm": "layer_norm"}, "leaves out the norms"),
        ({"processor": SlicedAttnProcessor(1)}, "its SlicedAttnProcessor does not call torch's"),
    ],
)
def test_what_stays(options, reason):
    module = Attention(16, heads=2, dim_head=8, **{"processor": AttnProcessor(), **options})
    (site,) = sites(module)
    assert reason in site.reason
    x = torch.randn(2, 5, 16)
    assert not ran(lambda: integration.use(module)(x))[1]


def test_another_backend_is_honoured(monkeypatch):
    """Chosen later, for the model or for a while."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, inputs = integration.use(make("Flux")), inputs_of("Flux")
    assert ran(lambda: model(**inputs))[1] == ["attention"] * 2
    with attention_dispatch.attention_backend("_native_math"):
        assert not ran(lambda: model(**inputs))[1]
    model.set_attention_backend("_native_math")
    assert not ran(lambda: model(**inputs))[1]
    fastdl.restore(model)
    assert attentions(model)[0].processor._attention_backend == "_native_math"


def test_another_processor_is_honoured():
    model, inputs = integration.use(make("DiT")), inputs_of("DiT")
    attentions(model)[0].set_processor(SlicedAttnProcessor(1))
    assert not ran(lambda: model(**inputs))[1]
    assert type(attentions(fastdl.restore(model))[0].processor) is SlicedAttnProcessor


def test_register_and_unregister():
    model = make("DiT")
    integration.unregister()
    assert not sites(model)
    integration.register()
    integration.register()
    assert [site.reason for site in sites(model)] == [None]


@pytest.mark.slow
def test_compiled_in_one_graph(fused):
    model, inputs = integration.use(make("Flux")), inputs_of("Flux")
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert torch.equal(compiled(**inputs).sample, model(**inputs).sample)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert not any("scaled_dot_product" in name for name in names)
    assert sum("autograd_function_apply" in name for name in names) == 2
