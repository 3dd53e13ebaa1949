"""`fastdl.env()`: what fastdl runs on, and what is known to be wrong with it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .ops import _launch, _toolchain, _tuned

DIST = "fastdl-kernels"


@dataclass(frozen=True)
class Environment:
    """Printable, also as JSON. `better_ptxas` is one that Triton could use instead."""

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    interpreted: bool
    ptxas: str | None
    better_ptxas: str | None
    tuned: dict[str, list[str]]
    problems: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{name:12} {version or 'not here'}" for name, version in self.versions.items()]
        for device in self.devices or [{"name": "none"}]:
            facts = ", ".join(f"{k} {v}" for k, v in device.items() if k != "name")
            lines.append(f"{'GPU':12} {device['name']}{facts and f' ({facts})'}")
        lines.append(f"{'interpreter':12} {'on' if self.interpreted else 'off'}")
        lines.append(f"{'ptxas':12} {self.ptxas or 'not here'}")
        for gpu, files in self.tuned.items():
            files = files or ["no table, rules by shape"]
            lines += [f"{'tuned':12} {gpu}: {file}" for file in files]
        lines += [f"{'problem':12} {problem}" for problem in self.problems]
        return "\n".join(lines)


def env() -> Environment:
    """Versions, devices, ptxas, the tuned tables in use, and known problems."""
    devices = _devices()
    ptxas, better = _toolchain.ptxas_in_use(), _toolchain.better_ptxas()
    versions = {
        "fastdl": _version(DIST) or sys.modules[__package__ or "fastdl"].__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    return Environment(
        versions,
        [asdict(device) for device in devices],
        _launch.INTERPRETED,
        ptxas and str(ptxas),
        better and better.path,
        {device.name: _tables(device.name) for device in devices},
        list(_problems(devices)),
    )


def _version(dist: str) -> str | None:
    try:
        return importlib.metadata.version(dist)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found.group(1) if found else None


def _devices() -> list[_launch.Device]:
    # counting asks the driver's management library; only properties make a context
    return [_launch.gpu_facts(index) for index in range(torch.cuda.device_count())]


def _tables(gpu: str) -> list[str]:
    files = (_tuned.user_file(gpu), _tuned.packaged_file(gpu))
    return [_table(path) for path in files if path.is_file()]


def _table(path: Path) -> str:
    try:
        return f"{path}, {len(_tuned.load(path)['entries'])} entries"
    except (OSError, ValueError) as error:
        return f"{path}, ignored: {error}"


def _problems(devices: list[_launch.Device]) -> Iterator[str]:
    if _version("fastdl") is not None:
        yield (
            "the distribution fastdl, a file downloader by somebody else, is installed under the "
            f"same import name: pip uninstall fastdl, then reinstall {DIST}"
        )
    if importlib.util.find_spec("triton") is None:
        yield "Triton is not installed: every op runs in torch"
    if any(_toolchain.miscompiles_register_a(device) for device in devices):
        yield (
            f"ptxas {_toolchain.ptxas_in_use()} can miscompile products with an operand in "
            f"registers on sm_90; ops that need them run in torch: {_toolchain.HOW_TO_FIX}"
        )
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if cache.is_dir() and cache.stat().st_mode & stat.S_IWOTH:
        yield f"everybody may write machine code into Triton's cache: chmod o-w {cache}"
    if "liger_kernel" in sys.modules:
        yield "liger_kernel is imported: classes that it patched are not what fastdl's rules know"
    yield from _mismatch()


def _mismatch() -> Iterator[str]:
    """The Triton that this torch was released with, if it says so, is another one."""
    installed = _version("triton")
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for need in needs:
        found = re.match(r"triton\s*\(?==\s*([\w.]+)", need)
        if found and installed and installed.split("+")[0] != found.group(1):
            yield f"torch {torch.__version__} asks for triton {found.group(1)}, {installed} is here"
