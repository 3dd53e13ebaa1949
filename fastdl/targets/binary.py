"""Compile one specialisation for a GPU that is not here, and read the machine code."""

import functools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops._launch import Kernel
from .devices import Target
from .loop import Loop, main_loop
from .record import Specialisation


@dataclass
class Facts:
    """What the compiler made of a kernel. `counts` are instructions of all of it, by class."""

    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    resident: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    # (M, N, K, type) of every product; the type of exact fp32 is "ieee"
    dots: list[tuple[int, int, int, str]] = field(default_factory=list)
    # bytes of the largest tile that is loaded, and that is stored
    loaded: int = 0
    stored: int = 0
    loop: Loop | None = None
    error: str = ""

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> "Facts":
        loop = Loop(**data["loop"]) if data["loop"] else None
        return cls(**{**data, "dots": [tuple(dot) for dot in data["dots"]], "loop": loop})


class _Driver:
    """Stands in for a GPU's driver, so that Triton's own launcher specialises and compiles."""

    def __init__(self, target: Target) -> None:
        device = target.device
        self.target = GPUTarget(device.backend, device.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # a JITFunction keeps one compiler for each of these
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def facts(spec: Specialisation, target: Target) -> Facts:
    driver.set_active(_Driver(target))
    try:
        binary = Kernel(spec.kernel).fn.warmup(
            *map(_mock, spec.args), **dict(spec.constants), grid=(1,),
            num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip
    except Exception as error:
        return Facts(error=_sentence(error))
    found = _read_nvidia(binary) if target.device.backend == "cuda" else _read_amd(binary)
    found.shared = binary.metadata.shared
    found.threads = binary.metadata.num_warps * target.warp_size
    found.resident = target.resident(found.registers, found.shared, binary.metadata.num_warps)
    ttir = binary.asm["ttir"]
    found.dots, found.loaded, found.stored = (
        _dots(ttir),
        _largest("load", ttir),
        _largest("store", ttir),
    )
    return found


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{type(error).__name__}: {' '.join(told[:1])}"[:300]


def _mock(arg: str) -> Any:
    """A value that Triton specialises as it did the one that was described."""
    if arg in ("1", "none", "float"):
        return {"1": 1, "none": None, "float": 0.5}[arg]
    kind, _, rest = arg.partition(" ")
    if kind in ("i32", "i64"):
        return (16 if kind == "i32" else 2**33) + (not rest)
    if "x" in rest:
        block = [int(size) for size in rest.split("x")]
        return TensorDescriptor.from_tensor(_empty(kind, *block), block)
    return _empty(kind, 32)[0 if rest else 1 :]


def _empty(dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _dots(ttir: str) -> list[tuple[int, int, int, str]]:
    pattern = r"tt\.dot (.*?): tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x"
    found = []
    for options, m, k, dtype, n in re.findall(pattern, ttir):
        exact = dtype == "f32" and "tf32" not in options
        found.append((int(m), int(n), int(k), "ieee" if exact else dtype))
    return found


def _largest(access: str, ttir: str) -> int:
    tiles = re.findall(rf"tt\.{access} .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>", ttir)
    tiles += re.findall(rf"tt\.descriptor_{access} .*tensor<([\dx]+)x[a-z]+(\d+)>", ttir)
    sizes = (math.prod(map(int, shape.split("x"))) * int(bits) // 8 for shape, bits in tiles)
    return max(sizes, default=0)


def _count(code: str, classes: dict[str, str]) -> dict[str, int]:
    operations = re.findall(r"^\s*(\S+)", code, re.MULTILINE)
    counts = {
        name: sum(bool(re.match(pattern, operation)) for operation in operations)
        for name, pattern in classes.items()
    }
    return {**counts, "instructions": len(operations)}


_NVIDIA = {
    "wgmma": r"[HIQ]GMMA",
    "mma": r"[HI]MMA",
    "tcgen05": r"UTC\w*MMA",
    "tma": r"UTMALDG",
    "async16": r"LDGSTS\.E\.(\w+\.)*128",
    "loads": r"LDG\.|LDGSTS",
    "loads16": r"LDG\.E\.(\w+\.)*128",
    "stores": r"STG\.",
    "stores16": r"STG\.E\.(\w+\.)*128",
    "spills": r"LDL|STL",
}


def _numbers(pattern: str, text: str) -> list[int]:
    """The groups of the pattern where it is found first."""
    found = re.search(pattern, text)
    assert found is not None, pattern
    return [int(group) for group in found.groups()]


def _read_nvidia(binary: Any) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    counts = _count("\n".join(re.findall(line, sass, re.MULTILINE)), _NVIDIA)
    registers, stack = _numbers(r"REG:(\d+) STACK:(\d+)", usage)
    loop = main_loop(sass, binary.metadata.num_warps)
    return Facts(registers, counts.pop("spills"), stack, counts=counts, loop=loop)


@functools.cache
def _tool() -> str:
    """The disassembler that comes with Triton."""
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def _cuobjdump(*args: str) -> str:
    return subprocess.run([_tool(), *args], capture_output=True, text=True, check=True).stdout


_AMD = {
    "mfma": r"v_mfma|v_smfmac",
    "loads": r"(global|buffer)_load",
    "loads16": r"(global|buffer)_load_dwordx4",
    "stores": r"(global|buffer)_store",
    "stores16": r"(global|buffer)_store_dwordx4",
    # what LLVM counts as spilled may have gone to the accumulation registers, which costs little
    "spills": r"scratch_(load|store)",
}


def _read_amd(binary: Any) -> Facts:
    code = binary.asm["amdgcn"]

    def noted(name: str) -> int:
        return _numbers(rf"\.{name}:\s*(\d+)", code)[0]

    instructions = "\n".join(re.findall(r"^\t([a-z]\w+)", code, re.MULTILINE))
    counts = _count(instructions, _AMD)
    stack = noted("private_segment_fixed_size")
    return Facts(noted("vgpr_count"), counts.pop("spills"), stack, counts=counts)
