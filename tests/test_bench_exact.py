"""The benchmark's check of every configuration, without a GPU: small integers come out exactly."""

import dataclasses
import itertools

import pytest
import torch
from bench import exact_attention as exact_module, exact_conv
from bench.exact import Exact, check_exact, exact_cases, integers
from bench.exact_attention import (
    KERNELS,
    PASSES,
    ExactAttention,
    Shape,
    attention_cases,
    check_attention,
)
from bench.exact_conv import LAYERS, Layer, check_conv, conv_cases

import fastdl.functional as FF
from fastdl.tuned import Device, forced
from fastdl.tuned.choose import configs

H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)


def test_exact_cases_cover_every_configuration():
    cases = list(exact_cases(H200))
    assert len({case.name for case in cases}) == len(cases)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bases = [c for c in configs("linear", dtype, (300, 272, 208), H200) if c.splits == 1]
        assert {base.variant for base in bases} <= {case.config.variant for case in cases}
        for base in bases:
            found = [case.widths != () for case in cases if base == case.config]
            assert {*found} == {False, True}
    assert any(case.config.splits > 1 for case in cases)


@pytest.mark.parametrize(
    ("sizes", "widths"),
    [((20, 24, 72), ()), ((3, 9, 33), ()), ((20, 48, 48), (16, 16, 16))],
    ids=str,
)
def test_configurations_are_exact(sizes, widths):
    applied = 0
    for config in configs("linear", torch.bfloat16, sizes, H200):
        case = Exact(torch.bfloat16, False, config, sizes, widths)
        row = check_exact(case, "cpu", repeats=1)
        assert row["ok"], (config, row)
        applied += row["applies"]
    assert applied >= 8


def test_exact_sees_a_wrong_element(monkeypatch):
    def broken(case, device):
        *inputs, want = integers(case, device)
        want[0, 0] += 1
        return *inputs, want

    monkeypatch.setattr("bench.exact.integers", broken)
    config = next(iter(configs("linear", torch.float32, (8, 8, 8), H200)))
    row = check_exact(Exact(torch.float32, False, config, (8, 8, 8)), "cpu", repeats=2)
    assert not row["ok"] and row["wrong"] == 2


SMALL_LAYERS = (
    Layer("tails", (2, 32, 5, 7), (20, 32, 2, 3), stride=2, padding=(1, 1), norm=True),
    Layer("groups", (2, 32, 5, 4), (36, 16, 2, 2), padding=(0, 1), dilation=2, groups=2),
)


@pytest.mark.parametrize("layer", SMALL_LAYERS, ids=lambda layer: layer.name)
def test_configurations_of_convolutions_are_exact(layer):
    for case in list(conv_cases(H200, (layer,)))[::3]:
        row = check_conv(case, "cpu", repeats=1)
        assert row["ok"], (case.name, row)


def test_exact_cases_cover_every_configuration_of_convolutions():
    cases = list(conv_cases(H200))
    assert len({case.name for case in cases}) == len(cases)
    for op, dtype in itertools.product(("conv", "conv_nchw"), (torch.bfloat16, torch.float32)):
        for config in configs(op, dtype, (64, 64, 64, 9), H200):
            found = [c for c in cases if (c.op, c.dtype, c.config) == (op, dtype, config)]
            assert len(found) == (len(LAYERS) if config.variant == "implicit" else 0)


def test_exact_sees_what_is_wrong_with_a_convolution(monkeypatch):
    case = next(conv_cases(H200, SMALL_LAYERS[:1]))
    other = case._replace(config=dataclasses.replace(case.config, num_warps=1))
    monkeypatch.setattr(exact_conv, "forced", lambda *args: forced(*args[:3], other.config))
    assert check_conv(case, "cpu", repeats=1)["says"].startswith("launched as conv_fwd")
    monkeypatch.undo()
    whole = exact_conv.integers

    def broken(case, device):
        call, want = whole(case, device)
        want[0, 0, 0, 0] += 1
        return call, want

    monkeypatch.setattr(exact_conv, "integers", broken)
    row = check_conv(case, "cpu", repeats=2)
    assert not row["ok"] and row["wrong"] == 2


SMALL_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tails", 1, 4, 2, 21, 30, 16, apart=11),
        Shape("causal", 1, 2, 2, 40, 40, 16, apart=11, window=(-1, 0)),
        Shape("window", 1, 2, 1, 40, 40, 16, apart=5, window=(11, 4)),
        Shape("decoding", 1, 4, 1, 1, 100, 16, apart=50, ops=PASSES[:1]),
        Shape("bias", 2, 2, 2, 21, 30, 16, apart=11, bias=(1, 2, 21, 30), ops=tuple(KERNELS)),
        Shape("bias of keys", 2, 4, 2, 9, 30, 24, apart=11, bias=(1, 1, 1, 30), slopes=True,
              ops=tuple(KERNELS)),
    )
}  # fmt: skip


def exact_attention(op, shape, dtype=torch.bfloat16, config=None):
    return ExactAttention(op, dtype, False, config, SMALL_SHAPES[shape])


@pytest.mark.parametrize(
    "op, shape", [(op, name) for name, shape in SMALL_SHAPES.items() for op in shape.ops]
)
def test_attention_is_exact(op, shape):
    row = check_attention(exact_attention(op, shape), "cpu", repeats=1)
    assert row["ok"], row
    assert ("grid=(1, 3)" in row["launched"]) == (shape == "decoding")  # splits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", PASSES)
def test_configurations_of_attention_are_exact(op, dtype):
    case = exact_attention(op, "tails", dtype)
    for config in list(configs(op, dtype, case.sizes, H200))[::4]:
        row = check_attention(case._replace(config=config), "cpu", repeats=1)
        assert row["ok"] and f"BLOCK_M={config['BLOCK_M']}" in row["launched"], row


def test_exact_cases_cover_every_configuration_of_attention():
    cases = list(attention_cases(H200))
    assert len({case.name for case in cases}) == len(cases)
    for op in PASSES:
        for sizes in {case.sizes for case in cases if case.op == op and case.shape.tuned}:
            found = configs(op, torch.bfloat16, sizes, H200)
            assert all(any(config == case.config for case in cases) for config in found)
    assert {case.op for case in cases if case.config is None} == set(KERNELS)


@pytest.mark.parametrize("op", KERNELS)
def test_exact_sees_one_lost_value(op, monkeypatch):
    whole = FF.scaled_dot_product_attention

    def lossy(q, k, v, *args, **options):
        if q.dtype != torch.float64:
            v = v * (torch.arange(v.shape[-2]) != 17)[:, None]
        return whole(q, k, v, *args, **options)

    monkeypatch.setattr(FF, "scaled_dot_product_attention", lossy)
    row = check_attention(exact_attention(op, "bias"), "cpu", repeats=2)
    assert not row["ok"] and row["wrong"] >= 2


def test_exact_sees_another_configuration(monkeypatch):
    first, second = list(configs("attention", torch.bfloat16, (128, 16), H200))[:2]
    case = exact_attention("attention", "tails", config=first)
    monkeypatch.setattr(
        exact_module,
        "forced_or_chosen",
        lambda case: forced(case.op, case.dtype, case.sizes, second),
    )
    row = check_attention(case, "cpu", repeats=1)
    assert not row["ok"] and row["says"].startswith("launched as attention_fwd")
