"""The runs of a proof: the judge is float64, random numbers are one, and no trace is left."""

import copy
import io
import random
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
from fastdl.optimize import memory

WIDTH = 8
TABLE = np.linspace(0.1, 1, WIDTH, dtype=np.float32)


class Applies(nn.Module):
    """A function between two layers."""

    def __init__(self, function, **held):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function
        vars(self).update(held)

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def doubled_bias(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.last.bias.mul_(1.01)
    return twin


# float64


def timestep(m, x):
    frequencies = torch.exp(-torch.arange(WIDTH, dtype=torch.float32) / WIDTH)
    return x + (torch.tensor([7.0])[:, None].float() * frequencies).sin().to(x.dtype)


def rotary(m, x):
    with torch.autocast("cpu", enabled=False):
        angles = m.tables["inv"][0].exp().float().expand(WIDTH).type(torch.float32)
    return x * angles.cos().to(dtype=x.dtype)


def masked(m, x):
    mask = torch.full((len(x), len(x)), torch.finfo(torch.float32).min).triu(1)
    return F.softmax(x @ x.mT + mask, -1, dtype=torch.float32).type_as(x) @ x


@pytest.mark.parametrize(
    "function",
    [
        timestep,
        rotary,
        masked,
        lambda m, x: x * torch.tensor(TABLE).exp() * torch.as_tensor(TABLE).log(),
        lambda m, x: torch.view_as_real(
            torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * m.complex.exp()
        ).flatten(-2),
        lambda m, x: x + torch.zeros(1, dtype=torch.float16).add(0.1).to(x),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_judge_is_float64_however_models_cast(function, dtype):
    turns = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH / 2))
    model = Applies(function, tables={"inv": [torch.rand(1)]}).to(dtype)
    model.register_buffer("complex", turns)
    model.requires_grad_(True)
    x = torch.randn(5, WIDTH, dtype=dtype)
    if function(model, x).dtype != dtype:
        model.last.float()
    proof = fastdl.verify(model, copy.deepcopy(model), x)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    assert 0 < proof.outputs["output"].before < 0.1


# random numbers


def sampled(m, x):
    mean, spread = x.chunk(2, -1)
    z = mean + torch.randn_like(mean) * spread.exp()
    return torch.cat([z, torch.distributions.Normal(mean, spread.exp()).rsample()], -1)


@pytest.mark.parametrize(
    "function",
    [
        sampled,
        lambda m, x: x + torch.rand(x.shape) * torch.normal(0.0, 1.0, x.shape),
        lambda m, x: x * torch.bernoulli(x.sigmoid()) + F.gumbel_softmax(x, -1),
        lambda m, x: x + torch.empty_like(x).exponential_() + torch.zeros_like(x).uniform_(1, 2),
        lambda m, x: x[torch.multinomial(torch.ones(len(x)), len(x))],
        lambda m, x: F.dropout(x, 0.5, training=True),
        lambda m, x: x * random.random() * np.random.rand(),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_models_that_draw_random_numbers(function, train):
    """Other numbers in the judge would be an error of the original, under which faults hide."""
    model, x = Applies(function).train(train), torch.randn(20, WIDTH)
    proof = fastdl.verify(model, copy.deepcopy(model), x)
    assert proof.ok and not proof.weak and proof.outputs["output"].before < 1e-5
    assert fastdl.verify(model, doubled_bias(model), x).first == "last"


def test_what_cannot_be_judged_well_is_told():
    noise = torch.Generator()
    model = Applies(lambda m, x: x + torch.randn(x.shape, generator=noise))
    proof = fastdl.verify(model, model, torch.randn(20, WIDTH))
    assert "output" in proof.weak and "weak: the original" in str(proof)


# inputs


class Cache:
    def __init__(self, key):
        self.layers = [{"key": key}]


def test_objects_are_copied_with_the_tensors_in_them():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, past):
            layer = past.layers[0]
            layer["key"] = torch.cat([layer["key"].cos(), self.fc(x)])
            return layer["key"], None, past

    model = Decodes()
    cache = Cache(model.fc(torch.randn(3, WIDTH)))  # it has a history
    kept = cache.layers[0]["key"]
    proof = fastdl.verify(model, copy.deepcopy(model), {"x": torch.randn(2, WIDTH), "past": cache})
    assert proof.ok and proof.judge_is_fp64 and list(proof.outputs) == ["output[0]"]
    assert cache.layers[0]["key"] is kept and kept.dtype == torch.float32


def test_complex_models():
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.complex64) for _ in range(2)))
    other, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.complex64)
    proof = fastdl.verify(model, other, x)
    assert proof.ok and proof.judge_is_fp64 and proof.outputs["output"].before > 0
    with torch.no_grad():
        other[1].bias.mul_(1.0 + 0.01j)
    assert fastdl.verify(model, other, x).first == "1"


def test_models_without_values():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    for prove in (lambda x: fastdl.verify(model, model, x), lambda x: fastdl.optimize(model, x)):
        with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
            prove(torch.randn(2, 4))
    assert type(fastdl.optimize(model)[0]) is fastdl.nn.Linear


# no trace


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise ZeroDivisionError


def untidy(m, x):
    """Draws numbers everywhere, and leaves torch's modes otherwise."""
    noise = random.random() + np.random.rand() + torch.rand(1).item()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    return x * noise


def fail(*_):
    raise ZeroDivisionError


def untidy_model(where):
    model = nn.Sequential(
        Applies(lambda m, x: x), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.3)
    )
    model[0].first.weight.grad = torch.ones(WIDTH, WIDTH)
    model[0].last.weight.grad = torch.zeros(WIDTH, WIDTH)
    model[0].last.bias.requires_grad_(False)
    model[1].eval()
    if where == "forward":
        model[0].function = lambda m, x: fail(untidy(m, x))
    elif where == "backward":
        model[0].function = lambda m, x: Fails.apply(untidy(m, x))
    return model


def snapshot(model):
    tensors = (*model.parameters(), *model.buffers())
    return {
        "values": [tensor.detach().clone() for tensor in tensors],
        "tensors": [(id(t), t._version, t.requires_grad) for t in tensors],
        "gradients": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "identities": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "modules": [(type(m), m.training, list(vars(m)), repr(m)) for m in model.modules()],
        "hooks": [
            len(hooks)
            for m in model.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [*np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.overrides._get_current_function_mode(),
        ),
    }


def assert_same(after, before):
    for key, value in before.items():
        if key in ("values", "gradients", "torch"):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0)
        else:
            assert after[key] == value, key


@pytest.mark.parametrize("where", [None, "forward", "backward", "loss"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("verb", ["verify", "optimize", "plan"])
def test_no_trace_is_left(where, grad, verb):
    model, x = untidy_model(where), torch.randn(6, WIDTH)
    other = fastdl.optimize(copy.deepcopy(model))
    loss = {"loss": fail} if where == "loss" else {}
    calls = {
        "verify": lambda: fastdl.verify(model, other, x, **loss),
        "optimize": lambda: fastdl.optimize(model, x, exclude=["*"]),
        "plan": lambda: fastdl.plan(model, x),
    }
    raises = where if verb == "verify" else {"forward", "backward"} & {where}
    before = snapshot(model), snapshot(other), x.clone()
    with torch.set_grad_enabled(grad):
        if raises and not (verb == "plan" and where == "backward"):
            with pytest.raises(ZeroDivisionError):
                calls[verb]()
        else:
            calls[verb]()
        assert torch.is_grad_enabled() == grad
    assert_same(snapshot(model), before[0])
    assert_same(snapshot(other), before[1])
    assert torch.equal(x, before[2]) and x.grad is None and not x.requires_grad


def test_a_loss_that_reaches_the_model_leaves_no_gradient():
    model, x = untidy_model(None), torch.randn(6, WIDTH)
    before = snapshot(model)
    decay = lambda y: y.sum() + sum(p.square().sum() for p in model.parameters())  # noqa: E731
    assert fastdl.verify(model, model, x, loss=decay).ok
    assert_same(snapshot(model), before)


def test_buffers_that_a_copy_reaches_come_back():
    model = Applies(lambda m, x: x * model.count.add_(1))
    model.register_buffer("count", torch.zeros(1))
    model.register_buffer("wide", torch.ones(1).expand(3))
    fastdl.verify(model, model, torch.randn(6, WIDTH))
    assert model.count.item() == 0


def test_a_model_whose_copy_runs_the_model_itself_is_refused():
    model, x = Applies(lambda m, x: x), torch.randn(6, WIDTH)
    layer = model.first
    layer.forward = lambda x: x * layer.bias
    for prove in (lambda: fastdl.verify(model, model, x), lambda: fastdl.optimize(model, x)):
        with pytest.raises(RuntimeError, match="holds on to it"):
            prove()
    assert layer.bias.grad is None and type(model.last) is nn.Linear


# memory


def test_copies_do_not_pile_up():
    alive, counts = weakref.WeakSet(), []

    def count(m, x):
        alive.add(m)
        counts.append(len(alive))
        return x

    model = Applies(count)
    proof = fastdl.verify(model, doubled_bias(model), torch.randn(5, WIDTH))
    assert proof.first == "last" and counts == [1] * len(counts) and len(counts) > 5


def test_a_proof_that_cannot_fit_is_refused_before_it_begins(monkeypatch):
    cpu = torch.device("cpu")
    layer = nn.Linear(100, 10, bias=False)  # the other model's gradients beside those of two runs
    assert memory.needed(layer, layer) == {cpu: 1000 * (8 + 4 + 4 + 4)}
    layer.requires_grad_(False)
    assert memory.needed(layer, layer) == {cpu: 1000 * 8}  # the judge
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000 if device == cpu else None)
    assert fastdl.verify(layer, layer, torch.randn(2, 100)).ok

    layer.requires_grad_(True)
    for prove in (fastdl.optimize, lambda model, x: fastdl.verify(model, model, x)):
        with pytest.raises(MemoryError, match=r"take 0\.0 GiB on cpu.*fewer or narrower layers"):
            prove(layer, torch.randn(2, 100))
    assert type(fastdl.optimize(layer)) is fastdl.nn.Linear


def test_free_memory_is_what_linux_says(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_bytes(torch.device("cpu")) is None
    memory.MEMINFO.write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert memory.free_bytes(torch.device("cpu")) == 2 * 2**20
    assert memory.free_bytes(torch.device("mps")) is None


# progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_long_proofs_show_how_far_they_are_on_a_terminal(monkeypatch, terminal):
    model = Applies(lambda m, x: time.sleep(0.12) or x)
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    fastdl.optimize(model, torch.randn(5, WIDTH))
    expected = ["replay: ", "verify: 1 of 3", "the original"] if terminal else []
    assert all(text in shown.getvalue() for text in expected)
    assert bool(shown.getvalue()) == terminal
