"""What tuning tries: few candidates, compiled ahead; and when torch wins."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdl
from fastdl import tuned
from fastdl.tuned import Device
from fastdl.tuned.choose import MOST, configs, shortlist
from fastdl.tuned.problems import DEFAULTS, PROBLEMS, Asked
from fastdl.tuned.search import margin_of

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
