"""`fastdl demo`: a model optimized, proved, trained and restored, on a GPU or without one."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, functional as FF
from ._spirals import (
    BATCH,
    POINTS,
    STEPS,
    Classifier,
    Curves,
    compare_training,
    draw,
    output,
    sparkline,
    spirals,
)
from ._table import Progress, heading, paragraph, show
from .contract import DTYPES, SPECS
from .contract.evaluate import Error, accuracy
from .contract.report import CheckReport, Row
from .ops import _launch
from .optimize.plan import optimize, plan, report, restore
from .optimize.verify import verify

# Ops whose accuracy is shown, and the sizes of what is timed on a GPU.
SHOWN_OPS = ("linear", "activation", "layer_norm")
ROWS, WIDTH = 8192, 4096


class ForgetfulNorm(nn.LayerNorm):
    """The mistake that nobody sees: right outputs, and a gradient that forgets the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True).detach()
        variance = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def run(picture: Path, steps: int | None = None) -> int:
    """The whole demonstration. 0 if everything agreed."""
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() and not _launch.INTERPRETED else "cpu"
    _greet(device)
    torch.manual_seed(0)
    model = Classifier().to(device)
    points, labels = spirals(POINTS, device)
    with _one_thread(device):
        before = _fingerprint(model, points)
        _show_plan(model)
        good = _show_optimize(model, points[:BATCH])
        good &= _show_wrong_gradient(model, points[:BATCH])
        good &= _show_accuracy(device)
        _show_training(points, labels, steps or STEPS, picture)
        _show_times(device)
        good &= _show_restore(model, points, before)
    print(f"\n{'All of it agreed' if good else 'NOT ALL OF IT AGREED'}, in ", end="")
    print(f"{time.monotonic() - begun:.0f} s. For a model of your own:")
    print("  fastdl plan mypackage.models:make_model")
    return 0 if good else 1


@contextlib.contextmanager
def _one_thread(device: str) -> Iterator[None]:
    # On tensors of this size a second thread costs more than it gives, and far more on busy cores.
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _greet(device: str) -> None:
    versions = f"fastdl {__version__}, torch {torch.__version__}"
    if _launch.HAVE_TRITON:
        versions += f", triton {importlib.metadata.version('triton')}"
    print(f"{versions}, {torch.cuda.get_device_name() if device == 'cuda' else 'on the CPU'}")
    if not _launch.HAVE_TRITON:
        print("Triton is not installed: every op runs in torch, and torch is compared with itself.")
    elif device == "cpu":
        print("The kernels run in Triton's interpreter: results are real, no time is measured.")


def _show_plan(model: nn.Module) -> None:
    heading("1. A model in plain PyTorch")
    print(model)
    heading("2. fastdl.plan(model): what would be replaced, and why the rest would not")
    paragraph(str(plan(model)))


def _show_optimize(model: nn.Module, points: Tensor) -> bool:
    heading("3. fastdl.optimize(model, example_inputs): each site tried on its own inputs")
    kept = optimize(model, points) is model
    done = report(model)
    rows = [
        (s.name, s.pattern, s.route or "", f"{s.before or 0:.1e}", f"{s.after or 0:.1e}")
        for s in done.replaced
    ]
    show(("replaced", "pattern", "now runs", "torch's error", "fastdl's error"), rows)
    for site in [*done.skipped, *done.rolled_back]:
        print(f"left alone: {site.name} ({site.pattern}): {site.reason}")
    heading("4. fastdl.verify: outputs and every gradient, with float64 as the judge")
    proof = verify(model, model, points)
    paragraph(str(proof))
    return kept and proof.ok and bool(done.replaced)


def _show_wrong_gradient(model: nn.Module, points: Tensor) -> bool:
    heading("5. The same proof for a kernel with a wrong gradient")
    wrong = restore(copy.deepcopy(model))
    wrong.block.norm.__class__ = ForgetfulNorm
    proof = verify(model, wrong, points)
    bad = [name for name, found in proof.comparisons.items() if not found.ok]
    found = proof.comparisons
    chosen = [name for name in found if name.startswith("output")][:1] + bad[:3]
    rows = [
        (name, f"{found[name].after:.1e}", f"{found[name].allowed:.1e}", found[name].reason or "ok")
        for name in chosen
    ]
    print("A layer norm whose outputs are right, and whose backward forgets the mean:")
    show(("tensor", "error", "allowed", ""), rows)
    print(
        f"Caught: {len(bad)} tensors of {len(found)} differ, because of {proof.first}. "
        "optimize would have undone the swap."
    )
    return proof.first == "block.norm" and proof.outputs["output"].ok


def _show_accuracy(device: str) -> bool:
    heading("6. fastdl check: how far ops are from float64, beside torch in the same dtype")
    if not _launch.HAVE_TRITON:
        print("Nothing to check without Triton.")
        return True
    found = core_accuracy([name for name in SHOWN_OPS if name in SPECS], device)
    head, *rows = found.table()
    show(head, rows)
    print(f"The core cases of {len(found.rows) // len(DTYPES)} ops; `fastdl check` runs them all.")
    return found.ok


def core_accuracy(ops: Sequence[str], device: str) -> CheckReport:
    """The accuracy table over the few cases of each op that stand for the others."""
    rows, todo = [], [(SPECS[name], dtype) for name in ops for dtype in DTYPES]
    with Progress("accuracy") as progress:
        for done, (spec, dtype) in enumerate(todo):
            name = str(dtype).removeprefix("torch.")
            row = Row(spec.name, name, len(spec.core), Error(), Error())
            for case in spec.core:
                progress(done, len(todo), f"{spec.name} {name} {case.name}")
                forward, gradient = accuracy(case, dtype, device)
                row.forward, row.gradient = row.forward.worst(forward), row.gradient.worst(gradient)
                if not (forward.ok and gradient.ok):
                    row.failures.append(case.name)
            rows.append(row)
    return CheckReport(device, _launch.INTERPRETED, rows)


def _show_training(points: Tensor, labels: Tensor, steps: int, picture: Path) -> None:
    heading("7. Training: torch and fastdl, from the same seed")
    curves = compare_training(points, labels, steps)
    _show_curves(curves)
    apart = max(abs(a - b) for a, b in zip(curves.torch, curves.fused, strict=True))
    far = [max(curves.distances(losses)) for losses in (curves.torch, curves.fused)]
    right = [float((output(m, points).argmax(-1) == labels).float().mean()) for m in curves.models]
    print(f"Largest difference between the two: {apart:.1e}. Largest distance from the same run")
    print(f"in float64: torch {far[0]:.1e}, fastdl {far[1]:.1e}.", end=" ")
    print(f"Points on the right spiral: {right[0]:.1%} and {right[1]:.1%}.")
    print("Dropout is off here, because fastdl draws other random numbers than torch.")
    if draw(curves, points, labels, picture):
        print(f"Drawn in {picture}")
    else:
        print("For a picture as well: pip install matplotlib")


def _show_curves(curves: Curves) -> None:
    steps = len(curves.torch)
    for name, losses in (("torch ", curves.torch), ("fastdl", curves.fused)):
        print(f"{name}  {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}")
    chosen = sorted({round(i * (steps - 1) / 5) for i in range(6)})
    rows = [
        (str(i + 1), f"{a:.8f}", f"{b:.8f}", f"{abs(a - b):.1e}")
        for i, a, b in ((i, curves.torch[i], curves.fused[i]) for i in chosen)
    ]
    show(("step", "loss, torch", "loss, fastdl", "difference"), rows)


def _show_times(device: str) -> None:
    heading("8. Speed")
    if device == "cpu":
        print("No GPU, no claim: an interpreter's time says nothing about a kernel's.")
        return
    from .tuned.tune import events

    rows = time_ops(timed_calls(device), events)
    show(("op", "torch", "fastdl", "faster by"), rows)
    print(f"{ROWS} rows of {WIDTH} in bfloat16, both timed in turn in one run, medians of 21.")


Calls = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def timed_calls(device: str, rows: int = ROWS, width: int = WIDTH) -> Calls:
    """For some ops, what torch's user writes and what fastdl's user writes."""
    made = [
        torch.randn(*shape, device=device) for shape in ((rows, width), (width, width), (width,))
    ]
    x, w, b = (t.bfloat16() for t in made)
    w, residual = w / width**0.5, x.flip(0)

    def with_gradients(norm: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in (x, b, b)]
        return lambda: torch.autograd.grad(norm(leaves[0], (width,), *leaves[1:]), leaves, residual)

    return {
        "gelu(linear(x))": (
            lambda: F.gelu(F.linear(x, w, b)),
            lambda: FF.linear(x, w, b, activation="gelu"),
        ),
        "layer_norm(x + residual)": (
            lambda: F.layer_norm(x + residual, (width,), b, b),
            lambda: FF.layer_norm(x, (width,), b, b, residual=residual),
        ),
        "layer_norm and its gradients": (
            with_gradients(F.layer_norm),
            with_gradients(FF.layer_norm),
        ),
    }


def time_ops(
    calls: Calls, measure: Callable[[dict[str, Any], int], dict[str, list[float]]]
) -> list[tuple[str, ...]]:
    """Medians of both, and of the ratio by round, which a drift of clocks does not touch."""
    rows = []
    for name, (plain, fused) in calls.items():
        both = {"torch": plain, "fastdl": fused}
        measure(both, 3)  # compiles
        times = measure(both, 21)
        ratios = [a / b for a, b in zip(times["torch"], times["fastdl"], strict=True)]
        us = (f"{statistics.median(times[who]):.1f} us" for who in both)
        rows.append((name, *us, f"{statistics.median(ratios):.2f}x"))
    return rows


Fingerprint = tuple[list[type], dict[str, Tensor], Tensor]


def _fingerprint(model: nn.Module, points: Tensor) -> Fingerprint:
    """Classes, parameters and outputs of a model."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return [type(module) for module in model.modules()], parameters, output(model, points)


def _show_restore(model: nn.Module, points: Tensor, before: Fingerprint) -> bool:
    heading("9. fastdl.restore(model): as if nothing had been")
    restore(model)
    classes, parameters, y = _fingerprint(model, points)
    found = {
        "every module has the class it had": classes == before[0],
        "every parameter is the same, bit by bit": parameters.keys() == before[1].keys()
        and all(torch.equal(p, before[1][name]) for name, p in parameters.items()),
        "the outputs are the same, bit by bit": torch.equal(y, before[2]),
    }
    for what, holds in found.items():
        print(f"{what}: {'yes' if holds else 'NO'}")
    return all(found.values())
