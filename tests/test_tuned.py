"""Tables of measured configurations: what is refused, how they are written, and `fastdl.tune`."""

import importlib
import json
import multiprocessing
import os
import stat
import warnings
from contextlib import nullcontext

import pytest
import torch

import fastdl
import fastdl.functional as FF
from fastdl import tuned
from fastdl.tuned import Config, Device
from fastdl.tuned.choose import shortlist
from fastdl.tuned.problems import PROBLEMS
from fastdl.tuned.search import Offer, run

H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)
HERE = Device("interpreter", "interpreter", 90, sms=3, shared=232448)
ENTRY = {
    "blocks": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8, "SWAP": 0},
    "num_warps": 4,
    "num_stages": 4,
    "variant": "tiles",
    "splits": 2,
}
HALF = torch.bfloat16, (128, 16)
MARGIN = {"ratio": 1.2, "low": 1.15, "high": 1.3}
KEY, SIZES = "linear/bfloat16/16x64x128", (16, 50, 100)


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """The user's table for the H200: a file in a folder of the test."""
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path))
    tuned.forget()
    yield tuned.user_file(H200.name)
    tuned.forget()


def table(**changed):
    return {"schema": tuned.SCHEMA, "gpu": "x", "provenance": {}, "entries": {KEY: ENTRY}} | changed


def entry(**changed):
    return table(entries={KEY: {**ENTRY, **changed}})


def blocks(**changed):
    return entry(blocks={**ENTRY["blocks"], **changed})


DAMAGED = {
    "not JSON": "{",
    "not text": b"\xff\xfe\x00",
    "nested too deeply": "[" * 100_000,
    "not a table": "[]",
    "another schema": json.dumps(table(schema=99)),
    "an unknown key": json.dumps(table(code="import os")),
    "a missing key": json.dumps({"schema": 1, "entries": {}}),
    "too large": json.dumps(table()) + " " * tuned.MAX_BYTES,
    "not a size": json.dumps(table(entries={"linear/bfloat16/16x-1": ENTRY})),
    "an unknown key of an entry": json.dumps(entry(run="rm")),
    "no power of two": json.dumps(blocks(BLOCK_M=48)),
    "a block beyond any GPU": json.dumps(blocks(BLOCK_M=1 << 40)),
    "a block that is true": json.dumps(blocks(BLOCK_M=True)),
    "a block with a name of its own": json.dumps(blocks(grid=16)),
    "too many warps": json.dumps(entry(num_warps=64)),
    "warps as text": json.dumps(entry(num_warps="4")),
    "a margin without quartiles": json.dumps(entry(margin={"ratio": 1.2})),
    "a margin as text": json.dumps(entry(margin={**MARGIN, "low": "1"})),
    "a margin that is true": json.dumps(entry(margin={**MARGIN, "low": True})),
    "quartiles in no order": json.dumps(entry(margin={**MARGIN, "high": 1.1})),
    "a margin that is no number": json.dumps(entry(margin={**MARGIN, "ratio": float("nan")})),
    "an infinite margin": json.dumps(entry(margin={**MARGIN, "high": float("inf")})),
    "a negative margin": json.dumps(entry(margin={**MARGIN, "low": -1.0})),
    "infinite splits": json.dumps(entry(splits=float("inf"))),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tables_are_ignored_with_one_warning(user, damage):
    content = DAMAGED[damage]
    user.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="ignoring the tuned table") as caught:
        assert tuned.lookup("linear", torch.bfloat16, SIZES, H200) is None
        assert tuned.lookup("linear", torch.float16, SIZES, H200) is None
    assert len(caught) == 1


@pytest.mark.parametrize(
    "change",
    [{"variant": "unheard of"}, {"num_stages": 7}, {"blocks": {"BLOCK_M": 64}}],
    ids=["variant", "stages", "blocks"],
)
def test_what_no_test_proves_is_ignored_with_one_warning(user, change):
    tuned.write(user, "x", {}, {KEY: {**ENTRY, **change}})
    with pytest.warns(UserWarning, match="no configuration that this version tests") as caught:
        for sizes in (SIZES, (9, 33, 65)):
            assert tuned.lookup("linear", torch.bfloat16, sizes, H200) is None
    assert len(caught) == 1


def test_a_row_block_must_hold_the_row(user):
    small = {
        "blocks": {"ROWS": 1, "BLOCK": 512},
        "num_warps": 1,
        "num_stages": 1,
        "variant": "rows",
    }
    tuned.write(user, "x", {}, {"layer_norm/bfloat16/1024": small})
    with pytest.warns(UserWarning, match="no configuration"):
        assert tuned.lookup("layer_norm", torch.bfloat16, (1000,), H200) is None


def test_the_class_of_sizes_is_looked_up(user):
    tuned.write(user, "x", {}, {KEY: ENTRY})
    found = tuned.lookup("linear", torch.bfloat16, SIZES, H200)
    assert found == Config(**ENTRY, source="user")
    assert tuned.lookup("linear", torch.bfloat16, (17, 50, 100), H200) is None
    assert tuned.lookup("linear", torch.float16, SIZES, H200) is None
    assert tuned.lookup("linear", torch.bfloat16, SIZES, HERE) is None


def test_entries_have_a_margin_or_are_older(user):
    tuned.write(user, "x", {}, {KEY: {**ENTRY, "margin": MARGIN}})
    found = tuned.lookup("linear", torch.bfloat16, SIZES, H200)
    assert found.margin == (1.2, 1.15, 1.3) and found == Config(**ENTRY, source="user")
    tuned.write(user, "x", {}, {KEY: ENTRY})
    assert tuned.lookup("linear", torch.bfloat16, SIZES, H200).margin is None


def test_explain_shows_the_margin():
    x, w = torch.randn(16, 100), torch.randn(50, 100)
    key, here = tuned.key_of("linear", torch.float32, SIZES), tuned.user_file(HERE.name)
    config = shortlist("linear", torch.float32, SIZES, HERE)[1]
    entry = {"blocks": dict(config.blocks), "variant": config.variant, "margin": MARGIN}
    entry |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    for margin, said in (
        (MARGIN, "1.20x torch's speed (1.15 to 1.30)"),
        (None, "an unknown margin"),
    ):
        if margin is None:
            del entry["margin"]
        tuned.write(here, HERE.name, {}, {key: entry})
        lines = str(fastdl.explain(FF.linear, x, w)).splitlines()
        assert lines[-1] == f"  measured: linear float32 16x50x100: {said} [user]"
    tuned.write(here, HERE.name, {}, {})
    assert "measured:" not in str(fastdl.explain(FF.linear, x, w))


def test_the_users_table_comes_before_the_packaged_one(user, monkeypatch, tmp_path):
    packaged = tmp_path / "packaged" / user.name
    monkeypatch.setitem(tuned.packaged_file.__globals__, "PACKAGED", packaged.parent)
    tuned.write(packaged, "x", {}, {KEY: ENTRY})
    assert tuned.lookup("linear", torch.bfloat16, SIZES, H200).source == "tuned"
    tuned.write(user, "x", {}, {KEY: {**ENTRY, "splits": 4}})
    assert tuned.lookup("linear", torch.bfloat16, SIZES, H200).splits == 4


def test_where_torch_was_faster_the_policy_can_overrule(user):
    tuned.write(user, "x", {}, {KEY: {"blocks": {}, "variant": "torch"}})
    assert tuned.lookup("linear", torch.bfloat16, SIZES, H200).variant == "torch"
    with fastdl.policy("fused"):
        assert tuned.lookup("linear", torch.bfloat16, SIZES, H200) is None


def test_torch_runs_where_it_was_faster():
    x, w = torch.randn(16, 100), torch.randn(50, 100)
    key = tuned.key_of("linear", torch.float32, (16, 50, 100))
    here = tuned.user_file(HERE.name)
    tuned.write(here, HERE.name, {}, {key: {"blocks": {}, "variant": "torch"}})
    assert "torch measured faster" in str(fastdl.explain(FF.linear, x, w))
    with fastdl.policy("fused", on_fallback="error"):
        assert fastdl.explain(FF.linear, x, w).fused


def test_forced_is_for_one_class_of_sizes_and_ends():
    config = Config(**ENTRY)
    x, w = torch.randn(16, 100), torch.randn(50, 100)
    with tuned.forced("linear", torch.float32, SIZES, config):
        assert fastdl.explain(FF.linear, x, w).launches[0].config == config
        assert tuned.lookup("linear", torch.float32, (99, 99, 99), HERE) is None
    assert fastdl.explain(FF.linear, x, w).launches[0].config != config


def test_write_checks_and_leaves_nothing_behind(user):
    tuned.write(user, "x", {}, {KEY: ENTRY})
    before = user.read_bytes()
    with pytest.raises(ValueError, match="num_warps"):
        tuned.write(user, "x", {}, {KEY: {**ENTRY, "num_warps": 0}})
    with pytest.raises(TypeError):
        tuned.write(user, "x", {"when": object()}, {KEY: ENTRY})
    assert user.read_bytes() == before
    assert os.listdir(user.parent) == [user.name]
    assert not stat.S_IMODE(user.stat().st_mode) & stat.S_IWOTH


def _write_often(path, number):
    for _ in range(30):
        tuned.write(path, "x", {"by": str(number)}, {KEY: {**ENTRY, "splits": number}})


def test_readers_never_see_half_a_table(user):
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write_often, args=(user, n)) for n in (2, 3)]
    tuned.write(user, "x", {"by": "4"}, {KEY: {**ENTRY, "splits": 4}})
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = tuned.load(user)
        assert found["entries"][KEY]["splits"] == int(found["provenance"]["by"])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(user.parent) == [user.name]


def problem(op="linear", dtype=torch.bfloat16, sizes=(5, 20, 48)):
    return PROBLEMS[op](dtype, sizes, "cpu")


def solved(problems, measure, budget=1000, **options):
    """`run` on problems that are made already, and on what the interpreter is offered."""
    given = iter(problems)
    return run(
        [tried.asked for tried in problems], offered, measure, budget,
        make=lambda asked: next(given), **options,
    )  # fmt: skip


def offered(asked):
    return Offer(shortlist(*asked, HERE))


def by_name(torch_us, **us):
    """A timer that knows the answers: configurations are numbered in the order of trial."""

    def measure(calls, rounds):
        for call in calls.values():
            call()
        return {n: [torch_us if n == "torch" else us.get(f"c{n}", 50.0)] * rounds for n in calls}

    return measure


SIZES_OF = [
    ("linear", (5, 20, 48)),
    ("conv", (40, 9, 18, 1)),
    ("conv_nchw", (20, 9, 18, 9)),
    ("layer_norm", (40,)),
    ("rms_norm", (40,)),
    ("rms_norm_backward", (40,)),
    ("softmax", (40,)),
    ("softmax_backward", (40,)),
    ("gru", (2, 3, 8)),
    ("attention", (2, 16)),
    ("attention", (128, 16)),
    ("attention_dq", (20, 16)),
    ("attention_dkdv", (20, 16)),
]


@pytest.mark.parametrize("op, sizes", SIZES_OF, ids=str)
def test_the_fastest_configuration_wins(op, sizes):
    rows, skipped = solved([problem(op, sizes=sizes)], by_name(30.0, c2=10.0))
    (row,) = rows
    assert not skipped and (row.us, row.torch_us) == (10.0, 30.0)
    third = shortlist(op, torch.bfloat16, sizes, HERE)[2]
    entry = dict(row.entry)
    if op in ("attention_dq", "attention_dkdv"):  # a part of what torch's call computes
        assert "margin" not in entry and "a part of torch's" in str(row)
    else:
        assert entry.pop("margin") == {"ratio": 3.0, "low": 3.0, "high": 3.0}
        assert "3.00x torch's speed (3.00 to 3.00)" in str(row)
    assert Config(**entry) == third


@pytest.mark.parametrize("op, sizes", [of for of in SIZES_OF if "attention" in of[0]], ids=str)
def test_what_is_tuned_is_what_attention_asks_for(op, sizes):
    tried, kernel = problem(op, sizes=sizes), "attention_fwd" if op == "attention" else op
    config = shortlist(op, tried.dtype, sizes, HERE)[-1]
    with tuned.forced(op, tried.dtype, sizes, config), fastdl.policy("fused", "error"):
        launches = fastdl.explain(tried.fused).launches
    assert [launch.config for launch in launches if launch.kernel.name == kernel] == [config]


def test_torch_wins_where_it_may():
    (row,), _ = solved([problem()], by_name(5.0, c1=10.0))
    margin = {"ratio": 0.5, "low": 0.5, "high": 0.5}
    assert row.entry == {"blocks": {}, "variant": "torch", "margin": margin}
    for op, sizes, variant in (("layer_norm_backward", (40,), "rows"), ("attention", (2, 16), "")):
        (row,), _ = solved([problem(op, sizes=sizes)], by_name(5.0, c1=10.0))
        assert row.entry["variant"] == variant


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_attention_goes_to_torch_by_more_than_noise(op):
    """Of many rows: what is measured is the very call that would run."""

    def measure(noise):
        def timer(calls, rounds):
            for call in calls.values():
                call()
            torchs = [9.0, 9.5, 9.8, 10.0 + noise] * 4
            return {n: torchs if n == "torch" else [10.0] * 16 for n in calls}

        return timer

    for noise, winner in ((-0.1, "torch"), (2.0, shortlist(op, *HALF, HERE)[0].variant)):
        (row,), _ = solved([problem(op, sizes=(128, 16))], measure(noise))
        assert row.entry["variant"] == winner and row.entry["margin"]["ratio"] < 1


def test_what_is_measured_as_torch_is_what_would_run():
    said = []

    def timer(calls, rounds):
        said.extend(str(fastdl.explain(calls[name])) for name in calls if name == "torch")
        return by_name(30.0)(calls, rounds)

    solved([problem(), problem("layer_norm_backward", sizes=(40,))], timer)
    replaced, kept = said
    assert "linear (device): torch, because torch measured faster here" in replaced
    assert kept == "no fastdl op ran"  # torch cannot take over this pass


def test_wrong_configurations_do_not_win(monkeypatch):
    tried = problem()
    right = tried.fused()
    numbers = iter(range(100))
    wrong_first = tried._replace(fused=lambda: right + (next(numbers) == 0))
    (row,), _ = solved([wrong_first], by_name(30.0, c0=1.0, c3=10.0))
    assert row.us == 10.0
    nothing = tried._replace(fused=lambda: right * float("nan"))
    assert solved([nothing], by_name(1.0)) == (
        [],
        [f"{tried.asked.key}: no configuration ran and was right"],
    )


def test_configurations_that_do_not_fit_are_left_out():
    class OutOfResources(Exception):
        pass

    tried = problem()
    right, numbers = tried.fused(), iter(range(100))

    def fused():
        if next(numbers) == 0:
            raise OutOfResources
        return right

    (row,), _ = solved([tried._replace(fused=fused)], by_name(9.0, c1=1.0))
    assert row.us == 1.0


def test_a_lost_device_ends_the_search():
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        solved([problem()._replace(fused=lost)], by_name(9.0))


def test_the_budget_is_kept():
    now = iter(range(0, 1000, 10))
    rows, skipped = solved([problem()] * 3, by_name(9.0), 35, clock=lambda: next(now))
    assert len(rows) < 3 and len(rows) + len(skipped) == 3
    assert "no time left" in skipped[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu():
    with pytest.raises(RuntimeError, match="tune: kernels are measured on a GPU"):
        fastdl.tune()


@pytest.mark.parametrize(
    "given, says",
    [
        ({"ops": "conv9d"}, "'conv9d', allowed are linear"),
        ({"ops": "linear", "shapes": [(4, 4)]}, "linear takes 3 positive sizes, got \\(4, 4\\)"),
        ({"ops": "layer_norm", "shapes": [(0,)]}, "1 positive sizes, got \\(0,\\)"),
        ({"shapes": [(4,)]}, "name the op"),
    ],
)
def test_tune_says_what_is_wrong(given, says):
    with pytest.raises(ValueError, match=says):
        fastdl.tune(**given)


@pytest.fixture
def gpu_of_straw(monkeypatch):
    """A GPU as far as `tune` asks, with the interpreter behind it."""
    module, search = (importlib.import_module(f"fastdl.tuned.{n}") for n in ("tune", "search"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "this_gpu", lambda: H200)
    monkeypatch.setattr(search, "DEVICE", "cpu")
    monkeypatch.setattr(module, "offers_for", lambda *given: nullcontext(offered))
    monkeypatch.setattr(module, "events", by_name(30.0, c1=10.0))


def test_tune_writes_a_table_and_keeps_what_is_there(gpu_of_straw, user):
    tuned.write(user, H200.name, {}, {KEY: ENTRY})
    lines = []
    report = fastdl.tune(
        "linear", shapes=[(5, 20, 48)], dtypes=[torch.float16], progress=lines.append
    )
    assert report.path == user and "1 of 1: linear" in lines[1] and "10.0 us" in lines[1]
    assert f"written to {user}" in str(report) and json.loads(report.to_json())["rows"]
    found = tuned.load(user)
    assert found["entries"].keys() == {KEY, "linear/float16/8x32x64"}
    assert found["provenance"]["torch"] == torch.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.lookup("linear", torch.float16, (5, 20, 48), H200).source == "user"


def test_attention_is_tuned_pass_by_pass(gpu_of_straw, user):
    given = {"shapes": [(2, 16)], "dtypes": [torch.float16]}
    report = fastdl.tune(["attention", "attention_dq"], **given)
    parts = ("attention", "attention_dq", "attention_dkdv", "attention_backward")
    keys = [f"{op}/float16/2x16" for op in parts]
    assert [row.key for row in report.rows] == keys and not report.skipped
    assert tuned.load(user)["entries"].keys() == set(keys)


def test_tune_does_not_run_during_capture(gpu_of_straw, monkeypatch, user):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        fastdl.tune("linear")
    assert not user.exists()
