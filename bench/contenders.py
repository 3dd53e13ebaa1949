"""Who is timed: the fused form, and all others that compute the same."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor

import fastdl
from bench import libraries
from bench.attention import when_called
from bench.forms import RIVALS, STEPPED, TORCH
from bench.machine import Host
from bench.passes import PASSES, Form, Inputs, Pass
from fastdl.contract import BenchCase, Maker
from fastdl.contract.evaluate import NoVendor, floats, vendors

# What torch offers to those who do not compile: speed-ups are against the fastest of these.
OWN = frozenset(
    {
        *("torch", "definition", "vendor", "addmm", "chunked", "varlen", "foreach"),
        *("flash", "cudnn", "efficient"),
    }
)

# Contenders may round otherwise than torch: relative distance of outputs and gradients.
ALIKE, SMALL, OFF = 0.02, 1e-3, "off by"


class Prepared(NamedTuple):
    """The contenders of one pass of a case, and why others are none."""

    calls: dict[str, Pass]
    refused: dict[str, str]
    inputs: Inputs

    def forget(self) -> None:
        for call in self.calls.values():
            call.forget()


def contenders(
    call: "partial[Any]", compiled: bool = True, elsewhere: bool = True
) -> dict[str, Form]:
    """By name, as routed only if that is `elsewhere`. What needs most memory comes last."""
    plain = TORCH[call.func]
    forms: dict[str, Form] = {"torch": plain, "fused": call.func}
    if compiled and call.func not in STEPPED:
        forms["compile"] = when_called(lambda: torch.compile(plain, dynamic=False))
    if call.func in RIVALS:
        forms |= RIVALS[call.func](call, compiled)
    forms |= libraries.contenders(call)
    if has_vendor(call):
        forms["vendor"] = vendor(call.func)
    if elsewhere:
        forms["routed"] = routed(call.func)
    return forms | {"definition": definition(call.func)}


def names(case: BenchCase, compiled: bool = True) -> list[str]:
    """Of the contenders, without making a tensor. Some may be refused later."""
    maker = Maker(case.dtype, device="meta", grad=case.backward)
    return [*contenders(case.make(maker), compiled)]


def definition(op: Form) -> Form:
    def form(*args: Any, **options: Any) -> Any:
        with fastdl.policy("definition"):
            return op(*args, **options)

    return form


def routed(op: Form) -> Form:
    """As users call it: who computes is what measurements and rules say."""

    def form(*args: Any, **options: Any) -> Any:
        with fastdl.policy("auto"):
            return op(*args, **options)

    return form


def goes_elsewhere(call: "partial[Any]") -> bool:
    """Whether users get something else than the fused form that is timed."""
    found = []
    for mode in ("fused", "auto"):
        with fastdl.policy(mode):
            explained = fastdl.explain(call)
        found.append((explained.fused, [str(launch) for launch in explained.launches]))
    return found[0] != found[1]


def vendor(op: Form) -> Form:
    def form(*args: Any, **options: Any) -> Any:
        with fastdl.policy("fused", on_fallback="error"), vendors():
            return op(*args, **options)

    return form


def has_vendor(call: "partial[Any]") -> bool:
    """Whether the op has a vendor call for these options, other than what users write."""
    try:
        return _dispatched(vendor(call.func), call) != _dispatched(TORCH[call.func], call)
    except (NoVendor, fastdl.FallbackError):
        return False


def _dispatched(form: Form, call: "partial[Any]") -> list[str]:
    """The ops of torch that a form comes to, views and seeds left out, without computing them."""
    args, keywords = torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.detach().to("meta"), (call.args, call.keywords)
    )
    with torch.no_grad(), _Listing() as listing:
        form(*args, **keywords)
    return listing.ops


class _Listing(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        if not func.is_view and any(isinstance(x, Tensor) for x in given):
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def prepare(
    case: BenchCase, machine: Host, inputs: Inputs, what: str, compiled: bool = True,
    only: str | None = None,
) -> Prepared:  # fmt: skip
    """The contenders of one pass, each held against torch's result; all, or `only` one."""
    if compiled:
        torch._dynamo.reset()
    forms = contenders(inputs.first, compiled, goes_elsewhere(inputs.first))
    torchs = PASSES[what](forms.pop("torch"), inputs)
    wanted = repeatable(torchs)
    calls: dict[str, Pass] = {"torch": torchs, "fused": PASSES[what](forms.pop("fused"), inputs)}
    refused = {}
    if compiled and inputs.first.func in STEPPED:
        refused["compile"] = "torch.compile writes out every step, not timed"
    for name in forms if only is None else forms.keys() & {only}:
        # other libraries write their gradients into what they are given
        given = Inputs(case, machine) if name in libraries.LIBRARIES else inputs
        call = PASSES[what](forms[name], given)
        why = unfit(call, wanted)
        if why:
            refused[name] = why
            del call, given
            machine.release()
        else:
            calls[name] = call
    return Prepared(calls, refused, inputs)


def repeatable(call: Callable[[int], Any]) -> list[Tensor] | None:
    """The result, if it is the same each time: random ones cannot be compared."""
    first, second = (floats(call(0)) for _ in range(2))
    return first if apart(second, first) < ALIKE else None


def unfit(call: Callable[[int], Any], wanted: Sequence[Tensor] | None) -> str:
    """Why a call is no contender: somebody refuses it, or it computes something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = floats(call(0))
    except Exception as problem:
        return reason(problem)
    found = 0.0 if wanted is None else apart(got, wanted)
    return "" if found < ALIKE else f"{OFF} {found:.2g}"


def apart(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative distance. Of a gradient of 0, what did not cancel is not looked at."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return math.inf
    largest = max((rms(b) for b in wanted), default=0.0)
    found = [
        rms(a.double() - b) / max(rms(b), SMALL * largest, torch.finfo(torch.float64).tiny)
        for a, b in zip(got, wanted, strict=True)
    ]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def rms(x: Tensor) -> float:
    return float(x.detach().double().norm()) / max(x.numel(), 1) ** 0.5


def reason(problem: Exception) -> str:
    """The first line, unless the device is lost, and would take the blame for all that follow."""
    if "CUDA error" in str(problem):
        raise problem
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
