"""Rotary position embedding: x cos + rotate(x) sin, with the rows of cos and sin gathered."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    SPELLINGS,
    Gradient,
    LibraryOp,
    Op,
    Spelling,
    copied,
    differentiating,
    empty_gradients,
    gradients,
    second_derivative,
)
from ._strides import merged

ROTARY = Kernel("rotary.rotary")


def rotate_half(x: Tensor) -> Tensor:
    """(-x2, x1) of the halves x1 and x2."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_neighbours(x: Tensor) -> Tensor:
    """(-x1, x0) of every two neighbours x0 and x1."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def definition(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x cos + rotate(x) sin, at these rows of cos and sin."""
    if positions is not None:
        at = _beside(positions, x)
        cos, sin = cos[at], sin[at]
    return (x * cos + _rotate(x, interleaved) * sin).to(x.dtype)


def _rotate(x: Tensor, interleaved: bool) -> Tensor:
    return rotate_neighbours(x) if interleaved else rotate_half(x)


def _beside(positions: Tensor, x: Tensor) -> Tensor:
    """[S] as it is; [B, S] with a size of 1 for what x has between its first dimension and S."""
    if positions.dim() == 1:
        return positions
    return positions[(slice(None), *(None for _ in range(x.dim() - 3)))]


def choose(n_tokens: int, n_heads: int, width: int, device: Device) -> Config:
    """16 elements a thread, and up to 8 heads a program: cos and sin are read once for these."""
    small = device.backend == "interpreter"
    block = min(power_of_2(width // 2), 16 if small else 1024)
    most, least = (32, 1) if small else (1024, 256)  # pairs of four warps, and of one
    rows = max(min(most // block, power_of_2(n_tokens)), least // block, 1)
    programs = cdiv(n_tokens, rows) * n_heads * cdiv(width // 2, block)
    # few heads while processors would be idle; a power of two, to compile few kernels
    heads = 1
    while heads < min(n_heads, 8) and programs >= 2 * heads * 4 * device.sms:
        heads *= 2
    return Config({"ROWS": rows, "HEADS": heads, "BLOCK": block}, max(rows * block // 256, 1), 1)


class Loops(NamedTuple):
    """How rows are counted: outer * n_inner + inner is a token, each with n_heads. One stride a
    loop, of x, y and what tells the rows of the tables.
    """

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]


def _loops(shape: Sequence[int], *strides: Sequence[int]) -> Loops | None:
    """The fewest loops over these dimensions, None if more than three are left.

    The heads are the last of them that the tables, whose strides come last, do not vary over.
    """
    dims = merged(shape, *strides)
    none = (1, *(0 for _ in strides))
    shared = [i for i, dim in enumerate(dims) if dim[-1] == 0]
    heads = dims.pop(shared[-1]) if shared else none
    if len(dims) > 2:
        return None
    outer, inner = [none, none, *dims][-2:]
    sizes, *by_tensor = zip(outer, inner, heads, strict=True)
    return Loops(sizes, tuple(by_tensor))


def _tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same strides, elements of a row side by side. Copies only what is not so."""
    alike = cos.shape == sin.shape and cos.stride() == sin.stride()
    if alike and cos.shape[-1:] == x.shape[-1:] and cos.stride(-1) == 1:
        return cos, sin
    shape = torch.broadcast_shapes(cos.shape, sin.shape, x.shape[-1:])
    return cos.expand(shape).contiguous(), sin.expand(shape).contiguous()


def _turn(
    x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """Fill y, in whatever order of memory it has."""
    cos, sin = _tables(x, cos, sin)
    rows = x.shape[:-1]
    at = cos.expand(x.shape)[..., 0] if positions is None else _beside(positions, x).expand(rows)
    loops = _loops(rows, x.stride()[:-1], y.stride()[:-1], at.stride())
    if loops is None:
        flat = x.reshape(-1, x.shape[-1])
        if positions is None:
            cos, sin = (t.expand(x.shape).reshape(flat.shape) for t in (cos, sin))
        else:
            positions = at.reshape(-1)
        dense = _turn(flat, torch.empty_like(flat), cos, sin, positions, interleaved, transposed)
        return y.copy_(dense.view(x.shape))
    (n_outer, n_inner, n_heads), (of_x, of_y, of_at) = loops
    n_tokens, width = n_outer * n_inner, x.shape[-1]
    n_rows, row_stride = (0, 0) if positions is None else (cos.shape[0], cos.stride(0))
    config = choose(n_tokens, n_heads, width, device_of(x))
    tiles = cdiv(n_tokens, config["ROWS"]) * cdiv(n_heads, config["HEADS"])
    launch(
        ROTARY, (tiles, cdiv(width // 2, config["BLOCK"])),
        x, cos, sin, positions, y,
        n_tokens, n_inner, n_heads, n_rows,
        *of_x, x.stride(-1), *of_y, y.stride(-1), *of_at[:2], row_stride,
        D=width, INTERLEAVED=interleaved, TRANSPOSED=transposed, config=config,
    )  # fmt: skip
    return y


def _like(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    return torch.empty_like(x)


def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    return _turn(x, torch.empty_like(x), cos, sin, positions, interleaved, transposed=False)


def _torch_forward(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x).copy_(definition(x, *args))


Gradients = tuple[Gradient, Gradient, Gradient]


def _like_backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, strides: list[int], needs: list[bool],
) -> Gradients:  # fmt: skip
    dx: Any = dy.new_empty_strided(dy.shape, strides) if needs[0] else None
    return dx, *empty_gradients((cos, sin), needs[1:])


def _backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, strides: list[int], needs: list[bool],
) -> Gradients:  # fmt: skip
    dx, *tables = _like_backward(dy, x, cos, sin, positions, interleaved, strides, needs)
    if needs[0]:
        _turn(dy, dx, cos, sin, positions, interleaved, transposed=True)
    if any(needs[1:]):  # tables are seldom learned
        found = _in_torch(dy, x, cos, sin, positions, interleaved, [False, *needs[1:]])[1:]
        return dx, *copied(tables, found)
    return dx, None, None


def _in_torch(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, needs: list[bool],
) -> list[Any]:  # fmt: skip
    x = _stand_in(dy) if x is None else x
    args = (x, cos, sin, positions, interleaved)
    return gradients(definition, args, dy, [*needs, False, False])[:3]


def _stand_in(dy: Tensor) -> Tensor:
    """For x, which is not kept where tables need no gradient: then only its shape matters."""
    return dy.new_zeros((), requires_grad=True).expand(dy.shape)


def _torch_backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, strides: list[int], needs: list[bool],
) -> Gradients:  # fmt: skip
    made = _like_backward(dy, x, cos, sin, positions, interleaved, strides, needs)
    found = _in_torch(dy, x, cos, sin, positions, interleaved, needs)
    return copied(made, found)


FORWARD = LibraryOp("rotary", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp("rotary_backward", _backward, like=_like_backward, torch_form=_torch_backward)


class RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
    ) -> Tensor:
        y = FORWARD.overload(x, cos, sin, positions, interleaved)
        saved_x = x if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(saved_x, cos, sin, positions)
        ctx.interleaved, ctx.strides = interleaved, y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *tables = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if differentiating():
            args = (_stand_in(dy) if x is None else x, *tables, ctx.interleaved)
            grads: Any = second_derivative("rotary", definition, args, dy, needs)[:3]
        else:
            grads = BACKWARD.overload(dy, x, *tables, ctx.interleaved, ctx.strides, needs)
        return *grads, None, None


OP = Op("rotary", definition, RotaryFunction, FORWARD.overload)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """x cos + rotate(x) sin, in x's dtype and order of memory, for x of shape [..., S, D].

    rotate(x) is (-x2, x1) of the halves x1 and x2 of each row; with `interleaved`, (-x1, x0) of
    every two neighbours. cos and sin are as wide as x in both forms, [S, D] or what broadcasts to
    x. With `positions`, [S] or [B, S], they are tables [L, D] of which these rows are taken,
    counted as in indexing; on a GPU a row that is not there gives NaN.
    """
    _check(x, cos, sin)
    if positions is None:
        _check_shapes(x, cos, sin)
    else:
        _check_positions(x, cos, sin, positions)
    return OP(x, cos, sin, positions, interleaved)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % 2:
        raise RuntimeError(
            f"apply_rotary_emb: x is {tuple(x.shape)}; allowed is (..., S, D) with an even D"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != x.device:
            raise RuntimeError(
                f"apply_rotary_emb: x is on {x.device}, {name} on {table.device}; they must match"
            )
        if not (x.is_floating_point() and table.is_floating_point()):
            raise RuntimeError(
                f"apply_rotary_emb: x is {x.dtype}, {name} is {table.dtype};"
                " both must be floating point"
            )


def _check_shapes(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        ends = zip(table.shape[::-1], x.shape[::-1], strict=False)
        if table.dim() > x.dim() or any(n not in (1, size) for n, size in ends):
            raise RuntimeError(
                f"apply_rotary_emb: x is {tuple(x.shape)}, {name} is {tuple(table.shape)};"
                " it must broadcast to x"
            )


def _check_positions(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    if positions.dtype not in (torch.int32, torch.int64):
        raise IndexError(
            f"apply_rotary_emb: positions are {positions.dtype}; allowed are int32 and int64"
        )
    if positions.device != x.device:
        raise RuntimeError(
            f"apply_rotary_emb: x is on {x.device}, positions on {positions.device};"
            " they must match"
        )
    table = cos.dim() == 2 and cos.shape == sin.shape and cos.shape[1] == x.shape[-1]
    if not table or not _is_one_a_row(positions, x):
        raise RuntimeError(
            f"apply_rotary_emb: x is {tuple(x.shape)}, positions are {tuple(positions.shape)},"
            f" cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}; with positions allowed are"
            " x (B, ..., S, D), positions (S,) or (B, S), cos and sin (L, D)"
        )


def _is_one_a_row(positions: Tensor, x: Tensor) -> bool:
    """Whether these are [S], or [B, S] or [1, S] and x has a B of its own."""
    dims = positions.dim()
    if not 1 <= dims <= 2 or x.dim() <= dims or positions.shape[-1] != x.shape[-2]:
        return False
    return dims == 1 or positions.shape[0] in (1, x.shape[0])


def _halves(x: Tensor) -> Tensor:
    halves = x.chunk(2, dim=-1)
    return torch.cat((-halves[1], halves[0]), dim=-1)


def _spell(
    rotate: Callable[[Tensor], Tensor], interleaved: bool, widens: bool, casts: bool
) -> Spelling:
    """The op, with what people cast; `widens` computes in float32 what is less."""

    def pattern(x: Any, cos: Any, sin: Any, dtype: Any) -> Tensor:
        x = x.to(torch.float32) if widens else x
        y = (x * cos) + (rotate(x) * sin)
        return y.to(dtype) if casts else y

    def call(x: Any, cos: Any, sin: Any, dtype: Any) -> partial[Any]:
        options: dict[str, Any] = {"interleaved": True} if interleaved else {}
        return partial(apply_rotary_emb, x, cos, sin, **options)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(rotate, rotate is rotate_neighbours, widens, casts)
    for rotate in (rotate_half, _halves, rotate_neighbours)
    for widens, casts in ((False, False), (False, True), (True, True))
)
