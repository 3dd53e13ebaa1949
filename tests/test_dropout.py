"""Dropout: the mask of the kernels is the definition's, bit for bit, and drops the right share."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fastdl
import fastdl.functional as FF


def masks(op, seed):
    for mode in ("fused", "definition"):
        torch.manual_seed(seed)
        with fastdl.policy(mode, on_fallback="error"):
            yield op() != 0


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2500), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_flat_masks_agree(device, n, p, seed):
    fused, definition = masks(lambda: FF.dropout(torch.ones(n, device=device), p), seed)
    assert torch.equal(fused, definition)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**40))
def test_masks_of_rows_agree(device, m, n, seed):
    x, w = torch.ones(m, 4, device=device), torch.ones(n, 4, device=device)
    fused, definition = masks(lambda: FF.linear(x, w, dropout_p=0.5), seed)
    assert torch.equal(fused, definition)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(device, p):
    n = 40_000
    kept = (FF.dropout(torch.ones(n, device=device), p) != 0).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5


def test_neighbours_are_independent(device):
    keep = (FF.dropout(torch.ones(40_000, device=device), 0.5) != 0).float() * 2 - 1
    for lag in (1, 2, 3, 4, 1024):
        assert abs((keep[lag:] * keep[:-lag]).mean().item()) < 0.03, lag


def test_what_is_kept_is_scaled(device):
    y = FF.dropout(torch.full((100,), 3.0, device=device), 0.25)
    assert set(y.tolist()) <= {0.0, 4.0}


def test_every_call_draws_anew_and_a_seed_repeats(device):
    x = torch.ones(1000, device=device)
    torch.manual_seed(3)
    first, second = FF.dropout(x), FF.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(FF.dropout(x), first)
    assert not torch.equal(first, second)


def test_nothing_to_drop(device):
    x = torch.ones(8, device=device)
    assert FF.dropout(x, 0.5, training=False) is x
    assert FF.dropout(x, 0.0) is x


def test_in_place_is_torchs(device):
    x = torch.ones(8, device=device)
    assert FF.dropout(x, 1.0, inplace=True) is x
    assert not x.any()
