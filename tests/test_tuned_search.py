"""What tuning tries: few candidates, compiled ahead; when torch wins; and the shapes of a model."""

import importlib
import json
import os
import subprocess
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
from fastdl.tuned.choose import MOST, configs, shortlist
from fastdl.tuned.problems import DEFAULTS, PROBLEMS, Asked
from fastdl.tuned.search import Offer, margin_of

H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
A100 = Device("NVIDIA A100", "cuda", 80, sms=108, shared=166912)
HERE = Device("interpreter", "interpreter", 90, sms=3, shared=232448)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT = Path(__file__).resolve().parents[1]

ODD = {1: [(1,), (77,), (1000,), (50257,)], 2: [(1, 16), (7, 72), (33, 256), (128, 512)]}
ODD |= {3: [(1, 1, 1), (1, 50257, 768), (77, 3000, 11008), (4096, 4096, 65536), (3, 5, 70)]}
ODD |= {4: [(1, 1, 1, 1), (49, 7, 3, 49), (100000, 1000, 513, 9)]}


def every_size(op):
    return [*DEFAULTS[op], *ODD[len(DEFAULTS[op][0])]]


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


@pytest.mark.parametrize("op", DEFAULTS)
def test_at_most_eight_are_measured(op):
    for device in (H200, A100, HERE):
        for sizes in every_size(op):
            for dtype in DTYPES:
                found, known = (
                    shortlist(op, dtype, sizes, device),
                    configs(op, dtype, sizes, device),
                )
                known = list(known)
                assert 1 <= len(found) <= MOST == 8
                assert all(config in known for config in found)
                assert all(found.count(config) == 1 for config in found)


def test_all_that_is_not_measured_may_still_stand_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path))
    sizes = (16, 4096, 1024)
    known = list(configs("linear", torch.bfloat16, sizes, H200))
    few = shortlist("linear", torch.bfloat16, sizes, H200)
    other = next(config for config in known if config not in few)
    entry = {"blocks": dict(other.blocks), "variant": other.variant, "splits": other.splits}
    entry |= {"num_warps": other.num_warps, "num_stages": other.num_stages}
    key = tuned.key_of("linear", torch.bfloat16, sizes)
    tuned.forget()
    tuned.write(tuned.user_file(H200.name), H200.name, {}, {key: entry})
    found = tuned.lookup("linear", torch.bfloat16, sizes, H200)
    assert (found.blocks, found.splits) == (other.blocks, other.splits)
    tuned.forget()


@pytest.mark.parametrize("op", ["linear", "layer_norm", "layer_norm_backward", "softmax"])
def test_what_the_rule_would_take_is_among_them(op):
    """So that a table is never worse than none."""
    for sizes in DEFAULTS[op]:
        launched = launched_by_rule(op, sizes)
        known = list(configs(op, torch.bfloat16, sizes, H200))
        few = shortlist(op, torch.bfloat16, sizes, H200)
        # some rules have more stages or wider tiles than what tables may name
        assert launched not in known or launched in few


def launched_by_rule(op, sizes):
    launch = importlib.import_module("fastdl.ops._launch")
    with launch.recording(H200) as launches, fastdl.policy("fused", "error"), on_meta():
        tried = PROBLEMS[op](torch.bfloat16, sizes, "meta")
        launches.clear()
        tried.fused()
    return launches[0].config


def on_meta():
    """torch refuses to say for meta tensors whether autocast is on."""
    from unittest import mock

    return mock.patch.object(torch, "is_autocast_enabled", lambda *device: False)


def test_torch_wins_by_more_than_noise():
    ours = [10.0] * 16
    clear = margin_of([9.8] * 12 + [11.0] * 4, ours)
    assert clear.ratio == pytest.approx(0.98) and clear.high > 1  # one round in four is not
    assert margin_of([9.8] * 15 + [11.0], ours).high < 1
    noisy = margin_of([8.0, 9.0, 10.5, 11.0] * 4, ours)
    assert noisy.ratio < 1 < noisy.high
    # rounds are compared with themselves: a clock that halves changes nothing
    assert margin_of([20.0, 10.0] * 8, [10.0, 5.0] * 8) == (2.0, 2.0, 2.0)


# Ahead ----------------------------------------------------------------------------------------

AHEAD = """
import sys, json, torch
from pathlib import Path
from bench.dispatch import without_gpu
from fastdl.tuned import Device
from fastdl.tuned import ahead
from fastdl.tuned.problems import PROBLEMS, Asked
from fastdl.tuned.search import forced

few, shortlist = int(sys.argv[3]), ahead.shortlist
ahead.shortlist = lambda *asked: shortlist(*asked)[:few]
device = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
wanted = [Asked(op, torch.bfloat16, tuple(sizes)) for op, sizes in json.loads(sys.argv[1])]
cache = Path(sys.argv[2])
with ahead.compiled(wanted, device, min(few, 2)) as offers:
    found = {asked: offers(asked) for asked in wanted}
before = {path.name for path in cache.iterdir()}
assert before, "nothing was compiled"
launched = 0
for asked, offer in found.items():
    assert offer.configs
    with without_gpu():
        # a device that is not "cpu" has the sizes of a GPU
        problem = PROBLEMS[asked.op](asked.dtype, asked.sizes, torch.device("cpu"))
        for config in offer.configs:
            with forced(asked, config):
                problem.fused()
            launched += 1
new = {path.name for path in cache.iterdir()} - before
if len(sys.argv) > 4:  # a launch that was not foreseen has to be seen
    from fastdl import functional as FF
    with without_gpu():
        FF.relu(torch.randn(64))
    new = {path.name for path in cache.iterdir()} - before
print(json.dumps({"launched": launched, "new": len(new)}))
"""


def ahead(tmp_path, wanted, *more):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AHEAD, json.dumps(wanted), str(tmp_path), *map(str, more)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_launch_after_it_compiles_nothing(tmp_path):
    assert ahead(tmp_path, [("softmax", (1000,))], 1) == {"launched": 1, "new": 0}


@pytest.mark.slow
def test_launches_of_all_kinds_compile_nothing(tmp_path):
    wanted = [("linear", (16, 128, 1024)), ("conv", (64, 32, 32, 9)), ("attention", (128, 64))]
    wanted += [("layer_norm_backward", (256,)), ("rms_norm", (4096,)), ("attention_dq", (128, 64))]
    found = ahead(tmp_path, wanted, 8)
    assert found["launched"] > 30 and found["new"] == 0


@pytest.mark.slow
def test_a_launch_that_was_not_foreseen_is_seen(tmp_path):
    assert ahead(tmp_path, [("softmax", (1000,))], 1, "unforeseen")["new"] > 0


KEYS = """
import random, sys
from pathlib import Path
from fastdl.ops._launch import Kernel

names = [f"{path.stem}.{line[4:].partition('(')[0]}"
         for path in sorted(Path("fastdl/kernels").glob("[a-z]*.py"))
         for before, line in zip(path.read_text().splitlines(), path.read_text().splitlines()[1:])
         if before == "@triton.jit" and line.startswith("def ")]
random.Random(int(sys.argv[1])).shuffle(names)
print(len(names), sorted((name, Kernel(name).fn.cache_key) for name in names))
"""


@pytest.mark.slow
def test_keys_of_kernels_do_not_depend_on_which_is_first():
    """Triton computes them from what it has met, and another process meets it in another order."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {
        subprocess.run(
            [sys.executable, "-c", KEYS, seed], env={**env, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "1234"
    }  # fmt: skip
    assert len(found) == 1 and int(found.pop().split()[0]) > 50


@pytest.fixture
def module():
    return importlib.import_module("fastdl.tuned.ahead")


def test_what_does_not_apply_is_not_tried_twice(module):
    """77 columns cannot be moved 16 bytes at a time: all candidates come to torch's product."""
    found = module.launches_of(Asked("linear", torch.bfloat16, (8, 77, 64)), H200)
    assert [config.variant for config, _ in found.candidates] == ["gemm"]
    no_tma = module.launches_of(Asked("linear", torch.bfloat16, (8192, 4096, 1024)), A100)
    assert "persistent" not in {config.variant for config, _ in no_tma.candidates}


@pytest.mark.parametrize("op", DEFAULTS)
def test_all_can_be_prepared_on_any_gpu(module, op):
    for device in (H200, A100):
        for sizes in every_size(op)[-2:]:
            if op in ("lstm", "gru", "rnn") and sizes[-1] > 1024:
                continue  # no weight of so many units
            for dtype in (torch.bfloat16, torch.float32):
                asked = Asked(op, dtype, sizes)
                found = module.launches_of(asked, device).candidates
                assert 1 <= len(found) <= MOST
                assert all(specs or c.variant in ("vendor", "gemm") for c, specs in found)


def test_facts_sift_candidates(module):
    Facts = module.Facts
    good, spilling, large, broken = shortlist("linear", torch.bfloat16, (64, 64, 64), H200)[:4]
    facts = [
        (good, [Facts(), Facts(shared=232448)]),
        (spilling, [Facts(), Facts(spills=4)]),
        (large, [Facts(shared=232449)]),
        (broken, [Facts(error="PassManager::run failed")]),
    ]
    offer = module.sifted(facts, H200)
    assert offer.configs == [good]
    said = "\n".join(offer.dropped)
    assert "4 spills" in said and "232449 bytes" in said and "PassManager" in said
    # where all spill, all are measured
    assert module.sifted(facts[1:3], H200).configs == [spilling]


def test_a_crash_of_a_compiler_costs_one_candidate(module, monkeypatch):
    class Crashing:
        def start(self, ask, item):
            return ask(self, item)

        def request(self, request):
            if request["compile"]["num_warps"] == 8:
                raise module.WorkerError("the compiler's process ended with status -11")
            return {"registers": 32, "loop": None, "dots": []}

    class Done:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

    workers = Crashing()
    workers.start = lambda ask, item: Done(ask(workers, item))
    asked = Asked("layer_norm", torch.bfloat16, (256,))
    all_of_it = shortlist(*asked, H200)
    offer = module._Ahead(workers, [asked], H200).offer(asked)
    assert offer.configs == [config for config in all_of_it if config.num_warps != 8]
    assert len(offer.dropped) == len(all_of_it) - len(offer.configs) > 0
    assert "status -11" in offer.dropped[0]


def test_the_next_are_compiled_while_one_is_measured(module):
    started = []

    class Idle:
        def start(self, ask, item):
            started.append(item[0])
            return self

        def result(self):
            return module.Facts()

    wanted = [Asked("softmax", torch.bfloat16, (n,)) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    ahead = module._Ahead(Idle(), wanted, H200)
    ahead.offer(wanted[0])
    assert ahead.plans.keys() == set(wanted[: 1 + module.NEXT])
    known = len(started)
    ahead.offer(wanted[0])
    assert len(started) == known
    ahead.offer(wanted[1])
    assert ahead.plans.keys() == set(wanted[: 2 + module.NEXT])


# Models ---------------------------------------------------------------------------------------


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
