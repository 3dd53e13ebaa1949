"""`fastdl tune`: measure the shapes of ops, or those that a user's model calls; or list them."""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ._factory import UsageError, blamed, load
from ._table import Progress, show
from .ops import _launch, _tuned
from .tuned.problems import Asked
from .tuned.tune import of_ops, solve, this_gpu

LIST = ("op", "dtype", "sizes", "of the guessed time", "measured")


def run(args: Namespace) -> bool:
    """Tune what the arguments name, or list it. False: nothing was found."""
    gpu = this_gpu()
    if gpu is None and not args.list:
        print(
            "fastdl: configurations are measured on a GPU, and there is none that kernels could "
            "run on. What would be tuned shows: fastdl tune --list",
            file=sys.stderr,
        )
        return False
    wanted = _of_model(args.op[0]) if names_a_model(args.op) else _of_ops(args.op)
    if args.list:
        _list(wanted, args.json)
        return True
    assert gpu is not None
    with Progress("tune") as progress:
        target = _tuned.user_file(gpu.name)
        report = solve(list(wanted), target, gpu, args.budget, args.again, progress.line)
    print(report.to_json() if args.json else report)
    return report.ok


def names_a_model(given: list[str]) -> bool:
    """Whether this is a path such as package.module:make_model, or was meant to be one."""
    models = [name for name in given if not name.isidentifier()]
    if models and len(given) > 1:
        raise UsageError(
            f"either ops or one model, not {' '.join(given)}. Type: fastdl tune {models[0]}"
        )
    return bool(models)


def _of_ops(names: list[str]) -> dict[Asked, float]:
    return dict.fromkeys(of_ops(names or None, None, None), 0.0)


def _of_model(path: str) -> dict[Asked, float]:
    from .tuned.model import asked_by

    model, inputs = load(path, command="tune")
    if inputs is None:
        raise UsageError(
            "a model's shapes are told by a call: return the model and its example inputs as a "
            f"tuple from {path}"
        )
    with blamed(f"{path}, on its example inputs,", _advice()):
        return asked_by(model, inputs)


def _advice() -> str:
    if this_gpu() or _launch.INTERPRETED:
        return ""
    return (
        "There is no GPU, so it was on the meta device, which has shapes and no values. With "
        "values, slowly: TRITON_INTERPRET=1 fastdl tune --list ..."
    )


def _list(wanted: Mapping[Asked, float], as_json: bool) -> None:
    total = sum(wanted.values())
    rows = [
        {
            "op": asked.op,
            "dtype": str(asked.dtype).removeprefix("torch."),
            "sizes": asked.sizes,
            "share": seconds / total if total else None,
            "entry": _entry(asked),
        }
        for asked, seconds in wanted.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if rows:
        show(LIST, [_cells(row) for row in rows])
    print(f"{len(rows)} shapes" + ("" if rows else ": no table is asked for any"))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return row["op"], row["dtype"], "x".join(map(str, row["sizes"])), share, _said(row["entry"])


def _entry(asked: Asked) -> dict[str, Any] | None:
    """What the tables of the GPU that is here have for it."""
    gpu = this_gpu()
    if gpu is None:
        return None
    files = (_tuned.user_file(gpu.name), _tuned.packaged_file(gpu.name))
    return next(
        (_tuned.read(file)[asked.key] for file in files if asked.key in _tuned.read(file)), None
    )


def _said(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not measured"
    margin = entry.get("margin")
    winner = entry.get("variant") or "kernels"
    return f"{winner}, {_launch.Margin(**margin)}" if margin else winner
