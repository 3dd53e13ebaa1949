"""An LSTM with layer norms: all steps of one layer in one direction, as one op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, is_dry, launch, power_of_2
from ._op import LibraryOp, Op, differentiating, empty_gradients, gradients, second_derivative
from ._route import Reason
from .linear import _tf32
from .rnn_launch import walks

FWD = Kernel("rnn_norm.norm_lstm_fwd")
BWD = Kernel("rnn_norm.norm_lstm_bwd")

# Units of a row that one program holds.
WIDEST = 2048

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def step(
    x: Tensor, h: Tensor, c: Tensor, weight: Tensor, gain: Tensor, bias: Tensor,
    c_gain: Tensor, c_bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The new h and c; and the product, the gates, and the new c before its norm."""
    p = F.linear(h, weight)
    z = x + F.layer_norm(p, p.shape[-1:], gain, bias, eps)
    i, f, g, o = z.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    u = f * c + i * g
    c = F.layer_norm(u, u.shape[-1:], c_gain, c_bias, eps)
    return o * c.tanh(), c, (p, torch.cat((i, f, g, o), -1), u)


def definition(
    xp: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, gain: Tensor, bias: Tensor,
    c_gain: Tensor, c_bias: Tensor, eps: float, reverse: bool,
) -> Any:  # fmt: skip
    """h of all steps, the last h and the last c, these in float32 at least."""
    y, h, c, *_ = _walk(xp, h0, c0, weight, gain, bias, c_gain, c_bias, eps, reverse)
    return y, h, c


def _walk(
    xp: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, gain: Tensor, bias: Tensor,
    c_gain: Tensor, c_bias: Tensor, eps: float, reverse: bool,
) -> Outputs:  # fmt: skip
    """Step by step, with all that is kept."""
    h, c, found = h0, c0, []
    for x in reversed(xp.unbind()) if reverse else xp.unbind():
        h, c, kept = step(x, h, c, weight, gain, bias, c_gain, c_bias, eps)
        found.append((h, *kept))
    wide = torch.promote_types(xp.dtype, torch.float32)
    found = found[::-1] if reverse else found
    y, p, gates, u = (torch.stack(parts) for parts in zip(*found, strict=True))
    (p, p_rstd), (u, u_rstd) = _normalized(p.to(wide), eps), _normalized(u.to(wide), eps)
    return y, h.to(wide), c.to(wide), u, p, gates, torch.cat((p_rstd, u_rstd), -1)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (x - mean) * rstd, rstd


def choose(H: int, dtype: torch.dtype, device: Device) -> Config:
    """All steps in one launch where the weight fits on the chip, else a launch for each step."""
    small, units = device.backend == "interpreter", max(16, power_of_2(H))
    if walks("lstm", H, dtype, device):
        blocks = {"BLOCK_B": 4 if small else 16, "BLOCK_H": units}
        return Config(blocks, 8 if units >= 64 else 4, 1, variant="walk")
    blocks = {"BLOCK_B": 4 if small else max(1, 1024 // units), "BLOCK_H": units}
    return Config(blocks, max(4, min(16, units // 128)), 1, variant="steps")


def _like(xp: Tensor, h0: Tensor, *args: Any) -> Outputs:
    keep = args[-1]
    T, B, G = xp.shape
    h, c = (h0.new_empty(h0.shape, dtype=torch.float32) for _ in range(2))
    y = xp.new_empty((T, B, G // 4))
    shapes: list[Any] = [(T, B, G // 4), (T, B, G), (T, B, G)] if keep else [0, 0, 0]
    c_hat, p_hat, gates = (xp.new_empty(shape) for shape in shapes)
    rstd = xp.new_empty((T, B, 2) if keep else 0, dtype=torch.float32)
    return y, h, c, c_hat, p_hat, gates, rstd


def _forward(
    xp: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, gain: Tensor, bias: Tensor,
    c_gain: Tensor, c_bias: Tensor, eps: float, reverse: bool, keep: bool,
) -> Outputs:  # fmt: skip
    out = _like(xp, h0, keep)
    (T, B, _), H = xp.shape, h0.shape[1]
    dense = [t.contiguous() for t in (xp, h0, c0, weight, gain, bias, c_gain, c_bias)]
    xp, h0, c0, weight, *factors = dense
    y, hn, cn, *kept = out
    config = choose(H, xp.dtype, device_of(xp))

    def run(h: Tensor, c: Tensor, p: Tensor | None, begin: int, end: int) -> None:
        launch(
            FWD, (cdiv(B, config["BLOCK_B"]),),
            xp, h, c, weight if p is None else None, p, *factors,
            y, *(kept if keep else [None] * 4), hn, cn, begin, end, T, B, H, eps,
            REVERSE=reverse, PRECISION="tf32" if _tf32() else "ieee", config=config,
        )  # fmt: skip

    if config.variant == "walk":
        run(h0, c0, None, 0, T)
        return out
    cn.copy_(c0)
    for i in range(1 if is_dry() else T):
        h = h0 if i == 0 else y[T - i if reverse else i - 1]
        run(h, cn, h @ weight.t(), i, i + 1)
    return out


def _torch_forward(xp: Tensor, h0: Tensor, *args: Any) -> Outputs:
    *rest, keep = args
    out = _like(xp, h0, keep)
    if xp.numel():
        for mine, other in zip(out, _walk(xp, h0, *rest), strict=True):
            if mine.numel():
                mine.copy_(other)
    return out


def _decline(xp: Tensor, h0: Tensor, *args: Any) -> Reason | None:
    return Reason.SIZE if h0.shape[1] > WIDEST else None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _like_backward(dy: Tensor, dhn: Tensor, dcn: Tensor, *rest: Any) -> Gradients:
    return empty_gradients(rest[:8], rest[-1])


def _backward(
    dy: Tensor, dhn: Tensor, dcn: Tensor, xp: Tensor, h0: Tensor, c0: Tensor, weight: Tensor,
    gain: Tensor, bias: Tensor, c_gain: Tensor, c_bias: Tensor, y: Tensor, c_hat: Tensor,
    p_hat: Tensor, gates: Tensor, rstd: Tensor, eps: float, reverse: bool, needs: list[bool],
) -> Gradients:  # fmt: skip
    (T, B, _), H = xp.shape, h0.shape[1]
    config = choose(H, xp.dtype, device_of(xp))
    programs = cdiv(B, config["BLOCK_B"])
    d = torch.empty_like(xp, memory_format=torch.contiguous_format)
    dp = torch.empty_like(d)
    dh, dc = (h0.new_empty(h0.shape, dtype=torch.float32).copy_(g) for g in (dhn, dcn))
    sums = dh.new_empty((programs, 2, H)).zero_()
    dense = [t.contiguous() for t in (weight, gain, c_gain, c_bias)]
    dy, weight, c0 = dy.contiguous(), dense[0], c0.contiguous()

    def run(w: Tensor | None, begin: int, end: int) -> None:
        launch(
            BWD, (programs,),
            dy, dh, dc, c0, w, *dense[1:], c_hat, p_hat, gates, rstd, d, dp, dh, dc, sums,
            begin, end, T, B, H,
            REVERSE=reverse, PRECISION="tf32" if _tf32() else "ieee", config=config,
        )  # fmt: skip

    if config.variant == "walk":
        run(weight, 0, T)
    else:
        for i in range(1 if is_dry() else T):
            run(None, i, i + 1)
            dh.copy_(dp[i if reverse else T - 1 - i] @ weight)
    before = torch.cat((y[1:], h0[None]) if reverse else (h0[None], y[:-1]))
    ways = (
        lambda: d,
        lambda: dh.to(h0.dtype),
        lambda: dc.to(c0.dtype),
        lambda: dp.flatten(0, 1).t() @ before.flatten(0, 1),
        lambda: (d.to(torch.float32) * p_hat).sum((0, 1)).to(gain.dtype),
        lambda: d.sum((0, 1)),
        lambda: sums[:, 0].sum(0).to(c_gain.dtype),
        lambda: sums[:, 1].sum(0).to(c_bias.dtype),
    )
    made: Any = (way() if need else None for way, need in zip(ways, needs, strict=True))
    return tuple(made)


def _torch_backward(dy: Tensor, dhn: Tensor, dcn: Tensor, *rest: Any) -> Gradients:
    *_, eps, reverse, needs = rest
    args = (*rest[:8], eps, reverse)
    return tuple(gradients(definition, args, (dy, dhn, dcn), [*needs, False, False])[:8])


FORWARD = LibraryOp(
    "layer_norm_lstm", _forward, like=_like, torch_form=_torch_forward, decline=_decline
)
BACKWARD = LibraryOp(
    "layer_norm_lstm_backward", _backward, like=_like_backward, torch_form=_torch_backward,
    decline=lambda dy, dhn, dcn, xp, h0, *args: _decline(xp, h0),
)  # fmt: skip


class LayerNormLSTMFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, eps, reverse = args
        y, hn, cn, *kept = FORWARD.overload(*args, True)
        ctx.save_for_backward(*inputs, y, *kept)
        ctx.options = eps, reverse
        return y, hn, cn

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dhn: Tensor, dcn: Tensor) -> Any:
        saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:8])
        if differentiating():
            args = (*saved[:8], *ctx.options)
            wanted = [*needs, False, False]
            grads = (dy, dhn, dcn)
            return tuple(second_derivative("layer_norm_lstm", definition, args, grads, wanted))
        return *BACKWARD.overload(dy, dhn, dcn, *saved, *ctx.options, needs), None, None


def _inference(*args: Any) -> Any:
    return FORWARD.overload(*args, False)[:3]


OP = Op("layer_norm_lstm", definition, LayerNormLSTMFunction, _inference)
