"""Which shapes a model asks the tables for, forward and backward: what is worth tuning for it."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import _launch
from ..ops._launch import Device, Launch, Lookup
from ..optimize._judge import copied, fresh, no_trace, tensors_in
from ..optimize.plan import optimize
from ..optimize.rules import is_ours
from ..optimize.verify import arguments
from .problems import Asked
from .tune import this_gpu

GPU = "cuda"

# What an operation and a byte take, about: only the order of shapes depends on it.
FLOP, BYTE = 1 / 4e14, 1 / 4e12


def asked_by(model: nn.Module, example_inputs: Any) -> dict[Asked, float]:
    """Seconds by what is asked, the most first, one for each key of a table: a guess.

    Runs a copy, optimized unless the model has fastdl's modules already. Without a GPU the copy is
    on the meta device, where an H200 is assumed and nothing is computed.
    """
    if example_inputs is None:
        raise ValueError("tune: a model's shapes are told by a call: it needs example_inputs")
    place = GPU if this_gpu() else "cpu" if _launch.INTERPRETED else "meta"
    with no_trace(model):
        tried = copied(model)
        if not any(map(is_ours, tried.modules())):
            optimize(tried, verify=False)
        tried.to(place)
        given = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(place), fresh(arguments(example_inputs))
        )
        with _listening(place) as (launches, lookups):
            _both_passes(tried, *given)
    return _by_cost(lookups, launches)


@contextlib.contextmanager
def _listening(place: str) -> Iterator[tuple[list[Launch], list[Lookup]]]:
    """What is launched and asked for in both passes, which otherwise have a thread each."""
    with contextlib.ExitStack() as stack:
        assumed = None
        if place == "meta":
            assumed = assumed_device()
            # torch refuses to answer for meta tensors
            stack.enter_context(
                mock.patch.object(torch, "is_autocast_enabled", lambda *device: False)
            )
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        launches = stack.enter_context(_launch.recording(assumed))
        yield launches, stack.enter_context(_launch.asking())


def assumed_device() -> Device:
    """Where no GPU is: an H200."""
    return Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)


def _both_passes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outputs = [t for _, t in tensors_in(model(*args, **kwargs), "") if t.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _by_cost(lookups: list[Lookup], launches: list[Launch]) -> dict[Asked, float]:
    # an op may ask twice before it launches
    calls = {(Asked(op, dtype, sizes), at): None for op, dtype, sizes, _, at in lookups}
    seconds: dict[Asked, float] = {}
    for asked, at in calls:
        launched = launches[at] if at < len(launches) else None
        seconds[asked] = seconds.get(asked, 0.0) + _cost(asked, launched)
    of_key: dict[str, Asked] = {}
    for asked in sorted(seconds, key=seconds.__getitem__, reverse=True):
        of_key.setdefault(asked.key, asked)
    return {asked: seconds[asked] for asked in of_key.values()}


def _cost(asked: Asked, launch: Launch | None) -> float:
    """Seconds of one call, by its operations, and by the tensors of what it launched."""
    tensors = [arg for arg in launch.args if isinstance(arg, Tensor)] if launch else []
    bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(_operations(asked, tensors) * FLOP, bytes * BYTE)


def _operations(asked: Asked, tensors: list[Tensor]) -> float:
    sizes = asked.sizes
    if asked.op in ("linear", "conv", "conv_nchw"):
        return 2 * math.prod(sizes)
    if asked.op in ("lstm", "gru", "rnn"):
        steps, rows, units = sizes
        return 16 * steps * rows * units**2
    if asked.op.startswith("attention") and len(tensors) > 1:
        q, k = tensors[:2]
        return 4 * q.numel() * k.shape[2]
    return 0.0
