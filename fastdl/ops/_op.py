"""How an op meets torch: library ops for its kernels, and one declaration that ties its forms
together.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _launch, _route
from ._route import Reason

# A build that ships fastdl under another name changes this one line.
NAMESPACE = "fastdl"

# What a backward op returns: None where nobody needs it, which a schema has no word for.
if TYPE_CHECKING:
    Gradient = Any
else:
    Gradient = Tensor

_library = torch.library.Library(NAMESPACE, "DEF")

LIBRARY_OPS: "dict[str, LibraryOp]" = {}

# What the graph optimizer looks for, longest first within an op; each op's file adds its own.
SPELLINGS: "list[Spelling]" = []


class LibraryOp:
    """One kernel pass as an op of torch's library: opaque to compilers, functional, fit for export.

    `launch` is typed: its signature is the schema. `like` takes the same arguments and allocates
    the outputs, without looking at sizes. `torch` computes the same outputs in plain torch.
    `decline` says why the kernels should not run.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[..., Any],
        *,
        like: Callable[..., Any],
        torch_form: Callable[..., Any],
        decline: Callable[..., Reason | None] = lambda *args: None,
    ) -> None:
        self.name = name
        self.launch, self.like, self.torch_form, self._decline = launch, like, torch_form, decline
        _library.define(name + torch.library.infer_schema(launch, mutates_args=()))
        # Dynamo must never walk into a launcher, which it does after a graph break.
        kernel = torch._disable_dynamo(lambda *args: self._run(*args))
        for device in ("CPU", "CUDA"):
            _library.impl(name, kernel, device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        LIBRARY_OPS[name] = self

    def _run(self, *args: Any) -> Any:
        reason = self._reason(*args)
        _route.report(self.name, "device", reason)
        if reason is None:
            return self.launch(*args)
        with torch.no_grad():
            return self.torch_form(*args)

    def _reason(self, *args: Any) -> Reason | None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors[0].numel() == 0:
            return Reason.EMPTY
        if not _launch.HAVE_TRITON:
            return Reason.TRITON
        if tensors[0].device.type not in _launch.device_types():
            return Reason.DEVICE
        return self._decline(*args)

    def _fake(self, *args: Any) -> Any:
        if not _launch.is_dry():
            return self.like(*args)
        # Real meta tensors walk through the launcher, so that it can be recorded, and whatever the
        # tables are asked before.
        self._decline(*args)
        return self.launch(*args)


def autocast_to_lower(*tensors: Any) -> tuple[Any, ...]:
    """What torch's autocast does to the arguments of a product."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return _cast(tensors, torch.get_autocast_dtype(device))


def autocast_to_float32(*tensors: Any) -> tuple[Any, ...]:
    """What torch's autocast does to norms, softmax and losses; on a CPU, nothing."""
    return _cast(tensors, torch.float32) if autocast_widens(tensors[0]) else tensors


def autocast_widens(tensor: Tensor) -> bool:
    """Whether autocast wants of norms, softmax and losses to compute in float32."""
    return tensor.device.type == "cuda" and torch.is_autocast_enabled("cuda")


def _cast(tensors: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Autocast leaves float64 and integers alone."""
    lower = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in lower else t for t in tensors)


def differentiating() -> bool:
    """Whether a backward pass is itself being differentiated. Compilers trace backward with grad
    mode on.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    definition: Callable[..., Any],
    args: Sequence[Any],
    grads: Any,
    needs: Sequence[bool],
    create_graph: bool = False,
) -> list[Any]:
    """Gradients of the definition for those of `args` that need one, None for the others.

    Differentiates at views of the arguments: one of them may be computed from another, and the
    paths between them are not part of this op.
    """
    # inside of a library op that a dispatch mode called, autograd is switched off below grad mode
    autograd = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with torch.enable_grad(), autograd:
        args = list(args)
        wanted = [i for i, need in enumerate(needs) if need]
        for i in wanted:
            args[i] = (
                args[i].view_as(args[i]) if create_graph else args[i].detach().requires_grad_()
            )
        found = torch.autograd.grad(
            definition(*args),
            [args[i] for i in wanted],
            grads,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    result: list[Any] = [None] * len(args)
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


def empty_gradients(
    tensors: Iterable[Any], needs: Iterable[bool], memory_format: Any = torch.contiguous_format
) -> Any:
    """A new tensor for each that needs a gradient, None for the others."""
    return tuple(
        torch.empty_like(t, memory_format=memory_format) if need else None
        for t, need in zip(tensors, needs, strict=True)
    )


def copied(into: Iterable[Any], found: Iterable[Any]) -> Any:
    """What torch computed, in the memory that was allocated for it."""
    pairs = zip(into, found, strict=False)
    return tuple(None if new is None else new.copy_(value) for new, value in pairs)


def second_derivative(
    op: str, definition: Callable[..., Any], args: Sequence[Any], grads: Any, needs: Sequence[bool]
) -> list[Any]:
    """What backward returns while it is being differentiated: the definition's gradients, as a
    graph.
    """
    _route.report(op, "call", Reason.DOUBLE_BACKWARD)
    return gradients(definition, args, grads, needs, create_graph=True)


class Spelling(NamedTuple):
    """A way in which people write an op.

    `pattern` is a branch-free function of tensors and scalars in plain torch, which the graph
    optimizer traces. `call` takes the same parameters and returns the public op with its
    arguments, to be put in place of what matches.
    """

    pattern: Callable[..., Any]
    call: "Callable[..., partial[Any]]"


def form_of(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function that computes a public op in a form that people write: reports name the
    op.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)["public_name"] = op
        return function

    return mark


def public_name(function: Callable[..., Any]) -> str:
    """The op of fastdl.functional that a function is, or is a form of."""
    return getattr(function, "public_name", function.__name__)


def named(names: Iterable[str], pattern: Callable[..., Any]) -> Callable[..., Any]:
    """A pattern that takes any arguments, as a function of parameters of these names."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, positional) for name in names])
    vars(pattern)["__signature__"] = signature
    return pattern


def same_call(
    torchs: Callable[..., Any], ours: Callable[..., Any], names: Iterable[str] | None = None
) -> Spelling:
    """torch's function, with all of its arguments, and ours, which has the same. `names` are those
    of a function of torch's that does not tell them.
    """
    names = inspect.signature(torchs).parameters if names is None else names
    return Spelling(
        named(names, lambda *args: torchs(*args)), lambda **given: partial(ours, **given)
    )


class Op(NamedTuple):
    """The forms of one op: its definition, its autograd Function and what they share.

    All take the arguments of `Function.apply`. `vendor(*args)` is torch's best call, or None where
    it does not support the options. `decline` says by statics why the kernels should not run.
    """

    name: str
    definition: Callable[..., Any]
    function: type[torch.autograd.Function]
    inference: Callable[..., Any]
    vendor: Callable[..., Any] | None = None
    decline: Callable[..., Reason | None] = lambda *args: None

    def __call__(self, *args: Any) -> Any:
        """Run the fused form where it may run, else torch."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        reason = _route.decide(self.name, *tensors)
        if reason is None and (reason := self.decline(*args)) is not None:
            _route.report(self.name, "call", reason)
        if reason is not None:
            if reason in _route.FOR_VENDOR and self.vendor is not None:
                result = self.vendor(*args)
                if result is not None:
                    return result
            return self.definition(*args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self.function.apply(*args)
        return self.inference(*args)
