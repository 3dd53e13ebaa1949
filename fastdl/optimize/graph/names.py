"""What the nodes of a graph are called for people: modules, parameters and lines of source."""

import os
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.fx import Node

# Where a fused call notes the names of the nodes that it stands for.
REPLACES = "fastdl_replaces"

# Code of torch's own is no line of the user's.
_TORCH = os.path.dirname(torch.__file__) + os.sep

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in .*$')


def origins(nodes: Iterable[Node]) -> list[str]:
    """The names of calls in the graph as it was: those that a fused call replaces."""
    return [name for node in nodes for name in node.meta.get(REPLACES, [node.name])]


class Where(NamedTuple):
    """The path of the module whose code a graph is, and the names of all modules by their ids."""

    path: str = ""
    modules: Mapping[str, str] = {}

    def site_name(self, node: Node) -> str:
        """The module that the call stands in and the call: "encoder.0.fc1 (linear)"."""
        module = self.path
        for key, (text, *_) in list((node.meta.get("nn_module_stack") or {}).items())[-1:]:
            # the key is the module's id, with @ and a number when it is called again
            inner = ".".join(filter(None, (self.path, _without_frame(str(text)))))
            module = self.modules.get(key.partition("@")[0], inner)
        return f"{module} ({node.name})" if module else node.name


def qualified(node: Node) -> str:
    """The user's name of an input: fc1.weight for L['self']._modules['fc1']._parameters['weight'],
    x for L['x'].
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = _text(source)
    if text is None:
        return node.name
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", text)
    inner = _without_frame(text)
    return inner or re.sub(r"^[LG]\['(\w+)'\]", r"\1", text)


def _text(source: Any) -> str | None:
    name = getattr(source, "name", None)
    name = name() if callable(name) else name  # a method before torch 2.12
    return name if isinstance(name, str) and name else None


def _without_frame(text: str) -> str:
    """The path below the variable that holds the module."""
    return re.sub(r"^[LG]\['\w+'\]\.?", "", text)


def source_of(node: Node) -> str | None:
    """The user's line that made the call: "model.py:12  h = self.fc(x)"."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    found = ((_FRAME.match(line), text) for line, text in pairwise([*lines, ""]))
    return frame_of((frame["file"], frame["line"], text) for frame, text in found if frame)


def frame_of(frames: Iterable[tuple[str, Any, str]]) -> str | None:
    """The innermost of these files, lines and texts that is not in torch."""
    for file, line, text in reversed(list(frames)):
        if not file.startswith(_TORCH):
            return f"{short(file)}:{line}  {text.strip()}".rstrip()
    return None


def short(file: str) -> str:
    """A file from here, or from where packages are installed."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here) if file.startswith(here) else file.split("site-packages/")[-1]
