"""Losses of each element: squared, absolute, Huber's, Kullback-Leibler's, binary cross entropy.

Forward reads input and target once; so does backward, which writes the gradients. A gradient that
forward left would have to be read, scaled and written again, which is as much, and rounded twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    LibraryOp,
    Op,
    autocast_widens,
    copied,
    differentiating,
    gradients,
    second_derivative,
)
from ._route import Reason
from ._strides import merged

LOSS_FWD = Kernel("losses.loss_fwd")
LOSS_TOTAL = Kernel("losses.loss_total")
LOSS_BWD = Kernel("losses.loss_bwd")

# Each loss, element by element; `a` is its parameter.
_EACH: dict[str, Callable[..., Tensor]] = {
    "mse": lambda x, t, a, reduction: F.mse_loss(x, t, reduction=reduction),
    "l1": lambda x, t, a, reduction: F.l1_loss(x, t, reduction=reduction),
    "smooth_l1": lambda x, t, a, reduction: F.smooth_l1_loss(x, t, reduction=reduction, beta=a),
    "huber": lambda x, t, a, reduction: F.huber_loss(x, t, reduction=reduction, delta=a),
    "kl": lambda x, t, a, reduction: F.kl_div(x, t, reduction=reduction),
    "kl_log": lambda x, t, a, reduction: F.kl_div(x, t, reduction=reduction, log_target=True),
}


def definition(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    loss: str, a: float, reduction: str, wide: bool,
) -> Tensor:  # fmt: skip
    """The loss of x at target t times the weight, reduced. "weighted" is a mean over the sum of the
    weights. `wide` is autocast's: in float32, whatever comes.
    """
    if wide:
        x, t, weight, pos_weight = map(_widened, (x, t, weight, pos_weight))
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(
            x, t, weight, reduction=reduction, pos_weight=pos_weight
        )
    # torch warns of kl_div's mean: its caller has been told
    if weight is None and not (loss.startswith("kl") and reduction == "mean"):
        return _EACH[loss](x, t, a, reduction)
    each = _EACH[loss](x, t, a, "none")
    if weight is None:
        return each.mean()
    each = each * weight
    if reduction == "weighted":
        return each.sum() / weight.sum()
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


def _widened(tensor: Any) -> Any:
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(x: Tensor, t: Tensor, weight: Tensor | None, loss: str, wide: bool) -> torch.dtype:
    if wide:
        return torch.float32
    if loss == "bce":
        return t.dtype  # torch computes it in place
    dtype = torch.promote_types(x.dtype, t.dtype)
    return dtype if weight is None else torch.promote_types(dtype, weight.dtype)


def choose(n: int, device: Device) -> Config:
    """16 elements a thread, of two tensors or more."""
    block = 128 if device.backend == "interpreter" else 2048
    return Config({"BLOCK": block}, num_warps=4)


def choose_total(n_sums: int) -> Config:
    return Config({"BLOCK": power_of_2(n_sums)}, num_warps=4)


def _programs(n: int, block: int, device: Device) -> int:
    """As many as are resident, each with one partial sum."""
    return min(cdiv(n, block), 8 * device.sms)


def _like(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    loss: str, a: float, reduction: str, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and what a mean by weight was divided by."""
    dtype = _dtype(x, t, weight, loss, wide)
    y = torch.empty_like(x, dtype=dtype) if reduction == "none" else x.new_empty((), dtype=dtype)
    return y, x.new_empty(() if reduction == "weighted" else 0, dtype=torch.float32)


class Flat(NamedTuple):
    """Tensors as kernels walk them: in the order in which a dense one lies in memory."""

    order: list[int]
    shape: list[int]

    @classmethod
    def as_is(cls, x: Tensor) -> "Flat":
        """The order of dimensions of x, or of what a copy of x would have."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        if not x.permute(order).is_contiguous():
            order = list(range(x.dim()))
        return cls(order, [x.shape[i] for i in order])

    def walk(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape. Copies only what lies in memory otherwise."""
        return tensor.permute(self.order).contiguous()

    def factor(self, tensor: Tensor | None) -> tuple[Tensor | None, int | None, int | None]:
        """A tensor that broadcasts: how many neighbours share an element, and how many elements
        come round again, which is None for one that is as large as the others.
        """
        if tensor is None:
            return None, None, None
        tensor = tensor.contiguous()
        wide = tensor.expand([self.shape[self.order.index(i)] for i in range(len(self.order))])
        wide = wide.permute(self.order)
        if wide.is_contiguous() and tensor.numel() == wide.numel():
            return wide, None, None
        period = _period(wide)
        if period is None or max(period) * min(period) > 2**30:
            return wide.contiguous(), None, None
        return tensor, *period


def _period(tensor: Tensor) -> tuple[int, int] | None:
    """(inner, size) of a tensor that repeats whole blocks of `size`, each element `inner` times."""
    dims = merged(tensor.shape, tensor.stride())
    dims = dims[1:] if dims and dims[0][1] == 0 else dims
    inner = dims.pop()[0] if dims and dims[-1][1] == 0 else 1
    if len(dims) > 1 or (dims and dims[0][1] != 1):
        return None
    return inner, dims[0][0] if dims else 1


def _divisor(x: Tensor, weight: Tensor | None, reduction: str) -> float:
    """What a sum is divided by; of "weighted", in units of the sum of all elements' weights."""
    if reduction == "weighted":
        assert weight is not None
        return weight.numel() / x.numel()
    return {"mean": x.numel(), "batchmean": x.shape[0] if x.dim() else 1}.get(reduction, 1)


def _forward(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    loss: str, a: float, reduction: str, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, divisor = _like(x, t, weight, pos_weight, loss, a, reduction, wide)
    reduced, by_weight, n = reduction != "none", reduction == "weighted", x.numel()
    flat = Flat.as_is(x if reduced else y)
    (of_weight, *weights), (of_pos, *poses) = flat.factor(weight), flat.factor(pos_weight)
    device = device_of(x)
    config = choose(n, device)
    programs = cdiv(n, config["BLOCK"])
    sums = None
    if reduced:
        programs = _programs(n, config["BLOCK"], device)
        sums = x.new_empty((2 if by_weight else 1, programs), dtype=torch.float32)
    launch(
        LOSS_FWD, (programs,),
        flat.walk(x), flat.walk(t), of_weight, of_pos, None if reduced else y, sums,
        n, a, *weights, *poses,
        LOSS=loss, BY_WEIGHT=by_weight, config=config,
    )  # fmt: skip
    if reduced:
        launch(
            LOSS_TOTAL, (1,),
            sums, y, divisor, programs, float(_divisor(x, weight, reduction)),
            BY_WEIGHT=by_weight, config=choose_total(programs),
        )  # fmt: skip
    return y, divisor


def _torch_forward(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    loss: str, a: float, reduction: str, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (x, t, weight, pos_weight, loss, a, reduction, wide)
    y, divisor = _like(*args)
    if reduction == "weighted" and weight is not None:
        divisor.copy_(weight.sum(dtype=torch.float32))
    return y.copy_(definition(*args)), divisor


def _like_backward(dy: Tensor, x: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs = rest[-1]
    like = x if needs[0] else t
    made: Any = (
        torch.empty_like(like, dtype=z.dtype) if need else None
        for z, need in zip((x, t), needs, strict=True)
    )
    return tuple(made)


def _backward(
    dy: Tensor, x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    divisor: Tensor, loss: str, a: float, reduction: str, wide: bool, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    reduced, n = reduction != "none", x.numel()
    dx, dt = _like_backward(dy, x, t, needs)
    flat = Flat.as_is(dx if needs[0] else dt)
    (of_weight, *weights), (of_pos, *poses) = flat.factor(weight), flat.factor(pos_weight)
    config = choose(n, device_of(x))
    launch(
        LOSS_BWD, (cdiv(n, config["BLOCK"]),),
        dy if reduced else flat.walk(dy), flat.walk(x), flat.walk(t), of_weight, of_pos, divisor,
        dx, dt, n, a, float(_divisor(x, weight, reduction)), *weights, *poses,
        LOSS=loss, REDUCED=reduced, BY_WEIGHT=reduction == "weighted", config=config,
    )  # fmt: skip
    return dx, dt


def _torch_backward(
    dy: Tensor, x: Tensor, t: Tensor, weight: Any, pos_weight: Any, divisor: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *options, needs = rest
    args = (x, t, weight, pos_weight, *options)
    found = gradients(definition, args, dy, [*needs, *(False for _ in args[2:])])
    return copied(_like_backward(dy, x, t, needs), found)


def _decline_backward(dy: Tensor, x: Tensor, *args: Any) -> Reason | None:
    return None if x.numel() else Reason.EMPTY


FORWARD = LibraryOp("loss", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp(
    "loss_backward", _backward,
    like=_like_backward, torch_form=_torch_backward, decline=_decline_backward,
)  # fmt: skip


class LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
        *options: Any,
    ) -> Tensor:  # fmt: skip
        y, divisor = FORWARD.overload(x, t, weight, pos_weight, *options)
        ctx.save_for_backward(x, t, weight, pos_weight, divisor)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *tensors, divisor = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if differentiating():
            wanted = [*needs, *(False for _ in range(6))]
            return tuple(
                second_derivative("loss", definition, (*tensors, *ctx.options), dy, wanted)
            )
        found = BACKWARD.overload(dy, *tensors, divisor, *ctx.options, needs)
        return *found, None, None, None, None, None, None


def _inference(*args: Any) -> Tensor:
    return FORWARD.overload(*args)[0]


def _needs_torch(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None, *options: Any
) -> Reason | None:
    """Gradients of weights are torch's, and so are targets that are whole numbers."""
    tensors = [u for u in (t, weight, pos_weight) if u is not None]
    if any(u.device != x.device for u in tensors):
        return Reason.DEVICE
    if not all(u.is_floating_point() for u in tensors):
        return Reason.DTYPE
    learned = torch.is_grad_enabled() and any(u.requires_grad for u in tensors[1:])
    return Reason.OPTION if learned else None


OP = Op("loss", definition, LossFunction, _inference, decline=_needs_torch)


def pointwise(
    x: Tensor, t: Tensor, loss: str, reduction: str, a: float = 0.0,
    weight: Tensor | None = None, pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of tensors of one shape, arguments checked before."""
    return OP(x, t, weight, pos_weight, loss, float(a), reduction, autocast_widens(x))
