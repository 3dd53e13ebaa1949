"""Results on disk: one JSON a stage, rows by name, each with the run that it comes from."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


class Store:
    """The rows of one stage. A row counts as done only if it is right and of this very code."""

    def __init__(self, folder: Path, stage: str, run: dict[str, Any]) -> None:
        self.path, self.run = folder / f"{stage}.json", run
        self.id = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
        self.table = read(self.path) or {"stage": stage, "runs": {}, "rows": {}}

    def tried(self, name: str) -> bool:
        """Whether there is a row of this very code, right or not."""
        return self.table["rows"].get(name, {}).get("run") == self.id

    def done(self, name: str) -> bool:
        return self.tried(name) and bool(self.table["rows"][name]["ok"])

    def put(self, name: str, row: Row) -> None:
        """Keep the row, on disk at once: what comes after may kill the process. Other processes may
        write rows of the same stage.
        """
        with locked(self.path):
            self.table = read(self.path) or self.table
            rows = {**self.table["rows"], name: {**row, "run": self.id}}
            used = {row["run"] for row in rows.values()}
            runs = {**self.table["runs"], self.id: self.run}
            self.table |= {"rows": rows, "runs": {id: runs[id] for id in used}}
            write(self.path, self.table)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or none that a Store wrote."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) and {"runs", "rows"} <= table.keys() else None


def write(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(table, file, indent=1)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def provenance(environment: dict[str, Any]) -> dict[str, Any]:
    """What rows of one run have in common: versions, device, ptxas, and the code."""
    return {
        "versions": {**environment["versions"], **libraries()},
        **{key: environment[key] for key in ("devices", "interpreted")},
        # its version, without where it lies
        "ptxas": environment["ptxas"] and environment["ptxas"].split(" (")[0],
        "commit": commit(),
        "code": code_digest(),
    }


def libraries() -> dict[str, str]:
    """Versions of those that are here: they bring models, or are timed beside us."""
    found = {}
    for name in ("transformers", "diffusers", "liger-kernel", "flash-attn", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """None outside of a git checkout; a checkout with changes says so."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout else "")


def code_digest() -> str:
    """Of all that can change a number: kernels, package and benchmark."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastdl", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" not in path.relative_to(ROOT).parts[1:]:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
