"""verify: it finds what is wrong, accepts what is right, and leaves no trace."""

import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fastdl


class Attention(nn.Module):
    """Softmax does not see a constant in all keys: the gradient of their bias is noise."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class LlamaNorm(nn.Module):
    """Computes in float32 whatever it is given."""

    def __init__(self, width=16):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * F.softmax(h.float(), -1, dtype=torch.float32).to(x.dtype)


class Unbiased(nn.Linear):
    """The gradient of the bias is lost."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias.detach())


class Returns(nn.Module):
    """Applies a function to what a linear layer gives."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.fc(x))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


def edited(model, edit):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edit(twin)
    return twin


def become(cls):
    def edit(model):
        model[0].__class__ = cls

    return edit


def test_a_copy_agrees():
    model = mlp()
    proof = fastdl.verify(model, copy.deepcopy(model), torch.randn(5, 8))
    assert proof.ok and proof
    assert list(proof.outputs) == ["output"]
    assert set(proof.gradients) == {*dict(model.named_parameters()), "input [0]"}
    assert proof.outputs["output"].before == proof.outputs["output"].after > 0


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (lambda m: setattr(m[1], "eps", 1e-3), "output"),
        (lambda m: m[0].weight.mul_(1.01), "output"),
        (lambda m: m[3].weight[2, 5].mul_(1.01), "output"),
        (become(Unbiased), "gradient of 0.bias"),
        (lambda m: m[3].bias.requires_grad_(False), "gradient of 3.bias"),
        (lambda m: m[3].bias.fill_(torch.nan), "output"),
        (lambda m: m[3].bias[1].fill_(torch.inf), "output"),
        (lambda m: m[2].register_forward_hook(lambda m, i, o: o.sigmoid()), "output"),
    ],
)
def test_planted_faults_are_found(edit, wrong):
    model = mlp()
    proof = fastdl.verify(model, edited(model, edit), torch.randn(5, 8))
    assert not proof.ok and not proof
    assert not proof.comparisons[wrong].ok
    assert wrong in str(proof) and "differ" in str(proof)


def test_a_small_gradient_must_be_right_too():
    model = mlp()
    proof = fastdl.verify(
        model, edited(model, become(Unbiased)), torch.randn(5, 8), loss=lambda y: y.mean() * 1e-7
    )
    assert [n for n, c in proof.comparisons.items() if not c.ok] == ["gradient of 0.bias"]


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (lambda y: y, lambda y: y[:1], "shape"),
        (lambda y: y, lambda y: y.half(), "dtype"),
        (lambda y: (y, y + 1), lambda y: (y,), "missing"),
        (lambda y: (y,), lambda y: (y, y + 1), "the original has none"),
        (lambda y: {"a": y, "k": y.argmax(-1)}, lambda y: {"a": y, "k": y.argmin(-1)}, "large"),
    ],
)
def test_outputs_are_compared_by_structure(one, other, reason):
    a, b = Returns(one), Returns(other)
    b.load_state_dict(a.state_dict())
    proof = fastdl.verify(a, b, torch.randn(3, 8))
    assert any(reason in (c.reason or "") for c in proof.outputs.values())


def test_nothing_to_compare_is_an_error():
    model = Returns(lambda y: None)
    with pytest.raises(ValueError, match="no tensor"):
        fastdl.verify(model, model, torch.randn(3, 8))


def test_buffers_are_compared():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    x = torch.randn(6, 8)
    assert fastdl.verify(model, copy.deepcopy(model), x).ok
    proof = fastdl.verify(model, edited(model, lambda m: setattr(m[1], "momentum", 0.2)), x)
    failed = {name for name, c in proof.comparisons.items() if not c.ok}
    assert failed == {"buffer 1.running_mean", "buffer 1.running_var"}


def test_nan_of_the_original_is_no_fault():
    model = edited(mlp(), lambda m: m[3].bias[1].fill_(torch.nan))
    assert fastdl.verify(model, copy.deepcopy(model), torch.randn(5, 8)).ok
    healed = edited(model, lambda m: m[3].bias[1].fill_(0.0))
    assert not fastdl.verify(model, healed, torch.randn(5, 8)).ok


def test_the_judge_computes_in_float64():
    model = nn.Sequential(nn.Linear(16, 16), LlamaNorm())
    proof = fastdl.verify(model, model, torch.randn(4, 16))
    assert proof.judge_is_fp64
    # a judge in float32 would find no error in the float32 model
    assert proof.outputs["output"].before > 0
    assert fastdl.verify(model.bfloat16(), model, torch.randn(4, 16).bfloat16()).judge_is_fp64


def test_a_judge_that_is_not_float64_says_so():
    table = np.linspace(0, 1, 8, dtype=np.float32)
    model = Returns(lambda y: y * torch.from_numpy(table).cos())
    proof = fastdl.verify(model, model, torch.randn(3, 8))
    assert not proof.judge_is_fp64
    assert "NOT float64" in str(proof) and "cos" in str(proof)
    assert json.loads(proof.to_json())["judge_is_fp64"] is False


def test_autocast_holds_for_the_models_and_not_for_the_judge():
    model = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        proof = fastdl.verify(model, copy.deepcopy(model), torch.randn(5, 8))
    assert proof.ok and proof.judge_is_fp64
    assert proof.outputs["output"].before > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype, device):
    """Noise where the gradient is zero in theory, and outputs so few that their error is luck."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(Attention(), nn.LayerNorm(16), nn.Linear(16, 1)).to(device, dtype)
        x = torch.randn(1, 6, 16, device=device, dtype=dtype)
        other = fastdl.optimize(copy.deepcopy(model))
        with fastdl.policy("fused", on_fallback="error"):
            proof = fastdl.verify(model, other, x, loss=lambda y: y.square().mean())
        assert proof.ok, str(proof)


def test_the_reference_runs_without_our_kernels(monkeypatch):
    model = fastdl.optimize(mlp())
    forward = fastdl.nn.LayerNorm.forward
    monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", lambda m, x: forward(m, x) * 1.01)
    assert not fastdl.verify(model, model, torch.randn(5, 8)).ok


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "grads": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "rates": [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "modes": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),
        ),
    }


def no_trace_model():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 4)
    )
    model[4].weight.requires_grad_(False)
    model[1].eval()
    model[0].weight.grad = torch.ones(8, 8)
    return model


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_proof_leaves_no_trace(raises, grad):
    model = no_trace_model()
    other = fastdl.optimize(copy.deepcopy(model))
    if raises:
        other[4].forward = lambda x: 1 / 0
    x = torch.randn(6, 8)
    befores = [snapshot(m) for m in (model, other)]
    with torch.set_grad_enabled(grad):
        if raises:
            with pytest.raises(ZeroDivisionError):
                fastdl.verify(model, other, x)
        else:
            assert fastdl.verify(model, other, x).ok
        assert torch.is_grad_enabled() == grad
    for m, before in zip((model, other), befores, strict=True):
        after = snapshot(m)
        for key in before:
            if key in ("state", "grads", "rng"):
                torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
            else:
                assert after[key] == before[key], key
    assert x.grad is None and not x.requires_grad


def test_works_in_inference_mode_and_does_not_change_inputs():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)), torch.randn(5, 8)
    kept = x.clone()
    with torch.inference_mode():
        assert len(fastdl.verify(model, model, x).gradients) == 3
    assert torch.equal(x, kept)


def test_functional_dropout_is_at_zero():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention_dropout = nn.Linear(8, 8), 0.4

        def forward(self, x):
            q = F.dropout(self.fc(x), 0.5, self.training)
            return F.scaled_dot_product_attention(q, q, q, None, self.attention_dropout)

    model = Drops()
    assert fastdl.verify(model, fastdl.optimize(copy.deepcopy(model)), torch.randn(2, 4, 8)).ok


def test_torchs_modules_with_dropout_of_their_own():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    lstm = nn.LSTM(16, 8, num_layers=2, dropout=0.2)
    for model in (layer, lstm):
        assert fastdl.verify(model, copy.deepcopy(model), torch.randn(2, 5, 16)).ok


def test_inputs_as_tuple_dict_and_nested():
    class Two(nn.Module):
        def forward(self, x, pair, scale=1.0):
            return x * pair["y"] * scale

    x, y = torch.randn(3), torch.randn(3)
    model = Two()
    positional = fastdl.verify(model, model, (x, {"y": y}))
    keywords = fastdl.verify(model, model, {"x": x, "pair": {"y": y}, "scale": 2.0})
    assert set(positional.gradients) == {"input [0]", "input [1]['y']"}
    assert set(keywords.gradients) == {"input x", "input pair['y']"}
    # one tensor given twice stays one tensor
    assert set(fastdl.verify(model, model, (x, {"y": x})).gradients) == {"input [0]"}


def test_loss_and_tied_weights():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.randint(0, 10, (2, 5))
    other = fastdl.optimize(copy.deepcopy(model))
    assert other[1].weight is other[0].weight
    proof = fastdl.verify(
        model, other, tokens, loss=lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten())
    )
    assert proof.ok and set(proof.gradients) == {"0.weight"}


def test_pruned_and_sparse():
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8))
    prune.l1_unstructured(model[1], "weight", 0.5)
    assert fastdl.verify(model, model, torch.randint(0, 10, (4,))).ok


def test_a_model_that_cannot_be_copied():
    model = mlp()
    model.lock = (i for i in range(3))
    with pytest.raises(RuntimeError, match="cannot be copied"):
        fastdl.verify(model, model, torch.randn(5, 8))


def test_compiled_models_have_the_names_of_the_original():
    model, x = mlp(), torch.randn(5, 8)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    proof = fastdl.verify(model, compiled, x)
    assert proof.ok and "0.weight" in proof.gradients


def test_proof_as_text_and_json():
    model = mlp()
    proof = fastdl.verify(model, model, torch.randn(5, 8))
    told = json.loads(proof.to_json())
    assert told["ok"] and told["gradients"]["0.bias"]["after"] == proof.gradients["0.bias"].after
    assert "2x" in str(proof) and "float64" in str(proof) and "allowed" in str(proof)
