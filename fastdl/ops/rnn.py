"""Recurrent layers: all steps of one layer in one direction, as one op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _route
from ._op import Gradient, LibraryOp, differentiating, empty_gradients, gradients, second_derivative
from .rnn_launch import KEPT, hidden_gradient, launch_backward, launch_forward, previous, sizes_of

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def step(
    x: Tensor, h: Tensor, c: Tensor | None, weight: Tensor, bias: Tensor | None, mode: str
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The new h and c, and what is kept of gates, of the input's product and the old h and c."""
    p = F.linear(h, weight, bias)
    if mode == "lstm":
        assert c is not None
        i, f, g, o = (x + p).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, (i, f, g, o)
    if mode == "gru":
        (x_r, x_z, x_n), (p_r, p_z, p_n) = x.chunk(3, -1), p.chunk(3, -1)
        r, z = (x_r + p_r).sigmoid(), (x_z + p_z).sigmoid()
        n = (x_n + r * p_n).tanh()
        return n + z * (h - n), None, (r, z, n, p_n)
    return ((x + p).tanh() if mode == "tanh" else (x + p).relu()), None, ()


def definition(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool,
) -> Any:  # fmt: skip
    """h of all steps, one behind the other, the last h, and the last c of an LSTM.

    The last ones are in float32 at least: the sum of steps is, too, in an LSTM's c.
    """
    y, h, c, _, _ = _walk(xp, h0, c0, weight, bias, batch_sizes, mode, reverse)
    return (y, h) if c is None else (y, h, c)


def _walk(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Step by step, with all that is kept."""
    sizes = sizes_of(xp, h0, batch_sizes)
    inputs, h, c = xp.split(sizes), h0, c0
    found: list[Any] = [None] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        new_h, new_c, gates = step(
            inputs[t], h[:n], None if c is None else c[:n], weight, bias, mode
        )
        found[t] = new_h, new_c, torch.cat(gates, -1) if gates else None
        h, c = _over(new_h, h), None if new_c is None or c is None else _over(new_c, c)
    ys, cs, gates = zip(*found, strict=True)
    wide = torch.promote_types(xp.dtype, torch.float32)
    return (
        torch.cat(ys), h.to(wide), None if c is None else c.to(wide),
        None if c is None else torch.cat(cs), torch.cat(gates) if KEPT[mode] else None,
    )  # fmt: skip


def _over(new: Tensor, old: Tensor) -> Tensor:
    """Sequences that are over, or have yet to begin, keep what they have."""
    return new if len(new) == len(old) else torch.cat((new, old[len(new) :]))


def _like(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool, keep: bool,
) -> Outputs:  # fmt: skip
    N, H = xp.shape[0], h0.shape[1]
    nothing = xp.new_empty(0)
    return (
        xp.new_empty((N, H)),
        h0.new_empty(h0.shape, dtype=torch.float32),
        nothing if c0 is None else c0.new_empty(c0.shape, dtype=torch.float32),
        nothing.clone() if c0 is None or not keep else xp.new_empty((N, H)),
        xp.new_empty((N, KEPT[mode] * H)) if keep and KEPT[mode] else nothing.clone(),
    )


def _forward(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool, keep: bool,
) -> Outputs:  # fmt: skip
    out = _like(xp, h0, c0, weight, bias, batch_sizes, mode, reverse, keep)
    launch_forward(
        xp.contiguous(), h0.contiguous(), _dense(c0), weight.contiguous(), _dense(bias),
        None if batch_sizes is None else batch_sizes.tolist(), mode, reverse,
        [t if t.numel() else None for t in out],
    )  # fmt: skip
    return out


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _torch_forward(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool, keep: bool,
) -> Outputs:  # fmt: skip
    out = _like(xp, h0, c0, weight, bias, batch_sizes, mode, reverse, keep)
    found = _walk(xp, h0, c0, weight, bias, batch_sizes, mode, reverse)
    for mine, other in zip(out, found, strict=True):
        if mine.numel():
            mine.copy_(other)
    return out


Gradients = tuple[Gradient, Gradient, Gradient, Gradient, Gradient]


def _like_backward(dy: Tensor, dhn: Tensor, dcn: Any, *rest: Any) -> Gradients:
    return empty_gradients(rest[:5], rest[-1])


def _backward(
    dy: Tensor, dhn: Tensor, dcn: Tensor | None, xp: Tensor, h0: Tensor, c0: Tensor | None,
    weight: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, gates: Tensor,
    batch_sizes: Tensor | None, mode: str, reverse: bool, needs: list[bool],
) -> Gradients:  # fmt: skip
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    d, h0 = torch.empty_like(xp, memory_format=torch.contiguous_format), h0.contiguous()
    dn = torch.empty_like(y) if mode == "gru" else None
    dh = h0.new_empty(h0.shape, dtype=torch.float32)
    dc = None if c0 is None else torch.empty_like(dh)
    launch_backward(
        (dy.contiguous(), dhn.contiguous(), _dense(dcn)), (h0, _dense(c0)), weight.contiguous(),
        (y, c if c.numel() else None, gates if gates.numel() else None),
        sizes, mode, reverse, (d, dn, dh, dc),
    )  # fmt: skip
    hidden = hidden_gradient(d, dn)
    dweight = dbias = None
    if needs[3]:
        before = previous(y, h0, sizes, reverse)
        dweight = torch.cat([part.t() @ before for part in hidden])
    if needs[4]:
        dbias = torch.cat([part.sum(0) for part in hidden])
    return (
        d if needs[0] else None,
        dh.to(h0.dtype) if needs[1] else None,
        dc.to(h0.dtype) if needs[2] and dc is not None else None,
        dweight,
        dbias,
    )


def _torch_backward(dy: Tensor, dhn: Tensor, dcn: Tensor | None, *rest: Any) -> Gradients:
    *given, _, _, _, batch_sizes, mode, reverse, needs = rest
    grads = (dy, dhn) if dcn is None else (dy, dhn, dcn)
    args = (*given, batch_sizes, mode, reverse)
    return tuple(gradients(definition, args, grads, [*needs, False, False, False])[:5])


FORWARD = LibraryOp("recurrence", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp(
    "recurrence_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class RecurrenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
        batch_sizes: Tensor | None, mode: str, reverse: bool,
    ) -> Any:  # fmt: skip
        y, hn, cn, c, gates = FORWARD.overload(
            xp, h0, c0, weight, bias, batch_sizes, mode, reverse, True
        )
        ctx.save_for_backward(xp, h0, c0, weight, bias, y, c, gates, batch_sizes)
        ctx.options = mode, reverse
        return (y, hn) if c0 is None else (y, hn, cn)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dhn: Tensor, dcn: Tensor | None = None) -> Any:
        *inputs, y, c, gates, batch_sizes = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if differentiating():
            args = (*inputs, batch_sizes, *ctx.options)
            grads = (dy, dhn) if dcn is None else (dy, dhn, dcn)
            wanted = [*needs, False, False, False]
            return tuple(second_derivative("recurrence", definition, args, grads, wanted))
        found = BACKWARD.overload(
            dy, dhn, dcn, *inputs, y, c, gates, batch_sizes, *ctx.options, needs
        )
        return *found, None, None, None


def _inference(xp: Tensor, h0: Tensor, c0: Tensor | None, *args: Any) -> Any:
    y, hn, cn, _, _ = FORWARD.overload(xp, h0, c0, *args, False)
    return (y, hn) if c0 is None else (y, hn, cn)


def recurrence(
    xp: Tensor, h0: Tensor, c0: Tensor | None, weight: Tensor, bias: Tensor | None,
    batch_sizes: Tensor | None, mode: str, reverse: bool,
) -> Any:  # fmt: skip
    """Run the fused form where it may run, else the definition: as Op, but for batch_sizes, which
    stay on the CPU.
    """
    tensors = [t for t in (xp, h0, c0, weight, bias) if t is not None]
    args = (xp, h0, c0, weight, bias, batch_sizes, mode, reverse)
    if _route.decide("recurrence", *tensors) is not None:
        return definition(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return RecurrenceFunction.apply(*args)
    return _inference(*args)
