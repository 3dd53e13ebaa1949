"""Whether there is room for a proof, before any of it is run."""

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from ._modes import WIDER

MEMINFO = Path("/proc/meminfo")


def insist_on_room(a: nn.Module, b: nn.Module) -> None:
    """Raise a MemoryError if the copies that verify makes of two models cannot fit."""
    for device, size in needed(a, b).items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise MemoryError(
                f"verify: copies of the model, one of them in float64, and their gradients take "
                f"{_gib(size)} on {device}, and the activations more; {_gib(free)} are free. "
                "Verify the same model with fewer or narrower layers, or where there is more "
                "memory. optimize(model) without example inputs, or with verify=False, needs none."
            )


def needed(a: nn.Module, b: nn.Module) -> dict[torch.device, int]:
    """Bytes by device at the fullest moment: a copy with its gradients, and those of earlier runs.

    The judge runs first, then a, then b; each copy goes before the next is made.
    """
    wide, wide_gradients = _sizes(a, wide=True)
    first, first_gradients = _sizes(a)
    second, second_gradients = _sizes(b)
    moments = (
        wide + wide_gradients,
        wide_gradients + first + first_gradients,
        wide_gradients + first_gradients + second + second_gradients,
    )
    return {device: max(m[device] for m in moments) for device in {d for m in moments for d in m}}


def _sizes(
    model: nn.Module, wide: bool = False
) -> tuple[Counter[torch.device], Counter[torch.device]]:
    """What a model takes by device, and what its gradients take."""
    own: Counter[torch.device] = Counter()
    gradients: Counter[torch.device] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        here = getattr(
            tensor, "_local_tensor", tensor
        )  # the part of a DTensor that is on this device
        size = (WIDER.get(here.dtype, here.dtype) if wide else here.dtype).itemsize
        own[here.device] += size * here.numel()
        if tensor.requires_grad:
            gradients[here.device] += size * here.numel()
    return own, gradients


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device, or None where nothing tells."""
    if device.type == "cuda":
        # what torch's allocator holds and does not use can be had too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
