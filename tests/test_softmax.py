"""Softmax: the ways in which people write it, rows of which nothing is seen, and who computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.optimize import graph

SEEN = torch.arange(20) < torch.tensor([20, 13, 7])[:, None, None]
BIAS = torch.randn(3, 1, 20).to(torch.bfloat16)  # the same in all dtypes


def function(x):
    return F.softmax(x, dim=-1)


def method(x):
    return x.softmax(1)


SOFTMAX, LOG_SOFTMAX = nn.Softmax(dim=0), nn.LogSoftmax(dim=1)


def module(x):
    return SOFTMAX(x)


def logarithm(x):
    return torch.log_softmax(x, 2)


def logarithm_of_module(x):
    return LOG_SOFTMAX(x)


def minimum(x):
    return F.softmin(x, dim=1)


def negated(x):
    return torch.softmax(-x, dim=1)


def in_float32(x):
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def float_first(x):
    return torch.softmax(x.float(), dim=1).type_as(x)


def float_last(x):
    return F.log_softmax(x.float(), dim=-1)


def scaled(x):
    return (x * 0.3).softmax(-1)


def with_a_temperature(x):
    return F.log_softmax(x / 2.5, dim=1)


def biased(x):
    return F.softmax(x * 0.3 + BIAS.to(x.dtype), dim=-1)


def causal(x):
    return F.softmax((x / math.sqrt(8)).masked_fill(SEEN == 0, float("-inf")), dim=-1)


def hidden_a_little(x):
    return x.masked_fill(~SEEN, -3.0).softmax(dim=-1)


def chosen(x):
    return torch.where(SEEN, x, float("-inf")).softmax(-1)


def masked_in_float32(x):
    scores = x.float() * 0.3 + BIAS.float()
    return torch.softmax(scores, dim=-1).to(x.dtype)


def scores_in_float32(x):
    return F.softmax(x + BIAS.to(x.dtype), dim=-1, dtype=torch.float32).to(x.dtype)


def by_hand(x):
    e = torch.exp(x - x.max(dim=-1, keepdim=True)[0])
    return e / e.sum(dim=-1, keepdim=True)


def by_hand_detached(x):
    e = (x - x.max(1, keepdim=True).values.detach()).exp()
    return e / torch.sum(e, 1, keepdim=True)


def by_hand_of_amax(x):
    e = torch.exp(x - torch.amax(x, dim=1, keepdim=True))
    return e / e.sum(dim=1, keepdim=True)


def by_hand_plain(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def less_the_logsumexp(x):
    return x - x.logsumexp(-1, keepdim=True)


def less_the_sum(x):
    return x - x.exp().sum(-1, keepdim=True).log()


def log_of_softmax(x):
    return torch.log(F.softmax(x, dim=1))


WRITTEN = [
    function, method, module, logarithm, logarithm_of_module, minimum, negated, in_float32,
    float_first, float_last, scaled, with_a_temperature, biased, causal, hidden_a_little, chosen,
    masked_in_float32, scores_in_float32, by_hand, by_hand_detached, by_hand_of_amax,
    by_hand_plain, less_the_logsumexp, less_the_sum, log_of_softmax,
]  # fmt: skip
# casts and inversions of masks, which are small, stay
BESIDE = {"to", "float", "eq", "invert"}


def run(written, x):
    y = written(x)
    return [y, *torch.autograd.grad(y.float().sin().sum(), x)]


def names(gm):
    called = (n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr"))
    return [getattr(n.target, "__name__", n.target) for n in called]


def found(written, x):
    """The function compiled, and what its graph calls."""
    kept = []

    def keep(gm, given):
        fastdl.backend(gm, given)
        kept.extend(names(gm))
        return gm.forward

    torch._dynamo.reset()
    return run(torch.compile(written, backend=keep, fullgraph=True), x), kept


# of float32 too, where casts are not in the graph
CASTING = [in_float32, float_first, float_last, masked_in_float32, scores_in_float32]


@pytest.mark.parametrize(
    ("written", "dtype"),
    [*((f, torch.bfloat16) for f in WRITTEN), *((f, torch.float32) for f in CASTING)],
)
def test_is_found(written, dtype):
    x = torch.randn(3, 5, 20, dtype=dtype, requires_grad=True)
    ours, calls = found(written, x)
    (call,) = [name for name in calls if name not in BESIDE]
    assert call in ("softmax", "log_softmax", "softmin", "softmax_of_hidden")
    (site,) = [site for site in graph.last_report() if site.reason is None]
    assert site.op == call.removesuffix("_of_hidden")
    near = 1e-5 if dtype == torch.float32 else 0.05
    for got, wanted in zip(ours, run(written, x), strict=True):
        torch.testing.assert_close(got, wanted, atol=near, rtol=near)


def of_two_dimensions(x):
    e = x.exp()
    return e / e.sum((1, 2), keepdim=True)


def of_others(x):
    e = torch.exp(x - x.max(dim=-1, keepdim=True)[0])
    return e / x.exp().sum(dim=1, keepdim=True)


def of_squares(x):
    e = x.square()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("written", [of_two_dimensions, of_others, of_squares])
def test_is_left_alone(written):
    found(written, torch.randn(3, 5, 20, requires_grad=True))
    assert not [site for site in graph.last_report() if site.reason is None]


def learned_scale(x):
    return torch.softmax(x * x.mean(), -1)


def promoted(x):
    return torch.softmax(x.bfloat16() + BIAS.float(), -1)


@pytest.mark.parametrize("written", [learned_scale, promoted])
def test_what_is_no_option_stays(written):
    x = torch.randn(3, 5, 20, requires_grad=True)
    ours, calls = found(written, x)
    assert "softmax" in calls and {"mul", "add"} & set(calls)
    for a, b in zip(ours, run(written, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [20, 200])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_rows_of_which_nothing_is_seen(op, width, device, fused):
    """NaN, as from torch, with no gradient where a mask hides: where torch has it."""
    x = torch.randn(4, width, device=device, requires_grad=True)
    seen = torch.ones(4, width, dtype=torch.bool, device=device)
    seen[1], seen[2, : width - 1] = False, False
    y = getattr(FF, op)(x, -1, mask=seen)
    expected = getattr(F, op)(x.masked_fill(~seen, -math.inf), -1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    dy = torch.randn_like(y)
    (ours,), (torchs,) = (torch.autograd.grad(out, x, dy) for out in (y, expected))
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert y[1].isnan().all() and not ours.isnan().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", [(5, 300), (200, 5)])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_what_is_not_finite_in_long_rows(op, shape, value, device, fused):
    dim = shape.index(max(shape))
    x = torch.randn(shape, device=device)
    x[3, 2] = value
    torch.testing.assert_close(getattr(FF, op)(x, dim), getattr(F, op)(x, dim), equal_nan=True)


def test_a_bias_in_another_dtype(device, fused):
    x = torch.randn(3, 5, 20, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.randn(5, 1, device=device, requires_grad=True)
    y = FF.softmax(x, -1, mask=bias, scale=0.5)
    dx, dbias = torch.autograd.grad(y.float().sin().sum(), (x, bias))
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, F.softmax(x.float() * 0.5 + bias, -1).to(y.dtype))


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of", [torch.float16, torch.bfloat16, torch.float64, torch.long])
def test_dtypes_are_those_of_torch(of, to, device):
    x = (3 * torch.randn(5, 20, device=device)).to(of)
    ours, torchs = FF.softmax(x, -1, dtype=to), F.softmax(x, -1, dtype=to)
    torch.testing.assert_close(ours, torchs)


def test_without_a_dimension_warns_as_torch(device):
    x = torch.randn(2, 3, device=device)

    def warned(softmax):
        with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
            softmax(x)
        return caught[0].filename

    for torchs, ours in (
        (F.softmax, FF.softmax),
        (F.log_softmax, FF.log_softmax),
        (F.softmin, FF.softmin),
        (nn.Softmax(), fastdl.nn.Softmax()),
    ):
        assert warned(ours) == warned(torchs)


def test_reads_without_copies(device, fused):
    """Columns, transposed rows and channels last are read where they are."""
    x = torch.randn(2, 6, 4, 5, device=device)
    for given, dim in (
        (x, 1),
        (x.contiguous(memory_format=torch.channels_last), 1),
        (torch.randn(7, 9, device=device).t(), -1),
    ):
        launches = fastdl.explain(FF.softmax, given, dim).launches
        assert launches[0].args[0].data_ptr() == given.data_ptr()
        torch.testing.assert_close(FF.softmax(given, dim), F.softmax(given, dim))


def test_modules_are_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1))
    x = torch.randn(3, 8)
    expected = model(x)
    model = fastdl.optimize(model)
    assert [type(m) for m in list(model)[1:]] == [
        fastdl.nn.Softmax, fastdl.nn.LogSoftmax, fastdl.nn.Softmin,
    ]  # fmt: skip
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="2 dimensions, allowed are 3 and 4"):
        fastdl.nn.Softmax2d()(x)
