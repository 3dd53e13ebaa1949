"""The layout that keeps `kernels` from being a top-level package, the import order, the wheel."""

import ast
import configparser
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(ROOT.glob("kernels/*.py"))
INSTALLED = {"fastdl/py.typed", *(f"fastdl/kernels/{path.name}" for path in KERNELS)}

# file, import that it may not have
FORBIDDEN = [
    ("kernels/x.py", "import torch"),
    ("kernels/x.py", "from fastdl.ops import linear"),
    ("fastdl/ops/x.py", "import fastdl.functional"),
    ("fastdl/ops/x.py", "from .. import nn"),
    ("fastdl/functional.py", "from . import nn"),
    ("fastdl/functional.py", "from fastdl.optim import AdamW"),
    ("fastdl/nn/x.py", "from fastdl import optimize"),
    ("fastdl/optim/x.py", "from fastdl.optimize import plan"),
    ("fastdl/optimize/x.py", "def f():\n    import fastdl.integrations.hub"),
    ("fastdl/integrations/x.py", "from fastdl.cli import main"),
    ("fastdl/integrations/x.py", "import transformers"),
    ("fastdl/contract/x.py", "from fastdl.optimize import plan"),
    ("fastdl/targets/x.py", "from fastdl.optimize import plan"),
    ("tests/x.py", "from fastdl.ops.linear import linear"),
    ("tests/x.py", "from fastdl.optimize import _walk"),
    ("bench/x.py", "from fastdl import kernels"),
    ("examples/x.py", "from fastdl import ops"),
]

# What importing fastdl, and then calling it, leaves behind: written to stdout as JSON.
IMPORT = """
import json, sys, torch
before = set(sys.modules)
import fastdl
import fastdl.functional as FF
new = set(sys.modules) - before
awake = torch.cuda.is_initialized()
x = torch.randn(4, 8)
torch.testing.assert_close(FF.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))
print(json.dumps({"file": fastdl.__file__, "new": sorted(new), "awake": awake}))
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_is_a_link_to_a_folder_that_is_no_package():
    assert os.readlink(ROOT / "fastdl/kernels") == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()


def test_git_records_the_link():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    entry = run("git", "ls-files", "--stage", "fastdl/kernels", cwd=ROOT)
    if not entry:
        pytest.skip("the link is not in git's index yet")
    assert entry.startswith("120000 ")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_device_code_imports_triton_and_siblings_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] == "triton" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            sibling = node.level == 1 and (ROOT / f"kernels/{node.module}.py").exists()
            plain = not node.level and node.module.partition(".")[0] in ("triton", "typing")
            assert sibling or plain


@pytest.mark.parametrize("path, line", FORBIDDEN, ids=lambda text: text.replace("\n", " "))
def test_linter_refuses(path, line):
    pytest.importorskip("ruff")
    command = ["check", "--no-cache", "--quiet", "--select=TID251,TID253,PLC2701"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, f"--stdin-filename={path}", "-"],
        input=line + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stdout + done.stderr


def test_import_wakes_nothing(tmp_path):
    left = json.loads(
        run(sys.executable, "-c", IMPORT, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    )
    assert Path(left["file"]).is_relative_to(ROOT)
    assert not left["awake"]
    assert not {"triton", "kernels", "torch._dynamo", "torch._inductor"} & set(left["new"])


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and the wheel built from it; direct/ has the checkout's own wheel."""
    pytest.importorskip("build")
    tmp = tmp_path_factory.mktemp("dist")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(ROOT, tmp / "checkout", symlinks=True, ignore=skip)
    build = [sys.executable, "-m", "build", "--no-isolation", tmp / "checkout", "--outdir"]
    run(*build, tmp)
    run(*build, tmp / "direct", "--wheel")
    return tmp


@pytest.mark.slow
def test_wheel_has_kernels_in_their_place(dist):
    for wheel in (*dist.glob("*.whl"), *dist.glob("direct/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
            points = configparser.ConfigParser()
            points.read_string(archive.read(entry_points).decode())
        assert {name.split("/")[0].split("-")[0] for name in names} == {"fastdl", "fastdl_kernels"}
        assert names >= INSTALLED
        assert names >= {str(path.relative_to(ROOT)) for path in ROOT.glob("fastdl/*/*.py")}
        assert points["torch_dynamo_backends"]["fastdl"] == "fastdl.optimize.graph:backend"
        assert points["console_scripts"]["fastdl"] == "fastdl.cli:main"


@pytest.mark.slow
def test_sdist_has_kernels_in_their_place(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= INSTALLED | {"pyproject.toml", "LICENSE"}
    assert not any(name.startswith("kernels") for name in names)


@pytest.mark.slow
def test_wheel_works_without_triton(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    # Links to all that is installed but Triton, so that nothing can find it, metadata included.
    (tmp_path / "site").mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("-packages")):
        for entry in site.iterdir():
            link = tmp_path / "site" / entry.name
            if not (entry.name.startswith(("triton", "fastdl")) or link.exists()):
                link.symlink_to(entry)

    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTHON"))}
    env["PYTHONPATH"] = f"{tmp_path / 'wheel'}{os.pathsep}{tmp_path / 'site'}"
    left = json.loads(run(sys.executable, "-S", "-c", IMPORT, cwd=tmp_path, env=env))
    assert Path(left["file"]).is_relative_to(tmp_path / "wheel")
    assert not left["awake"]
    assert "torch._dynamo" not in left["new"]


def test_triton_is_here():
    """Without it, every other test would check the fallback."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    assert importlib.util.find_spec("triton")
