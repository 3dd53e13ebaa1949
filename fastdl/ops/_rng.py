"""Dropout's random numbers: a seed from torch's generator, and in torch the mask that the kernels
draw.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed on the device. As a tensor it follows checkpointing, compilation and CUDA
    graphs.
    """
    return torch.randint(-(2**62), 2**62, (), dtype=torch.int64, device=device)


def dropout(x: Tensor, seed: Tensor | None, p: float, rows: int = 1) -> Tensor:
    """Drop elements of x, seen as `rows` equal rows, with probability p and scale the rest."""
    if seed is None:
        return x
    keep = _keep(seed, rows, x.numel() // max(rows, 1), p).view(x.shape)
    return torch.where(keep, x / (1 - p) if p < 1 else x, 0.0)


def _keep(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    quads = torch.arange((cols + 3) // 4, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    bits = torch.stack(_philox(seed, quads & MASK32, quads >> 32, row & MASK32, row >> 32), dim=-1)
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    return uniform.reshape(rows, -1)[:, :cols] >= p


def _philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32 with ten rounds, on 32-bit words held in int64."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a product; halves of b keep the intermediate below 2**63."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, (a * b) & MASK32
