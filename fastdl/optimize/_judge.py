"""Runs of copies of a model that leave no trace."""

import contextlib
import copy
import dataclasses
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_with_path

from ._modes import widened

# Seeds, the default dtype and Dynamo's stance are the process's: proofs in threads take turns.
_ALONE = threading.RLock()


class Run(NamedTuple):
    """What one run of a model gave, by name. A gradient is None where autograd found no path."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


@contextlib.contextmanager
def no_trace(*models: nn.Module) -> Iterator[None]:
    """Whatever runs inside, or raises: random numbers, torch's modes, and the gradients and buffers
    of the models are as before. Gradients are on inside, and those of the models gone.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ALONE)
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"].random
            stack.callback(numpy.set_state, numpy.get_state())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        for device in ("cpu", "cuda"):
            stack.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
            stack.callback(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device))
        # the cache would keep what was cast from copies until the caller's autocast ends
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for model in models:
            _remember(model, stack)
        yield


def _remember(model: nn.Module, stack: contextlib.ExitStack) -> None:
    """Take a model's gradients away until the stack ends; then they and its buffers come back."""
    for parameter in model.parameters():
        stack.callback(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None
    for buffer in model.buffers():
        if not buffer.is_meta:
            stack.callback(_put_back, buffer, buffer.detach().clone())


def _put_back(buffer: Tensor, kept: Tensor) -> None:
    if not torch.equal(buffer, kept):  # an expanded one cannot be written
        buffer.data.copy_(kept)


def insist_on_copies(*models: nn.Module) -> None:
    """Raise an error if a run of a copy has reached the model, whose gradients were gone."""
    for model in models:
        if any(parameter.grad is not None for parameter in model.parameters()):
            raise RuntimeError(
                "verify: a copy of the model was run, and the gradients came to the model itself: "
                "something in it holds on to it, such as a forward that was replaced by a closure. "
                "What a copy computes says nothing about such a model."
            )


def eager() -> contextlib.AbstractContextManager[Any]:
    """Where compiled models run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it is slow to import
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without gradients."""
    _insist_on_values(model)
    memo = {} if memo is None else memo
    # what a hook has computed, such as a pruned weight, cannot be copied with its history
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"fastdl compares copies, and this {type(model).__name__} cannot be copied: {error}"
        ) from error
    for parameter in twin.parameters():
        if not parameter.is_leaf:  # a scripted module's copy has the original as its history
            parameter.detach_().requires_grad_()
    twin.zero_grad(set_to_none=True)
    return twin


def _insist_on_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"verify: {name} is on the meta device and has no values to compute with. Load or "
                "initialise the model first; fastdl.plan(model) needs no values."
            )


def without_dropout(model: nn.Module) -> None:
    """Set every rate of a model to 0: of dropout modules, and floats with "drop" in their name."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    mode: contextlib.AbstractContextManager[Any],
    wide: bool = False,
) -> Run:
    """One forward and one backward pass in a mode, from the same seed each time. A model in eval
    also runs without gradients, where it may compute in another way.
    """
    leaves: dict[str, Tensor] = {}
    given = fresh((args, kwargs), leaves, wide)
    with mode:
        output = _call(model, given)
    outputs = dict(tensors_in(output, "output"))
    if not outputs:
        raise ValueError(f"verify: no tensor in what the model returns, a {type(output).__name__}")
    with mode:
        _backward(output, outputs, loss)
    gradients = {
        plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad
    }
    gradients |= {name: leaf.grad for name, leaf in leaves.items()}
    found = {name: t.detach() for name, t in outputs.items()}
    found |= {f"buffer {plain_name(n)}": b.detach().clone() for n, b in model.named_buffers()}
    if not any(module.training for module in model.modules()):
        given = fresh((args, kwargs), wide=wide)
        with mode, torch.no_grad():
            output = _call(model, given)
        found |= {f"{name} without gradients": t for name, t in tensors_in(output, "output")}
    return Run(found, gradients)


def _call(model: nn.Module, given: Any) -> Any:
    args, kwargs = given
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    return model(*args, **kwargs)


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper of torch.compile."""
    return name.replace("_orig_mod.", "")


def fresh(inputs: Any, leaves: dict[str, Tensor] | None = None, wide: bool = False) -> Any:
    """A copy of (args, kwargs) for one run. With `leaves`, gradients of floats gather in them."""
    seen: dict[int, Tensor] = {}

    def plain(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return widened(clone) if wide else clone

    def renew(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            # such as a cache, whose tensors may have a history, with which they cannot be copied
            return copy.deepcopy(value, {id(t): plain(t) for t in _held(value, set())})
        if id(value) not in seen:
            leaf = plain(value)
            if leaves is not None and (leaf.is_floating_point() or leaf.is_complex()):
                leaves[f"input {_label(path)}"] = leaf.requires_grad_()
                leaf = leaf.clone()  # a model may write into what it is given, but not into a leaf
            seen[id(value)] = leaf
        return seen[id(value)]

    return tree_map_with_path(renew, inputs)


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object, its attributes, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (type, ModuleType)):
        seen.add(id(value))
        inside: Any = value if isinstance(value, (tuple, list)) else ()
        inside = value.values() if isinstance(value, Mapping) else inside
        for item in (*inside, *getattr(value, "__dict__", {}).values()):
            yield from _held(item, seen)


def _label(path: Any) -> str:
    """[0] for the first positional argument, x for the keyword x, and the path inside it."""
    first, *rest = path[1:]
    name = str(first) if path[0].idx == 0 else str(first.key)
    return name + "".join(map(str, rest))


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output, by where it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def _backward(
    output: Any, outputs: dict[str, Tensor], loss: Callable[[Any], Tensor] | None
) -> None:
    if loss is not None:
        loss(output).backward()
        return
    roots = [t for t in outputs.values() if t.requires_grad]
    if roots:
        # the gradient of the outputs' sum with random signs, which are exact in every dtype
        torch.autograd.backward(roots, [signs(t, i) for i, t in enumerate(roots)])


def signs(like: Tensor, seed: int) -> Tensor:
    """Random signs that depend on nothing but the shape and the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return drawn.to(like.device, like.dtype)
