"""Whole models, compiled with the backend: what is fused, and that all gradients stay the same."""

import copy

import pytest
import torch
from torch import is_tensor, nn

import fastdl
from graph_forms import Compiled
from test_models import MODELS, move

# How many calls of each op the graphs have at the least, in training.
LLAMA = {
    "embedding": 1, "rms_norm": 5, "linear": 8, "apply_rotary_emb": 4, "gated_mlp": 2,
    "scaled_dot_product_attention": 2, "linears": 2,
}  # fmt: skip
FUSED = {
    "gpt2": {
        "embedding": 2, "layer_norm": 5, "linear": 9, "scaled_dot_product_attention": 2,
        "cross_entropy": 1,
    },
    "llama": LLAMA,
    "qwen3": {**LLAMA, "rms_norm": 9},
    "gemma2": {
        "embedding": 1, "rms_norm": 9, "linear": 8, "apply_rotary_emb": 4, "gated_mlp": 2,
        "scaled_dot_product_attention": 2,
    },
    "mixtral": {
        "embedding": 1, "rms_norm": 5, "linear": 10, "apply_rotary_emb": 4, "glu": 2,
        "scaled_dot_product_attention": 2, "softmax": 2,
    },
    "swin": {"layer_norm": 7, "linear": 13, "conv2d": 1, "scaled_dot_product_attention": 2},
    "wav2vec2": {
        "conv1d": 3, "group_norm": 1, "layer_norm": 3, "linear": 7,
        "scaled_dot_product_attention": 1,
    },
    "phi3": {
        "embedding": 1, "rms_norm": 5, "linear": 8, "apply_rotary_emb": 4,
        "scaled_dot_product_attention": 2,
    },
    "bert": {
        "embedding": 3, "layer_norm": 6, "linear": 13, "scaled_dot_product_attention": 2,
    },
    "t5": {"embedding": 4, "rms_norm": 12, "linear": 30, "scaled_dot_product_attention": 6},
    "t5, gated": {"embedding": 4, "rms_norm": 12, "linear": 24},
    "vit": {"conv2d": 1, "layer_norm": 5, "linear": 13, "scaled_dot_product_attention": 2},
    "whisper": {
        "conv1d": 2, "embedding": 2, "layer_norm": 7, "linear": 16,
        "scaled_dot_product_attention": 3,
    },
    "clip": {
        "conv2d": 1, "embedding": 3, "layer_norm": 10, "linear": 26,
        "scaled_dot_product_attention": 4, "cross_entropy": 2,
    },
    "unet": {
        "linear": 50, "conv2d": 33, "group_norm": 21, "layer_norm": 12, "glu": 4,
        "scaled_dot_product_attention": 8,
    },
    "autoencoder of diffusion": {
        "conv2d": 28, "group_norm": 24, "linear": 8, "scaled_dot_product_attention": 2,
    },
    "dit": {"conv2d": 1, "linear": 22, "layer_norm": 5, "scaled_dot_product_attention": 2},
    "transformer": {"multi_head_attention_forward": 2, "layer_norm": 4, "linear": 4},
    "lstm": {"embedding": 1, "lstm": 1, "linear_cross_entropy": 1},
    "resnet": {"conv2d": 6, "batch_norm": 6, "linear": 1},
    "autoencoder": {"conv2d": 2, "conv_transpose2d": 2},
}  # fmt: skip


def prove(model, x, **options):
    """Compile a model and hold it against itself. Returns the compiled one."""
    compiled = Compiled(copy.deepcopy(model), **options)
    proof = fastdl.verify(model, compiled.function, x)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    assert len(proof.gradients) >= len(list(model.parameters()))
    return compiled


def made(name, device):
    make, inputs, _ = MODELS[name]
    return make().to(device), move(inputs(), device)


def called(compiled):
    """The names of everything that stands in any of the graphs."""
    nodes = [node for gm in compiled.graphs for node in gm.graph.nodes]
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes]


def check_counts(compiled, expected):
    found = compiled.replaced
    assert all(found[op] >= count for op, count in expected.items()), f"{found}\n{expected}"


def quick(*names):
    """All models, where these are quick."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", quick("bert", "lstm"))
def test_training(name, device):
    model, x = made(name, device)
    check_counts(prove(model.train(), x), FUSED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_training_with_inductor(name, device):
    model, x = made(name, device)
    check_counts(prove(model.train(), x, then="inductor"), FUSED[name])


# What is there without gradients: torch computes a transformer's layer in one call then.
INFERENCE = {
    **{name: {op: n for op, n in ops.items() if op != "batch_norm"} for name, ops in FUSED.items()},
    "transformer": {"multi_head_attention_forward": 2},
    "t5, gated": {**FUSED["t5, gated"], "gated_mlp": 4},
}


@pytest.mark.parametrize("name", quick("resnet"))
def test_inference(name, device):
    """Dropout is gone, and BatchNorm in the convolution."""
    model, x = made(name, device)
    compiled = Compiled(copy.deepcopy(model.eval()))
    with torch.no_grad():
        compiled(**x) if isinstance(x, dict) else compiled(x)
    check_counts(compiled, INFERENCE[name])
    assert not [call for call in called(compiled) if "dropout" in call or "batch_norm" in call]
    proof = fastdl.verify(model, compiled.function, x)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    assert any("without gradients" in name for name in proof.outputs)


@pytest.mark.parametrize("name", ["transformer", "resnet", "autoencoder"])
def test_training_on_the_kernels(name, device, fused):
    model, x = made(name, device)
    check_counts(prove(model.train(), x), FUSED[name])


class Loss(nn.Module):
    """What a step of training needs of a language model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).loss


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5"))]
)
def test_logits_that_nobody_reads_are_never_whole(name, device, fused):
    model, x = made(name, device)
    compiled = prove(Loss(model.train()), x)
    assert compiled.replaced["linear_cross_entropy"] == 1
    assert "cross_entropy" not in called(compiled)
    rows, words = x["labels"].numel(), model.config.vocab_size
    sizes = [value.numel() for value in values(compiled) if value.dtype.is_floating_point]
    assert rows * words not in sizes


def values(compiled):
    """Every tensor that the graphs compute, as fakes."""
    for gm in compiled.graphs:
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr") and "example_value" in node.meta:
                yield from (
                    t
                    for t in torch.utils._pytree.tree_leaves(node.meta["example_value"])
                    if is_tensor(t)
                )
