"""The pass that ends a product computed elsewhere, and the pass that begins its backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2

FINISH_FWD = Kernel("finish.finish_fwd")
FINISH_BWD = Kernel("finish.finish_bwd")


class Extent(NamedTuple):
    """Images of rows and columns. Of planes a column, the channel, lies in a line."""

    images: int
    rows: int
    columns: int
    planes: bool = False


def tile_of(extent: Extent, size: int, device: Device) -> Config:
    """A tile of about `size` elements, long along what lies in a line."""
    if device.backend == "interpreter":
        m, n = (32, 8) if extent.planes else (8, 32)
    elif extent.planes:
        m = max(16, min(power_of_2(extent.rows), size // 2))
        n = size // m
    else:
        m, n = size // 128, 128
    # 16 elements a thread: more, where lines begin anywhere, do not fit in registers
    return Config({"BLOCK_M": m, "BLOCK_N": n}, 8 if size > 2048 else 4, 1)


def launch_finish(
    partial_sums: Tensor, parts: int, tail: Any, extent: Extent, options: Any, inside: bool
) -> None:
    """`tail` is scale, bias, residual, seed, y and z. y or z may be the memory of the one part."""
    images, rows, columns, planes = extent
    # 16 elements a thread do not fit in registers where short planes begin anywhere
    config = tile_of(extent, 1024 if planes else 2048, device_of(partial_sums))
    tiles = images * cdiv(rows, config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"])
    name, a, b, p = options
    launch(
        FINISH_FWD, (tiles,),
        partial_sums, *tail,
        images, rows, columns, parts, a, b, p,
        ACT=name, INSIDE=inside, PLANES=planes, config=config,
    )  # fmt: skip


def launch_backward(
    dy: Tensor, z: Tensor | None, seed: Tensor | None, extent: Extent, options: Any, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dz, in the memory format of dy, and the gradient of the bias."""
    images, rows, columns, planes = extent
    device, (name, a, b, p) = device_of(dy), options
    config = tile_of(extent, 4096, device)
    groups = cdiv(columns, config["BLOCK_N"])
    blocks = images * cdiv(rows, config["BLOCK_M"])
    parts = max(1, min(blocks, 4 * device.sms // groups))
    dz = torch.empty_like(dy)
    dbias = dy.new_empty((parts, columns), dtype=torch.float32) if need_bias else None
    launch(
        FINISH_BWD, (groups, parts),
        dy, z, seed, dz, dbias,
        images, rows, columns, a, b, p,
        ACT=name, PLANES=planes, config=config,
    )  # fmt: skip
    return dz, None if dbias is None else dbias.sum(0).to(dy.dtype)
