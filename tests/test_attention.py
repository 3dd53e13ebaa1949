"""What is special to attention: what nobody sees, memory, work, packed batches and caches."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdl
import fastdl.functional as FF
from fastdl.contract.evaluate import Allocated
from fastdl.tuned import Device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def fused():
    with fastdl.policy("fused", on_fallback="error"):
        yield


def leaves(*shapes, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_()
        for shape in shapes
    ]


def gradients(output, inputs):
    generator = torch.Generator().manual_seed(2)
    back = torch.randn(output.shape, generator=generator).to(output)
    return torch.autograd.grad(output, inputs, back)


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def hidden_by_mask(x):
    return {"attn_mask": torch.arange(x.shape[2], device=x.device)[None, None, None] < 30}


HIDING = {
    "mask of keys": hidden_by_mask,
    "mask": lambda x: {
        "attn_mask": (torch.arange(40, device=x.device) < 30).expand(1, 2, 21, 40).clone()
    },
    "causal": lambda x: {"is_causal": True},
    "window": lambda x: {"window_size": (-1, 5)},
}


@pytest.mark.parametrize("hide", HIDING)
def test_what_nobody_sees_may_be_nan(hide, device):
    """30 of 40 keys are seen at most, and 21 queries."""
    q, k, v = leaves((1, 2, 21, 16), (1, 2, 40, 16), (1, 2, 40, 16), device=device)
    options = HIDING[hide](k)

    def run(rest):
        with torch.no_grad():
            k[:, :, 30:], v[:, :, 30:] = rest, rest
        o = FF.scaled_dot_product_attention(q, k, v, **options)
        return o.detach(), *gradients(o, (q, k, v))

    found = run(float("nan"))
    assert all(x.isfinite().all() for x in found)
    close(found, run(0.0))


def test_unused_rows_of_a_packed_batch_may_be_nan(device):
    q, k, v = leaves((12, 2, 16), (50, 2, 16), (50, 2, 16), device=device)
    cu_q, cu_k, used = (
        torch.tensor(t, dtype=torch.int32, device=device)
        for t in ([0, 5, 10], [0, 20, 40], [17, 20])
    )

    def run(rest):
        with torch.no_grad():
            k[17:20], v[17:20], k[40:], v[40:] = rest, rest, rest, rest
        o = FF.varlen_attn(q, k, v, cu_q, cu_k, 5, 20, seqused_k=used)
        return o.detach(), *gradients(o, (q, k, v))

    found = run(float("nan"))
    close(found, run(0.0))
    assert not found[0][10:].any() and not found[1][10:].any() and not found[2][40:].any()


@pytest.mark.parametrize("D", [16, 40, 72, 80, 96, 160, 256, 512])
def test_head_dimensions(D, device):
    q, k, v = leaves((1, 2, 18, D), (1, 1, 20, D), (1, 1, 20, D), device=device)

    def run(mode):
        with fastdl.policy(mode, on_fallback="error"):
            o = FF.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return o, *gradients(o, (q, k, v))

    close(run("fused"), run("definition"))


def test_wider_heads_run_in_torch(device):
    q = torch.randn(1, 1, 4, 520, device=device)
    with fastdl.policy("fused"):
        seen = fastdl.explain(FF.scaled_dot_product_attention, q, q, q)
        assert not seen.fused and "sizes" in str(seen)
        close([FF.scaled_dot_product_attention(q, q, q)], [F.scaled_dot_product_attention(q, q, q)])


def allocated(S, **options):
    q, k, v = leaves((1, 2, S, 16), (1, 1, S, 16), (1, 1, S, 16))
    with Allocated() as count:
        o = FF.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True, **options)
        gradients(o, (q, k, v))
    return count.bytes


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"softcap": 5.0}])
def test_memory_grows_with_the_length(options):
    """Forward and backward, not with its square."""
    assert allocated(256, **options) <= 2 * allocated(128, **options)


@pytest.fixture
def products(monkeypatch):
    """How many products of tiles were made."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    # the first launch of all patches the interpreter, for good
    FF.scaled_dot_product_attention(*leaves(*[(1, 1, 4, 16)] * 3))
    count, dot = [0], interpreter.InterpreterBuilder.create_dot

    def counted(*args):
        count[0] += 1
        return dot(*args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)

    def of(S, **options):
        q, k, v = leaves(*[(1, 1, S, 16)] * 3)
        count[0] = 0
        o = FF.scaled_dot_product_attention(q, k, v, **options)
        gradients(o, (q, k, v))
        return count[0]

    return of


def test_work_grows_with_what_is_seen(products, device):
    if device != "cpu":
        pytest.skip("counted by the interpreter")
    assert products(256, is_causal=True) < 0.6 * products(256)
    window = {"window_size": (31, 0)}
    assert products(512, **window) <= 2.2 * products(256, **window)
    assert products(512, **window) < 0.3 * products(512, is_causal=True)


LENGTHS = (7, 30, 1, 19)


def test_packed_is_as_padded(device):
    """The same sequences in a packed batch, and padded under a mask."""
    longest, H, D = max(LENGTHS), 2, 16
    padded = leaves(*[(len(LENGTHS), H, longest, D)] * 3, device=device)
    there = torch.arange(longest, device=device) < torch.tensor(LENGTHS, device=device)[:, None]

    def pack(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[there]

    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(device)
    packed = [pack(x).detach().requires_grad_() for x in padded]
    one = FF.varlen_attn(*packed, cu, cu, longest, longest, window_size=(-1, 0))
    mask = there[:, None, None, :]
    other = FF.scaled_dot_product_attention(*padded, mask, is_causal=True)
    back = torch.randn(one.shape, device=device)
    spread = torch.zeros_like(other).transpose(1, 2)
    spread[there] = back
    found = torch.autograd.grad(one, packed, back)
    expected = torch.autograd.grad(other, padded, spread.transpose(1, 2))
    close([one, *found], [pack(other), *map(pack, expected)])


def test_step_by_step_is_as_at_once(device):
    """Decoding with a cache of keys that has room to spare."""
    S, room, H, kv, D = 21, 32, 4, 2, 16
    q, k, v = (
        x.detach() for x in leaves((2, H, S, D), (2, kv, S, D), (2, kv, S, D), device=device)
    )
    whole = FF.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    cache = torch.full((2, 2 * room, kv, D), float("nan"), device=device)
    cu_q, cu_k = (torch.arange(3, dtype=torch.int32, device=device) * n for n in (1, room))
    steps = []
    for n in range(S):
        for b in range(2):
            cache[0, b * room + n], cache[1, b * room + n] = k[b, :, n], v[b, :, n]
        used = torch.full((2,), n + 1, dtype=torch.int32, device=device)
        steps.append(
            FF.varlen_attn(
                q[:, :, n], *cache, cu_q, cu_k, 1, room,
                window_size=(-1, 0), enable_gqa=True, seqused_k=used,
            )
        )  # fmt: skip
    close([torch.stack(steps, 2)], [whole])


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_pages(splits, device):
    """Keys in pages that lie anywhere are as keys in a row."""
    kv, D, page = 2, 16, 8
    used = [11, 24, 1]
    keys, values = (torch.randn(12, page, kv, D, device=device) for _ in range(2))
    table = torch.tensor([[3, 5, -1], [0, 1, 7], [11, -1, -1]], dtype=torch.int32, device=device)
    q = torch.randn(6, 4, D, device=device)
    cu = torch.arange(4, dtype=torch.int32, device=device) * 2
    count = torch.tensor(used, dtype=torch.int32, device=device)
    options = {"enable_gqa": True, "window_size": (-1, 0), "return_lse": True}
    o, lse = FF.varlen_attn(
        q, keys, values, cu, None, 2, 24,
        seqused_k=count, block_table=table, num_splits=splits, **options,
    )  # fmt: skip
    rows = [[pages[t].flatten(0, 1)[:n] for t, n in zip(table.clamp(0).long(), used, strict=True)]
            for pages in (keys, values)]  # fmt: skip
    cu_k = torch.tensor([0, *used]).cumsum(0).to(torch.int32).to(device)
    expected = FF.varlen_attn(
        q, *map(torch.cat, rows), cu, cu_k, 2, 24, **options
    )  # fmt: skip
    close([o, lse], expected)


def test_pages_are_for_inference(device):
    q = torch.randn(1, 2, 16, device=device, requires_grad=True)
    page = torch.randn(1, 8, 2, 16, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    cu = torch.tensor([0, 1], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="block_table is for inference"):
        FF.varlen_attn(q, page, page, cu, None, 1, 8, seqused_k=one, block_table=one[None] * 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_come_out_exactly(dtype):
    """Two keys each, whose logits are equal or far apart: probabilities are 0, 1/2 and 1."""
    q, k, v = (
        torch.randint(-1, 2, shape).to(dtype).requires_grad_()
        for shape in ((2, 4, 37, 8), (2, 2, 37, 8), (2, 2, 37, 8))
    )
    back = torch.randint(-1, 2, q.shape).to(dtype)

    def run(*inputs):
        o = FF.scaled_dot_product_attention(
            *inputs, scale=1024.0, window_size=(1, 0), enable_gqa=True
        )
        return o, *torch.autograd.grad(o, inputs, back.to(o.dtype))

    ours = run(q, k, v)
    with fastdl.policy("definition"):
        truth = run(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    assert truth[1].any()  # there are ties
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a.double(), b)


def test_a_large_second_derivative_is_refused(monkeypatch):
    monkeypatch.setattr("fastdl.ops.attention.LARGEST_DEFINITION", 1000)
    q, k, v = leaves(*[(1, 2, 40, 16)] * 3)
    torch.autograd.grad(FF.scaled_dot_product_attention(q, k, v).sum(), q)
    with pytest.raises(RuntimeError, match="3200 probabilities"):
        torch.autograd.grad(FF.scaled_dot_product_attention(q, k, v).sum(), q, create_graph=True)


def test_learned_slopes_get_a_gradient(device):
    q, k, v, slopes = leaves((1, 2, 18, 16), (1, 2, 20, 16), (1, 2, 20, 16), (2,), device=device)

    def run(mode):
        with fastdl.policy(mode):
            o = FF.scaled_dot_product_attention(q, k, v, alibi_slopes=slopes, is_causal=True)
            return o, *gradients(o, (q, k, v, slopes))

    close(run("fused"), run("definition"))


def test_a_ptxas_that_miscompiles_leaves_it_to_torch(monkeypatch):
    monkeypatch.setattr("fastdl.ops.attention.register_a_is_safe", lambda device: False)
    q, k, v = leaves(*[(1, 2, 20, 16)] * 3)
    with pytest.raises(fastdl.FallbackError, match="ptxas"):
        FF.scaled_dot_product_attention(q, k, v)
    with fastdl.policy("auto"):
        seen = fastdl.explain(FF.scaled_dot_product_attention, q, k, v)
        assert not seen.fused and "ptxas" in str(seen)
        assert torch.equal(
            FF.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        )


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("good", [False, True])
def test_the_ptxas_matters_on_sm_90(arch, good, monkeypatch):
    """The device of the tensors is asked, and what Dynamo takes for constant."""
    facts = Device("some", "cuda", arch, sms=132, shared=232448)
    monkeypatch.setattr("fastdl.ops._toolchain.INTERPRETED", False)
    monkeypatch.setattr("fastdl.ops._toolchain.gpu_facts", lambda index: facts)
    monkeypatch.setattr("fastdl.ops._toolchain._is_good", lambda arch: good)
    is_safe = sys.modules["fastdl.ops.attention"].register_a_is_safe
    assert is_safe(torch.device("cuda", 1)) == (good or arch != 90)
    assert is_safe(torch.device("cpu"))


def test_the_output_lies_as_the_queries_do(device):
    """Heads side by side stay so: merging them is a view."""
    x = torch.randn(2, 21, 3 * 4 * 16, device=device)
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in x.chunk(3, -1))
    assert FF.scaled_dot_product_attention(q, k, v).transpose(1, 2).is_contiguous()


CPU = """
import torch, torch.nn.functional as F, fastdl.functional as FF
q, k, v = (torch.randn(2, 4, 300, 32) for _ in range(3))
options = [{}, {"is_causal": True}, {"attn_mask": torch.rand(2, 1, 1, 300) > 0.5}, {"scale": 0.3}]
for given in options:
    assert torch.equal(FF.scaled_dot_product_attention(q, k, v, **given),
                       F.scaled_dot_product_attention(q, k, v, **given))
o = FF.scaled_dot_product_attention(q, k, v, window_size=(9, 0), softcap=5.0)
assert o.isfinite().all()
"""


def test_on_a_cpu_torch_has_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", CPU], check=True, env=environment)


def test_bad_calls(device):
    x = torch.ones(1, 2, 6, 8, device=device)
    bad = [
        ({"window_size": (-2, 0)}, ValueError, r"\(-2, 0\)"),
        ({"dropout_p": 1.5}, ValueError, "1.5"),
        ({"sinks": torch.ones(3, device=device)}, RuntimeError, r"\(3,\).*2 heads"),
        ({"alibi_slopes": torch.ones(3, device=device)}, RuntimeError, r"\(3,\)"),
    ]
    for options, error, says in bad:
        with pytest.raises(error, match=says):
            FF.scaled_dot_product_attention(x, x, x, **options)
    with pytest.raises(RuntimeError, match="as many positions"):
        FF.scaled_dot_product_attention(x, x, x[:, :, :5])
    packed, cu = torch.ones(6, 4, 8, device=device), torch.tensor([0, 6], device=device)
    for kv, options, says in (
        (packed[:, :2], {}, "enable_gqa"),
        (packed[:, :3], {"enable_gqa": True}, "multiple"),
    ):
        with pytest.raises(ValueError, match=says):
            FF.varlen_attn(packed, kv, kv, cu, cu, 6, 6, **options)


def test_signature():
    """torch's is a builtin, of which Python knows no signature."""
    wanted = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    names = list(inspect.signature(FF.scaled_dot_product_attention).parameters)
    assert names[: len(wanted)] == wanted
    assert all(name in F.scaled_dot_product_attention.__doc__ for name in wanted)
