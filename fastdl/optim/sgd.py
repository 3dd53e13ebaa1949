"""SGD in one launch for all tensors of a group that have the same types."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ..ops._route import Reason
from ..ops.optim import Scaling, sgd_step
from ._fused import Fused, Member, columns_of, rate, wrote


class SGD(Fused, torch.optim.SGD):
    """:class:`torch.optim.SGD` on the fused kernel: same constructor, same state dict.

    `master_weights`, `clip_grad_norm` and `fused` are as in :class:`fastdl.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._set_options(master_weights, clip_grad_norm)

    @torch._disable_dynamo
    def _step_group(self, number: int, group: dict[str, Any], scaling: Scaling) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        has_sparse = self._init_group(group, params, grads, [])
        why = _why_torch(group, has_sparse)
        new = self._new_momentum(params) if group["momentum"] and why is None else set()
        names = ["momentum_buffer"] if group["momentum"] else []
        members, rest = self._sort(params, grads, names, why)
        if members:
            self._launch(number, group, members, scaling, new)
        if rest:
            left = [params[i] for i in rest]
            for p in left:
                if p in new:
                    del self.state[p]["momentum_buffer"]
            self._torch_step(
                left, [grads[i] for i in rest], scaling,
                lambda p, g: self._sgd(group, left, p, g, has_sparse),
            )  # fmt: skip

    def _new_momentum(self, params: list[Tensor]) -> set[Tensor]:
        """Zeros for parameters that have none, which are returned."""
        new = {p for p in params if self.state[p].get("momentum_buffer") is None}
        for p in new:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return new

    def _launch(
        self, number: int, group: dict[str, Any], members: list[Member], scaling: Scaling,
        new: set[Tensor],
    ) -> None:  # fmt: skip
        damped = bool(group["dampening"])
        if new and damped and scaling.found_inf is not None and scaling.found_inf.item():
            # the first step, which is not damped, is still to come
            for p in new:
                del self.state[p]["momentum_buffer"]
            return
        alike: dict[Any, list[Member]] = defaultdict(list)
        for member in members:
            p, m, *_ = (member.param, *member.state)
            first = damped and member.owner in new
            state = None if m is None else m.dtype
            alike[p.device, p.dtype, member.grad.dtype, state, first].append(member)
        for slot, (key, found) in enumerate(alike.items()):
            columns = columns_of(found)
            if not group["momentum"]:
                columns.insert(2, None)
            sgd_step(
                self._tables, (number, slot), columns, scaling, lr=rate(group["lr"], key[0]),
                momentum=group["momentum"], dampening=group["dampening"],
                weight_decay=group["weight_decay"], nesterov=group["nesterov"],
                maximize=group["maximize"], first=key[-1],
            )  # fmt: skip
        wrote(members, scaling)

    def _sgd(
        self, group: dict[str, Any], keys: list[Tensor], params: list[Tensor],
        grads: list[Tensor], has_sparse: bool,
    ) -> None:  # fmt: skip
        """torch's own step of the parameters whose state is that of `keys`."""
        momenta = [self.state[p].get("momentum_buffer") for p in keys] if group["momentum"] else []
        sgd(
            params, grads, momenta, has_sparse_grad=has_sparse, foreach=group["foreach"],
            fused=group["fused"], grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None), weight_decay=group["weight_decay"],
            momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"],
            nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
        for p, momentum in zip(keys, momenta, strict=False):
            self.state[p]["momentum_buffer"] = momentum


def _why_torch(group: dict[str, Any], has_sparse: bool) -> Reason | None:
    decay = isinstance(group["weight_decay"], Tensor)
    return Reason.OPTION if group["differentiable"] or has_sparse or decay else None
