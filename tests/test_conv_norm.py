"""Convolutions with the norms and activations around them, as models write them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd  # noqa: PLC2701 - torch has no other

import fastdl
import fastdl.functional as FF
from fastdl.contract import DTYPES, Case, Maker
from fastdl.contract.check_values import guarded_allocations
from fastdl.contract.conv import STRIDED, UP, call
from fastdl.contract.evaluate import FORWARD, LIBRARY_OPS, LibraryCalls, compare, run
from fastdl.tuned import Config, forced

# What computes each of these in the interpreter, where nothing needs a gradient.
ROUTES = {
    "planes": (["finish_fwd"], call((2, 3, 9, 8), (11, 3, 3, 3), norm=False, activation="relu")),
    "norm alone": (["finish_fwd"], call((2, 3, 9, 8), (11, 3, 3, 3), bias=False, norm=False)),
    "channels last": (
        ["finish_fwd"],
        call((3, 5, 5, 8), (37, 5, 3, 3), last=1, norm=False, residual=(3, 37, 3, 6)),
    ),
    "implicit": (
        ["conv_fwd"],
        call((2, 36, 7, 5), (20, 18, 2, 2), norm=False, activation="silu", **STRIDED),
    ),
    "implicit, channels last": (
        ["conv_fwd"],
        call((3, 16, 5, 7), (36, 16, 3, 2), last=1, norm=False, residual=(3, 36, 3, 6)),
    ),
    "pointwise": (
        ["linear_fwd"],
        call((2, 24, 5, 7), (20, 24, 1, 1), last=1, norm=False, residual=(2, 20, 5, 7)),
    ),
    "pointwise, split": (
        ["linear_fwd", "finish_fwd"],
        call((1, 520, 1, 3), (20, 520, 1, 1), last=1, norm=False, activation="relu"),
    ),
    "depthwise": (
        ["depthwise_fwd"],
        call((2, 11, 6, 7), (11, 1, 3, 2), groups=11, norm=False, activation="relu6"),
    ),
    "transposed": (
        ["finish_fwd"],
        call((2, 6, 5, 4), (6, 3, 3, 3), groups=2, norm=False, activation="gelu", **UP),
    ),
    "one dimension": (["finish_fwd"], call((2, 6, 11), (8, 6, 3), FF.conv1d, norm=False)),
}


def cases(names=ROUTES):
    return [pytest.param(Case(name, "", ROUTES[name][1]), id=name) for name in names]


def ops_of(model, *given):
    """The ops that a call leads to, in the order of their calls."""
    seen = fastdl.explain(model, *given)
    return [decision.op for decision in seen.decisions if decision.stage == "call"]


@pytest.mark.parametrize(
    "dtype",
    [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("case", cases())
def test_one_pass_is_as_right_as_three(case, dtype, device):
    """By the contract's rule, and with nothing written beside the output."""

    def outputs(mode, dtype=dtype, **options):
        return run(case, Maker(dtype, device=device, grad=False, **options), mode).outputs

    with guarded_allocations() as guards:
        ours = outputs("fused", layout="guarded")
    assert guards and all(guard.intact() for guard in guards)
    truth = run(case, Maker(dtype, torch.float64, device=device, grad=False), "definition")
    compare(ours, outputs("definition"), truth.outputs, FORWARD).require("output")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_is_as_right_as_three_in_a_residual_network(dtype, device):
    shape = (2, 64, 14, 14)
    make = call(shape, (64, 64, 3, 3), padding=1, norm=False, residual=shape, activation="relu")
    test_one_pass_is_as_right_as_three(Case("block", "", make), dtype, device)


@pytest.mark.parametrize("case", cases())
def test_one_pass_is_what_runs(case, device):
    given = case.make(Maker(device=device, grad=False))
    with fastdl.policy("fused", on_fallback="error"):
        seen, y = fastdl.explain(given), given()
    names = [launch.kernel.name for launch in seen.launches]
    assert device != "cpu" or names == ["channelnorm_affine", *ROUTES[case.name][0]]
    with fastdl.policy("definition"):
        assert y.stride() == given().stride()


@pytest.mark.parametrize("variant", ["gemm", "persistent"])
def test_a_kernel_of_1_on_the_other_ways_of_a_product(variant):
    """Where a table names them."""
    x, w, r = torch.randn(2, 16, 4, 2), torch.randn(32, 16, 1, 1) / 4, torch.randn(2, 32, 4, 2)
    x, w, r = (t.half().contiguous(memory_format=torch.channels_last) for t in (x, w, r))
    norm = (torch.randn(32), torch.rand(32) + 0.5, *torch.randn(2, 32))
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 8}
    config = Config({} if variant == "gemm" else blocks, variant=variant)
    call = partial(FF.conv2d, x, w, norm=norm, residual=r, activation="relu")
    with forced("linear", torch.float16, (16, 32, 16), config):
        names = [launch.kernel.name for launch in fastdl.explain(call).launches]
        y = call()
    last = "finish_fwd" if variant == "gemm" else "linear_persistent"
    assert names == ["channelnorm_affine", last]
    wanted = F.relu(F.batch_norm(F.conv2d(x.float(), w.float()), *norm) + r.float())
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", cases(["planes", "implicit, channels last"]))
def test_the_library_op_is_one_of_torchs(case, device):
    with LibraryCalls() as seen:
        for layout in ("dense", "transposed"):
            run(case, Maker(device=device, grad=False, layout=layout), "fused")
    assert [called.name for called in seen.calls] == ["conv_batch_norm"] * 2
    for called in seen.calls:
        torch.library.opcheck(called.overload, called.args)
        instead = LIBRARY_OPS[called.name].torch_form(*called.args)
        torch.testing.assert_close(instead, called.result, rtol=1e-4, atol=1e-4)
        assert instead.stride() == called.result.stride()


def drawn(device, **options):
    """x, weight, and the arguments of a norm after its input."""
    x, w = torch.randn(2, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    statistics = torch.randn(6, device=device), torch.rand(6, device=device) + 0.5
    return x, w, (*statistics, *torch.randn(2, 6, device=device), *options.values())


def test_what_needs_a_gradient_or_trains_takes_two_passes(device):
    x, w, norm = drawn(device)
    run = lambda *given, norm=norm: FF.conv2d(x, *given, norm=norm, activation="relu")  # noqa: E731
    assert ops_of(run, w) == ["conv_batch_norm"]
    wanted = F.relu(F.batch_norm(F.conv2d(x, w), *norm))
    for leaf in (w.clone().requires_grad_(), nn.Parameter(w)):
        assert ops_of(run, leaf) == ["conv", "batch_norm"]
        torch.testing.assert_close(run(leaf).detach(), wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert ops_of(run, leaf) == ["conv_batch_norm"]
    mean, twin = norm[0].clone(), norm[0].clone()
    trained = (twin, *norm[1:], True)
    assert ops_of(lambda: run(w, norm=trained)) == ["conv", "batch_norm"]
    assert not torch.equal(twin, mean)


def test_nothing_is_kept(device):
    """The next call sees what became of weights and statistics."""
    x, w, norm = drawn(device)
    run = lambda: FF.conv2d(x, w, norm=norm)  # noqa: E731
    first = run()
    for tensor in (w, *norm):
        before = tensor.clone()
        tensor.add_(0.5)
        assert not torch.allclose(run(), first)
        tensor.copy_(before)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_a_norm_under_transforms_autocast_and_without_a_batch(device):
    x, w, norm = drawn(device)
    wanted = F.batch_norm(F.conv2d(x, w), *norm)
    each = torch.vmap(lambda image: FF.conv2d(image[None], w, norm=norm)[0])(x)
    torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-4)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = FF.conv2d(x, w, norm=norm)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1)
    module = nn.PReLU(device=device)
    with torch.no_grad():
        y = FF.conv2d(x, w, norm=norm, activation=module)
        torch.testing.assert_close(y, module(wanted), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert ops_of(lambda: FF.conv2d(x, w, norm=norm)) == ["conv_batch_norm"]


@pytest.mark.parametrize("wrong", range(4))
def test_a_norm_of_other_channels_is_refused_as_alone(wrong, device):
    x, w, norm = drawn(device)
    norm = tuple(t[:5] if i == wrong else t for i, t in enumerate(norm))
    with pytest.raises(RuntimeError, match=r"batch_norm: input is \(2, 6, 4, 3\), .* is \(5,\)"):
        FF.conv2d(x, w, norm=norm)


# In models.


def conv(width, out, size=3, **options):
    return nn.Conv2d(width, out, size, padding=size // 2, bias=False, **options)


class Basic(nn.Module):
    """The block of a residual network."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += x
        return self.relu(h)


class PreActivated(nn.Module):
    """The block of a residual network whose norms and activations come first."""

    def __init__(self, width=4):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, width)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)

    def forward(self, x):
        h = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(h))) + x


class Dense(nn.Module):
    """A layer of a DenseNet."""

    def __init__(self, width=4):
        super().__init__()
        self.layer = dense_layer(width)

    def forward(self, x):
        return torch.cat([x, self.layer(x)], 1)


def dense_layer(width=4):
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, 8, 1),
        nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 2),
    )  # fmt: skip


def diffusion(width=4):
    return nn.Sequential(
        nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1),
    )  # fmt: skip


def network(width=4):
    """Inverted residuals: every convolution has its norm behind it."""
    return nn.Sequential(
        conv(width, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        conv(8, width, 1), nn.BatchNorm2d(width),
    )  # fmt: skip


def generator(width=4):
    return nn.Sequential(
        nn.ConvTranspose2d(width, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


ONE, TWO, BEFORE = ["conv_batch_norm"], ["conv", "batch_norm"], ["batch_norm", "conv"]
# Ops in evaluation without gradients, and in training; calls of the graph in both.
MODELS = {
    Basic: (ONE * 2, TWO * 2, ["conv2d"] * 2, ["conv2d", "batch_norm"] * 2),
    PreActivated: (
        ["batch_norm", *ONE, "conv"],
        BEFORE * 2,
        ["batch_norm", "conv2d", "conv2d"],
        ["batch_norm", "conv2d"] * 2,
    ),
    Dense: (
        ["batch_norm", *ONE, "conv"],
        BEFORE * 2,
        ["batch_norm", "conv2d", "conv2d"],
        ["batch_norm", "conv2d"] * 2,
    ),
    diffusion: (["group_norm", "conv"] * 2,) * 2 + (["group_norm", "conv2d"] * 2,) * 2,
    network: (ONE * 3, TWO * 3, ["conv2d"] * 3, ["conv2d", "batch_norm"] * 3),
    generator: (
        [*ONE, "conv"],
        [*TWO, "conv"],
        ["conv_transpose2d"] * 2,
        ["conv_transpose2d", "batch_norm", "conv_transpose2d"],
    ),
}


def made(make, training, device):
    model = make().to(device).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, torch.randn(2, 4, 4, 3, device=device)


def check_same(ours, model, x):
    """Outputs with gradients and without, gradients, and what became of the buffers."""
    quiet, wanted = (copy.deepcopy(m) for m in (ours, model))
    with torch.no_grad():
        torch.testing.assert_close(quiet(x), wanted(x), rtol=1e-4, atol=1e-4)
    found = []
    for one in (ours, model):
        given = x.clone().requires_grad_()
        y = one(given)
        grads = torch.autograd.grad(y.sin().sum(), [given, *one.parameters()])
        found.append([y, *grads, *one.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_graph_engine_counts(make, training, device):
    model, x = made(make, training, device)
    kept = []

    def keep(gm, given):
        fastdl.backend(gm, given)
        kept.append(gm)
        return gm.forward

    compiled = torch.compile(copy.deepcopy(model), backend=keep, fullgraph=True)
    with torch.no_grad():
        fastdl.explain(compiled, x)
    targets = [n.target for n in kept[0].graph.nodes if n.op == "call_function"]
    names = [t.__name__ for t in targets if t.__module__.startswith("fastdl.")]
    assert names == MODELS[make][2 + training]
    check_same(torch.compile(copy.deepcopy(model), backend=fastdl.backend), model, x)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [Dense, diffusion, network, generator], ids=lambda m: m.__name__)
def test_the_module_engine_counts(make, training, device):
    model, x = made(make, training, device)
    ours = fastdl.optimize(copy.deepcopy(model), x)
    assert not fastdl.report(ours).rolled_back and not fastdl.report(ours).skipped
    with torch.no_grad(), fastdl.policy("fused", on_fallback="error"):
        assert ops_of(copy.deepcopy(ours), x) == MODELS[make][training]
    assert list(ours.state_dict()) == list(model.state_dict())
    check_same(ours, model, x)
    assert type(fastdl.restore(ours)) is type(model)


def test_a_convolution_and_what_follows_are_one_site():
    found = fastdl.plan(network())
    assert [(site.name, site.pattern, site.op) for site in found] == [
        ("0", "Conv2d + BatchNorm2d + ReLU6", "conv2d"),
        ("3", "Conv2d + BatchNorm2d + ReLU6", "conv2d"),
        ("6", "Conv2d + BatchNorm2d", "conv2d"),
    ]
    one = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.BatchNorm1d(4))
    assert [site.pattern for site in fastdl.plan(one)] == [
        "Conv1d + BatchNorm1d + GELU", "BatchNorm1d",
    ]  # fmt: skip
    apart = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
    assert [site.pattern for site in fastdl.plan(apart)] == ["Conv2d", "BatchNorm1d + ReLU"]


def test_a_frozen_norm_in_a_model_that_trains(device):
    model, x = made(network, True, device)
    for norm in (model[1], model[4], model[7]):
        norm.eval().requires_grad_(False)
    # a norm that trained on a single value would raise
    ours = fastdl.optimize(copy.deepcopy(model), torch.randn(1, 4, 1, 1, device=device))
    assert len(fastdl.report(ours).replaced) == 3
    before = [buffer.clone() for buffer in ours.buffers()]
    with torch.no_grad():
        assert ops_of(ours, x) == ONE * 3
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(ours.buffers()), before, rtol=0, atol=0)


def test_a_hook_on_the_norm_is_called(device):
    model, x = made(network, False, device)
    ours = fastdl.optimize(copy.deepcopy(model))
    for one in (ours, model):
        one[4].register_forward_hook(lambda module, given, output: output * 2)
    with torch.no_grad():
        assert ops_of(ours, x) == [*ONE, *TWO, *ONE]
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_proof_sees_what_runs_without_gradients(monkeypatch):
    """A fault that only inference has."""
    model, x = made(network, False, "cpu")
    proof = fastdl.verify(model, fastdl.optimize(copy.deepcopy(model)), x)
    assert proof and "output without gradients" in proof.outputs
    op = LIBRARY_OPS["conv_batch_norm"]
    launch = op.launch
    monkeypatch.setattr(op, "launch", lambda *args: launch(*args) * 1.01)
    proof = fastdl.verify(model, fastdl.optimize(copy.deepcopy(model)), x)
    assert [n for n, c in proof.comparisons.items() if not c.ok] == ["output without gradients"]
    fastdl.optimize(model, x)
    assert len(fastdl.report(model).rolled_back) == 3


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_and_exported_without_gradients(dynamic, device):
    model, x = made(network, False, device)
    ours, graphs = fastdl.optimize(copy.deepcopy(model)), []

    def keep(gm, given):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(
        ours, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-4)
    for graph in (graphs[0], program.graph_module):
        names = [str(n.target) for n in graph.graph.nodes]
        assert sum("conv_batch_norm" in name for name in names) == 3
