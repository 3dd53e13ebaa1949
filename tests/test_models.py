"""Models that nobody here wrote, tiny and random: what is replaced, and what stays the same."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH, WORDS = 32, 64


def tokens(*shape):
    return torch.randint(3, WORDS, shape)


def labelled(**more):
    ids = tokens(2, 9)
    return {"input_ids": ids, "labels": ids, **more}


def of_transformers(kind, config, inputs, **sizes):
    """A model of transformers from its configuration: nothing is downloaded."""

    def make():
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))

    return make, inputs


def of_diffusers(kind, inputs, **sizes):
    def make():
        return getattr(pytest.importorskip("diffusers"), kind)(**sizes)

    return make, inputs


def images(*shape):
    return lambda: torch.randn(shape)


LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4}
T5 = {
    "d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": WORDS,
    "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER = {
    "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": WORDS, "max_source_positions": 32, "num_mel_bins": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4,
    "attention_head_dim": 4,
}  # fmt: skip
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8,
    "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "num_embeds_ada_norm": 10,
}  # fmt: skip


class Residual(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Words(nn.Module):
    """A language model on an LSTM."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(WORDS, 16), nn.LSTM(16, 24, 2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(24, WORDS)

    def forward(self, ids):
        logits = self.head(self.drop(self.lstm(self.words(ids))[0]))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Sigmoid(),
    )  # fmt: skip


# Who makes it, what it is called with, and how many sites each op has at the least.
MODELS = {
    "gpt2": (
        *of_transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            labelled,
            n_layer=2,
            n_embd=WIDTH,
            n_head=4,
            vocab_size=WORDS,
            n_positions=32,
        ),
        {"layer_norm": 5, "mlp": 2, "linear": 9, "embedding": 2, "dropout": 1},
    ),
    "llama": (
        *of_transformers("LlamaForCausalLM", "LlamaConfig", labelled, **LLAMA),
        {
            "rms_norm": 5,
            "gated_mlp": 2,
            "linear": 15,
            "embedding": 1,
            "scaled_dot_product_attention": 2,
        },
    ),
    "qwen3": (
        *of_transformers("Qwen3ForCausalLM", "Qwen3Config", labelled, **LLAMA),
        {"rms_norm": 9, "gated_mlp": 2, "linear": 15},
    ),
    "gemma2": (
        *of_transformers("Gemma2ForCausalLM", "Gemma2Config", labelled, **LLAMA),
        {"rms_norm": 9, "gated_mlp": 2, "linear": 15},
    ),
    "mixtral": (
        *of_transformers("MixtralForCausalLM", "MixtralConfig", labelled, **LLAMA),
        {"rms_norm": 5, "linear": 9, "scaled_dot_product_attention": 2},
    ),
    "swin": (
        *of_transformers(
            "SwinModel",
            "SwinConfig",
            images(2, 3, 16, 16),
            image_size=16,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=2,
        ),
        {"layer_norm": 7, "mlp": 2, "linear": 13, "scaled_dot_product_attention": 2},
    ),
    "wav2vec2": (
        *of_transformers(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            images(2, 100),
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            **BERT,
        ),
        {"layer_norm": 6, "mlp": 2, "linear": 13, "scaled_dot_product_attention": 2},
    ),
    "phi3": (
        *of_transformers("Phi3ForCausalLM", "Phi3Config", labelled, **LLAMA),
        {"rms_norm": 5, "gated_mlp": 2, "linear": 9},
    ),
    "bert": (
        *of_transformers("BertForMaskedLM", "BertConfig", labelled, vocab_size=WORDS, **BERT),
        {"layer_norm": 5, "linear": 20, "embedding": 3},
    ),
    "t5": (
        *of_transformers("T5ForConditionalGeneration", "T5Config", labelled, **T5),
        {"rms_norm": 12, "mlp": 4, "linear": 30},
    ),
    "t5, gated": (
        *of_transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            labelled,
            feed_forward_proj="gated-gelu",
            **T5,
        ),
        {"rms_norm": 12, "gated_mlp": 4, "linear": 30},
    ),
    "vit": (
        *of_transformers(
            "ViTForImageClassification",
            "ViTConfig",
            lambda: {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])},
            **BERT,
            **IMAGE,
        ),
        {"layer_norm": 5, "mlp": 2, "linear": 13, "conv2d": 1},
    ),
    "whisper": (
        *of_transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            lambda: {"input_features": torch.randn(2, 8, 64), "labels": tokens(2, 5)},
            **WHISPER,
        ),
        {"layer_norm": 7, "linear": 17, "conv1d": 2, "activation": 2},
    ),
    "clip": (
        *of_transformers(
            "CLIPModel",
            "CLIPConfig",
            lambda: {
                "input_ids": tokens(2, 7),
                "pixel_values": torch.randn(2, 3, 16, 16),
                "return_loss": True,
            },
            text_config={**BERT, "vocab_size": WORDS, "eos_token_id": 2, "bos_token_id": 1},
            vision_config={**BERT, **IMAGE},
        ),
        {"layer_norm": 10, "mlp": 4, "linear": 26, "conv2d": 1},
    ),
    "unet": (
        *of_diffusers(
            "UNet2DConditionModel",
            lambda: {
                "sample": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor(3),
                "encoder_hidden_states": torch.randn(2, 5, 16),
            },
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **UNET,
        ),
        {"group_norm": 8 + 21, "conv2d": 30, "glu": 4, "layer_norm": 12, "linear": 40},
    ),
    "autoencoder of diffusion": (
        *of_diffusers(
            "AutoencoderKL",
            images(1, 3, 8, 8),
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        {"group_norm": 24 + 10, "conv2d": 25, "linear": 8},
    ),
    "dit": (
        *of_diffusers(
            "DiTTransformer2DModel",
            lambda: {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor([3, 4]),
                "class_labels": torch.tensor([1, 2]),
            },
            **DIT,
        ),
        {"layer_norm": 5, "linear": 20, "mlp": 2},
    ),
    "transformer": (encoder, images(2, 6, WIDTH), {"transformer_encoder_layer": 2}),
    "lstm": (Words, lambda: tokens(3, 7), {"lstm": 1, "embedding": 1, "linear": 1}),
    "resnet": (resnet, images(2, 3, 12, 12), {"batch_norm": 4, "conv2d": 2 + 6, "linear": 1}),
    "autoencoder": (autoencoder, images(2, 3, 8, 8), {"conv2d": 2, "conv_transpose2d": 2}),
}

QUICK = {"llama", "bert", "transformer", "lstm", "resnet", "autoencoder"}


def marked(name):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in MODELS])
def test_model(name, device):
    make, inputs, expected = MODELS[name]
    model = make().to(device).train()
    x = move(inputs(), device)
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]

    assert fastdl.optimize(model) is model
    report = fastdl.report(model)
    found = {op: sum(site.op == op for site in report.replaced) for op in expected}
    assert all(found[op] >= count for op, count in expected.items()), f"{found}\n{report}"
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())

    proof = fastdl.verify(original, model, x)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    assert len(proof.gradients) >= len(parameters)

    fastdl.restore(model)
    assert [type(m) for m in model.modules()] == classes
    for a, b in zip(values(model, x), values(original, x), strict=True):
        assert torch.equal(a, b)


def move(x, device):
    if isinstance(x, dict):
        return {key: move(value, device) for key, value in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x


def values(model, x):
    model.eval()
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(x)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return [out if isinstance(out, torch.Tensor) else out.mode()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_optimize_proves_real_models_by_itself(name, device):
    make, inputs, _ = MODELS[name]
    model = make().to(device)
    fastdl.optimize(model, example_inputs=move(inputs(), device))
    report = fastdl.report(model)
    assert report.proof.ok
    assert not report.rolled_back
