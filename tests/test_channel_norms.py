"""Norms of channels: running statistics, layouts, launches, and the models that they stand in."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.contract.evaluate import Allocated
from fastdl.tuned import Device

H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)


dry_run = sys.modules["fastdl.ops._launch"].recording


def with_channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def fused_calls(function, *args):
    """The names of fastdl's ops in the graph of a function, and how often each is called."""
    kept = []

    def keep(gm, given):
        fastdl.backend(gm, given)
        kept.extend(n for n in gm.graph.nodes if "fastdl" in getattr(n.target, "__module__", ""))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=keep, fullgraph=True)(*args), kept


# Running statistics.

BATCH_NORMS = [
    (nn.BatchNorm1d, (6, 3), {}),
    (nn.BatchNorm1d, (4, 3, 5), {"momentum": None}),
    (nn.BatchNorm2d, (4, 3, 5, 2), {"momentum": 0.3, "eps": 1e-2}),
    (nn.BatchNorm2d, (4, 3, 5, 2), {"affine": False, "momentum": None}),
    (nn.BatchNorm3d, (2, 3, 2, 2, 3), {"track_running_stats": False}),
]


@pytest.mark.parametrize(("cls", "shape", "options"), BATCH_NORMS, ids=str)
def test_running_statistics_are_those_of_torch(cls, shape, options, fused, device):
    torchs = cls(3, **options).to(device)
    ours = getattr(fastdl.nn, cls.__name__)(3, **options).to(device)
    ours.load_state_dict(torchs.state_dict())
    for step in range(3):
        x = torch.randn(shape, device=device) * (step + 1) + step
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-5)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    ours.eval(), torchs.eval()
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(copy.deepcopy(ours)(x), torchs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), before)


def test_running_statistics_of_16_bits(fused, device):
    x = torch.randn(4, 3, 5, device=device, dtype=torch.bfloat16)
    mean, var = (torch.ones(3, device=device, dtype=torch.bfloat16) for _ in range(2))
    FF.batch_norm(x, mean, var, training=True, momentum=0.5)
    rows = x.float().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.float(), 0.5 + 0.5 * rows.mean(1), atol=0.01, rtol=0.01)
    torch.testing.assert_close(var.float(), 0.5 + 0.5 * rows.var(1), atol=0.01, rtol=0.01)


def test_running_statistics_are_written_in_a_compiled_step():
    def step(x, mean, var):
        return FF.batch_norm(x, mean, var, training=True, activation="relu").square().sum()

    x = torch.randn(4, 3, 5, requires_grad=True)
    found = []
    torch._dynamo.reset()
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        mean, var = torch.zeros(3), torch.ones(3)
        with fastdl.policy("fused", on_fallback="error"):
            loss = run(x, mean, var)
            found.append([loss.detach(), *torch.autograd.grad(loss, x), mean, var])
    assert found[0][2].abs().min() > 0
    torch.testing.assert_close(*found)


def test_statistics_of_the_definition_are_those_of_the_kernels(device):
    x, found = torch.randn(4, 3, 5, device=device), []
    for mode in ("fused", "definition"):
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        with fastdl.policy(mode):
            FF.batch_norm(x, mean, var, training=True, momentum=0.3)
        found.append([mean, var])
    torch.testing.assert_close(*found)


def test_instance_norm_tracks_in_torch(device):
    x = torch.randn(4, 3, 5, device=device)
    found = []
    for norm in (FF.instance_norm, F.instance_norm):
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        found.append([norm(x, mean, var), mean, var])
    torch.testing.assert_close(*found)
    seen = fastdl.explain(FF.instance_norm, x, mean, var)
    assert not seen.fused and "torch has this option" in str(seen)


def test_checkpoints_of_torch_load(device):
    def model(nn):
        return torch.nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))

    torchs, ours = model(nn).to(device), model(fastdl.nn).to(device)
    x = torch.randn(2, 4, 3, 3, device=device)
    torchs(x)
    assert not ours.load_state_dict(torchs.state_dict()).missing_keys
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-5, atol=1e-5)


# Layouts and dtypes.

CALLS = {
    "group_norm": lambda x, w, **o: FF.group_norm(x, 2, w, w, **o),
    "batch_norm": lambda x, w, **o: FF.batch_norm(x, None, None, w, w, True, **o),
    "instance_norm": lambda x, w, **o: FF.instance_norm(x, weight=w, bias=w, **o),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 20, 60), (2, 20, 6, 10), (2, 20, 3, 4, 5)], ids=len)
def test_channels_last_is_not_copied(name, shape, fused, device):
    x = with_channels_last(torch.randn(shape, device=device)).requires_grad_()
    w = torch.ones(20, device=device)
    with Allocated() as allocated:
        y = CALLS[name](x, w, activation="silu", residual=x)
    assert y.stride() == x.stride()
    assert x.nbytes <= allocated.bytes < 1.5 * x.nbytes
    dy = with_channels_last(torch.randn(shape, device=device))
    with Allocated() as allocated:
        (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.stride() == x.stride()
    # the residual's gradient, and the sum of both
    assert allocated.bytes < 3.5 * x.nbytes


@pytest.mark.parametrize("name", CALLS)
def test_other_layouts_give_the_same(name, fused, device):
    x, w = torch.randn(2, 5, 4, 6, device=device), torch.randn(6, device=device)
    permuted = x.permute(0, 3, 1, 2).transpose(2, 3)
    torch.testing.assert_close(
        CALLS[name](permuted, w, residual=x.permute(0, 3, 2, 1)),
        CALLS[name](permuted.contiguous(), w, residual=x.permute(0, 3, 2, 1).contiguous()),
    )


@pytest.mark.parametrize("name", CALLS)
def test_parameters_of_another_dtype(name, fused, device):
    x = torch.randn(3, 6, 20, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(6, device=device, requires_grad=True)
    y = CALLS[name](x, w, activation="silu")
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    with fastdl.policy("definition"):
        truth = CALLS[name](x64, w64, activation="silu")
    expected = torch.autograd.grad(truth.square().sum(), (x64, w64))
    for got, wanted in zip((y, dx, dw), (truth, *expected), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=0.1, rtol=0.05)


# Launches.


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_one_sample_fills_a_device(name, last):
    x = torch.empty(1, 64, 256, 256, dtype=torch.bfloat16, device="meta")
    x = (with_channels_last(x) if last else x).requires_grad_()
    w = torch.empty(64, device="meta", requires_grad=True)
    with dry_run(H200) as launches, fastdl.policy("fused"):
        y = CALLS[name](x, w, activation="silu")
        torch.autograd.grad(y, (x, w), torch.empty_like(y))
    assert len(launches) == 6
    passes = [launch for launch in launches if "merge" not in launch.kernel.name]
    assert [launch.kernel.name.split("_")[1] for launch in passes] == [
        "moments",
        "fwd",
        "sums",
        "dx",
    ]
    assert all(launch.grid[0] >= 4 * H200.sms for launch in passes)


def test_small_groups_are_read_once():
    x = torch.empty(16, 1280, 8, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with dry_run(H200) as launches, fastdl.policy("fused"):
        y = FF.group_norm(x, 32, activation="silu")
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert [launch.kernel.name for launch in launches] == ["groupnorm_fwd", "groupnorm_bwd"]


# Spellings.

WRITTEN = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: x * torch.sigmoid(x),
    ("leaky_relu", 0.3): lambda x: F.leaky_relu(x, 0.3),
    ("hardtanh", 0.0, 6.0): F.relu6,
}


@pytest.mark.parametrize("name", CALLS)
def test_activations_and_residuals_are_found(name):
    x, r, w = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.ones(4)
    norm = {
        "group_norm": lambda: F.group_norm(x, 2, w),
        "batch_norm": lambda: F.batch_norm(x, None, None, w, training=True),
        "instance_norm": lambda: F.instance_norm(x, weight=w),
    }[name]
    ways = [(act, adds) for act in WRITTEN for adds in (False, True)[: 1 + (name[0] != "i")]]

    def all_of_them():
        return [WRITTEN[act](norm() + r if adds else norm()) for act, adds in ways]

    found, calls = fused_calls(all_of_them)
    assert [call.target.__name__ for call in calls] == [name] * len(ways)
    for call, (act, adds) in zip(calls, ways, strict=True):
        assert call.kwargs.get("activation") == act
        assert ("residual" in call.kwargs) == adds
    for got, wanted in zip(found, all_of_them(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class BasicBlock(nn.Module):
    """Two convolutions with norms, a shortcut with its own, and activations in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class ResnetBlock(nn.Module):
    """Group norms with SiLU around convolutions, scaled and shifted by an embedding of time."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.time, self.nonlinearity = nn.Linear(5, 16), nn.SiLU()

    def forward(self, x, time):
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        scale, shift = self.time(self.nonlinearity(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(self.nonlinearity(h))


def check_same(model, inputs, optimized):
    """Outputs, gradients and buffers of both models."""
    found = []
    for one in (model, optimized):
        given = [x.clone().requires_grad_() for x in inputs]
        y = one(*given)
        wanted = [*given, *one.parameters()]
        found.append([y, *torch.autograd.grad(y.sin().sum(), wanted), *one.buffers()])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_resnet_block(training, last):
    model = BasicBlock().train(training)
    x = torch.randn(2, 4, 6, 6)
    x = with_channels_last(x) if last else x
    _, calls = fused_calls(copy.deepcopy(model), x)
    # given statistics are a matter of the convolution before
    norms = [call for call in calls if call.target is FF.batch_norm or "norm" in call.kwargs]
    assert len(norms) == 3 and len(calls) == (6 if training else 3)
    assert [call.kwargs.get("activation") for call in norms] == ["relu", None, "relu"]
    assert ["residual" in call.kwargs for call in norms] == [False, False, True]
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    check_same(model, [x], torch.compile(twin, backend=fastdl.backend, fullgraph=True))


def test_diffusion_block():
    model, inputs = ResnetBlock(), [torch.randn(2, 8, 6, 6), torch.randn(2, 5)]
    _, calls = fused_calls(model, *inputs)
    norms = [call for call in calls if call.target is FF.group_norm]
    assert [call.kwargs["activation"] for call in norms] == ["silu", "silu"]
    assert ["scale" in call.kwargs for call in norms] == [False, True]
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    check_same(model, inputs, torch.compile(twin, backend=fastdl.backend, fullgraph=True))


# Modules.


def test_modules_are_replaced_and_restored(device):
    model = BasicBlock().to(device).eval()
    x = torch.randn(2, 4, 6, 6, device=device)
    expected = model(x)
    fastdl.optimize(model, example_inputs=(x,))
    assert type(model.bn1) is fastdl.nn.BatchNorm2d
    assert type(model.downsample[1]) is fastdl.nn.BatchNorm2d
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(fastdl.restore(model).bn1) is nn.BatchNorm2d


def test_neighbours_in_a_sequential_are_one_op(fused, device):
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.SiLU(), nn.BatchNorm2d(4)
    ).to(device)
    twin, x = copy.deepcopy(model), torch.randn(3, 4, 5, 5, device=device)
    fastdl.optimize(model)
    seen = fastdl.explain(copy.deepcopy(model), x)
    assert [d.op for d in seen.decisions if d.stage == "call"] == [
        "batch_norm", "group_norm", "batch_norm",
    ]  # fmt: skip
    for _ in range(2):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
