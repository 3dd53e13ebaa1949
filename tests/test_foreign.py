"""Modules of nobody's library: which are known by their structure, and which are left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastdl

D, H = 12, 20


class RMS(nn.Module):
    eps, kept = 1e-6, None

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.scaled(x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6), x)

    def scaled(self, y, x):
        return (y * self.gamma.float()).to(x.dtype)


class LlamaLike(RMS):
    def scaled(self, y, x):
        return self.gamma * y.to(x.dtype)


class GemmaLike(RMS):
    def scaled(self, y, x):
        return (y * (1.0 + self.gamma.float())).to(x.dtype)


class LayerLike(nn.Module):
    """With its eps in an attribute, and names of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.small = 1e-4

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.small) * self.scale + self.offset


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Turned(nn.Module):
    """A linear layer whose weight is [in, out]."""

    def __init__(self, i=D, o=H):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return x @ self.kernel + self.shift


class Perceptron(nn.Module):
    def __init__(self, act=None, layer=nn.Linear):
        super().__init__()
        self.one, self.two, self.act = layer(D, H), layer(H, D), act or nn.GELU()
        self.between, self.after = nn.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x):
        return self.after(self.two(self.between(self.act(self.one(x)))))


class Plain(nn.Module):
    """The activation is written in forward."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.two(F.relu(self.one(x)).square())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        # in no order that a name or a place would tell
        self.c, self.a, self.b = nn.Linear(H, D), nn.Linear(D, H), nn.Linear(D, H, bias=False)

    def forward(self, x):
        return self.c(self.a(x) * F.silu(self.b(x)))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(D, 2 * H), nn.Linear(H, D), F.silu

    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Ending(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.drop = nn.Linear(H, D), nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, x, residual):
        return self.norm(self.drop(self.dense(x)) + residual)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(H, 3 * D), nn.LayerNorm(D, elementwise_affine=False)

    def forward(self, x, label=None, emb=None):
        shift, scale, gate = self.linear(F.silu(emb)).chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.act(y)


class Timed(nn.Module):
    scales = False

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1)
        self.time = nn.Linear(H, 12 if self.scales else 6)
        self.norm2, self.conv2 = nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.short, self.drop, self.factor = nn.Conv2d(4, 6, 1), nn.Dropout(0.1), 2.0

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        t = self.time(F.silu(t))[:, :, None, None]
        if self.scales:
            scale, shift = t.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + t)
        h = self.conv2(self.drop(F.silu(h)))
        return (self.short(x) + h) / self.factor


class TimedByScale(Timed):
    scales = True


X, WIDE = (3, 5, D), (3, 5, H)
IMAGE = (2, 4, 6, 6)
KNOWN = [
    (RMS, "rms_norm", [X]),
    (LlamaLike, "rms_norm", [X]),
    (GemmaLike, "rms_norm", [X]),
    (LayerLike, "layer_norm", [X]),
    (Swish, "activation", [X]),
    (Turned, "linear", [X]),
    (Perceptron, "mlp", [X]),
    (lambda: Perceptron(Swish()), "mlp", [X]),
    (lambda: Perceptron(nn.LeakyReLU(0.3)), "mlp", [X]),
    (lambda: Perceptron(layer=Turned), "mlp", [X]),
    (Plain, "mlp", [X]),
    (Gated, "gated_mlp", [X]),
    (Joined, "gated_mlp", [X]),
    (Ending, "linear", [WIDE, X]),
    (Adapted, "layer_norm", [X, None, (3, H)]),
    (Residual, "conv2d", [IMAGE]),
    (Timed, "group_norm", [IMAGE, (2, H)]),
    (TimedByScale, "group_norm", [IMAGE, (2, H)]),
]


def name_of(make):
    return getattr(make, "__name__", "")


def inputs_of(shapes, device):
    return tuple(None if s is None else torch.randn(s, device=device) for s in shapes)


def site_of(model):
    """The site that is the module itself."""
    return next(site for site in fastdl.plan(model) if site.name == "0")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("make", "op", "shapes"), KNOWN, ids=[name_of(k[0]) for k in KNOWN])
def test_known(make, op, shapes, train, device):
    class Model(nn.Sequential):
        def forward(self, *args):
            return self[0](*args)

    model = Model(make()).to(device).train(train)
    original, cls, keys = copy.deepcopy(model), type(model[0]), list(model.state_dict())
    site = site_of(model)
    assert (site.op, site.reason) == (op, None)
    fastdl.optimize(model)
    assert isinstance(model[0], cls) and type(model[0]) is not cls
    assert list(model.state_dict()) == keys
    inputs = inputs_of(shapes, device)
    with fastdl.policy("fused", on_fallback="error"):
        proof = fastdl.verify(original, model, inputs)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    seen = fastdl.explain(model.eval(), *inputs)
    ran = {"conv2d": "conv", "mlp": "linear", "gated_mlp": "glu"}.get(op, op)
    assert ran in {decision.op for decision in seen.decisions}
    copied = pickle.loads(pickle.dumps(model[0]))
    assert type(copied) is type(model[0]) is type(copy.deepcopy(model[0]))
    fastdl.restore(model)
    assert type(model[0]) is cls


class OtherEps(RMS):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, True) + 3e-6) * self.gamma


class OtherDimension(RMS):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-2, True) + 1e-6) * self.gamma


class Detached(RMS):
    """The same numbers, another gradient."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6).detach() * self.gamma


class Clamped(Perceptron):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Skipping(Perceptron):
    def forward(self, x):
        return x + super().forward(x)


class OtherInTraining(Perceptron):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Almost(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.0001 * x)


class DroppedInput(Perceptron):
    def forward(self, x):
        return self.two(self.act(self.one(self.between(self.after(x)))))


class Reading(Perceptron):
    """Reads an argument that no form knows."""

    def forward(self, x, scale):
        return super().forward(x) * scale


class Unfinished(Timed):
    def forward(self, x, t):
        h = self.conv1(self.norm1(x))
        h = self.norm2(h + self.time(F.silu(t))[:, :, None, None])
        return (self.short(x) + self.conv2(self.drop(F.silu(h)))) / self.factor


class EarlySum(Residual):
    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x))) + self.down(x)
        return self.act(self.bn2(self.conv2(y)))


@pytest.mark.parametrize(
    "make",
    [
        OtherEps, OtherDimension, Detached, Clamped, Skipping, OtherInTraining, Almost,
        DroppedInput, Reading, Unfinished, EarlySum,
    ],
)  # fmt: skip
def test_left_alone(make):
    model = nn.Sequential(make())
    cls = type(model[0])
    assert all(site.name != "0" or site.reason for site in fastdl.plan(model))
    fastdl.optimize(model)
    assert type(model[0]) is cls


def test_a_norm_that_rounds_elsewhere_is_another():
    """Cast orders are seen in bfloat16."""
    x = torch.randn(64, D).bfloat16()
    for make in (RMS, LlamaLike, GemmaLike):
        module = make().bfloat16()
        expected = module(x)
        model = fastdl.optimize(nn.Sequential(module))
        assert (model(x) != expected).double().mean() < 0.02, make


def replace_child(m):
    m.two = nn.Linear(H, D)


def replace_activation(m):
    m.act = nn.Tanh()


def replace_dropout(m):
    m.after = nn.ReLU()


def hook_child(m):
    m.one.register_forward_hook(lambda module, args, y: y + 1)


def hook_activation(m):
    m.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def wrap_child(m):
    m.one = nn.Sequential(m.one, nn.ReLU())


def prune_child(m):
    prune.random_unstructured(m.one, "weight", 0.5)


def parametrize_child(m):
    parametrizations.weight_norm(m.two)


def replace_forward(m):
    m.one.forward = lambda x: F.linear(x, m.one.weight)


AFTER = [
    replace_child, replace_activation, replace_dropout, hook_child, hook_activation, wrap_child,
    prune_child, parametrize_child, replace_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", AFTER)
def test_what_changes_later_counts(change):
    model = nn.Sequential(Perceptron()).eval()
    twin = copy.deepcopy(model)
    fastdl.optimize(model)
    for m in (model[0], twin[0]):
        torch.manual_seed(3)
        change(m)
    x = torch.randn(X)
    torch.testing.assert_close(model(x), twin(x))


class Optional(Perceptron):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = super().forward(x)
        return y if self.last is None else self.last(y)


def test_a_child_that_was_not_there_counts():
    model = nn.Sequential(Optional()).eval()
    twin = copy.deepcopy(model)
    assert site_of(model).op == "mlp"
    fastdl.optimize(model)
    twin[0].last = model[0].last = nn.Linear(D, D)
    x = torch.randn(X)
    torch.testing.assert_close(model(x), twin(x))


class Remembering(Perceptron):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Setting(Perceptron):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("make", [Remembering, Setting])
def test_what_a_forward_leaves_in_its_module_stays(make):
    """A form would leave nothing, and a probe must not either."""
    model = nn.Sequential(make())
    before = dict(vars(model[0]))
    fastdl.optimize(model)
    assert type(model[0]) is make
    assert vars(model[0]).keys() == before.keys() and not before.get("seen")


def test_calls_by_keyword():
    model = nn.Sequential(Adapted())
    x, emb = torch.randn(X), torch.randn(3, H)
    expected = model[0](x, emb=emb)
    fastdl.optimize(model)
    with fastdl.policy("fused", on_fallback="error"):
        found = model[0](x=x, emb=emb)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_other_dtypes_and_autocast_are_as_before():
    """The dtype, and at most twice the error: the rule of every op."""
    model = nn.Sequential(LlamaLike(), Perceptron()).eval()
    twin = copy.deepcopy(model)
    truth = copy.deepcopy(twin).double()
    fastdl.optimize(model)
    x = torch.randn(3, 50, D)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(given), twin(given)
        assert ours.dtype == theirs.dtype
        expected = truth(given.double())
        allowed = 2 * (theirs - expected).abs().max()
        assert (ours - expected).abs().max() <= allowed
    assert model[0](x.bfloat16()).dtype == twin[0](x.bfloat16()).dtype


def test_layers_alike_are_probed_once(monkeypatch):
    from fastdl.optimize.foreign.probe import Probe

    calls = []
    agrees = Probe.agrees
    monkeypatch.setattr(Probe, "agrees", lambda *args: calls.append(args) or agrees(*args))
    fastdl.plan(nn.Sequential(Perceptron()))
    once = len(calls)
    calls.clear()
    fastdl.plan(nn.Sequential(*(Perceptron() for _ in range(5))))
    assert len(calls) == once


@pytest.mark.parametrize("make", [RMS, Perceptron, Residual])
def test_the_meta_device_is_enough(make):
    with torch.device("meta"):
        model = nn.Sequential(make())
    assert site_of(model).reason is None


def test_compiled_without_a_break():
    model = nn.Sequential(LlamaLike(), Perceptron(), Gated())
    x = torch.randn(X)
    model.eval()
    expected = model(x)
    fastdl.optimize(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
