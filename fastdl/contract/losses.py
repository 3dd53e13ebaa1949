"""The contract of losses of each element."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF, nn as fnn
from .case import BadCall, BenchCase, Case, Maker, Spec

Make = Callable[[Maker], "partial[Any]"]


def factors(t: Maker, *shape: int) -> Tensor:
    """Positive weights, no two neighbours alike, which take no gradient."""
    if t.device == "meta":
        return torch.empty(shape, dtype=t.dtype, device="meta")
    at = torch.arange(torch.Size(shape).numel())  # vmap forbids to draw
    return (at * 5 % 7 / 4 + 0.25).view(shape).to(device=t.device, dtype=t.dtype)


def call(
    op: Any, *shape: int, target: tuple[int, ...] | None = None, zeros: bool = False,
    like: tuple[float, float] = (1.0, 0.0), frozen: bool = False, wide: bool = False,
    weight: tuple[int, ...] | None = None, pos_weight: tuple[int, ...] | None = None,
    **options: Any,
) -> Make:  # fmt: skip
    """`like` is the scale and shift of the target; `frozen` is one without a gradient, `zeros` one
    that is 0 in half of its elements besides, `wide` one of float32 at least.
    """

    def make(t: Maker) -> "partial[Any]":
        x, given = t(*shape), dict(options)
        scale, shift = like
        y = t(*(target or shape), scale=scale, shift=shift)
        y = y.detach() if frozen or zeros else y
        y = y.relu() if zeros else y
        y = y.to(torch.promote_types(y.dtype, torch.float32)) if wide else y
        for name, of in (("weight", weight), ("pos_weight", pos_weight)):
            if of is not None:
                given[name] = factors(t, *of)
        return partial(op, x, y, **given)

    return make


# Probabilities, which are far enough from 0.
SHARE = (0.1, 0.6)
BCE: Any = partial(call, FF.binary_cross_entropy_with_logits, like=SHARE)
KL: Any = partial(call, FF.kl_div, like=SHARE)
MSE: Any = partial(call, FF.mse_loss)
LOG: dict[str, Any] = {"log_target": True, "like": (1.0, 0.0)}

CASES = [
    Case("squares", "the tail of the last block", MSE(5, 83), core=True, spelled=True),
    Case("squares, each", "strides of the output, and a gradient for each element", MSE(2, 5, 3, 7, reduction="none"), core=True, exact=True, spelled=True),
    Case("squares, many", "programs that take several blocks", MSE(19, 200, like=(1.0, 0.5), frozen=True), spelled=True),
    Case("squares, weighted", "a mean over weights", MSE(3, 67, weight=(3, 67))),
    Case("squares, weighted, broadcast", "weights that stand for several elements", MSE(1, 9, target=(4, 9), weight=(1, 9))),
    Case("squares of another dtype", "the dtype of either gradient", MSE(3, 50, wide=True, reduction="none")),
    Case("distances", "signs", call(FF.l1_loss, 11, 13, reduction="sum"), exact=True, spelled=True),
    Case("distances, weighted", "the weight in both passes", call(FF.l1_loss, 150, weight=(150,), reduction="sum")),
    Case("distances, broadcast", "gradients summed over what broadcasts", call(FF.l1_loss, 3, 40, target=(40,))),
    Case("smooth", "both pieces", call(FF.smooth_l1_loss, 150, beta=0.7), spelled=True),
    Case("smooth, no beta", "no square at all", call(FF.smooth_l1_loss, 40, beta=0.0, reduction="none")),
    Case("Huber", "both pieces", call(FF.huber_loss, 150, delta=0.7, reduction="none"), spelled=True),
    Case("Huber, weighted", "a mean over elements", call(FF.huber_loss, 4, 33, weight=(4, 33), delta=1.5)),
    Case("divergence", "logarithms, and sizes of the batch", KL(6, 31, reduction="batchmean"), spelled=True),
    Case("divergence, mean", "a mean over elements, and targets of 0", KL(4, 9, zeros=True, like=(1.0, 0.0))),
    Case("divergence of logarithms", "exponentials", KL(6, 31, reduction="none", **LOG), spelled=True),
    Case("entropy", "logits", BCE(3, 71), core=True, spelled=True),
    Case("entropy, weighted", "weights of columns and of rows", BCE(9, 35, weight=(9, 1), pos_weight=(35,)), spelled=True),
    Case("entropy of channels", "weights in the middle, elements beside them, and all of them", BCE(2, 5, 7, 6, weight=(2, 5, 7, 6), pos_weight=(5, 1, 1), reduction="none")),
    Case("entropy, two gaps", "weights that do not repeat in one piece", BCE(4, 5, 9, weight=(4, 1, 9), pos_weight=(1,), reduction="sum")),
    Case("one element", "no dimensions", MSE(reduction="none")),
]  # fmt: skip

EMPTY = [
    Case("no elements", "a mean of nothing", MSE(0, 3)),
    Case("no elements, each", "no launch", MSE(0, 3, reduction="none")),
]

X = torch.ones(2, 4)
BAD_CALLS: list[BadCall] = []


def bad(name: str, op: str, *args: Any, says: tuple[str, ...], **options: Any) -> None:
    def run(function: Any) -> Callable[[], Any]:
        def call() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of shapes
                return function(*args, **options)

        return call

    BAD_CALLS.append(BadCall(name, run(getattr(FF, op)), run(getattr(F, op)), says))


BINARY = "binary_cross_entropy_with_logits"
for _op in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"):
    bad("shapes", _op, X, torch.ones(3), says=(_op, "(2, 4)", "(3,)"))
for _op in ("mse_loss", "huber_loss", "kl_div", BINARY):
    bad("reduction", _op, X, X, reduction="max", says=(_op, "'max'", "none", "mean", "sum"))
for _op in ("mse_loss", "l1_loss", "huber_loss"):
    bad("weight", _op, X, X, weight=torch.ones(4), says=(_op, "(2, 4)", "(4,)"))
bad("beta", "smooth_l1_loss", X, X, beta=-1.0, says=("-1.0", "negative"))
bad("delta", "huber_loss", X, X, delta=0.0, says=("0.0", "positive"))
bad("shapes of logits", BINARY, X, torch.ones(4), says=("(2, 4)", "(4,)"))
bad("pos weight", BINARY, X, X, pos_weight=torch.ones(3), says=("pos_weight", "(3,)", "(2, 4)"))
bad("weight of logits", BINARY, X, X, torch.ones(3), says=("weight", "(3,)", "(2, 4)"))


CLASSES = "MSELoss L1Loss SmoothL1Loss HuberLoss KLDivLoss BCEWithLogitsLoss"


class Against(nn.Module):
    """A loss of an input against another one, which depends on it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Any:
        return self.loss(x, x.sigmoid().roll(1))


def against(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: (
        Against(getattr(fnn, name)(**options)),
        Against(getattr(nn, name)(**options)),
        torch.randn(3, 4),
    )


N = 1 << 26


def bench(op: Any, words: str = "", backward: bool = False, **options: Any) -> BenchCase:
    """Forward reads two; backward reads them and writes one. The target takes no gradient."""
    name = " ".join(filter(None, (f"64M {op.__name__}", words, "backward" if backward else "")))
    each, columns = options.get("reduction") == "none", options.pop("columns", False)
    tensors = (3 if each else 2) + ((4 if each else 3) if backward else 0)

    def make(t: Maker) -> "partial[Any]":
        x = t(N // 4096, 4096)
        given = {**options, "pos_weight": factors(t, 4096)} if columns else options
        return partial(op, x, t.values(x.shape, *SHARE), **given)

    return BenchCase(name, make, 2 * tensors * N, 0, backward=backward)


SPEC = Spec(
    "losses",
    CASES,
    ("loss", "loss_backward"),
    empty=EMPTY,
    bad_calls=BAD_CALLS,
    signatures=[
        (getattr(FF, name), getattr(F, name))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", BINARY)
    ]
    + [(getattr(fnn, name), getattr(nn, name)) for name in CLASSES.split()],
    modules=[
        against("MSELoss", reduction="sum"),
        against("L1Loss"),
        against("SmoothL1Loss", beta=0.5),
        against("HuberLoss", delta=0.5),
        against("KLDivLoss", reduction="batchmean", log_target=True),
        against("BCEWithLogitsLoss", pos_weight=torch.arange(4.0)),
    ],
    one_pass=[
        Case("mean", "", MSE(300, 64)),
        Case("each", "", call(FF.huber_loss, 300, 64, reduction="none")),
        Case("logits", "", BCE(300, 64)),
    ],
    bench=[
        bench(FF.mse_loss),
        bench(FF.mse_loss, backward=True),
        bench(FF.huber_loss, "each", reduction="none"),
        bench(FF.kl_div, backward=True, reduction="batchmean"),
        bench(FF.binary_cross_entropy_with_logits, backward=True),
        bench(FF.binary_cross_entropy_with_logits, "pos_weight", backward=True, columns=True),
    ],
)  # fmt: skip
