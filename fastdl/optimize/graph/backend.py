"""The backend: what `torch.compile(model, backend="fastdl")` does to each of Dynamo's graphs."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ...nn.rnn import let_dynamo_enter
from ..report import Site
from .options import Options, parse
from .rewrite import Choice, rewrite

_last: tuple[Site, ...] = ()

# else a model with an LSTM has no graph at all
let_dynamo_enter()


def backend(
    gm: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile.

    Of its options, `then` is who gets the rewritten graph ("eager", "aot_eager", "inductor", any
    other backend; without it, the graph runs as it is), `ops` are the names of the only ops that
    may be put in.
    """
    global _last
    chosen = parse(options)
    gm.meta["fastdl_sites"] = _last = tuple(rewrite(gm, Choice(ops=chosen.ops)))
    return _hand_on(gm, example_inputs, chosen)


def _hand_on(gm: GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    if options.then in (None, "eager"):
        return gm.forward
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.then)(gm, example_inputs)


def sites(gm: GraphModule) -> list[Site]:
    """What the backend did to this graph."""
    return list(gm.meta.get("fastdl_sites", ()))


def last_report() -> list[Site]:
    """What was done to the graph compiled last."""
    return list(_last)
