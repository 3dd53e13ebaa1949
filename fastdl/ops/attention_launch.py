"""Launching attention: layouts, blocks, splits, and one launch for each gradient."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tuned
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import empty_gradients

ATTENTION_FWD = Kernel("attention.attention_fwd")
ATTENTION_MERGE = Kernel("attention.attention_merge")
ATTENTION_DELTA = Kernel("attention_backward.attention_delta")
ATTENTION_DQ = Kernel("attention_backward.attention_dq")
ATTENTION_DKDV = Kernel("attention_backward.attention_dkdv")
ATTENTION_DBIAS = Kernel("attention_backward.attention_dbias")

NEVER = float("-inf")
# Kernels have the logsumexp in base 2.
LN2 = math.log(2.0)


class Given(NamedTuple):
    """The arguments of the op. q, k and v are [batch, head, position, column], packed ones of one
    batch; pages of keys are batches. A limit of -1 is none, and so is a softcap of 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    used_k: Tensor | None
    table: Tensor | None
    max_q: int
    max_k: int
    left: int
    right: int
    scale: float
    softcap: float
    p: float
    splits: int


class Shape(NamedTuple):
    """What blocks depend on: the most rows, the wider head, and how much there is in the logits.

    `load` is 0 for a plain product, 1 with one thing more, 2 with dropout or several.
    """

    rows: int
    width: int
    load: int
    exact: bool


# Rows and keys of a tile, by width and load: the largest that stay in the registers of sm_90.
_BLOCKS: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
    "forward": {
        64: ((128, 64), (128, 64), (128, 32)),
        128: ((128, 128), (128, 64), (128, 32)),
        256: ((128, 32), (128, 32), (64, 16)),
        512: ((32, 32), (32, 32), (16, 16)),
    },
    "dq": {
        64: ((128, 64), (128, 64), (128, 32)),
        128: ((128, 64), (128, 32), (128, 32)),
        256: ((64, 32), (64, 32), (64, 16)),
        512: ((32, 16), (32, 16), (32, 16)),
    },
    "dkdv": {
        64: ((64, 128), (32, 128), (32, 64)),
        128: ((32, 128), (32, 64), (16, 32)),
        256: ((16, 64), (16, 32), (16, 32)),
        512: ((16, 16), (16, 16), (16, 16)),
    },
    "dbias": {
        64: ((64, 64), (64, 64), (64, 64)),
        128: ((64, 64), (64, 64), (64, 32)),
        256: ((64, 32), (64, 32), (64, 32)),
        512: ((32, 32), (32, 16), (16, 16)),
    },
}  # fmt: skip

# Of exact float32, plain or not, for all passes: without tensor cores tiles are small.
_EXACT_BLOCKS = {
    64: ((32, 32), (32, 16)),
    128: ((32, 16), (16, 16)),
    256: ((16, 16), (16, 16)),
    512: ((16, 16), (16, 16)),
}


def choose(part: str, a: Given) -> Config:
    """Blocks of rows and keys for one pass: "forward", "dq", "dkdv" or "dbias"."""
    device, (key, dtype, sizes) = device_of(a.q), asked(part, a)
    shape = Shape(*sizes, _load(a), _exact(dtype))
    if shape.load == 0:  # what is measured says nothing of more
        tuned = _tuned.lookup(key, dtype, sizes, device)
        # torch has few of the calls
        if tuned is not None and tuned.variant != "torch":
            return tuned
    return _rule(part, shape, dtype.itemsize, device)


def asked(part: str, a: Given) -> tuple[str, torch.dtype, tuple[int, int]]:
    """What tables know a pass by: rows, those of heads that share a block together, and columns."""
    rows = _longest(a)[0] * (_group(a) if part in ("forward", "dq") else 1)
    return _key(part), a.q.dtype, (min(power_of_2(rows), 128), _wider(a))


@functools.lru_cache(maxsize=1024)
def _rule(part: str, shape: Shape, itemsize: int, device: Device) -> Config:
    if device.backend == "interpreter":
        # small and unequal, so that small tests cross the end of a block and mix none up
        m, n = (32, 16) if part == "forward" else (16, 32)
        return _config(min(m, max(shape.rows, 16)), n, 4, 1)
    width = max(shape.width, 64)
    wgmma = device.backend == "cuda" and device.arch == 90
    if shape.exact:
        m, n = _EXACT_BLOCKS[width][shape.load > 0] if wgmma else (16, 16)
        m, n = (n, m) if part == "dkdv" else (m, n)
        warps = 8 if m * n >= 512 else 4
        return _fitting(part, _config(m, n, warps, 1), shape, itemsize, device)
    # without wgmma operands are in registers too
    more = 0 if wgmma else 1 if width == 64 and device.backend == "cuda" else 2
    load = min(shape.load + more + (itemsize == 4), 2)
    m, n = _BLOCKS[part][width][load]
    if itemsize == 4:  # tf32
        part_of = 4 if shape.load == 2 else 2
        m, n = max(m // part_of, 16), max(n // part_of, 16)
    stages, warps = 1 if part == "dbias" or shape.width > 256 else 2, 8
    if part == "forward" and shape.rows <= min(m, 64):
        # few rows: keys stream by
        m, n, warps, stages = max(shape.rows, 16), min(max(n, 32), 64), 4, 3
    return _fitting(part, _config(m, n, warps, stages), shape, itemsize, device)


def _fitting(part: str, config: Config, shape: Shape, itemsize: int, device: Device) -> Config:
    """Fewer stages, then smaller blocks, until the tiles fit into shared memory."""
    while True:
        m, n, stages = config["BLOCK_M"], config["BLOCK_N"], config.num_stages
        kept, passing = (n, m) if part == "dkdv" else (m, n)
        held = (1 if part == "forward" else 2) * kept + 2 * stages * passing
        if held * shape.width * itemsize <= 0.95 * device.shared or (stages == 1 and m == n == 16):
            return config
        if stages > 1:
            config = _config(m, n, config.num_warps, stages - 1)
        else:
            config = _config(*((max(m // 2, 16), n) if m > n else (m, max(n // 2, 16))), 4, 1)


def _config(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


def _key(part: str) -> str:
    return "attention" if part == "forward" else f"attention_{part}"


def _candidates(part: str) -> _tuned.Candidates:
    """What tuning may pick: the rule's choice and its neighbours."""

    def candidates(dtype: Any, sizes: tuple[int, ...], device: Device) -> list[Config]:
        rows, width = sizes
        shape = Shape(min(power_of_2(rows), 128), _width(width), 0, _exact(dtype))
        first = _rule(part, shape, dtype.itemsize, device)
        m, n, warps, found = first["BLOCK_M"], first["BLOCK_N"], first.num_warps, [first]
        for blocks in ((m, n), (m, n // 2), (m // 2, n)):
            for stages in (2, 3):
                config = _config(*blocks, warps, stages)
                fits = _fitting(part, config, shape, dtype.itemsize, device) == config
                if min(blocks) >= 16 and fits and config not in found:
                    found.append(config)
        return found

    return candidates


# The pass for a bias has no plain form.
for _part in ("forward", "dq", "dkdv"):
    _tuned.CANDIDATES[_key(_part)] = _candidates(_part)

# All of backward is a choice between these kernels, as they are, and torch's.
_tuned.CANDIDATES[_key("backward")] = lambda *asked: [Config({}, variant="kernels")]


def _wider(a: Given) -> int:
    return max(_width(a.q.shape[3]), _width(a.v.shape[3]))


def _load(a: Given) -> int:
    extras = (a.mask is not None, a.slopes is not None, a.softcap != 0)
    return 2 if a.seed is not None else min(sum(extras), 2)


def _width(D: int) -> int:
    return max(power_of_2(D), 16)


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are of float32 as it is, for which there are no tensor cores."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def _splits(programs: int, max_k: int, device: Device) -> int:
    """Keys are split while there are few programs, each for a quarter of a thousand or more."""
    if 2 * programs > device.sms:
        return 1
    least = 32 if device.backend == "interpreter" else 256
    return max(1, min(cdiv(2 * device.sms, programs), max_k // least, 64))


def _in_rows(a: Given) -> Given:
    """Columns side by side. Copies only what is not."""
    q, k, v, mask = (_dense(x) for x in (a.q, a.k, a.v, a.mask))
    slopes, sinks = (None if x is None else x.contiguous() for x in (a.slopes, a.sinks))
    return a._replace(q=q, k=k, v=v, mask=mask, slopes=slopes, sinks=sinks)


def _dense(x: Any) -> Any:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _batches(a: Given) -> int:
    return a.q.shape[0] if a.cu_q is None else a.cu_q.numel() - 1


def _group(a: Given) -> int:
    """Query heads that share a key-value head."""
    return a.q.shape[1] // a.k.shape[1]


def _longest(a: Given) -> tuple[int, int]:
    """The most queries and keys that a sequence has."""
    return (a.q.shape[2], a.k.shape[2]) if a.cu_q is None else (a.max_q, a.max_k)


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Of batches, heads and rows, and what they count: eights where they allow that, so that
    16 bytes are moved at a time.
    """
    sizes = [
        (n, stride) for x in tensors for n, stride in zip(x.shape[:3], x.stride(), strict=False)
    ]
    strides = [stride if n > 1 else 0 for n, stride in sizes]
    step = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // step for stride in strides], step


def _mask_strides(mask: Tensor | None) -> tuple[int | None, ...]:
    """Of batch, head and query, 0 where one stands for all. (..., None): one row for a batch."""
    if mask is None:
        return 0, 0, None
    b, h, q = (0 if n == 1 else s for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return b, h, q if h or q else None


def _numbers(a: Given) -> tuple[Any, ...]:
    """scale, softcap, left, right and p as kernels take them: None is none."""
    left, right = (None if limit < 0 else limit for limit in (a.left, a.right))
    return a.scale, a.softcap or None, left, right, a.p


def _constants(a: Given) -> dict[str, Any]:
    D, DV = a.q.shape[3], a.v.shape[3]
    return {
        "D": D, "DV": DV, "BLOCK_D": _width(D), "BLOCK_DV": _width(DV),
        "PRECISION": "ieee" if _exact(a.q.dtype) else "tf32",
    }  # fmt: skip


def _folded(a: Given) -> bool:
    """Whether logits are products times a positive scale, which can wait for the exponential."""
    bias = a.mask is not None and a.mask.dtype != torch.bool
    return a.scale > 0 and not (a.softcap or bias or a.slopes is not None)


def _new_rows(like: Tensor, columns: int, packed: bool) -> Tensor:
    """An output with the order of memory of `like`; rows of no sequence are 0 where packed."""
    if like.stride(-1) == 1 and columns == like.shape[-1]:
        return torch.zeros_like(like) if packed else torch.empty_like(like)
    shape = (*like.shape[:-1], columns)
    return like.new_zeros(shape) if packed else like.new_empty(shape)


def like(*args: Any) -> tuple[Tensor, Tensor]:
    a = Given(*args)
    packed = a.cu_q is not None
    o, shape = _new_rows(a.q, a.v.shape[3], packed), a.q.shape[:3]
    if packed:
        return o, a.q.new_full(shape, NEVER, dtype=torch.float32)
    return o, a.q.new_empty(shape, dtype=torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    used_k: Tensor | None, table: Tensor | None, max_q: int, max_k: int, left: int, right: int,
    scale: float, softcap: float, p: float, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = Given(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, used_k, table, max_q, max_k,
                  left, right, scale, softcap, p, splits)  # fmt: skip
    o, lse = like(*given)
    a, device = _in_rows(given), device_of(q)
    longest, longest_k = _longest(a)
    config = choose("forward", a)
    blocks = cdiv(longest * _group(a), config["BLOCK_M"])
    programs = blocks * k.shape[1] * _batches(a)
    bias = mask is not None and mask.dtype != torch.bool
    # the parts of a row cannot be merged that has nothing but the lowest bias
    splits = 1 if bias else splits or _splits(programs, longest_k, device)
    outputs, part_sizes = (o, lse), (0, 0)
    if splits > 1:
        parts = q.new_empty((splits, *o.shape), dtype=torch.float32)
        # rows of no sequence are not written
        lse_parts = q.new_full((splits, *lse.shape), NEVER, dtype=torch.float32)
        outputs, part_sizes = (parts, lse_parts), (o.numel(), lse.numel())
    n_k, table_row = k.shape[2], (0, 1)
    if table is not None:
        n_k, table_row = table.shape[1] * k.shape[2], (table.stride(0), k.shape[2])
    strides, step = _strides(a.q, a.k, a.v, outputs[0] if splits == 1 else outputs[0][0])
    launch(
        ATTENTION_FWD, (programs, splits),
        *a[:3], a.mask, a.slopes, a.sinks, seed, cu_q, cu_k, used_k, table, *outputs,
        *strides, *_mask_strides(a.mask), *table_row, *part_sizes,
        q.shape[1], _group(a), q.shape[2], n_k, blocks, *_numbers(a),
        **_constants(a), FOLDED=_folded(a), STEP=step, config=config,
    )  # fmt: skip
    if splits > 1:
        _merge(*outputs, o, lse)
    return o, lse


def _merge(parts: Tensor, lse_parts: Tensor, o: Tensor, lse: Tensor) -> None:
    width = _width(o.shape[3])
    config = Config({"BLOCK_M": max(1, 2048 // width)}, 4, 1)
    strides, step = _strides(o)
    launch(
        ATTENTION_MERGE, (cdiv(lse.numel(), config["BLOCK_M"]),),
        parts, lse_parts, o, lse, *strides, o.shape[1], o.shape[2], lse.numel(),
        parts.shape[0], DV=o.shape[3], BLOCK_DV=width, STEP=step, config=config,
    )  # fmt: skip


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def like_backward(do: Tensor, dlse: Any, o: Tensor, lse: Tensor, *rest: Any) -> Gradients:
    *args, needs = rest
    a = Given(*args)
    packed = a.cu_q is not None
    made: list[Any] = [
        _new_rows(x, x.shape[-1], packed) if need else None
        for x, need in zip((a.q, a.k, a.v), needs[:3], strict=True)
    ]
    return *made, *empty_gradients((a.mask, a.sinks), needs[3:])


def backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    used_k: Tensor | None, table: Tensor | None, max_q: int, max_k: int, left: int, right: int,
    scale: float, softcap: float, p: float, splits: int, needs: list[bool],
) -> Gradients:  # fmt: skip
    given = Given(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, used_k, table, max_q, max_k,
                  left, right, scale, softcap, p, splits)  # fmt: skip
    dq, dk, dv, dmask, dsinks = like_backward(do, dlse, o, lse, *given, needs)
    a, do = _in_rows(given), _dense(do)
    delta = _delta(o, do, dlse)
    if dq is not None:
        _launch_dq(a, do, lse, delta, dq)
    if dk is not None or dv is not None:
        _launch_dkdv(a, do, lse, delta, dk, dv)
    if dmask is not None:
        _launch_dbias(a, do, lse, delta, dmask)
    if sinks is not None and dsinks is not None:
        # a sink has no value, so its dp is 0
        weight = torch.exp2(sinks.float()[:, None] / LN2 - lse).masked_fill(lse == NEVER, 0.0)
        dsinks.copy_(-(weight * delta).sum((0, 2)))
    return dq, dk, dv, dmask, dsinks


def _delta(o: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    delta, width = o.new_empty(o.shape[:3], dtype=torch.float32), _width(o.shape[3])
    config = Config({"BLOCK_M": max(1, min(64, 4096 // width))}, 4, 1)
    strides, step = _strides(o, do)
    launch(
        ATTENTION_DELTA, (cdiv(delta.numel(), config["BLOCK_M"]),),
        o, do, None if dlse is None else dlse.contiguous(), delta, *strides,
        o.shape[1], o.shape[2], delta.numel(),
        DV=o.shape[3], BLOCK_DV=width, STEP=step, config=config,
    )  # fmt: skip
    return delta


def _launch_dq(a: Given, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    rows, group = _longest(a)[0], _group(a)
    config = choose("dq", a)
    blocks = cdiv(rows * group, config["BLOCK_M"])
    strides, step = _strides(a.q, a.k, a.v, do, dq)
    launch(
        ATTENTION_DQ, (blocks * a.k.shape[1] * _batches(a),),
        *a[:3], a.mask, a.slopes, a.seed, a.cu_q, a.cu_k, a.used_k, do, lse, delta, dq,
        *strides, *_mask_strides(a.mask),
        a.q.shape[1], group, a.q.shape[2], a.k.shape[2], blocks, *_numbers(a),
        **_constants(a), FOLDED=_folded(a), STEP=step, config=config,
    )  # fmt: skip


def _launch_dkdv(a: Given, do: Tensor, lse: Tensor, delta: Tensor, dk: Any, dv: Any) -> None:
    config = choose("dkdv", a)
    blocks = cdiv(_longest(a)[1], config["BLOCK_N"])
    outputs = (a.k if dk is None else dk, a.v if dv is None else dv)
    strides, step = _strides(a.q, a.k, a.v, do, *outputs)
    launch(
        ATTENTION_DKDV, (blocks * a.k.shape[1] * _batches(a),),
        *a[:3], a.mask, a.slopes, a.seed, a.cu_q, a.cu_k, a.used_k, do, lse, delta, dk, dv,
        *strides, *_mask_strides(a.mask),
        a.q.shape[1], _group(a), a.q.shape[2], a.k.shape[2], blocks, *_numbers(a),
        **_constants(a), FOLDED=_folded(a), STEP=step, config=config,
    )  # fmt: skip


def _launch_dbias(a: Given, do: Tensor, lse: Tensor, delta: Tensor, dbias: Tensor) -> None:
    """Tiles of the bias, and where they are few, parts of what each of them stands for."""
    (B, H, Sq), device = a.q.shape[:3], device_of(do)
    own_batches, own_heads, own_queries, Sk = dbias.shape
    config = choose("dbias", a)
    all_q, tiles_k = cdiv(Sq, config["BLOCK_M"]), cdiv(Sk, config["BLOCK_N"])
    one_row = own_queries == 1
    turns = (B // own_batches, H // own_heads, all_q if one_row else 1)
    tiles_q = 1 if one_row else all_q
    tiles = tiles_k * tiles_q * own_heads * own_batches
    parts = max(1, min(math.prod(turns), 2 * device.sms // tiles))
    sums = dbias if parts == 1 else dbias.new_empty((parts, *dbias.shape), dtype=torch.float32)
    strides, step = _strides(a.q, a.k, a.v, do)
    launch(
        ATTENTION_DBIAS, (tiles, parts),
        *a[:3], a.mask, a.slopes, a.seed, do, lse, delta, sums,
        *strides, *_mask_strides(a.mask),
        H, _group(a), Sq, Sk, tiles_q, tiles_k, own_heads, *turns, dbias.numel(), *_numbers(a),
        **_constants(a), ONE_ROW=one_row, STEP=step, config=config,
    )  # fmt: skip
    if parts > 1:
        dbias.copy_(sums.sum(0))
