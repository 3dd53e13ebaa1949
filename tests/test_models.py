"""Models that nobody here wrote, tiny and random: what is replaced, and what stays the same."""

import copy

import pytest
import torch
from bench.families import MissingLibrary
from bench.zoo import FAMILIES

import fastdl

# How many sites each op has at the least.
EXPECTED = {
    "gpt2": {"layer_norm": 5, "mlp": 2, "linear": 9, "embedding": 2, "dropout": 1},
    "llama": {
        "rms_norm": 5,
        "gated_mlp": 2,
        "linear": 15,
        "embedding": 1,
        "scaled_dot_product_attention": 2,
    },
    "qwen3": {"rms_norm": 9, "gated_mlp": 2, "linear": 15},
    "gemma2": {"rms_norm": 9, "gated_mlp": 2, "linear": 15},
    "mixtral": {"rms_norm": 5, "linear": 9, "scaled_dot_product_attention": 2},
    "swin": {"layer_norm": 7, "mlp": 2, "linear": 13, "scaled_dot_product_attention": 2},
    "wav2vec2": {"layer_norm": 6, "mlp": 2, "linear": 13, "scaled_dot_product_attention": 2},
    "phi3": {"rms_norm": 5, "gated_mlp": 2, "linear": 9},
    "bert": {"layer_norm": 5, "linear": 20, "embedding": 3},
    "t5": {"rms_norm": 12, "mlp": 4, "linear": 30},
    "t5, gated": {"rms_norm": 12, "gated_mlp": 4, "linear": 30},
    "vit": {"layer_norm": 5, "mlp": 2, "linear": 13, "conv2d": 1},
    "whisper": {"layer_norm": 7, "linear": 17, "conv1d": 2, "activation": 2},
    "clip": {"layer_norm": 10, "mlp": 4, "linear": 26, "conv2d": 1},
    "unet": {"group_norm": 8 + 21, "conv2d": 30, "glu": 4, "layer_norm": 12, "linear": 40},
    "autoencoder of diffusion": {"group_norm": 24 + 10, "conv2d": 25, "linear": 8},
    "dit": {"layer_norm": 5, "linear": 20, "mlp": 2},
    "transformer": {"transformer_encoder_layer": 2},
    "lstm": {"lstm": 1, "embedding": 1, "linear": 1},
    "resnet": {"batch_norm": 4, "conv2d": 2 + 6, "linear": 1},
    "autoencoder": {"conv2d": 2, "conv_transpose2d": 2},
}


def maker(name):
    def make():
        try:
            return FAMILIES[name].small.make()
        except MissingLibrary as missing:
            pytest.skip(str(missing))

    return make


# Who makes it, what it is called with, and what is found in it.
MODELS = {name: (maker(name), FAMILIES[name].small.inputs, EXPECTED[name]) for name in EXPECTED}

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
