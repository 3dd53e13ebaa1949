"""Attention that a table sends to torch's flash kernels: the contract holds as if it were ours."""

import importlib
from functools import partial

import pytest
import torch

import fastdl
import fastdl.functional as FF
from fastdl import tuned
from fastdl.contract import SPECS
from fastdl.contract.checks import CHECKS
from fastdl.contract.evaluate import FORWARD, GRADIENT, compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch's kernel of a CPU")

# What is replaced here are a table's answers, and torch's operators.
_route, _tuned, attention, attention_flash = (
    importlib.import_module(f"fastdl.ops.{name}")
    for name in ("_route", "_tuned", "attention", "attention_flash")
)
TORCH = tuned.Config({}, variant="torch")
SPEC = SPECS["attention"]
PLAIN = ("GPT-2", "ViT", "UNet", "Whisper", "plain", "three dimensions", "lse")
PASSES = ("forward", "backward")


@pytest.fixture
def sent(monkeypatch):
    """Tables send all attention to torch, also that of float32. The passes that it computed."""
    lookup, passes = _tuned.lookup, []

    def found(op, *asked):
        return TORCH if op in ("attention", "attention_backward") else lookup(op, *asked)

    def counted(name):
        function = getattr(attention_flash, name)
        return lambda *args: passes.append(name) or function(*args)

    monkeypatch.setattr(_tuned, "lookup", found)
    monkeypatch.setattr(attention_flash, "TYPES", (*attention_flash.TYPES, torch.float32))
    monkeypatch.setattr(_route, "QUIET", _route.QUIET | {_route.Reason.MEASURED})
    for name in PASSES:
        monkeypatch.setattr(attention_flash, name, counted(name))
    return passes


def case_named(name):
    return next(case for case in SPEC.cases if case.name == name)


CHECKED = [
    *(("accurate", name) for name in PLAIN),
    *((check, "GPT-2") for check in ("transposed", "sliced", "expanded", "offset", "needed")),
    *((check, "plain") for check in ("repeatable", "strided_cotangents", "second_derivative")),
    *((check, "GPT-2") for check in ("opcheck", "compiled", "recomputed", "memory")),
]


# The second derivative is the definition's.
FORWARD_ONLY = ("expanded", "second_derivative")


@pytest.mark.parametrize("name, case", CHECKED, ids=str)
def test_the_contract(sent, name, case, device):
    check, case = CHECKS[name], case_named(case)
    for dtype in check.dtypes or [None]:
        if dtype is torch.float64:
            continue
        check.function(*filter(lambda a: a is not None, (SPEC, case, device, dtype)))
    assert "forward" in sent
    assert "backward" in sent or case.name == "lse" or name in FORWARD_ONLY


def inputs(B=2, H=2, S=40, D=16, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(B, H, S, D).to(dtype).requires_grad_() for _ in range(3)]


OTHERS = {
    "shared keys": lambda q, k, v: FF.scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], enable_gqa=True
    ),
    "a mask": lambda q, k, v: FF.scaled_dot_product_attention(
        q, k, v, torch.ones(18, 18, dtype=torch.bool)
    ),
    "a window": lambda *qkv: FF.scaled_dot_product_attention(*qkv, window_size=(5, 0)),
    "softcap": lambda *qkv: FF.scaled_dot_product_attention(*qkv, softcap=2.0),
    "sinks": lambda *qkv: FF.scaled_dot_product_attention(*qkv, sinks=torch.zeros(2)),
    "slopes": lambda *qkv: FF.scaled_dot_product_attention(*qkv, alibi_slopes=torch.zeros(2)),
    "dropout": lambda *qkv: FF.scaled_dot_product_attention(*qkv, dropout_p=0.5),
    "negative scale": lambda *qkv: FF.scaled_dot_product_attention(*qkv, scale=-1.0),
    "not square": lambda q, k, v: FF.scaled_dot_product_attention(
        q[:, :, :9], k, v, is_causal=True
    ),
    "odd columns": lambda *qkv: FF.scaled_dot_product_attention(*(x[..., :12] for x in qkv)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_torch_does_not_have_stays_ours(sent, name):
    qkv = inputs(B=1, S=18)
    with fastdl.policy("fused", on_fallback="error"):
        o = OTHERS[name](*qkv)
        assert "attention_dq" in str(fastdl.explain(o.sum().backward))
    assert not sent


def require(what, o, gradients, qkv):
    """The contract's rule, for causal attention and the gradients of its sum."""
    theirs = []
    for dtype in (o.dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        with fastdl.policy("definition"):
            output = FF.scaled_dot_product_attention(*leaves, is_causal=True)
        theirs.append(([output], torch.autograd.grad(output.sum(), leaves)))
    (low, low_grads), (true, true_grads) = theirs
    compare([o], low, true, FORWARD).require(what)
    compare(gradients, low_grads, true_grads, GRADIENT).require(what)


def test_a_table_decides_each_pass(monkeypatch):
    """Statistics of one are what the other needs, whoever computes them."""
    q, k, v = inputs(B=1, S=18)
    found = {}
    for key in (*PASSES, "both", "neither"):
        ours = [x.detach().requires_grad_() for x in (q, k, v)]
        table = {}
        if key in ("forward", "both"):
            table["attention"] = TORCH
        if key in ("backward", "both"):
            table["attention_backward"] = TORCH
        monkeypatch.setattr(_tuned, "lookup", lambda op, *asked, table=table: table.get(op))
        o = FF.scaled_dot_product_attention(*ours, is_causal=True)
        gradients = partial(torch.autograd.grad, o, ours, torch.ones_like(o), retain_graph=True)
        names = {launch.kernel.name for launch in fastdl.explain(gradients).launches}
        found[key] = [o, *gradients()]
        assert ("attention_dq" in names) == (key in ("forward", "neither"))
    for key, (o, *gradients) in found.items():
        require(key, o, gradients, (q, k, v))


def test_the_gradient_of_the_logsumexp_is_ours(sent):
    qkv = inputs()
    o, lse = FF.scaled_dot_product_attention(*qkv, return_lse=True)
    gradients = partial(torch.autograd.grad, (o.sum(), lse.sum()), qkv)
    assert "attention_dq" in str(fastdl.explain(gradients)) and sent == ["forward"]


def test_statistics_are_in_base_2():
    q, k, v = (x.detach() for x in inputs(dtype=torch.float16))
    given = attention.Given(
        q, k, v, None, None, None, None, None, None, None, None, 0, 0, -1, 0, 0.25, 0.0, 0.0, 0
    )
    (_, lse), (_, base_2) = attention_flash.forward(given), attention.forward(*given)
    # torch's kernel for a CPU rounds logits to float16
    torch.testing.assert_close(lse, base_2, rtol=0, atol=5e-4)


def test_explain_says_that_torch_was_faster(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path))
    tuned.forget()
    device = tuned.device_of(torch.empty(0))
    margin = {"ratio": 0.8, "low": 0.78, "high": 0.81}
    entry = {"blocks": {}, "variant": "torch", "margin": margin}
    key = "attention/bfloat16/64x16"
    tuned.write(tuned.user_file(device.name), device.name, {}, {key: entry})
    q, k, v = inputs()
    said = str(fastdl.explain(FF.scaled_dot_product_attention, q, k, v))
    assert "attention (device): torch, because torch measured faster here" in said
    assert "0.80x torch's speed (0.78 to 0.81) [user]" in said and "attention_fwd" not in said
    with fastdl.policy("fused", on_fallback="error"):
        assert "attention_fwd" in str(fastdl.explain(FF.scaled_dot_product_attention, q, k, v))
    tuned.forget()


class Straw:
    """torch's operators as a GPU would be asked, which call those of a CPU."""

    def __init__(self):
        self.asked = []

    def _scaled_dot_product_flash_attention(self, q, k, v, p, causal, *, scale):
        self.asked.append("forward")
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, p, causal, scale=scale
        )
        return o, lse, None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_flash_attention_backward(self, *args, scale):
        do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, p, causal, seed, place = args
        self.asked.append("backward")
        assert cu_q is None and cu_k is None and seed.dtype == place.dtype == torch.int64
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, p, causal, scale=scale
        )


def test_a_gpu_is_asked_in_its_words(sent, monkeypatch):
    straw = Straw()
    monkeypatch.setattr(attention_flash, "_aten", straw)
    monkeypatch.setattr(attention_flash, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    qkv = inputs()
    o = FF.scaled_dot_product_attention(*qkv, is_causal=True)
    found = torch.autograd.grad(o.sum(), qkv)
    assert straw.asked == sent == ["forward", "backward"]
    require("straw", o, [*found], qkv)


def test_a_build_without_flash_stays_ours(sent, monkeypatch):
    monkeypatch.setattr(attention_flash, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert fastdl.explain(FF.scaled_dot_product_attention, *inputs()).fused and not sent


def test_rows_of_odd_addresses_are_copied():
    x = torch.randn(2, 2, 40, 17, dtype=torch.float16)
    for view in (x[..., 1:], x[..., :16], x.mT, x[:, :, :, ::2]):
        even = attention_flash._aligned(view)
        assert torch.equal(even, view) and even.data_ptr() % 16 == 0 and even.is_contiguous()
    whole = torch.randn(2, 40, 2, 16, dtype=torch.float16).transpose(1, 2)
    assert attention_flash._aligned(whole) is whole
