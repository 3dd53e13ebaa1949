"""Losses of each element: how models write them, what upstream gradients do, what torch keeps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
import fastdl.functional as FF

NAMES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")
BINARY = "binary_cross_entropy_with_logits"


def pair(*shape, dtype=torch.float32, device="cpu"):
    x, t = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return x.requires_grad_(), t.sigmoid().requires_grad_()


def fused_calls(function, *given):
    """What the graph calls of ours, and the compiled result."""
    kept = []

    def keep(gm, example):
        fastdl.backend(gm, example)
        nodes = gm.graph.nodes
        kept.extend(n for n in nodes if getattr(n.target, "__module__", "").startswith("fastdl."))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=keep, fullgraph=True)(*given), kept


def squared_by_hand(a, b):
    d = a - b
    return torch.sum(d * d)


WRITTEN = [
    (lambda a, b: ((a - b) ** 2).mean(), "mse", "mean"),
    (lambda a, b: (a - b).pow(2).mean(), "mse", "mean"),
    (lambda a, b: torch.mean(torch.square(a - b)), "mse", "mean"),
    (squared_by_hand, "mse", "sum"),
    (lambda a, b: (a - b).abs().mean(), "l1", "mean"),
    (lambda a, b: torch.abs(a - b).sum(), "l1", "sum"),
]


@pytest.mark.parametrize(("written", "loss", "reduction"), WRITTEN)
def test_is_found_written_out(written, loss, reduction):
    given = pair(5, 7)
    found, (call,) = fused_calls(written, *given)
    assert call.target.__name__ == f"{loss}_of_difference"
    assert call.args[2:] == (reduction,)
    expected = written(*given)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(
        *(torch.autograd.grad(y, given) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


OPTIONS = [
    *((name, {}) for name in (*NAMES, BINARY)),
    ("mse_loss", {"reduction": "none"}),
    ("mse_loss", {"weight": torch.rand(5, 7)}),
    ("l1_loss", {"size_average": False}),
    ("smooth_l1_loss", {"beta": 0.5}),
    ("huber_loss", {"delta": 2.0, "weight": torch.rand(5, 7)}),
    ("kl_div", {"reduction": "batchmean", "log_target": True}),
    (BINARY, {"weight": torch.rand(7), "pos_weight": torch.rand(5, 1)}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_function_of_torch_is_found(name, options):
    given = pair(5, 7)

    def written(a, b):
        return getattr(F, name)(a, b, **options)

    found, (call,) = fused_calls(written, *given)
    assert call.target is getattr(FF, name)
    torch.testing.assert_close(found, written(*given))


@pytest.mark.parametrize(
    "written",
    [
        lambda a, b: ((a - b) ** 2).mean(-1),
        lambda a, b: ((a - b) ** 3).mean(),
        lambda a, b: ((a - 1.0) ** 2).mean(),
        lambda a, b: F.l1_loss(a, b, weight=b.detach()),
        lambda a, b: F.mse_loss(a, b).sqrt() + F.binary_cross_entropy(a.sigmoid(), b.detach()),
    ],
)
def test_what_is_something_else_stays(written):
    given = pair(5, 7)
    found, calls = fused_calls(written, *given)
    assert {n.target.__name__ for n in calls} <= {"mse_loss", "sigmoid", "activation"}
    torch.testing.assert_close(found, written(*given))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [*NAMES[:4], BINARY])
def test_upstream_gradients(name, reduction, device):
    """A loss that is scaled, or stands in a sum with itself, has the gradients of torch's."""

    def gradients(function):
        torch.manual_seed(0)
        x, t = pair(3, 50, device=device)
        loss = function(x, t, reduction=reduction)
        total = -3.0 * loss + loss**2
        first = torch.autograd.grad(total, (x, t), retain_graph=True)
        first[0].zero_()  # nothing that is kept for backward is handed out
        return torch.autograd.grad(total, (x, t))

    with fastdl.policy("fused", on_fallback="error"):
        ours = gradients(getattr(FF, name))
    torch.testing.assert_close(ours, gradients(getattr(F, name)))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_a_learned_weight_is_torchs(name, device):
    (x, t), w = pair(3, 5, device=device), torch.rand(3, 5, device=device, requires_grad=True)
    said = fastdl.explain(getattr(FF, name), x, t, weight=w)
    assert [d.reason.name for d in said.decisions if d.reason] == ["OPTION"]
    ours, torchs = (
        torch.autograd.grad(getattr(module, name)(x, t, weight=w), (x, t, w)) for module in (FF, F)
    )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss"])
def test_targets_that_are_whole_numbers(name, device):
    x, t = torch.randn(9, device=device), torch.arange(9, device=device)
    torch.testing.assert_close(getattr(FF, name)(x, t), getattr(F, name)(x, t))


@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"reduce": True}])
@pytest.mark.parametrize("name", ["mse_loss", "kl_div", BINARY])
def test_deprecated_arguments(name, legacy, device):
    x, t = pair(3, 5, device=device)
    with pytest.warns(UserWarning, match="deprecated"):
        ours = getattr(FF, name)(x, t, **legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, getattr(F, name)(x, t, **legacy))


def test_warnings_of_torch():
    x = torch.ones(3, 4)
    with pytest.warns(UserWarning, match=r"mse_loss: .*\(3, 4\).*\(4,\)"):
        FF.mse_loss(x, torch.ones(4))
    with pytest.warns(UserWarning, match="batchmean") as seen:
        FF.kl_div(x, x)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="elementwise_mean"):
        FF.l1_loss(x, x, reduction="elementwise_mean")


@pytest.mark.parametrize("shapes", [((4, 3), (3,)), ((3,), (4, 3)), ((), (4, 3)), ((), ())])
def test_batch_of_a_divergence_is_the_inputs(shapes, device):
    x, t = (torch.rand(shape, device=device) for shape in shapes)
    got, expected = (f(x, t, reduction="batchmean") for f in (FF.kl_div, F.kl_div))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("of_x", "of_t"), [("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("name", [*NAMES[:3], BINARY])
def test_two_dtypes(name, of_x, of_t, device):
    x = torch.randn(70, dtype=getattr(torch, of_x), device=device, requires_grad=True)
    t = torch.rand(70, dtype=getattr(torch, of_t), device=device, requires_grad=True)
    wide = [u.detach().double().requires_grad_() for u in (x, t)]
    ours, torchs = (getattr(module, name)(x, t, reduction="none") for module in (FF, F))
    assert ours.dtype == torchs.dtype
    truth = getattr(F, name)(*wide, reduction="none")
    found = (ours, *torch.autograd.grad(ours.sum(), (x, t)))
    expected = (truth, *torch.autograd.grad(truth.sum(), wide))
    for got, wanted in zip(found, expected, strict=True):
        rough = 1e-5 if got.dtype == torch.float32 else 0.01
        torch.testing.assert_close(got.double(), wanted, rtol=rough, atol=rough)
    assert [g.dtype for g in found[1:]] == [x.dtype, t.dtype]


def test_a_nan_target_at_zero_probability_is_torchs(device):
    """The derivative by a target of 0 is NaN in torch, the one by the input is not."""
    x = torch.zeros(3, device=device, requires_grad=True)
    t = torch.tensor([0.0, -1.0, 0.5], device=device, requires_grad=True)
    found = [(f(x, t, reduction="none"), x, t) for f in (FF.kl_div, F.kl_div)]
    ours, torchs = ((y, *torch.autograd.grad(y.sum(), (x, t))) for y, x, t in found)
    torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_modules_are_replaced():
    model = nn.ModuleDict({"loss": nn.SmoothL1Loss(beta=0.5), "table": nn.Embedding(5, 3)})
    assert fastdl.optimize(model) is model
    assert type(model["loss"]) is fastdl.nn.SmoothL1Loss
    assert type(model["table"]) is fastdl.nn.Embedding
    assert type(fastdl.restore(model)["loss"]) is nn.SmoothL1Loss


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate"])
def test_pooling_and_interpolation_are_torchs(name):
    assert getattr(FF, name) is getattr(F, name)
