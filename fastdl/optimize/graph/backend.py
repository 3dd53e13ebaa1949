"""The backend: what `torch.compile(model, backend="fastdl")` does to each of Dynamo's graphs."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ..report import Site
from .rewrite import rewrite

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
    if then is None:
        return gm.forward
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(then)(gm, example_inputs)


def sites(gm: GraphModule) -> list[Site]:
    """What the backend did to this graph."""
    return list(gm.meta.get("fastdl_sites", ()))


def last_report() -> list[Site]:
    """What was done to the graph compiled last."""
    return list(_last)
