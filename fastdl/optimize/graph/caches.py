"""The keys of what inductor keeps on disk."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ...ops import _op

_config: Any = torch.compiler.config  # its functions are put in when it is imported


def inductor(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """torch's compiler, with our sources in the keys of its caches.

    They keep code that relies on what the fake kernels of our ops say of shapes and dtypes, and
    know these ops by name only. Backward is compiled later, maybe in another thread: so the
    setting goes with the function that compiles.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    tag = f"{_config.cache_key_tag} fastdl {digest(Path(_op.__file__).parent)}"
    with _config.patch(cache_key_tag=tag):
        tagged = _config.patch(cache_key_tag=tag)(compile_fx_inner)
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=tagged)
    return compiled


@functools.cache
def digest(folder: Path) -> str:
    """What tells the sources in a folder from those of another version."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
