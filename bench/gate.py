"""Whether fused ops got slower, beside torch on the same GPU, from one run to another.

    python -m bench.gate OLD NEW

Each is a JSON of pytest-benchmark, a table of bench/results, or a folder of them. Compared are
ratios to the fastest that torch has, never times: those are of a machine and its day.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# A smaller loss than this is noise, whatever the quartiles of two runs say.
FLOOR = 0.02

WORSE, UNUSABLE = 1, 2

# Ours among the contenders of whole models, and what they are compared with.
MODELS = (("modules", "eager"), ("graph", "eager"), ("then compile", "compile"))


class Key(NamedTuple):
    """Of one ratio: an op's case in one pass, or a model as one contender, on one GPU."""

    gpu: str
    op: str
    case: str
    what: str

    def __str__(self) -> str:
        return f"{self.op}, {self.case}, {self.what}"


class Ratio(NamedTuple):
    """The baseline's time over that of the fused form: median and quartiles of the rounds."""

    ratio: float
    low: float
    high: float
    baseline: str
    how: str

    def __str__(self) -> str:
        return f"{self.ratio:.3f}x {self.baseline} ({self.low:.3f} to {self.high:.3f})"


Ratios = Mapping[Key, Ratio]


class GateError(Exception):
    """Two runs that cannot be compared, and why."""


def is_worse(old: Ratio, new: Ratio) -> bool:
    """By more than FLOOR, and with no part of the middle halves of the rounds in common."""
    return new.ratio < old.ratio * (1 - FLOOR) and new.high < old.low


@dataclass
class Comparison:
    """What became of the ratios of one run in another."""

    compared: int
    worse: dict[Key, tuple[Ratio, Ratio]]
    otherwise: list[Key]
    only_old: list[Key]
    only_new: list[Key]

    @property
    def ok(self) -> bool:
        return bool(self.compared) and not self.worse

    def __str__(self) -> str:
        verdict = f"{len(self.worse)} worse than noise allows" if self.worse else "none is worse"
        lines = [f"gate: {self.compared} ratios compared, {verdict}"]
        lines += [f"  {key}: {old}, now {new}" for key, (old, new) in self.worse.items()]
        for what, keys in (
            ("in the old run only", self.only_old),
            ("in the new run only", self.only_new),
            ("as graphs in one run, from Python in the other", self.otherwise),
        ):
            lines += [f"{len(keys)} {what}:", *(f"  {key}" for key in keys)] if keys else []
        if not self.compared:
            lines.append("nothing was compared, so nothing is known")
        return "\n".join(lines)


def compare(old: Path, new: Path) -> Comparison:
    """Files or folders of two runs."""
    return compared(read(old), read(new))


def compared(old: Ratios, new: Ratios) -> Comparison:
    """Ratios of GPUs that both runs have."""
    gpus = [{key.gpu for key in run} for run in (old, new)]
    if new:
        require_shared(*gpus)
    old = {key: ratio for key, ratio in old.items() if key.gpu in gpus[1] or not new}
    new = {key: ratio for key, ratio in new.items() if key.gpu in gpus[0]}
    both = [key for key in old if key in new]
    alike = [key for key in both if old[key].how == new[key].how]
    return Comparison(
        len(alike),
        {key: (old[key], new[key]) for key in alike if is_worse(old[key], new[key])},
        [key for key in both if key not in alike],
        [key for key in old if key not in new],
        [key for key in new if key not in old],
    )


def require_shared(old: Collection[str], new: Collection[str]) -> None:
    """GPUs of two runs, by name."""
    if not set(old) & set(new):
        names = [" and ".join(sorted(of)) for of in (old, new)]
        raise GateError(
            f"the old run is of {names[0]}, the new one of {names[1]}: ratios on one GPU say "
            "nothing about another. Compare with a run on the same GPU"
        )


def read(path: Path) -> dict[Key, Ratio]:
    """All ratios in a file, or in the files of a folder."""
    if not path.exists():
        raise GateError(f"{path.absolute()}: there is no such file or folder")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found: dict[Key, Ratio] = {}
    for file in files:
        found |= _read(file)
    if not found:
        raise GateError(
            f"{path.absolute()}: holds no timed rows of fused ops. Give a file that `fastdl bench "
            "--benchmark-json FILE` wrote on a GPU, or what `make gpu` left in bench/results"
        )
    return found


def _read(file: Path) -> dict[Key, Ratio]:
    try:
        table = json.loads(file.read_text())
        if "benchmarks" in table:
            return of_suite(entry["extra_info"] for entry in table["benchmarks"])
        return dict(_of_stage(file, table)) if {"runs", "rows"} <= table.keys() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise GateError(f"{file.absolute()}: damaged, or of another form: {error!r}") from None


def of_suite(infos: Iterable[Mapping[str, Any]]) -> dict[Key, Ratio]:
    """From what the tests of bench/test_ops.py say of themselves."""
    return {
        Key(info["gpu"], info["op"], info["case"], info["pass"]): Ratio(
            info["ratio"], info["low"], info["high"], info["baseline"], info["how"]
        )
        for info in infos
        if info.get("contender") == "fused"
    }


def _of_stage(file: Path, table: Mapping[str, Any]) -> Iterator[tuple[Key, Ratio]]:
    """From one table of bench/results. Rows that failed, and stages that time no op, have none."""
    gpus = {
        id: run["devices"][0]["name"] if run["devices"] else file.parent.name
        for id, run in table["runs"].items()
    }
    for case, row in table["rows"].items():
        for what, found in row.get("passes", {}).items():
            way = found[found["how"]]
            of = way["contenders"]["fused"]
            yield (
                Key(gpus[row["run"]], file.stem, case, what),
                Ratio(of["ratio"], of["low"], of["high"], way["baseline"], found["how"]),
            )
        # of whole models: as called from Python, which is what a user waits for
        for name, over in MODELS if file.stem == "models" else ():
            of = row.get("python", {}).get(over, {}).get(name)
            if of is not None:
                ratio = Ratio(of["ratio"], of["low"], of["high"], over, "python")
                yield Key(gpus[row["run"]], "models", case, name), ratio


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    try:
        found = compare(options.old, options.new)
    except GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return UNUSABLE
    print(found)
    return 0 if found.ok else WORSE


if __name__ == "__main__":
    sys.exit(main())
