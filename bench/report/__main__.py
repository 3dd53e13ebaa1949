"""`fastdl report`: a page of what was measured, README's tables and pictures, a short table."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import marks, pictures, read, readme, static, summary
from bench.report.page import page
from bench.report.results import Machine, by
from bench.store import RESULTS, ROOT
from fastdl.cli import show

FAILED = 1


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.results != RESULTS and not options.results.is_dir():
        print(f"fastdl: there is no folder {options.results}", file=sys.stderr)
        return FAILED
    right = not options.static or static.make(options.results)
    machines = read.machines(options.results)
    out = options.out or options.results / "report.html"
    try:
        make(machines, options.results, out)
    except OSError as error:
        print(f"fastdl: the page cannot be written: {error}", file=sys.stderr)
        return FAILED
    tell(machines, options.cases)
    print(f"the page is {out}")
    return 0 if right else FAILED


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: bench/results")
    parser.add_argument("--out", type=Path, help="default: report.html beside the results")
    parser.add_argument("--cases", action="store_true", help="a line a case, not a line an op")
    parser.add_argument("--static", action="store_true", help="first make what needs no GPU")
    return parser.parse_args(argv)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make(machines: Sequence[Machine], results: Path, out: Path) -> None:
    """The page and README's pictures; of the checkout's own results also README's tables."""
    draw(machines)
    if results == RESULTS:
        path = ROOT / "README.md"
        write(path, readme.filled(path.read_text(encoding="utf-8"), machines))
    write(out, page(machines, marks.of, results))


def draw(machines: Sequence[Machine]) -> None:
    """README's pictures, in each GPU's folder."""
    for gpu in machines:
        if gpu.is_gpu:
            found = (pictures.speed(gpu, "speed", False), pictures.roofline(gpu, "roofline"))
            for name, picture in zip(readme.PICTURES, found, strict=True):
                if picture is not None:
                    write(gpu.folder / f"{name}.svg", picture.file())


def tell(machines: Sequence[Machine], cases: bool) -> None:
    """On the terminal: what was measured, what failed, what is left out."""
    if not any(machine.is_gpu for machine in machines):
        print("Nothing is measured on a GPU yet. On a machine with one, type: make gpu")
    for machine in machines:
        tables = {
            "models": summary.models(machine),
            "errors against float64, ours over torch's": summary.accuracy(machine),
        }
        if cases:
            by_op = by(machine.timed, lambda one: one.op)
            tables = {op: summary.cases(same) for op, same in by_op.items()} | tables
        elif machine.timed:
            tables = {"ops": summary.speed(machine)} | tables
        for title, table in tables.items():
            if table.rows:
                show(table.head, table.rows, f"{machine.name}, {title}")
        for one in machine.failed:
            print(f"{one.stage} {one.name}: FAILED: {one.says}")
        for note in machine.notes:
            print(f"fastdl: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
