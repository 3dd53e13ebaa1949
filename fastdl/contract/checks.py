"""The checks that every op passes. Each takes a spec, a case and a device, and raises where the op is wrong."""

import contextlib
import functools
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._op import LIBRARY_OPS
from ..ops._route import policy
from .case import GUARD, Case, Layout, Maker, Spec
from .evaluate import FORWARD, GRADIENT, Run, accuracy, compare, cotangents, floats, run

Scope = Literal["cases", "exact", "core", "empty", "op"]


class Check(NamedTuple):
    """A check and the cases it runs on; "op" checks run once, on the spec."""

    name: str
    function: Callable[..., None]
    scope: Scope
    by_dtype: bool
    slow: bool


CHECKS: dict[str, Check] = {}


def check(scope: Scope, *, by_dtype: bool = False, slow: bool = False) -> Any:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        CHECKS[name] = Check(name, function, scope, by_dtype, slow)
        return function

    return register


def cases_of(spec: Spec, scope: Scope) -> list[Case]:
    """The cases of a spec on which checks of this scope run."""
    return {
        "cases": list(spec.cases),
        "exact": [case for case in spec.cases if case.exact],
        "core": spec.core,
        "empty": list(spec.empty),
        "op": [],
    }[scope]


def same(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Bit equality."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )


@check("cases", by_dtype=True)
def accurate(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients are as close to fp64 as the definition's are, within the rule."""
    for what, error in zip(("output", "gradient"), accuracy(case, dtype, device), strict=True):
        assert error.ok, f"{what}: our error is {error.ours:.2e}, allowed is {error.allowed:.2e}"


@check("exact", by_dtype=True)
def exact(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Small integers come out exactly, forward and backward: what indexing and masks do wrong, shows."""
    ours = run(case, Maker(dtype, device=device, integers=True), "fused")
    truth = run(case, Maker(dtype, torch.float64, device=device, integers=True), "definition")
    same([y.double() for y in ours.outputs], truth.outputs, "output")
    same([g.double() for g in ours.gradients], truth.gradients, "gradient")


def agrees(ours: Run, case: Case, device: str) -> None:
    """A float32 run that made its tensors differently is right by the rule of accuracy."""
    definition = run(case, Maker(device=device), "definition")
    truth = run(case, Maker(dtype=torch.float64, device=device), "definition")
    out = compare(ours.outputs, definition.outputs, truth.outputs, FORWARD)
    assert out.ok, f"output: our error is {out.ours:.2e}, allowed is {out.allowed:.2e}"
    grad = compare(ours.gradients, definition.gradients, truth.gradients, GRADIENT)
    assert grad.ok, f"gradient: our error is {grad.ours:.2e}, allowed is {grad.allowed:.2e}"


def _in_layout(layout: Layout, case: Case, device: str) -> None:
    maker = Maker(device=device, layout=layout)
    agrees(run(case, maker, "fused"), case, device)


@check("cases")
def transposed(spec: Spec, case: Case, device: str) -> None:
    """Inputs and parameters with their dimensions stored in another order."""
    _in_layout("transposed", case, device)


@check("cases")
def sliced(spec: Spec, case: Case, device: str) -> None:
    """Every second element of wider storage, the others NaN."""
    _in_layout("sliced", case, device)


@check("core")
def offset(spec: Spec, case: Case, device: str) -> None:
    """Data that does not start at a multiple of 16 bytes."""
    _in_layout("offset", case, device)


@check("core")
def channels_last(spec: Spec, case: Case, device: str) -> None:
    """Four dimensions with channels last; the output has the strides that torch's has."""
    _in_layout("channels_last", case, device)
    ours = run(case, Maker(device=device, layout="channels_last"), "fused", backward=False)
    torchs = run(case, Maker(device=device, layout="channels_last"), "definition", backward=False)
    if spec.name == "activation" and not any(
        y.isnan().any() or (y == 0).any() for y in ours.outputs
    ):
        assert [y.stride() for y in ours.outputs] == [y.stride() for y in torchs.outputs]


@check("core", slow=True)
def far_apart(spec: Spec, case: Case, device: str) -> None:
    """Rows of the input 2**31 elements apart: offsets need 64 bits."""
    _in_layout("far", case, device)


@check("cases", by_dtype=True)
def memory(spec: Spec, case: Case, device: str, dtype: torch.dtype) -> None:
    """Nothing beside the outputs is written, all of them is, and the same call gives the same bits."""
    maker = Maker(dtype, device=device, layout="guarded")
    with guarded_allocations() as guards:
        first = run(case, maker, "fused")
    untouched = Maker(dtype, device=device)
    case.make(untouched)
    same([x.detach() for x in maker.leaves], [x.detach() for x in untouched.leaves], "input")
    for guard in (*maker.guards, *guards):
        assert guard[:GUARD].isnan().all() and guard[-GUARD:].isnan().all(), "wrote past a tensor"
    for tensor in (*first.outputs, *first.gradients):
        assert not tensor.isnan().any(), "an element was not written, or read past its tensor"
    second = run(case, Maker(dtype, device=device), "fused")
    same(second.outputs + second.gradients, first.outputs + first.gradients, "second run")


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[Tensor]]:
    """New tensors of an op come filled with NaN, and with NaN before and after them."""
    guards: list[Tensor] = []

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            if not plain.is_floating_point() or not plain.numel():
                return plain
            guards.append(torch.full((plain.numel() + 2 * GUARD,), math.nan).to(plain))
            return guards[-1].as_strided(plain.shape, plain.stride(), GUARD)

        return wrapped

    with (
        mock.patch.object(torch, "empty_like", guarded(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty)),
    ):
        yield guards


@check("cases")
def second_derivative(spec: Spec, case: Case, device: str) -> None:
    """Gradients of gradients are the definition's."""

    def differentiate(mode: Any, dtype: torch.dtype) -> list[Tensor]:
        maker = Maker(dtype=dtype, device=device)
        with policy(mode):
            torch.manual_seed(7)
            outputs = floats(case.make(maker)())
            backs = [c.requires_grad_() for c in cotangents(maker, outputs)]
            leaves = [*maker.leaves, *backs]
            found = torch.autograd.grad(
                outputs, maker.leaves, backs, create_graph=True, allow_unused=True
            )
            first = [g for g in found if g is not None and g.requires_grad]
            if not first:
                return []
            sent = cotangents(maker, first)
            return list(
                torch.autograd.grad(first, leaves, sent, allow_unused=True, materialize_grads=True)
            )

    ours, definition, truth = (
        differentiate(mode, dtype)
        for mode, dtype in (
            ("fused", torch.float32),
            ("definition", torch.float32),
            ("definition", torch.float64),
        )
    )
    error = compare(ours, definition, truth, GRADIENT)
    assert error.ok, f"our error is {error.ours:.2e}, allowed is {error.allowed:.2e}"


@check("core")
def needed(spec: Spec, case: Case, device: str) -> None:
    """Whichever inputs need gradients, these and no others get them, and values do not depend on it."""
    full = run(case, Maker(device=device), "fused")
    silent = run(case, Maker(device=device, grad=False), "fused")
    same(silent.outputs, [y.detach() for y in full.outputs], "without gradients")
    count = len(full.maker.leaves)
    for chosen in itertools.product((False, True), repeat=count):
        if not any(chosen):
            continue
        maker = Maker(device=device)
        with policy("fused", on_fallback="error"):
            torch.manual_seed(7)
            call = case.make(maker)
            for leaf, wanted in zip(maker.leaves, chosen, strict=True):
                leaf.requires_grad_(wanted)
            outputs = floats(call())
            torch.autograd.backward(outputs, cotangents(maker, outputs))
        for leaf, wanted, expected in zip(maker.leaves, chosen, full.gradients, strict=True):
            assert (leaf.grad is not None) == wanted, f"gradients where {chosen} need one"
            if wanted:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)


@check("empty")
def empty(spec: Spec, case: Case, device: str) -> None:
    """Sizes of 0 give what torch gives, and gradients too."""
    ours = run(case, Maker(device=device), "fused")
    torchs = run(case, Maker(device=device), "definition")
    for got, expected in zip(
        ours.outputs + ours.gradients, torchs.outputs + torchs.gradients, strict=True
    ):
        torch.testing.assert_close(got, expected)


@check("core")
def not_finite(spec: Spec, case: Case, device: str) -> None:
    """NaN and infinities come out where the definition, in fp64, lets them out."""
    for value in (float("nan"), float("inf"), float("-inf")):

        def values(mode: Any, dtype: torch.dtype, value: float = value) -> list[Tensor]:
            maker = Maker(dtype=dtype, device=device)
            call = case.make(maker)
            with torch.no_grad(), policy(mode, on_fallback="error"):
                maker.leaves[0].view(-1)[1] = value
                torch.manual_seed(7)
                return floats(call())

        for got, expected in zip(
            values("fused", torch.float32), values("definition", torch.float64), strict=True
        ):
            bad = (got.isnan() != expected.isnan()) | (got.isinf() != expected.isinf())
            assert not bad.any(), f"{int(bad.sum())} elements differ for {value}"


@check("cases")
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
        if str(node.target).startswith("fastdl.")
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
        assert f"fastdl.{op}.default" in "".join(code), f"{op} is not in what inductor runs"


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
    """torch's own check of schema, fake kernels and dispatch, on the arguments that the case leads to."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "fastdl":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for layout in ("dense", "transposed"):
        with Watch():
            run(case, Maker(device=device, layout=layout), "fused")
    assert {func.name().split("::")[1] for func, _ in calls} >= set(spec.library_ops)
    for func, args in calls:
        torch.library.opcheck(func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args))


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


@check("core")
def strided_cotangents(spec: Spec, case: Case, device: str) -> None:
    """Gradients that arrive expanded, as from sum(), or with strides, are read right."""

    def gradients(send: Callable[[Tensor], Tensor]) -> list[Tensor]:
        maker = Maker(device=device)
        with policy("fused", on_fallback="error"):
            torch.manual_seed(7)
            outputs = floats(case.make(maker)())
            return list(torch.autograd.grad(outputs, maker.leaves, [send(y) for y in outputs]))

    ones = gradients(lambda y: torch.ones_like(y, memory_format=torch.contiguous_format))
    same(gradients(lambda y: y.new_ones(()).expand(y.shape)), ones, "expanded")
    same(
        gradients(lambda y: y.new_ones((*y.shape[:-1], 2 * y.shape[-1]))[..., ::2]), ones, "strided"
    )


@check("op")
def signatures(spec: Spec, device: str) -> None:
    """Calls written for torch mean the same here: its parameters come first, in order; ours are keywords."""
    for ours, torchs in spec.signatures:
        got = list(inspect.signature(ours).parameters.values())
        expected = list(inspect.signature(torchs).parameters.values())
        pairs = zip(got, expected, strict=False)
        assert all(a.name == b.name and a.default == b.default for a, b in pairs), ours.__name__
        rest = got[len(expected) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in rest), f"{ours.__name__}: {rest}"


@check("op")
def errors(spec: Spec, device: str) -> None:
    """Bad arguments raise what torch raises, and the message says what was given and what is allowed."""
    for bad in spec.bad_calls:
        try:
            bad.like()
        except Exception as expected:
            kind = type(expected)
        else:
            raise AssertionError(f"{bad.name}: torch does not raise")
        try:
            bad.call()
        except kind as got:
            for word in bad.says:
                assert word in str(got), f"{bad.name}: {word!r} is not in {got}"
        else:
            raise AssertionError(f"{bad.name}: nothing is raised")


@check("op")
def modules(spec: Spec, device: str) -> None:
    """Modules have torch's constructor and state, print like torch's, and survive copying and pickling."""
    for make in spec.modules:
        ours, torchs, x = make()
        assert isinstance(ours, type(torchs))
        assert inspect.signature(type(ours)) == inspect.signature(type(torchs))
        ours.load_state_dict(torchs.state_dict())
        assert repr(ours) == repr(torchs)
        ours, torchs, x = ours.to(device).eval(), torchs.to(device).eval(), x.to(device)
        for twin in (ours, deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(twin(x), torchs(x))


@check("op")
def registered(spec: Spec, device: str) -> None:
    """The ops that the spec names are in the library."""
    assert set(spec.library_ops) <= LIBRARY_OPS.keys()
