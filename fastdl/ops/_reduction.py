"""The reduction of a loss."""

from torch.nn import _reduction

REDUCTIONS = ("none", "mean", "sum")


def reduction_of(
    op: str, size_average: bool | None, reduce: bool | None, reduction: str,
    allowed: tuple[str, ...] = REDUCTIONS,
) -> str:  # fmt: skip
    """The reduction that the old and the new arguments name."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        _reduction.get_enum(reduction)  # warns
        return "mean"
    if reduction not in allowed:
        raise ValueError(f"{op}: reduction is {reduction!r}, allowed are {', '.join(allowed)}")
    return reduction
