"""torch's attention call with fastdl's kernels in the place of flash attention."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention

import fastdl
from fastdl import tuned
from fastdl.integrations import torch_sdpa

# Flash attention's op exists for CUDA tensors. Without a GPU it is replaced for CPU tensors, where
# torch has none, and called by its name.
OP = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def installed(device):
    installed = torch_sdpa.install(device.upper())
    yield
    installed.remove()


def draw(device, *shape, dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def eager(q, k, v, causal=False, scale=None):
    """In float64; a causal mask begins at the last key."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        s = s.masked_fill(~seen.tril(s.shape[-1] - s.shape[-2]), float("-inf"))
    return s.softmax(-1) @ v, s.logsumexp(-1)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 3, 9, 8), (2, 3, 7, 8)), {}),
        (((2, 3, 9, 8), (2, 3, 9, 8)), {"is_causal": True}),
        (((1, 2, 4, 16), (1, 2, 7, 16)), {"is_causal": True, "scale": 0.3}),
        (((1, 4, 5, 8), (1, 2, 6, 8)), {}),
    ],
    ids=["plain", "causal", "causal, more keys", "shared heads"],
)
def test_the_ops(shapes, options, device, installed, fused):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k = (draw(device, *shape, dtype=dtype) for shape in shapes)
    v = draw(device, *shapes[1], dtype=dtype)
    seen = fastdl.explain(lambda: OP(q, k, v, **options))
    assert seen.fused
    o, lse = OP(q, k, v, **options)[:2]
    expected, logsum = eager(q, k, v, options.get("is_causal", False), options.get("scale"))
    close = {"rtol": 1e-2, "atol": 1e-2} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(o.double(), expected, **close)
    torch.testing.assert_close(lse.double(), logsum, **close)
    do = torch.randn_like(o)
    ours = torch.autograd.grad(o, (q, k, v), do)
    theirs = torch.autograd.grad(expected, (q, k, v), do.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **close)


def test_dropout_draws_the_same_mask_in_backward(device, installed, fused):
    """Values are the identity, so that the output is what was kept."""
    q, k = draw(device, 1, 1, 32, 32), draw(device, 1, 1, 32, 32)
    v = torch.eye(32, device=device)[None, None].requires_grad_()
    o, *_ = OP(q, k, v, 0.5)
    kept = o.detach() != 0
    assert 0.4 < kept.float().mean() < 0.6
    shares, _ = eager(q, k, v)
    torch.testing.assert_close(o.double(), torch.where(kept, 2 * shares, 0.0), rtol=1e-4, atol=1e-5)
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    torch.testing.assert_close(dv[0, 0, :, 0], o.sum(2)[0, 0])


def test_the_layout_is_that_of_queries(device, installed, fused):
    """As torch's op says to compilers."""
    q = draw(device, 2, 5, 3, 8).transpose(1, 2)
    assert OP(q, q, q)[0].stride() == q.stride()


def test_what_the_kernels_do_not_take_is_left_to_torch(device):
    """Causal queries before the first key, which torch's kernel would have."""
    called = []

    class Theirs:
        def call_boxed(self, keys, *args, **kwargs):
            called.append((len(args), kwargs))

    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8)
    torch_sdpa._forward_before(Theirs())(None, q, k, k, 0.0, True)
    torch_sdpa._backward_before(Theirs())(
        None, q, q, k, k, q, q, None, None, 5, 3, 0.0, True, q, q, scale=2.0
    )
    assert called == [(6, {"scale": None}), (14, {"scale": 2.0})]


@pytest.mark.parametrize("measured", [(), ("attention",), ("attention_backward",)])
def test_what_torch_was_measured_to_do_faster_is_left_to_torch(device, monkeypatch, measured):
    """Else torch's kernel would be looked for in its own place, without end."""
    called = []

    class Theirs:
        def call_boxed(self, keys, *args, **kwargs):
            called.append(len(args))
            return

    to_torch = tuned.Config({}, variant="torch")
    with contextlib.ExitStack() as stack:
        for op in measured:
            stack.enter_context(tuned.forced(op, torch.bfloat16, (128, 16), to_torch))
        q = torch.randn(1, 1, 130, 16, dtype=torch.bfloat16, device=device)
        forward = torch_sdpa._forward_before(Theirs())
        backward = torch_sdpa._backward_before(Theirs())
        found = forward(None, q, q, q)
        o, lse = found[:2] if found is not None else (q, q.new_zeros(1, 1, 130).float())
        backward(None, q, q, q, q, o, lse, None, None, 130, 130, 0.0, False,
                 *[torch.zeros(2, dtype=torch.uint64)] * 2)  # fmt: skip
    # a forward of torch's has a backward of torch's
    assert called == {(): [], ("attention",): [6, 14], ("attention_backward",): [14]}[measured]


def test_registry():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    before = F.scaled_dot_product_attention(x, x, x)
    try:
        torch_sdpa.register()
        torch_sdpa.register()
        assert attention.current_flash_attention_impl() == "fastdl"
        seen = fastdl.explain(F.scaled_dot_product_attention, x, x, x)
        assert not seen.decisions  # nothing changes for tensors on a CPU
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), before)
    finally:
        torch_sdpa.unregister()
    torch_sdpa.unregister()
    assert attention.current_flash_attention_impl() is None


def test_removing_gives_the_op_back(device):
    if device == "cuda":
        pytest.skip("without a GPU the op has no kernel, which shows that ours is gone")
    installed = torch_sdpa.install("CPU")
    installed.remove()
    with pytest.raises(NotImplementedError):
        OP(*(torch.randn(1, 1, 2, 8) for _ in range(3)))


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="no registry of flash attentions"):
        torch_sdpa.register()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    if not fastdl.explain(fastdl.functional.scaled_dot_product_attention, *[
        torch.randn(1, 1, 16, 16, device="cuda", dtype=dtype)] * 3).fused:  # fmt: skip
        pytest.skip("the kernels do not run on this GPU")
    q, k, v = (draw("cuda", 2, 4, 64, 64, dtype=dtype) for _ in range(3))
    torch_sdpa.register()
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            seen = fastdl.explain(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert seen.fused
        torch.testing.assert_close(o.double(), eager(q, k, v, True)[0], rtol=2e-2, atol=2e-2)
        o.sum().backward()
        assert q.grad is not None and q.grad.isfinite().all()
    finally:
        torch_sdpa.unregister()
