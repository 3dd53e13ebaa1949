"""The op that CONTRIBUTING.md walks through passes its contract as it is printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_the_printed_op_passes_its_contract(tmp_path, device):
    for folder in ("fastdl", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    kernels, op, line, contract = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "kernels/square_relu.py").write_text(kernels)
    (tmp_path / "fastdl/ops/square_relu.py").write_text(op)
    (tmp_path / "fastdl/contract/square_relu.py").write_text(contract)
    with (tmp_path / "fastdl/functional.py").open("a") as functional:
        functional.write(line)
    specs = tmp_path / "fastdl/contract/__init__.py"
    edit(specs, "from . import (\n", "from . import (\n    square_relu,\n")
    edit(specs, "    for spec in (\n", "    for spec in (\n        square_relu.SPEC,\n")

    options = ["-q", "-p", "no:cacheprovider", f"--device={device}", "-k", "square_relu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_contract.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
