"""Checks of an op among torch's features: compilers, export, transforms, autocast, checkpointing."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._op import LIBRARY_OPS, NAMESPACE
from ..ops._route import policy
from .case import Case, Layout, Maker, Spec
from .evaluate import LibraryCalls, Run, cotangents, floats, run
from .registry import check, named, same

LAYOUTS: tuple[Layout, ...] = ("dense", "transposed")


@check("cases", slow="but core")
def transforms(spec: Spec, case: Case, device: str) -> None:
    """vmap, func.grad and jvp give what they give for the definition."""
    if "dropout" in case.name or "module" in case.name:
        return  # random numbers under vmap are torch's choice, and so are modules that torch applies
    maker = Maker(dtype=torch.float64, device=device, grad=False)
    case.make(maker)
    leaves = [x.float() for x in maker.leaves]
    function = _function(case, device)
    tangents = [torch.ones_like(x) for x in leaves]
    batch = [torch.stack([x, x + 1, -x]) for x in leaves]
    ways: list[Callable[[], Any]] = [
        lambda: torch.vmap(function)(*batch),
        lambda: torch.func.grad(
            lambda *xs: sum(y.sin().sum() for y in function(*xs)), argnums=tuple(range(len(leaves)))
        )(*leaves),
        lambda: torch.func.jvp(function, tuple(leaves), tuple(tangents)),
    ]
    for way in ways:
        with policy("auto"):
            got = floats(way())
        with policy("definition"):
            expected = floats(way())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


class _Replay:
    """Stands for a maker and hands out given tensors, so that a case becomes a function of its leaves."""

    def __init__(self, tensors: tuple[Tensor, ...], device: str) -> None:
        self.given, self.device, self.dtype = list(tensors), device, torch.float32

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return self.given.pop(0)


def _function(case: Case, device: str) -> Callable[..., tuple[Tensor, ...]]:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(floats(case.make(cast(Any, _Replay(tensors, device)))()))

    return function


def _graph_ops(graphs: list[Any]) -> set[str]:
    return {
        str(node.target).split(".")[1]
        for graph in graphs
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if str(node.target).startswith(f"{NAMESPACE}.")
    }


@check("core")
def compiled(spec: Spec, case: Case, device: str) -> None:
    """In one graph with dynamic shapes the forward and the backward op stand, and the values are eager's."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = run(case, Maker(device=device), "fused")
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    got = _run_compiled(
        case, device, functools.partial(torch.compile, backend=backend, dynamic=True)
    )
    _close(got, eager, case)
    missing = set(spec.library_ops) - _graph_ops(graphs)
    assert not missing, f"not in the compiled graphs: {', '.join(missing)}"


@check("core", slow=True)
def inductor(spec: Spec, case: Case, device: str) -> None:
    """Inductor runs it in one graph, and calls the forward and the backward op."""
    from torch._inductor.utils import run_and_get_code

    eager = run(case, Maker(device=device), "fused")
    got, code = run_and_get_code(_run_compiled, case, device, torch.compile)
    _close(got, eager, case)
    for op in spec.library_ops:
        assert f"{NAMESPACE}.{op}.default" in "".join(code), f"{op} is not in what inductor runs"


def _run_compiled(case: Case, device: str, compile: Callable[..., Any]) -> Run:
    torch._dynamo.reset()
    maker = Maker(device=device)
    call = case.make(maker)
    with policy("fused", on_fallback="error"):
        torch.manual_seed(7)
        outputs = floats(compile(_closed(call), fullgraph=True)())
        gradients = torch.autograd.grad(outputs, maker.leaves, cotangents(maker, outputs))
    return Run(outputs, list(gradients), maker)


def _closed(call: "functools.partial[Any]") -> Callable[[], Any]:
    function, args, keywords = call.func, call.args, call.keywords
    return lambda: function(*args, **keywords)


def _close(got: Run, expected: Run, case: Case) -> None:
    if "dropout" in case.name:
        # inductor draws its own random numbers: the mask differs, its kind does not
        for a, b in zip(got.outputs, expected.outputs, strict=True):
            assert a.shape == b.shape and a.isfinite().all()
        return
    for a, b in zip(
        got.outputs + got.gradients, expected.outputs + expected.gradients, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@check("core")
def exported(spec: Spec, case: Case, device: str) -> None:
    """torch.export keeps the op, in both of its modes, with the first dimension dynamic."""
    maker = Maker(device=device, grad=False)
    case.make(maker)
    expected = run(case, Maker(device=device), "fused", backward=False)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    rows = maker.leaves[0].shape[0]
    shapes = tuple(dynamic if x.dim() and x.shape[0] == rows else None for x in maker.leaves)
    for strict in (False, True):
        module = _Module(_function(case, device))
        with policy("fused", on_fallback="error"):
            program = torch.export.export(
                module, tuple(maker.leaves), dynamic_shapes=(shapes,), strict=strict
            )
            torch.manual_seed(7)
            got = floats(program.module()(*maker.leaves))
        found = _graph_ops([program.graph_module])
        assert spec.library_ops[0] in found, f"not in the graph exported with strict={strict}"
        for a, b in zip(got, expected.outputs, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@check("core")
def opcheck(spec: Spec, case: Case, device: str) -> None:
    """torch's own check of schema, fake kernels and dispatch, on the calls that the case leads to."""
    with LibraryCalls() as seen:
        for layout in LAYOUTS:
            run(case, Maker(device=device, layout=layout), "fused")
    assert {call.name for call in seen.calls} >= set(spec.library_ops)
    for call in seen.calls:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in call.args)
        torch.library.opcheck(call.overload, args)


@check("core")
def torch_form(spec: Spec, case: Case, device: str) -> None:
    """Where kernels may not run, library ops give the same outputs, those kept for backward too."""
    with LibraryCalls() as seen:
        run(case, Maker(device=device), "fused")
    for call in seen.calls:
        with torch.no_grad():
            instead = LIBRARY_OPS[call.name].torch_form(*call.args)
        for a, b in zip(floats(instead), floats(call.result), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=named(call.name))


@check("core")
def autocast(spec: Spec, case: Case, device: str) -> None:
    """Under autocast, nested off too, dtypes are those of torch, and gradients have their parameters'."""
    for enabled, dtype in itertools.product((True, False), (torch.bfloat16, torch.float16)):
        with torch.autocast(device, dtype=dtype), torch.autocast(device, enabled=enabled):
            ours = run(case, Maker(device=device), "fused")
            torchs = run(case, Maker(device=device), "definition")
        assert [y.dtype for y in ours.outputs] == [y.dtype for y in torchs.outputs]
        for grad, leaf in zip(ours.gradients, ours.maker.leaves, strict=True):
            assert grad.dtype == leaf.dtype
        for a, b in zip(ours.outputs, torchs.outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@check("core")
def inference_mode(spec: Spec, case: Case, device: str) -> None:
    """Runs under inference mode, and on inference tensors outside of it, with the values of no_grad."""
    expected = [y.detach() for y in run(case, Maker(device=device), "fused", False).outputs]
    with torch.inference_mode():
        same(run(case, Maker(device=device, grad=False), "fused").outputs, expected, "inside")


@check("core")
def recomputed(spec: Spec, case: Case, device: str) -> None:
    """Checkpointing, saved-tensor hooks and a second backward pass give the same gradients."""
    full = run(case, Maker(device=device), "fused")

    def way(wrap: Callable[..., Any]) -> list[Tensor]:
        maker = Maker(device=device)
        call = case.make(maker)
        with policy("fused", on_fallback="error"):
            torch.manual_seed(7)
            outputs = floats(wrap(call))
            backs = cotangents(maker, outputs)
            torch.autograd.grad(outputs, maker.leaves, backs, retain_graph=True)
            return list(torch.autograd.grad(outputs, maker.leaves, backs))

    def offloaded(call: Callable[[], Any]) -> Any:
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = call()
        assert packed, "tensors for backward are kept where hooks do not see them"
        return result

    same(way(lambda call: call()), full.gradients, "retained")
    same(way(lambda call: checkpoint(call, use_reentrant=False)), full.gradients, "checkpoint")
    same(way(offloaded), full.gradients, "saved-tensor hooks")
