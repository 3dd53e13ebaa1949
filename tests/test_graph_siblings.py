"""The graph engine joins linear layers of one input, and knows when not to."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastdl.functional as FF
from fastdl.optimize import graph
from graph_forms import Compiled, check_same, only_call, only_fused, tensors

X, WQ, WK, WV = (5, 8), (8, 8), (4, 8), (4, 8)
BQ, BK = (8,), (4,)


def joined(compiled):
    """The sites of joined layers: how many there are in each, and why not."""
    found = [s for s in graph.last_report() if "|" in s.pattern]
    return [(s.pattern.count("linear"), s.reason) for s in found if s.op == "linears"]


def attention(q, k, v, heads=2):
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(-3, -2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(-3, -2).flatten(-2)


# What is joined.


@pytest.mark.parametrize("biases", ["qkv", "q-v", "--v", "---"])
def test_queries_keys_and_values(biases):
    def f(x, wq, wk, wv, bq, bk, bv):
        pairs = zip((wq, wk, wv), (bq, bk, bv), biases, strict=True)
        q, k, v = (F.linear(x, w, b if letter != "-" else None) for w, b, letter in pairs)
        return attention(q, k, v)

    compiled = check_same(f, *tensors((2, *X), WQ, WK, WV, BQ, BK, BK))
    assert joined(compiled) == [(3, None)]
    (call,) = (n for n in compiled.fused if n.target is FF.linears)
    assert [b is not None for b in [*call.args, [None] * 3][2]] == [c != "-" for c in biases]


def test_the_call_stands_where_the_first_one_stood():
    """Queries are normed before there are keys."""

    def f(x, wq, wk, scale):
        q = F.rms_norm(F.linear(x, wq).view(-1, 2, 4), (4,)) * scale
        return q, F.linear(x, wk)

    compiled = check_same(f, *tensors(X, WQ, WK, (4,)))
    assert compiled.calls[0] == "linears" and joined(compiled) == [(2, None)]
    # both are one site, under the name that the first has in the user's graph
    assert [site.name for site in graph.last_report()] == ["linear", "rms_norm"]


@pytest.mark.parametrize("count", [2, 4, 5, 7])
def test_many_are_shared_out(count):
    def f(x, *weights):
        return tuple(F.linear(x, w) for w in weights)

    compiled = check_same(f, *tensors(X, *[(3 + i, 8) for i in range(count)]))
    sizes = sorted(size for size, _ in joined(compiled))
    assert sizes == {2: [2], 4: [2, 2], 5: [2, 3], 7: [2, 2, 3]}[count]
    assert only_fused(compiled) == ["linears"] * len(sizes)


def test_what_follows_a_layer_stays_with_it():
    def f(x, w1, w2, w3):
        return F.gelu(F.linear(x, w1)), F.linear(x, w2), F.linear(x, w3)

    compiled = check_same(f, *tensors(X, WQ, WK, WV))
    assert only_fused(compiled) == ["linear", "linears"]


def test_a_frozen_weight():
    x, wq, wk = tensors(X, WQ, WK)
    compiled = check_same(
        lambda x, wq, wk: (F.linear(x, wq), F.linear(x, wk)), x, wq, wk.requires_grad_(False)
    )
    assert only_call(compiled).target is FF.linears


def test_one_weight_twice():
    def f(x, w):
        return F.linear(x, w) * F.linear(x, w)

    check_same(f, *tensors(X, WQ))


def test_autocast():
    def f(x, wq, wk):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, wq), F.linear(x, wk)

    compiled = check_same(f, *tensors(X, WQ, WK), atol=2e-2)
    assert joined(compiled) == [(2, None)]


def test_open_sizes():
    compiled = Compiled(lambda x, wq, wk: (F.linear(x, wq), F.linear(x, wk)), dynamic=True)
    wq, wk = tensors(WQ, WK)
    for rows in (5, 9, 3):
        x = torch.randn(rows, 8)
        for got, w in zip(compiled(x, wq, wk), (wq, wk), strict=True):
            torch.testing.assert_close(got, F.linear(x, w))
    assert len(compiled.graphs) == 1 and only_call(compiled).target is FF.linears


def test_bodies_of_checkpoints():
    def f(x, wq, wk):
        return checkpoint(lambda x: F.linear(x, wq).sum() * F.linear(x, wk), x, use_reentrant=False)

    compiled = check_same(f, *tensors(X, WQ, WK))
    assert joined(compiled) == [(2, None)]


# What is not.


def test_layers_of_other_blocks():
    """Else keys and values of all layers would be there from the first one on."""

    def f(x, memory, *weights):
        x, memory = x / 8, memory / 8
        for wq, wk, wv in zip(*[iter(weights)] * 3, strict=True):
            x = attention(F.linear(x, wq), F.linear(memory, wk), F.linear(memory, wv))
        return x

    compiled = check_same(f, *tensors((2, *X), (2, 6, 8), *[WQ, WK, WV] * 3))
    assert joined(compiled) == [(2, None)] * 3
    assert only_fused(compiled).count("linears") == 3


def test_experts():
    """All of them read one input."""

    def f(x, *weights):
        x, y = x / 8, 0
        for gate, up, down in zip(*[iter(weights)] * 3, strict=True):
            y = y + F.linear(F.linear(x, gate).cumsum(-1) * F.linear(x, up), down)
        return y

    compiled = check_same(f, *tensors(X, *[(6, 8), (6, 8), (8, 6)] * 3))
    assert joined(compiled) == [(2, None)] * 3


def write_to_input(x, wq, wk):
    q = F.linear(x, wq)
    x.add_(1)
    return q, F.linear(x, wk)


def write_to_a_view(x, wq, wk):
    q, view = F.linear(x, wq), x.view(-1)
    view.mul_(2)
    return q, F.linear(x, wk)


def write_to_weight(x, wq, wk):
    q = F.linear(x, wq)
    wk.add_(1)
    return q, F.linear(x, wk)


@torch.compiler.allow_in_graph
def bump(x):
    return x.add_(1)


def write_of_an_unknown_function(x, wq, wk):
    q = F.linear(x, wq)
    bump(x)
    return q, F.linear(x, wk)


def write_of_statistics(x, wq, wk):
    """Also where the op that writes has been fused."""
    q = F.linear(x, wq)
    F.batch_norm(q, x[0], x[1], training=True)
    return q, F.linear(x, wk)


@pytest.mark.parametrize(
    "function",
    [
        write_to_input,
        write_to_a_view,
        write_to_weight,
        write_of_an_unknown_function,
        write_of_statistics,
    ],
)
def test_writes_between(function):
    given = tensors(X, WQ, WK, grad=False)
    compiled = check_same(lambda *args: function(*(a * 1 for a in args)), *given)
    ((size, reason),) = joined(compiled)
    assert size == 2 and "write" in reason
    assert "linears" not in only_fused(compiled)


def test_a_write_parts_a_group():
    """What is left on one side of it is still joined."""

    def f(x, wq, wk, wv):
        q, k = F.linear(x, wq), F.linear(x, wk)
        wv.add_(1)
        return q, k, F.linear(x, wv)

    given = tensors(X, WQ, WK, WV, grad=False)
    compiled = check_same(lambda *args: f(*(a * 1 for a in args)), *given)
    (three, reason), two = sorted(joined(compiled), key=lambda s: -s[0])
    assert three == 3 and "write" in reason and two == (2, None)


def test_a_write_after():
    """Alone, a frozen layer of an input without a gradient keeps nothing for backward."""

    def f(x, wq, wk):
        wk = wk * 1
        y = F.linear(x, wq), F.linear(x, wk)
        wk.add_(1)
        return y

    x, wk = tensors(X, WK, grad=False)
    compiled = check_same(f, x, *tensors(WQ), wk)
    ((_, reason),) = joined(compiled)
    assert "backward may need" in reason


def test_a_weight_that_comes_later():
    def f(x, wq, wk):
        q = F.linear(x, wq)
        return q, F.linear(x, wk * q.mean())

    compiled = check_same(f, *tensors(X, WQ, WK))
    assert joined(compiled) == [(2, "mul is computed after the first of these calls")]


def test_an_output_as_a_weight():
    check_same(lambda x, w: F.linear(x, F.linear(x, w)), *tensors((8, 8), (8, 8)))


def autocast_begins(x, wq, wk):
    q = F.linear(x, wq)
    with torch.autocast("cpu", torch.bfloat16):
        return q, F.linear(x, wk)


def gradients_end(x, wq, wk):
    q = F.linear(x, wq)
    with torch.no_grad():
        return q, F.linear(x, wk)


@pytest.mark.parametrize("function", [autocast_begins, gradients_end])
def test_a_change_of_mode_between(function):
    compiled = check_same(function, *tensors(X, WQ, WK), atol=2e-2)
    ((_, reason),) = joined(compiled)
    assert "changes the mode" in reason


def test_transforms_are_left_to_torch():
    wq, wk = torch.randn(WQ), torch.randn(WK)

    def f(x):
        def loss(t):
            return F.linear(t, wq).sum() + F.linear(t, wk).square().sum()

        return torch.func.grad(loss)(x)

    assert check_same(f, *tensors(X, grad=False)).fused == []


# Models.


@pytest.mark.parametrize(
    "kind", ["Llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("Qwen2", "Qwen3"))]
)
def test_models_of_transformers(kind):
    """Without biases, with them, and with queries that are normed first; fewer heads of keys."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
    model = getattr(transformers, f"{kind}Model")(config)
    ids = torch.randint(0, 32, (2, 6))
    grads = []
    compiled = Compiled(model)
    for run in (compiled, model):
        out = run(ids, use_cache=False).last_hidden_state
        grads.append(torch.autograd.grad(out.sin().sum(), model.parameters()))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert joined(compiled) == [(3, None)]
    names = [s.name for s in graph.last_report() if s.op == "linears"]
    assert all("self_attn.q_proj" in name for name in names)
