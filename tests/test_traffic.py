"""The count of bytes: what is read twice counts twice, what is masked does not count."""

import os
from functools import partial

import pytest
import torch

import fastdl.functional as FF
from fastdl.contract.case import Case
from fastdl.contract.traffic import Traffic, moved_once, passes

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="bytes are counted in Triton's interpreter"
)


def norm_of(rows, columns):
    return Case("", "", lambda t: partial(FF.rms_norm, t(rows, columns), (columns,)))


def test_rows_in_registers_are_read_once():
    assert passes(norm_of(64, 48), torch.float32)[0] == pytest.approx(1, abs=0.02)


def test_rows_beyond_the_registers_are_read_twice():
    forward, _ = passes(norm_of(4, 300), torch.float32)
    assert forward == pytest.approx(3 / 2, abs=0.02)  # x, x again, and y
    with pytest.raises(AssertionError, match=r"forward moves 1\.5"):
        moved_once(None, norm_of(4, 300), "cpu", torch.float32)


def test_a_masked_lane_moves_nothing():
    x = torch.randn(5, 33)  # 5 of 8 rows, 33 of 64 columns
    with Traffic() as traffic:
        FF.relu(x)
    assert traffic.moved == traffic.least == 2 * x.nbytes


def test_what_all_programs_share_counts_once():
    x, weight = torch.randn(100, 64), torch.randn(64)
    with Traffic() as traffic:
        FF.rms_norm(x, (64,), weight)
    assert traffic.moved == traffic.least == 2 * x.nbytes + weight.nbytes + 4 * len(x)


def test_16_bit_elements_are_two_bytes():
    x = torch.randn(256, dtype=torch.bfloat16)
    with Traffic() as traffic:
        FF.relu(x)
    assert traffic.moved == 4 * 256
