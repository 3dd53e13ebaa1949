"""The backend: what `torch.compile(model, backend="fastdl")` does to each of Dynamo's graphs."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from ..report import Site
from .caches import inductor
from .rewrite import checkpoints, parts, rewrite

_last: tuple[Site, ...] = ()


def backend(
    gm: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile. `options={"then": "inductor"}` hands the rewritten graph on."""
    global _last
    options = dict(options or {})
    then = options.pop("then", None)
    if options:
        raise ValueError(f"fastdl backend: unknown options {sorted(options)}, allowed is 'then'")
    gm.meta["fastdl_sites"] = _last = tuple(rewrite(gm))
    if then in (None, "eager"):
        return _runnable(gm)
    if then == "inductor":
        return inductor(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(then)(gm, example_inputs)


def _runnable(gm: GraphModule) -> Callable[..., Any]:
    """The graph, to be run as it is."""
    for part in parts(gm):
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
