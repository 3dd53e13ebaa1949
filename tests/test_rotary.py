"""Rotary embedding: odd positions, layouts without copies, and what models write."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fastdl
import fastdl.functional as FF
from fastdl.optimize import graph


def tables(rows, width, dtype=torch.float32, device="cpu"):
    """cos and sin as models make them, the same for both halves."""
    frequencies = 100.0 ** (torch.arange(0, width, 2) / -width)
    angles = torch.outer(torch.arange(rows).float(), frequencies).repeat(1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def halves(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def chunks(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x2.neg(), x1], -1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def neighbours_of_heads(x):
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def apply_to_both(q, k, cos, sin, rotate=halves, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate(q) * sin), (k * cos) + (rotate(k) * sin)


def from_transformers():
    return pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb


APPLY = [
    pytest.param(lambda: apply_to_both, id="written out"),
    pytest.param(from_transformers, id="transformers"),
]


def projected(b, s, h, d, device="cpu", part="whole"):
    """[B, H, S, D] as a projection leaves it, [B, S, H * D], or packed: a part of a wider one."""
    wide = torch.randn(b, s, 3 * h * d, device=device)
    columns = wide[..., : h * d] if part == "packed" else wide[..., : h * d].contiguous()
    return columns.view(b, s, h, d).transpose(1, 2)


# What models write.


@pytest.mark.parametrize("form", APPLY)
def test_it_equals_what_models_write(form, fused, device):
    apply, ids = form(), torch.tensor([[3, 4, 5, 6, 7], [0, 0, 1, 2, 3]], device=device)
    cos, sin = tables(11, 16, device=device)
    q, k = projected(2, 5, 4, 16, device), projected(2, 5, 2, 16, device)
    for ours, theirs in zip((q, k), apply(q, k, cos[ids], sin[ids]), strict=True):
        torch.testing.assert_close(FF.apply_rotary_emb(ours, cos, sin, positions=ids), theirs)
        wide = (cos[ids].unsqueeze(1), sin[ids].unsqueeze(1))
        torch.testing.assert_close(FF.apply_rotary_emb(ours, *wide), theirs)


def compiled(function, *args, **options):
    """The calls of fastdl in the graph of the function, and what it returns."""
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(function, backend=fastdl.backend, options={"then": keep}, **options)
    result = run(*args)
    nodes = graphs[-1].graph.nodes
    return [n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl.")], result


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", APPLY)
def test_graph_finds_what_models_write(form, dynamic):
    apply, (cos, sin) = form(), tables(5, 16)
    q, k = (projected(2, 5, h, 16).requires_grad_() for h in (4, 2))
    calls, got = compiled(apply, q, k, cos[None], sin[None], dynamic=dynamic)
    assert [call.target for call in calls] == [FF.apply_rotary_emb] * 2
    assert len(calls[0].graph.find_nodes(op="call_function", target=torch.cat)) == 0
    wanted = apply(q, k, cos[None], sin[None])
    torch.testing.assert_close(got, wanted)
    grads = (torch.autograd.grad([y.sin().sum() for y in ys], (q, k)) for ys in (got, wanted))
    torch.testing.assert_close(*grads)


def sin_first(x, cos, sin):
    return sin * halves(x) + cos * x


def widened(x, cos, sin):
    wide = x.float()
    return (wide * cos.float() + halves(wide) * sin.float()).to(x.dtype)


@pytest.mark.parametrize(
    ("write", "dtype", "options"),
    [
        (sin_first, torch.bfloat16, {}),
        (lambda x, c, s: (x * c) + (chunks(x) * s), torch.bfloat16, {}),
        (lambda x, c, s: x.mul(c).add(neighbours(x) * s), torch.float32, {"interleaved": True}),
        (lambda x, c, s: x * c + neighbours_of_heads(x) * s, torch.float32, {"interleaved": True}),
        (lambda x, c, s: (x * c + halves(x) * s).type_as(x), torch.float16, {}),
        (widened, torch.bfloat16, {}),
        (widened, torch.float32, {}),
    ],
)
def test_other_spellings(write, dtype, options):
    x, (cos, sin) = torch.randn(2, 3, 5, 16, dtype=dtype), tables(5, 16)
    (call,), got = compiled(write, x, cos.to(dtype), sin.to(dtype))
    assert call.target is FF.apply_rotary_emb
    assert call.kwargs == options
    torch.testing.assert_close(got, write(x, cos.to(dtype), sin.to(dtype)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_the_definition_comes_back(table, interleaved):
    x, (cos, sin) = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16), tables(5, 16, table)
    with fastdl.policy("definition"):
        (call,), got = compiled(
            lambda x: FF.apply_rotary_emb(x, cos, sin, interleaved=interleaved), x
        )
    assert call.target is FF.apply_rotary_emb
    assert call.kwargs == ({"interleaved": True} if interleaved else {})
    assert got.dtype == torch.bfloat16


def test_a_result_of_another_dtype_stays():
    x, (cos, sin) = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16), tables(5, 16)
    calls, got = compiled(sin_first, x, cos, sin)
    assert calls == []
    assert got.dtype == torch.float32
    assert "shape or dtype" in graph.last_report()[0].reason


def uneven(x, cos, sin):
    return (x * cos) + (torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin)


def shifted(x, cos, sin):
    return (x * cos) + (torch.cat((-x[..., 8:16], x[..., :8]), dim=-1) * sin)


def of_another(x, cos, sin):
    return (x * cos) + (halves(x + 1) * sin)


def other_sign(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((x2, -x1), dim=-1) * sin)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("write", [uneven, shifted, of_another, other_sign])
def test_what_is_not_rotary_stays(write, dynamic):
    x, (cos, sin) = torch.randn(2, 3, 5, 16), tables(5, 16)
    calls, got = compiled(write, x, cos, sin, dynamic=dynamic)
    assert calls == []
    torch.testing.assert_close(got, write(x, cos, sin))


def test_tables_that_enlarge_the_result_stay():
    x, (cos, sin) = torch.randn(5, 16), tables(5, 16)
    wide = cos.expand(2, 5, 16), sin.expand(2, 5, 16)
    calls, got = compiled(sin_first, x, *wide)
    assert calls == []
    assert got.shape == (2, 5, 16)
    with pytest.raises(RuntimeError, match="must broadcast to x"):
        FF.apply_rotary_emb(x, *wide)


# Positions.


def test_negative_positions_count_from_the_end(fused, device):
    x, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(7, 8, device=device)
    positions = torch.tensor([-1, -7, 0, 6, -3], device=device)
    got = FF.apply_rotary_emb(x, cos, sin, positions=positions)
    assert torch.equal(got, FF.apply_rotary_emb(x, cos[positions], sin[positions]))


@pytest.mark.parametrize("position", [7, -8, 2**40, -(2**40)])
def test_a_position_that_is_not_there_gives_nan(position, fused, device):
    x, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(7, 8, device=device)
    positions = torch.tensor([0, 1, position, 3, 6], device=device)
    got = FF.apply_rotary_emb(x, cos, sin, positions=positions)
    assert got[:, :, 2].isnan().all()
    assert not got[:, :, [0, 1, 3, 4]].isnan().any()


def test_positions_of_any_stride(fused, device):
    x, (cos, sin) = torch.randn(3, 2, 5, 8, device=device), tables(9, 8, device=device)
    wide = torch.randint(0, 9, (5, 6), device=device)
    views = wide[:, ::2].t(), wide[0, :5].expand(3, 5), wide[:, 1]
    assert not any(view.is_contiguous() for view in views)
    for view in views:
        got = FF.apply_rotary_emb(x, cos, sin, positions=view)
        assert torch.equal(got, FF.apply_rotary_emb(x, cos, sin, positions=view.contiguous()))


def test_a_column_of_a_wider_table(fused, device):
    """Tables may be views: rows apart, or columns apart."""
    x, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(9, 24, device=device)
    for view in (slice(8, 16), slice(0, 24, 3)):
        given = cos[:, view], sin[:, view]
        dense = given[0].contiguous(), given[1].contiguous()
        for options in ({"positions": torch.tensor([8, 0, 3, 3, 1], device=device)}, {}):
            got, wanted = (
                FF.apply_rotary_emb(x, *(t if options else t[:5] for t in both), **options)
                for both in (given, dense)
            )
            assert torch.equal(got, wanted)


# Memory.


def launched(op):
    """The arguments of the one launch that op leads to, and its result."""
    results = []
    (launch,) = fastdl.explain(lambda: results.append(op())).launches
    return launch.args, results[0]


@pytest.mark.parametrize("part", ["whole", "packed"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_projections_are_read_and_written_where_they_are(part, interleaved, fused, device):
    x = projected(2, 5, 3, 8, device, part).requires_grad_()
    cos, sin = tables(5, 8, device=device)
    args, y = launched(lambda: FF.apply_rotary_emb(x, cos, sin, interleaved=interleaved))
    for mine, used in zip((x, cos, sin, y), (*args[:3], args[4]), strict=True):
        assert mine.data_ptr() == used.data_ptr()
    assert y.transpose(1, 2).is_contiguous()
    dy = projected(2, 5, 3, 8, device, part)
    args, (dx,) = launched(lambda: torch.autograd.grad(y, x, dy))
    assert args[0].data_ptr() == dy.data_ptr()
    assert dx.transpose(1, 2).is_contiguous()


def test_the_gradient_has_the_order_of_x_whatever_comes_back(fused, device):
    x = projected(2, 5, 3, 8, device).requires_grad_()
    y = FF.apply_rotary_emb(x, *tables(5, 8, device=device))
    (dx,) = torch.autograd.grad(y, x, torch.randn(2, 3, 5, 8, device=device))
    assert dx.stride() == x.stride()


def test_x_is_kept_only_for_tables_that_learn(fused, device):
    x, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(5, 8, device=device)
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    for learns in (False, True):
        kept.clear()
        leaf, table = x.clone().requires_grad_(), cos.clone().requires_grad_(learns)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            FF.apply_rotary_emb(leaf, table, sin)
        assert (leaf.data_ptr() in kept) == learns
        assert sin.data_ptr() in kept


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_strides_and_tables(device, data):
    """Every order of dimensions, every way to broadcast."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shape.append(6)
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[i] for i in order], device=device)
    x = x.permute([order.index(i) for i in range(len(shape))])

    def table():
        sizes = [data.draw(st.sampled_from((1, n))) for n in shape]
        return torch.randn(sizes[data.draw(st.integers(0, len(shape))) :], device=device)

    cos, sin = table(), table()
    options = {"interleaved": data.draw(st.booleans())}
    results = []
    for mode in ("fused", "definition"):
        leaves = [t.detach().requires_grad_() for t in (x, cos, sin)]
        with fastdl.policy(mode, on_fallback="error"):
            y = FF.apply_rotary_emb(*leaves, **options)
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_columns_far_apart(fused, device):
    """2**30 elements from one to the next; the memory between them is never touched."""
    apart, dense = 2**30, torch.randn(3, 4, dtype=torch.bfloat16, device=device)
    x = dense.new_empty(3 * apart + 3).as_strided((3, 4), (1, apart)).copy_(dense)
    for interleaved in (False, True):
        got, wanted = (
            FF.apply_rotary_emb(t, *tables(3, 4, torch.bfloat16, device), interleaved=interleaved)
            for t in (x, dense)
        )
        assert torch.equal(got, wanted)


# Properties.


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_gives_the_input(interleaved, fused, device):
    x, (cos, sin) = torch.randn(2, 3, 5, 16, device=device), tables(5, 8, device=device)
    repeat = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: t.repeat(1, 2))
    cos, sin = (repeat(t) for t in (cos, sin))
    y = FF.apply_rotary_emb(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(FF.apply_rotary_emb(y, cos, -sin, interleaved=interleaved), x)


def test_scores_depend_on_distance_alone(fused, device):
    q, k = torch.randn(1, 8, device=device), torch.randn(1, 8, device=device)
    cos, sin = tables(20, 8, device=device)

    def score(i, j):
        at = [torch.tensor([n], device=device) for n in (i, j)]
        turned = [
            FF.apply_rotary_emb(t, cos, sin, positions=n) for t, n in zip((q, k), at, strict=True)
        ]
        return turned[0] @ turned[1].t()

    torch.testing.assert_close(score(3, 1), score(19, 17))
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3
