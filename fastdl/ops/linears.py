"""Linear layers of one input: its products with two or three weights, in one launch."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._finish import Extent, tile_of
from ._launch import Config, Kernel, cdiv, device_of, launch
from ._op import (
    Gradient,
    LibraryOp,
    Op,
    autocast_to_lower,
    differentiating,
    second_derivative,
)
from ._route import Reason
from .linear import GEMM, _tf32, check, choose, layout_of, matrix, measured

LINEARS_FWD = Kernel("linears.linears_fwd")
LINEARS_FINISH = Kernel("linears.linears_finish")
LINEARS_PERSISTENT = Kernel("linears.linears_persistent")

# The kernels take so many weights.
MOST = 3

Three = tuple[Tensor, Tensor, Tensor]


def definition(x: Tensor, *pairs: Tensor | None) -> tuple[Tensor, ...]:
    """x Wᵢᵀ + bᵢ. `pairs` are W₀, b₀, W₁, b₁ ..."""
    return tuple(F.linear(x, w, b) for w, b in zip(*_split(pairs), strict=True))


def _split(pairs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The weights, without the place of one that is not there, and their biases."""
    weights = [w for w in pairs[::2] if w is not None]
    return weights, list(pairs[1::2][: len(weights)])


def _outputs(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


def _three(x: Tensor, outputs: list[Tensor]) -> Any:
    """A schema has a fixed number of results."""
    return *outputs, *(x.new_empty(0) for _ in range(MOST - len(outputs)))


def _like(x: Tensor, *pairs: Any) -> Any:
    return _three(x, _outputs(x, _split(pairs)[0]))


class Operands(NamedTuple):
    """What the kernels take, with something in the place of a third weight that is not there."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    outputs: list[Tensor]
    widths: list[int]


def _operands(weights: list[Tensor], biases: list[Any], outputs: list[Tensor]) -> Operands:
    rest = range(MOST - len(weights))
    return Operands(
        [*weights, *(weights[0] for _ in rest)],
        [*(None if b is None else b.contiguous() for b in biases), *(None for _ in rest)],
        [*outputs, *(outputs[0] for _ in rest)],
        [*(w.shape[0] for w in weights), *(0 for _ in rest)],
    )


def _config(rows: Tensor, weights: list[Tensor], tf32: bool) -> Config:
    """That of one product as wide as all of them, where their rows are alike."""
    if len({w.stride(0) for w in weights}) > 1:
        return GEMM
    layout = layout_of(rows, *weights)
    if layout == "aligned" and any(w.shape[0] % 16 for w in weights):
        layout = "rows"
    N = sum(w.shape[0] for w in weights)
    return choose(len(rows), N, rows.shape[1], rows.dtype, device_of(rows), layout, tf32)


def _forward(
    x: Tensor, w0: Tensor, b0: Tensor | None, w1: Tensor, b1: Tensor | None, w2: Tensor | None,
    b2: Tensor | None,
) -> Three:  # fmt: skip
    (weights, biases), tf32 = _split((w0, b0, w1, b1, w2, b2)), _tf32()
    rows = matrix(x)
    config = _config(rows, weights, tf32)
    if config.variant == "gemm":
        return _torch_forward(x, w0, b0, w1, b1, w2, b2)
    outputs = _outputs(x, weights)
    operands = _operands(weights, biases, outputs)
    if config.variant == "persistent":
        _launch_persistent(rows, operands, config)
    else:
        _launch_tiles(rows, operands, config, tf32)
    return _three(x, outputs)


def _tiles(rows: Tensor, widths: list[int], config: Config) -> int:
    return cdiv(len(rows), config["BLOCK_M"]) * sum(cdiv(n, config["BLOCK_N"]) for n in widths)


def _launch_tiles(rows: Tensor, operands: Operands, config: Config, tf32: bool) -> None:
    weights, biases, outputs, widths = operands
    (M, K), parts = rows.shape, config.splits
    slices = (parts, M, sum(widths))
    partial_sums = rows.new_empty(slices, dtype=torch.float32) if parts > 1 else None
    launch(
        LINEARS_FWD, (_tiles(rows, widths, config), parts),
        rows, *weights, *biases, *outputs, partial_sums,
        M, *widths, K, rows.stride(0), weights[0].stride(0),
        PRECISION="tf32" if tf32 else "ieee", EVEN_K=K % (config["BLOCK_K"] * parts) == 0,
        config=config,
    )  # fmt: skip
    if partial_sums is not None:
        finish = tile_of(Extent(1, M, sum(widths)), 2048, device_of(rows))
        launch(
            LINEARS_FINISH, (_tiles(rows, widths, finish),),
            partial_sums, *biases, *outputs, M, *widths, parts, config=finish,
        )  # fmt: skip


def _launch_persistent(rows: Tensor, operands: Operands, config: Config) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    weights, biases, outputs, widths = operands
    m, n, k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    of_weights = [TensorDescriptor.from_tensor(w, [n, k]) for w in weights]
    launch(
        LINEARS_PERSISTENT, (min(_tiles(rows, widths, config), device_of(rows).sms),),
        TensorDescriptor.from_tensor(rows, [m, k]), *of_weights, *biases, *outputs,
        len(rows), *widths, rows.shape[1], config=config,
    )  # fmt: skip


def _torch_forward(x: Tensor, *pairs: Tensor | None) -> Any:
    return _three(x, [y.contiguous() for y in definition(x, *pairs)])


def _decline(x: Tensor, *pairs: Any) -> Reason | None:
    sizes = [w.shape[0] for w in _split(pairs)[0]]
    return Reason.EMPTY if 0 in (*sizes, x.shape[-1]) else measured(x, sum(sizes))


Gradients = tuple[Gradient, Gradient, Gradient, Gradient, Gradient, Gradient, Gradient]


def _backward(
    x: Tensor, dy0: Tensor | None, w0: Tensor, dy1: Tensor | None, w1: Tensor, dy2: Tensor | None,
    w2: Tensor | None, needs: list[bool],
) -> Gradients:  # fmt: skip
    """`needs` are those of x, W₀, b₀, W₁ ...; none of a weight whose output has no gradient."""
    dx: Tensor | None = None
    found: list[Tensor | None] = []
    for dy, w, of_weight, of_bias in zip(
        (dy0, dy1, dy2), (w0, w1, w2), needs[1::2], needs[2::2], strict=False
    ):
        if dy is None or w is None:
            found += [None, None]
            continue
        dy = matrix(dy)
        if needs[0]:
            # a product is added where the first one lies: no tensor for each, and no sums of them
            dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
        found += [
            torch.mm(dy.t(), matrix(x)) if of_weight else None,
            dy.sum(0) if of_bias else None,
        ]
    return _seven([None if dx is None else dx.view(x.shape), *found])


def _like_backward(x: Tensor, *args: Any) -> Gradients:
    *pairs, needs = args
    shapes = [x.shape]
    for w in pairs[1::2]:
        shapes += [w.shape, w.shape[:1]] if w is not None else []
    return _seven([x.new_empty(s) if n else None for s, n in zip(shapes, needs, strict=True)])


def _seven(found: list[Any]) -> Any:
    return *found, *(None for _ in range(1 + 2 * MOST - len(found)))


FORWARD = LibraryOp("linears", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp("linears_backward", _backward, like=_like_backward, torch_form=_backward)


def _inference(x: Tensor, *pairs: Tensor | None) -> tuple[Tensor, ...]:
    """Of the schema's results those that there is a weight for."""
    missing = (None for _ in range(2 * MOST - len(pairs)))
    return FORWARD.overload(x, *pairs, *missing)[: len(pairs) // 2]


class LinearsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *pairs: Tensor | None) -> tuple[Tensor, ...]:
        # where all weights are frozen, only the shape of x is asked for
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, *pairs)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return _inference(x, *pairs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, *pairs = ctx.saved_tensors
        if x is None:
            x = pairs[0].new_zeros((), requires_grad=True).expand(ctx.shape)
        into_x, *into = ctx.needs_input_grad
        sent = [dy is not None for dy in dys]
        needs = [into_x and any(sent), *(need and sent[i // 2] for i, need in enumerate(into))]
        if not any(needs):
            return (None,) * len(needs)
        if differentiating():
            used = partial(_used, sent)
            backs = [dy for dy in dys if dy is not None]
            return tuple(second_derivative("linears", used, (x, *pairs), backs, needs))
        given = [t for pair in zip(dys, pairs[::2], strict=True) for t in pair]
        missing = (None for _ in range(2 * MOST - len(given)))
        return BACKWARD.overload(x, *given, *missing, needs)[: len(needs)]


def _used(sent: list[bool], x: Tensor, *pairs: Tensor | None) -> list[Tensor]:
    """The outputs that have a gradient."""
    return [y for y, there in zip(definition(x, *pairs), sent, strict=True) if there]


OP = Op("linears", definition, LinearsFunction, _inference)


def linears(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """input @ weight.T + bias for each of two or three weights, which may be of different widths:
    queries, keys and values, or gate and up, in one launch, without a copy of the weights.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not 2 <= len(weights) <= MOST or len(biases) != len(weights):
        raise RuntimeError(
            f"linears: got {len(weights)} weights and {len(biases)} biases; allowed are 2 to {MOST}"
            " weights, and a bias or None for each"
        )
    input, *pairs = autocast_to_lower(
        input, *(t for pair in zip(weights, biases, strict=True) for t in pair)
    )
    for weight, bias in zip(pairs[::2], pairs[1::2], strict=True):
        check("linears", input, weight, bias)
    return OP(input, *pairs)
