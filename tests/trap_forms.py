"""Traps for the graph engine: each runs compiled with the backend and as it was written."""

import pytest
import torch
from torch import nn

import fastdl
from graph_forms import Compiled


class Traps(dict):
    """The traps of a file, by name. Each takes a compiler and returns the tensors to compare.

    `fuses=False`: nothing may be replaced. `aot=False`: AOT autograd cannot do it.
    """

    def __call__(self, function=None, **options):
        if function is None:
            return lambda f: self(f, **options)
        self[function.__name__] = function, options
        return function

    def cases(self):
        for name, (_, options) in self.items():
            yield pytest.param(name, "eager", id=name)
            if options.get("aot", True):
                yield pytest.param(name, "aot_eager", id=f"{name}-aot", marks=pytest.mark.slow)

    def check(self, name, then):
        function, options = self[name]
        made = []

        def ours(f, **more):
            made.append(Compiled(f, then, **more))
            return made[-1].function

        results = []
        with fastdl.policy("fused"):
            for compiler in (ours, lambda f, **more: f):
                torch.manual_seed(0)
                results.append(function(compiler))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
            assert got.requires_grad == wanted.requires_grad
        found = sum(sum(compiled.replaced.values()) for compiled in made)
        assert bool(found) == options.get("fuses", True), found


def gradients(out, *of):
    """The gradients of the sum of sines, for parameters of modules and for tensors."""
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum(o.sin().sum() for o in outs if o.requires_grad)
    leaves = [p for x in of for p in (x.parameters() if isinstance(x, nn.Module) else [x])]
    return [*outs, *torch.autograd.grad(loss, leaves)]


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
