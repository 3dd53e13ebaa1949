"""Whether tensors have one shape, and how those that have are walked together."""

from collections.abc import Sequence

from torch import Tensor


def joins(residual: Tensor | None, input: Tensor) -> bool:
    """Whether adding the residual neither broadcasts nor promotes."""
    return residual is None or (residual.dtype == input.dtype and residual.shape == input.shape)


def merged(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """The fewest dimensions, outermost first: the size and a stride of each tensor. None of size 1
    is left.
    """
    dims: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if dims and all(a == b * size for a, b in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, *steps)
        elif size != 1:
            dims.append((size, *steps))
    return dims
