"""The graph engine: what inductor keeps on disk is used for the same sources and policy alone."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import fastdl
from fastdl.optimize.graph.caches import digest
from graph_forms import tensors


@pytest.mark.slow
def test_code_of_other_sources_or_another_policy_is_not_used(monkeypatch):
    """Forward and backward, which is compiled later."""
    x, w = tensors((3, 8), (8, 8))
    fresh_cache = importlib.import_module("torch._inductor.utils").fresh_cache
    counters = importlib.import_module("torch._dynamo.utils").counters

    def compiled():
        torch._dynamo.reset()
        counters.clear()
        f = torch.compile(
            lambda x: F.gelu(F.linear(x, w)).sin(),
            backend=fastdl.backend,
            options={"then": "inductor"},
        )
        torch.autograd.grad(f(x).sum(), (x, w))
        return tuple(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))

    with fresh_cache():
        with fastdl.policy("fused"):
            assert compiled() == (0, 2)
            assert compiled() == (2, 0)
        with fastdl.policy("definition"):
            assert compiled()[0] == 0
        monkeypatch.setattr("fastdl.optimize.graph.caches.digest", lambda folder: "other")
        with fastdl.policy("fused"):
            assert compiled() == (0, 2)


def test_sources_have_a_digest(tmp_path):
    digests = []
    for version in ("1", "2", "1"):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        (folder / "op.py").write_text(version)
        digests.append(digest(folder))
    assert digests[0] == digests[2] != digests[1]
