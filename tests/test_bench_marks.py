"""The marks that timings are held against: met, missed, open, or not measured."""

import pytest
from bench import marks, models
from bench.marks import Mark, judged, table


def made_up(modules, graph, both, *, memory=(8, 5, 4), spread=0.01, compile_=1.2):
    """A row with these times over eager."""
    over = {
        "eager": 1.0, "modules": modules, "graph": graph, "compile": compile_, "then compile": both
    }  # fmt: skip
    stats = {
        base: {
            name: {"us": 1e3 / x, "ratio": x / over[base], "low": x / over[base] - spread,
                   "high": x / over[base] + spread, "drift": 1.0}
            for name, x in over.items()
        }
        for base in ("eager", "compile")
    }  # fmt: skip
    eager, ours, compiled = memory
    facts = {"sites": 1, "graphs": 1, "breaks": 0, "compile_s": 1.0}
    return {
        "ok": True, "python": stats, "proof": models.HERE, "no_graph": {}, "refused": {},
        "recompiled": 0, "contenders": dict.fromkeys(over, facts),
        "peak_bytes": {"eager": eager, "modules": ours, "graph": ours, "compile": compiled,
                       "then compile": ours},
    }  # fmt: skip


def verdicts(rows, planned=("a", "b")):
    """Of the marks for whole models, by what they are about."""
    found = [judged(mark, rows, planned) for mark in marks.MARKS if mark.stage == "models"]
    return {verdict.what: verdict for verdict in found}


def test_marks_are_met_only_by_all_rows():
    good = made_up(2.0, 3.0, 2.4)
    found = verdicts({"a": good, "b": good})
    assert found["modules is never slower than eager"].verdict == "met"
    assert str(found["modules over eager"]) == (
        "modules over eager, at least 1.5x: met, geometric mean 2.000x over 2 of 2 rows"
    )
    assert found["then compile over compile"].verdict == "met"
    assert found["memory of eager over modules"].verdict == "met"  # 8 against 5
    assert found["memory of compile over then compile"].verdict == "missed"  # 4 against 5
    found = verdicts({"a": good, "elsewhere": good})
    assert found["modules over eager"].verdict == "open"
    assert "over 1 of 2 rows" in found["modules over eager"].measured
    assert "met" not in {verdict.verdict for verdict in found.values()}


def test_marks_are_missed_by_name():
    rows = {"a": made_up(0.9, 3.0, 2.4), "b": made_up(1.6, 0.995, 1.0, memory=(4, 5, 4))}
    found = verdicts(rows)
    slower = found["modules is never slower than eager"]
    assert slower.verdict == "missed" and "missed by a (0.900x)" in slower.measured
    assert found["graph is never slower than eager"].verdict == "met"  # within the noise
    assert found["modules over eager"].verdict == "missed"
    assert found["graph over eager"].verdict == "met"
    more = found["modules never takes more memory than eager"]
    assert more.verdict == "missed" and "b (0.800x)" in more.measured


def test_nothing_measured_meets_no_mark():
    missing = {"a": {"ok": False, "says": "not measured: x is not installed"}}
    for rows in ({}, missing):
        assert {v.verdict for v in verdicts(rows, ["a"]).values()} == {"not measured"}
    half = made_up(2.0, 3.0, 2.4)
    for contender in ("compile", "then compile"):
        del half["python"]["eager"][contender], half["peak_bytes"][contender]
    del half["python"]["compile"]
    found = verdicts({"a": half}, ["a"])
    assert found["then compile over compile"].verdict == "not measured"
    assert found["modules over eager"].verdict == "met"
    assert {v.verdict for v in table({})} == {"not measured"}


def timed(ratio, *, roofline=0.9, memory=2.0, **passes):
    """A row of an op: this many times as fast as everybody, in each pass."""

    def one(ratio):
        stats = {"ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
        others = ("torch", "flash", "cudnn", "addmm", "compile", "chunked")
        ways = {
            "baseline": "torch",
            "over": dict.fromkeys(others, stats),
            "contenders": {"fused": stats, "torch": {"ratio": 1.0, "low": 1.0, "high": 1.0}},
        }
        peaks = {"fused": 100, "chunked": 100 * memory}
        return {"how": "graph", "graph": ways, "peak_bytes": peaks}

    found = {name: one(value) for name, value in {"both": ratio, **passes}.items()}
    found["both"]["roofline"] = roofline
    return {"ok": True, "passes": found}  # fmt: skip


def rows_of(mark, row):
    return {mark.stage: dict.fromkeys(marks.planned(mark), row)}


OPS = [mark for mark in marks.MARKS if mark.stage != "models"]


@pytest.mark.parametrize("mark", OPS, ids=lambda mark: mark.what)
def test_every_mark_of_an_op_is_about_rows_and_can_be_met_and_missed(mark):
    names = marks.planned(mark)
    assert names, "no row of the benchmark is called so"
    for factor, verdict in ((1.5, "met"), (0.5, "missed")):
        least = mark.least * factor
        row = timed(least, roofline=least, memory=least, backward=least)
        assert judged(mark, dict.fromkeys(names, row), names).verdict == verdict
    half = {names[0]: timed(99, roofline=99, memory=99, backward=99)}
    assert judged(mark, half, names).verdict == ("met" if len(names) == 1 else "open")


def test_the_pass_that_a_mark_names_is_looked_at():
    mark = Mark("", "layer_norm", "", marks.over("torch", "backward"), 1.0)
    assert judged(mark, {"a": timed(9.0, backward=0.5)}, ["a"]).verdict == "missed"
    assert judged(mark, {"a": timed(0.5, backward=9.0)}, ["a"]).verdict == "met"
    assert judged(mark, {"a": timed(9.0)}, ["a"]).verdict == "not measured"


def test_an_op_that_is_sent_to_torch_is_not_slower():
    row = timed(0.5)
    mark = Mark("", "lstm", "", marks.routed, 1.0, within_noise=True, reason="as known")
    missed = judged(mark, {"a": row}, ["a"])
    assert missed.verdict == "missed" and missed.reason == "as known"
    row["passes"]["both"]["graph"]["contenders"]["routed"] = {"ratio": 1.0, "high": 1.0}
    assert judged(mark, {"a": row}, ["a"]).verdict == "met"


def test_rows_of_models_are_planned():
    mark = next(mark for mark in marks.MARKS if mark.stage == "models")
    assert marks.planned(mark) == [case.name for case in models.cases()]
