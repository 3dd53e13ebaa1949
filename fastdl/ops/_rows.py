"""What norms of rows share: their configurations, which are those of softmax too, their launches,
and the check of their arguments.

RMS normalization is layer normalization without mean and bias: `mean` is None.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _tuned
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2

LAYERNORM_FWD = Kernel("layernorm.layernorm_fwd")
LAYERNORM_BWD = Kernel("layernorm.layernorm_bwd")
LAYERNORM_WIDE_FWD = Kernel("layernorm_wide.layernorm_wide_fwd")
LAYERNORM_WIDE_DX = Kernel("layernorm_wide.layernorm_wide_dx")
LAYERNORM_WIDE_SUMS = Kernel("layernorm_wide.layernorm_wide_sums")


# The longest rows that stay in registers. Backward of a norm holds sums of columns beside its rows,
# up to four; that of softmax holds two rows.
LONGEST = {
    "layer_norm": 32768,
    "layer_norm_backward": 8192,
    "rms_norm": 32768,
    "rms_norm_backward": 8192,
    "softmax": 32768,
    "softmax_backward": 16384,
}


def choose(op: str, n_cols: int, dtype: torch.dtype, device: Device) -> Config:
    """Tiles of whole rows while they fit in registers, else ("wide") blocks of columns. A thread
    has 16 elements.
    """
    return _tuned.lookup(op, dtype, (n_cols,), device) or _rule(n_cols, device, LONGEST[op])


@functools.lru_cache(maxsize=1024)
def _rule(n_cols: int, device: Device, longest: int) -> Config:
    # in the interpreter a row is soon long, and blocks are small while rows are
    small = device.backend == "interpreter"
    if n_cols > (128 if small else longest):
        block = longest // 4
        return Config({"BLOCK": 64 if small and n_cols < 1024 else block}, block // 512, 1, "wide")
    block, tile = power_of_2(n_cols), 128 if small else 4096
    rows = max(1, min(tile // block, 16))
    warps = min(max(rows * block // 512, 1), 16)
    return Config({"ROWS": rows, "BLOCK": block}, warps, 1, "rows")


def _candidates(longest: int) -> _tuned.Candidates:
    """What tuning may pick, of rows up to `longest`."""

    def candidates(dtype: Any, sizes: tuple[int, ...], device: Device) -> list[Config]:
        (cols,) = sizes
        block = power_of_2(cols)
        # tiles of at most `longest` elements, 8 to 32 of them a thread where there are enough
        tiles = [
            Config({"ROWS": rows, "BLOCK": block}, warps, 1, "rows")
            for rows in (1, 2, 4, 8, 16)
            for warps in (1, 2, 4, 8, 16)
            if rows * block <= longest and _shared_out(rows * block, warps, least=rows == 16)
        ]
        if block < 4096 and tiles:
            return tiles
        blocks = [
            Config({"BLOCK": wide}, warps, 1, "wide")
            for wide in (2048, 4096, 8192)
            for warps in (4, 8, 16)
            if _shared_out(wide, warps)
        ]
        return tiles + blocks

    return candidates


def _shared_out(elements: int, warps: int, least: bool = False) -> bool:
    """Whether threads have few enough for registers, and enough to move 16 bytes at a time, or at
    `least` all that there are.
    """
    each = elements / (32 * warps)
    return each <= 32 and (each >= 8 or (least and warps == 1))


for _op, _longest in LONGEST.items():
    _tuned.CANDIDATES[_op] = _candidates(_longest)


def as_rows(x: Tensor, dims: int) -> Tensor:
    """x as [rows, columns], columns side by side. Copies only where the layout does not allow a
    view.
    """
    rows = x.reshape(x.shape[: x.dim() - dims].numel(), -1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def dense(x: Any) -> Any:
    return None if x is None else x.contiguous()


def launch_forward(
    rows: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None,
    y: Tensor, h: Tensor | None, mean: Tensor | None, rstd: Tensor,
    groups: int, eps: float, config: Config, offset: float = 0.0, rounds: bool = False,
) -> None:  # fmt: skip
    """Fill y, h, mean and rstd. Each of the groups of rows has its scale and shift."""
    n_rows, n_cols = rows.shape
    group_rows = n_rows // groups
    # what is not there is None: the kernels are compiled without it
    tensors = (
        rows, dense(residual), dense(weight), dense(bias), scale, shift, y, h, mean, rstd,
        y if rounds else None,
    )  # fmt: skip
    if config.variant == "wide":
        launch(
            LAYERNORM_WIDE_FWD, (n_rows,), *tensors, rows.stride(0), n_cols, group_rows, eps,
            offset or None, config=config,
        )  # fmt: skip
    else:
        parts = cdiv(group_rows, config["ROWS"])
        launch(
            LAYERNORM_FWD, (groups * parts,), *tensors, rows.stride(0), n_cols, group_rows, parts,
            eps, offset or None, config=config,
        )  # fmt: skip


def launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor, dx: Tensor | None,
    groups: int, config: Config, need_sums: bool, offset: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """Fill dx. Returns the sums of columns that dweight and others are made of, by group."""
    kinds = (1 if mean is None else 2) + (0 if scale is None else 2)
    run = _launch_wide if config.variant == "wide" else _launch_rows
    sums = run(
        dense(dy), dense(dh), h, dense(weight), dense(bias), scale, mean, rstd, dx,
        groups, config, kinds if need_sums else 0, offset,
    )  # fmt: skip
    return None if sums is None else sums.view(kinds, groups, -1, h.shape[1]).sum(2)


def _parts(group_rows: int, rows: int, groups: int, device: Device) -> int:
    """Programs a group: a few for each processor, and one partial sum each."""
    return max(1, min(cdiv(group_rows, rows), 4 * device.sms // groups))


def _launch_rows(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor, dx: Tensor | None,
    groups: int, config: Config, kinds: int, offset: float,
) -> Tensor | None:  # fmt: skip
    n_rows, n_cols = h.shape
    group_rows = n_rows // groups
    parts = _parts(group_rows, config["ROWS"], groups, device_of(h))
    sums = h.new_empty((kinds, groups * parts, n_cols), dtype=torch.float32) if kinds else None
    launch(
        LAYERNORM_BWD, (groups * parts,),
        dy, dh, h, weight, bias, scale, mean, rstd, dx, sums,
        h.stride(0), n_cols, group_rows, parts, offset or None, config=config,
    )  # fmt: skip
    return sums


def _launch_wide(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor, dx: Tensor | None,
    groups: int, config: Config, kinds: int, offset: float,
) -> Tensor | None:  # fmt: skip
    n_rows, n_cols = h.shape
    group_rows, columns = n_rows // groups, cdiv(n_cols, config["BLOCK"])
    if dx is not None:
        launch(
            LAYERNORM_WIDE_DX, (n_rows,),
            dy, dh, h, weight, scale, mean, rstd, dx,
            h.stride(0), n_cols, group_rows, offset or None, config=config,
        )  # fmt: skip
    if not kinds:
        return None
    parts = _parts(group_rows, 1, groups * columns, device_of(h))
    sums = h.new_empty((kinds, groups * parts, n_cols), dtype=torch.float32)
    launch(
        LAYERNORM_WIDE_SUMS, (groups * parts, columns),
        dy, h, weight, bias, scale, mean, rstd, sums,
        h.stride(0), n_cols, group_rows, parts, offset or None, config=config,
    )  # fmt: skip
    return sums


def check(op: str, input: Tensor, shape: tuple[int, ...], **factors: Tensor | None) -> None:
    """Raise where the shape does not end that of the input, or a factor is not of this shape."""
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{op}: input is {tuple(input.shape)}, normalized_shape is {shape};"
            " it must be the last dimensions of input"
        )
    for name, factor in factors.items():
        if factor is None:
            continue
        if tuple(factor.shape) != shape:
            raise RuntimeError(
                f"{op}: normalized_shape is {shape}, {name} is {tuple(factor.shape)};"
                " they must match"
            )
        if factor.device != input.device:
            raise RuntimeError(
                f"{op}: input is on {input.device}, {name} on {factor.device}; they must match"
            )
