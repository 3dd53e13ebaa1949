"""Runs of copies of a model that leave no trace, and the mode for the one that is the judge."""

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map, tree_map_with_path

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}

_CASTS = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}


class Run(NamedTuple):
    """What one run of a model gave, by name. A gradient is None where autograd found no path."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


class Float64(TorchFunctionMode):
    """Turns casts to narrower floats into casts to float64, and notes who gives one anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: str | None = None

    def __enter__(self) -> "Float64":
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = _CASTS.get(func, func)
        args, kwargs = tree_map(_widened_dtype, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if self.narrow is None:
            results = result if isinstance(result, (tuple, list)) else (result,)
            if any(isinstance(r, Tensor) and r.dtype in _WIDER for r in results):
                self.narrow = resolve_name(func) or getattr(func, "__name__", str(func))
        return result


def _widened_dtype(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


class NoDropout(TorchFunctionMode):
    """Calls torch's functional dropouts with p = 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_trace() -> Iterator[None]:
    """Restores random number generators, and turns gradients on inside."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    state = random.getstate()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(state)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Where compiled models run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it is slow to import
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without gradients."""
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
    twin.zero_grad(set_to_none=True)
    return twin


def widen(model: nn.Module) -> None:
    """Put a model into float64, with the tensors that are plain attributes of its modules."""
    model.double()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.dtype in _WIDER:
                setattr(module, name, value.to(_WIDER[value.dtype]))


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
    """One forward and one backward pass in a mode, from the same seed each time."""
    leaves: dict[str, Tensor] = {}
    args, kwargs = fresh((args, kwargs), leaves, wide)
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    with mode:
        output = model(*args, **kwargs)
    outputs = dict(tensors_in(output, "output"))
    if not outputs:
        raise ValueError(f"verify: no tensor in what the model returns, a {type(output).__name__}")
    with mode:
        _backward(output, outputs, loss)
    gradients = {
        plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad
    }
    gradients |= {name: leaf.grad for name, leaf in leaves.items()}
    buffers = {f"buffer {plain_name(name)}": b for name, b in model.named_buffers()}
    return Run({name: t.detach() for name, t in (outputs | buffers).items()}, gradients)


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper of torch.compile."""
    return name.replace("_orig_mod.", "")


def fresh(inputs: Any, leaves: dict[str, Tensor] | None = None, wide: bool = False) -> Any:
    """A copy of (args, kwargs) for one run. With `leaves`, gradients of floats gather in them."""
    seen: dict[int, Tensor] = {}

    def renew(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            with _DetachedCopies():
                return copy.deepcopy(value)
        if id(value) not in seen:
            leaf = value.detach().clone()
            if wide and leaf.dtype in _WIDER:
                leaf = leaf.to(_WIDER[leaf.dtype])
            if leaves is not None and (leaf.is_floating_point() or leaf.is_complex()):
                leaves[f"input {_label(path)}"] = leaf.requires_grad_()
                leaf = leaf.clone()  # a model may write into what it is given, but not into a leaf
            seen[id(value)] = leaf
        return seen[id(value)]

    return tree_map_with_path(renew, inputs)


class _DetachedCopies(TorchFunctionMode):
    """Copies of tensors inside other objects, such as a cache, come without their history."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


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
