"""Results as they lie on disk, checked and read into what page and pictures show.

What is damaged is left out, with a note; nothing that is read here can break a page later.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.report.results import (
    OURS,
    PASSES,
    WAYS,
    Checked,
    Errors,
    Failed,
    Machine,
    Model,
    Pass,
    Ratio,
    Stats,
    Timed,
    Way,
)
from fastdl.contract import SPECS, STEPS

T = TypeVar("T")

ORDER = {op: index for index, op in enumerate((*SPECS, *STEPS))}
DTYPES = {dtype: index for index, dtype in enumerate(("float32", "float16", "bfloat16"))}


def machines(results: Path) -> list[Machine]:
    """One a folder; those of GPUs first."""
    found = [_machine(path) for path in sorted(results.glob("*")) if any(path.glob("*.json"))]
    return sorted(found, key=lambda machine: not machine.is_gpu)


def _machine(folder: Path) -> Machine:
    machine = Machine(folder)
    for path in sorted(folder.glob("*.json"), key=_order):
        where = f"{folder.name}/{path.name}"
        try:
            # bytes that are no text are a ValueError, brackets too deep a RecursionError
            table = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(table, ensure_ascii=False).encode()  # half a character cannot be written
            runs, rows = _each(table["runs"], _run), table["rows"]
            _map(rows)
        except (*_WRONG, OSError, RecursionError) as error:
            machine.notes.append(f"{where} is left out, it is no table of results: {_why(error)}")
            continue
        machine.runs |= runs
        right = 0
        for name, row in rows.items():
            try:
                right += _row(machine, path.stem, name, row)
            except _WRONG as error:
                machine.notes.append(f"{where}: {name} is left out: {_why(error)}")
        machine.stages[path.stem] = (len(rows), right)
    # processes that ran beside one another left them in any order
    machine.checked.sort(key=lambda one: (ORDER.get(one.op, len(ORDER)), DTYPES.get(one.dtype, 3)))
    return machine


def _order(path: Path) -> tuple[int, str]:
    """Ops as the contract has them, what else there is behind."""
    return ORDER.get(path.stem, len(ORDER)), path.stem


def _row(machine: Machine, stage: str, name: str, row: dict[str, Any]) -> bool:
    """Put a row where it belongs. Whether it is right."""
    ok, says = _map(row)["ok"] is True, _text(row.get("says", ""))
    if not ok:
        machine.failed.append(Failed(stage, name, says or "it does not say why"))
    if "passes" in row and ok:
        machine.timed.append(_timed(stage, name, row))
    elif stage == "models" and "eager" in row.get("python", ()):
        machine.models.append(_model(name, row))
    elif "report" in row:
        report = _map(row["report"])
        machine.interpreted |= report["interpreted"] is True
        machine.checked += [_checked(one, _text(row["run"])) for one in report["rows"]]
    elif "binaries" in row:
        machine.head = _list(row["head"], _text)
        lines = [_list(cells, _text) for cells in row["binaries"]]
        if any(len(cells) != len(machine.head) for cells in lines):
            raise ValueError("lines of other lengths than the head")
        machine.binaries += [(name, cells) for cells in lines]
    return ok


# rows


def _timed(stage: str, name: str, row: dict[str, Any]) -> Timed:
    dtype, ceilings = _text(row["dtype"]), row["ceilings"]
    facts = {key: _facts(row[key]) for key in ("launches", "route", "sets", "cold") if key in row}
    return Timed(
        _text(row.get("op", stage)), name, _text(row["run"]), dtype,
        _list(row.get("shapes", []), _text), _list(row.get("seeds", []), int),
        _number(row["bytes"]), _number(row.get("flops", 0)),
        _errors(row.get("error", {})),
        _positive(ceilings["copy"]), _positive(ceilings["matmul"][dtype]), facts,
        _each(row.get("refused", {}), _text),
        {key: _pass(key, one) for key, one in _some(row["passes"]).items()},
    )  # fmt: skip


def _errors(value: Any) -> dict[str, float]:
    """By name; of an optimizer's step it may be a number alone."""
    named = value if isinstance(value, dict) else {"ours": value}
    return {key: _error(one) for key, one in named.items() if one is not None}


def _pass(name: str, row: dict[str, Any]) -> Pass:
    ways = {way: _way(row[way]) for way in WAYS if way in row}
    how = _text(row["how"])
    if name not in PASSES or how not in ways:
        raise ValueError(f"pass {name}, timed as {how}")
    rates = {key: _number(row[key]) for key in ("tflops", "gb_per_s", "roofline") if key in row}
    peaks, no_graph = (row.get(key, {}) for key in ("peak_bytes", "no_graph"))
    return Pass(
        name, how, int(row["calls"]), ways, _each(peaks, _number), _each(no_graph, _text), rates
    )


def _way(row: dict[str, Any]) -> Way:
    way = Way(_text(row["baseline"]), _each(row["contenders"], _stats), _each(row["over"], _ratio))
    if not {way.baseline, OURS} <= way.contenders.keys():
        raise ValueError(f"no times of {way.baseline} or {OURS}")
    return way


def _stats(row: dict[str, Any]) -> Stats:
    return Stats(*(_positive(row[key]) for key in Stats._fields))


def _ratio(row: dict[str, Any]) -> Ratio:
    return Ratio(*(_positive(row[key]) for key in Ratio._fields))


def _model(name: str, row: dict[str, Any]) -> Model:
    kept = ("sites", "graphs", "breaks", "compile_s")
    facts = {
        contender: {
            **{key: _number(of[key]) for key in kept},
            **{key: _number(of["error"][key]) for key in ("before", "after", "allowed")},
        }
        for contender, of in _map(row["contenders"]).items()
    }
    ways = {way: _each(row[way], lambda base: _each(base, _stats)) for way in WAYS if row.get(way)}
    if "eager" not in ways["python"]["eager"]:
        raise ValueError("no times of eager")
    return Model(
        name, _text(row["run"]), row["ok"] is True, _text(row["proof"]), _text(row["dtype"]), ways,
        facts, _each(row.get("peak_bytes", {}), _number), _each(row.get("refused", {}), _text),
    )  # fmt: skip


def _checked(row: dict[str, Any], run: str) -> Checked:
    forward, gradient = (
        Errors(*(_error(row[of][key]) for key in ("ours", "definition", "allowed")))
        for of in ("forward", "gradient")
    )
    failures = _list(row["failures"], _text)
    return Checked(
        _text(row["op"]), _text(row["dtype"]), int(row["cases"]), forward, gradient, failures, run
    )


def _run(run: dict[str, Any]) -> dict[str, Any]:
    """Provenance: whatever it says, with its versions and devices in place."""
    devices = [{**_map(device), "name": _text(device["name"])} for device in run["devices"]]
    return {**run, "versions": dict(_map(run["versions"])), "devices": devices}


# values: what is not as it must be raises one of these

_WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number as it must be")
    return float(value)


def _positive(value: Any) -> float:
    if not _number(value):
        raise ValueError("a 0 where there can be none")
    return float(value)


def _error(value: Any) -> float:
    """As a number, but an error may be infinite."""
    return math.inf if value == math.inf else _number(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is no object")
    return value


def _some(value: Any) -> dict[str, Any]:
    if not _map(value):
        raise ValueError("there is nothing in it")
    return value


def _each(value: Any, of: Callable[[Any], T]) -> dict[str, T]:
    return {key: of(one) for key, one in _map(value).items()}


def _list(value: Any, of: Callable[[Any], T]) -> list[T]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return [of(one) for one in value]


def _facts(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
