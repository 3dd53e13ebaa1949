"""Convolutions: who computes them, and how models write them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.tuned import Config, forced

LAST = torch.channels_last


def drawn(*shapes):
    return [torch.randn(shape) / max(1, len(shape) - 1) for shape in shapes]


def kernels(call):
    return [launch.kernel.name for launch in fastdl.explain(call).launches]


def fused_calls(gm):
    nodes = gm.graph.nodes
    return [n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl.")]


def compiled(function, kept):
    """The function compiled; `kept` takes the names of the fused calls of its graph."""

    def keep(gm, given):
        fastdl.backend(gm, given)
        kept.extend(n.target.__name__ for n in fused_calls(gm))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=keep, fullgraph=True)


def gradients(function, x, parameters):
    y = function(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class ConvNeXt(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        h = self.reduce(F.gelu(self.expand(h)))
        return x + (self.scale * h).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Activation after the sum, and in another layer before its convolution."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.third = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = F.relu(self.second(F.silu(self.first(x))) + x)
        return x + self.third(F.relu(x))


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, 2, 1), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


MODELS = [
    (ConvNeXt, (2, 8, 7, 6), ["conv2d", "layer_norm", "linear", "linear"]),
    (Residual, (2, 8, 7, 6), ["conv2d", "conv2d", "activation", "conv2d"]),
    (autoencoder, (2, 3, 8, 12), ["conv2d"] * 2 + ["conv_transpose2d"] * 2),
]


@pytest.mark.parametrize(
    ("make", "shape", "expected"), MODELS, ids=lambda m: getattr(m, "__name__", str(m))
)
def test_is_found_in_models(make, shape, expected):
    model, x, kept = make(), torch.randn(shape, requires_grad=True), []
    parameters = list(model.parameters())
    found = gradients(compiled(model, kept), x, parameters)
    assert kept == expected
    assert_same(found, gradients(model, x, parameters))


@pytest.mark.parametrize("last", [False, True])
def test_modules_are_replaced(last):
    model, x = autoencoder(), torch.randn(2, 3, 8, 12)
    if last:
        model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    original, keys = copy.deepcopy(model), list(model.state_dict())
    fastdl.optimize(model, (x,))
    sites = fastdl.report(model)
    assert not sites.rolled_back and [site.pattern for site in sites.replaced] == [
        "Conv2d + ReLU", "Conv2d + LeakyReLU", "ConvTranspose2d + ReLU",
        "ConvTranspose2d + Sigmoid",
    ]  # fmt: skip
    assert list(model.state_dict()) == keys
    with fastdl.policy("fused", on_fallback="error"):
        seen = fastdl.explain(model, x)
        assert [d.op for d in seen.decisions if d.stage == "call"] == ["conv"] * 4
        y = model(x)
    torch.testing.assert_close(y, original(x), rtol=1e-5, atol=1e-5)
    assert y.stride() == original(x).stride()
    assert type(fastdl.restore(model)[4]) is nn.ConvTranspose2d


def test_output_size_of_a_transposed_module():
    ours, torchs = (m.ConvTranspose2d(4, 6, 3, stride=2) for m in (fastdl.nn, nn))
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for size in ([11, 12], (12, 11)):
        torch.testing.assert_close(ours(x, size), torchs(x, size))


# who computes


def test_the_kernel_is_chosen_by_shape_and_format(fused):
    x, w, one, own = drawn((2, 20, 6, 5), (12, 20, 3, 3), (12, 20, 1, 1), (20, 1, 3, 3))
    relu = {"activation": "relu"}
    assert kernels(lambda: FF.conv2d(x[:, :8], w[:, :8], **relu)) == ["finish_fwd"]
    assert kernels(lambda: FF.conv2d(x[:, :8], w[:, :8])) == []
    assert kernels(lambda: FF.conv2d(x, own, groups=20, **relu)) == ["depthwise_fwd"]
    assert kernels(lambda: FF.conv2d(x.contiguous(memory_format=LAST), one, **relu)) == [
        "linear_fwd"
    ]
    assert kernels(lambda: FF.conv2d(x, one, **relu)) == ["conv_fwd"]


@pytest.mark.parametrize("variant", ["implicit", "vendor", "torch"])
def test_a_measurement_decides(variant):
    x, w = drawn((2, 20, 6, 5), (12, 20, 3, 3))
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}
    config = Config(blocks if variant == "implicit" else {}, variant=variant)
    with forced("conv_nchw", torch.float32, (24, 12, 20, 9), config):
        (launch,) = fastdl.explain(FF.conv2d, x, w, activation="relu").launches
        y = FF.conv2d(x, w, activation="relu")
    assert launch.kernel.name == ("conv_fwd" if variant == "implicit" else "finish_fwd")
    assert variant != "implicit" or launch.config["BLOCK_M"] == 64
    torch.testing.assert_close(y, F.relu(F.conv2d(x, w)), rtol=1e-4, atol=1e-4)


def test_a_residual_of_another_dtype_promotes():
    x, w, r = drawn((2, 3, 5, 5), (4, 3, 3, 3), (2, 4, 3, 3))
    y = FF.conv2d(x.bfloat16(), w.bfloat16(), residual=r, activation="silu")
    assert y.dtype == torch.float32
    wanted = F.silu(F.conv2d(x.bfloat16(), w.bfloat16()) + r)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


# causal convolutions


def mamba(x, w, bias, act):
    width = w.shape[-1]
    return act(F.conv1d(x, w, bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[-1]])


class Mixer(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.act = nn.SiLU()

    def forward(self, x):
        length = x.shape[1]
        return self.act(self.conv1d(self.inner(x).transpose(1, 2))[..., :length])


def test_a_causal_convolution_is_found():
    model, x, kept = Mixer(), torch.randn(2, 9, 6, requires_grad=True), []
    parameters = list(model.parameters())
    found = gradients(compiled(model, kept), x, parameters)
    assert kept == ["linear", "causal_conv1d"]
    assert_same(found, gradients(model, x, parameters))


@pytest.mark.parametrize("padding", [2, 4])
def test_other_paddings_are_left_alone(padding):
    x, w, kept = *drawn((2, 6, 9), (6, 1, 4)), []
    compiled(lambda x: F.conv1d(x, w, None, padding=padding, groups=6)[..., :8], kept)(x)
    assert kept == ["conv1d"]


@pytest.mark.parametrize("shape", [(6, 4), (6, 1, 4)])
def test_causal_is_the_start_of_a_padded_convolution(shape, fused):
    x, w, b = drawn((2, 6, 9), shape, (6,))
    y = FF.causal_conv1d(x, w, b, activation="silu")
    assert_same([y], [mamba(x, w.view(6, 1, 4), b, F.silu)])
    # a sequence in two pieces, the second of which is told the end of the first
    pieces = x[..., :5], x[..., 5:]
    state = pieces[0][..., -3:]
    second = FF.causal_conv1d(pieces[1], w, b, activation="silu", initial_states=state)
    assert_same([second], [y[..., 5:]])


def test_causal_keeps_the_order_in_memory_when_compiled(fused):
    x = torch.randn(2, 9, 6, requires_grad=True)
    w, b = (t.requires_grad_() for t in drawn((6, 4), (6,)))

    def run(x):
        return FF.causal_conv1d(x.transpose(1, 2), w, b, activation="silu")

    torch._dynamo.reset()
    ours = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert run(x).stride() == ours(x).stride() == (54, 1, 6)
    assert_same(gradients(ours, x, [w, b]), gradients(run, x, [w, b]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": (6, 2, 4)}, "(6, 2, 4)"),
        ({"initial_states": (2, 6, 4)}, "(2, 6, 3)"),
        ({"x": (6, 9)}, "(6, 9)"),
    ],
)
def test_causal_says_what_is_wrong(change, says):
    shapes = {"x": (2, 6, 9), "weight": (6, 4), **change}
    call = partial(FF.causal_conv1d, **{name: torch.ones(s) for name, s in shapes.items()})
    with pytest.raises(RuntimeError) as error:
        call()
    assert says in str(error.value)
