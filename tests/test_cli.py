"""The command line: what is printed where, exit codes, and what a wrong call is answered with."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdl
from fastdl.cli import Progress, main, show
from fastdl.contract import SPECS

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "check", "targets", "plan", "bench", "tune", "report", "env")

FACTORY = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Bilinear(2, 2, 2))

def with_inputs():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.ones(4, 8)

def with_wrong_inputs():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.ones(4, 9)

def layers():
    return nn.Sequential(*(make_model() for _ in range(12)))

def huge():
    return nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.ReLU())

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.fc(x)[1:])

def twice():
    return Twice(), torch.ones(6, 8)

def with_arguments(width):
    return nn.Linear(width, width)

def failing():
    return deeper(7)

def deeper(width):
    raise ValueError("width is odd")

class FailingClass(nn.Module):
    def __init__(self, *args):
        raise OSError("this class is made by from_config")

def number():
    return 3

def three():
    return 1, 2, 3

instance = nn.LayerNorm(4)
constant = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with a module of factories, as the current one."""
    (tmp_path / "some_models.py").write_text(FACTORY)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_here\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
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
        ("some_models:three", "returned a tuple, not an nn.Module, nor a model and its example"),
        ("some_models:with_arguments", "missing a required argument: 'width'"),
        ("some_models:with_arguments", "      return with_arguments(...)\nand type: fastdl plan"),
        ("torch.nn:Linear", "  from torch.nn import Linear\n  def make_model():"),
    ],
)
def test_bad_factory(path, expected, models, capsys):
    assert expected in refused(capsys, "plan", path)


@pytest.mark.parametrize(
    "path, expected",
    [
        (
            "needs_more:make_model",
            ["importing needs_more raised ModuleNotFoundError", "needs_more.py:1", "import a_mod"],
        ),
        ("unfinished:f", ["importing unfinished raised SyntaxError", "unfinished.py, line 1"]),
        (
            "some_models:failing",
            [
                "failing raised ValueError: width is odd",
                "in failing: return deep",
                "in deeper: rai",
            ],
        ),
        ("some_models:FailingClass", ["by from_config", "in __init__", "return FailingClass(...)"]),
        ("some_models:with_wrong_inputs", ["on its example inputs, raised RuntimeError", "4x9"]),
    ],
)
def test_errors_of_the_users_code(path, expected, models, capsys):
    """The error and its place in their code, without the way through ours."""
    assert main(["plan", path]) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in expected)
    assert "Traceback" not in said and "_factory.py" not in said
    assert said.count("\n  ") <= 5


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


@pytest.mark.parametrize("name", ["instance", "Small"])
def test_plan_of_what_is_not_a_function(name, models, capsys):
    assert main(["plan", f"some_models:{name}"]) == 0
    assert "1 to replace, 0 left alone" in capsys.readouterr().out


def test_plan_shows_repeated_layers_once(models, capsys):
    assert main(["plan", "some_models:layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("*.2 (12)" in line for line in lines) == 1
    assert len(lines) == 6 and lines[-1] == "24 to replace, 12 left alone"


def test_plan_with_example_inputs_tries_each_site(models, capsys, monkeypatch):
    forward = fastdl.nn.LayerNorm.forward
    monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", lambda m, x: forward(m, x) * 1.01)
    assert main(["plan", "some_models:with_inputs", "--json"]) == 0
    linear, norm = json.loads(capsys.readouterr().out)["sites"]
    assert linear["reason"] is None and linear["after"] < linear["allowed"] < 1e-3
    assert "too large" in norm["reason"] and norm["after"] > 1e-3 > norm["allowed"]


@pytest.mark.parametrize("interpreted", [False, True])
def test_plan_says_who_computes(interpreted, models, capsys, monkeypatch):
    monkeypatch.setattr("fastdl.ops._launch.INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "some_models:with_inputs"]) == 0
    assert ("no GPU: torch computes the ops" in capsys.readouterr().err) != interpreted


def test_plan_on_the_meta_device(models, capsys):
    assert main(["plan", "some_models:huge", "--meta"]) == 0
    assert "Linear + ReLU" in capsys.readouterr().out
    assert main(["plan", "some_models:with_inputs", "--meta"]) == 0
    assert "2 to replace" in capsys.readouterr().out
    assert "leave out --optimize" in refused(
        capsys, "plan", "some_models:huge", "--meta", "--optimize"
    )


def test_plan_with_optimize(models, capsys):
    assert main(["plan", "some_models:with_inputs", "--optimize", "--html", "page.html"]) == 0
    said = capsys.readouterr()
    assert "the models agree" in said.out and "2 replaced, 0 left alone" in said.out
    assert "the page is page.html" in said.err
    assert "the models agree" in (models / "page.html").read_text(encoding="utf-8")

    assert main(["plan", "some_models:make_model", "--optimize", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["proof"] is None and "nothing is verified" in said.err


def test_plan_with_optimize_rolls_back(models, capsys, monkeypatch):
    forward = fastdl.nn.Linear.forward

    def wrong_for_five_rows(module, x):
        return forward(module, x) * (1.01 if len(x) == 5 else 1)

    monkeypatch.setattr(fastdl.nn.Linear, "forward", wrong_for_five_rows)
    assert main(["plan", "some_models:twice", "--optimize"]) == 0
    assert "with it the whole model fails" in capsys.readouterr().out


def test_plan_with_optimize_fails_with_1(models, capsys):
    (models / "restless.py").write_text(
        "import itertools\nimport torch\nfrom torch import nn\n\n"
        "calls = itertools.count()\n\n\n"
        "class Restless(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * 10.0 ** next(calls)\n\n\n"
        "def make():\n"
        "    return nn.Sequential(Restless(3, 3), nn.Linear(3, 3)), torch.ones(2, 3)\n"
    )
    assert main(["plan", "restless:make", "--optimize"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "the error is too large" in said.err


def test_plan_as_a_page(models, capsys):
    assert "no folder" in refused(capsys, "plan", "some_models:layers", "--html", "no/where.html")
    assert main(["plan", "some_models:layers", "--html", "page.html"]) == 0
    page = (models / "page.html").read_text(encoding="utf-8")
    assert "plan by fastdl" in page and "12 alike" in page


def test_the_readme_shows_what_plan_prints(models, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, typed = re.search(
        r"```python\n# models.py\n(.*?)```\n\n```\n\$ (.*?)```", readme, re.S
    ).groups()
    (models / "some_models.py").write_text(code)
    command, _, printed = typed.replace(" models:", " some_models:").partition("\n")
    assert command.startswith("fastdl plan")
    assert main(command.split()[1:]) == 0
    said = capsys.readouterr()
    assert said.out + said.err == printed


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


@pytest.fixture
def ran(checkout, monkeypatch):
    """Commands that were run in the checkout; each of them returns 5."""
    ran = []

    def run(command, cwd):
        ran.append(command[1:])
        assert (command[0], cwd) == (sys.executable, checkout)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr("fastdl.cli.subprocess.run", run)
    return ran


def test_bench_runs_pytest(ran):
    assert main(["bench", "-k", "linear"]) == 5
    assert ran == [["-m", "pytest", "bench", "-k", "linear"]]


def test_report_runs_in_the_checkout(ran, checkout):
    assert main(["report"]) == 5
    assert main(["report", "--cases", "--static", "--out", "page.html", "--results", "x"]) == 5
    out, results = str(checkout / "page.html"), str(checkout / "x")
    assert ran[0] == ["-m", "bench.report"]
    assert ran[1] == [*ran[0], "--cases", "--static", "--out", out, "--results", results]


def test_routes_are_no_page(capsys):
    assert "takes no --out" in refused(capsys, "report", "--routes", "--out", "page.html")


@pytest.mark.parametrize("command", ("bench", "report"))
def test_without_a_checkout(command, monkeypatch, capsys):
    monkeypatch.setattr("fastdl.cli._checkout", lambda: None)
    assert main([command]) == 1
    assert "clone" in capsys.readouterr().err


def test_report_without_matplotlib(checkout, monkeypatch, capsys):
    monkeypatch.setattr("fastdl.cli.importlib.util.find_spec", lambda name: None)
    assert main(["report"]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err


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
