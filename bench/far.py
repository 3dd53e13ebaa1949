"""Tensors of more than 2**31 elements: offsets that need 64 bits, on real memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdl
import fastdl.functional as FF
from bench.machine import Host
from bench.store import Row
from fastdl.contract.evaluate import FORWARD, GRADIENT, compare

ELEMENTS = 2**31 + 2**20

Call = Callable[..., Tensor]


class Far(NamedTuple):
    """An op whose rows (along the first dimension) are on their own: `call` takes them and what
    `beside` has for each. The larger of a row's input and output has `size` elements.
    """

    row: tuple[int, ...]
    call: Call
    size: int
    beside: Callable[[int, str], Tensor] | None = None
    backward: bool = True


def _weight(x: Tensor, *shape: int) -> Tensor:
    """The same values at each call, and wherever rows stop."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16().to(x)


def _upstream(y: Tensor) -> Tensor:
    """The same gradient for each row."""
    return (_weight(y, *y.shape[1:]) if y.dim() > 1 else torch.ones_like(y[:1])).expand_as(y)


def _classes(count: int) -> Callable[[int, str], Tensor]:
    return lambda rows, device: torch.arange(rows, device=device) * 7919 % count


def _rows(width: int, call: Call, **options: Any) -> Far:
    return Far((width,), call, width, **options)


def _image(call: Call) -> Far:
    return Far((32, 16, 16), call, 32 * 16 * 16)


def _turned(x: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, 16 * 64, device=x.device).view(16, 64)
    return FF.apply_rotary_emb(x, angles.cos(), angles.sin())


def _recurrent(x: Tensor) -> Tensor:
    weights = [_weight(x, 3 * 64, 64) for _ in range(2)]
    return FF.gru(x, None, weights, batch_first=True)[0]


CASES = {
    "activation": _rows(4096, FF.gelu),
    "glu": _rows(4096, FF.glu),
    "layer_norm": _rows(4096, lambda x: FF.layer_norm(x, (4096,), _weight(x, 4096))),
    "rms_norm": _rows(4096, lambda x: FF.rms_norm(x, (4096,), _weight(x, 4096))),
    "softmax": _rows(4096, lambda x: FF.softmax(x, -1)),
    "softmax of long rows": _rows(1 << 16, lambda x: FF.softmax(x, -1)),
    "linear, many rows": _rows(64, lambda x: FF.linear(x, _weight(x, 16, 64), activation="gelu")),
    "linear, large output": Far(
        (64,), lambda x: FF.linear(x, _weight(x, 4096, 64), activation="gelu"), 4096
    ),
    "linears": Far((64,), lambda x: FF.linears(x, [_weight(x, 2048, 64)] * 2)[1], 2048),
    "group_norm": _image(lambda x: FF.group_norm(x, 8, activation="silu")),
    "instance_norm": _image(FF.instance_norm),
    "batch_norm": _image(
        lambda x: FF.batch_norm(x, torch.zeros(32).to(x), torch.ones(32).to(x), activation="relu")
    ),
    "conv": _image(lambda x: FF.conv2d(x, _weight(x, 32, 32, 3, 3), padding=1, activation="relu")),
    "causal_conv1d": Far((64, 64), lambda x: FF.causal_conv1d(x, _weight(x, 64, 4)), 64 * 64),
    "attention": Far(
        (2, 32, 64),
        lambda x: FF.scaled_dot_product_attention(x, x, x, is_causal=True),
        2 * 32 * 64,
    ),
    "rotary": Far((2, 16, 64), _turned, 2 * 16 * 64),
    "gru": Far((8, 64), _recurrent, 8 * 64),
    "cross_entropy": _rows(
        4096, lambda x, y: FF.cross_entropy(x, y, reduction="none"), beside=_classes(4096)
    ),
    "nll_loss": _rows(
        4096, lambda x, y: FF.nll_loss(x, y, reduction="none"), beside=_classes(4096)
    ),
    "losses": _rows(4096, lambda x: FF.mse_loss(x, x.detach().flip(-1), reduction="none")),
    "embedding": Far(
        (1,),
        lambda x, ids: FF.embedding(ids, _weight(x, 512, 4096)),
        4096,
        beside=_classes(512),
        backward=False,
    ),
}


def check(case: Far, machine: Host, elements: int, dtype: torch.dtype = torch.bfloat16) -> Row:
    """All rows at once, then some of them, from both ends and around element 2**31, by themselves:
    held against the definition by the rule of the contract.
    """
    rows = -(-elements // case.size)
    x = torch.empty(rows, *case.row, dtype=dtype, device=machine.device)
    torch.manual_seed(0)
    x.normal_().requires_grad_(case.backward)
    beside = [] if case.beside is None else [case.beside(rows, machine.device)]
    with fastdl.policy("fused", on_fallback="error"):
        y = case.call(x, *beside)
        dx = torch.autograd.grad(y, x, _upstream(y))[0] if case.backward else None
    middle = elements // 2 if elements < 2**31 else 2**31
    places = sorted({0, 1, rows // 2, middle // case.size - 1, middle // case.size, rows - 1})
    picked = torch.tensor([p for p in places if 0 <= p < rows], device=machine.device)
    ours = [y[picked].detach()], [] if dx is None else [dx[picked]]
    del y, dx
    theirs = [
        _defined(case, x.detach()[picked].to(kind), [b[picked] for b in beside])
        for kind in (dtype, torch.float64)
    ]
    for what, index, factor in (("output", 0, FORWARD), ("gradient", 1, GRADIENT)):
        found = compare(ours[index], theirs[0][index], theirs[1][index], factor)
        if not found.ok:
            says = f"{what} off by {found.ours:.2e}, allowed is {found.allowed:.2e}"
            return {"ok": False, "says": says, "rows": rows}
    return {
        "ok": True,
        "says": f"{rows} rows, {len(picked)} of them as the definition",
        "rows": rows,
    }


def _defined(case: Far, x: Tensor, beside: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    x = x.requires_grad_(case.backward)
    with fastdl.policy("definition"):
        y = case.call(x, *beside)
    if not case.backward:
        return [y], []
    return [y.detach()], [*torch.autograd.grad(y, x, _upstream(y))]
