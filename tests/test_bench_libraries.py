"""Other libraries as contenders: order of arguments, layouts, options, and what is left out."""

import sys
from functools import partial

import pytest
import torch
from bench import contenders, libraries, rows
from bench.machine import Host
from bench.passes import Inputs
from tests import fake_libraries
from tests.straw import small

import fastdl
import fastdl.functional as FF
from fastdl.contract import Maker, attention, cross_entropy, groupnorm, layernorm, rmsnorm, rotary
from fastdl.contract.evaluate import floats

FLASH, LIGER, QUACK = ("flash-attn",), ("liger",), ("quack",)
BOTH = ("liger", "quack")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
norm, rms, entropy = layernorm.call, rmsnorm.call, cross_entropy.call


def glu(**options):
    return lambda t: partial(FF.glu, t(4, 6), gate=t(4, 6), **options)


def linear_entropy(**options):
    def make(t):
        given = {"linear_bias": t(5)} if options.get("bias") else {}
        y = torch.tensor([0, 4, 2, 2])
        rest = {name: value for name, value in options.items() if name != "bias"}
        return partial(FF.linear_cross_entropy, t(4, 6), t(5, 6), y, **given, **rest)

    return make


def divergence(learned=False, **options):
    def make(t):
        x, y = t(4, 6), t(4, 6).detach().softmax(-1).requires_grad_(learned)
        return partial(FF.kl_div, x, y, **options)

    return make


def softmax(*shape, **options):
    return lambda t: partial(FF.softmax, t(*shape), **options)


# a call, its dtype, and who covers it
CALLS = {
    "layer norm": (norm((5,), (8,)), BFLOAT16, LIGER),
    "layer norm of float32, no gradient": (norm((5,), (8,)), FLOAT32, BOTH),
    "layer norm, eps": (norm((5,), (8,), eps=0.5), BFLOAT16, LIGER),
    "layer norm without bias": (norm((5,), (8,), bias=False), BFLOAT16, ()),
    "layer norm of two dimensions": (norm((5,), (4, 2)), BFLOAT16, ()),
    "layer norm, residual": (norm((5,), (8,), residual=True), BFLOAT16, ()),
    "layer norm, modulated": (norm((5,), (8,), scale=(5, 8)), BFLOAT16, ()),
    "rms norm": (rms((5,), (8,)), BFLOAT16, BOTH),
    "rms norm, offset": (rms((5,), (8,), eps=0.1, weight_offset=1.0), BFLOAT16, BOTH),
    "rms norm, llama": (rms((5,), (8,), cast="llama", weight_offset=0.5), BFLOAT16, LIGER),
    "rms norm of two dimensions": (rms((5,), (4, 2)), BFLOAT16, ()),
    "rms norm, prenorm": (rms((5,), (8,), residual=True, prenorm=True), BFLOAT16, BOTH),
    "rms norm, prenorm, llama": (
        rms((5,), (8,), residual=True, prenorm=True, cast="llama"), BFLOAT16, LIGER,
    ),
    "rms norm, residual alone": (rms((5,), (8,), residual=True), BFLOAT16, QUACK),
    "swiglu": (glu(activation="silu"), BFLOAT16, LIGER),
    "geglu": (glu(activation="gelu_tanh"), BFLOAT16, LIGER),
    "geglu, exact": (glu(activation="gelu"), BFLOAT16, ()),
    "rope": (rotary.call(2, 3, 5, 8), BFLOAT16, LIGER),
    "rope in memory of models": (rotary.call(2, 3, 5, 8, swapped=True), BFLOAT16, LIGER),
    "rope of neighbours": (rotary.call(2, 3, 5, 8, interleaved=True), BFLOAT16, ()),
    "rope with positions": (rotary.call(2, 3, 5, 8, positions=(2, 5)), BFLOAT16, ()),
    "cross entropy": (entropy(7, 9), FLOAT32, BOTH),
    "cross entropy, ignored": (entropy(7, 9, ignored=3, reduction="sum"), FLOAT32, BOTH),
    "cross entropy, weights": (entropy(7, 9, weight=True), FLOAT32, BOTH),
    "cross entropy, none reduced": (entropy(7, 9, reduction="none"), FLOAT32, BOTH),
    "cross entropy, more": (
        entropy(7, 9, label_smoothing=0.2, z_loss=0.1, softcap=3.0), FLOAT32, LIGER,
    ),
    "cross entropy of pixels": (entropy(2, 5, 3, 4), FLOAT32, ()),
    "cross entropy of probabilities": (entropy(7, 9, probabilities=True), FLOAT32, ()),
    "linear cross entropy": (linear_entropy(), FLOAT32, LIGER),
    "linear cross entropy, more": (
        linear_entropy(bias=True, ignore_index=4, softcap=2.0, label_smoothing=0.1), FLOAT32, LIGER,
    ),
    "linear cross entropy, none reduced": (linear_entropy(reduction="none"), FLOAT32, ()),
    "softmax": (softmax(4, 6, dim=-1), FLOAT32, BOTH),
    "softmax of several dimensions": (softmax(2, 4, 6, dim=2), FLOAT32, LIGER),
    "softmax of columns": (softmax(4, 6, dim=0), FLOAT32, ()),
    "softmax, scaled": (softmax(4, 6, dim=-1, scale=0.5), FLOAT32, ()),
    "group norm": (groupnorm.call((2, 6, 4, 4), 3), FLOAT32, LIGER),
    "group norm and silu": (groupnorm.call((2, 6, 4, 4), 3, activation="silu"), FLOAT32, ()),
    "divergence": (divergence(reduction="batchmean"), FLOAT32, LIGER),
    "divergence of learned": (divergence(learned=True), FLOAT32, ()),
    "attention": (attention.call(H=4, kv=2, Sq=7, Sk=9), BFLOAT16, FLASH),
    "attention of float32": (attention.call(Sq=7), FLOAT32, ()),
    "attention, causal": (attention.call(Sq=7, is_causal=True, scale=0.3), BFLOAT16, FLASH),
    "attention, causal, more keys": (attention.call(Sq=7, Sk=9, is_causal=True), BFLOAT16, ()),
    "attention, window": (attention.call(Sq=9, window_size=(3, 2)), BFLOAT16, FLASH),
    "attention, causal window": (
        attention.call(Sq=9, window_size=(3, -1), is_causal=True), BFLOAT16, FLASH,
    ),
    "attention, softcap": (attention.call(Sq=9, softcap=0.5), BFLOAT16, FLASH),
    "attention, alibi": (attention.call(B=2, Sq=9, alibi=True, is_causal=True), BFLOAT16, FLASH),
    "attention, masked": (attention.call(Sq=9, mask=(1, 1, 9, 9)), BFLOAT16, ()),
    "attention, sinks": (attention.call(Sq=9, sinks=True), BFLOAT16, ()),
    "decoding": (attention.call(B=2, H=4, kv=2, Sq=1, Sk=9, softcap=2.0), BFLOAT16, FLASH),
    "packed": (attention.packed([3, 6], kv=1, scale=0.3), BFLOAT16, FLASH),
    "packed window": (attention.packed([3, 6], [5, 6], window_size=(2, 0)), BFLOAT16, FLASH),
    "packed, softcap": (attention.packed([3, 6], softcap=1.0), BFLOAT16, ()),
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    fake_libraries.install(monkeypatch, *libraries.LIBRARIES.values())


def without_gradient(name):
    return name.endswith("no gradient") or name == "decoding"


@pytest.mark.parametrize("name", CALLS)
def test_a_library_computes_the_op(name, installed):
    make, dtype, who = CALLS[name]
    call = make(Maker(dtype, grad=not without_gradient(name)))
    forms = libraries.contenders(call)
    assert tuple(forms) == who
    with fastdl.policy("definition"):
        want = call()
    for form in forms.values():
        got = form(*call.args, **call.keywords)
        apart = contenders.apart(floats(got), floats(want))
        # where a norm rounds is seen in the last bit alone
        rounds = 1e-3 if "llama" in name else 0.01
        assert apart < (rounds if dtype == BFLOAT16 else 1e-5), apart


def test_decoding_reads_a_cache(installed, monkeypatch):
    call = CALLS["decoding"][0](Maker(BFLOAT16, grad=False))
    called = []
    flash = sys.modules["flash_attn"]
    monkeypatch.setattr(
        flash, "flash_attn_with_kvcache",
        lambda q, k, v, **options: called.append(options) or flash.flash_attn_func(q, k, v),
    )  # fmt: skip
    libraries.contenders(call)["flash-attn"](*call.args, **call.keywords)
    assert len(called) == 1 and called[0]["softcap"] == 2


def test_nothing_is_imported_before_it_is_called(monkeypatch):
    call = CALLS["rms norm"][0](Maker(BFLOAT16))
    if not any(map(libraries.installed, libraries.LIBRARIES)):
        assert libraries.contenders(call) == {}
    fake_libraries.install(monkeypatch, "quack")
    found = libraries.contenders(call)
    assert [*found] == [name for name in ("liger", "quack") if libraries.installed(name)]
    monkeypatch.setitem(sys.modules, "quack", None)  # importing it fails
    with pytest.raises(ImportError):
        found["quack"](*call.args, **call.keywords)


def test_a_broken_library_is_refused(monkeypatch, installed):
    def broken(*args, **options):
        raise ValueError("no such architecture")

    functional = sys.modules["liger_kernel.transformers.functional"]
    monkeypatch.setattr(functional, "liger_softmax", broken)
    row = measured(small("softmax", CALLS["softmax"][0]))
    assert row["refused"] == {"liger": "ValueError: no such architecture"}
    assert "quack" in row["passes"]["forward"]["graph"]["contenders"]


def measured(case):
    wanted = rows.Ceilings(4e12, {"bfloat16": 8e14})
    return rows.measure(case, Host(), wanted, compiled=False, rounds=2, warm_s=0)


def test_a_library_may_overwrite_what_it_is_given(installed):
    """Liger writes gradients into the inputs: it gets its own."""
    case = small("glu", CALLS["swiglu"][0], backward=True)
    row = measured(case)
    assert row["ok"] and not row["refused"]
    assert "liger" in row["passes"]["backward"]["graph"]["contenders"]
    assert row["passes"]["both"]["graph"]["baseline"] in ("torch", "definition")
    inputs, again = Inputs(case, Host()), Inputs(case, Host())
    with fastdl.policy("fused", on_fallback="error"):
        prepared = contenders.prepare(case, Host(), inputs, "backward", compiled=False)
        assert prepared.calls["liger"].inputs is not inputs
        prepared.calls["liger"](0)
    for a, b in zip(inputs.call(0)[1], again.call(0)[1], strict=True):
        assert torch.equal(a, b)
