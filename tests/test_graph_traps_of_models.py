"""The graph engine: modes, modules that change, hooks, and what is random or at the same time."""

import copy
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastdl
from graph_forms import Compiled, tensors
from trap_forms import Traps, gradients, mlp

trap = Traps()


# Modes.


@trap
def without_gradients_first(compile):
    model, (x,) = mlp(), tensors((3, 8))
    f = compile(model)
    with torch.no_grad():
        first = f(x)
    with torch.inference_mode():
        second = f(x).clone()
    return [first, second + 0, *gradients(f(x), model, x)]


@trap
def gradients_switched_inside(compile):
    x, v, w = tensors((3, 8), (8, 8), (8, 8))

    def f(x):
        h = F.linear(x, v)
        with torch.no_grad():
            gate = F.sigmoid(F.linear(h, w))
        with torch.set_grad_enabled(False):
            h2 = F.linear(x, w)
            with torch.enable_grad():
                y = F.gelu(F.linear(h, w))
        return F.gelu(h) * gate, F.relu(h2), y

    return gradients(compile(f)(x), x, v, w)


@trap
def detached_in_the_middle(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        h = F.linear(x, w)
        y = F.gelu(h.detach()) + h
        z = F.linear(x, w).detach()
        return y, F.silu(z), z.requires_grad_(False)

    return gradients(compile(f)(x), x, w)


@trap
def a_gradient_asked_of_an_intermediate(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w).requires_grad_()
        return F.gelu(h), h

    y, h = compile(f)(x)
    return [y, h, *torch.autograd.grad(y.sin().sum(), h)]


@trap
def autocast_off_inside_of_autocast(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(x, w)
            with torch.autocast("cpu", enabled=False):
                y = F.gelu(F.linear(x, w))
            z = F.gelu(h)
        return y, z.float().round(decimals=1) * 0, F.gelu(F.linear(x, w))

    f = compile(f)
    outside = gradients(f(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        return [*outside, f(x)[0]]


@trap
def another_policy_at_the_next_call(compile):
    model, (x,), found = mlp(), tensors((3, 8)), []
    f = compile(model)
    for mode in ("fused", "definition", "auto"):
        with fastdl.policy(mode):
            found += gradients(f(x), model, x)
    return found


# Modules that change.


@trap
def train_and_eval(compile):
    model, found = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), []
    f = compile(model)
    for training in (False, True, True, False, True, False):
        model.train(training)
        (x,) = tensors((2, 3, 5, 5))
        found += gradients(f(x), model, x)
        with torch.no_grad():
            found.append(f(x))
    return [*found, *model.buffers()]


@trap
def batch_norm_called_twice(compile):
    model, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    x, y = tensors((5, 4), (6, 4))
    f = compile(lambda x, y: (norm(F.relu(norm(model(x)))), F.relu(norm(model(y)))))
    return [*gradients(f(x, y), model, norm, x, y), *norm.buffers()]


@trap
def a_step_of_the_optimizer_between_calls(compile):
    model, found = mlp(), []
    f, optimizer = compile(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        (x,) = tensors((3, 8))
        loss = f(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss)
    return [*found, *model.parameters()]


@trap
def parameters_replaced_after_the_first_call(compile):
    model, (x,) = mlp(), tensors((3, 8))
    f = compile(model)
    found = gradients(f(x), model, x)
    model[0].weight.data = torch.randn(8, 8)
    found += gradients(f(x), model, x)
    model.load_state_dict(mlp().state_dict())
    found += gradients(f(x), model, x)
    model[2].weight = nn.Parameter(torch.randn(8, 8))
    model[0].bias = None
    found += gradients(f(x), model, x)
    model[0].weight.requires_grad_(False)
    found += gradients(f(x), model[2], x)
    model[3].eps, model[1].approximate = 0.5, "tanh"
    return [*found, *gradients(f(x), model[2], x)]


@trap
def weights_tied_and_kept_as_buffers(compile):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
    model[2].weight = model[0].weight
    norm = model[3]
    weight = norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", weight)
    (x,) = tensors((3, 8))
    f = compile(model)
    found = gradients(f(x), model, x)
    norm.weight.mul_(2)
    return [*found, *gradients(f(x), model, x)]


@trap
def a_copy_of_the_compiled_model(compile):
    model, (x,) = mlp(), tensors((3, 8))
    f = compile(model)
    found = gradients(f(x), model, x)
    twin = copy.deepcopy(f)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    return [*found, *gradients(twin(x), twin, x), *gradients(f(x), model, x)]


# Hooks and functions of the user's own.


@trap
def hooks_of_modules(compile):
    model, (x,) = mlp(), tensors((3, 8))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return gradients(compile(model)(x), model, x)


@trap(fuses=False)  # Dynamo leaves such a model to Python
def backward_hooks_of_modules(compile):
    model, (x,) = mlp(), tensors((3, 8))
    model[1].register_full_backward_hook(lambda module, grads, outs: (grads[0] * 3,))
    model[0].register_full_backward_pre_hook(lambda module, outs: (outs[0] * 2,))
    return gradients(compile(model)(x), model, x)


@trap
def hooks_of_tensors(compile):
    x, w = tensors((3, 8), (8, 8))
    w.register_hook(lambda grad: grad * 3)

    def f(x):
        h = F.linear(x, w)
        h.register_hook(lambda grad: grad * 2)
        return F.gelu(h)

    return gradients(compile(f)(x), x, w)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


@trap
def an_autograd_function_in_the_middle(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        h = F.gelu(F.linear(x, w))
        return F.gelu(Reverse.apply(F.linear(h, w))) + x

    return gradients(compile(f)(x), x, w)


@trap
def a_graph_break_in_the_middle(compile):
    model, norm = mlp(), nn.LayerNorm(8)
    x, r = tensors((3, 8), (3, 8))

    def f(x, r):
        h = F.linear(model(x), model[0].weight)
        torch._dynamo.graph_break()
        h = F.gelu(h)
        h += r
        torch._dynamo.graph_break()
        return norm(h)

    return gradients(compile(f)(x, r), model, norm, x, r)


@trap
def compiled_inside_of_compiled(compile):
    model, norm, (x,) = mlp(), nn.LayerNorm(8), tensors((3, 8))
    inner = compile(model)
    return gradients(compile(lambda x: norm(F.relu(inner(x)) + x))(x), model, norm, x)


@trap
def a_functional_call(compile):
    model, (x,) = mlp(), tensors((3, 8))
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    for p in other.values():
        p.requires_grad_()
    f = compile(lambda p, x: torch.func.functional_call(model, p, x))
    return gradients(f(other, x), *other.values(), x)


@trap(fuses=False)
def transforms_inside(compile):
    x, v, w = tensors((3, 8), (8, 8), (8, 8), grad=False)

    def f(x):
        mapped = torch.func.vmap(lambda row: F.gelu(F.linear(row, w)))(x)
        _, tangent = torch.func.jvp(lambda x: F.gelu(F.linear(x, v)), (x,), (x * 2,))
        return mapped, tangent

    return compile(f)(x)


@trap(aot=False)
def gradients_of_gradients(compile):
    x, w = tensors((3, 8), (8, 8))
    f = compile(lambda x: F.layer_norm(F.gelu(F.linear(x, w)), (8,)))
    first = torch.autograd.grad(f(x).sin().sum(), (x, w), create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))]


@trap
def backward_twice(compile):
    x, w = tensors((3, 8), (8, 8))
    y = compile(lambda x: F.layer_norm(F.gelu(F.linear(x, w)), (8,)))(x)
    first = torch.autograd.grad(y.sin().sum(), (x, w), retain_graph=True)
    return [*first, *torch.autograd.grad(y.cos().sum(), (x, w))]


@trap
def saved_tensors_moved_elsewhere(compile):
    model, (x,) = mlp(), tensors((3, 8))
    f = compile(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        return gradients(f(x), model, x)


@pytest.mark.parametrize(("name", "then"), list(trap.cases()))
def test_trap(name, then):
    trap.check(name, then)


# What is random, and what happens at the same time.


@pytest.mark.parametrize("then", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("nested", [False, True])
def test_dropout_is_the_same_when_computed_again(then, nested):
    """What the result of a dropout shows is what its gradient has to say."""
    x, w = tensors((64, 8), (8, 8))

    def drop(x):
        return F.dropout(F.linear(x, w), 0.5)

    def twice(x):
        return drop(x) if not nested else checkpoint(drop, x, use_reentrant=False) + x

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: checkpoint(twice, x, use_reentrant=False),
        backend=fastdl.backend,
        options={"then": then},
    )
    with fastdl.policy("fused"):
        y = compiled(x)
        kept = ((y - x if nested else y).abs() > 1e-4).float()
        assert 0.3 < kept.mean() < 0.7
        (dw,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(dw, 2 * kept.t() @ x)


def test_what_a_checkpoint_saves_is_the_users_choice():
    """A context that saves the products of matrices: they are not computed again."""
    x, w = tensors((4, 8), (8, 8))
    policy = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def f(x):
        f = lambda x: torch.tanh(x @ w).sin()  # noqa: E731
        return checkpoint(f, x, use_reentrant=False, context_fn=policy)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=fastdl.backend)
    compiled(x)
    results, products = [], []
    for run in (compiled, f):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results.append(gradients(run(x), x, w))
        products.append(sum(event.name == "aten::mm" for event in profile.events()))
    torch.testing.assert_close(*results)
    assert products[0] == products[1]


def test_dropout_follows_the_seed_and_the_call():
    x, w = tensors((64, 8), (8, 8))
    compiled = Compiled(lambda x: F.dropout(F.relu(F.linear(x, w)), 0.5))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((compiled(x), compiled(x)))
    assert compiled.calls == ["linear"]
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*results[0]) and not torch.equal(results[0][0], results[2][0])


def test_models_compiled_in_threads():
    models = [mlp() for _ in range(4)]
    inputs = [tensors((3 + i, 8))[0] for i in range(4)]
    compiled, found = [torch.compile(m, backend=fastdl.backend) for m in models], {}

    def work(i):
        for _ in range(3):
            found[i] = gradients(compiled[i](inputs[i]), models[i], inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        torch.testing.assert_close(found[i], gradients(model(inputs[i]), model, inputs[i]))
