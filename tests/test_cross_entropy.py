"""Cross entropy: what is special to it, and the ways in which people write it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF
from fastdl.contract.evaluate import Allocated

B, S, D, V = 2, 6, 16, 40
CAP = 5.0


def inputs(dtype=torch.float32):
    h = torch.randn(B, S, D, dtype=dtype, requires_grad=True)
    w = torch.randn(V, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (B, S))
    labels[0, 2] = -100
    return h, w, labels


def hugging_face(h, w, labels):
    logits = F.linear(h, w).float()
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), shifted.view(-1), reduction="sum") / 7


def sliced_hugging_face(h, w, labels):
    logits = F.linear(h, w)[..., :-1, :].contiguous().view(-1, V).float()
    return nn.CrossEntropyLoss()(logits, labels[..., 1:].contiguous().view(-1))


def nanogpt(h, w, labels):
    logits = F.linear(h, w)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)


def gemma(h, w, labels):
    logits = torch.tanh(F.linear(h, w) / CAP) * CAP
    return F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def flat(h, w, labels):
    return F.cross_entropy(
        F.linear(h.flatten(0, 1), w).to(torch.float32), labels.flatten(), label_smoothing=0.1
    )


HEADS = [hugging_face, sliced_hugging_face, nanogpt, gemma, flat]


def logits_of(h, w):
    return h.flatten(0, 1) @ w.t()


def kept(labels):
    return labels.clamp(min=0).flatten()


def in_float32(h, w, labels):
    return F.cross_entropy(logits_of(h, w).float().view(-1, V), labels.view(-1))


def log_softmax(h, w, labels):
    return nn.NLLLoss()(F.log_softmax(logits_of(h, w), dim=-1), labels.flatten())


def wide_log_softmax(h, w, labels):
    log_p = torch.log_softmax(logits_of(h, w), 1, dtype=torch.float32)
    return F.nll_loss(log_p, labels.flatten(), reduction="sum")


def chosen(h, w, labels):
    log_p = F.log_softmax(logits_of(h, w).view(B, S, V), dim=-1)
    return torch.gather(log_p, -1, kept(labels).view(B, S).unsqueeze(-1)).squeeze(-1)


def smoothed(h, w, labels):
    log_p = F.log_softmax(logits_of(h, w), dim=-1)
    nll = -log_p.gather(dim=-1, index=kept(labels).unsqueeze(1))
    return (0.9 * nll.squeeze(1) + 0.1 * -log_p.mean(dim=-1)).mean()


def soft(h, w, labels):
    target = torch.eye(V, dtype=h.dtype)[kept(labels)]
    return torch.sum(-target * F.log_softmax(logits_of(h, w), dim=-1), dim=-1).mean()


ROWS = [in_float32, log_softmax, wide_log_softmax, chosen, smoothed, soft]


def run(function, given):
    y = function(*given)
    return [y, *torch.autograd.grad(y.float().sin().sum(), given[:2])]


def losses(function, given, atol):
    """The names of the fused losses in the compiled graph, which computes the same."""
    kept = []

    def keep(gm, example):
        fastdl.backend(gm, example)
        targets = [n.target for n in gm.graph.nodes]
        kept.extend(
            t.__name__ for t in targets if getattr(t, "__module__", "").startswith("fastdl")
        )
        return gm.forward

    torch._dynamo.reset()
    got = run(torch.compile(function, backend=keep, fullgraph=True), given)
    for a, b in zip(got, run(function, given), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)
    return [name for name in kept if name != "linear"]


@pytest.mark.parametrize("written", HEADS)
def test_head_is_found(written):
    (name,) = losses(written, inputs(), 2e-5)
    assert name.startswith("linear_cross_entropy")


def test_head_is_found_in_bfloat16():
    assert losses(hugging_face, inputs(torch.bfloat16), 0.05) == ["linear_cross_entropy_of_rows"]


@pytest.mark.parametrize("written", ROWS)
def test_rows_are_found(written):
    (name,) = losses(written, inputs(), 2e-5)
    assert name in (
        "cross_entropy_of_rows", "cross_entropy_of_log_softmax", "chosen_log_softmax",
        "smoothed_cross_entropy", "soft_cross_entropy", "cross_entropy",
    )  # fmt: skip


def other_width(h, w, labels):
    return F.cross_entropy(F.linear(h, w).view(-1, V // 2), labels.clamp(0, 9).view(-1).repeat(2))


def classes_inside(h, w, labels):
    return F.cross_entropy(F.linear(h, w).float(), labels[:, :1].expand(B, V) % S)


def read_twice(h, w, labels):
    logits = F.linear(h, w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)) + logits.mean()


def shares_of_more(h, w, labels):
    log_p = F.log_softmax(logits_of(h, w), dim=-1)
    nll = -log_p.gather(dim=-1, index=kept(labels).unsqueeze(1))
    return (1.0 * nll.squeeze(1) + 0.1 * -log_p.mean(dim=-1)).mean()


@pytest.mark.parametrize("written", [other_width, classes_inside, read_twice])
def test_head_is_not_taken(written):
    assert all(not name.startswith("linear_c") for name in losses(written, inputs(), 2e-5))


def test_shares_that_add_up_to_more_are_left():
    assert losses(shares_of_more, inputs(), 2e-5) == ["log_softmax"]


def test_chunks_change_nothing(fused):
    x, w, labels = inputs()
    given = [x.detach().flatten(0, 1), w.detach(), torch.randn(V)]
    for reduction in ("mean", "none"):
        found = []
        for size in (5, 8, None):
            leaves = [t.clone().requires_grad_() for t in given]
            loss = FF.linear_cross_entropy(
                *leaves[:2], labels.flatten(), linear_bias=leaves[2], reduction=reduction,
                chunk_size=size,
            )  # fmt: skip
            found.append([loss, *torch.autograd.grad(loss.sin().sum(), leaves)])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_torch_takes_chunks_where_kernels_cannot(monkeypatch):
    x, w, labels = inputs()
    given = [x.detach().flatten(0, 1).requires_grad_(), w]
    found = []
    for on_gpus_only in (True, False):
        monkeypatch.setattr("fastdl.ops._launch.INTERPRETED", not on_gpus_only)
        explained = fastdl.explain(FF.linear_cross_entropy, *given, labels.flatten(), chunk_size=5)
        assert explained.fused != on_gpus_only
        loss = FF.linear_cross_entropy(*given, labels.flatten(), chunk_size=5)
        found.append([loss, *torch.autograd.grad(loss, given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_options_of_torch_name_the_chunk(fused):
    x, w, labels = inputs()
    given = (x.detach().flatten(0, 1), w.detach(), labels.flatten())
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    explained = fastdl.explain(FF.linear_cross_entropy, *given, options=options)
    assert len(explained.launches) == 4
    with pytest.raises(ValueError, match="chunk_size is 0"):
        FF.linear_cross_entropy(*given, chunk_size=0)


def allocated(function, *args):
    with Allocated() as seen:
        torch.autograd.grad(function(*args), args[:2])
    return seen.bytes


def test_logits_are_never_whole(fused, monkeypatch):
    # what kernels put there is not looked at, and would take the interpreter long
    monkeypatch.setattr("fastdl.ops.cross_entropy.launch", lambda *args, **options: None)
    n, classes = 2048, 16384
    x = torch.randn(n, 256, requires_grad=True)
    w = torch.randn(classes, 256, requires_grad=True)
    target = torch.arange(n)
    ours = allocated(FF.linear_cross_entropy, x, w, target)
    eager = allocated(lambda x, w: F.cross_entropy(F.linear(x, w), target), x, w)
    assert ours <= 0.25 * eager


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_costs_nothing(frozen, fused):
    x, w, labels = inputs()
    given = [x.detach().flatten(0, 1), w.detach()]
    given[1 - frozen].requires_grad_()
    with Allocated() as seen:
        loss = FF.linear_cross_entropy(*given, labels.flatten())
        loss.backward()
    assert given[frozen].grad is None
    shapes = [t.shape for t in seen.made]
    assert given[1 - frozen].shape in shapes and given[frozen].shape not in shapes


def outcome(function, x, *args, **options):
    x = x.detach().requires_grad_()
    loss = function(x, *args, **options)
    return [loss, *torch.autograd.grad(loss.sum(), x)]


EDGES = {
    "all ignored": (torch.randn(3, 70), torch.full((3,), -100)),
    "an infinite logit": (torch.randn(3, 70).index_fill(1, torch.tensor(7), math.inf), None),
    "logits of -inf": (torch.randn(3, 70).index_fill(1, torch.tensor(7), -math.inf), None),
    "the label's is -inf": (torch.randn(3, 70).index_fill(1, torch.tensor(4), -math.inf), None),
    "first block of -inf": (torch.randn(3, 70).index_fill(1, torch.arange(64), -math.inf), None),
    "a row of -inf": (torch.randn(3, 70).index_fill(0, torch.tensor(1), -math.inf), None),
    "a row that underflows": (torch.randn(3, 70).index_fill(1, torch.tensor(9), 300.0), None),
    "large logits": (1e4 * torch.randn(3, 70), None),
}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_those_of_torch(edge, options, fused):
    x, target = EDGES[edge]
    target = torch.arange(3, 6) if target is None else target
    for ours, torchs in zip(
        outcome(FF.cross_entropy, x, target, **options),
        outcome(F.cross_entropy, x, target, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_all_ignored_has_gradients_of_0(fused):
    x, w, _ = inputs()
    loss = FF.linear_cross_entropy(x.flatten(0, 1), w, torch.full((B * S,), -100))
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, (x, w)):
        assert (grad == 0).all()


def test_gradients_of_float16_do_not_underflow(fused):
    """They are made of a loss whose own gradient is 1, and scaled in float32."""
    x = (0.01 * torch.randn(8, 16)).half().requires_grad_()
    w = (4 * torch.randn(64, 16)).half()
    target = torch.arange(8)
    loss = FF.linear_cross_entropy(x, w, target, reduction="sum") * 2.0**-12
    truth = F.cross_entropy(x.double() @ w.double().t(), target, reduction="sum") * 2.0**-12
    (got,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(truth, x)
    assert (got.double() - expected).norm() < 1e-3 * expected.norm()


def test_class_weights_of_other_kinds_are_torchs():
    x, target = torch.randn(3, 5), torch.rand(3, 5)
    w = torch.rand(5, requires_grad=True)
    ours, torchs = (f(x, target, w) for f in (FF.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, torchs)
    with pytest.raises(RuntimeError, match="weight"):
        FF.cross_entropy(x, torch.arange(3), w)


def test_probabilities_of_another_dtype(fused):
    x = torch.randn(5, 70, dtype=torch.bfloat16, requires_grad=True)
    target = torch.rand(5, 70)
    ours, torchs = outcome(FF.cross_entropy, x, target), outcome(F.cross_entropy, x, target)
    assert [t.dtype for t in ours] == [t.dtype for t in torchs] == [torch.float32, torch.bfloat16]
    truth = F.cross_entropy(x.double(), target.double())
    torch.testing.assert_close(ours[0].double(), truth, atol=1e-5, rtol=1e-5)


def test_legacy_arguments(fused):
    x, target = torch.randn(3, 5), torch.arange(3)
    for function, ours in ((F.cross_entropy, FF.cross_entropy), (F.nll_loss, FF.nll_loss)):
        with pytest.warns(UserWarning, match="reduction"):
            expected = function(x, target, None, False)
        with pytest.warns(UserWarning, match="reduction"):
            torch.testing.assert_close(ours(x, target, None, False), expected)


def test_modules_are_replaced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss, self.head = nn.CrossEntropyLoss(), nn.LinearCrossEntropyLoss(8, 5)

        def forward(self, x, y):
            return self.loss(x, y) + self.head(x, y)

    model, given = Model(), (torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))
    expected = model(*given)
    fastdl.optimize(model)
    assert type(model.loss) is fastdl.nn.CrossEntropyLoss
    assert type(model.head) is fastdl.nn.LinearCrossEntropyLoss
    torch.testing.assert_close(model(*given), expected)
