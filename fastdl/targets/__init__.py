"""Compile the kernels for GPUs that are not here, and read their machine code."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .._verb import make_callable
from .devices import TARGETS

DEFAULT_TARGETS = tuple(TARGETS)


def _targets(
    ops: Iterable[str] | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    *,
    limit: int | None = 12,
    configs: Sequence[Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Compile what `ops` (all of them) launch on `targets`, with no GPU, and judge the binaries.

    At most `limit` binaries an op and target, kernels and configurations covered first; None is all
    of them. `configs`, entries of a tuned table, are compiled instead of what the op would choose.
    `progress(done, of)` is called as binaries are ready. The result prints as a table; `.failures`
    are the rows that break a rule, `.to_json()` holds everything. What "main loop" says of sm_90 is
    explained in `targets/loop.py`.
    """
    from .run import compile_all

    return compile_all(ops, targets, limit, configs, progress)


make_callable(__name__, _targets)
