"""What the fused optimizers share: who computes a parameter's step, master weights, clipping."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from ..ops import _route
from ..ops._route import Reason
from ..ops.optim import (
    Scaling,
    Tables,
    alike,
    clip_coefficient,
    total_norm,
    why_none,
    why_not,
)

MASTER = "master_param"


class Member(NamedTuple):
    """A parameter in a step, as kernels see it: local tensors in one order of elements."""

    owner: Tensor
    param: Tensor
    grad: Tensor
    # what `grad` is a copy of, where the user's is in another order
    source: Tensor | None
    state: list[Tensor | None]


class Fused(torch.optim.Optimizer):
    """To be derived from before one of torch's optimizers.

    `grad_norm` is the norm of all gradients before the last step, if that clips.
    """

    master_weights = False
    clip_grad_norm: float | None = None
    grad_norm: Tensor | None = None

    def _set_options(self, master_weights: bool, clip_grad_norm: float | None) -> None:
        name = type(self).__name__
        if clip_grad_norm is not None and not clip_grad_norm >= 0:
            raise ValueError(f"{name}: clip_grad_norm is {clip_grad_norm}, allowed is None or >= 0")
        if master_weights and self.defaults["differentiable"]:
            raise ValueError(f"{name}: master_weights does not go with differentiable=True")
        self.master_weights, self.clip_grad_norm = master_weights, clip_grad_norm

    def __getstate__(self) -> dict[str, Any]:
        options = {"master_weights": self.master_weights, "clip_grad_norm": self.clip_grad_norm}
        return {**super().__getstate__(), **options}

    def load_state_dict(self, state_dict: Any) -> None:
        """torch's, which would round the state of low-precision parameters; theirs is float32 where
        there are master weights.
        """
        given: list[Any] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: given.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self.master_weights:
            self._load_float32(given[0])

    def _load_float32(self, loaded: Any) -> None:
        numbers = [n for group in loaded["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for name, value in loaded["state"].get(number, {}).items():
                if name != "step" and isinstance(value, Tensor) and _is_low(p):
                    value = value.to(device=p.device, dtype=torch.float32, copy=True)
                    self.state[p][name] = value

    @property
    def _tables(self) -> Tables:
        if "_kept_tables" not in self.__dict__:
            self._kept_tables = Tables()
        return self._kept_tables

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step."""
        if "capturable" in self.defaults:
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = self._scaling()
        for number, group in enumerate(self.param_groups):
            self._step_group(number, group, scaling)
        return loss

    def _step_group(self, number: int, group: dict[str, Any], scaling: Scaling) -> None:
        raise NotImplementedError

    def _scaling(self) -> Scaling:
        scale: Tensor | None = getattr(self, "grad_scale", None)
        clip = None
        if self.clip_grad_norm is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            norm = total_norm(self._tables, [p.grad for p in params if p.grad is not None])
            clip = clip_coefficient(norm, self.clip_grad_norm, scale)
            self.grad_norm = norm if scale is None else norm / scale.to(norm.device)
        return Scaling(scale, getattr(self, "found_inf", None), clip)

    def _use_master(self, p: Tensor, names: Sequence[str]) -> None:
        """Give a low-precision parameter a state in float32, and the copy that it is rounded
        from.
        """
        state = self.state[p]
        for name in names:
            if name in state and state[name] is not None:
                state[name] = state[name].to(torch.float32)
        if MASTER not in state:
            state[MASTER] = p.detach().to(torch.float32)

    def _sort(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], names: Sequence[str],
        why: Reason | None,
    ) -> tuple[list[Member], list[int]]:  # fmt: skip
        """Members of the launches, and the indices of what torch has to do, with reasons given."""
        members, rest = [], []
        reasons: dict[Reason, None] = {}
        why = why or (why_none(params[0]) if params else None)
        keys = [*names, MASTER] if self.master_weights else names
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if self.master_weights and _is_low(p):
                self._use_master(p, names)
            member = why or self._member(p, g, keys)
            if isinstance(member, Reason):
                rest.append(i)
                reasons[member] = None
            else:
                members.append(member)
        name = type(self).__name__
        if members and _route._state.log is not None:
            _route.report(name, "call", None)
        for reason in reasons:
            _route.report(name, "call", reason)
        return members, rest

    def _member(self, p: Tensor, g: Tensor, keys: Sequence[str]) -> Member | Reason:
        state = self.state.get(p, {})  # SGD without momentum has none
        found = _local([p, g, *(state.get(key) for key in keys)])
        if found is None:
            return Reason.SUBCLASS
        reason = why_not(*(t for t in found if t is not None))
        if reason is not None:
            return reason
        local, grad, *states = found
        for i, t in enumerate(states):
            if t is not None and not alike(t, local):
                if t is not state[keys[i]]:
                    return Reason.OPTION  # a shard; its owner would stay as it is
                states[i] = state[keys[i]] = _in_order_of(local, t)
        if not self.master_weights:
            states.append(None)
        if alike(grad, local):
            return Member(p, local, grad, None, states)
        return Member(p, local, _in_order_of(local, grad), grad, states)

    def _torch_step(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scaling: Scaling,
        step: Callable[[list[Tensor], list[Tensor]], Any],
    ) -> None:  # fmt: skip
        """torch's own step, of master weights and clipped gradients where there are such."""
        wanted = [self._exact(p) for p in params]
        grads = [g.to(p.dtype) for g, p in zip(grads, wanted, strict=True)]
        if scaling.clip is not None:
            grads = [g * scaling.clip.to(g.device) for g in grads]
        step(wanted, grads)
        for p, w in zip(params, wanted, strict=True):
            if w is not p:
                p.copy_(w)

    def _exact(self, p: Tensor) -> Tensor:
        """What p is the rounding of. If it is not, somebody has written it: it counts, then."""
        master = self.state.get(p, {}).get(MASTER) if self.master_weights else None
        if master is None:
            return p
        return master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))


def columns_of(members: Sequence[Member]) -> list[Any]:
    """Parameters, gradients and each kind of state; None for a kind that they do not have."""
    found = zip(*((x.param, x.grad, *x.state) for x in members), strict=True)
    return [None if column[0] is None else column for column in found]


def wrote(members: Sequence[Member], scaling: Scaling) -> None:
    """Tell autograd what kernels have written, and bring gradients without their scale home."""
    written = [t for x in members for t in (x.param, *x.state) if t is not None]
    if scaling.grad_scale is not None:
        written += [x.grad for x in members]
        for x in members:
            if x.source is not None:
                x.source.copy_(x.grad)
    torch.autograd.graph.increment_version(written)


def count(steps: list[Tensor], found_inf: Tensor | None = None) -> None:
    """One step more, or with `found_inf` one less where the step was skipped."""
    if found_inf is None:
        torch._foreach_add_(steps, 1)
    else:
        skipped = (found_inf != 0).float()
        torch._foreach_sub_(steps, [skipped.to(s.device) for s in steps])


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's own check that nobody captures what is not capturable; it had another name."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()


def rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A learning rate that is on the device is read there."""
    return lr if isinstance(lr, Tensor) and lr.device == device else float(lr)


def _is_low(p: Tensor) -> bool:
    return p.dtype in (torch.float16, torch.bfloat16)


def _in_order_of(like: Tensor, t: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def _local(tensors: list[Any]) -> list[Any] | None:
    """The tensors, or this process's shards of them; None where a type is not known."""
    for t in tensors:
        if t is not None and type(t) not in _route.PLAIN:
            return _shards(tensors)
    return tensors


def _shards(tensors: list[Any]) -> list[Any] | None:
    """None where they are not all cut alike, too."""
    # whoever has one has imported it
    module = sys.modules.get("torch.distributed.tensor")
    present = [t for t in tensors if t is not None]
    if module is None or any(type(t) is not module.DTensor for t in present):
        return None
    if any(t.placements != present[0].placements for t in present):
        return None
    return [t if t is None else t.to_local() for t in tensors]
