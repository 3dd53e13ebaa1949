"""How tensors of one shape are walked together."""

from collections.abc import Sequence


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
