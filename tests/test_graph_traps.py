"""The graph engine: tensors that look safe and are not. Reasons: test_graph_hazards.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_forms import tensors
from trap_forms import Traps, gradients, mlp

trap = Traps()


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


@pytest.mark.parametrize(("name", "then"), list(trap.cases()))
def test_trap(name, then):
    trap.check(name, then)
