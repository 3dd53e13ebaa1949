"""RMS normalization: its cast orders, and the ways in which models write it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.optimize import graph

EPS = 1e-6


def inputs(dtype=torch.float32, weight=torch.float32):
    x, r = (torch.randn(6, 40, dtype=dtype, requires_grad=True) for _ in range(2))
    return x, torch.randn(40).to(weight).requires_grad_(), r


def llama(x, w, r):
    input_dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return w * x.to(input_dtype)


def meta(x, w, r):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * w


def gemma(x, w, r):
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (n * (1.0 + w.float())).type_as(x)


def t5(x, w, r):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if w.dtype in (torch.float16, torch.bfloat16):
        x = x.to(w.dtype)
    return w * x


def olmo(x, w, r):
    input_dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    return (w * (x * torch.rsqrt(variance + EPS))).to(input_dtype)


def products(x, w, r):
    wide = x.float()
    return (wide * (torch.mean(wide * wide, dim=-1, keepdim=True) + EPS).rsqrt()).to(x.dtype) * w


def divided(x, w, r):
    wide = x.float()
    return (wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * w


def without_weight(x, w, r):
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return n.type_as(x) + 0 * w


def function(x, w, r):
    return F.rms_norm(x, (40,), w, EPS)


def function_in_float32(x, w, r):
    return F.rms_norm(x.float(), (40,), w.float(), EPS).to(x.dtype)


def after_a_sum(written):
    return lambda x, w, r: written(x + r, w, r)


def before_a_block(written):
    def block(x, w, r):
        h = x + r
        return written(h, w, r), h

    return block


WRITTEN = [
    llama, meta, gemma, t5, olmo, products, divided, without_weight, function, function_in_float32,
]  # fmt: skip
ROUNDED = (llama, meta, t5, products, divided)


def run(function, given):
    outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(y.float().sin().sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, given, allow_unused=True)]


def only_fused(gm):
    nodes = gm.graph.nodes
    return [n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl.")]


def compiled(function, kept):
    """The function compiled; `kept` takes the fused calls of its graph."""

    def keep(gm, given):
        fastdl.backend(gm, given)
        kept.extend(only_fused(gm))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=keep, fullgraph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("around", [None, after_a_sum, before_a_block])
@pytest.mark.parametrize("written", WRITTEN)
def test_is_found(written, around, dtype):
    whole = around(written) if around else written
    kept, given = [], inputs(dtype, dtype)
    found = run(compiled(whole, kept), given)
    (call,) = kept
    assert call.target.__name__ in ("rms_norm", "rms_norm_of_last")
    options = call.kwargs
    assert ("residual" in options) == (around is not None)
    assert options.get("prenorm", False) == (around is before_a_block)
    assert options.get("weight_offset", 0) == (written is gemma)
    if dtype == torch.bfloat16:
        assert (options.get("cast") == "llama") == (written in ROUNDED)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for got, wanted in zip(found, run(whole, given), strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def of_rows(x, w, r):
    return w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS))


def learned_eps(x, w, r):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + r[:, :1]))


def of_cubes(x, w, r):
    return w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS))


def of_another(x, w, r):
    return w * (x * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + EPS))


def factor_of_all(x, w, r):
    return r * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w


def rounded_elsewhere(x, w, r):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(torch.float16).float()


def read_twice(x, w, r):
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * n, n


@pytest.mark.parametrize("written", [of_rows, learned_eps, of_cubes, of_another])
def test_is_left_alone(written):
    torch._dynamo.reset()
    torch.compile(written, backend=fastdl.backend)(*inputs())
    assert not [site for site in graph.last_report() if site.reason is None]


@pytest.mark.parametrize("written", [factor_of_all, read_twice, rounded_elsewhere])
def test_what_is_not_its_weight_stays(written):
    kept, given = [], inputs()
    found = run(compiled(written, kept), given)
    (call,) = kept
    assert call.args[1] is None
    near = 2e-3 if written is rounded_elsewhere else 1e-5
    for got, wanted in zip(found, run(written, given), strict=True):
        torch.testing.assert_close(got, wanted, atol=near, rtol=near)


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize(
    ("cast", "offset", "written"),
    [("torch", 0.0, olmo), ("llama", 0.0, llama), ("gemma", 1.0, gemma)],
)
def test_casts_are_those_of_the_model(cast, offset, written, width, device):
    """Hardly an element differs from the model's, and many do in the other order."""
    x = torch.randn(200, width, dtype=torch.bfloat16, device=device)
    w = torch.randn(width, dtype=torch.bfloat16, device=device)
    expected = written(x, w, None)

    def differing(cast):
        y = FF.rms_norm(x, (width,), w, EPS, cast=cast, weight_offset=offset)
        return (y != expected).float().mean().item()

    with fastdl.policy("fused", on_fallback="error"):
        assert differing(cast) < 0.002
        assert differing("torch" if cast == "llama" else "llama") > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eps_of_none_is_that_of_torch(dtype, device):
    x = torch.full((3, 8), 1e-4, dtype=dtype, device=device)
    with fastdl.policy("fused", on_fallback="error"):
        y = FF.rms_norm(x, (8,))
    torch.testing.assert_close(y, F.rms_norm(x, (8,)))
    assert y.mean() < 0.5


@pytest.mark.parametrize(("of_x", "of_w"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_weight_of_another_dtype(of_x, of_w, offset):
    x, w, _ = inputs(getattr(torch, of_x), getattr(torch, of_w))
    with fastdl.policy("fused", on_fallback="error"):
        y = FF.rms_norm(x, (40,), w, EPS, weight_offset=offset)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    n = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    rough = 1e-5 if of_x == "float32" else 0.02
    torch.testing.assert_close(y.double(), n * (w.double() + offset), atol=rough, rtol=rough)


def test_a_residual_of_another_shape_is_added_before():
    x, w, r = inputs()
    y, h = FF.rms_norm(x, (40,), w, EPS, residual=r[:1], prenorm=True)
    torch.testing.assert_close(h, x + r[:1])
    torch.testing.assert_close(y, F.rms_norm(x + r[:1], (40,), w, EPS))


def test_unknown_cast():
    with pytest.raises(ValueError, match="cast is 'bf16', allowed are torch, llama, gemma"):
        FF.rms_norm(torch.ones(2, 4), (4,), cast="bf16")


def test_module_is_replaced():
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    expected = model(x)
    assert fastdl.optimize(model) is model
    assert type(model[0]) is fastdl.nn.RMSNorm
    torch.testing.assert_close(model(x), expected)
    assert type(fastdl.restore(model)[0]) is nn.RMSNorm
