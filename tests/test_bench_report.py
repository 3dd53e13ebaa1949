"""The page of what was measured: what it shows, what it leaves out, and what it says of nothing."""

import copy
import json
import re
import statistics
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from bench import marks as bench_marks
from bench.report import __main__ as command, marks, pictures, read, readme, static
from bench.report.page import page
from bench.store import RESULTS

import fake_results
import fastdl
from fastdl.contract import SPECS, STEPS
from html_reader import Tables

ROOT = Path(__file__).resolve().parents[1]


def rendered(results):
    return page(read.machines(results), marks.of, results)


@pytest.fixture(scope="module")
def shown(fake):
    return Tables(rendered(fake))


def without_styles(reader):
    return " ".join(word for word in reader.words if "{" not in word)


# what there is


def test_nothing_is_measured(tmp_path, capsys):
    found = Tables(rendered(tmp_path))
    words = without_styles(found)
    assert "There are no results of a GPU" in words
    # speed, roofline, sizes, memory, models; and the marks, which are all that is in a table
    assert words.count("not measured") == 5 + 1 + len(bench_marks.MARKS)
    assert len(found.tables) == 1 and len(found.headed("mark")[0]) == 1 + len(bench_marks.MARKS)
    assert command.main(["--results", str(tmp_path)]) == 0
    assert "Nothing is measured on a GPU yet" in capsys.readouterr().out
    assert readme.filled("<!-- results:speed -->\n<!-- /results -->", []).split("\n")[2] == (
        "Not measured."
    )


def test_the_results_of_the_repository_are_shown():
    found = Tables(rendered(RESULTS))
    assert len(found.headed("op", "dtype")[-1]) == 1 + 3 * len(SPECS)
    assert {row[0] for row in found.headed("op", "target")[0][1:]} == {*SPECS, *STEPS}
    assert "in Triton's interpreter" in without_styles(found)
    assert "Left out" not in without_styles(found)


def test_numbers_are_those_of_the_row(fake, shown):
    table = json.loads((fake / "fake_gpu_9000/layer_norm.json").read_text())
    row = table["rows"]["16384x4096 backward"]
    [short] = [
        row
        for rows in shown.headed("case", "pass", "us")
        for row in rows
        if row[:2] == ["16384x4096 backward", "backward"]
    ]
    found = row["passes"]["backward"]["graph"]
    fused, over = found["contenders"]["fused"], found["over"]["compile"]
    assert short[2] == f"{fused['us']:,.1f}"
    for told, stats in ((short[3], fused), (short[4], over)):
        assert f"{stats['ratio']:.2f}×" in told
        assert f"{stats['low']:.2f} to {stats['high']:.2f}" in told
    assert found["baseline"] in short[3]
    peaks = row["passes"]["backward"]["peak_bytes"]
    assert short[-1] == f"{peaks['fused'] / peaks[found['baseline']]:.2f}×"
    [inputs] = [
        row
        for rows in shown.headed("case", "dtype", "shapes", "seeds")
        for row in rows
        if row[0] == "16384x4096 backward"
    ]
    assert inputs[1:4] == ["bfloat16", "bfloat16[16384, 4096]", "0, 1, 2"]
    assert "layer_norm_fwd BLOCK=1024 w8" in inputs[8]
    assert inputs[9] == "liger: not installed"


def test_every_contender_of_every_pass_has_a_line(fake, shown):
    lines = [row for rows in shown.headed("case", "pass", "contender") for row in rows[1:]]
    timed = read.machines(fake)[0].timed
    assert len(lines) == sum(
        len(part.way.contenders) for one in timed for part in one.passes.values()
    )
    drifts = {row[7] for row in lines}
    assert drifts == {"1.010"}


def test_where_results_come_from(shown):
    [runs, *_] = shown.headed("run", "GPU")
    assert runs[1][:2] == ["fake", f"{fake_results.GPU} (sms 132)"]
    assert "driver 999.9" in runs[1][2] and "torch 2.99" in runs[1][2]
    assert runs[1][3] == fake_results.RUN["commit"]


def test_what_failed_and_what_was_refused(shown):
    [rows] = shown.headed("stage", "row")
    assert ["linear", "8192x8192x8192 none", "failed", "off by 1.00e+00, allowed 1e-3"] in rows
    assert any(row[2:] == ["no liger", "not installed"] for row in rows)
    assert any(row[1:] == ["gpt2, training (1)", "no graph", "WRONG: far off"] for row in rows)


def test_models(shown):
    [rows] = shown.headed("model", "contender")
    assert len(rows) == 1 + 8 * 5
    assert {row[1] for row in rows[1:]} == {"eager", "modules", "graph", "compile", "then compile"}


def test_several_gpus_have_a_section_each(tmp_path):
    for number, slug in enumerate(("a", "b")):
        fake_results.write(tmp_path, slug, number, ops=("nll_loss", "linear"))
    found = Tables(rendered(tmp_path))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert {"g0", "g1"} <= set(ids)
    assert max(Counter(ids).values()) == 1


def test_errors_stand_in_order_whoever_was_first(tmp_path):
    fake_results.write(tmp_path, ops=("linear",))
    path = tmp_path / "fake_gpu_9000" / "check.json"
    table = json.loads(path.read_text())
    before = Tables(rendered(tmp_path)).headed("op", "dtype")[0]
    rows = [
        (name, {**row, "report": {**row["report"], "rows": [one]}})
        for name, row in table["rows"].items()
        for one in row["report"]["rows"]
    ]
    table["rows"] = {f"{name} {i}": row for i, (name, row) in enumerate(reversed(rows))}
    path.write_text(json.dumps(table))
    assert Tables(rendered(tmp_path)).headed("op", "dtype")[0] == before


def test_marks(tmp_path):
    fake_results.write(tmp_path, ops=("nll_loss", "linear"))
    path = tmp_path / "fake_gpu_9000" / "linear.json"
    table = json.loads(path.read_text())
    alone = table["rows"]["8192x1024x4096 none"]["passes"]["forward"]["graph"]
    alone["over"]["torch"]["ratio"] = 0.5
    path.write_text(json.dumps(table))
    shown = {row[0]: row[1:] for row in Tables(rendered(tmp_path)).headed("mark")[0][1:]}
    assert shown.keys() == {mark.what for mark in bench_marks.MARKS}
    required, measured, verdict, _ = shown["linear: the product alone over torch's"]
    assert required == "at least 0.92x" and "missed" in verdict
    assert "missed by 8192x1024x4096 none (0.500x)" in measured
    assert shown["attention: forward over cuDNN"] == ["at least 0.7x", "", "not measured", ""]


def test_marks_of_damaged_rows(tmp_path):
    fake_results.write(tmp_path, ops=("linear",))
    path = tmp_path / "fake_gpu_9000" / "linear.json"
    table = json.loads(path.read_text())
    table["rows"] = {
        name: {"ok": True, "passes": {"forward": {"how": 3}}} for name in table["rows"]
    }
    path.write_text(json.dumps(table))
    shown = {row[0]: row[1:] for row in Tables(rendered(tmp_path)).headed("mark")[0][1:]}
    *_, verdict, reason = shown["linear: the product alone over torch's"]
    assert verdict == "not measured" and "rows of linear are damaged" in reason


# what is damaged, and what is hostile


def broken(edit):
    """The text of a table of results, with a fault in one of its rows."""

    def text(table):
        table = copy.deepcopy(table)
        edit(table["rows"]["16384x4096"])
        return json.dumps(table)

    return text


def at(*path, value):
    def edit(row):
        *inner, last = path
        for key in inner:
            row = row[key]
        row[last] = value

    return broken(edit)


GRAPH = ("passes", "forward", "graph")
FUSED = (*GRAPH, "contenders", "fused")
FILES = {
    "cut off": lambda table: json.dumps(table)[:500],
    "empty": lambda table: "",
    "a list": lambda table: "[1]",
    "too deep": lambda table: "[" * 100_000,
    "no runs": lambda table: json.dumps({"rows": table["rows"]}),
    "rows in a list": lambda table: json.dumps({**table, "rows": []}),
    "a run that is no object": lambda table: json.dumps({**table, "runs": {"fake": 1}}),
    "half a character": lambda table: json.dumps(
        {**table, "rows": {**table["rows"], "\ud800": {"ok": True}}}
    ),
}
ROWS = {
    "no number": at(*FUSED, "us", value="fast"),
    "not finite": at(*FUSED, "ratio", value=float("nan")),
    "endless": at(*FUSED, "low", value=float("inf")),
    "no time": at(*FUSED, "us", value=0),
    "a negative": at("passes", "forward", "peak_bytes", "fused", value=-1),
    "a truth": at(*FUSED, "drift", value=True),
    "a pass that is none": broken(lambda row: row["passes"].update(x=row["passes"]["forward"])),
    "no pass": at("passes", value={}),
    "no ceilings": at("ceilings", value=None),
    "not ours": broken(lambda row: row["passes"]["forward"]["graph"]["contenders"].pop("fused")),
    "an unknown baseline": at(*GRAPH, "baseline", value="best"),
    "shapes in no list": at("shapes", value=3),
    "no way of calling": at("passes", "forward", "how", value="stream"),
    "an object for a text": at("says", value={}),
}


@pytest.mark.parametrize("fault", [*FILES, *ROWS])
def test_what_is_damaged_is_left_out_with_a_note(fault, tmp_path):
    folder = fake_results.write(tmp_path, ops=("linear", "layer_norm"))
    path = folder / "layer_norm.json"
    path.write_text({**FILES, **ROWS}[fault](json.loads(path.read_text())))
    [machine] = read.machines(tmp_path)
    [note] = machine.notes
    assert note.startswith("fake_gpu_9000/layer_norm.json")
    norms = [one.case for one in machine.timed if one.op == "layer_norm"]
    if fault in FILES:
        assert "no table of results" in note and not norms
    else:
        assert "16384x4096 is left out" in note
        assert len(norms) == len(SPECS["layer_norm"].bench) - 1 and "16384x4096" not in norms


def test_a_model_without_times_of_eager_is_left_out(tmp_path):
    folder = fake_results.write(tmp_path, ops=("nll_loss", "linear"))
    path = folder / "models.json"
    table = json.loads(path.read_text())
    del table["rows"]["llama, training"]["python"]["eager"]["eager"]
    path.write_text(json.dumps(table))
    [machine] = read.machines(tmp_path)
    assert machine.notes == [
        "fake_gpu_9000/models.json: llama, training is left out: ValueError: no times of eager"
    ]
    assert len(machine.models) == 7


def test_the_rest_is_shown_and_the_notes_with_it(tmp_path, capsys):
    folder = fake_results.write(tmp_path, ops=("linear", "layer_norm"))
    path = folder / "layer_norm.json"
    path.write_text(ROWS["not ours"](json.loads(path.read_text())))
    (folder / "models.json").write_text("{")
    assert command.main(["--results", str(tmp_path)]) == 0
    found, said = Tables((tmp_path / "report.html").read_text()), capsys.readouterr().err
    notes = read.machines(tmp_path)[0].notes
    assert len(notes) == 2
    assert all(note in found.words and note in said for note in notes)
    assert any("8192x4096x1024 gelu" in row for rows in found.tables for row in rows)
    assert any("32768x1024" in row for rows in found.tables for row in rows)


def test_a_row_that_is_odd_but_right_is_shown(tmp_path):
    """What newer code may leave out or add."""
    folder = fake_results.write(tmp_path, ops=("linear", "layer_norm"))
    path = folder / "layer_norm.json"
    table = json.loads(path.read_text())
    row = table["rows"]["16384x4096"]
    for name in ("shapes", "seeds", "refused", "launches", "route", "sets", "cold"):
        del row[name]
    part = row["passes"]["forward"]
    del part["python"], part["peak_bytes"], part["roofline"]
    del part["graph"]["over"]["compile"], part["graph"]["contenders"]["compile"]
    row["error"] = 1e-5
    row["more"] = {"than": "known"}
    path.write_text(json.dumps(table))
    found = Tables(rendered(tmp_path))
    [short] = [
        row for rows in found.headed("case", "pass", "us") for row in rows if row[0] == "16384x4096"
    ]
    assert short[4:6] == ["not measured", "not measured"]
    assert short[-2:] == ["-", "-"]
    assert "Left out" not in without_styles(found)


EVIL = (
    "$\\frac{$\x07<i></script><script>alert(1)</script>\"'><img src=x onerror=y> "
    "|`*[x](javascript:z) é"
)


def evil(value, things):
    """Every text made hostile, and every name of a thing; not the names of fields."""
    form = ("graph", "python", "definition", "bfloat16", "fake")
    if isinstance(value, dict):
        return {key + EVIL * (key in things): evil(of, things) for key, of in value.items()}
    if isinstance(value, list):
        return [evil(one, things) for one in value]
    return value + EVIL if isinstance(value, str) and value not in form else value


def test_names_are_text_and_nothing_else(tmp_path):
    tables = fake_results.tables(ops=("linear", "layer_norm"))
    things = {"torch", "liger", "fastdl", "driver", "sms", "modules"}
    things |= {name for table in tables.values() for name in table["rows"]}
    folder = tmp_path / "evil&<b>"
    folder.mkdir()
    for stage, table in tables.items():
        name = stage if stage in ("models", "check") else f"{stage}<i>$x"
        (folder / f"{name}.json").write_text(json.dumps(evil(table, things)))
    machines = read.machines(tmp_path)
    assert not machines[0].notes
    assert any(EVIL[:8] in curve.what for curve in pictures.curves(machines[0].timed))
    assert machines[0].timed and machines[0].models and machines[0].checked
    text = rendered(tmp_path)
    found = Tables(text)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "i$x", "form", "iframe"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(a.get("href", "#").startswith("#") for _, a in found.tags)
    assert any("</script><script>alert(1)" in word for word in found.words)
    for block in readme.BLOCKS.values():
        told = block(machines)
        assert not re.search(r"[<>`]|\]\(javascript", told)
        lines = [line for line in told.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} <= {7, 8}
    command.draw(machines)
    assert len([ET.parse(path) for path in folder.glob("*.svg")]) == 2


# README and the terminal


def test_readme_is_what_its_results_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {match[2] for match in readme.BLOCK.finditer(text)} == readme.BLOCKS.keys()
    assert readme.filled(text, read.machines(RESULTS)) == text, "type: fastdl report"


def test_readme_of_fake_results(fake):
    machines = read.machines(fake)
    text = "".join(f"<!-- results:{name} -->\nold\n<!-- /results -->\n" for name in readme.BLOCKS)
    found = readme.filled(text, machines)
    assert "old" not in found and readme.filled(found, machines) == found
    assert f"{fake_results.GPU} (driver 999.9, torch 2.99, triton 3.99, commit fa4efa4efa)" in found
    rows = json.loads((fake / "fake_gpu_9000/layer_norm.json").read_text())["rows"].values()
    graphs = [part["graph"] for row in rows for part in row["passes"].values()]
    means = [
        statistics.geometric_mean(ratios)
        for ratios in (
            [of["contenders"]["fused"]["ratio"] for of in graphs],
            [of["over"]["compile"]["ratio"] for of in graphs],
        )
    ]
    assert re.search(r"\| layer_norm \| 8 \| {:.2f}× \([^|]+ \| {:.2f}× \(".format(*means), found)
    assert "| sgd | 0 | not measured | not measured |" in found
    assert "| llama, training | 20.00 |" in found


def test_readme_with_an_unknown_marker():
    with pytest.raises(ValueError, match="there are speed, models"):
        readme.filled("<!-- results:sped -->\n<!-- /results -->", [])


def test_the_command(fake, tmp_path, capsys):
    before = (ROOT / "README.md").read_text()
    out = tmp_path / "deep/page.html"
    assert command.main(["--results", str(fake), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"layer_norm +8 +\d\.\d\d×", said)
    assert "linear 8192x8192x8192 none: FAILED: off by" in said
    assert said.endswith(f"the page is {out}\n")
    assert (ROOT / "README.md").read_text() == before
    ET.parse(fake / "fake_gpu_9000/speed.svg")
    ET.parse(fake / "fake_gpu_9000/roofline.svg")
    shown = readme.filled("<!-- results:speed -->\n<!-- /results -->", read.machines(fake))
    assert "](bench/results/fake_gpu_9000/roofline.svg)" in shown
    command.main(["--results", str(fake), "--out", str(out), "--cases"])
    assert re.search(r"16384x4096 backward +backward +\d+\.\d +\d\.\d\d×", capsys.readouterr().out)


def test_what_cannot_be_read_or_written(fake, tmp_path, capsys):
    assert command.main(["--results", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command.main(["--results", str(fake), "--out", str(tmp_path / "file/page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


# what needs no GPU


def test_errors_are_rows(tmp_path, capsys):
    assert static.work_off("check", ["nll_loss"], tmp_path)
    [machine] = read.machines(tmp_path)
    assert [(one.op, one.dtype) for one in machine.checked] == [
        ("nll_loss", dtype) for dtype in ("float32", "float16", "bfloat16")
    ]
    assert machine.interpreted and not machine.is_gpu
    assert "/" not in json.dumps(machine.runs)
    capsys.readouterr()
    assert static.work_off("check", ["nll_loss"], tmp_path)
    assert not capsys.readouterr().out, "what is there is made again"


def test_each_stage_has_a_process_of_its_own(monkeypatch, tmp_path):
    """One in the interpreter, the other without it; one that fails does not stop the next."""
    ran = []

    def run(command, cwd, env):
        assert command[1:3] == ["-m", "bench.report.static"] and cwd == ROOT
        ran.append((command[3], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(static.subprocess, "run", run)
    assert not static.make(tmp_path)
    assert ran == [("check", "1"), ("targets", None)]


@pytest.mark.slow
def test_machine_code_is_a_row(monkeypatch, tmp_path):
    one = partial(fastdl.targets, targets=["sm_90"], limit=1)
    monkeypatch.setattr(static.fastdl, "targets", one)
    assert static.work_off("targets", ["sgd"], tmp_path)
    [machine] = read.machines(tmp_path)
    [(op, cells)] = machine.binaries
    assert (op, cells[0], cells[-1]) == ("sgd", "sm_90", "ok")
    [short, whole] = Tables(rendered(tmp_path)).headed("op", "target")
    assert short[1][:3] == ["sgd", "sm_90", "1"] and short[1][-1] == "ok"
    assert short[1][3] == cells[machine.head.index("regs")]
    assert whole[1] == ["sgd", *cells]
