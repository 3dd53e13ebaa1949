"""Training with fused kernels follows training without them."""

import pytest
import torch
from torch import nn

import fastdl


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = fastdl.nn.LayerNorm(width)
        self.mlp = fastdl.nn.MLP(width, 2 * width)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def train(mode, device, steps):
    torch.manual_seed(0)
    model = nn.Sequential(
        fastdl.nn.Linear(8, 16), fastdl.nn.GELU(), Block(16), Block(16), fastdl.nn.Linear(16, 1)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(48, 8, device=device)
    target = (x[:, :1] * x[:, 1:2]).sin()
    losses = []
    with fastdl.policy(mode, on_fallback="error"):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
def test_losses_and_parameters_agree(device):
    fused, fused_parameters = train("fused", device, 60)
    plain, plain_parameters = train("definition", device, 60)
    assert fused[-1] < 0.25 * fused[0]
    assert fused == pytest.approx(plain, rel=1e-3, abs=1e-5)
    for a, b in zip(fused_parameters, plain_parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=1e-3)
