"""The machine code of every kernel, for GPUs that are not here."""

import json
import re

import pytest

pytest.importorskip("triton")

import fastdl
from fastdl.contract import SPECS, STEPS
from fastdl.targets.binary import Facts
from fastdl.targets.devices import target_of
from fastdl.targets.loop import bracket, main_loop
from fastdl.targets.record import specialisations
from fastdl.targets.rules import faults

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def failures(result):
    assert result.rows
    return [" ".join(row.cells()) for row in result.failures]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("targets", "limit"), [(["sm_90"], 5), (["sm_80", "sm_100", "gfx942"], 1)])
def test_machine_code(targets, limit):
    """All ops at once: the compiler's processes start once."""
    result = fastdl.targets(None, targets, limit=limit)
    assert not failures(result)
    assert {(row.spec.op, row.target) for row in result.rows} == {
        (op, target) for op in [*SPECS, *STEPS] for target in targets
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", [*SPECS, *STEPS])
def test_more_machine_code(op):
    """Of thousands those that differ most; `fastdl targets --all` compiles all."""
    assert not failures(fastdl.targets([op], ["sm_90"], limit=60))
    assert not failures(fastdl.targets([op], [t for t in TARGETS if t != "sm_90"], limit=12))


def config(variant, m, n, k, warps, stages, **more):
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, **more}
    return {"blocks": blocks, "num_warps": warps, "num_stages": stages, "variant": variant}


def made_from(config, constants):
    return all(constants.get(name) == value for name, value in config["blocks"].items())


def test_faults_are_found():
    planted = {
        # one group of four warps has registers for half of this tile
        "spill": config("persistent", 128, 256, 64, 4, 3),
        # wgmma takes a group of four warps
        "no wgmma": config("tiles", 64, 64, 64, 2, 3, SWAP=0),
        # one stage of it is too large, so that fewer stages do not help
        "shared memory": config("tiles", 128, 128, 512, 8, 2, SWAP=0),
        "power of 2": config("tiles", 48, 64, 64, 4, 3, SWAP=0),
    }
    result = fastdl.targets(["linear"], ["sm_90"], limit=12, configs=[*planted.values()])
    for says, fault in planted.items():
        rows = [row for row in result.failures if made_from(fault, dict(row.spec.constants))]
        assert any(says in " ".join(row.cells()) for row in rows), str(result)


@pytest.mark.parametrize(("stored", "found"), [(4096, ["narrow"]), (1024, ["narrow"]), (256, [])])
def test_narrow_stores_are_of_few_bytes(stored, found):
    """What a reduction leaves may be stored as it comes; what is as large as the input may not."""
    spec = next(s for s in specialisations("layer_norm", target_of("sm_90")) if s.aligned)
    read = Facts(resident=1, counts={"loads16": 2, "stores16": 0}, loaded=4096, stored=stored)
    assert [fault.rule for fault in faults(spec, read, target_of("sm_90"))] == found


def test_result():
    calls = []
    result = fastdl.targets(
        ["activation"], ["sm_90"], limit=2, progress=lambda done, of: calls.append((done, of))
    )
    assert calls == [(1, 2), (2, 2)]
    entries = json.loads(result.to_json())
    assert {entry["kernel"] for entry in entries} == {
        "activation.activation_fwd",
        "activation.activation_bwd",
    }
    # what is stored is as large as what is loaded
    assert all(entry["stored"] == entry["loaded"] > 0 for entry in entries)
    assert "activation_fwd" in str(result) and "2 binaries, 0 failures" in str(result)


def test_main_loop_of_a_product():
    planted = {
        "linear.linear_fwd": config("tiles", 128, 128, 64, 8, 3, SWAP=0),
        # nested loops: the outer one holds the epilogue
        "linear.linear_persistent": config("persistent", 128, 256, 64, 8, 3),
    }
    result = fastdl.targets(["linear"], ["sm_90"], limit=8, configs=[*planted.values()])
    entries = [
        entry
        for entry in json.loads(result.to_json())
        if entry["kernel"] in planted
        and made_from(planted[entry["kernel"]], dict(entry["constants"]))
    ]
    assert {entry["kernel"] for entry in entries} == planted.keys()
    for entry in entries:
        blocks = planted[entry["kernel"]]["blocks"]
        flops = 2 * blocks["BLOCK_M"] * blocks["BLOCK_N"] * blocks["BLOCK_K"]
        loop, exact = entry["loop"], entry["args"][0].startswith("float32")
        assert loop["flops"] == flops
        assert loop["tensor"] == (8 if exact else 4)
        assert loop["tensor_clocks"] == flops / (2048 if exact else 4096)
        assert loop["mufu"] == loop["fp32"] == 0
        assert 60 < loop["other"] < 160
        assert round(loop["tflops"][1]) == (474 if exact else 949)
    others = [row for row in result.rows if row.spec.name == "finish_bwd"]
    assert others and all(row.facts.loop is None and "-" in row.cells() for row in others)
    assert f"{loop['tensor']} tensor 0 MUFU 0 FP32 {loop['other']} other; " in str(result)


def disassembly(text):
    """Lines as cuobjdump prints them, of code that branches to labels in its first column."""
    lines = text.strip("\n").splitlines()
    at = {line.split(":")[0]: f"0x{16 * i:x}" for i, line in enumerate(lines) if line[0] != " "}
    listing = ["\t\tFunction : made_by_hand"]
    for i, line in enumerate(lines):
        code = re.sub(r"(BRA\S* .*?)(\w+)$", lambda m: m[1] + at[m[2]], line[6:])
        listing.append(f"        /*{16 * i:04x}*/  {code} ;   /* 0x{i:016x} */")
        listing.append(f"{' ' * 60} /* 0x000e220000000800 */")
    return "\n".join(listing)


NESTED = disassembly("""
      MUFU.RCP R0, R1
tile: HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24
k:    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6+0x24000], R2
      @!P1 BRA wait
go:   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
      @UP2 UTMALDG.2D [UR12], [UR16]
      BRA.U !UP1, some
      FSETP.GEU.AND P2, PT, R0, RZ, PT
      STG.E.128 desc[UR8][R2.64], R4
some: HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
      MUFU.EX2 R0, R1
      @P3 FFMA R0, R1, R2, R3
      FMNMX R0, R0, R1, !PT
      @P0 BRA k
      HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24
      STG.E.128 desc[UR8][R2.64], R4
      @!P4 BRA tile
      EXIT
wait: SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6+0x24000], R2
      @!P1 BRA wait
      BRA go
end:  BRA end
""")

COPIES = disassembly("""
one:  HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24
      @P0 BRA one
mask: HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24
      FSEL R0, R0, R1, P2
      HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24
      @P0 BRA mask
full: HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24
      HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24
      @P0 BRA full
      EXIT
""")


def counts(loop):
    return loop.tensor, loop.mufu, loop.fp32, loop.other


def test_main_loop_is_found():
    # neither the wait, nor what only some iterations run, nor the products of the outer loop
    nested = main_loop(NESTED, warps=8)
    assert counts(nested) == (2, 1, 2, 5)
    assert (nested.flops, nested.tensor_clocks) == (2 * 2 * (2 * 64 * 128 * 16), 2 * 2 * 64)
    copies = main_loop(COPIES, warps=4)
    assert counts(copies) == (2, 0, 0, 1)
    assert copies.flops / copies.tensor_clocks == 2048
    assert main_loop(NESTED.replace("HGMMA", "HMMA"), warps=8) is None


def test_time_bracket():
    low, high = bracket(2 * 2 * 128**3, 2048, 1056, 830)
    assert (round(low), round(high)) == (494, 949)
    # each of four schedulers issues for two of the warps
    loop = main_loop(NESTED, warps=8)
    assert loop.tflops == bracket(loop.flops, 256, 16, 14)


def test_what_tuning_may_pick_is_compiled():
    found = {(s.name, s.config) for s in specialisations("layer_norm", target_of("sm_90"))}
    # the rule takes 8 warps
    for kernel in ("layernorm_fwd", "layernorm_bwd"):
        assert (kernel, "ROWS=1 BLOCK=4096 w4 s1") in found


def test_unknown_names():
    with pytest.raises(ValueError, match=r"sm_70.*sm_80"):
        fastdl.targets(["linear"], ["sm_70"])
    with pytest.raises(ValueError, match=r"liner.*linear"):
        fastdl.targets(["liner"])
