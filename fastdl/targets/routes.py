"""Who computes the benchmark's convolutions and recurrent layers on a GPU, and what says so."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..contract import SPECS, BenchCase, Maker
from ..ops import _launch, _tuned
from ..ops._launch import Device
from .devices import target_of

OPS = ("conv", "lstm", "layer_norm_lstm", "gru", "rnn")

# The passes around a library's convolution; any other kernel takes its place.
AROUND = frozenset({"channelnorm_affine", "finish_fwd"})

HEADER = ("op", "shape", "dtype", "computed by", "measured")


class Route(NamedTuple):
    """One shape. `measured` names the entry of a table, or says that there is none."""

    op: str
    shape: str
    dtype: str
    by: str
    measured: str


class Routes(NamedTuple):
    """Printable, also as JSON."""

    gpu: str
    rows: list[Route]

    def to_json(self) -> str:
        rows = [route._asdict() for route in self.rows]
        return json.dumps({"gpu": self.gpu, "routes": rows}, indent=1)


def routes(gpu: str | None = None) -> Routes:
    """The routes on the GPU of this name, else on the one here, else on an H200."""
    here = None
    if torch.cuda.is_available() and not _launch.INTERPRETED:
        here = _launch.gpu_facts(torch.cuda.current_device())
    device = here or replace(target_of("sm_90").device, name="NVIDIA H200")
    device = replace(device, name=gpu or device.name)
    rows = [_route(op, case, device) for op in OPS for case in _forward(op)]
    return Routes(device.name, rows)


def _forward(op: str) -> Iterator[BenchCase]:
    """A case for each shape: both passes go the same way."""
    cases = SPECS[op].bench
    yield from [case for case in cases if not case.backward] or cases


def _route(op: str, case: BenchCase, device: Device) -> Route:
    with (
        # torch refuses to answer for meta tensors
        mock.patch.object(torch, "is_autocast_enabled", lambda *device: False),
        torch.no_grad(),
        _launch.recording(device) as launches,
        _launch.asking() as lookups,
    ):
        case.make(Maker(case.dtype, device="meta", grad=False))()
    asked = {_tuned.key_of(op, dtype, sizes): found for op, dtype, sizes, found, _ in lookups}
    kernels = list(dict.fromkeys(launch.kernel.name for launch in launches))
    dtype = str(case.dtype).removeprefix("torch.")
    return Route(op, case.name, dtype, _by(kernels, asked), _measured(asked, device))


def _by(kernels: list[str], asked: dict[str, Any]) -> str:
    if not AROUND.issuperset(kernels):
        return f"Triton: {', '.join(kernels)}"
    library = "cuBLAS" if any(key.startswith("linear/") for key in asked) else "cuDNN"
    return f"{library}, and Triton: {', '.join(kernels)}" if kernels else library


def _measured(asked: dict[str, Any], device: Device) -> str:
    """Which entries were found, in the user's table or in the one that comes with fastdl."""
    found = [
        f"{key} ({_table(c.source, device)}{f', {c.margin}' if c.margin else ''})"
        for key, c in asked.items()
        if c is not None
    ]
    return ", ".join(found) or "not measured: a rule by shape"


def _table(source: str, device: Device) -> str:
    path = (_tuned.user_file if source == "user" else _tuned.packaged_file)(device.name)
    date = _tuned.load(path)["provenance"].get("date", "an unknown date")
    return f"{'your' if source == 'user' else 'packaged'} table of {date}"
