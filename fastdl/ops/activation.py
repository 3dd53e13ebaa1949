"""Elementwise activations, with dropout: y = dropout(act(x)). Also dropout alone, the activation
being "none".
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._launch import Config, Kernel, cdiv, launch
from ._op import SPELLINGS, LibraryOp, Op, Spelling, differentiating, gradients, second_derivative
from ._rng import draw_seed, dropout as drop

ACTIVATION_FWD = Kernel("activation.activation_fwd")
ACTIVATION_BWD = Kernel("activation.activation_bwd")


class Activation(NamedTuple):
    """An activation: its definition, with two parameters for those that have any, and torch's
    module for it.
    """

    definition: Callable[[Tensor, float, float], Tensor]
    module: type[nn.Module] | None = None
    attributes: tuple[str, ...] = ()
    defaults: tuple[float, float] = (0.0, 0.0)
    # Whether the derivative can be taken at the output: then backward needs no other tensor.
    at_output: bool = False
    # Other ways to write it, for the graph optimizer.
    spellings: tuple[Callable[[Tensor], Tensor], ...] = ()


def _newton_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def _erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951))


def _erf_gelu_product(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476))


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x, a, b: x, nn.Identity, at_output=True),
    "relu": Activation(lambda x, a, b: F.relu(x), nn.ReLU, at_output=True),
    "gelu": Activation(
        lambda x, a, b: F.gelu(x), nn.GELU, spellings=(_erf_gelu, _erf_gelu_product)
    ),
    "gelu_tanh": Activation(
        lambda x, a, b: F.gelu(x, approximate="tanh"), spellings=(_newton_gelu, _fast_gelu)
    ),
    "silu": Activation(
        lambda x, a, b: F.silu(x), nn.SiLU, spellings=(lambda x: x * torch.sigmoid(x),)
    ),
    "quick_gelu": Activation(lambda x, a, b: x * torch.sigmoid(1.702 * x)),
    "relu2": Activation(lambda x, a, b: F.relu(x).square()),
    "sigmoid": Activation(lambda x, a, b: torch.sigmoid(x), nn.Sigmoid),
    "tanh": Activation(lambda x, a, b: torch.tanh(x), nn.Tanh),
    "leaky_relu": Activation(
        lambda x, a, b: F.leaky_relu(x, a), nn.LeakyReLU, ("negative_slope",), (0.01, 0.0)
    ),
    "elu": Activation(lambda x, a, b: F.elu(x, a), nn.ELU, ("alpha",), (1.0, 0.0)),
    "selu": Activation(lambda x, a, b: F.selu(x), nn.SELU),
    "celu": Activation(lambda x, a, b: F.celu(x, a), nn.CELU, ("alpha",), (1.0, 0.0)),
    "mish": Activation(
        lambda x, a, b: F.mish(x), nn.Mish, spellings=(lambda x: x * torch.tanh(F.softplus(x)),)
    ),
    "softplus": Activation(
        lambda x, a, b: F.softplus(x, a, b), nn.Softplus, ("beta", "threshold"), (1.0, 20.0)
    ),
    "softsign": Activation(lambda x, a, b: F.softsign(x), nn.Softsign),
    "hardswish": Activation(lambda x, a, b: F.hardswish(x), nn.Hardswish),
    "hardsigmoid": Activation(
        # F.hardsigmoid has no second derivative
        lambda x, a, b: F.relu6(x + 3) / 6,
        nn.Hardsigmoid,
        spellings=(F.hardsigmoid,),
    ),
    "hardtanh": Activation(
        lambda x, a, b: F.hardtanh(x, a, b),
        nn.Hardtanh,
        ("min_val", "max_val"),
        (-1.0, 1.0),
        at_output=True,
    ),
    "logsigmoid": Activation(lambda x, a, b: F.logsigmoid(x), nn.LogSigmoid),
    "tanhshrink": Activation(lambda x, a, b: F.tanhshrink(x), nn.Tanhshrink),
}

# Other names for one of these with fixed parameters.
ALIASES = {None: ("none", 0.0, 0.0), "relu6": ("hardtanh", 0.0, 6.0)}

Lowered = tuple[str, float, float]
Activations = str | nn.Module | tuple[Any, ...] | None

# Exact classes: a derived one may do anything. fastdl.nn adds its own.
BY_MODULE: dict[type, str] = {
    nn.ReLU6: "relu6",
    **{entry.module: name for name, entry in ACTIVATIONS.items() if entry.module},
}


def lower(op: str, activation: Activations) -> tuple[Lowered, nn.Module | None]:
    """(name, a, b) for the kernels, and the module that torch applies after them, for those that
    kernels do not know.

    A tuple is a name followed by its parameters.
    """
    if isinstance(activation, nn.Module):
        return _lower_module(activation)
    name, *parameters = activation if isinstance(activation, tuple) else (activation,)
    if name in ALIASES and not parameters:
        return ALIASES[name], None
    entry = ACTIVATIONS.get(name)
    if entry is None or len(parameters) > len(entry.attributes):
        known = ", ".join(sorted([*ACTIVATIONS.keys() - {"none"}, "relu6"]))
        raise ValueError(
            f"{op}: unknown activation {activation!r}; known are {known}, None or a module"
        )
    a, b = (*map(float, parameters), *entry.defaults[len(parameters) :])
    return (name, a, b), None


def _lower_module(module: nn.Module) -> tuple[Lowered, nn.Module | None]:
    name = BY_MODULE.get(type(module))
    if name is None or has_hooks(module):
        return ("none", 0.0, 0.0), module
    if name in ALIASES:
        return ALIASES[name], None
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "gelu_tanh"
    entry = ACTIVATIONS[name]
    given = [float(getattr(module, attribute)) for attribute in entry.attributes]
    a, b = (*given, *entry.defaults[len(given) :])
    return (name, a, b), None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def at_output(name: str, a: float) -> bool:
    """Whether act'(z) can be computed from act(z), by the same formula."""
    return ACTIVATIONS[name].at_output or (name == "leaky_relu" and a > 0)


def apply_definition(x: Tensor, name: str, a: float, b: float) -> Tensor:
    return ACTIVATIONS[name].definition(x, a, b)


def definition(x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float) -> Tensor:
    """dropout(act(x))."""
    return drop(apply_definition(x, name, a, b), seed, p)


def vendor(x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float) -> Any:
    """With torch's own dropout, which is faster than drawing the kernels' mask in torch."""
    return None if seed is None else F.dropout(apply_definition(x, name, a, b), p)


def _like(x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float) -> Tensor:
    # A dropout mask is drawn in the order of a contiguous tensor; without one the order of elements
    # is free.
    return torch.empty_like(
        x, memory_format=torch.preserve_format if seed is None else torch.contiguous_format
    )


def _like_backward(
    dy: Tensor, x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float
) -> Tensor:
    return _like(x, seed, name, a, b, p)


def _config() -> Config:
    # 16-byte accesses of 16-bit elements by 128 threads
    return Config({"BLOCK": 1024}, num_warps=4)


def _torch_forward(x: Tensor, *args: Any) -> Tensor:
    return _like(x, *args).copy_(definition(x, *args))


def same_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the strides of a dense one, so that both can be walked flat."""
    return (
        tensor
        if tensor.stride() == like.stride()
        else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    )


def _forward(x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float) -> Tensor:
    y = _like(x, seed, name, a, b, p)
    config, n = _config(), y.numel()
    launch(
        ACTIVATION_FWD, (cdiv(n, config["BLOCK"]),),
        same_layout(x, y), seed, y, n, a, b, p,
        ACT=name, config=config,
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float
) -> Tensor:
    dx = _like(x, seed, name, a, b, p)
    config, n = _config(), dx.numel()
    launch(
        ACTIVATION_BWD, (cdiv(n, config["BLOCK"]),),
        same_layout(dy, dx), same_layout(x, dx), seed, dx, n, a, b, p,
        ACT=name, config=config,
    )  # fmt: skip
    return dx


def _torch_backward(
    dy: Tensor, x: Tensor, seed: Tensor | None, name: str, a: float, b: float, p: float
) -> Tensor:
    args = (x, seed, name, a, b, p)
    return _like(*args).copy_(gradients(definition, args, dy, [True])[0])


FORWARD = LibraryOp("activation", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp(
    "activation_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, *options: Any) -> Tensor:
        name, a = options[:2]
        y = FORWARD.overload(x, seed, *options)
        saved = y if seed is None and at_output(name, a) else x
        ctx.save_for_backward(None if name == "none" else saved, seed)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, seed = ctx.saved_tensors
        args = (dy if x is None else x, seed, *ctx.options)
        if differentiating():
            return tuple(
                second_derivative("activation", definition, args, dy, ctx.needs_input_grad)
            )
        return BACKWARD.overload(dy, *args), None, None, None, None, None


def _inference(x: Tensor, seed: Tensor | None, *options: Any) -> Tensor:
    return FORWARD.overload(x, seed, *options)


OP = Op("activation", definition, ActivationFunction, _inference, vendor)


def seed_for(input: Tensor, p: float, training: bool) -> Tensor | None:
    """A seed if there is anything to drop."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return draw_seed(input.device) if training and p > 0 else None


def activation(
    input: Tensor, name: Activations, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """dropout(act(input)). `name` is an activation's name, a tuple of it and its parameters, or a
    torch module.
    """
    options, module = lower("activation", name)
    if module is not None:
        input = module(input)
    seed = seed_for(input, dropout_p, training)
    if options[0] == "none" and seed is None:
        return input
    return OP(input, seed, *options, dropout_p if seed is not None else 0.0)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch's dropout, from a seed that torch's generator draws. The mask is not stored: backward
    draws it again.
    """
    if inplace:
        return F.dropout(input, p, training, inplace=True)
    return activation(input, None, dropout_p=p, training=training)


def spelled(name: str) -> list[Callable[[Tensor, float, float], Tensor]]:
    """Every way to write the activation, as functions of the tensor and its two parameters."""
    entry = ACTIVATIONS[name]
    return [entry.definition, *((lambda x, a, b, f=f: f(x)) for f in entry.spellings)]


def with_parameters(name: str, a: float, b: float) -> Activations:
    """The activation as the public ops take it."""
    count = len(ACTIVATIONS[name].attributes)
    return (name, *(a, b)[:count]) if count else name


def _spell(act: Callable[..., Tensor], name: str, drops: bool) -> Spelling:
    """The op with this way to write its activation, with or without dropout after it."""

    def pattern(x: Any, a: Any, b: Any, p: Any, training: Any) -> Tensor:
        y = act(x, a, b)
        return F.dropout(y, p, training) if drops else y

    def call(x: Any, a: Any, b: Any, p: Any, training: Any) -> partial[Any]:
        activations = None if name == "none" else with_parameters(name, a, b)
        options = {"dropout_p": p, "training": training} if drops else {}
        return partial(activation, x, activations, **options)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(act, name, drops)
    for name in ACTIVATIONS
    for act in spelled(name)
    for drops in (False, True)
    if name != "none" or drops
)
