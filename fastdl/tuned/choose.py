"""Which configurations are worth measuring: a model of time, on facts of the GPU. It ranks, and
says nothing of speed: that is measured.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..ops import _tuned
from ..ops._launch import Config, Device, cdiv

# Measured are at most so many for one entry.
MOST = 8

# Slices of K that a product may be computed in.
SPLITS = (2, 4, 8, 16)

# Of one processor: operations a second of 16-bit products, bytes a second from the L2. Seconds that
# a load takes, and a program until it computes; bytes a second of all memory.
RATE, L2, LATENCY, FILL, MEMORY = 5.35e12, 75e9, 0.75e-6, 0.8e-6, 4.3e12


def configs(
    op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: Device
) -> Iterator[Config]:
    """All that a table may name: the candidates of the op, those that can slice K also in slices
    that fill the device.
    """
    for config in _tuned.CANDIDATES[op](dtype, sizes, device):
        yield config
        if config.variant != "tiles":
            continue
        M, N, K = sizes
        tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
        for splits in SPLITS:
            blocks_of_k = K // config["BLOCK_K"]
            if tiles * splits <= 2 * device.sms and blocks_of_k >= 2 * splits:
                yield replace(config, splits=splits)


def shortlist(op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: Device) -> list[Config]:
    """At most `MOST` of them, the most promising first."""
    found = list(configs(op, dtype, sizes, device))
    cost = _COSTS.get(op)
    if cost is not None:
        found.sort(key=lambda config: cost(config, dtype, sizes, device))
    return found[:MOST]


def _product(config: Config, dtype: torch.dtype, sizes: tuple[int, ...], device: Device) -> float:
    """Seconds of a product [M, K] by [K, N]. Another's product is always worth measuring."""
    if config.variant not in ("tiles", "persistent", "implicit"):
        return 0.0
    M, N, K = sizes
    m, n, k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    if config.blocks.get("SWAP"):
        # weights take the side of the rows, and rows that are not there are computed too
        m, n, M, N = n, m, N, M
    size = dtype.itemsize
    rate = RATE * 2 / size
    if config.num_stages * (m + n) * k * size > device.shared:
        return math.inf
    narrow = {256: 1.0, 128: 1.08}.get(n, 1.35) * (1.0 if m >= 128 else 1.15)
    compute = 2 * m * n * k / rate * narrow
    block = max(compute, (m + n) * k * size / L2, LATENCY / max(1, config.num_stages - 1))
    steps = cdiv(cdiv(K, k), config.splits)
    # parts of fp32 are written and read again
    out = m * n * (size if config.splits == 1 else 4 * (1 + config.splits)) / L2
    # what another tile computes hides the end of a persistent program's
    fill = FILL / 4 if config.variant == "persistent" else FILL
    programs = cdiv(M, m) * cdiv(N, n) * config.splits
    busy = cdiv(programs, device.sms) * (steps * block + out + fill)
    return max(busy, size * (M * K + N * K + M * N) / MEMORY)


def _gathered(config: Config, dtype: torch.dtype, sizes: tuple[int, ...], device: Device) -> float:
    """A convolution is a product of what lies around each position."""
    positions, outs, channels, taps = sizes
    return _product(config, dtype, (positions, outs, channels * taps), device)


def _row_tiles(config: Config, dtype: torch.dtype, sizes: tuple[int, ...], device: Device) -> float:
    """How far from tiles of 4096 elements, 16 of them a thread, in powers of two. Rows in registers
    are read once.
    """
    if config.variant == "wide":
        tile, again = config["BLOCK"], 1.5
    else:
        tile, again = config["ROWS"] * config["BLOCK"], 0.0
    each = tile / (32 * config.num_warps)
    return abs(math.log2(each / 16)) + abs(math.log2(tile / 4096)) / 2 + again


Cost = Callable[[Config, torch.dtype, tuple[int, ...], Device], float]

_COSTS: dict[str, Cost] = {"linear": _product, "conv": _gathered, "conv_nchw": _gathered}
_COSTS |= dict.fromkeys(
    (
        *("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"),
        *("softmax", "softmax_backward"),
    ),
    _row_tiles,
)
