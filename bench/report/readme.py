"""README's tables, each between `<!-- results:NAME -->` and `<!-- /results -->`."""

import re
from collections.abc import Callable, Sequence

from bench.report import summary
from bench.report.results import Machine
from bench.report.summary import Table

BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)

# What is drawn for README, beside the tables in a GPU's folder.
PICTURES = {"speed": "speed of each op against torch", "roofline": "roofline"}


def filled(text: str, machines: Sequence[Machine]) -> str:
    """The text with all of its tables made anew."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"README asks for results:{match[2]}; there are {', '.join(BLOCKS)}")
        return f"{match[1]}\n{BLOCKS[match[2]](machines)}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def _speed(machines: Sequence[Machine]) -> str:
    parts = []
    for gpu in machines:
        if gpu.is_gpu and gpu.timed:
            shown = [
                f"![{about}](bench/results/{gpu.folder.name}/{name}.svg)"
                for name, about in PICTURES.items()
                if (gpu.folder / f"{name}.svg").is_file()
            ]
            parts += [f"{_name(gpu)}:", _markdown(summary.speed(gpu)), "\n".join(shown)]
    return _joined(parts)


def _models(machines: Sequence[Machine]) -> str:
    parts = []
    for gpu in machines:
        if gpu.is_gpu and gpu.models:
            parts += [f"{_name(gpu)}:", _markdown(summary.models(gpu))]
    return _joined(parts)


def _accuracy(machines: Sequence[Machine]) -> str:
    """Our errors over torch's."""
    parts = []
    for machine in machines:
        if machine.checked:
            where = "In Triton's interpreter" if machine.interpreted else f"On {_name(machine)}"
            parts += [f"{where}:", _markdown(summary.accuracy(machine))]
    return _joined(parts)


BLOCKS: dict[str, Callable[[Sequence[Machine]], str]] = {
    "speed": _speed,
    "models": _models,
    "accuracy": _accuracy,
}


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(filter(None, parts)) or "Not measured."


def _name(machine: Machine) -> str:
    """With what it was measured, of the run that measured last."""
    *_, run = machine.runs.values()
    versions = run["versions"]
    told = [f"{name} {versions[name]}" for name in ("driver", "torch", "triton")
            if versions.get(name)]  # fmt: skip
    told += [f"commit {str(run['commit'])[:10]}"] if run.get("commit") else []
    return _plain(f"{machine.name} ({', '.join(told)})")


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(map(_plain, cells))} |" for cells in lines)


def _plain(text: str) -> str:
    """Text that a table in Markdown shows as it is."""
    return re.sub(r"[|<>\[\]`*]", lambda match: f"&#{ord(match[0])};", text).replace("\n", " ")
