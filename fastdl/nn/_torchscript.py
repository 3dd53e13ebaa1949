"""TorchScript reads source and records calls of torch's functions: it gets torch's own modules."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def teach(values: Iterable[Any]) -> None:
    """Let torch.jit take modules of each class that derives from one of torch's for that one's."""
    for value in list(values):
        is_module = isinstance(value, type) and issubclass(value, nn.Module)
        if is_module and value.__base__ is not nn.Module:
            scriptable(value)


def scriptable(ours: type[Any]) -> type[Any]:
    """`torch.jit.trace` leaves modules as they are. `torch.jit.script` writes what it makes ready
    into the model that it is given, which so goes back to torch's classes.
    """
    torchs: Any = ours.__base__

    def prepared(self: nn.Module) -> nn.Module:
        if type(self) is ours:
            self.__class__ = torchs
        return self

    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not ours:  # a class above it: parametrized, or made by FSDP2
            return torchs._slow_forward(self, *args, **kwargs)
        self.__class__ = torchs
        try:
            return self._slow_forward(*args, **kwargs)
        finally:
            self.__class__ = ours

    # the names by which torch.jit finds them
    for name, method in (("__prepare_scriptable__", prepared), ("_slow_forward", traced)):
        setattr(ours, name, method)
    return ours
