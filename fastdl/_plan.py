"""`fastdl plan`: what would be replaced in a user's model, or with --optimize what was."""

import sys
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from ._factory import UsageError, blamed, load
from ._table import paragraph, show
from .ops import _launch
from .optimize.plan import VerificationError, optimize, plan, report
from .optimize.report import Plan, Story, alike, columns


def run(args: Namespace) -> bool:
    """Show the plan or the report of the model that the arguments name. False: it fails."""
    if args.html and not args.html.absolute().parent.is_dir():
        raise UsageError(f"there is no folder for --html {args.html}")
    _insist_on_sense(args)
    model, inputs = load(args.factory, meta=args.meta)
    if args.engine == "graph" and inputs is None:
        raise UsageError(
            "a model's graphs are told by a call: return the model and its example inputs as a "
            f"tuple from {args.factory}, or leave out --engine graph"
        )
    if args.meta:
        inputs = None  # they are on the meta device too, and no kernel runs there
    _say_what_is_not_tried(inputs, args.optimize)
    with blamed(f"{args.factory}, on its example inputs,"):
        try:
            story = _optimized(model, inputs) if args.optimize else _planned(args, model, inputs)
        except VerificationError as error:
            _note(str(error))
            return False
    if args.json:
        print(story.to_json())
    else:
        if args.dump and isinstance(story, Plan):
            print(story.dump)
        _show(story)
    if args.html:
        args.html.write_text(story.to_html(), encoding="utf-8")
        _note(f"the page is {args.html}")
    return True


def _insist_on_sense(args: Namespace) -> None:
    """Refuse options that say nothing together."""
    if args.meta and args.optimize:
        raise UsageError("--meta makes a model without weights: leave out --optimize")
    if args.engine == "graph" and (args.meta or args.optimize):
        odd = "--meta" if args.meta else "--optimize"
        raise UsageError(f"--engine graph plans on a model that runs: leave out {odd}")
    if args.dump and args.engine != "graph":
        raise UsageError("--dump prints graphs. Type: fastdl plan ... --engine graph --dump")
    if args.dump and args.json:
        raise UsageError("--dump is for people: leave out --json")


def _planned(args: Namespace, model: nn.Module, inputs: Any) -> Plan:
    return plan(model, inputs, engine=args.engine)


def _note(text: str) -> None:
    print(f"fastdl: {text}", file=sys.stderr)


def _say_what_is_not_tried(inputs: Any, verified: bool) -> None:
    if inputs is None and verified:
        _note("nothing is verified: return the model and its example inputs as a tuple")
    elif inputs is not None and not (torch.cuda.is_available() or _launch.INTERPRETED):
        _note("no GPU: torch computes the ops. Slow, but fastdl's: TRITON_INTERPRET=1 fastdl plan")


def _optimized(model: nn.Module, inputs: Any) -> Story:
    return report(optimize(model, inputs), inputs)


def _show(story: Story) -> None:
    """Tables of sites, with those of repeated layers in one row, and the proof."""
    for title, sites in story.groups.items():
        rows = [
            site._replace(name=f"{site.name} ({len(same)})") if len(same) > 1 else site
            for site, same in alike(sites).items()
        ]
        head, cells = columns(rows)
        if rows:
            show((title, *head[1:]), cells)
    parts = (story.proof, story.speed, story.compiled)
    said = [str(part) for part in parts if part is not None]
    if said:
        paragraph("\n".join(said))
    print(", ".join(f"{len(sites)} {title}" for title, sites in story.groups.items()))
