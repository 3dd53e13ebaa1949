"""Transformer layers and what is made of them: torch's results from fused parts."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import fastdl
import fastdl.functional as FF
from attention_forms import (
    E,
    H,
    L,
    N,
    S,
    as_float,
    assert_same,
    causal,
    hides,
    ops_of,
    ours,
    padding,
)


def encoder_layer(**options):
    layer = nn.TransformerEncoderLayer(E, H, 16, **{"dropout": 0.0} | options)
    return with_random_vectors(layer)


def decoder_layer(**options):
    layer = nn.TransformerDecoderLayer(E, H, 16, **{"dropout": 0.0} | options)
    return with_random_vectors(layer)


def with_random_vectors(module):
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return module


LAYER_MASKS = {
    "none": dict,
    "padding": lambda: {"src_key_padding_mask": padding(N, L)},
    "causal": lambda: {"src_mask": causal(L), "is_causal": True},
    "both": lambda: {"src_mask": causal(L), "src_key_padding_mask": padding(N, L)},
    "both, float": lambda: {
        "src_mask": as_float(causal(L)), "src_key_padding_mask": as_float(padding(N, L)),
        "is_causal": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("batch_first", "masks"),
    [
        pytest.param(first, masks, marks=[] if first or masks == "both" else pytest.mark.slow)
        for first in (False, True)
        for masks in LAYER_MASKS
    ],
)
def test_an_encoder_layer(batch_first, norm_first, masks, form, device):
    theirs = encoder_layer(batch_first=batch_first, norm_first=norm_first).to(device)
    x = torch.randn(*((N, L) if batch_first else (L, N)), E, device=device)
    given = {k: v.to(device) if v is not True else v for k, v in LAYER_MASKS[masks]().items()}
    assert_same(ours(theirs), theirs, x, **given)
    with torch.no_grad():  # torch has a fast path for this
        expected = theirs.eval()(x, **given)
        torch.testing.assert_close(ours(theirs)(x, **given), expected, rtol=1e-4, atol=1e-5)


class Twice(nn.GELU):
    def forward(self, x):
        return super().forward(x) * 2


ACTIVATIONS = {
    "name": "gelu", "torch's": torch.relu, "functional": F.silu, "module": nn.GELU("tanh"),
    "parameters": nn.LeakyReLU(0.3), "ours": FF.relu2, "unknown": lambda x: x.sin(),
    "derived": Twice(),
}  # fmt: skip
CALLED = ("unknown", "derived")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, fused, device):
    theirs = encoder_layer(activation=ACTIVATIONS[activation], bias=False).to(device)
    x = torch.randn(L, N, E, device=device)
    if activation not in CALLED:
        layer = ours(theirs)
        attention = ["linear", "attention", "linear", "layer_norm"]
        assert ops_of(lambda: layer(x)) == [*attention, "linear", "linear", "layer_norm"]
    assert_same(ours(theirs), theirs, x)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_layer(norm_first, form, device):
    theirs = decoder_layer(batch_first=True, norm_first=norm_first).to(device)
    x, memory = torch.randn(N, L, E, device=device), torch.randn(N, S, E, device=device)
    masks = {
        "tgt_mask": causal(L).to(device), "tgt_is_causal": True,
        "memory_mask": hides(L, S).to(device),
        "tgt_key_padding_mask": padding(N, L).to(device),
        "memory_key_padding_mask": padding().to(device),
    }  # fmt: skip
    assert_same(ours(theirs), theirs, x, memory)
    assert_same(ours(theirs), theirs, x, memory, **masks)


@pytest.mark.parametrize("make", [encoder_layer, decoder_layer])
def test_dropouts_follow_their_modules(make, fused, device):
    theirs = make(norm_first=True).to(device)
    x = torch.randn(L, N, E, device=device)
    inputs = (x,) if make is encoder_layer else (x, x)
    names = [name for name, child in theirs.named_children() if isinstance(child, nn.Dropout)]
    layer = ours(theirs)
    for name in names:
        theirs.get_submodule(name).p = layer.get_submodule(name).p = 1.0
        torch.testing.assert_close(layer(*inputs), theirs(*inputs))
        torch.testing.assert_close(layer.eval()(*inputs), theirs.eval()(*inputs))
        theirs.train().get_submodule(name).p = layer.train().get_submodule(name).p = 0.0
    whole = layer(*inputs)
    layer.get_submodule(names[-1]).p = 0.5
    assert 0.3 < (layer(*inputs) != whole).float().mean() <= 1.0
    layer.get_submodule(names[-1]).p, layer.self_attn.dropout = 0.0, 0.5
    assert not torch.allclose(layer(*inputs), whole)
    assert torch.equal(layer.eval()(*inputs), whole)


def _hook(layer, name):
    layer.get_submodule(name).register_forward_hook(
        lambda m, args, y: (y[0] * 2, None) if isinstance(y, tuple) else y * 2
    )


def _pre_hook(layer, name):
    layer.get_submodule(name).register_forward_pre_hook(
        lambda m, args: tuple(x.sin() for x in args)
    )


def _own_forward(layer, name):
    child = layer.get_submodule(name)
    forward = child.forward

    def doubled(*args, **options):
        y = forward(*args, **options)
        return (y[0] * 2, None) if isinstance(y, tuple) else y * 2

    child.forward = doubled


class Doubled(nn.Module):
    """A wrapper, as PEFT's are."""

    batch_first = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        y = self.inner(*args, **options)
        return (y[0] * 2, None) if isinstance(y, tuple) else y * 2


def _wrap(layer, name):
    setattr(layer, name, Doubled(layer.get_submodule(name)))


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def _parametrize(layer, name):
    child = layer.get_submodule(name)
    for weight, _ in list(child.named_parameters(recurse=False)):
        parametrize.register_parametrization(child, weight, Negated())


CHILDREN = [
    *((encoder_layer, name) for name in (
        "self_attn", "linear1", "activation", "dropout", "linear2", "norm1", "norm2", "dropout1",
        "dropout2",
    )),
    *((decoder_layer, name) for name in ("self_attn", "multihead_attn", "linear2", "dropout3")),
]  # fmt: skip


CHANGES = [_hook, _pre_hook, _own_forward, _wrap, _parametrize]


def changed_children():
    """Each child in quick tests once, each change several times; the others are slow."""
    for i, (make, name) in enumerate(CHILDREN):
        for j, change in enumerate(CHANGES):
            marks = pytest.mark.slow if (i + j) % len(CHANGES) else []
            yield pytest.param(make, name, change, marks=marks)


@pytest.mark.parametrize(("make", "name", "change"), list(changed_children()))
def test_a_changed_child_is_called(make, name, change, device):
    # copies of torch's decoder layer lose an activation that is a module
    activation = nn.GELU() if make is encoder_layer else "gelu"
    theirs = make(batch_first=True, activation=activation).to(device)
    x = torch.randn(N, L, E, device=device)
    inputs = (x,) if make is encoder_layer else (x, torch.randn(N, S, E, device=device))
    before = theirs(*inputs)
    swapped = fastdl.optimize(copy.deepcopy(theirs))
    change(swapped, name)
    change(theirs, name)
    if change is not _parametrize or list(theirs.get_submodule(name).parameters()):
        assert not torch.allclose(theirs(*inputs), before, atol=1e-3)
    for layer in (ours(theirs), swapped):
        torch.testing.assert_close(layer(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)


def test_global_hooks_see_every_child(device):
    layer, seen = ours(encoder_layer(activation=nn.GELU())).to(device), []
    with nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m)):
        layer(torch.randn(L, N, E, device=device))
    assert {id(m) for m in seen} == {id(m) for m in (layer, *layer.children())}


@pytest.mark.parametrize("child", [nn.MultiheadAttention, nn.Linear, nn.LayerNorm])
def test_a_patched_class_is_called(child, monkeypatch, device):
    theirs, forward = encoder_layer().to(device), child.forward

    def patched(self, *args, **options):
        y = forward(self, *args, **options)
        return (y[0] * 2, None) if isinstance(y, tuple) else y * 2

    monkeypatch.setattr(child, "forward", patched)
    x = torch.randn(L, N, E, device=device)
    torch.testing.assert_close(ours(theirs)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_replaced_blocks_are_called(device):
    class Ours(fastdl.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x.sin()

    theirs, x = encoder_layer().to(device), torch.randn(L, N, E, device=device)
    derived, patched = ours(theirs), ours(theirs)
    derived.__class__ = Ours
    for layer in (patched, theirs):
        layer._ff_block = torch.sin
    for layer in (derived, patched):
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-5)


MODULES = {
    "MultiheadAttention": lambda home: home.MultiheadAttention(E, H, dropout=0.1, kdim=6),
    "TransformerEncoderLayer": lambda home: home.TransformerEncoderLayer(E, H, 16, norm_first=True),
    "TransformerDecoderLayer": lambda home: home.TransformerDecoderLayer(E, H, 16, bias=False),
}


@pytest.mark.parametrize("name", MODULES)
def test_state_and_copies(name):
    module, theirs = MODULES[name](fastdl.nn), MODULES[name](nn)
    assert repr(module) == repr(theirs)
    assert inspect.signature(type(module)) == inspect.signature(type(theirs))
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(L, N, E)
    inputs = {1: (x,), 2: (x, x), 3: (x, torch.randn(L, N, 6), x)}
    inputs = inputs[{"M": 3, "E": 1, "D": 2}[name.removeprefix("Transformer")[0]]]
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and list(twin.state_dict()) == list(theirs.state_dict())
        assert_same(twin.eval(), theirs.eval(), *inputs)


@pytest.mark.parametrize("norm_first", [False, True])
def test_compiles_in_one_graph(norm_first, device):
    layer = ours(encoder_layer(batch_first=True, norm_first=norm_first)).to(device)
    x, keys = torch.randn(N, L, E, device=device), padding(N, L).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({}, {"src_key_padding_mask": keys}):
        torch.testing.assert_close(compiled(x, **options), layer(x, **options))


def test_attention_compiles_in_one_graph(device):
    module = ours(nn.MultiheadAttention(E, H, batch_first=True)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(N, L, E, device=device)
    torch.testing.assert_close(compiled(x, x, x), module(x, x, x))


# models


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.parametrize("masks", ["padding", "both", "causal"])
def test_an_encoder(masks, enable_nested_tensor, training, device):
    theirs = nn.TransformerEncoder(
        encoder_layer(batch_first=True), 2, nn.LayerNorm(E), enable_nested_tensor
    ).to(device)
    model = fastdl.optimize(copy.deepcopy(theirs.train(training)))
    x, future, keys = torch.randn(N, L, E), causal(L), padding(N, L)
    options = {"causal": {"mask": future}, "padding": {"src_key_padding_mask": keys}}
    options["both"] = options["causal"] | options["padding"]
    given = {k: v.to(device) for k, v in options[masks].items()}
    assert_same(model, theirs, x.to(device), **given)
    with torch.no_grad():  # here torch may turn padded batches into nested tensors
        torch.testing.assert_close(
            model(x.to(device), **given), theirs(x.to(device), **given), rtol=1e-4, atol=1e-5
        )


def test_nested_tensors_are_torchs(device):
    theirs = encoder_layer(batch_first=True).to(device).eval()
    rows = [torch.randn(n, E, device=device) for n in (L, 2)]
    x = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        for got, expected in zip(ours(theirs)(x).unbind(), theirs(x).unbind(), strict=True):
            assert torch.equal(got, expected)
        attention, other = theirs.self_attn, ours(theirs.self_attn)
        got, expected = (m(x, x, x, need_weights=False)[0] for m in (other, attention))
        assert torch.equal(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
        with fastdl.policy(on_fallback="error"), pytest.raises(fastdl.FallbackError):
            ours(theirs)(x)


def sites(model):
    return {(site.name, site.op) for site in fastdl.report(model).replaced}


@pytest.mark.parametrize(
    "masks, training",
    [
        pytest.param("none", True, marks=pytest.mark.slow),
        ("padding", False),
        pytest.param("both", True, marks=pytest.mark.slow),
        pytest.param("float", False, marks=pytest.mark.slow),
    ],
)
def test_optimize_an_encoder(masks, training, device):
    theirs = nn.TransformerEncoder(
        encoder_layer(batch_first=True, dropout=0.1), 1, enable_nested_tensor=False
    ).to(device)
    x, keys = torch.randn(N, L, E, device=device), padding(N, L).to(device)
    inputs = {"src": x}
    if masks in ("padding", "both"):
        inputs["src_key_padding_mask"] = keys
    if masks == "both":
        inputs["mask"] = causal(L).to(device)
    if masks == "float":
        inputs |= {
            "src_key_padding_mask": as_float(keys.cpu()).to(device),
            "mask": nn.Transformer.generate_square_subsequent_mask(L, device=device),
        }
    model = fastdl.optimize(copy.deepcopy(theirs).train(training), inputs, strict=True)
    report = fastdl.report(model)
    assert report.proof.ok and not report.rolled_back and not report.skipped
    assert ("layers.0", "transformer_encoder_layer") in sites(model)
    assert ("layers.0.self_attn", "multi_head_attention_forward") in sites(model)
    assert all(site.route == "fused" for site in report.replaced if "drop" not in site.name)
    before = model.eval()(**inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.layers[0]) is fastdl.nn.TransformerEncoderLayer
        torch.testing.assert_close(twin(**inputs), before)
    fastdl.restore(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in theirs.modules()}


def test_swapped_children_cost_nothing(fused, device):
    """A layer runs as many ops whether its children are torch's or ours."""
    theirs, x = encoder_layer(activation=nn.ReLU()).to(device), torch.randn(L, N, E, device=device)
    alone, all_of_it = ours(theirs), fastdl.optimize(copy.deepcopy(theirs))
    assert type(all_of_it.linear1) is fastdl.nn.Linear is not type(alone.linear1)
    assert ops_of(lambda: alone(x)) == ops_of(lambda: all_of_it(x))
    assert len(ops_of(lambda: alone(x))) == 7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_optimize_a_transformer(device):
    theirs = nn.Transformer(E, H, 1, 1, 16, batch_first=True, norm_first=True).to(device)
    inputs = {
        "src": torch.randn(N, S, E, device=device), "tgt": torch.randn(N, L, E, device=device),
        "tgt_mask": causal(L).to(device), "src_key_padding_mask": padding().to(device),
        "memory_key_padding_mask": padding().to(device),
    }  # fmt: skip
    model = fastdl.optimize(copy.deepcopy(theirs), inputs, strict=True)
    assert ("decoder.layers.0", "transformer_decoder_layer") in sites(model)
    assert fastdl.report(model).proof.ok and not fastdl.report(model).rolled_back
    assert fastdl.verify(theirs, model, inputs).ok


@pytest.mark.parametrize("batch_first", [False, True])
def test_optimize_a_model_with_attention(batch_first, device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
            self.head = nn.Linear(E, 3)

        def forward(self, x):
            y, weights = self.attention(x, x, x)
            return self.head(y), weights

    theirs, x = Model().to(device), torch.randn(N, L, E, device=device)
    model = fastdl.optimize(copy.deepcopy(theirs), x, strict=True)
    assert sites(model) == {("attention", "multi_head_attention_forward"), ("head", "linear")}
    assert [site.route for site in fastdl.report(model).replaced] == ["fused", "fused"]
    assert_same(model, theirs, x)
