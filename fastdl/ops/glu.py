"""Gated linear units: value act(gate), of two tensors or of the halves of one."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    LibraryOp,
    Op,
    copied,
    differentiating,
    empty_gradients,
    gradients,
    second_derivative,
)
from ._strides import merged
from .activation import Activations, apply_definition, lower

GLU_FWD = Kernel("glu.glu_fwd")
GLU_BWD = Kernel("glu.glu_bwd")


def definition(
    x: Tensor, gate: Tensor | None, dim: int, gate_first: bool, name: str, a: float, b: float
) -> Tensor:
    """x act(gate). Without a gate, that of the halves of x: the first is the value, or the gate."""
    if gate is None:
        x, gate = _in_order(x.chunk(2, dim), gate_first)
    return x * apply_definition(gate, name, a, b)


def vendor(
    x: Tensor, gate: Tensor | None, dim: int, gate_first: bool, name: str, a: float, b: float
) -> Tensor | None:
    return F.glu(x, dim) if name == "sigmoid" and gate is None and not gate_first else None


def _in_order(halves: Any, gate_first: bool) -> Any:
    """(value, gate)."""
    return halves[::-1] if gate_first else halves


def _views(x: Tensor, gate: Tensor | None, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), where the size of x is known to be even."""
    if gate is not None:
        return x, gate
    half = x.shape[dim] // 2
    return _in_order((x.narrow(dim, 0, half), x.narrow(dim, half, half)), gate_first)


def _like(x: Tensor, gate: Tensor | None, dim: int, gate_first: bool, *act: Any) -> Tensor:
    return torch.empty_like(_views(x, gate, dim, gate_first)[0])


class Walk(NamedTuple):
    """Tensors as rows of columns, with a stride of the rows each. Columns lie side by side."""

    tensors: list[Tensor | None]
    sizes: tuple[int, int]
    strides: tuple[int, ...]


def _walk(like: Tensor, inputs: list[Tensor], outputs: Sequence[Tensor | None]) -> Walk:
    """In the order of memory of `like`, a new tensor or a half of one. Copies inputs only if rows
    of theirs do not fit.
    """
    steps = like.stride()
    order = sorted(range(like.dim()), key=lambda i: steps[i], reverse=True)
    shape = [like.shape[i] for i in order]
    ins = [t.permute(order) for t in inputs]
    outs = [None if t is None else t.permute(order) for t in outputs]
    dims = _rows_and_columns(shape, [*ins, *outs])
    if dims is None:
        ins = [t.contiguous() for t in ins]
        dims = _rows_and_columns(shape, [*ins, *outs])
        assert dims is not None, "outputs are dense, or the halves of what is"
    (n_rows, *strides), (n_cols, *_) = dims
    return Walk([*ins, *outs], (n_rows, n_cols), tuple(strides))


def _rows_and_columns(shape: list[int], tensors: Sequence[Tensor | None]) -> list[Any] | None:
    """Two dimensions, the strides of the second all 1; None if there are more."""
    none = (0,) * len(shape)
    dims = merged(shape, *(none if t is None else t.stride() for t in tensors))
    given = [i for i, t in enumerate(tensors) if t is not None]
    nothing = tuple(0 for _ in tensors)
    if not dims or any(dims[-1][1 + i] != 1 for i in given):
        dims.append((1, *nothing))
    return [(1, *nothing), *dims][-2:] if len(dims) <= 2 else None


@functools.lru_cache(maxsize=1024)
def choose(n_cols: int, device: Device) -> Config:
    """8 elements a thread: 16 bytes of 16-bit types. Blocks are as wide as can be with less than an
    eighth of them past the end of rows.
    """
    small = device.backend == "interpreter"
    tile, block, least = (128, 32, 8) if small else (1024, 1024, 128)
    block = min(power_of_2(n_cols), block)
    while block > least and 8 * cdiv(n_cols, block) * block > 9 * n_cols:
        block //= 2
    return Config({"ROWS": tile // block, "BLOCK": block}, 4, 1)


def _launch(kernel: Kernel, walk: Walk, device: Device, name: str, a: float, b: float) -> None:
    n_rows, n_cols = walk.sizes
    config = choose(n_cols, device)
    tiles = cdiv(n_rows, config["ROWS"]) * cdiv(n_cols, config["BLOCK"])
    launch(
        kernel, (tiles,), *walk.tensors, *walk.sizes, *walk.strides, a, b, ACT=name, config=config
    )


def _forward(
    x: Tensor, gate: Tensor | None, dim: int, gate_first: bool, name: str, a: float, b: float
) -> Tensor:
    y = _like(x, gate, dim, gate_first, name, a, b)
    walk = _walk(y, [*_views(x, gate, dim, gate_first)], [y])
    _launch(GLU_FWD, walk, device_of(x), name, a, b)
    return y


def _torch_forward(x: Tensor, *args: Any) -> Tensor:
    return _like(x, *args).copy_(definition(x, *args))


def _like_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # both in the order of memory of x, so that one walk fills them
    return empty_gradients((x, x), rest[-1], torch.preserve_format)


def _backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, dim: int, gate_first: bool, name: str, a: float,
    b: float, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = _like_backward(dy, x, needs)
    # the halves of one gradient are written where they belong
    outputs = list(grads if gate is not None else _views(grads[0], None, dim, gate_first))
    like = next(t for t in outputs if t is not None)
    walk = _walk(like, [dy, *_views(x, gate, dim, gate_first)], outputs)
    _launch(GLU_BWD, walk, device_of(x), name, a, b)
    return grads


def _torch_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *args, needs = rest
    return copied(_like_backward(dy, x, needs), gradients(definition, (x, *args), dy, needs))


FORWARD = LibraryOp("glu", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp("glu_backward", _backward, like=_like_backward, torch_form=_torch_backward)


class GLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.options = options
        return FORWARD.overload(x, gate, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        args = (*ctx.saved_tensors, *ctx.options)
        needs = list(ctx.needs_input_grad[:2])
        if differentiating():
            grads: Any = second_derivative("glu", definition, args, dy, needs)[:2]
        else:
            grads = BACKWARD.overload(dy, *args, needs)
        return *grads, None, None, None, None, None


OP = Op("glu", definition, GLUFunction, FORWARD.overload, vendor)


def glu(
    input: Tensor,
    dim: int = -1,
    *,
    activation: Activations = "sigmoid",
    gate: Tensor | None = None,
    gate_first: bool = False,
) -> Tensor:
    """The first half of input along dim times act(the second half): SwiGLU with "silu", GeGLU with
    "gelu", ReGLU with "relu"; with None, the product of the halves.

    With `gate_first` the first half is the gate, as in the joined layers of Llama and Phi. With
    `gate`, of the shape and dtype of input, it is input times act(gate), and dim does not matter.
    """
    options, module = lower("glu", activation)
    _check(input, dim, gate)
    if module is not None:
        value, gate = _views(input, gate, dim, gate_first)
        return value * module(gate)
    return OP(input, gate, dim, gate_first, *options)


def _check(input: Tensor, dim: int, gate: Tensor | None) -> None:
    if not input.is_floating_point():
        raise NotImplementedError(f"glu: input is {input.dtype}; it must be floating point")
    if gate is not None:
        for what in ("shape", "dtype", "device"):
            given, other = getattr(input, what), getattr(gate, what)
            if given != other:
                raise RuntimeError(
                    f"glu: input has {what} {given}, gate has {other}; they must match"
                )
        return
    dims = input.dim()
    if dims == 0:
        raise RuntimeError("glu: input is a scalar; it needs a dimension of even size")
    if not -dims <= dim < dims:
        raise IndexError(
            f"glu: dim is {dim}, input is {tuple(input.shape)}; allowed are -{dims} to {dims - 1}"
        )
    if input.shape[dim] % 2:
        raise RuntimeError(
            f"glu: input is {tuple(input.shape)}, dim is {dim}; its size must be even"
        )
