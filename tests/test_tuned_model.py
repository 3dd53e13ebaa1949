"""Tuning the shapes of a model: which they are, and that they are measured; those by default."""

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdl
from fastdl import tuned
from fastdl.cli import main
from fastdl.contract import SPECS, Maker
from fastdl.tuned import Device
from fastdl.tuned.choose import shortlist
from fastdl.tuned.problems import DEFAULTS, Asked
from fastdl.tuned.search import Offer
from test_tuned_search import on_meta

H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
A100 = Device("NVIDIA A100", "cuda", 80, sms=108, shared=166912)
HERE = Device("interpreter", "interpreter", 90, sms=3, shared=232448)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT = Path(__file__).resolve().parents[1]


class Mixed(nn.Module):
    """A convolution, a recurrent layer, a norm, attention and two products."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.LayerNorm(48)
        self.gru, self.out = nn.GRU(32, 48), nn.Linear(48, 80)
        self.attend = nn.MultiheadAttention(48, 3, batch_first=True)
        self.frozen = nn.Linear(80, 16).requires_grad_(False)

    def forward(self, x):
        y, _ = self.gru(self.conv(x).flatten(2).permute(2, 0, 1))
        y, _ = self.attend(y, y, y, need_weights=False)
        return self.frozen(self.out(self.norm(y)))


@pytest.fixture
def on_no_gpu(monkeypatch):
    """Neither a GPU nor the interpreter: models are run on the meta device."""
    monkeypatch.setattr(importlib.import_module("fastdl.ops._launch"), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def asked_by(*args):
    return importlib.import_module("fastdl.tuned.model").asked_by(*args)


def image(**options):
    return torch.randn(2, 16, 4, 4, **options)


def test_a_models_shapes_are_those_that_it_calls(on_no_gpu):
    found = asked_by(Mixed(), image())
    keys = {asked.key for asked in found}
    assert {"conv_nchw/float32/32x32x16x16", "gru/float32/16x2x64"} <= keys
    assert {"layer_norm/float32/64", "layer_norm_backward/float32/64"} <= keys
    assert {asked.sizes for asked in found if asked.op == "linear"} >= {(32, 80, 48), (32, 144, 48)}
    # of two positions and heads of 16
    parts = ("attention", "attention_dq", "attention_dkdv")
    assert {f"{op}/float32/2x16" for op in parts} <= keys
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(keys) == len(found)


def test_a_model_for_inference_asks_for_no_backward(on_no_gpu):
    found = asked_by(Mixed().requires_grad_(False), image())
    assert {one.op for one in found} == {"conv_nchw", "gru", "linear", "layer_norm", "attention"}


def test_what_torch_may_run_is_asked_too(on_no_gpu):
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).bfloat16()
    found = asked_by(model, torch.randn(2, 130, 64, dtype=torch.bfloat16))
    assert "attention_backward/bfloat16/128x16" in {asked.key for asked in found}


@pytest.mark.slow
def test_on_a_meta_device_the_same_is_asked(monkeypatch):
    model, x = Mixed().bfloat16(), image(dtype=torch.bfloat16)
    here = set(asked_by(model, x))
    monkeypatch.setattr(importlib.import_module("fastdl.ops._launch"), "INTERPRETED", False)
    assert set(asked_by(model, x)) == here


def test_the_model_stays_as_it_is(on_no_gpu):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grad, types = model[0].weight.grad, [type(m) for m in model.modules()]
    x, state = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    asked_by(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == types and model[0].weight.grad is grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.device.type == "cpu"


def test_an_optimized_model_is_run_as_it_is(on_no_gpu):
    plain, partly = (
        nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(2)
    )
    fastdl.optimize(partly, include=[nn.LayerNorm])
    asked = {one.op for one in asked_by(partly, torch.randn(4, 64))}
    assert asked == {"layer_norm", "layer_norm_backward"}
    assert {one.op for one in asked_by(plain, torch.randn(4, 64))} == asked | {"linear"}


FACTORY = """
import torch
from torch import nn

def make_model():
    layers = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32)
    return nn.Sequential(*layers), torch.randn(8, 32)

def alone():
    return nn.Linear(4, 4)

class OfValues(nn.Linear):
    def forward(self, x):
        return super().forward(x[x > 0][None])

def of_values():
    return OfValues(4, 4), torch.ones(4)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "models_to_tune.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "models_to_tune"
    sys.modules.pop("models_to_tune", None)


def test_the_list_of_a_model_needs_no_gpu(on_no_gpu, factory, capsys):
    assert main(["tune", f"{factory}:make_model", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    ops = ["layer_norm", "layer_norm_backward", "linear", "linear"]
    assert sorted(row["op"] for row in rows) == ops
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert all(row["entry"] is None for row in rows)
    assert main(["tune", f"{factory}:make_model", "--list"]) == 0
    said = capsys.readouterr().out
    assert "8x64x32" in said and "not measured" in said and "4 shapes" in said
    assert main(["tune", "softmax", "--list"]) == 0
    assert "softmax_backward" not in capsys.readouterr().out
    assert main(["tune", f"{factory}:make_model"]) == 1
    assert "--list" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, code, says",
    [
        (["{}:alone"], 2, ["example inputs", "{}:alone"]),
        (["{}:of_values"], 1, ["meta device", "TRITON_INTERPRET=1 fastdl tune --list"]),
        (["{}:make_modle"], 2, ["did you mean {}:make_model?"]),
        (["{}.py"], 2, ["fastdl tune {}:make_model"]),
        (["linear", "{}:alone"], 2, ["fastdl tune {}:alone"]),
        (["{}:OfValues"], 2, ["fastdl tune models:make_model"]),
    ],
)
def test_the_command_says_what_is_wrong(on_no_gpu, factory, capsys, given, code, says):
    assert main(["tune", "--list", *(word.format(factory) for word in given)]) == code
    said = capsys.readouterr().err
    assert all(words.format(factory) in said for words in says), said


@pytest.fixture
def gpu_of_straw(monkeypatch, tmp_path):
    """A GPU as far as tuning asks, with the interpreter behind it: a candidate takes 10 us, torch
    30.
    """
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path / "tables"))
    names = ("tuned.tune", "tuned.search", "tuned.model", "_tune")
    tune, search, model, command = (importlib.import_module(f"fastdl.{name}") for name in names)

    def timer(calls, rounds):
        for call in calls.values():
            call()
        return {name: [30.0 if name == "torch" else 10.0] * rounds for name in calls}

    def offer(asked):
        return Offer(shortlist(*asked, HERE)[:2])

    for module in (tune, model, command):
        monkeypatch.setattr(module, "this_gpu", lambda: H200)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(search, "DEVICE", "cpu")
    monkeypatch.setattr(model, "GPU", "cpu")
    monkeypatch.setattr(tune, "offers_for", lambda *given: nullcontext(offer))
    monkeypatch.setattr(tune, "events", timer)
    tuned.forget()
    yield tuned.user_file(H200.name)
    tuned.forget()


def test_a_model_needs_its_inputs(gpu_of_straw):
    with pytest.raises(ValueError, match="example_inputs"):
        fastdl.tune(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="told by its example_inputs"):
        fastdl.tune(nn.Linear(16, 16), torch.ones(1, 16), dtypes=[torch.float32])


def test_a_model_is_tuned_and_what_is_known_is_not_measured_again(gpu_of_straw):
    model, x, lines = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)), torch.randn(8, 32), []
    report = fastdl.tune(model, x, progress=lines.append)
    keys = {"linear/float32/8x16x32", "layer_norm/float32/16", "layer_norm_backward/float32/16"}
    assert {row.key for row in report.rows} == keys and report.ok and not report.skipped
    assert lines[0] == "tuning 3 shapes, 0 known" and lines[-1].startswith("3 of 3: ")
    entries = tuned.load(gpu_of_straw)["entries"]
    assert entries.keys() == keys
    assert all(e["margin"] == {"ratio": 3.0, "low": 3.0, "high": 3.0} for e in entries.values())
    second = fastdl.tune(model, x)
    assert not second.rows and second.ok and set(second.known) == keys
    assert "3 were measured before" in str(second)
    assert len(fastdl.tune(model, x, again=True).rows) == 3
    assert type(model[0]) is nn.Linear


def test_rows_are_written_as_they_are_found(gpu_of_straw, monkeypatch):
    tune = importlib.import_module("fastdl.tuned.tune")
    events, calls = tune.events, iter(range(100))

    def dies(given, rounds):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return events(given, rounds)

    monkeypatch.setattr(tune, "events", dies)
    with pytest.raises(KeyboardInterrupt):
        fastdl.tune("softmax", shapes=[(16,), (40,)], dtypes=[torch.float32])
    assert tuned.load(gpu_of_straw)["entries"].keys() == {"softmax/float32/16"}


def test_the_command_tunes_and_lists_what_it_found(gpu_of_straw, factory, capsys):
    assert main(["tune", f"{factory}:make_model", "--budget", "600", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 4
    assert main(["tune", f"{factory}:make_model", "--list"]) == 0
    said = capsys.readouterr().out
    assert "3.00x torch's speed (3.00 to 3.00)" in said and "not measured" not in said


def test_what_does_not_fit_into_memory_is_skipped(gpu_of_straw, monkeypatch):
    search = importlib.import_module("fastdl.tuned.search")
    made = search.made

    def too_large(asked):
        if asked.sizes == (16,):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(asked)

    monkeypatch.setitem(search.run.__kwdefaults__, "make", too_large)
    report = fastdl.tune("softmax", shapes=[(16,), (40,)], dtypes=[torch.float32])
    assert [row.key for row in report.rows] == ["softmax/float32/64"]
    assert report.skipped == ["softmax/float32/16: not enough memory to measure it"]


@pytest.mark.slow
def test_by_default_all_is_tuned_that_the_benchmark_times(on_no_gpu):
    known = {Asked(op, torch.bfloat16, sizes).key for op in DEFAULTS for sizes in DEFAULTS[op]}
    timed = {(case.make, case.backward) for spec in SPECS.values() for case in spec.bench}
    asked = set()
    for make, backward in timed:
        launch = importlib.import_module("fastdl.ops._launch")
        with launch.recording(H200), launch.asking() as lookups, on_meta():
            maker = Maker(torch.bfloat16, device="meta", grad=backward)
            outputs = [
                y
                for y in torch.utils._pytree.tree_leaves(make(maker)())
                if backward and y.requires_grad
            ]
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
        asked |= {tuned.key_of(op, dtype, sizes) for op, dtype, sizes, *_ in lookups}
    assert len(asked) > 50 and asked <= known
