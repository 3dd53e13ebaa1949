"""What was done to the graphs of each compiled module, for as long as it lives."""

import sys
import time
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..compiled import Break, Compiled, Graph
from ..report import Report, Site
from ..tree import tree_of
from .names import Where, frame_of


@dataclass
class Record:
    """One graph, and what became of its sites. It holds no tensor."""

    sites: tuple[Site, ...]
    rolled_back: frozenset[Site]
    graph: Graph
    compile_id: str
    at: float = field(default_factory=time.time)


_records: "weakref.WeakKeyDictionary[nn.Module, list[Record]]" = weakref.WeakKeyDictionary()


def keep(root: nn.Module | None, record: Record) -> None:
    if root is None:
        return
    records = _records.setdefault(root, [])
    # Dynamo counts from the start when it compiles once more, or all anew
    for index, old in enumerate(records):
        if old.compile_id == record.compile_id:
            del records[index:]
            break
    records.append(record)


def place() -> tuple[nn.Module | None, Where]:
    """The module that the user compiled, and where in it the code is that is compiled now. Dynamo
    compiles while the call waits, so that it stands on the stack, whatever function below it is
    compiled and after whatever graph break.
    """
    frame: FrameType | None = sys._getframe()
    owner: nn.Module | None = None
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            module = frame.f_locals["self"]
            owner = module if owner is None else owner
            if is_compiled(module):
                root = _plain(module)
                modules = {str(id(child)): name for name, child in root.named_modules()}
                return root, Where(modules.get(str(id(_plain(owner))), ""), modules)
        frame = frame.f_back
    return None, Where()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made the module, or it was compiled in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _plain(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def ended_by(gm: GraphModule) -> Break | None:
    """The graph break at the end of a graph, if there is one."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frame = frame_of((f.filename, f.lineno, f.line or "") for f in reason.user_stack)
    return Break(frame or "unknown", str(reason.reason).strip().splitlines()[0])


def compile_id(gm: GraphModule) -> str:
    return str(gm.meta.get("dynamo_compile_id"))


def report_of(model: nn.Module) -> Report | None:
    """The report of a compiled model, or None if the backend has not seen a graph of it."""
    records = [record for module in model.modules() for record in _records.get(module, ())]
    if not records:
        return None
    report = Report(tree_of(_plain(model)))
    for record in records:
        for site in record.sites:
            if site in record.rolled_back:
                report.rolled_back.append(site)
            else:
                (report.skipped if site.reason else report.replaced).append(site)
    report.compiled = Compiled([_timed(record) for record in records])
    return report


def _timed(record: Record) -> Graph:
    """With the seconds of the whole compilation, which Dynamo knows when it is over."""
    from torch._dynamo.utils import get_compilation_metrics

    for metrics in reversed(get_compilation_metrics()):
        begun, over = _seconds(metrics, "start_time_us"), _seconds(metrics, "end_time_us")
        if metrics.compile_id == record.compile_id and begun <= record.at <= over:
            return record.graph._replace(whole_s=over - begun)
    return record.graph


def _seconds(metrics: Any, name: str) -> float:
    return (getattr(metrics, name, None) or 0) / 1e6
