"""Small models of every kind that the optimizer changes, and what a run of one gives."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastdl


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return x + self.act(self.fc(self.norm(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def mlp():
    return nn.Sequential(
        nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU()
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Kind(NamedTuple):
    """A model, the shape of its input, and those of its parameters that a change is made to."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]

    def targets(self, model):
        return [(model.get_submodule(path), name) for path, name in self.parameters]


ROWS = (2, 3, 8)
KINDS = {
    "modules": Kind(Modules, ROWS, (("fc", "weight"), ("norm", "weight"))),
    "sequential": Kind(mlp, ROWS, (("0", "weight"), ("3", "weight"))),
    "attention": Kind(
        Attention, ROWS, (("attn", "in_proj_weight"),)
    ),
    "encoder": Kind(
        encoder, ROWS, (("self_attn", "in_proj_weight"), ("linear1", "weight"), ("norm1", "weight"))
    ),
    "lstm": Kind(Recurrent, ROWS, (("rnn", "weight_hh_l0"),)),
    "conv": Kind(convolution, (2, 3, 5, 5), (("0", "weight"), ("1", "weight"))),
}  # fmt: skip


def results(model, x):
    """Output, gradients and buffers of a run."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = x.to(dtype, copy=True).requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape))
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d {name}"] = parameter.grad
    model.zero_grad()
    return found | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def classes(model):
    """The names of each module's class and those under it: torch makes some classes on its own."""
    return [[str(cls) for cls in type(module).__mro__] for module in model.modules()]


def assert_close(found, expected):
    # 3 units in the last place of bfloat16, in which torch rounds between the parts of an op
    wide = {"rtol": 0.025, "atol": 0.025} if expected["y"].dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **wide or {"rtol": 1e-4, "atol": 1e-5})


@pytest.fixture(params=["definition", pytest.param("fused", marks=pytest.mark.slow)])
def form(request):
    """The kernels are slow to interpret, and what lies around them is the same for both."""
    with fastdl.policy(request.param):
        yield


def cases(pairs, is_long):
    """Pairs of a kind and what is done with it, in both forms; what takes long is slow.

    Kernels of attention and recurrence take long to interpret: their own tests have them.
    """
    found, slow = [], [pytest.mark.slow]
    for kind, what in pairs:
        marks = slow if is_long(kind, what) else []
        found.append(pytest.param(kind, what, "definition", marks=marks))
        if kind in ("modules", "sequential", "conv"):
            found.append(pytest.param(kind, what, "fused", marks=slow))
    return found
