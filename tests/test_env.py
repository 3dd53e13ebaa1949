"""`fastdl.env()`: what it says, what it warns of, and that asking wakes nothing."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastdl
from fastdl import tuned
from fastdl.tuned import Device

ROOT = Path(__file__).resolve().parents[1]
H200 = Device("NVIDIA H200", "cuda", 90, sms=132, shared=232448)


def ptxas(folder, version):
    """A ptxas that only knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1.2, V{version}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def h200(monkeypatch):
    """env() finds an H200."""
    module = sys.modules[fastdl.env.__module__]
    monkeypatch.setattr(module, "_devices", lambda: [H200])


def problems():
    return "\n".join(fastdl.env().problems)


def test_versions_and_json():
    environment = fastdl.env()
    assert environment.versions["torch"] == torch.__version__
    assert environment.versions["fastdl"] == fastdl.__version__
    found = json.loads(environment.to_json())
    assert found.keys() == vars(environment).keys()
    assert f"torch        {torch.__version__}" in str(environment)


def test_asking_wakes_no_driver_and_no_triton():
    program = """
import sys, torch, fastdl
assert fastdl.env().devices == [] or torch.cuda.device_count()
assert torch.cuda.is_initialized() == bool(torch.cuda.device_count())
assert "triton" not in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_interpreter_mode_is_named(device):
    assert fastdl.env().interpreted == (device == "cpu")


@pytest.mark.parametrize("version, bad", [("12.8.93", True), ("13.0.88", True), ("13.1.80", False)])
def test_ptxas_of_the_user(h200, monkeypatch, tmp_path, version, bad):
    monkeypatch.setenv("TRITON_PTXAS_PATH", ptxas(tmp_path / version, version))
    forget_toolchain()
    assert fastdl.env().ptxas.startswith(version)
    assert ("miscompile" in problems()) == bad
    if bad:
        assert "TRITON_PTXAS_PATH" in problems() and version in problems()


def test_a_ptxas_that_does_not_run_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fastdl.env().ptxas is None


def test_other_devices_have_no_such_problem(monkeypatch, tmp_path):
    module = sys.modules[fastdl.env.__module__]
    monkeypatch.setattr(module, "_devices", lambda: [Device("A100", "cuda", 80, 108, 166912)])
    monkeypatch.setenv("TRITON_PTXAS_PATH", ptxas(tmp_path, "12.8.93"))
    forget_toolchain()
    assert "miscompile" not in problems()


def test_a_better_ptxas_is_found(monkeypatch, tmp_path):
    """In the wheel of nvcc, or the newest that Triton brings."""
    binaries = tmp_path / "triton" / "backends" / "nvidia" / "bin"
    ptxas(binaries, "12.8.93")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "triton")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert fastdl.env().better_ptxas is None
    Path(ptxas(tmp_path, "13.1.80")).rename(binaries / "ptxas-blackwell")
    forget_toolchain()
    assert fastdl.env().better_ptxas == str(binaries / "ptxas-blackwell")
    wheel = Path(ptxas(tmp_path / "nvcc", "13.3.33"))
    file = types.SimpleNamespace(name="ptxas", locate=lambda: wheel)
    monkeypatch.setattr(importlib.metadata, "files", lambda dist: [file])
    assert fastdl.env().better_ptxas == str(wheel)


@pytest.fixture(autouse=True)
def _toolchain():
    forget_toolchain()
    yield
    forget_toolchain()


def forget_toolchain():
    for name, module in list(sys.modules.items()):
        if name == "fastdl.ops._toolchain":
            module.ptxas_at.cache_clear()
            module._is_good.cache_clear()


def test_tables_in_use(h200, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path))
    tuned.forget()
    assert "rules by shape" in str(fastdl.env()) or tuned.packaged_file(H200.name).exists()
    tuned.write(tuned.user_file(H200.name), "x", {}, {})
    assert f"{tmp_path / 'nvidia-h200.json'}, 0 entries" in str(fastdl.env())
    tuned.user_file(H200.name).write_text("{")
    assert "nvidia-h200.json, ignored: " in str(fastdl.env())
    tuned.forget()


def test_the_other_fastdl(monkeypatch):
    versions = {"fastdl": "1.0.2", "torch": "2.13.0"}

    def version(dist):
        if dist not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[dist]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip uninstall fastdl" in problems()


def test_no_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in problems()


def test_a_cache_that_everybody_may_write(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "chmod" not in problems()
    tmp_path.chmod(0o777)
    assert f"chmod o-w {tmp_path}" in problems()


def test_liger(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    assert "liger_kernel is imported" in problems()


def test_torch_with_another_triton(monkeypatch):
    need = 'triton==9.9.9; platform_system == "Linux"'
    monkeypatch.setattr(importlib.metadata, "requires", lambda dist: ["sympy", need])
    assert "asks for triton 9.9.9" in problems()
    installed = importlib.metadata.version("triton")
    monkeypatch.setattr(importlib.metadata, "requires", lambda dist: [f"triton=={installed}"])
    assert "asks for" not in problems()
