"""Who computes an op: the fused kernels or torch, and why.

There are two deciders. The public function asks `decide`, which looks at statics only, because
Dynamo and export trace it. A library op asks `decline` on real tensors, where sizes and
measurements are known.
"""

import contextlib
import ctypes
import enum
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from . import _launch

Mode = Literal["auto", "fused", "definition"]
OnFallback = Literal["silent", "warn", "error"]


class Reason(enum.Enum):
    """Why an op does not run fused. The value is a sentence for the user."""

    POLICY = "the policy asks for the definition"
    TRITON = "Triton is not installed"
    DEVICE = "the tensors are not on a GPU"
    DTYPE = "the kernels take float32, float16 and bfloat16"
    TRANSFORM = "a torch.func transform or forward-mode AD is active"
    SUBCLASS = "an input is a tensor subclass that has no rule"
    DOUBLE_BACKWARD = "the gradient itself is being differentiated"
    INPLACE = "the result is written into the input"
    OPTION = "torch has this option and the kernels do not"
    TOOLCHAIN = "this ptxas is known to miscompile the kernel on this GPU"
    MEASURED = "torch measured faster here"
    UNMEASURED = "torch has a fast call, and nothing measured says that the kernels are faster"
    SIZE = "the sizes are outside of what the kernels take"
    EMPTY = "there are no elements"


# Nothing is lost by running torch for these, or nothing else is possible: no policy complains.
QUIET = frozenset({Reason.POLICY, Reason.EMPTY})

# torch's own call serves where the kernels cannot; the definition is for truth and for transforms.
FOR_VENDOR = frozenset(
    {
        *(Reason.TRITON, Reason.DEVICE, Reason.TOOLCHAIN, Reason.OPTION),
        *(Reason.MEASURED, Reason.UNMEASURED),
    }
)

FUSED_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

# Fake and functional tensors stand for plain ones: were they foreign, the op would vanish from
# compiled graphs.
PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor})


class FallbackError(RuntimeError):
    """An op would not run fused while the policy says `on_fallback="error"`."""


class Policy(NamedTuple):
    mode: Mode = "auto"
    on_fallback: OnFallback = "silent"


class _State(threading.local):
    policy = Policy()
    log: "list[Decision] | None" = None


_state = _State()
_TLS_KEY, _PROBE_KEY = "fastdl_policy", "fastdl_probe"


class Decision(NamedTuple):
    """One answer of a decider: `reason` is None where the fused form runs."""

    op: str
    stage: Literal["call", "device"]
    reason: Reason | None
    detail: str = ""


def current_policy() -> Policy:
    return _state.policy


def _policy_in_backward() -> Policy:
    # Autograd's device threads have their own thread-locals, but torch carries stashed objects over
    # to them.
    if "policy" not in _state.__dict__ and torch._C._is_key_in_tls(_TLS_KEY):
        return torch._C._get_obj_in_tls(_TLS_KEY)
    return _state.policy


def _checked(mode: Mode, on_fallback: OnFallback) -> Policy:
    for given, allowed in ((mode, get_args(Mode)), (on_fallback, get_args(OnFallback))):
        if given not in allowed:
            raise ValueError(f"policy: got {given!r}, allowed are {', '.join(allowed)}")
    return Policy(mode, on_fallback)


def _takes_no_reference() -> bool:
    """Whether torch keeps an object for a thread without a reference of its own, and drops one in
    the end: some versions do, and free what others still use.
    """
    probe = Policy()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_PROBE_KEY, probe)
    taken = sys.getrefcount(probe) > before
    if not taken:
        _add_reference(probe)
    return not taken


def _add_reference(policy: Policy) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(policy))


_NO_REFERENCE = _takes_no_reference()


def _install(policy: Policy) -> None:
    _state.policy = policy
    torch._C._stash_obj_in_tls(_TLS_KEY, policy)
    if _NO_REFERENCE:
        _add_reference(policy)


def set_policy(mode: Mode = "auto", on_fallback: OnFallback = "silent") -> None:
    """Choose for this thread: fused where it helps, fused wherever it can, or the definition."""
    _install(_checked(mode, on_fallback))


@contextlib.contextmanager
def policy(mode: Mode = "auto", on_fallback: OnFallback = "silent") -> Iterator[None]:
    """`set_policy` for the length of a with block."""
    before, wanted = _state.policy, _checked(mode, on_fallback)
    _install(wanted)
    try:
        yield
    finally:
        _install(before)


def under_a_transform() -> bool:
    # The only test that is right under Dynamo, under func.grad inside compile, and for dual
    # tensors.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def decide(name: str, *tensors: Tensor) -> Reason | None:
    """The static decider: None when the fused form may run, else the reason, already reported."""
    reason = _static_reason(tensors)
    if _state.log is not None or reason is not None:
        report(name, "call", reason)
    return reason


def _static_reason(tensors: tuple[Tensor, ...]) -> Reason | None:
    if _state.policy.mode == "definition":
        return Reason.POLICY
    if under_a_transform():
        return Reason.TRANSFORM
    first = tensors[0]  # others may hold indices, masks and seeds
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return Reason.SUBCLASS
        if tensor.dtype not in FUSED_DTYPES and (tensor is first or tensor.is_floating_point()):
            return Reason.DTYPE
        if tensor.device.type not in _launch.device_types():
            return Reason.DEVICE
    return None if _launch.HAVE_TRITON else Reason.TRITON


def report(
    name: str, stage: Literal["call", "device"], reason: Reason | None, detail: str = ""
) -> None:
    """Log a decision for `explain`, and do what the policy says when it is a fallback."""
    if torch.compiler.is_compiling():
        return
    if _state.log is not None:
        _state.log.append(Decision(name, stage, reason, detail))
    if reason is None or reason in QUIET:
        return
    on_fallback = _policy_in_backward().on_fallback
    if on_fallback == "error":
        raise FallbackError(f"{name} does not run fused: {reason.value}{detail and f' ({detail})'}")
    if on_fallback == "warn":
        warnings.warn(f"fastdl: {name} runs in torch: {reason.value}", stacklevel=4)


def prefers_torch(measured_winner: str) -> bool:
    """Whether a measurement sends the op to torch; "fused" as policy overrules it."""
    return measured_winner == "torch" and _policy_in_backward().mode == "auto"


class Explanation(NamedTuple):
    """What `explain` saw: decisions of both deciders, what tables answered, and the launches that
    all of it led to.
    """

    decisions: list[Decision]
    launches: "list[_launch.Launch]"
    measured: "list[_launch.Lookup]"

    @property
    def fused(self) -> bool:
        return bool(self.launches)

    def __str__(self) -> str:
        lines = []
        for op, stage, reason, detail in self.decisions:
            what = "fused" if reason is None else f"torch, because {reason.value}"
            lines.append(f"{op} ({stage}): {what}{detail and f' ({detail})'}")
        lines += [f"  {launch}" for launch in self.launches]
        # an op may ask the same twice
        told = {(m.op, m.dtype, m.sizes): m.found for m in self.measured if m.found is not None}
        for (op, dtype, sizes), found in told.items():
            kind, margin = str(dtype).removeprefix("torch."), found.margin or "an unknown margin"
            shape = "x".join(map(str, sizes))
            lines.append(f"  measured: {op} {kind} {shape}: {margin} [{found.source}]")
        return "\n".join(lines) or "no fastdl op ran"


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Run `op` once and say who computed it, why, and with which launch configuration."""
    outer, _state.log = _state.log, []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            _launch.recording() as launches,
            _launch.asking() as measured,
        ):
            op(*args, **kwargs)
        return Explanation(_state.log, launches, measured)
    finally:
        _state.log = outer
