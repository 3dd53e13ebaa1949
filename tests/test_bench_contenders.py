"""What is timed beside the fused form: that it computes the same, and is found."""

from functools import partial

import pytest
import torch
from bench import contenders, error as error_module, forms
from bench.attention import flex_form
from tests.straw import small
from torch.nn.attention.flex_attention import flex_attention

import fastdl
import fastdl.functional as FF
from fastdl.contract import SPECS, Maker
from fastdl.contract.attention import call, packed
from fastdl.contract.evaluate import floats

FORMS = {
    "plain": call(Sq=18, Sk=24),
    "shared keys": call(H=4, kv=2, Sq=18, is_causal=True, scale=0.3),
    "window": call(Sq=30, window_size=(5, 3)),
    "window ahead": call(Sq=30, window_size=(-1, 3)),
    "causal window": call(Sq=30, window_size=(7, -1), is_causal=True),
    "softcap": call(H=4, kv=2, Sq=18, softcap=0.5, is_causal=True),
    "bias": call(B=2, Sq=18, bias=(1, 2, 18, 18)),
    "bias, causal": call(B=2, Sq=18, bias=(2, 1, 1, 18), softcap=0.5, is_causal=True),
    "mask of keys": call(B=2, Sq=18, mask=(2, 1, 1, 18)),
    "mask, window": call(B=2, Sq=18, mask=(1, 2, 18, 18), window_size=(9, 9)),
    "alibi": call(Sq=18, alibi=True, is_causal=True),
    "alibi, bias": call(Sq=18, alibi=True, bias=(1, 2, 18, 18)),
    "sinks": call(Sq=18, sinks=True, window_size=(7, 0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_torch_has_for_attention_is_attention(form):
    made = FORMS[form](Maker(torch.float64, grad=False))
    with fastdl.policy("definition"):
        want = made()
    options = made.keywords
    torch.testing.assert_close(forms.torch_attention(*made.args, **options), want)
    if "sinks" not in options:
        flex = flex_form(made, flex_attention)
        torch.testing.assert_close(flex(*made.args, **options), want)


def test_what_torch_has_for_packed_attention_is_attention():
    for make in (packed([5, 30, 1], window_size=(6, 0)), packed([5, 9], [9, 12], H=4, kv=2)):
        made = make(Maker(torch.float64, grad=False))
        with fastdl.policy("definition"):
            want = made()
        torch.testing.assert_close(forms.torch_varlen(*made.args, **made.keywords), want)


LARGE = {
    "attention": call(B=2, H=4, kv=2, Sq=20, is_causal=True),
    "packed": packed([5, 20], H=4, kv=2, window_size=(-1, 0)),
    "with a bias": call(B=2, Sq=18, bias=(1, 2, 18, 18)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("wrong", [None, 0, 1], ids=["right", "wrong output", "wrong gradient"])
def test_the_error_of_attention_sees_the_last_head(name, wrong, monkeypatch):
    case = small(name, LARGE[name], True, torch.float32)

    def broken(*args, **options):
        found = run(*args, **options)
        if args[2] == "fused":
            tensor = (found.outputs, found.gradients)[wrong][0].detach()
            tensor[-1, -1] += 0.1
        return found

    run = error_module.run
    if wrong is not None:
        monkeypatch.setattr(error_module, "run", broken)
    assert error_module.error(case, "cpu").ok == (wrong is None)


@pytest.mark.parametrize("op", SPECS)
def test_every_bench_case_has_a_plain_torch_form(op):
    for case in SPECS[op].bench:
        call = case.make(Maker(case.dtype, device="meta"))
        outputs = floats(forms.TORCH[call.func](*call.args, **call.keywords))
        assert outputs[0].shape[:1] in (call.args[0].shape[:1], ())  # a loss has no dimensions


def test_the_definition_is_not_the_fused_form():
    x = torch.randn(8, 8)
    form = contenders.definition(FF.softmax)
    assert not fastdl.explain(form, x, -1).fused and fastdl.explain(FF.softmax, x, -1).fused


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_vendor_call_is_a_contender_where_it_is_another_call(chunk):
    """torch's cross entropy in chunks is not what users write; its attention is."""
    x, w, y = torch.randn(6, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    made = partial(FF.linear_cross_entropy, x, w, y, chunk_size=chunk)
    forms_ = contenders.contenders(made, False)
    assert ("vendor" in forms_) == (chunk is not None)
    if chunk:
        torch.testing.assert_close(forms_["vendor"](*made.args, **made.keywords), made())
    attention = call(is_causal=True)(Maker(grad=False))
    assert "vendor" not in contenders.contenders(attention, False)
    masked = call(mask=(1, 1, 37, 37))(Maker(grad=False))
    assert "vendor" not in contenders.contenders(masked, False)
    assert "vendor" not in contenders.contenders(partial(FF.dropout, x, p=0.5), False)


@pytest.mark.parametrize("op", SPECS)
def test_contenders_are_known_without_a_tensor(op):
    for case in SPECS[op].bench:
        found = contenders.names(case)
        assert found[:2] == ["torch", "fused"] and found[-1] == "definition"
        assert ("compile" in found) == (op not in ("lstm", "gru", "rnn", "layer_norm_lstm"))
        assert "flex" not in contenders.names(case, compiled=False)
