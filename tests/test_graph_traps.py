"""The graph engine: what looks safe and is not, as a model meets it.

Each trap runs twice, compiled with the backend and as it was written, and returns the tensors that
have to be the same. What the engine leaves alone, and for which reason: test_graph_hazards.py.
"""

import copy
import importlib
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastdl
from fastdl.optimize.graph.caches import digest
from graph_forms import Compiled, tensors

TRAPS = {}


def trap(function=None, **options):
    """A trap. `fuses=False`: nothing may be replaced. `aot=False`: AOT autograd cannot do it."""
    if function is None:
        return lambda f: trap(f, **options)
    TRAPS[function.__name__] = function, options
    return function


def gradients(out, *of):
    """The gradients of the sum of sines, for parameters of modules and for tensors."""
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum(o.sin().sum() for o in outs if o.requires_grad)
    leaves = [p for x in of for p in (x.parameters() if isinstance(x, nn.Module) else [x])]
    return [*outs, *torch.autograd.grad(loss, leaves)]


def traps():
    for name, (_, options) in TRAPS.items():
        yield pytest.param(name, "eager", id=name)
        if options.get("aot", True):
            yield pytest.param(name, "aot_eager", id=f"{name}-aot", marks=pytest.mark.slow)


def check_trap(name, then):
    function, options = TRAPS[name]
    made = []

    def ours(f, **more):
        made.append(Compiled(f, then, **more))
        return made[-1].function

    results = []
    for compiler in (ours, lambda f, **more: f):
        torch.manual_seed(0)
        results.append(function(compiler))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        assert got.requires_grad == wanted.requires_grad
    found = sum(sum(compiled.replaced.values()) for compiled in made)
    assert bool(found) == options.get("fuses", True), found


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))


# Shapes.


@trap
def a_batch_of_any_size(compile):
    model, found = mlp(), []
    f = compile(model)
    for rows in (5, 3, 1, 0, 7):
        (x,) = tensors((rows, 8))
        if rows > 1:
            torch._dynamo.mark_dynamic(x, 0)
        found += gradients(f(x), model, x)
    return found


@trap
def another_rank_and_dtype(compile):
    model, found = mlp(), []
    f = compile(model)
    for shape, dtype in (
        ((5, 8), torch.float32),
        ((2, 3, 8), torch.float32),
        ((8,), torch.float64),
    ):
        model.to(dtype)
        (x,) = tensors(shape, dtype=dtype)
        found += gradients(f(x), model, x)
    return found


@trap
def numbers_made_of_sizes(compile):
    w, b = tensors((8, 8), (8,))

    def f(x):
        return F.gelu(F.linear(x, w, b)) * len(x) + x.shape[0] / 8, F.linear(x, w) + x.size(0)

    f, found = compile(f, dynamic=True), []
    for rows in (3, 5):
        found += gradients(f(*tensors((rows, 8))), w, b)
    return found


# Views and memory.


@trap
def views_between_linear_and_activation(compile):
    x, w = tensors((6, 8), (8, 8))

    def f(x):
        h = F.linear(x, w).view(2, 3, 8).view(2, 24).unsqueeze(0).squeeze(0)
        return F.gelu(h).view(6, 8), F.relu(F.linear(x, w).t()).t() + x

    return gradients(compile(f)(x), x, w)


@trap
def a_view_of_an_intermediate_is_written_to(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w)
        row = h[0]
        y = F.gelu(h)
        row.zero_()
        z = F.silu(h)
        h.view(-1)[3:9].mul_(2)
        return y, z, F.relu(h)

    return compile(f)(x)


@trap
def a_view_of_the_result_is_written_to(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        y = F.layer_norm(F.linear(x, w), (8,)) * 1
        y[1] = 3
        y[:, 2:4].mul_(2)
        return y, y.view(-1)[5:]

    return gradients(compile(f)(x), x, w)


@trap
def halves_of_an_intermediate(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w)
        a, b = h.chunk(2, -1)
        h.mul_(2)
        y = F.silu(a) * b
        b.zero_()
        return y, F.silu(a) * b, h

    return compile(f)(x)


@trap
def a_tensor_and_its_view_are_given(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x, view):
        h = F.linear(x, w)
        view.add_(1)
        return F.gelu(h), x, F.relu(F.linear(x, w))

    return compile(f)(x, x.view(-1))


@trap
def dropout_that_drops_nothing_returns_its_input(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w)
        same = F.dropout(h, 0.5, training=False)
        same.add_(1)
        also = F.dropout(x * 1, 0.0)
        return h, F.gelu(same), also

    return compile(f)(x)


@trap
def results_keep_their_strides(compile):
    x, image, kernel = tensors((6, 4), (2, 4, 5, 5), (6, 4, 3, 3))

    def f(x, image):
        a = F.gelu(x.t()).t().view(-1)
        b = F.softmax(x.t(), 0).t().reshape(2, 12)
        c = F.conv2d(image.to(memory_format=torch.channels_last), kernel).relu()
        d = F.batch_norm(c, None, None, training=True).relu()
        e = F.group_norm(c, 2)
        last = [t.permute(0, 2, 3, 1).is_contiguous() for t in (c, d, e)]
        return a, b, c.permute(0, 2, 3, 1).view(-1), d, e, torch.tensor(last).float()

    return gradients(compile(f)(x, image), x, image, kernel)


@trap
def heads_keep_their_strides(compile):
    (x,) = tensors((2, 5, 24))

    def f(x):
        q, k, v = x.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return y.reshape(2, 5, 8), torch.tensor(y.stride()).float()

    return gradients(compile(f)(x), x)


@trap
def the_input_is_returned_and_the_result_twice(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        y = F.gelu(F.linear(x, w))
        return y, x, y, y.view(-1), F.dropout(x, 0.1, False)

    y, given, again, flat, kept = compile(f)(x)
    same = [given is x, again is y, flat.data_ptr() == y.data_ptr(), kept is x]
    return [*gradients((y, flat), x, w), torch.tensor(same)]


# Writes.


@trap
def embedding_that_normalizes_its_weight(compile):
    (w,) = tensors((8, 8), grad=False)
    w.mul_(5)
    x, ids = torch.randn(3, 8), torch.tensor([1, 2])

    def f(x):
        h = F.linear(x, w)
        words = F.embedding(ids, w, max_norm=0.1)
        bag = F.embedding_bag(ids[None], w, max_norm=0.05)
        return F.gelu(h), words, bag, F.gelu(F.linear(x, w))

    return compile(f)(x)


@trap
def results_written_into_a_given_tensor(compile):
    x, w, r = tensors((3, 8), (8, 8), (3, 8), grad=False)

    def f(x, out):
        h = F.linear(x, w)
        torch.add(h, r, out=out)
        y = F.gelu(h) + out
        torch.mul(x, 2, out=h)
        return y, F.silu(h), out

    return compile(f)(x, torch.empty(3, 8))


@trap
def initialisation_of_what_a_match_reads(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w)
        nn.init.constant_(x, 0.5)
        y = F.gelu(h)
        nn.init.zeros_(h)
        return y, F.gelu(h), F.linear(x, w)

    return compile(f)(x)


@trap
def data_of_what_a_match_reads(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        x = x * 1
        h = F.linear(x, w)
        x.data.mul_(3)
        y = F.gelu(h)
        h.copy_(x)
        h.masked_fill_(x > 0, 2.0)
        return y, F.gelu(h)

    return compile(f)(x)


@trap
def weights_that_the_graph_itself_updates(compile):
    x, w = tensors((3, 8), (8, 8), grad=False)

    def f(x):
        h = F.linear(x, w)
        w.mul_(0.5)
        return F.gelu(h) + F.gelu(F.linear(x, w))

    f = compile(f)
    return [f(x), f(x), w]


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


# Kinds of tensors.


@trap
def numbers_as_tensors(compile):
    x, w, scale, shift = tensors((3, 8), (8, 8), (), ())

    def f(x):
        y = F.layer_norm(x, (8,)) * (1 + scale) + shift
        return y, F.linear(x, w) * scale + shift, F.gelu(F.linear(x, w) + shift)

    return gradients(compile(f)(x), x, w, scale, shift)


@trap
def complex_and_integer_tensors(compile):
    z, w = torch.randn(3, 8, dtype=torch.complex64), torch.randn(8, 8, dtype=torch.complex64)
    n = torch.randint(-5, 5, (3, 8))

    def f(z, n):
        return F.linear(z, w) + z, torch.tanh(F.linear(z, w)), F.relu(n) + n, F.linear(n, n)

    return compile(f)(z, n)


@trap
def nan_and_infinity(compile):
    x, w = tensors((4, 8), (8, 8), grad=False)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf

    def f(x):
        h = F.linear(x, w)
        return F.relu(h), F.softmax(x, -1), F.hardtanh(x), F.layer_norm(h, (8,))

    return [y.nan_to_num(7, 8, 9) for y in compile(f)(x)]


@trap
def one_tensor_in_many_places(compile):
    x, w = tensors((8, 8), (8,))

    def f(x):
        square = F.gelu(F.linear(x, x, x[0])) + x
        return square, F.layer_norm(x + x, (8,), w, w), F.silu(x) * x

    return gradients(compile(f)(x), x, w)


@trap
def statistics_of_torchs_own_norm(compile):
    x, w, mean, var = torch.randn(8, 8), torch.randn(8, 8), torch.zeros(8), torch.ones(8)

    def f(x):
        h = F.linear(x, w, mean)
        torch.native_batch_norm(w, None, None, mean, var, True, 0.5, 1e-5)
        return F.gelu(h), F.gelu(F.linear(x, w, var))

    return [*compile(f)(x), mean, var]


@trap
def a_module_unrolled_in_time(compile):
    cell, head, (x,) = nn.Linear(8, 4), nn.Linear(4, 4), tensors((3, 5, 4))

    def f(x):
        state = torch.zeros(3, 4)
        for t in range(x.shape[1]):
            state = torch.tanh(cell(torch.cat([x[:, t], state], -1)))
            state = F.relu(head(state)) + state
        return state

    return gradients(compile(f)(x), cell, head, x)


@trap
def a_condition_on_data(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        h = F.linear(x, w)
        h = F.gelu(h) if h.sum() > 0 else F.relu(h)
        return h + torch.where(h > 0, F.silu(h), h)

    f = compile(f)
    return [*gradients(f(x), x, w), *gradients(f(-x), x, w)]


@trap
def tensors_taken_by_index(compile):
    x, w = tensors((6, 8), (8, 8))

    def f(x, rows):
        h = F.linear(x, w)
        h = h.index_add(0, rows, x[rows])
        y = F.gelu(h[rows])
        z = F.linear(x, w)
        z = z.masked_fill(x > 0, -1e9).softmax(-1)
        z = z.index_put((rows,), torch.ones(8))
        return y + x[rows], z

    return gradients(compile(f)(x, torch.tensor([4, 0, 4])), x, w)


@trap
def shapes_written_in_place(compile):
    x, w = tensors((8, 8), (8, 8), grad=False)

    def f(x):
        x = x * 1
        h = F.linear(x, w)
        x.t_()
        y = F.gelu(h)
        h.unsqueeze_(0)
        return y, F.silu(h), F.relu(F.linear(x, w))

    return compile(f)(x)


@trap
def a_gradient_inside(compile):
    x, w = tensors((3, 8), (8, 8))

    def f(x):
        y = F.gelu(F.linear(x, w))
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y, slope

    return gradients(compile(f)(x), x, w)


@trap
def frozen_weights_and_inputs(compile):
    model, (x,) = mlp(), tensors((3, 8), grad=False)
    model[0].requires_grad_(False)
    f = compile(model)
    found = gradients(f(x), model[2], model[3])
    model.requires_grad_(False)
    found += [f(x)]
    return [*found, *gradients(f(x.requires_grad_()), x)]


@pytest.mark.parametrize(("name", "then"), list(traps()))
def test_trap(name, then):
    with fastdl.policy("fused"):
        check_trap(name, then)


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


# What inductor keeps on disk.


@pytest.mark.slow
def test_code_of_other_sources_or_another_policy_is_not_used(monkeypatch):
    """Forward and backward, which is compiled later."""
    x, w = tensors((3, 8), (8, 8))
    fresh_cache = importlib.import_module("torch._inductor.utils").fresh_cache
    counters = importlib.import_module("torch._dynamo.utils").counters

    def compiled():
        torch._dynamo.reset()
        counters.clear()
        f = torch.compile(
            lambda x: F.gelu(F.linear(x, w)).sin(),
            backend=fastdl.backend,
            options={"then": "inductor"},
        )
        torch.autograd.grad(f(x).sum(), (x, w))
        return tuple(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))

    with fresh_cache():
        with fastdl.policy("fused"):
            assert compiled() == (0, 2)
            assert compiled() == (2, 0)
        with fastdl.policy("definition"):
            assert compiled()[0] == 0
        monkeypatch.setattr("fastdl.optimize.graph.caches.digest", lambda folder: "other")
        with fastdl.policy("fused"):
            assert compiled() == (0, 2)


def test_sources_have_a_digest(tmp_path):
    digests = []
    for version in ("1", "2", "1"):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        (folder / "op.py").write_text(version)
        digests.append(digest(folder))
    assert digests[0] == digests[2] != digests[1]
