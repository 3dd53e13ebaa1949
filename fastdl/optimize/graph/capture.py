"""The plan of a model's graphs: a copy of it is compiled, and nothing is put in."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .._judge import copied, fresh, no_trace
from ..report import Plan, Site
from ..tree import tree_of
from ..verify import arguments
from .judge import prove
from .record import place
from .rewrite import Choice, rewrite
from .show import show
from .twin import twin


def plan_graphs(model: nn.Module, example_inputs: Any) -> Plan:
    """What the backend would replace in all graphs that these inputs lead to, each site tried."""
    model = getattr(model, "_orig_mod", model)
    sites: list[Site] = []
    texts: list[str] = []

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        choice = Choice(where=place()[1])
        known = prove(gm, inputs, choice, whole=False).known
        rewritten = twin(gm)
        sites.extend(rewrite(rewritten, replace(choice, known=known, only_known=True)))
        texts.append(show(gm, rewritten))
        return gm.forward

    with no_trace(model), _apart():
        compiled = torch.compile(copied(model), backend=look)
        args, kwargs = fresh(arguments(example_inputs))
        compiled(*args, **kwargs)
    return Plan(sites, tree_of(model), "\n\n".join(texts))


@contextmanager
def _apart() -> Iterator[None]:
    """Compilation that does not count against the user's, and learns no shape from it or for it."""
    from torch._dynamo import config
    from torch._dynamo.pgo import get_code_state

    seen, many = get_code_state(), 2**30  # the sizes of each function's arguments
    before = copy.deepcopy(seen)
    try:
        with config.patch(
            recompile_limit=many,
            accumulated_recompile_limit=many,
            automatic_dynamic_shapes=False,
            suppress_errors=False,
        ):
            yield
    finally:
        seen.clear()
        seen.update(before)
