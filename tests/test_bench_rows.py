"""Rows of the benchmark, without a GPU: passes, contenders, ratios, and the path of a GPU."""

import json
from functools import partial

import pytest
import torch
from bench import contenders, forms, rows, steps
from bench.machine import Gpu, Host
from bench.passes import PASSES, Inputs
from tests.straw import Straw, small

import fastdl
import fastdl.functional as FF
from fastdl.contract import STEPS, BenchCase, Maker
from fastdl.contract.attention import call, packed
from fastdl.contract.evaluate import Error
from fastdl.contract.optim import steps as steps_of

CEILINGS = rows.Ceilings(4e12, {"bfloat16": 8e14, "float16": 8e14, "float32": 5e13})


SMALL = [
    small("linear", lambda t: partial(FF.linear, t(5, 16), t(8, 16), t(8), activation="relu")),
    small("layer norm", lambda t: partial(FF.layer_norm, t(6, 24), (24,), t(24), t(24)), True),
    small("dropout", lambda t: partial(FF.dropout, t(64), p=0.5)),
]


def measure(case, machine=None, **options):
    row = rows.measure(
        case,
        machine or Host(),
        CEILINGS,
        **{"compiled": False, "rounds": 2, "warm_s": 0, **options},
    )
    assert json.loads(json.dumps(row)) == row
    return row


def timed(row, what="forward"):
    """Who was timed in a pass, by way of calling."""
    found = row["passes"][what]
    assert found["graph"]["contenders"].keys() == found["python"]["contenders"].keys()
    return found["graph"]["contenders"].keys()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_row(case):
    row = measure(case)
    assert row["ok"], row["says"]
    assert (row["op"], row["dtype"]) == (case.make(Maker(device="meta")).func.__name__, "bfloat16")
    assert row["seeds"] == [0] and row["sets"] == 1 and not row["refused"]
    assert row["route"].endswith("(device): fused") and len(row["launches"]) == 1
    assert row["ceilings"] == {"copy": 4e12, "matmul": CEILINGS.matmul}
    assert [*row["passes"]] == (["both", "backward"] if case.backward else ["forward"])
    for what, found in row["passes"].items():
        assert (found["how"], found["no_graph"]) == ("graph", {})
        assert {"torch", "fused", "definition"} <= timed(row, what) == found["peak_bytes"].keys()
        for way in ("graph", "python"):
            stats, over = found[way]["contenders"], found[way]["over"]
            assert over.keys() == stats.keys() - {"fused"}
            base = found[way]["baseline"]
            assert over[base] == {k: stats["fused"][k] for k in ("ratio", "low", "high")}
    counted, *others = row["passes"].values()
    us = counted["graph"]["contenders"]["fused"]["us"]
    assert counted["tflops"] == pytest.approx(1000 / us / 1e6)
    assert counted["gb_per_s"] == pytest.approx(1000 / us / 1e3)
    assert counted["roofline"] == pytest.approx(1e6 * 1000 / 4e12 / us)
    assert not any({"tflops", "gb_per_s", "roofline"} & found.keys() for found in others)


@pytest.mark.parametrize("what", ["both", "backward"])
def test_a_pass_is_the_gradient_of_all_inputs(what):
    case = small("rotary", lambda t: partial(FF.softmax, t(3, 4).t() * 2, -1), True, torch.float64)
    inputs = Inputs(case, Host())
    with fastdl.policy("definition"):
        found = PASSES[what](torch.softmax, inputs)
        got = [found(0) for _ in range(2)]
    (y,), (x,) = inputs.upstream(0), inputs.call(0)[1]
    want = torch.autograd.grad(torch.softmax(x, -1), x, y)
    for (dx,) in got:
        torch.testing.assert_close(dx, *want)
    assert x is not inputs.first.args[0] and x.is_leaf


def test_backward_alone_runs_forward_once_a_set():
    ran = []

    def form(*args):
        ran.append(args[0])
        return FF.layer_norm(*args)

    machine = Host()
    machine.cold_bytes = 1000  # two sets of 384 bytes are too few
    inputs = Inputs(SMALL[1], machine)
    assert len(inputs) == 3 and inputs.cold and inputs.seeds == [0, 1, 2]
    backward = PASSES["backward"](form, inputs)
    for i in (0, 1, 2, 0, 1, 2):
        backward(i)
    assert len(ran) == 3
    backward.forget()
    backward(1)
    assert len(ran) == 4


class Watched(torch.autograd.Function):
    """Doubles, and says on which stream either pass ran."""

    straw, forwards, backwards = None, None, None

    @staticmethod
    def forward(ctx, x):
        ctx.made_on = Watched.straw.streams[-1]
        Watched.forwards.append(Watched.straw.capturing)
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        Watched.backwards.append((Watched.straw.capturing, Watched.straw.streams[-1], ctx.made_on))
        return 2 * dy


@pytest.mark.parametrize("what", ["both", "backward"])
def test_what_is_captured_was_made_on_the_captured_stream(what):
    """Autograd would run a node of another stream there, outside of the graph."""
    with Straw(l2=200).installed() as straw:
        Watched.straw, Watched.forwards, Watched.backwards = straw, [], []
        inputs = Inputs(SMALL[1], Gpu())
        call = PASSES[what](lambda x, *rest: Watched.apply(x), inputs)
        leaves = {id(inputs.call(0)[1][0])}
        with pytest.raises(RuntimeError, match="not have been used"):
            call(0)  # of three inputs, one is used
        call = PASSES[what](lambda x, _, w, b: Watched.apply(x) + w + b, inputs)
        call(0)
        Gpu().captured(call, len(inputs), 4)
        captured = [(here, made_on) for capturing, here, made_on in Watched.backwards if capturing]
    assert len(inputs) == 2 and len(captured) == 4
    assert all(here is made_on is not straw.streams[0] for here, made_on in captured)
    assert any(Watched.forwards) == (what == "both")
    # a leaf of each stream: its own node remembers the stream as well
    leaves |= {id(x) for (call, (x, *_)) in inputs._here.values()}
    assert len(inputs._here) == 3 and len(leaves) == 3


def test_the_rival_of_linear_is_torchs_single_call():
    row = measure(SMALL[0])
    assert timed(row) == {"torch", "fused", "addmm", "definition"}
    assert row["shapes"] == ["bfloat16[5, 16]", "bfloat16[8, 16]", "bfloat16[8]"]
    x, w, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    call = partial(FF.linear, x, w, b, activation="relu")
    torch.testing.assert_close(forms.linear_rivals(call, False)["addmm"](x, w, b, "relu"), call())
    assert not forms.linear_rivals(partial(call, x.requires_grad_(), w, b), False)


@pytest.mark.parametrize(
    "backward",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["forward", "both passes"],
)
def test_a_row_of_attention(backward):
    row = measure(small("attention", call(kv=1, Sq=9, is_causal=True), backward))
    assert row["ok"], row["says"]
    for what in row["passes"]:
        assert timed(row, what) == {"torch", "fused", "flash", "definition"}
    # the other two have no kernels for the host
    assert row["refused"].keys() == {"cudnn", "efficient"}
    assert all(why.startswith("RuntimeError: No ") for why in row["refused"].values())


def test_a_packed_row_of_attention():
    row = measure(small("packed", packed([5, 9], window_size=(-1, 0))))
    assert row["ok"] and timed(row) == {"torch", "fused", "definition"}
    assert row["refused"].keys() == {"varlen"}


def with_rival(monkeypatch, form):
    monkeypatch.setitem(forms.RIVALS, FF.linear, lambda call, compiled: {"addmm": form})


@pytest.mark.parametrize(
    "form, says",
    [
        (lambda x, w, b, activation: (x @ w.T).relu(), "off by 0."),
        (lambda x, w, b, activation: (x @ w.T).relu() * float("nan"), "off by nan"),
        (lambda x, w, b, activation: x, "off by inf"),
    ],
    ids=["no bias", "nan", "another shape"],
)
def test_rivals_that_compute_something_else_are_named_and_not_timed(monkeypatch, form, says):
    with_rival(monkeypatch, form)
    row = measure(SMALL[0])
    assert timed(row) == {"torch", "fused", "definition"}
    assert row["refused"]["addmm"].startswith(says) and "WRONG: addmm" in row["says"]


def test_of_a_gradient_of_0_what_did_not_cancel_is_not_looked_at():
    ones, nearly = torch.ones(8), torch.full((8,), 1e-6)
    assert contenders.apart([ones, nearly], [ones, -nearly]) < contenders.ALIKE
    assert contenders.apart([nearly], [-nearly]) > contenders.ALIKE
    assert contenders.apart([ones, 0.9 * ones], [ones, ones]) > contenders.ALIKE


@pytest.mark.parametrize("limit", [0, 1, 10**9])
def test_memory_that_runs_out_leaves_one_out(monkeypatch, limit):
    """At once, or beside what all others keep."""
    calls = []

    def late(x, w, b, activation):
        calls.append(1)
        if len(calls) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return (x @ w.T + b).relu()

    with_rival(monkeypatch, late)
    with Straw().installed():
        row = measure(SMALL[0], Gpu())
    found = row["passes"]["forward"]
    assert row["ok"] and ("addmm" in found["python"]["contenders"]) == (limit > 1)
    says = {"addmm": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}
    assert row["refused"] == (says if limit <= 1 else {})
    assert found["no_graph"].keys() == ({"addmm"} if limit == 1 else set())


def test_a_definition_that_takes_too_long_is_not_timed(monkeypatch):
    monkeypatch.setattr(rows, "LONG_US", 0)
    monkeypatch.setattr(rows, "SLOW", 0)
    row = measure(SMALL[0])
    assert timed(row) == {"torch", "fused", "addmm"}
    assert "times as slow as torch" in row["refused"]["definition"]


def test_steps_are_not_written_out(monkeypatch):
    case = small("gru", lambda t: partial(FF.gru, t(2, 1, 4), None, [t(12, 4), t(12, 4)]))
    row = measure(case, compiled=True)
    # without a measurement users get cuDNN
    assert timed(row) == {"torch", "fused", "routed", "definition"}
    assert row["refused"] == {"compile": "torch.compile writes out every step, not timed"}


def test_ratios_are_to_the_fastest_that_torch_has():
    us = {
        "torch": 30.0, "fused": 10.0, "flash": 20.0, "flex": 18.0, "compile": 15.0, "liger": 5.0,
        "definition": 90.0, "vendor": 25.0,
    }  # fmt: skip
    found = rows._compared({name: [value] * 5 for name, value in us.items()})
    assert found["baseline"] == "flash" and found["contenders"].keys() == us.keys()
    assert found["contenders"]["fused"]["ratio"] == 2
    ratios = {name: over["ratio"] for name, over in found["over"].items()}
    assert ratios == {name: us[name] / 10 for name in us if name != "fused"}


def test_a_drift_is_told():
    steady = {"drift": 1.04}
    assert not rows.drifted({"fused": steady, "torch": steady}, ("fused", "torch"))
    says = rows.drifted({"fused": {"drift": 0.9}, "torch": steady}, ("fused", "torch"))
    assert says == "DRIFT of fused -10%"


def test_the_line_of_a_row():
    us = {"torch": [30.0] * 4, "fused": [10.0] * 4, "flash": [20.0] * 4, "compile": [15.0] * 4}
    peaks = {"torch": 100, "fused": 50, "flash": 100, "compile": 100}
    found = rows.summary(rows.Times({"graph": us, "python": us}, 1, {}, peaks))
    row = {"passes": {"both": {**found, "roofline": 0.5}, "backward": found}}
    said = rows.line({**row, "refused": {"flex": "off by 0.3"}, "cold": False})
    assert said == (
        "     10.0 us   2.00x flash   3.00x torch   1.50x compile   50% of the roof  "
        "called  2.00x  memory 0.50x  "
        "backward:      10.0 us   2.00x flash   3.00x torch   1.50x compile  "
        "called  2.00x  memory 0.50x  in L2  WRONG: flex"
    )


def test_the_line_of_a_row_whose_baseline_was_only_captured():
    us = {"torch": [30.0] * 4, "fused": [10.0] * 4}
    graphs, peaks = {**us, "definition": [20.0] * 4}, {"torch": 100, "fused": 50}
    found = rows.summary(rows.Times({"graph": graphs, "python": us}, 1, {}, peaks))
    said = rows.line({"passes": {"forward": found}, "refused": {}, "cold": True})
    assert said == "     10.0 us   2.00x definition   3.00x torch"


def test_a_row_that_cannot_be_captured_says_so():
    class NoGraphs(Host):
        def captured(self, *args):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    row = measure(SMALL[0], NoGraphs())
    found = row["passes"]["forward"]
    assert found["how"] == "python" and "graph" not in found and "NO GRAPH" in row["says"]
    assert set(found["no_graph"].values()) == {"operation not permitted"}


def test_a_row_on_a_gpu():
    with Straw().installed() as straw:
        gpu = Gpu()
        assert (gpu.name, gpu.cold_bytes) == ("Straw 1", 300)
        row = measure(SMALL[2], gpu, rounds=3)
    # a set is 128 bytes: 3 are cold; 500 us for all of them, so 2 times round make a graph
    found = row["passes"]["forward"]
    assert (row["sets"], row["seeds"], row["cold"]) == (3, [0, 1, 2], True)
    assert (found["calls"], found["how"]) == (6, "graph")
    assert found["graph"]["contenders"]["fused"]["us"] == pytest.approx(500 / 6)
    assert found["peak_bytes"] == {"torch": 300, "fused": 300, "definition": 300}
    assert straw.replays >= 3 * 3


def test_both_passes_on_a_gpu():
    with Straw().installed():
        row = measure(SMALL[1], Gpu())
    assert row["ok"] and [*row["passes"]] == ["both", "backward"]
    assert timed(row, "backward") == {"torch", "fused", "definition"}


@pytest.mark.slow
def test_a_compiled_backward_may_be_kept():
    """Without `retained` torch.compile's backward takes what forward kept for itself."""
    row = measure(SMALL[1], compiled=True)
    assert not row["refused"] and "compile" in timed(row, "backward")


def test_a_wrong_row_is_not_timed(monkeypatch):
    case = small("wrong", lambda t: partial(FF.relu, t(64)))
    monkeypatch.setattr(rows, "error", lambda *args: Error(2.0, 0.1, 0.2))
    row = rows.measure(case, Host(), CEILINGS)
    assert not row["ok"] and "2.00e+00" in row["says"] and "passes" not in row


@pytest.mark.parametrize("name", STEPS)
def test_rows_of_steps(monkeypatch, name):
    spec = STEPS[name]
    ours = getattr(fastdl.optim, spec.reference)
    case = BenchCase("small", steps_of(ours, [(5, 3), (7,)]), 28 * 22, 0, torch.float32)
    row = steps.measure(spec, case, Host(), CEILINGS, rounds=3, warm_s=0)
    assert json.loads(json.dumps(row)) == row
    found = row["passes"]["step"]
    assert row["ok"] and (row["op"], row["shapes"]) == (name, ["float32[5, 3]", "float32[7]"])
    assert found["how"] == "python" and found["calls"] == 5 and found["tflops"] == 0
    assert found["python"]["contenders"].keys() == {"fused", "torch", "foreach"}
    assert found["python"]["baseline"] in ("torch", "foreach")
    assert found["peak_bytes"].keys() == {"fused", "torch", "foreach"}
    assert "x torch" in row["says"] and "of the roof" in row["says"] and row["launches"]
    monkeypatch.setattr(steps, "distance", lambda *args: float("nan"))
    wrong = steps.measure(spec, case, Host(), CEILINGS, rounds=3, warm_s=0)
    assert not wrong["ok"] and "off by nan" in wrong["says"]


def test_ceilings():
    found = rows.ceilings(Host(), size=64, copy_bytes=1 << 16)
    assert found.copy > 0 and found.matmul.keys() == {"bfloat16", "float16", "float32"}


def test_the_roof_is_the_slower_of_two():
    for flops, moved, roof_us in ((8e8, 0, 1), (8e8, 4e7, 10)):
        found = rows.rates(flops, moved, "bfloat16", 20.0, CEILINGS)
        assert found["roofline"] == pytest.approx(roof_us / 20)
        assert (found["tflops"], found["gb_per_s"]) == (flops / 20e6, moved / 20e3)
