"""Measured launch configurations: one JSON file a GPU, checked key by key. Data, never code."""

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import _launch
from ._launch import Config, Device, Margin, power_of_2
from ._route import prefers_torch

SCHEMA = 1
MAX_BYTES = 4 << 20
PACKAGED = Path(__file__).parent.parent / "tuned"

# Keys of an entry and what each may be. Blocks are powers of two, flags among them 0 or 1.
_WHOLE = {"num_warps": (1, 32), "num_stages": (1, 8), "splits": (1, 256)}
_BLOCK = (0, 1 << 20)

Candidates = Callable[[Any, tuple[int, ...], Device], list[Config]]

# By op, what a table may name: configurations that are tested, so that no table can break an op.
CANDIDATES: dict[str, Candidates] = {}

_forced: dict[str, Config] = {}
_warned: set[Path] = set()


def size_class(*sizes: int) -> str:
    """Shapes that share a configuration: each size rounded up to a power of two."""
    return "x".join(str(power_of_2(size)) for size in sizes)


def key_of(op: str, dtype: Any, sizes: tuple[int, ...]) -> str:
    return f"{op}/{str(dtype).removeprefix('torch.')}/{size_class(*sizes)}"


def lookup(op: str, dtype: Any, sizes: tuple[int, ...], device: Device) -> Config | None:
    """The measured configuration for these sizes on this GPU: the user's, else the packaged one."""
    config = _find(op, dtype, sizes, device)
    if config is not None and config.variant == "torch" and not prefers_torch("torch"):
        config = None
    _launch.note(op, dtype, sizes, config)
    return config


# Every call of an op asks: the files, and their names, are looked at once for each of the sizes.
@functools.lru_cache(maxsize=4096)
def _find(op: str, dtype: Any, sizes: tuple[int, ...], device: Device) -> Config | None:
    key = key_of(op, dtype, sizes)
    if key in _forced:
        return _forced[key]
    for source, path in (("user", user_file(device.name)), ("tuned", packaged_file(device.name))):
        entry = read(path).get(key)
        if entry is None:
            continue
        margin = entry.get("margin")
        config = Config(
            **{**entry, "source": source, "margin": None if margin is None else Margin(**margin)}
        )
        if _is_candidate(config, op, dtype, sizes, device):
            return config
        _warn_once(path, f"entry {key!r} is no configuration that this version tests")
    return None


def _is_candidate(
    config: Config, op: str, dtype: Any, sizes: tuple[int, ...], device: Device
) -> bool:
    if config.variant == "torch" or op not in CANDIDATES:
        return True
    return any(
        replace(config, splits=other.splits, source=other.source) == other
        for other in CANDIDATES[op](dtype, sizes, device)
    )


@contextlib.contextmanager
def forced(op: str, dtype: Any, sizes: tuple[int, ...], config: Config) -> Iterator[None]:
    """Launch `op` with this configuration, in every thread, for sizes of this class."""
    key = key_of(op, dtype, sizes)
    _forced[key] = config
    _find.cache_clear()
    try:
        yield
    finally:
        _forced.pop(key, None)
        _find.cache_clear()


def packaged_file(gpu: str) -> Path:
    return PACKAGED / f"{slug(gpu)}.json"


def user_file(gpu: str) -> Path:
    """Where `fastdl tune` writes: under FASTDL_TUNED, else the user's cache."""
    base = os.environ.get("FASTDL_TUNED") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"),
        "fastdl",
    )
    return Path(base) / f"{slug(gpu)}.json"


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@functools.cache
def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a table. A missing file is empty; a damaged one too, with one warning."""
    try:
        return load(path)["entries"] if path.is_file() else {}
    except (OSError, ValueError) as error:
        _warn_once(path, str(error))
        return {}


def load(path: Path) -> dict[str, Any]:
    """A whole table; ValueError if it is damaged."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check(table)
    return table


def _warn_once(path: Path, what: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"fastdl: ignoring the tuned table {path}: {what}", stacklevel=3)


def forget() -> None:
    """Read the files again when they are next asked for."""
    read.cache_clear()
    _find.cache_clear()
    _warned.clear()


def write(
    path: Path, gpu: str, provenance: dict[str, str], entries: dict[str, dict[str, Any]]
) -> None:
    """Write a table so that a reader sees the old one or the new one, never half of one."""
    table = {"schema": SCHEMA, "gpu": gpu, "provenance": provenance, "entries": entries}
    check(table)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(table, indent=1, sort_keys=True) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    forget()


def check(table: Any) -> None:
    """Raise ValueError, naming the key, unless the table is of the form that `write` writes."""
    if not isinstance(table, dict) or table.keys() != {"schema", "gpu", "provenance", "entries"}:
        raise ValueError("its keys are not schema, gpu, provenance and entries")
    if table["schema"] != SCHEMA:
        raise ValueError(f"schema is {table['schema']!r}, this version reads {SCHEMA}")
    if not isinstance(table["gpu"], str):
        raise ValueError("gpu is not a name")
    if not isinstance(table["provenance"], dict) or not isinstance(table["entries"], dict):
        raise ValueError("provenance or entries is not an object")
    for key, entry in table["entries"].items():
        if not re.fullmatch(r"[a-z_0-9]+/[a-z0-9]+/\d+(x\d+)*", key):
            raise ValueError(f"entry {key!r} is not op/dtype/sizes")
        _check_entry(key, entry)


def _check_entry(key: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not entry.keys() <= {"blocks", "variant", "margin", *_WHOLE}:
        raise ValueError(f"entry {key!r} has keys that are not known")
    blocks = entry.get("blocks")
    if not isinstance(blocks, dict) or not isinstance(entry.get("variant", ""), str):
        raise ValueError(f"entry {key!r} has no blocks, or a variant that is not a name")
    for name, value in blocks.items():
        if (
            not re.fullmatch(r"[A-Z_]+", name)
            or not _is_whole(value, *_BLOCK)
            or value & (value - 1)
        ):
            raise ValueError(
                f"entry {key!r}: block {name} = {value!r} is not a power of two in range"
            )
    for name, (low, high) in _WHOLE.items():
        if name in entry and not _is_whole(entry[name], low, high):
            raise ValueError(
                f"entry {key!r}: {name} = {entry[name]!r} is not between {low} and {high}"
            )
    if "margin" in entry and not _is_margin(entry["margin"]):
        raise ValueError(
            f"entry {key!r}: margin = {entry['margin']!r} is not a ratio between its quartiles"
        )


def _is_margin(value: Any) -> bool:
    """Three positive numbers in their order; comparisons refuse what is not a number."""
    if not isinstance(value, dict) or value.keys() != {*Margin._fields}:
        return False
    if not all(type(part) in (int, float) for part in value.values()):
        return False
    margin = Margin(**value)
    return 0 < margin.low <= margin.ratio <= margin.high < float("inf")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
