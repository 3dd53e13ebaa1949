"""Proof of whole models: wrong rules are found, named and rolled back, and nothing is left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl

WIDTH = 8
X = (2, 6, WIDTH)


class Attention(nn.Module):
    def __init__(self, keep=True):
        super().__init__()
        self.qkv, self.proj, self.keep = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), keep

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        mask = mask if self.keep else ~mask | torch.eye(x.shape[1]).bool()
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Its modules are listed in another order than they are called."""

    def __init__(self, layers=6):
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.final = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


class Detached(nn.LayerNorm):
    """The gradient of its weight is a little off; what it gives is exact."""

    def forward(self, x):
        scale = self.weight + 0.01 * (self.weight - self.weight.detach())
        return F.layer_norm(x, self.normalized_shape, scale, self.bias, self.eps)


def changed(model, edit):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edit(twin)
    return twin


def become(path, cls):
    return lambda model: setattr(model.get_submodule(path), "__class__", cls)


def put(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


class Swapped(nn.Module):
    """Calls the same modules, and subtracts where it should add."""

    def forward(self, x):
        x = x - self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# the first module to differ


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        (put("blocks.4.norm2", "eps", 1e-3), "blocks.4.norm2"),
        (put("blocks.2.mlp.0", "bias", None), "blocks.2.mlp.0"),
        (put("blocks.3.attention", "keep", False), "blocks.3.attention"),
        (lambda m: m.blocks[1].mlp[2].weight[0, 0].add_(1), "blocks.1.mlp.2"),
        (become("blocks.3", Swapped), "blocks.3"),
        (put("blocks.5.mlp", "1", nn.ReLU()), "blocks.5.mlp.1"),
        (put("", "head", nn.Linear(WIDTH, WIDTH, bias=False)), "head"),
        (become("blocks.3.norm1", Detached), "blocks.3.norm1"),
        (lambda m: m.final.weight.requires_grad_(False), "final"),
        (lambda m: m.register_forward_hook(lambda m, i, o: 2 * o), ""),
    ],
)
def test_the_first_module_to_differ_is_named(edit, first):
    model = Decoder()
    proof = fastdl.verify(model, changed(model, edit), torch.randn(X))
    assert not proof.ok and proof.first == first
    assert f"first to differ: {first or '(the model itself)'}" in str(proof)
    assert proof.as_dict()["first"] == first


def test_of_several_the_first_called_and_in_backward_the_last():
    model, x = Decoder(), torch.randn(X)

    def both(edit):
        return lambda m: (edit("blocks.1.norm2")(m), edit("final")(m))

    forward = changed(model, both(lambda path: put(path, "eps", 1e-3)))
    assert fastdl.verify(model, forward, x).first == "blocks.1.norm2"
    backward = changed(model, both(lambda path: become(path, Detached)))
    assert fastdl.verify(model, backward, x).first == "final"
    assert fastdl.verify(model, copy.deepcopy(model), x).first is None
