"""How recurrent layers are launched: one kernel for all steps where the weight fits on the chip,
else one for each step.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tuned
from ._launch import Config, Device, Kernel, cdiv, device_of, is_dry, launch, power_of_2
from .linear import _tf32

STEP_FWD = Kernel("rnn.rnn_step_fwd")
STEP_BWD = Kernel("rnn.rnn_step_bwd")
WALK_FWD = Kernel("rnn.rnn_walk_fwd")
WALK_BWD = Kernel("rnn.rnn_walk_bwd")

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}

# By mode, the columns kept for backward: gates, and of a GRU the old h's share of n.
KEPT = {"lstm": 4, "gru": 4, "tanh": 0, "relu": 0}

# The op of a mode, under which measurements are kept.
OPS = {"lstm": "lstm", "gru": "gru", "tanh": "rnn", "relu": "rnn"}


def choose(mode: str, T: int, B: int, H: int, dtype: torch.dtype, device: Device) -> Config:
    """The launch configuration: a measured one, else by rule."""
    tuned = _tuned.lookup(OPS[mode], dtype, (T, B, H), device)
    if tuned is not None and (tuned.variant != "walk" or walks(mode, H, dtype, device)):
        return tuned
    return rule(mode, B, H, dtype, device)


def walks(mode: str, H: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether one program holds the weight of all gates, in exact float32 in its registers."""
    bytes = GATES[mode] * max(16, power_of_2(H)) ** 2 * dtype.itemsize
    if device.backend == "interpreter":
        return bytes <= 4096
    return bytes <= (device.shared * 3 // 5 if dtype != torch.float32 else 16384)


@functools.lru_cache(maxsize=4096)
def rule(mode: str, B: int, H: int, dtype: torch.dtype, device: Device) -> Config:
    if walks(mode, H, dtype, device):
        return _walk(4 if device.backend == "interpreter" else 16, H)
    if device.backend == "interpreter":
        return _steps(4, 16, 16, 4, 2)
    rows = min(64, max(16, power_of_2(B)))
    # as many programs as processors, if tiles of 16 units make so many
    units = 32
    while units > 16 and cdiv(B, rows) * cdiv(H, units) < device.sms:
        units //= 2
    return _tiles(mode, rows, units, dtype, device)


def _tiles(mode: str, rows: int, units: int, dtype: torch.dtype, device: Device) -> Config:
    """As many stages as shared memory holds: backward reads both sides of each gate's product."""
    exact = dtype == torch.float32
    deep = 32 if exact else 64
    stage = GATES[mode] * (rows + units) * deep * dtype.itemsize
    stages = max(1, min(2 if exact else 3, device.shared // stage))
    return _steps(rows, units, deep, _warps(rows, units, dtype), stages)


def _warps(rows: int, units: int, dtype: torch.dtype) -> int:
    """A thread stores 16 bytes of a tile, or more."""
    return min(8, rows * units * dtype.itemsize // 512)


def _walk(rows: int, H: int) -> Config:
    units = max(16, power_of_2(H))
    blocks = {"BLOCK_B": rows, "BLOCK_H": units}
    return Config(blocks, 8 if units >= 64 else 4, 1, variant="walk")


def _steps(rows: int, units: int, deep: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_B": rows, "BLOCK_H": units, "BLOCK_K": deep}
    return Config(blocks, warps, stages, variant="steps")


def candidates(
    mode: str, dtype: torch.dtype, sizes: tuple[int, ...], device: Device
) -> list[Config]:
    """Every configuration that tuning may pick."""
    _, _, H = sizes
    found = [
        _tiles(mode, rows, units, dtype, device) for rows in (16, 32, 64) for units in (16, 32)
    ]
    return found + ([_walk(16, H)] if walks(mode, H, dtype, device) else [])


for _mode, _op in OPS.items():
    _tuned.CANDIDATES[_op] = functools.partial(candidates, _mode)


class Steps(NamedTuple):
    """Where the rows of each step start, and how many there are, in the order of the walk."""

    bounds: list[tuple[int, int]]
    last: list[int]  # the row at which each sequence's walk ends

    @classmethod
    def of(cls, sizes: list[int], reverse: bool) -> "Steps":
        starts = [0]
        for n in sizes:
            starts.append(starts[-1] + n)
        bounds = list(zip(starts, sizes, strict=False))
        ends = [starts[0] + b for b in range(sizes[0])]
        if not reverse:
            for start, n in bounds:
                ends[:n] = range(start, start + n)
        return cls(bounds[::-1] if reverse else bounds, ends)


def sizes_of(rows: Tensor, h0: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """Rows of each step."""
    if batch_sizes is not None:
        return batch_sizes.tolist()
    B = h0.shape[0]
    return [B] * (rows.shape[0] // B) if B else [0]


def _starts(sizes: list[int], like: Tensor) -> Tensor:
    """The same for the kernel that walks."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return starts.to(like.device)


def _precision() -> str:
    return "tf32" if _tf32() else "ieee"


def launch_forward(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    sizes: list[int] | None, mode: str, reverse: bool, out: Any,
) -> None:  # fmt: skip
    """Fill y, hn, cn, c and gates, those that are not None."""
    y, hn, cn, c, gates = out
    (B, H), T = h0.shape, xp.shape[0] // h0.shape[0] if sizes is None else len(sizes)
    config = choose(mode, T, B, H, xp.dtype, device_of(xp))
    if config.variant == "walk":
        launch(
            WALK_FWD, (cdiv(B, config["BLOCK_B"]),),
            xp, h0, c0, weight, bias, None if sizes is None else _starts(sizes, xp),
            y, c, gates, hn, cn, T, B, H,
            MODE=mode, REVERSE=reverse, PRECISION=_precision(), config=config,
        )  # fmt: skip
        return
    if mode == "lstm" and c is None:
        c = torch.empty_like(y)  # handed from step to step
    steps = Steps.of([B] * T if sizes is None else sizes, reverse)
    prev = 0, 0
    for start, n in steps.bounds[: 1 if is_dry() else None]:
        launch(
            STEP_FWD, (cdiv(n, config["BLOCK_B"]), cdiv(H, config["BLOCK_H"])),
            xp, *_old(y, h0, prev, n), *_old(c, c0, prev, n), weight, bias, y, c, gates,
            start, n, *prev, H,
            MODE=mode, PRECISION=_precision(), EVEN_K=H % config["BLOCK_K"] == 0, config=config,
        )  # fmt: skip
        prev = start, n
    hn.copy_(_last(y, B, sizes, steps, reverse))
    if mode == "lstm":
        cn.copy_(_last(c, B, sizes, steps, reverse))


def _old(
    rows: Tensor | None, initial: Tensor | None, prev: tuple[int, int], n: int
) -> tuple[Tensor | None, Tensor | None]:
    """What n rows of a step begin with: rows of the step before, the initial state, or both."""
    if not prev[1]:
        return initial, None
    return rows, initial if prev[1] < n else None


def _last(rows: Tensor, B: int, sizes: list[int] | None, steps: Steps, reverse: bool) -> Tensor:
    """The rows at which the sequences end."""
    if sizes is None:
        return rows[:B] if reverse else rows[-B:]
    return rows[torch.tensor(steps.last, device=rows.device)]


def launch_backward(
    grads: tuple[Tensor | None, ...], states: tuple[Tensor | None, ...], weight: Tensor,
    kept: tuple[Tensor | None, ...], sizes: list[int] | None, mode: str, reverse: bool, out: Any,
) -> None:  # fmt: skip
    """Fill d, of the input's shares, dn, of the old h's share of a GRU's n, and dh, dc of the
    initial states, from grads of y, hn and cn.
    """
    (h0, c0), (y, c, gates), (d, dn, dh, dc) = states, kept, out
    assert h0 is not None
    (B, H), T = h0.shape, d.shape[0] // h0.shape[0] if sizes is None else len(sizes)
    config = choose(mode, T, B, H, d.dtype, device_of(d))
    if config.variant == "walk":
        launch(
            WALK_BWD, (cdiv(B, config["BLOCK_B"]),),
            *grads, h0, c0, weight, None if sizes is None else _starts(sizes, d),
            y, c, gates, d, dn, dh, dc, T, B, H,
            MODE=mode, REVERSE=reverse, PRECISION=_precision(), config=config,
        )  # fmt: skip
        return
    steps = Steps.of([B] * T if sizes is None else sizes, reverse)
    bounds = steps.bounds
    for i in range(len(bounds))[::-1][: 1 if is_dry() else None]:
        prev = bounds[i - 1] if i else (0, 0)
        after = bounds[i + 1] if i + 1 < len(bounds) else (0, 0)
        start, n = bounds[i]
        launch(
            STEP_BWD, (cdiv(n, config["BLOCK_B"]), cdiv(H, config["BLOCK_H"])),
            *grads, *_old(y, h0, prev, n), *_old(c, c0, prev, n), weight, y, c, gates,
            d, dn, dh, dc, start, n, *prev, *after, H,
            MODE=mode, PRECISION=_precision(), EVEN_K=H % config["BLOCK_K"] == 0, config=config,
        )  # fmt: skip
    # what reaches the initial state through the products of the first step
    first = Steps.of([B] * T if sizes is None else sizes, not reverse)
    hidden = hidden_gradient(d, dn)
    if mode != "gru":
        dh.zero_()
    for part, rows in zip(hidden, weight.split([part.shape[1] for part in hidden]), strict=True):
        dh += _last(part, B, sizes, first, not reverse) @ rows


def hidden_gradient(d: Tensor, dn: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the old h's shares of the gates, in blocks of columns: all, or r, z and n."""
    return (d,) if dn is None else (d[:, : 2 * dn.shape[1]], dn)


def previous(y: Tensor, h0: Tensor, sizes: list[int] | None, reverse: bool) -> Tensor:
    """For each row of all steps, the h that its step began with."""
    B = h0.shape[0]
    if sizes is None:
        return torch.cat((y[B:], h0) if reverse else (h0, y[:-B]))
    bounds = Steps.of(sizes, reverse).bounds
    parts = []
    for (prev, n_prev), (_, n) in zip([(0, 0), *bounds], bounds, strict=False):
        going = min(n, n_prev)
        parts += [torch.cat((y[prev : prev + going], h0[going:n]))]
    return torch.cat(parts[::-1] if reverse else parts)
