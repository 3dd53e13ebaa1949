"""AdamW in one launch for all tensors of a group that have the same types."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ..ops._route import Reason
from ..ops.optim import Scaling, adamw_step
from ._fused import Fused, Member, columns_of, count, rate, wrote


class AdamW(Fused, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` on the fused kernel: same constructor, same state dict.

    With `master_weights`, parameters in float16 or bfloat16 are the rounding of a copy in float32
    that the state has beside moments in float32. `clip_grad_norm` is the norm that the gradients
    of all groups together may have in the step; `.grad` stays as it is. `fused=True` keeps the
    counts of steps on the device, and lets a `GradScaler` leave unscaling and skipping to the step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._set_options(master_weights, clip_grad_norm)

    @torch._disable_dynamo
    def _step_group(self, number: int, group: dict[str, Any], scaling: Scaling) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        lists: list[list[Tensor]] = [[], [], [], []]
        has_complex = self._init_group(group, params, grads, *lists)
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        members, rest = self._sort(params, grads, names, _why_torch(group, has_complex))
        if members:
            self._launch(number, group, members, scaling)
        if rest:
            self._torch_step(
                [params[i] for i in rest], [grads[i] for i in rest], scaling,
                lambda p, g: self._adam(group, [params[i] for i in rest], p, g, has_complex),
            )  # fmt: skip

    def _launch(
        self, number: int, group: dict[str, Any], members: list[Member], scaling: Scaling
    ) -> None:
        steps = [self.state[member.owner]["step"] for member in members]
        count(steps)
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, (member, step) in enumerate(zip(members, steps, strict=True)):
            p, m, v, *_ = (member.param, *member.state)
            assert m is not None and v is not None
            # counts on the device are read there
            there = (group["capturable"] or group["fused"]) and step.dtype == torch.float32
            value = None if there and step.device == p.device else step.item()
            alike[p.device, p.dtype, member.grad.dtype, m.dtype, v.dtype, value].append(i)
        for slot, (key, found) in enumerate(alike.items()):
            columns = columns_of([members[i] for i in found])
            if not group["amsgrad"]:
                columns.insert(4, None)
            columns.append([steps[i] for i in found] if key[-1] is None else None)
            adamw_step(
                self._tables, (number, slot), columns, scaling, lr=rate(group["lr"], key[0]),
                betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                maximize=group["maximize"], step=key[-1],
            )  # fmt: skip
        wrote(members, scaling)
        if scaling.found_inf is not None:
            count(steps, scaling.found_inf)

    def _adam(
        self, group: dict[str, Any], keys: list[Tensor], params: list[Tensor],
        grads: list[Tensor], has_complex: bool,
    ) -> None:  # fmt: skip
        """torch's own step of the parameters whose state is that of `keys`."""
        state = [self.state[p] for p in keys]
        adam(
            params, grads, [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state],
            [s["max_exp_avg_sq"] for s in state] if group["amsgrad"] else [],
            [s["step"] for s in state],
            foreach=group["foreach"], capturable=group["capturable"],
            differentiable=group["differentiable"], fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=has_complex, decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"], beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


def _why_torch(group: dict[str, Any], has_complex: bool) -> Reason | None:
    if has_complex:
        return Reason.DTYPE
    tensors = any(isinstance(beta, Tensor) for beta in group["betas"])
    return Reason.OPTION if group["differentiable"] or tensors else None
