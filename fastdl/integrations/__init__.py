"""fastdl inside other libraries. Each integration imports its library when it is used."""

import importlib
from types import ModuleType

_INTEGRATIONS = ("diffusers", "torch_sdpa", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _INTEGRATIONS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_INTEGRATIONS})
