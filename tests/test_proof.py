"""Proof of whole models: wrong rules are found, named and rolled back, and no trace is left."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
from fastdl.optimize import rules

WIDTH = 8
X = (2, 6, WIDTH)


@pytest.fixture(autouse=True)
def _no_kernels():
    """What is planted is wrong without them, and the interpreter is slow."""
    with fastdl.policy("definition"):
        yield


class Attention(nn.Module):
    def __init__(self, keep=True):
        super().__init__()
        self.qkv, self.proj, self.keep = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), keep

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        mask = mask if self.keep else ~mask | torch.eye(x.shape[1]).bool()
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return self.attention(x, x, x, attn_mask=later, need_weights=False)[0]


class Decoder(nn.Module):
    """Its modules are listed in another order than they are called."""

    def __init__(self, layers=6):
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.final, self.masked = nn.LayerNorm(WIDTH), Masked()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.masked(self.final(x)))


class Detached(nn.LayerNorm):
    """The gradient of its weight is a little off; what it gives is exact."""

    def forward(self, x):
        scale = self.weight + 0.01 * (self.weight - self.weight.detach())
        return F.layer_norm(x, self.normalized_shape, scale, self.bias, self.eps)


def changed(model, edit):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edit(twin)
    return twin


def become(path, cls):
    return lambda model: setattr(model.get_submodule(path), "__class__", cls)


def put(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


class Swapped(nn.Module):
    """Calls the same modules, and subtracts where it should add."""

    def forward(self, x):
        x = x - self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# the first module to differ


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        (put("blocks.4.norm2", "eps", 1e-3), "blocks.4.norm2"),
        (put("blocks.2.mlp.0", "bias", None), "blocks.2.mlp.0"),
        (put("blocks.3.attention", "keep", False), "blocks.3.attention"),
        (lambda m: m.blocks[1].mlp[2].weight[0, 0].add_(1), "blocks.1.mlp.2"),
        (become("blocks.3", Swapped), "blocks.3"),
        (put("blocks.5.mlp", "1", nn.ReLU()), "blocks.5.mlp.1"),
        (put("", "head", nn.Linear(WIDTH, WIDTH, bias=False)), "head"),
        (become("blocks.3.norm1", Detached), "blocks.3.norm1"),
        (lambda m: m.final.weight.requires_grad_(False), "final"),
        (lambda m: m.register_forward_hook(lambda m, i, o: 2 * o), ""),
    ],
)
def test_the_first_module_to_differ_is_named(edit, first):
    model = Decoder()
    proof = fastdl.verify(model, changed(model, edit), torch.randn(X))
    assert not proof.ok and proof.first == first
    assert f"first to differ: {first or '(the model itself)'}" in str(proof)
    assert proof.as_dict()["first"] == first


def test_of_several_the_first_called_and_in_backward_the_last():
    model, x = Decoder(), torch.randn(X)

    def both(edit):
        return lambda m: (edit("blocks.1.norm2")(m), edit("final")(m))

    forward = changed(model, both(lambda path: put(path, "eps", 1e-3)))
    assert fastdl.verify(model, forward, x).first == "blocks.1.norm2"
    backward = changed(model, both(lambda path: become(path, Detached)))
    assert fastdl.verify(model, backward, x).first == "final"
    assert fastdl.verify(model, copy.deepcopy(model), x).first is None


@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_mixed_are_not_blamed():
    model = nn.Sequential(
        torch.jit.script(nn.Linear(WIDTH, WIDTH)), Block(), torch.compile(Block(), backend="eager")
    )
    x = torch.randn(X)
    other = changed(model, put("1.norm2", "eps", 1e-3))
    proof = fastdl.verify(model, other, x)
    assert proof.first == "1.norm2" and "0.weight" in proof.gradients
    other = changed(model, put("2._orig_mod.norm2", "eps", 1e-3))
    assert fastdl.verify(model, other, x).first == "2._orig_mod.norm2"
    other = changed(model, lambda m: m[0].weight.mul_(2))
    assert fastdl.verify(model, other, x).first == ""


def test_models_with_other_names_have_no_first():
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = Decoder(layers=1)
    proof = fastdl.verify(model, Other(copy.deepcopy(model)), torch.randn(X))
    assert not proof.ok and proof.first is None and "first" not in str(proof)


# wrong rules


class OtherEps(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-3)


class NoBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Transposed(nn.Linear):
    def forward(self, x):
        square = self.in_features == self.out_features
        return F.linear(x, self.weight.T if square else self.weight, self.bias)


class OtherForm(nn.GELU):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class InvertedMask(nn.MultiheadAttention):
    def forward(self, query, key, value, attn_mask, **options):
        attn_mask = ~attn_mask & ~torch.eye(len(attn_mask), dtype=torch.bool)
        return super().forward(query, key, value, attn_mask=attn_mask, **options)


class WrongInBfloat16(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y * 1.03 if y.dtype == torch.bfloat16 else y


class HalfTheDropout(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p / 2, self.training)


BLOCKS = range(2)
NORMS = {*(f"blocks.{i}.norm{j}" for i in BLOCKS for j in (1, 2)), "final"}
LINEARS = {f"blocks.{i}.{name}" for i in BLOCKS for name in ("attention.qkv", "attention.proj")}
PLANTED = [
    (nn.LayerNorm, OtherEps, NORMS, "blocks.0.norm1"),
    (nn.LayerNorm, Detached, NORMS, "final"),
    (nn.Linear, NoBias, LINEARS | {"blocks.0.mlp.0"}, "blocks.0.attention.qkv"),
    (nn.Linear, Transposed, {"blocks.1.attention.proj", "head"}, "blocks.0.attention.proj"),
    (nn.GELU, OtherForm, {"blocks.0.mlp.1", "blocks.1.mlp.1"}, "blocks.0.mlp.1"),
    (nn.MultiheadAttention, InvertedMask, {"masked.attention"}, "masked.attention"),
    (nn.Linear, WrongInBfloat16, LINEARS | {"head"}, "blocks.0.attention.qkv"),
    (nn.Dropout, HalfTheDropout, {"blocks.0.mlp.3", "blocks.1.mlp.3"}, None),
]


@pytest.fixture
def plant(monkeypatch):
    """Puts a wrong class into the rules."""

    def put(torchs, wrong):
        monkeypatch.setitem(rules.RULES, torchs, wrong)
        monkeypatch.setitem(rules.ORIGINALS, wrong, torchs)

    return put


@pytest.mark.parametrize(("torchs", "wrong", "sites", "first"), PLANTED)
def test_a_wrong_rule_is_found_and_rolled_back(plant, torchs, wrong, sites, first):
    dtype = torch.bfloat16 if wrong is WrongInBfloat16 else torch.float32
    model, x = Decoder(layers=len(BLOCKS)).to(dtype), torch.randn(8, *X[1:]).to(dtype)
    plant(torchs, wrong)
    if first is not None:  # dropout is at 0 when models are compared
        proof = fastdl.verify(model, fastdl.optimize(copy.deepcopy(model)), x)
        assert not proof.ok and proof.first == first
    report = fastdl.report(fastdl.optimize(model, x))
    assert report.proof.ok and sites <= {site.name for site in report.rolled_back}
    assert not any(isinstance(model.get_submodule(name), wrong) for name in sites)
    assert any(rules.is_ours(module) for module in model.modules())


# faults that no site shows alone


class WrongLater(nn.Linear):
    """Right at its first call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1.0 if self.calls == 1 else 1.01)


class WritesInput(nn.ReLU):
    def forward(self, x):
        y = F.relu(x)
        x.data.mul_(1.01)
        return y


class Loop(nn.Module):
    """Two layers, each of which is called again and again, and an activation beside its input."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.ReLU()

    def forward(self, x):
        for _ in range(3):
            x = self.two(self.one(x)).tanh()
        return x + self.act(x) + self.norm(x)


@pytest.mark.parametrize(
    ("torchs", "wrong", "sites"),
    [(nn.Linear, WrongLater, ["one", "two"]), (nn.ReLU, WritesInput, ["act"])],
)
def test_what_no_replay_sees_is_found_by_bisection(plant, torchs, wrong, sites):
    model, x = Loop(), torch.randn(X)
    plant(torchs, wrong)
    assert all(site.reason is None for site in fastdl.plan(model, x))
    assert fastdl.verify(model, fastdl.optimize(copy.deepcopy(model)), x).first == sites[0]
    report = fastdl.report(fastdl.optimize(model, x))
    assert [site.name for site in report.rolled_back] == sites
    for site in report.rolled_back:
        assert "with it the whole model fails: output: the error is too large" in site.reason
        assert site.before < 1e-5 < 1e-3 < site.after
    assert type(model.norm) is fastdl.nn.LayerNorm and report.proof.ok


def test_a_site_that_raises_in_the_whole_model_is_rolled_back(plant):
    class RaisesLater(WrongLater):
        def forward(self, x):
            return super().forward(x) if self.calls == 0 else self.missing

    plant(nn.Linear, RaisesLater)
    model = Loop()
    report = fastdl.report(fastdl.optimize(model, torch.randn(X)))
    assert [site.name for site in report.rolled_back] == ["one", "two"]
    assert "AttributeError" in report.rolled_back[0].reason and report.proof.ok


def test_a_model_that_raises_by_itself_says_so(plant):
    plant(nn.Linear, WrongLater)
    model = Loop()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastdl.optimize(model, torch.randn(X))
    assert type(model.one) is nn.Linear


# models of other libraries


def llama(name="Llama", **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config), tokens()


def gemma2():
    return llama("Gemma2", head_dim=8, sliding_window=4)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), tokens()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config), tokens()


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16))


def tokens():
    return {name: torch.randint(0, 64, (2, 7)) for name in ("input_ids", "labels")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "layer", "epsilon"),
    [
        (llama, "model.layers.1.post_attention_layernorm", "variance_epsilon"),
        (gemma2, "model.layers.0.pre_feedforward_layernorm", "eps"),
        (t5, "decoder.block.1.layer.1.layer_norm", "variance_epsilon"),
        (gpt2, "transformer.h.1.ln_2", "eps"),
        (unet, "down_blocks.1.resnets.0.norm2", "eps"),
    ],
)
def test_models_of_other_libraries(make, layer, epsilon, dtype):
    model, inputs = make()
    model = model.to(dtype)
    if isinstance(inputs, tuple):
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    proof = fastdl.verify(model, copy.deepcopy(model), inputs)
    assert proof.ok and proof.judge_is_fp64, str(proof)
    other = copy.deepcopy(model)
    setattr(other.get_submodule(layer), epsilon, 1.0)
    proof = fastdl.verify(model, other, inputs)
    assert not proof.ok and proof.first == layer
