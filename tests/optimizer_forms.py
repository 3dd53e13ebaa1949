"""Options of optimizers, and parameters that take steps."""

import pytest
import torch
from torch import nn

from fastdl.optim import SGD, AdamW

# past a block, one element, none, whole blocks
SHAPES = [(3, 50), (7,), (0,), (16, 16)]

ADAMW_OPTIONS = [
    {},
    {"amsgrad": True, "eps": 1e-3},
    {"maximize": True, "weight_decay": 0.3},
    {"fused": True, "weight_decay": 0.0},
    {"fused": True, "amsgrad": True, "maximize": True},
    {"capturable": True, "lr": torch.tensor(3e-2), "betas": (0.5, 0.9)},
    {"foreach": True, "betas": (0.0, 0.5)},
]
SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.5, "fused": True, "lr": torch.tensor(3e-2)},
]
BOTH = [
    *(pytest.param(AdamW, options, id=f"AdamW-{i}") for i, options in enumerate(ADAMW_OPTIONS)),
    *(pytest.param(SGD, options, id=f"SGD-{i}") for i, options in enumerate(SGD_OPTIONS)),
]
CLASSES = pytest.mark.parametrize("cls", [AdamW, SGD])


def theirs(cls, params, **options):
    """torch's optimizer for the same options. It is not capturable on a CPU."""
    options.pop("capturable", None)
    return getattr(torch.optim, cls.__name__)(params, **options)


def made(device="cpu", dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(v.to(device, dtype)) for v in values]


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def take_steps(optimizer, params, seeds, scale=1.0):
    for seed in seeds:
        give_gradients(params, seed, scale)
        optimizer.step()


def distance(params, expected):
    """The largest of the distances of tensors, relative to their largest elements."""
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(params, expected, strict=True)
    ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a.numel())


def same(params, expected):
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_states(state, expected, **tolerance):
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for key, values in expected["state"].items():
        assert list(state["state"][key]) == list(values)
        for name, value in values.items():
            torch.testing.assert_close(state["state"][key][name], value, **tolerance)
