"""Steps of optimizers over many tensors in one launch: which tensors kernels take, tables of their
addresses, launches.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch, _route
from ._launch import Config, Device, Kernel, cdiv, device_of, launch
from ._route import Reason

ADAMW_STEP = Kernel("optim.adamw_step")
SGD_STEP = Kernel("optim.sgd_step")
BLOCK_NORMS = Kernel("optim.block_norms")

# Tensors of a launch by what they are to it (parameters, gradients, ...); None where no tensor has
# one.
Columns = Sequence[Sequence[Tensor] | None]


def choose(item_bytes: int, device: Device) -> Config:
    """Each thread has 16 bytes of the tensors with the smallest elements."""
    if device.backend == "interpreter":
        return Config({"BLOCK": 128}, 4, 1)
    return Config({"BLOCK": 1024}, 1024 * item_bytes // 512, 1)


class Scaling(NamedTuple):
    """Numbers on the device that a step applies to all gradients, or that tell it to do nothing."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None

    def on(self, device: torch.device) -> "Scaling":
        return Scaling(*(t if t is None else t.to(device, non_blocking=True) for t in self))


class _Table(NamedTuple):
    addresses: Any
    host: Tensor
    device: Tensor


class Tables:
    """What kernels know of many tensors, on the device, kept while the tensors stay in place."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, _Table] = {}
        self._blocks: dict[Any, Tensor] = {}
        self._captured: list[Any] = []

    def find(self, slot: Hashable, columns: Columns, block: int) -> tuple[Tensor, Tensor]:
        """The table of the columns, and the tensor of each block. A slot keeps its last table."""
        first = columns[0]
        assert first is not None
        device, count = first[0].device, len(first)
        sizes = tuple(t.numel() for t in first)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        addresses = [[0] * count if c is None else [t.data_ptr() for t in c] for c in columns]
        known = self._tables.get((slot, device))
        if capturing or known is None or known.addresses != (sizes, addresses, block):
            # pinned memory is not allocated while a graph is captured
            buffer = known.host if known is not None and capturing else None
            rows = _rows(sizes, addresses, block, device, buffer)
            known = _Table((sizes, addresses, block), rows, _copied(rows, device))
            self._tables[slot, device] = known
        blocks = self._blocks_of(sizes, block, device)
        if capturing:
            # the graph copies the table each time it is replayed, and nobody else fills it
            self._captured.append((self._tables.pop((slot, device)), blocks))
        return known.device, blocks

    def _blocks_of(self, sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
        key = sizes, block, device
        if key not in self._blocks:
            counts = torch.tensor([cdiv(size, block) for size in sizes])
            numbers = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
            if len(self._blocks) > 15:
                self._blocks.clear()
            self._blocks[key] = _copied(_pinned(numbers, device), device)
        return self._blocks[key]


def _rows(
    sizes: tuple[int, ...], addresses: list[list[int]], block: int, device: torch.device,
    buffer: Tensor | None,
) -> Tensor:  # fmt: skip
    starts, programs = [], 0
    for size in sizes:
        starts.append(programs)
        programs += cdiv(size, block)
    rows = torch.tensor([starts, sizes, *addresses], dtype=torch.int64).t().contiguous()
    if buffer is not None and buffer.shape == rows.shape:
        return buffer.copy_(rows)
    return _pinned(rows, device)


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory() if device.type == "cuda" else values


def _copied(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory."""
    if tensor.is_contiguous():
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two dense tensors of the same shape lie in the same order."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def why_none(first: Tensor) -> Reason | None:
    """Why kernels take no tensor at all just now."""
    reason = _route._static_reason((first,))
    return reason if reason in (Reason.POLICY, Reason.TRANSFORM, Reason.TRITON) else None


def why_not(first: Tensor, *others: Tensor) -> Reason | None:
    """Why kernels do not take this parameter, with its gradient and state."""
    device = first.device
    if device.type not in _launch.device_types():
        return Reason.DEVICE
    for t in (first, *others):
        if type(t) not in _route.PLAIN:
            return Reason.SUBCLASS
        if t.dtype not in _route.FUSED_DTYPES:
            return Reason.DTYPE
        if t.device != device:
            return Reason.DEVICE
    return None if dense(first) else Reason.OPTION


def _like(column: Sequence[Tensor] | None) -> Tensor | None:
    """Says the type of a column."""
    return None if column is None else column[0].new_empty(0)


def _config(*columns: Sequence[Tensor] | None) -> Config:
    found = [column[0] for column in columns if column is not None]
    return choose(min(t.element_size() for t in found), device_of(found[0]))


def adamw_step(
    tables: Tables, slot: Hashable, columns: Columns, scaling: Scaling, *,
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, step: float | None,
) -> None:  # fmt: skip
    """Columns: parameters, gradients, first and second moments, largest second moments, master
    weights, counts of steps, which are read where `step` is None.
    """
    p, g, m = columns[:3]
    config = _config(p, g, m)
    table, blocks = tables.find(slot, columns, config["BLOCK"])
    if not len(blocks):
        return
    scaling = scaling.on(table.device)
    corrections = [1.0 if step is None else 1 - beta**step for beta in betas]
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    launch(
        ADAMW_STEP, (len(blocks),), _like(p), _like(g), _like(m), table, blocks,
        lr if isinstance(lr, Tensor) else None, *scaling,
        0.0 if isinstance(lr, Tensor) else float(lr), *corrections, *logs,
        1 - betas[0], betas[1], 1 - betas[1], float(eps), float(weight_decay),
        AMSGRAD=columns[4] is not None, MAXIMIZE=maximize, MASTER=columns[5] is not None,
        COUNTED=step is None, config=config,
    )  # fmt: skip


def sgd_step(
    tables: Tables, slot: Hashable, columns: Columns, scaling: Scaling, *,
    lr: float | Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    maximize: bool, first: bool,
) -> None:  # fmt: skip
    """Columns: parameters, gradients, momentum, master weights."""
    p, g, m, master = columns
    config = _config(p, g, m, master)
    table, blocks = tables.find(slot, columns, config["BLOCK"])
    if not len(blocks):
        return
    scaling = scaling.on(table.device)
    launch(
        SGD_STEP, (len(blocks),), _like(p), _like(g), _like(m or master or p), table, blocks,
        lr if isinstance(lr, Tensor) else None, *scaling,
        0.0 if isinstance(lr, Tensor) else float(lr), float(momentum), 1.0 - dampening,
        float(weight_decay),
        MOMENTUM=m is not None, FIRST=first, NESTEROV=nesterov, MAXIMIZE=maximize,
        MASTER=master is not None, config=config,
    )  # fmt: skip


def total_norm(tables: Tables, gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector."""
    fit: dict[Any, list[Tensor]] = {}
    why = why_none(gradients[0]) if gradients else None
    rest: dict[Any, list[Tensor]] = {}
    for g in gradients:
        if why is None and why_not(g) is None:
            fit.setdefault((g.device, g.dtype), []).append(g)
        else:
            rest.setdefault(getattr(g, "device_mesh", None), []).append(g)
    norms = [_norm(tables, found) for found in fit.values()]
    for found in rest.values():
        norm = torch.nn.utils.get_total_norm(found)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not norms:
        return torch.tensor(0.0)
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device).float() for n in norms]))


def _norm(tables: Tables, gradients: list[Tensor]) -> Tensor:
    config = _config(gradients)
    table, blocks = tables.find(gradients[0].dtype, [gradients], config["BLOCK"])
    norms = torch.empty(len(blocks), dtype=torch.float32, device=table.device)
    if len(blocks):
        launch(BLOCK_NORMS, (len(blocks),), _like(gradients), table, blocks, norms, config=config)
    return torch.linalg.vector_norm(norms)


def clip_coefficient(norm: Tensor, max_norm: float, grad_scale: Tensor | None) -> Tensor:
    """What gradients are multiplied by so that their norm is at most `max_norm`."""
    if grad_scale is not None:
        norm = norm / grad_scale.to(norm.device, non_blocking=True)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
