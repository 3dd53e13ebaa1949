"""FAKE results, in the form of real ones: for tests of what shows them. No number was measured."""

import json
import random
import re

from fastdl.contract import SPECS, STEPS

GPU = "FAKE GPU 9000"
CEILINGS = {"copy": 4e12, "matmul": {"bfloat16": 8e14, "float16": 8e14, "float32": 5e13}}
RUN = {
    "versions": {"fastdl": "0.1.0", "torch": "2.99", "triton": "3.99", "driver": "999.9"},
    "devices": [{"name": GPU, "sms": 132}],
    "ptxas": "99.9",
    "interpreted": False,
    "commit": "fa4e" * 10,
    "code": "fa4efa4efa4efa4e",
}
PASSES = {"forward": 1.0, "both": 1.0, "backward": 0.65, "step": 1.0}


def stats(us, base_us, spread=0.03):
    ratio = base_us / us
    return {
        "us": us, "ratio": ratio, "low": ratio * (1 - spread), "high": ratio * (1 + spread),
        "drift": 1.01,
    }  # fmt: skip


def way(times):
    base = min((name for name in times if name not in ("fused", "compile")), key=times.get)
    over = {name: stats(times["fused"], us) for name, us in times.items() if name != "fused"}
    return {
        "baseline": base,
        "contenders": {name: stats(us, times[base]) for name, us in times.items()},
        "over": {n: {key: s[key] for key in ("ratio", "low", "high")} for n, s in over.items()},
    }


def timed(case, op, step, dice):
    """A row whose times are thrown with dice, around what the ceilings allow."""
    dtype = str(case.dtype).removeprefix("torch.")
    roof = 1e6 * max(case.flops / CEILINGS["matmul"][dtype], case.bytes / CEILINGS["copy"])
    share = dice.uniform(0.35, 0.95)
    names = ["fused", "torch", "foreach"] if step else ["fused", "torch", "definition", "compile"]
    if op == "attention":
        names += ["flash", "cudnn", "flex"]
    parts = ["step"] if step else ["both", "backward"] if case.backward else ["forward"]
    passes = {}
    for part in parts:
        ours = roof / share * PASSES[part]
        times = {n: ours * (1 if n == "fused" else 2 ** dice.uniform(-0.3, 2)) for n in names}
        graph, python = way(times), way({n: us + dice.uniform(4, 40) for n, us in times.items()})
        passes[part] = {
            "how": "graph", "calls": 64, "no_graph": {}, "graph": graph, "python": python,
            "peak_bytes": {n: int(case.bytes * dice.uniform(0.4, 1.5)) for n in names},
        }  # fmt: skip
    us = passes[parts[0]]["graph"]["contenders"]["fused"]["us"]
    passes[parts[0]] |= {
        "tflops": case.flops / us / 1e6, "gb_per_s": case.bytes / us / 1e3, "roofline": roof / us,
    }  # fmt: skip
    return {
        "ok": True, "says": "fake", "run": "fake", "op": op, "dtype": dtype,
        "backward": case.backward, "shapes": shapes(case.name, dtype), "seeds": [0, 1, 2],
        "bytes": case.bytes, "flops": case.flops,
        "error": {"ours": 1e-3, "definition": 1.2e-3, "allowed": 2.4e-3},
        "launches": [f"{op}_fwd BLOCK=1024 w8"], "route": "fused", "sets": 3, "cold": True,
        "refused": {"liger": "not installed"}, "ceilings": CEILINGS, "passes": passes,
    }  # fmt: skip


def shapes(name, dtype):
    sizes = re.findall(r"\d+(?:x\d+)+", name) or ["67108864"]
    return [f"{dtype}[{size.replace('x', ', ')}]" for size in sizes]


def model(dice, training):
    names = ("eager", "modules", "graph", "compile", "then compile")
    times = {name: 2e4 * 2 ** (0 if name == "eager" else -dice.uniform(-0.1, 1)) for name in names}
    ways = {
        way: {base: {n: stats(us * k, times[base] * k) for n, us in times.items()}
              for base in ("eager", "compile")}
        for way, k in (("python", 1.0), ("graph", 0.9))
    }  # fmt: skip
    error = {"before": 1e-3, "after": 1.1e-3, "allowed": 2e-3}
    facts = {"sites": 12, "graphs": 1, "breaks": 0, "breaks_at": [], "first_s": 9.0,
             "compile_s": 7.5, "error": error, "judge_is_fp64": True}  # fmt: skip
    return {
        "ok": True, "says": "fake", "run": "fake", "training": training, "dtype": "bfloat16",
        "proof": "float64, at this size", "refused": {}, "libraries": {}, **ways,
        "contenders": dict.fromkeys(names, facts), "no_graph": {}, "spent": False,
        "peak_bytes": {name: int(1e10 * dice.uniform(0.5, 1)) for name in names}, "recompiled": 0,
    }  # fmt: skip


def checked(op, dice):
    def errors():
        torch_s = 10 ** dice.uniform(-7, -2)
        return {"ours": torch_s * 2 ** dice.uniform(-1, 0.9), "definition": torch_s,
                "allowed": 2 * torch_s}  # fmt: skip

    rows = [
        {"op": op, "dtype": dtype, "cases": 7, "forward": errors(), "gradient": errors(),
         "moved": None, "failures": []}
        for dtype in ("float32", "float16", "bfloat16")
    ]  # fmt: skip
    report = {"device": "cuda", "interpreted": False, "rows": rows, "ok": True}
    return {"ok": True, "says": "fake", "run": "fake", "report": report}


def tables(seed=0, ops=None):
    """By stage: what a whole run on a GPU would leave, with one row that failed and one refused."""
    dice, found = random.Random(seed), {}
    for op, spec in {**SPECS, **STEPS}.items():
        if ops is None or op in ops:
            found[op] = {case.name: timed(case, op, op in STEPS, dice) for case in spec.bench}
    first = next(iter(found.values()))
    first[next(iter(first))] = {"ok": False, "run": "fake", "says": "off by 1.00e+00, allowed 1e-3"}
    found["check"] = {op: checked(op, dice) for op in SPECS}
    families = ("llama", "gpt2", "resnet", "unet")
    found["models"] = {
        f"{name}, {what}": model(dice, what == "training")
        for name in families
        for what in ("training", "inference")
    }
    found["models"]["gpt2, training"] |= {"ok": False, "refused": {"graph": "WRONG: far off"}}
    found["exact"] = {"8x8x8": {"ok": True, "says": "bit by bit", "run": "fake"}}
    return {
        stage: {"stage": stage, "runs": {"fake": RUN}, "rows": rows}
        for stage, rows in found.items()
    }


def write(results, slug="fake_gpu_9000", seed=0, ops=None):
    """The tables in a folder of their own. Returns it."""
    folder = results / slug
    folder.mkdir(parents=True)
    for stage, table in tables(seed, ops).items():
        (folder / f"{stage}.json").write_text(json.dumps(table, indent=1))
    return folder
