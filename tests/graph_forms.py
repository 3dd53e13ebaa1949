"""Functions compiled with our backend, and what the graph engine made of them."""

from collections import Counter

import torch

import fastdl
from fastdl.optimize import graph


class Compiled:
    """A function compiled with the backend, and the graphs that it made."""

    def __init__(self, function, then="eager", **options):
        self.graphs = graphs = []

        # a method would be copied with what is compiled
        def keep(gm, inputs):
            graphs.append(gm)
            return torch._dynamo.lookup_backend(then)(gm, inputs)

        torch._dynamo.reset()
        self.function = torch.compile(
            function, backend=fastdl.backend, options={"then": keep}, **options
        )

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    @property
    def calls(self):
        """The names of what the last graph calls."""
        nodes = self.graphs[-1].graph.nodes
        called = [n for n in nodes if n.op not in ("placeholder", "output")]
        return [n.target if isinstance(n.target, str) else n.target.__name__ for n in called]

    @property
    def fused(self):
        """The calls of fastdl's ops."""
        nodes = self.graphs[-1].graph.nodes
        return [n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl.")]

    @property
    def replaced(self):
        """How often each op was put into any of the graphs; those joined in one are counted too."""
        sites = [site for gm in self.graphs for site in graph.sites(gm) if site.reason is None]
        joined = sum(len(site.pattern.split("|")) for site in sites if site.op == "linears")
        return Counter(site.op for site in sites) + Counter({"linear": joined})

    @property
    def reasons(self):
        return [site.reason for site in graph.last_report() if site.reason is not None]


def tensors(*shapes, grad=True, dtype=torch.float32, device="cpu"):
    made = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return [tensor.requires_grad_(grad) for tensor in made]


def check_same(function, *args, atol=1e-5):
    """Outputs, gradients and what is left in the inputs, compiled and not. Returns the compiled."""
    ours = Compiled(function)
    results = []
    for run in (ours, function):
        given = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        # inputs that a function writes to cannot be leaves that require a gradient
        out = run(*(a.view_as(a) if a.requires_grad else a for a in given))
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum(o.float().sin().sum() for o in outs)
        if loss.requires_grad:
            loss.backward()
        results.append([*outs, *given, *(a.grad for a in given)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-4)
    return ours


def only_fused(compiled):
    return [n.target.__name__ for n in compiled.fused]


def only_call(compiled):
    """The one call that a graph consists of, besides taking a tuple apart."""
    assert [c for c in compiled.calls if c != "getitem"] == [compiled.fused[0].target.__name__]
    return compiled.fused[0]
