"""fastdl: fused kernels for the PyTorch model you already have, with proof that nothing broke."""

import importlib
from typing import Any

from . import functional as functional
from .ops._route import (
    FallbackError as FallbackError,
    explain as explain,
    policy as policy,
    set_policy as set_policy,
)

__version__ = "0.1.0"

# Where the other verbs live. They are imported when first used: `import fastdl` stays light.
_VERBS = {
    "plan": "optimize.plan",
    "report": "optimize.plan",
    "restore": "optimize.plan",
    "verify": "optimize.verify",
    "backend": "optimize.graph",
    "check": "contract.report",
    "tune": "tuned.tune",
    "env": "_env",
}
_MODULES = ("contract", "integrations", "nn", "optim", "optimize", "targets")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _VERBS:
        return getattr(importlib.import_module(f".{_VERBS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS, *_MODULES})
