"""The table of routes: who computes a shape, and which measurement says so."""

import json

import pytest
import torch

from fastdl import tuned
from fastdl.cli import main
from fastdl.targets import routes as module
from fastdl.targets.routes import routes

GPU = "NVIDIA Straw 9000"
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}
GATHERED = {"blocks": TILES, "num_warps": 4, "num_stages": 3, "variant": "implicit"}
WALK = {"blocks": {"BLOCK_B": 16, "BLOCK_H": 128}, "num_warps": 8, "num_stages": 1}
X, W = (64 * 56 * 56, 64, 64, 9), (256, 64, 128)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes the user's table for a GPU that does not exist."""
    monkeypatch.setenv("FASTDL_TUNED", str(tmp_path))
    tuned.forget()

    def write(op, sizes, entry):
        key = tuned.key_of(op, torch.bfloat16, sizes)
        tuned.write(tuned.user_file(GPU), GPU, {"date": "2026-01-02"}, {key: entry})
        return f"{key} (your table of 2026-01-02)"

    yield write
    tuned.forget()


def by_shape(op):
    return {row.shape: row for row in routes(GPU).rows if row.op == op}


def test_a_measured_convolution_is_ours(table, monkeypatch):
    monkeypatch.setattr(module, "OPS", ("conv",))
    unmeasured = by_shape("conv")
    key = table("conv", X, GATHERED)
    found = by_shape("conv")
    last, planes = "resnet 64x64x56x56 k3x3 relu last", "resnet 64x64x56x56 k3x3 relu"
    assert found[last][3:] == ("Triton: conv_fwd", key)
    assert unmeasured[last][3:] == (
        "cuDNN, and Triton: finish_fwd",
        "not measured: a rule by shape",
    )
    assert found[planes] == unmeasured[planes]
    normed = "resnet 64x64x56x56 k3x3 norm relu last"
    assert found[normed][3:] == ("Triton: channelnorm_affine, conv_fwd", key)
    pointwise = "resnet 64x64x56x56 k1x1 relu residual last"
    assert unmeasured[pointwise].by == "Triton: linear_persistent"
    depthwise = "convnext 64x96x56x56 k7x7"
    assert unmeasured[depthwise].by == "Triton: depthwise_fwd"
    key = table("linear", (64 * 56 * 56, 256, 64), {"blocks": {}, "variant": "gemm"})
    assert by_shape("conv")[pointwise][3:] == ("cuBLAS, and Triton: finish_fwd", key)
    key = table("conv", X, {"blocks": {}, "variant": "vendor"})
    assert by_shape("conv")[last][3:] == ("cuDNN, and Triton: finish_fwd", key)


def test_recurrence_is_cudnns_until_it_is_measured(table, monkeypatch):
    monkeypatch.setattr(module, "OPS", ("gru", "layer_norm_lstm"))
    (row,) = by_shape("gru").values()
    assert row[3:] == ("cuDNN", "not measured: a rule by shape")
    (row,) = by_shape("layer_norm_lstm").values()
    assert row.by.startswith("Triton: ") and "norm_lstm_fwd" in row.by
    device = module.target_of("sm_90").device
    walk = next(c for c in tuned.CANDIDATES["gru"](torch.bfloat16, W, device))
    entry = {"blocks": walk.blocks, "num_warps": walk.num_warps, "num_stages": walk.num_stages}
    key = table("gru", W, {**entry, "variant": walk.variant})
    (row,) = by_shape("gru").values()
    assert row.measured == key and row.by.startswith("Triton: ")
    margin = {"ratio": 0.5, "low": 0.4, "high": 0.6}
    key = table("gru", W, {"blocks": {}, "variant": "torch", "margin": margin})
    (row,) = by_shape("gru").values()
    assert row[3:] == ("cuDNN", f"{key[:-1]}, 0.50x torch's speed (0.40 to 0.60))")


def test_the_command_prints_it(table, monkeypatch, capsys):
    monkeypatch.setattr(module, "OPS", ("gru",))
    key = table("gru", W, {"blocks": {}, "variant": "torch"})
    assert main(["report", "--routes", "--gpu", GPU, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] == GPU and found["routes"][0]["measured"] == key
    assert main(["report", "--routes"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert main(["report", "--json"]) == 2
    assert "fastdl report --routes" in capsys.readouterr().err
