"""What users do with a model does the same with an optimized one."""

import copy
import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from tests.robustness import KINDS, assert_close, cases, form, mlp, results
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastdl

__all__ = ["form"]  # the fixture


def started(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def twins(kind):
    """A model, the same optimized, and an input."""
    model, x = KINDS[kind].make(), torch.randn(KINDS[kind].shape)
    return model, fastdl.optimize(copy.deepcopy(model)), x


# ways to call a model, as (model, x) -> the output


def reentrant(model, x):
    return checkpoint(model, x, use_reentrant=True)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def with_other_parameters(model, x):
    return functional_call(model, {n: p.sin() for n, p in model.named_parameters()}, (x,))


def one_by_one(model, x):
    return vmap(model.eval())(x[:, None])


def ensemble(model, x):
    models = [model.eval(), copy.deepcopy(model), copy.deepcopy(model)]
    state = stack_module_state(models)
    return vmap(lambda *state: functional_call(model, state, (x,)))(*state)


def jacobian(model, x):
    return torch.func.jacrev(model.eval())(x[:1])


def tangent(model, x):
    return torch.func.jvp(model.eval(), (x,), (x.cos(),))[1]


def per_sample_gradients(model, x):
    def loss(state, row):
        return functional_call(model.eval(), state, (row[None],)).square().sum()

    state = {name: p.detach() for name, p in model.named_parameters()}
    grads = vmap(torch.func.grad(loss), (None, 0))(state, x)
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


def second_gradient(model, x):
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return dx


def without_gradients(model, x):
    with torch.no_grad():
        return model(x)


def in_inference(model, x):
    with torch.inference_mode():
        return model(x).clone()


def exported(model, x):
    return torch.export.export(model.eval(), (x.detach(),)).module()(x).detach()


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).bfloat16()


def in_a_thread(model, x):
    found = []
    started(lambda: found.append(model(x))).join()
    return found[0]


USES = [
    reentrant, checkpointed, with_other_parameters, one_by_one, ensemble, jacobian, tangent,
    per_sample_gradients, second_gradient, without_gradients, in_inference, exported, in_a_thread,
    under_autocast,
]  # fmt: skip

# what torch's recurrent modules cannot do, and ours can
ONLY_OURS = {("lstm", one_by_one), ("lstm", ensemble), ("lstm", tangent)}


PAIRS = [pair for pair in itertools.product(KINDS, USES) if pair not in ONLY_OURS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "use", "form"), cases(PAIRS, lambda kind, use: use is exported), indirect=["form"]
)
def test_a_use(kind, use, form):
    original, model, x = twins(kind)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast attention has no second derivatives
        assert_close(_used(model, use, x), _used(original, use, x))


def _used(model, use, x):
    """Output and gradients of a use."""
    x = x.clone().requires_grad_()
    y = use(model, x)
    found = {"y": y.detach()}
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found["dx"] = x.grad
    return found


# optimizers


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_made_before(kind, form):
    """It goes on with its state, and the state goes into one of an unoptimized model."""
    original, x = KINDS[kind].make(), torch.randn(KINDS[kind].shape)
    model = copy.deepcopy(original)
    steps = {m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, original)}
    for step in range(3):
        for m, optimizer in steps.items():
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
        if step == 0:
            fastdl.optimize(model)
        if step == 1:
            fastdl.restore(model)
            steps[original].load_state_dict(copy.deepcopy(steps[model].state_dict()))
    torch.testing.assert_close(model.state_dict(), original.state_dict(), rtol=1e-4, atol=1e-5)


# the children of a Sequential


def _append(m):
    m.append(nn.Tanh())


def _insert(m):
    m.insert(1, nn.LayerNorm(8))


def _pop(m):
    m.pop(1)


def _extend(m):
    m.extend(mlp())


def _add(m):
    m.add_module("more", nn.Tanh())


def _set(m):
    setattr(m, "1", nn.Tanh())


def _delete(m):
    del m[1]


def _identity(m):
    m[1] = nn.Identity()


def _another(m):
    m[0] = nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize(
    "edit", [_append, _insert, _pop, _extend, _add, _set, _delete, _identity, _another]
)
@pytest.mark.parametrize("again", [False, True])
def test_edits_of_a_sequential(edit, again, form):
    original, model, x = twins("sequential")
    for m in (original, model):
        torch.manual_seed(1)
        edit(m)
    if again:
        fastdl.optimize(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert_close(results(model, x), results(original, x))
    for part in (slice(1, None), slice(0, 2), slice(0, 0)):
        assert torch.allclose(model[part](x), original[part](x), rtol=1e-4, atol=1e-5)
    fastdl.restore(model)
    assert [type(m) for m in model] == [type(m) for m in original]


def test_parts_of_two_models(form):
    """One Linear with another neighbour in each, and parts that are put together anew."""
    shared = nn.Linear(8, 8)
    original = nn.Sequential(
        nn.Sequential(shared, nn.GELU()), nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared)
    )
    x = torch.randn(2, 8)
    for inputs in (None, x):
        model = fastdl.optimize(copy.deepcopy(original), inputs)
        assert model[0][0] is model[1][0] is model[2][0]
        assert_close(results(model, x), results(original, x))
    joined = nn.Sequential(*model[0], nn.Tanh(), model[2][0])
    expected = nn.Sequential(*original[0], nn.Tanh(), shared)
    assert_close(results(joined, x), results(expected, x))


# where optimize itself is called


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_optimize_without_gradients(mode, inputs):
    original, x = mlp(), torch.randn(2, 8)
    model = copy.deepcopy(original)
    with mode():
        fastdl.optimize(model, x.clone() if inputs else None)
        assert not torch.is_grad_enabled()
    assert fastdl.report(model).replaced
    assert_close(results(model, x), results(original, x))


def test_threads(form):
    """Two optimize models of their own, then two run the same one."""
    original, x = mlp(), torch.randn(2, 8)
    models = [copy.deepcopy(original) for _ in range(2)]
    threads = [started(lambda m=m: fastdl.optimize(m, x.clone())) for m in models]
    for thread in threads:
        thread.join()
    expected, found = results(original, x), []
    assert all(fastdl.report(m).proof.ok for m in models)
    threads = [started(lambda: found.append(models[0](x))) for _ in range(2)]
    for thread in threads:
        thread.join()
    for y in found:
        torch.testing.assert_close(y, expected["y"], rtol=1e-4, atol=1e-5)
    assert_close(results(models[1], x), expected)


READ = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), y)
assert type(model[0]).__module__ == "fastdl.nn.linear"
"""


@pytest.mark.slow
def test_another_process_reads_it(tmp_path):
    """Nothing of fastdl is imported there before."""
    model, x = fastdl.optimize(mlp()), torch.randn(2, 8)
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "xy.pt")
    paths = [str(tmp_path / name) for name in ("model.pt", "xy.pt")]
    subprocess.run([sys.executable, "-c", READ, *paths], check=True)


# not yet initialised


def test_lazy_layers_added_to_an_optimized_model(form):
    torch.manual_seed(1)
    model, x = fastdl.optimize(mlp()).append(nn.LazyLinear(4)), torch.randn(2, 8)
    assert "lazy" in fastdl.plan(model)[-1].reason
    assert model(x).shape == (2, 4)
    twin = copy.deepcopy(model)
    fastdl.optimize(model)
    assert type(model[-1]) is fastdl.nn.Linear
    assert_close(results(model, x), results(fastdl.restore(twin), x))


def test_layers_without_values(form):
    make = nn.utils.skip_init(nn.Linear, 8, 8)
    model = fastdl.optimize(nn.Sequential(make, nn.ReLU()))
    original = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(2, 8)
    assert_close(results(model, x), results(original, x))


# converters that know torch's classes by their names


@pytest.mark.filterwarnings("ignore")
def test_converters_take_a_restored_model():
    original, model, x = twins("modules")

    def converted(m):
        quantized = torch.ao.quantization.quantize_dynamic(m, {nn.Linear})
        return type(quantized.fc), quantized(x), torch.fx.symbolic_trace(m)(x)

    (cls, *found), (wanted, *expected) = converted(fastdl.restore(model)), converted(original)
    assert cls is wanted is not nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_scripted_and_traced_models_can_be_saved(tmp_path):
    """TorchScript knows nothing of fastdl."""
    original, model, x = twins("encoder")
    for script in (torch.jit.script, lambda m: torch.jit.trace(m, x)):
        fastdl.optimize(model)
        script(model).save(tmp_path / "model.pt")
        assert b"fastdl::" not in (tmp_path / "model.pt").read_bytes()
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert torch.allclose(loaded(x), original(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(model(x), original(x), rtol=1e-4, atol=1e-5)


def test_a_parametrization_that_is_taken_off_again(form):
    original, model, x = twins("modules")
    for m in (original, model):
        nn.utils.parametrizations.weight_norm(m.fc)
    twin = fastdl.restore(copy.deepcopy(model))
    for m in (original, model, twin):
        nn.utils.parametrize.remove_parametrizations(m.fc, "weight")
    assert (type(model.fc), type(twin.fc)) == (fastdl.nn.Linear, nn.Linear)
    assert_close(results(model, x), results(original, x))
    assert_close(results(twin, x), results(original, x))


# time


def test_a_hundred_million_parameters_take_less_than_two_seconds():
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
        model = nn.TransformerEncoder(layer, 15, enable_nested_tensor=False)
    model.to_empty(device="cpu")  # pages that nobody writes cost nothing
    assert sum(p.numel() for p in model.parameters()) > 100e6
    start = time.process_time()
    fastdl.optimize(model)
    assert time.process_time() - start < 2
    assert len(fastdl.report(model).replaced) > 100
