"""Which module becomes which: the table of classes, and the reasons to leave a module as it is."""

import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .. import functional, nn as fused
from ..nn.rnn import let_dynamo_enter
from ..ops._route import FUSED_DTYPES, PLAIN
from . import libraries
from ._judge import copied
from .foreign import form_of, names_of_children, recognise, with_form
from .sequential import Sequential

# torch's class -> ours: every class of fastdl.nn that derives from one of torch's.
RULES: dict[type, type] = {
    cls.__mro__[1]: cls
    for cls in vars(fused).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__base__ is not nn.Module
}

ORIGINALS = {ours: torchs for torchs, ours in RULES.items()} | {Sequential: nn.Sequential}

# FSDP2's classes, remade over ours -> the ones it had generated.
_REMADE: dict[type, type] = {}

_ROOT = __package__.rpartition(".")[0]

_PUBLIC = {name.replace("_", ""): name for name in vars(functional)}


class Finding(NamedTuple):
    """What there is to say about a module: the class it would take, or why it keeps its own."""

    pattern: str
    # the function of fastdl.functional; empty where no rule knows the class
    op: str = ""
    target: type | None = None
    reason: str | None = None
    # whether the modules inside are looked at
    descend: bool = True


def examine(module: nn.Module) -> Finding | None:
    """The finding for a module, or None for one that is of no interest, such as a container."""
    cls = type(module)
    opaque = _opaque(module)
    if opaque is not None:
        return Finding(getattr(module, "original_name", cls.__name__), reason=opaque, descend=False)
    if cls is NonDynamicallyQuantizableLinear:
        return None  # it is never called: nn.MultiheadAttention takes its weights
    base = next((known for known in cls.__mro__ if known in RULES), None)
    under = _under(cls)
    if base is None:
        return _foreign(module, under)
    op = op_name(RULES[base])
    if under is RULES[base]:
        return Finding(base.__name__, op, cls)
    return Finding(base.__name__, op, RULES[base], _refusal(module, base, under))


def _foreign(module: nn.Module, cls: type) -> Finding | None:
    """The finding for a module of a class that is not torch's."""
    taken = libraries.examine(module, cls)
    if taken is not None:
        return Finding(cls.__name__, *taken)
    made = form_of(cls)
    if made is not None:
        return Finding(cls.__name__, made.op, cls)
    own = cls.__module__.startswith(f"{_ROOT}.")
    form = None if own or _unfit(module) else recognise(module)
    if form is not None:
        return Finding(cls.__name__, form.op, with_form(form, names_of_children(module), cls))
    reason = _unknown(module)
    return Finding(cls.__name__, reason=reason) if reason else None


def _opaque(module: nn.Module) -> str | None:
    """Why nothing in this module can be touched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it was compiled by TorchScript"
    if type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat")):
        return "it is quantized"
    return None


def _unknown(module: nn.Module) -> str | None:
    """The reason for a class without a rule. Containers need none."""
    home = type(module).__module__
    if home.startswith("peft.") and hasattr(module, "base_layer"):
        return "PEFT wraps it: only the layer inside may be replaced"
    is_leaf = not any(module.children()) or home.startswith("torch.nn.")
    owns = any(True for _ in module.parameters(recurse=False))
    return "fastdl has no rule for this class" if is_leaf and owns else None


def _refusal(module: nn.Module, base: type[nn.Module], under: type) -> str | None:
    """Why a module of a known class, or of one derived from it, is not replaced."""
    generated = parametrize.is_parametrized(module) or isinstance(module, LazyModuleMixin)
    if under is not base and not generated:
        return f"{under.__name__} is derived from {base.__name__}: its forward may differ"
    if not base.forward.__module__.startswith("torch."):
        return f"the forward of {base.__name__} was replaced by {base.forward.__module__}"
    return _unfit(module)


def _unfit(module: nn.Module) -> str | None:
    """Why a module cannot be replaced, whatever its class."""
    if parametrize.is_parametrized(module):
        return "it is parametrized: its weight is computed at each access"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy and not initialised: call the model once before"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as other libraries do"
    if any(isinstance(value, Tensor) for value in vars(module).values()):
        return "its weight is not a parameter: it is pruned, or another hook computes it"
    return _unfit_parameter(module)


def _unfit_parameter(module: nn.Module) -> str | None:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in FUSED_DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"its {name} is {dtype}: the kernels take float32, float16 and bfloat16"
        distributed = _loaded("torch.distributed.tensor")
        if type(parameter) not in PLAIN and not (
            distributed and isinstance(parameter, distributed.DTensor)
        ):
            return f"its {name} is a {type(parameter).__name__}, a tensor subclass without a rule"
    return None


def op_name(ours: type) -> str:
    """The function of a class: layer_norm for LayerNorm, batch_norm for BatchNorm2d. A class that
    has none is called like one.
    """
    name = ours.__name__.lower()
    short = re.sub(r"(\dd|loss)$", "", name)
    long = short.replace("bce", "binarycrossentropy")
    for candidate in (name, short, long, f"{name}forward"):
        if candidate in _PUBLIC:
            return _PUBLIC[candidate]
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", ours.__name__).lower()


def _loaded(name: str) -> ModuleType | None:
    """A module if somebody imported it: before that none of its classes can be in a model."""
    return sys.modules.get(name)


def _under(cls: type) -> type:
    """The class under one that FSDP2 generated, else the class itself."""
    fsdp: Any = _loaded("torch.distributed.fsdp")
    if fsdp and issubclass(cls, fsdp.FSDPModule) and len(cls.__bases__) == 2:
        return cls.__bases__[1]
    return cls


def _over(cls: type, base: type) -> type:
    """The class generated by FSDP2, made once more over another base."""
    for remade, generated in _REMADE.items():
        if generated is cls:
            return remade
    remade = type(cls.__name__, (cls.__bases__[0], base), dict(vars(cls)))
    _REMADE[remade] = cls
    return remade


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children as torch's Sequential does."""
    return _under(type(module)) in (nn.Sequential, Sequential) and "forward" not in vars(module)


def swap(module: nn.Module, target: type) -> None:
    """Give a module, or its part, one of our classes. Nothing else about it changes."""
    if not issubclass(target, nn.Module):
        libraries.swap_part(module, target)
        return
    cls = type(module)
    under = _under(cls)
    if under is not target:
        module.__class__ = target if under is cls else _over(cls, target)
        if issubclass(target, nn.RNNBase):
            let_dynamo_enter()


def swap_back(module: nn.Module) -> None:
    """Give a module the class it had."""
    cls = type(module)
    original = _without_ours(cls)
    if original is not cls:
        module.__class__ = original
    for part in libraries.made_parts(module):
        part.__class__ = libraries.MADE[type(part)]


def _without_ours(cls: type) -> type:
    """The class that was swapped; over it, once more, what torch generated over ours since, as
    FSDP2 and parametrizations do.
    """
    original = ORIGINALS.get(cls) or libraries.MADE.get(cls) or _REMADE.get(cls)
    if original is not None:
        return original
    if not cls.__module__.startswith("torch."):
        return cls  # a class that somebody wrote
    bases = tuple(_without_ours(base) for base in cls.__bases__)
    return cls if bases == cls.__bases__ else type(cls.__name__, bases, dict(vars(cls)))


def original(model: nn.Module) -> nn.Module:
    """A copy on torch's own classes."""
    twin = copied(model)
    for module in twin.modules():
        swap_back(module)
    return twin


def is_ours(module: nn.Module) -> bool:
    under = _under(type(module))
    return under in ORIGINALS or under in libraries.MADE or bool(libraries.made_parts(module))
