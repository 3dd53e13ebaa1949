"""The backend: what `torch.compile(model, backend="fastdl")` does to each of Dynamo's graphs."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from ...nn.rnn import let_dynamo_enter
from ..compiled import Graph
from ..replay import raised
from ..report import Site
from . import record
from .caches import inductor
from .judge import UNSTABLE, Verdict, prove
from .options import Options, parse
from .rewrite import Choice, checkpoints, parts, rewrite

_last: tuple[Site, ...] = ()

# else a model with an LSTM has no graph at all
let_dynamo_enter()


def backend(
    gm: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile.

    Of its options, `then` is who gets the rewritten graph ("eager", "aot_eager", "inductor", any
    other backend; without it, the graph runs as it is), `ops` are the names of the only ops that
    may be put in. With `verify=True` each site and then the whole graph is proved on what it is
    first called with: what fails stays as it was.
    """
    global _last
    chosen = parse(options)
    root, where = record.place()
    choice, verdict, failure = Choice(ops=chosen.ops, where=where), None, None
    begun = time.perf_counter()
    if chosen.verify:
        choice, verdict, failure = _proven(gm, example_inputs, choice)
    proven = time.perf_counter()
    _last = tuple(rewrite(gm, choice))
    done = time.perf_counter()
    gm.meta["fastdl_sites"] = _last
    faults = verdict.faults if verdict else frozenset()
    proof = verdict.proof if verdict else None
    graph = Graph(done - proven, proven - begun, None, proof, record.ended_by(gm), failure)
    back = frozenset(site for site in _last if site.reason in faults)
    record.keep(root, record.Record(_last, back, graph, record.compile_id(gm)))
    return _hand_on(gm, example_inputs, chosen)


def _proven(
    gm: GraphModule, example_inputs: Sequence[Any], choice: Choice
) -> tuple[Choice, Verdict | None, str | None]:
    """What of the choice holds, and why nothing does."""
    verdict, failure = None, None
    try:
        verdict = prove(gm, example_inputs, choice)
        if verdict.proof is not None and not verdict.proof:
            failure = UNSTABLE
    except Exception as error:  # without a proof there is no replacement, whatever forbids it
        failure = f"its proof failed: {raised(error)}"
    if failure is not None:
        name = choice.where.path or "the model"
        warnings.warn(f"fastdl: a graph of {name} runs as it was: {failure}", stacklevel=3)
    known = {} if verdict is None else verdict.known
    return replace(choice, known=known, only_known=True), verdict, failure


def _hand_on(gm: GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    if options.then in (None, "eager"):
        return _runnable(gm)
    if options.then == "inductor":
        return inductor(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.then)(gm, example_inputs)


def _runnable(gm: GraphModule) -> Callable[..., Any]:
    """The graph, to be run as it is."""
    for part, _ in list(parts(gm)):
        for node in checkpoints(part):
            node.target = _checkpointed
        part.recompile()
    return gm.forward


def _checkpointed(body: GraphModule, *args: Any, **options: Any) -> Any:
    """What stands for a checkpoint in Dynamo's graphs is made to be traced. Run as it is, it draws
    other random numbers when it computes again: the gradients of another dropout.
    """
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *args, **{**options, "use_reentrant": False})


def sites(gm: GraphModule) -> list[Site]:
    """What the backend did to this graph."""
    return list(gm.meta.get("fastdl_sites", ()))


def last_report() -> list[Site]:
    """What was done to the graph compiled last."""
    return list(_last)
