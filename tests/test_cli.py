"""The command line: what is printed where, exit codes, and what a wrong call is answered with."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdl.cli import Progress, main, show
from fastdl.contract import SPECS

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "check", "targets", "plan", "bench", "tune", "report", "env")

FACTORY = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Bilinear(2, 2, 2))

def with_arguments(width):
    return nn.Linear(width, width)

def number():
    return 3

instance = nn.LayerNorm(4)
constant = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with a module of factories, as the current one."""
    (tmp_path / "some_models.py").write_text(FACTORY)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("some_models", None)


def refused(capsys, *argv):
    """What is said about a wrong call, which exits with 2 and prints nothing to stdout."""
    assert main([*argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example: fastdl {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_no_command(capsys):
    said = refused(capsys)
    assert "fastdl demo" in said


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["chekc"], ["no command chekc", "Did you mean check?"]),
        (["frobnicate"], ["no command frobnicate", *COMMANDS]),
        (["check", "layernorm"], ["no op layernorm", "Did you mean layer_norm?", *SPECS]),
        (["check", "--devcie"], ["--devcie", "fastdl check --help"]),
        (["check", "--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["targets", "lienar"], ["Did you mean linear?"]),
        (["targets", "--target", "sm90"], ["no target sm90", "Did you mean sm_90?"]),
        (["tune", "--budget", "much"], ["--budget", "fastdl tune --help"]),
        (["tune", "--budget", "0"], ["fastdl tune --budget 60"]),
        (["tune", "layernorm"], ["Did you mean layer_norm?"]),
        (["demo", "--steps", "0"], ["--steps is at least 1"]),
        (["demo", "--picture", "nowhere/at/all.png"], ["nowhere/at/all.png"]),
        (["plan"], ["package.module:make_model", "fastdl plan --help"]),
    ],
    ids=" ".join,
)
def test_usage_errors_say_what_to_type(argv, expected, capsys):
    said = refused(capsys, *argv)
    assert all(part in said for part in expected)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("some_models", "is not package.module:make_model. For example: fastdl plan"),
        ("some_models:", "is not package.module:make_model"),
        ("some_models.py:make_model", "Type: fastdl plan some_models:make_model"),
        ("src/nets.py", "Type: fastdl plan src.nets:make_model"),
        ("other_models:make_model", "no module other_models"),
        ("some_models:make_modle", "did you mean some_models:make_model?"),
        ("some_models:zzz", "some_models has no zzz"),
        ("some_models:constant", "is a int, not a function"),
        ("some_models:number", "returned a int"),
        ("some_models:with_arguments", "missing a required argument: 'width'"),
    ],
)
def test_bad_factory(path, expected, models, capsys):
    assert expected in refused(capsys, "plan", path)


def test_an_import_missing_in_the_users_code_is_not_our_error(models):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_here"):
        main(["plan", "needs_more:make_model"])


def test_plan(models, capsys):
    assert main(["plan", "some_models:make_model"]) == 0
    printed = capsys.readouterr().out
    assert "Linear + GELU" in printed
    assert "fastdl has no rule for this class" in printed
    assert "2 to replace, 1 left alone" in printed


def test_plan_as_json(models, capsys):
    assert main(["plan", "some_models:make_model", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [site["op"] for site in sites] == ["linear", "layer_norm", ""]


def test_plan_of_an_instance(models, capsys):
    assert main(["plan", "some_models:instance"]) == 0
    assert "(the model)" in capsys.readouterr().out


def test_check_as_json(capsys, device):
    assert main(["check", "activation", "--device", device, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert {row["dtype"] for row in report["rows"]} == {"float32", "float16", "bfloat16"}


def test_check_fails_with_1(capsys, device, monkeypatch):
    def broken(case, dtype, device):
        raise AssertionError("the kernel is wrong")

    monkeypatch.setattr("fastdl.contract.report.accuracy", broken)
    assert main(["check", "activation", "--device", device]) == 1
    printed = capsys.readouterr().out
    assert "34 failed" in printed
    assert "the kernel is wrong" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert "--device cpu" in refused(capsys, "check", "--device", "cuda")
    assert main(["tune"]) == 1
    assert "measured on a GPU" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_env_as_json(capsys):
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What looks like a checkout of fastdl, as the current folder."""
    for name in ("bench/gpu.py", "fastdl/cli.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


TIMED = {
    "ok": True,
    "how": "graph",
    "roofline": 0.914,
    "peak_bytes": {"fused": 50, "torch": 100},
    "graph": {
        "baseline": "torch",
        "over_compile": 1.1,
        "contenders": {"fused": {"us": 12.34, "ratio": 1.5}, "torch": {"us": 18.5, "ratio": 1.0}},
    },
}


def test_report_without_results(checkout, capsys):
    assert main(["report"]) == 0
    assert "Nothing measured yet" in capsys.readouterr().out


def test_report(checkout, capsys):
    folder = checkout / "bench/results/nvidia_h200"
    folder.mkdir(parents=True)
    wrong = {"ok": False, "says": "off by 1"}
    tables = {
        "layer_norm": {"rows": {"8192 x 4096": TIMED, "7 x 7": wrong}},
        "check": {"rows": {"linear": {"ok": True, "says": "all is well"}}},
    }
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    (folder / "damaged.json").write_text("{")
    assert main(["report"]) == 0
    said = capsys.readouterr()
    assert "nvidia_h200, layer_norm" in said.out
    assert all(cell in said.out for cell in ("12.3 us", "1.50x", "1.10x", "91%", "0.50x"))
    assert "FAILED: off by 1" in said.out
    assert "all is well" in said.out
    assert "damaged.json" in said.err


def test_bench_runs_pytest(checkout, monkeypatch):
    ran = []

    def run(command, cwd):
        ran.append((command, cwd))
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr("fastdl.cli.subprocess.run", run)
    assert main(["bench", "-k", "linear"]) == 5
    assert ran == [([sys.executable, "-m", "pytest", "bench", "-k", "linear"], checkout)]


def test_bench_without_a_checkout(monkeypatch, capsys):
    monkeypatch.setattr("fastdl.cli._checkout", lambda: None)
    assert main(["bench"]) == 1
    assert "clone" in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdl._env.env", stop)
    assert main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_as_a_module_in_a_pipe(tmp_path):
    """Without a GPU the command line itself turns to Triton's interpreter, and says so."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "fastdl", "check", "activation"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "activation  bfloat16" in done.stdout
    assert "in Triton's interpreter." in done.stdout
    assert "no time is measured" in done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(file, seconds):
    """Ten steps reported to a file, so many seconds apart."""
    now = iter(range(0, 1000 * seconds, seconds))
    with Progress("work", file, clock=lambda: next(now)) as report:
        for done in range(1, 11):
            report(done, 10, f"step {done}")
    return file.getvalue()


def test_progress_in_a_pipe_is_a_line_now_and_then():
    written = progress(io.StringIO(), 6)
    assert written.splitlines()[0] == "work: 2 of 10, 48 s left  step 2"
    assert len(written.splitlines()) == 5
    assert "\r" not in written


def test_progress_on_a_terminal_rewrites_its_line():
    written = progress(Terminal(), 1)
    assert "\n" not in written
    assert written.count("\r") == 11
    assert written.endswith("\r\x1b[K")


def test_table_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(("op", "error"), [("linear", "1.0e-07"), ("[odd]", "failed")])
    assert "\x1b[" in terminal.getvalue()
    assert "[odd]" in terminal.getvalue()


def test_wide_table_is_broken_between_words(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("NO_COLOR", "1")
    words = ["configuration", "of", "several", "words", "unbroken"]
    show(("kernel", "how", "verdict"), [("linear_persistent", " ".join(words), "ok")])
    assert all(word in terminal.getvalue() for word in (*words, "verdict", "linear_persistent"))
    assert max(map(len, terminal.getvalue().splitlines())) <= 44


def test_numbers_are_flush_right(capsys):
    show(("op", "us"), [("linear", "9.5 us"), ("gelu", "10.5 us")])
    assert capsys.readouterr().out == "op           us\nlinear   9.5 us\ngelu    10.5 us\n"


def test_what_is_not_needed_for_help_is_not_imported():
    code = (
        "import sys, fastdl.cli\n"
        "heavy = {'rich', 'matplotlib', 'torch._dynamo', 'triton', 'fastdl.contract'}\n"
        "print(*heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, capture_output=True, text=True, env=env).stdout == "\n"
