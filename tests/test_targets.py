"""The machine code of every kernel, for GPUs that are not here."""

import json

import pytest

pytest.importorskip("triton")

import fastdl
from fastdl.contract import SPECS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def failures(result):
    assert result.rows
    return [" ".join(row.cells()) for row in result.failures]


@pytest.mark.parametrize("op", SPECS)
def test_machine_code(op):
    assert not failures(fastdl.targets([op], ["sm_90"]))
    assert not failures(fastdl.targets([op], [t for t in TARGETS if t != "sm_90"], limit=4))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", SPECS)
def test_all_machine_code(op):
    assert not failures(fastdl.targets([op], ["sm_90"], limit=None))
    assert not failures(fastdl.targets([op], [t for t in TARGETS if t != "sm_90"], limit=40))


def config(variant, m, n, k, warps, stages, **more):
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, **more}
    return {"blocks": blocks, "num_warps": warps, "num_stages": stages, "variant": variant}


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        # one group of four warps has registers for half of this tile
        (config("persistent", 128, 256, 64, 4, 3), "spill"),
        # wgmma takes a group of four warps
        (config("tiles", 64, 64, 64, 2, 3, SWAP=0), "no wgmma"),
        # one stage of it is too large, so that fewer stages do not help
        (config("tiles", 128, 128, 512, 8, 2, SWAP=0), "shared memory"),
        (config("tiles", 48, 64, 64, 4, 3, SWAP=0), "power of 2"),
    ],
)
def test_faults_are_found(planted, says):
    result = fastdl.targets(["linear"], ["sm_90"], limit=6, configs=[planted])
    assert any(says in line for line in failures(result)), str(result)


def test_result():
    calls = []
    result = fastdl.targets(
        ["activation"], ["sm_90"], limit=2, progress=lambda done, of: calls.append((done, of))
    )
    assert calls == [(1, 2), (2, 2)]
    assert {row["kernel"] for row in json.loads(result.to_json())} == {
        "activation.activation_fwd",
        "activation.activation_bwd",
    }
    assert "activation_fwd" in str(result) and "2 binaries, 0 failures" in str(result)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"sm_70.*sm_80"):
        fastdl.targets(["linear"], ["sm_70"])
    with pytest.raises(ValueError, match=r"liner.*linear"):
        fastdl.targets(["liner"])
