"""Embedding: long runs of one index, indices that are not there, and what torch keeps."""

import pytest
import torch
import torch.nn.functional as F

import fastdl
import fastdl.functional as FF
from fastdl.contract.embedding import skewed, words


@pytest.mark.parametrize("ids", [skewed, words])
@pytest.mark.parametrize("n_ids", [7, 8, 16, 40, 333])
def test_runs_of_any_length(ids, n_ids, device):
    """Chunks that begin and end anywhere in a run; sums of whole numbers are exact."""
    found = ids(torch.Size([n_ids]), 6).to(device)
    w = torch.zeros(6, 5, device=device, requires_grad=True)
    dy = torch.arange(5.0 * n_ids, device=device).view(n_ids, 5)
    with fastdl.policy("fused", on_fallback="error"):
        (ours,) = torch.autograd.grad(FF.embedding(found, w), w, dy)
    (expected,) = torch.autograd.grad(F.embedding(found, w), w, dy)
    assert torch.equal(ours, expected)


def test_sums_of_bfloat16_are_in_float32(device):
    w = torch.zeros(2, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
    ids = torch.ones(1000, dtype=torch.long, device=device)
    FF.embedding(ids, w).sum().backward()
    assert w.grad.tolist() == [[0.0] * 3, [1000.0] * 3]


def test_an_index_that_is_not_there(device):
    w = torch.ones(4, 3, device=device, requires_grad=True)
    for bad in ([4], [-1], [0, 2**32 + 1]):
        ids = torch.tensor(bad, device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match="4 rows"):
                FF.embedding(ids, w)
        else:
            y = FF.embedding(ids, w)
            assert y[-1].isnan().all()


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"sparse": True}])
def test_options_of_torch(option, device):
    ids = torch.tensor([1, 3], device=device)
    results = []
    for embedding in (FF.embedding, F.embedding):
        w = torch.arange(15.0, device=device).view(5, 3).requires_grad_()
        y = embedding(ids, w, **option)
        y.sum().backward()
        results.append((y, w.detach(), w.grad.to_dense()))
        assert w.grad.is_sparse == ("sparse" in option)
    torch.testing.assert_close(*results)
    said = fastdl.explain(FF.embedding, ids, w, **option)
    assert [d.reason.name for d in said.decisions if d.reason] == ["OPTION"]


@pytest.mark.parametrize("padding_idx", [0, 4, -1, -5])
def test_padding_is_the_row_that_torch_takes(padding_idx, device):
    ids, grads = torch.arange(5, device=device), []
    for embedding in (FF.embedding, F.embedding):
        w = torch.ones(5, 3, device=device, requires_grad=True)
        embedding(ids, w, padding_idx).sum().backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_tied_weights(device):
    """A table that is also the last layer gets the sum of both gradients."""
    ids = torch.tensor([[1, 3, 3]], device=device)
    grads = []
    for embedding in (FF.embedding, F.embedding):
        w = torch.linspace(-1, 1, 20, device=device).view(5, 4).requires_grad_()
        (embedding(ids, w) @ w.T).logsumexp(-1).sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


def test_no_row_is_read_that_is_not_there(device, monkeypatch):
    """As on a GPU, where nobody looks before: rows of NaN, and no gradient from them."""
    monkeypatch.setattr("fastdl.ops.embedding._check_range", lambda ids, n_rows: None)
    ids = torch.tensor([4, 1, -1], device=device)
    w = torch.arange(30.0, device=device).view(10, 3)[3:7].requires_grad_()
    with fastdl.policy("fused", on_fallback="error"):
        y = FF.embedding(ids, w)
        (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert y.isnan().all(1).tolist() == [True, False, True]
    assert y[1].equal(w[1])
    assert dw.sum(1).tolist() == [0, 3, 0, 0]
