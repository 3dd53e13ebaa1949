"""Cases from reports against other kernel libraries that no single op's contract holds."""

import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastdl
import fastdl.functional as FF


def test_norm_of_bfloat16_with_float32_weights(device, fused):
    """Output in the input's dtype, gradients in their parameter's."""
    x = torch.randn(5, 40, device=device).bfloat16().requires_grad_()
    w, b = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
    y = FF.layer_norm(x, (40,), w, b)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), (x, w, b))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    expected = F.layer_norm(x.double(), (40,), w.double(), b.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_statistics_of_float16_do_not_overflow(device, fused):
    x = torch.tensor([60000.0, -60000.0] * 16, device=device).half()
    torch.testing.assert_close(FF.layer_norm(x, (32,)), x.sign())


def test_eps_is_not_lost_in_float16(device, fused):
    x = torch.full((3, 16), 7.0, device=device).half()
    assert not FF.layer_norm(x, (16,), eps=1e-8).any()


def test_writing_into_what_backward_needs_is_an_error(device, fused):
    y = FF.relu(torch.randn(8, device=device, requires_grad=True))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors_in_autograd_fail_as_in_torch(device, fused):
    with torch.inference_mode():
        x = torch.randn(4, 8, device=device)
    w = torch.randn(5, 8, device=device, requires_grad=True)
    for linear in (F.linear, FF.linear):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            linear(x, w)


def test_a_launch_happens_on_the_device_of_its_tensors(monkeypatch):
    """The second GPU, while the first is current; and binaries are kept by what they fit."""

    class OnSecond(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 1))

    entered, runs = [], []

    @contextmanager
    def guard(index):
        entered.append(index)
        yield

    class Binary:
        def __getitem__(self, grid):
            return lambda *args: runs.append(("kept", grid))

    class Function:
        arg_names = ("x_ptr", "n", "BLOCK")

        def __getitem__(self, grid):
            return lambda *args, **options: runs.append(("compiled", grid)) or Binary()

    module = sys.modules["fastdl.ops._launch"]
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", guard)
    kernel = module.Kernel("activation.activation_fwd")
    kernel.__dict__["fn"] = Function()
    config = module.Config({"BLOCK": 8})
    x = torch.zeros(32).as_subclass(OnSecond)
    for n in (16, 32, 17, 1, 2**31, 16):
        module.launch(kernel, (4,), x, n, config=config)
    # 32 is a multiple of 16 too; 17 is not, 1 is a constant, 2**31 takes 64 bits
    kinds = ["compiled", "kept", "compiled", "compiled", "compiled", "kept"]
    assert [kind for kind, _ in runs] == kinds
    assert runs[1] == ("kept", (4, 1, 1))
    assert entered == [1] * 6


def test_second_derivative_with_a_frozen_weight(device, fused):
    """Backward keeps no input then, and needs none."""
    x = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.randn(5, 4, device=device)
    back = torch.randn(3, 5, device=device, requires_grad=True)
    with fastdl.policy("fused"):
        (dx,) = torch.autograd.grad(FF.linear(x, weight), x, back, create_graph=True)
    (dback,) = torch.autograd.grad(dx.square().sum(), back)
    torch.testing.assert_close(dback, 2 * dx.detach() @ weight.T)


def test_backward_in_torch_under_a_dispatch_mode(device):
    """Selective checkpointing and counters of flops are such modes."""
    x = torch.randn(0, 8, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    with FlopCounterMode(display=False):
        FF.layer_norm(x, (8,), weight).sum().backward()
    assert not weight.grad.any()
