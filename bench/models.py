"""One row of the benchmark for a whole model: as it is, with fastdl, compiled, and with both."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdl
from bench.families import Family, MissingLibrary, Size
from bench.interleave import host_timer, interleave, summarize
from bench.machine import Host
from bench.model_lines import line
from bench.passes import shapes_of
from bench.store import Row
from bench.zoo import DECODE, FAMILIES
from fastdl.optimize.graph import sites as sites_of
from fastdl.optimize.report import Site
from fastdl.optimize.verify import Reference

# Several contenders share the code of a model's forward, and each is compiled for itself. One that
# went back to eager without a word would be timed as something that it is not.
LIMITS = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}

SEED = 0

HERE, SMALL = "float64, at this size", "float64, at small size"

Form = Callable[[nn.Module, list[Site]], Any]


@dataclass(frozen=True)
class Case:
    """A model in training, from its inputs to its gradients, or in inference."""

    name: str
    family: Family
    training: bool

    @property
    def large(self) -> Size:
        assert self.family.large is not None
        return self.family.large

    def step(self, size: Size, device: str, dtype: torch.dtype) -> "Step":
        torch.manual_seed(SEED)
        model = size.make().to(device, dtype)
        inputs = _placed(size.inputs(), device, dtype)
        return Step(model, inputs if self.training else _asked(model, inputs)).train(self.training)


def cases() -> Iterator[Case]:
    """What matters most comes first."""
    first = ("llama", "gpt2", "resnet", "unet", "bert", "vit", "dit", "t5", "whisper")
    timed = [name for name, family in FAMILIES.items() if family.large is not None]
    for name in sorted(timed, key=lambda name: (*first, *timed).index(name)):
        yield Case(f"{name}, training", FAMILIES[name], True)
        yield Case(f"{name}, inference", FAMILIES[name], False)
        if name == "llama":
            yield Case("llama, decode", DECODE, False)


def _placed(x: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {key: _placed(value, device, dtype) for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype if x.is_floating_point() else None)


def _asked(model: nn.Module, inputs: Any) -> Any:
    """The inputs without labels, which an encoder-decoder reads as what was said so far."""
    if not isinstance(inputs, dict) or "labels" not in inputs:
        return inputs
    rest = {name: x for name, x in inputs.items() if name != "labels"}
    said = {"decoder_input_ids": inputs["labels"]} if model.config.is_encoder_decoder else {}
    return rest | said


class Step(nn.Module):
    """A model on the inputs of its row: up to the loss in training, else without gradients."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> Any:
        if self.training:
            output = self._call()
            return {"loss": _loss(output), "output": output}
        with torch.no_grad():
            return self._call()

    def _call(self) -> Any:
        x = self.inputs
        return self.model(**x) if isinstance(x, dict) else self.model(x)

    def both(self) -> None:
        """Forward and, in training, backward."""
        found = self()
        if self.training:
            found["loss"].backward()
            self.zero_grad(set_to_none=True)


def _loss(output: Any) -> Tensor:
    """The model's own loss, or the mean square of what it returns."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first if first.dim() == 0 else first.float().square().mean()


def _loss_of(found: Any) -> Tensor:
    return found["loss"]


class Proved(Step):
    """A step that leaves the proof's mode before it runs, so that what is timed was proved: a model
    compiled inside of the mode would be compiled anew outside.
    """

    def forward(self) -> Any:
        with torch.overrides._pop_mode_temporarily():
            return super().forward()


def _eager(model: nn.Module, sites: list[Site]) -> nn.Module:
    return model


def _modules(model: nn.Module, sites: list[Site]) -> nn.Module:
    fastdl.optimize(model)
    sites += fastdl.report(model).replaced
    return model


def _graph(model: nn.Module, sites: list[Site], then: str | None = None) -> Any:
    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = fastdl.backend(gm, inputs, options={"then": then} if then else {})
        sites.extend(site for site in sites_of(gm) if site.reason is None)
        return compiled

    return torch.compile(model, backend=backend, dynamic=False)


def _compile(model: nn.Module, sites: list[Site]) -> Any:
    return torch.compile(model, dynamic=False)


CONTENDERS: dict[str, Form] = {
    "eager": _eager,
    "modules": _modules,
    "graph": _graph,
    "compile": _compile,
    "then compile": partial(_graph, then="inductor"),
}
OURS = ("modules", "graph", "then compile")
INDUCTOR = ("compile", "then compile")


class Proving(NamedTuple):
    """The step whose contenders are proved, what they are held against, and how that is called."""

    step: Step
    reference: Reference
    how: str

    @property
    def stands_in(self) -> bool:
        return self.how == SMALL


class Ready(NamedTuple):
    """A contender that is right, and what its first run told."""

    step: Step
    facts: dict[str, Any]


def measure(
    case: Case, machine: Host, *, compiled: bool = True, size: Size | None = None,
    dtype: torch.dtype = torch.bfloat16, rounds: int = 21, warm_s: float = 0.2,
) -> Row:  # fmt: skip
    """The row: each contender is proved, then all are timed in turn."""
    names = [name for name in CONTENDERS if compiled or name not in INDUCTOR]
    try:
        with alone(machine):
            step = case.step(size or case.large, machine.device, dtype)
            ready, refused, how = contenders(case, step, names, machine)
            row = _timed(ready, machine, rounds, warm_s)
    except MissingLibrary as missing:
        return {"ok": False, "missing": missing.name, "says": f"not measured: {missing}"}
    row |= {
        "ok": not any(name in refused for name in OURS), "training": case.training, "proof": how,
        "dtype": str(dtype).removeprefix("torch."), "refused": refused,
        "contenders": {name: one.facts for name, one in ready.items()},
        "shapes": shapes_of(step.inputs), "seeds": [SEED],
        "parameters": sum(p.numel() for p in step.parameters()),
    }  # fmt: skip
    return {**row, "says": line(row)}


@contextlib.contextmanager
def alone(machine: Host) -> Iterator[None]:
    """What one model has compiled or keeps in memory is nothing to the next one."""
    torch._dynamo.reset()
    machine.release()
    try:
        with torch._dynamo.config.patch(LIMITS):
            yield
    finally:
        torch._dynamo.reset()
        machine.release()


def contenders(
    case: Case, step: Step, names: Sequence[str], machine: Host
) -> tuple[dict[str, Ready], dict[str, str], str]:
    """Those that are right, why others are none, and what they were held against."""
    proving = _proving(case, step, machine)
    ready: dict[str, Ready] = {}
    refused = {}
    for name in names:
        try:
            found = _contender(CONTENDERS[name], step, proving)
        except Exception as problem:
            if name == "eager" or "CUDA error" in str(problem):
                raise  # there is nothing to compare with; or the device is lost
            found = f"{type(problem).__name__}: {problem}".splitlines()[0]
        if isinstance(found, Ready):
            ready[name] = found
        else:
            refused[name] = found
            machine.release()  # the failed one's memory, now that its frames are gone
    first_s = ready["eager"].facts["first_s"]
    for one in ready.values():
        one.facts["compile_s"] = max(one.facts["first_s"] - first_s, 0.0)
    return ready, refused, proving.how


def _proving(case: Case, step: Step, machine: Host) -> Proving:
    """At this size, or where a float64 copy has no room, at that of the tests."""
    loss = _loss_of if case.training else None
    try:
        return Proving(step, Reference(step, (), {}, loss), HERE)
    except (MemoryError, torch.OutOfMemoryError):
        pass
    machine.release()
    dtype = next(step.parameters()).dtype
    small = case.step(case.family.small, machine.device, dtype)
    return Proving(small, Reference(small, (), {}, loss), SMALL)


def _contender(form: Form, step: Step, proving: Proving) -> "Ready | str":
    """Make one on a copy of the step and prove it, or say why it is wrong."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    begun = time.monotonic()
    twin, sites = _formed(form, proving.step)
    proof = proving.reference.compare(Proved(twin.model, twin.inputs).train(twin.training))
    fault = proof.fault()
    if fault is not None:
        return f"WRONG: {fault.reason} ({fault.after:.1e}, eager {fault.before:.1e})"
    if proving.stands_in:
        counters.clear()
        begun = time.monotonic()
        twin, sites = _formed(form, step)
        twin.both()
    twin.zero_grad(set_to_none=True)
    before, after, allowed = proof.worst()
    facts = {
        "sites": len(sites),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "breaks_at": [why.splitlines()[0] for why in counters["graph_break"]],
        "first_s": time.monotonic() - begun,
        "error": {"before": before, "after": after, "allowed": allowed},
        "judge_is_fp64": proof.judge_is_fp64,
    }
    return Ready(twin, facts)


def _formed(form: Form, step: Step) -> tuple[Step, list[Site]]:
    sites: list[Site] = []
    twin = copy.deepcopy(step)
    twin.model = form(twin.model, sites)
    return twin, sites


def _timed(ready: Mapping[str, Ready], machine: Host, rounds: int, warm_s: float) -> Row:
    """Called from Python, where one waits for each step; then as CUDA graphs, if all can be."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    calls = {name: one.step.both for name, one in ready.items()}
    run = partial(interleave, rounds=rounds, warm_s=warm_s, settle=machine.settle)
    times = {"python": run({n: partial(_wait, c, machine) for n, c in calls.items()}, host_timer())}
    peaks = {name: machine.peak_bytes(call) for name, call in calls.items()}
    graphs, no_graph = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = machine.captured(lambda _, call=call: call(), 1, 1)
        except RuntimeError as problem:
            no_graph[name] = str(problem).splitlines()[0]
            break
    if not no_graph:
        times["graph"] = run(graphs, machine.timer())
    return {
        **{way: _over(of_way) for way, of_way in times.items()},
        "peak_bytes": peaks,
        "no_graph": no_graph,
        # torch's allocator and generator are not the same after a capture that failed
        "spent": bool(no_graph),
        "recompiled": counters["stats"]["unique_graphs"],
    }


def _wait(call: Callable[[], Any], machine: Host) -> None:
    call()
    machine.settle()


def _over(times: dict[str, list[float]]) -> dict[str, Any]:
    """Microseconds and ratios of all contenders, by what they are measured against."""
    bases = [name for name in ("eager", "compile") if name in times]
    return {
        base: {name: stats._asdict() for name, stats in summarize(times, base).items()}
        for base in bases
    }
