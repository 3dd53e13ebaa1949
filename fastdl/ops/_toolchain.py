"""Which ptxas turns Triton's PTX into machine code, and what it is known to get wrong."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ._launch import INTERPRETED, Device, gpu_facts

# Older ones may reuse the registers of a wgmma's operand A before the product has read them.
FIRST_GOOD = (13, 1, 80)

HOW_TO_FIX = (
    "install nvidia-cuda-nvcc>=13.1 and set TRITON_PTXAS_PATH to the ptxas in it "
    "before the first kernel is compiled"
)


class Ptxas(NamedTuple):
    path: str
    version: tuple[int, ...]

    @property
    def good(self) -> bool:
        """Whether products with operand A in registers come out right on sm_90."""
        return self.version >= FIRST_GOOD

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))} ({self.path})"


@functools.cache
def ptxas_at(path: str) -> Ptxas | None:
    """The ptxas at `path`, None where there is none that runs."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", done.stdout)
    return Ptxas(path, tuple(map(int, found.groups()))) if found else None


def ptxas_in_use(arch: int = 90) -> Ptxas | None:
    """The one that Triton runs for this architecture: the user's, else the one it brings."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    from_user = os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
    for path in (from_user, *map(str, _brought_by_triton(name))):
        found = ptxas_at(path) if path else None
        if found is not None:
            return found
    return None


def better_ptxas() -> Ptxas | None:
    """The newest installed ptxas that is good, None where there is none."""
    paths = [*_from_nvcc(), *_brought_by_triton("ptxas"), *_brought_by_triton("ptxas-blackwell")]
    found = [ptxas for path in paths if (ptxas := ptxas_at(str(path))) is not None and ptxas.good]
    return max(found, key=lambda ptxas: ptxas.version, default=None)


def _brought_by_triton(name: str) -> Iterator[Path]:
    # finds the package without importing it: the path has to be set before that
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder, "backends", "nvidia", "bin", name)


def _from_nvcc() -> Iterator[Path]:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or ()
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "ptxas":
            yield Path(str(file.locate()))


def miscompiles_register_a(device: Device) -> bool:
    """Whether kernels whose dot takes operand A from registers come out wrong here."""
    return device.backend == "cuda" and device.arch == 90 and not _is_good(90)


@functools.cache
def _is_good(arch: int) -> bool:
    ptxas = ptxas_in_use(arch)
    return ptxas is not None and ptxas.good


def register_a_is_safe(device: torch.device) -> bool:
    """`miscompiles_register_a` of a torch device, for functions that Dynamo traces."""
    if device.type != "cuda" or INTERPRETED:
        return True
    return not miscompiles_register_a(gpu_facts(device.index or 0))


# What torch.compiler.assume_constant_result sets, which would import Dynamo.
register_a_is_safe._dynamo_marked_constant = True  # type: ignore[attr-defined]
