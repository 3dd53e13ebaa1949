"""The command line: fastdl demo | check | targets | plan | bench | tune | report | env."""

import argparse
import difflib
import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._factory import EXAMPLE, UsageError, UserCodeError
from ._table import Progress, paragraph, show

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. {self.prog} --help shows how it is used.")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        code = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"fastdl: {error}", file=sys.stderr)
        return USAGE
    except UserCodeError as error:
        print(f"fastdl: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nfastdl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough; what Python flushes at its end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return int(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="fastdl",
        description="Fused kernels for the PyTorch model you already have, with proof.",
        epilog="fastdl COMMAND --help shows the options of a command. Begin with: fastdl demo",
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for add in _COMMANDS.values():
        add(commands)
    if argv and not argv[0].startswith("-"):
        _known("command", argv[:1], _COMMANDS)
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        raise UsageError(f"there are the commands {', '.join(_COMMANDS)}; type: fastdl demo")
    if rest and args.run is not _bench:
        command = f"fastdl {argv[0]}"
        raise UsageError(f"{command} does not take {' '.join(rest)}. Type: {command} --help")
    args.rest = rest
    return args


def _known(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse a name that does not exist, with the one that was probably meant."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, cutoff=0.5)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"there is no {kind} {name}. {meant}There are {', '.join(allowed)}.")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, example: str
) -> argparse.ArgumentParser:
    sentence = about[0].upper() + about[1:] + "."
    parser = commands.add_parser(
        name, help=about, description=sentence, epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")


def _note(text: str) -> None:
    print(f"fastdl: {text}", file=sys.stderr)


def _choose_interpreter(device: str | None = None) -> None:
    """Without a GPU kernels run in Triton's interpreter: chosen here, before the first launch."""
    from .ops import _launch

    if not _launch.HAVE_TRITON or device == "cuda":
        return
    if device == "cpu" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        _launch.INTERPRETED = True
    if _launch.INTERPRETED:
        # kernels compute lanes that are masked out, and numpy warns about them
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\..*interpreter")


def _add_demo(commands: Any) -> None:
    about = "optimize a small model, prove it, train it and restore it"
    parser = _command(commands, "demo", _demo, about, "fastdl demo --picture /tmp/demo.png")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), metavar="FILE",
        help="where the curves are drawn; default: demo.png")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of training")


def _demo(args: argparse.Namespace) -> int:
    if args.steps is not None and args.steps < 1:
        raise UsageError("--steps is at least 1. Type: fastdl demo --steps 10")
    if not args.picture.absolute().parent.is_dir():
        raise UsageError(f"there is no folder for --picture {args.picture}; type: fastdl demo")
    _choose_interpreter()
    from ._demo import run

    return run(args.picture, args.steps)


def _add_check(commands: Any) -> None:
    about = "hold ops against their contract, and show their errors against float64"
    parser = _command(commands, "check", _check, about, "fastdl check linear layer_norm")
    parser.add_argument("op", nargs="*", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--thorough", action="store_true", help="every check; takes long")
    _json_option(parser)


def _check(args: argparse.Namespace) -> int:
    _choose_interpreter(args.device)
    from .contract import SPECS
    from .contract.report import check
    from .ops import _launch

    _known("op", args.op, SPECS)
    if not _launch.HAVE_TRITON:
        _note("there is nothing to check: Triton is not installed. Type: pip install triton")
        return FAILED
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU. Type: fastdl check --device cpu")
    if _launch.INTERPRETED:
        _note("kernels run in Triton's interpreter; no time is measured")
    with Progress("check") as progress:
        report = check(args.op or None, args.device, thorough=args.thorough, progress=progress)
    if args.json:
        print(report.to_json())
    else:
        head, *rows = report.table()
        show(head, rows)
        paragraph("\n".join(str(report).splitlines()[1 + len(rows) :]))
    return 0 if report.ok else FAILED


def _add_targets(commands: Any) -> None:
    about = "compile kernels for GPUs that are not here, and judge their machine code"
    parser = _command(commands, "targets", _targets, about, "fastdl targets linear --target sm_90")
    parser.add_argument("op", nargs="*", help="default: all")
    parser.add_argument("--target", action="append", help="sm_90, for instance; default: all")
    parser.add_argument("--all", action="store_true", help="every binary, not only some of each op")
    _json_option(parser)


def _targets(args: argparse.Namespace) -> int:
    from . import targets
    from .contract import SPECS, STEPS
    from .ops import _launch
    from .targets.table import HEADER

    _known("op", args.op, [*SPECS, *STEPS])
    _known("target", args.target or (), targets.DEFAULT_TARGETS)
    if not _launch.HAVE_TRITON:
        _note("there is nothing to compile with: Triton is not installed")
        return FAILED
    options: dict[str, Any] = {"limit": None} if args.all else {}
    with Progress("targets") as progress:
        result = targets._targets(
            args.op or None, args.target or targets.DEFAULT_TARGETS, progress=progress, **options
        )
    if args.json:
        print(result.to_json())
    else:
        for target, rows in itertools.groupby(result.rows, lambda row: row.target):
            # the first column names the target, as the title does
            show(HEADER[1:], [row.cells()[1:] for row in rows], target)
        print(f"{len(result.rows)} binaries, {len(result.failures)} failures")
    return 0 if result.ok else FAILED


def _add_plan(commands: Any) -> None:
    about = "say what fastdl.optimize would replace in a model, and why not the rest"
    parser = _command(commands, "plan", _plan, about, EXAMPLE)
    parser.add_argument("factory", metavar="package.module:make_model",
        help="a function without arguments, a class or a model; the function may also return the "
        "model with its example inputs, and then each site is tried on them")  # fmt: skip
    parser.add_argument("--meta", action="store_true",
        help="make the model on the meta device: large ones take no memory")  # fmt: skip
    parser.add_argument("--engine", choices=("modules", "graph"), default="modules",
        help="graph: what torch.compile(model, backend='fastdl') would replace, with lines of "
        "source; default: modules")  # fmt: skip
    parser.add_argument("--dump", action="store_true",
        help="of --engine graph: also print the graphs before and after")  # fmt: skip
    parser.add_argument("--optimize", action="store_true",
        help="also do it, verify outputs and gradients, and show the report")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    _json_option(parser)


def _plan(args: argparse.Namespace) -> int:
    from ._plan import run

    return 0 if run(args) else FAILED


def _checkout() -> Path | None:
    """The sources of fastdl: here, or where the package itself is."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (root / "bench" / "gpu.py").is_file() and (root / "fastdl" / "cli.py").is_file():
            return root
    return None


def _add_bench(commands: Any) -> None:
    about = "time the ops with pytest-benchmark; needs a checkout of fastdl"
    parser = _command(commands, "bench", _bench, about, "fastdl bench -k layer_norm")
    parser.usage = "fastdl bench [-h] [--compare OLD.json] [any option of pytest]"


def _bench(args: argparse.Namespace) -> int:
    needed = "pytest", "pytest_benchmark"
    return _in_checkout("the benchmark", needed, "pytest", ["bench", *args.rest])


def _in_checkout(what: str, needed: Iterable[str], module: str, options: Sequence[str]) -> int:
    """Run a module of the checkout, which is no part of the installed package."""
    root = _checkout()
    if root is None:
        _note(f"{what} is not in the installed package: clone fastdl, and call this there")
        return FAILED
    for name in needed:
        if importlib.util.find_spec(name) is None:
            _note(f"{name} is not installed. Type: pip install 'fastdl-kernels[bench]'")
            return FAILED
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=root).returncode


def _add_tune(commands: Any) -> None:
    about = "measure launch configurations on this GPU, and keep the fastest"
    example = "fastdl tune mypackage.models:make_model --budget 60"
    parser = _command(commands, "tune", _tune, about, example)
    parser.add_argument("op", nargs="*",
        help="names of ops, default: all that have configurations; or package.module:make_model, a "
        "function that returns a model with its example inputs: what it calls is tuned, forward "
        "and backward")  # fmt: skip
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="default: 60")
    parser.add_argument("--again", action="store_true", help="also what your table has already")
    parser.add_argument("--list", action="store_true",
        help="say what would be tuned, the most expensive first; needs no GPU")  # fmt: skip
    _json_option(parser)


def _tune(args: argparse.Namespace) -> int:
    from ._tune import names_a_model, run
    from .tuned.problems import DEFAULTS

    if not names_a_model(args.op):
        _known("op", args.op, DEFAULTS)
    if args.budget <= 0:
        raise UsageError("--budget is in seconds, more than 0. Type: fastdl tune --budget 60")
    return 0 if run(args) else FAILED


def _add_report(commands: Any) -> None:
    about = "write a page of what was measured, and show it in short; needs a checkout of fastdl"
    parser = _command(commands, "report", _report, about, "fastdl report --out /tmp/report.html")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the results")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--cases", action="store_true", help="show a line a case, not a line an op")
    parser.add_argument("--static", action="store_true",
        help="first make the results that need no GPU, if they are not of this code")  # fmt: skip
    parser.add_argument("--routes", action="store_true",
        help="instead, who computes convolutions and recurrence, by what measurement")  # fmt: skip
    parser.add_argument("--gpu", metavar="NAME", help="of --routes; default: the one here")
    _json_option(parser)


def _routes(args: argparse.Namespace) -> int:
    from .ops import _launch

    if not _launch.HAVE_TRITON:
        _note("all of them are torch's: Triton is not installed")
        return FAILED
    from .targets.routes import HEADER, routes

    found = routes(args.gpu)
    if args.json:
        print(found.to_json())
    else:
        show(HEADER, found.rows, found.gpu)
    return 0


def _report(args: argparse.Namespace) -> int:
    options = [name for name in ("--cases", "--static") if getattr(args, name[2:])]
    for name, path in (("--out", args.out), ("--results", args.results)):
        options += [name, str(path.absolute())] if path else []
    if args.routes:
        if options:
            raise UsageError(f"--routes is no page and takes no {options[0]}")
        return _routes(args)
    if args.gpu or args.json:
        raise UsageError("--gpu and --json are options of --routes. Type: fastdl report --routes")
    return _in_checkout("the report", ["matplotlib"], "bench.report", options)


def _add_env(commands: Any) -> None:
    about = "say what fastdl runs on, and what is known to be wrong with it"
    _json_option(_command(commands, "env", _env, about, "fastdl env --json"))


def _env(args: argparse.Namespace) -> int:
    from ._env import env

    found = env()
    print(found.to_json() if args.json else found)
    return 0


_COMMANDS: dict[str, Callable[[Any], None]] = {
    "demo": _add_demo,
    "check": _add_check,
    "targets": _add_targets,
    "plan": _add_plan,
    "bench": _add_bench,
    "tune": _add_tune,
    "report": _add_report,
    "env": _add_env,
}
