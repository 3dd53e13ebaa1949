"""Multi-head attention and transformer layers: torch's results from fused parts."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701

import fastdl
import fastdl.functional as FF

N, H, L, S, E = 3, 2, 5, 7, 8
HIDDEN = -float("inf")


@pytest.fixture(params=["fused", "definition"])
def form(request):
    """The kernels or an error; and plain torch."""
    options = {"on_fallback": "error"} if request.param == "fused" else {}
    with fastdl.policy(request.param, **options):
        yield


def ours(module):
    """A copy on our class, as `optimize` makes it of one module, in the same state."""
    twin = copy.deepcopy(module)
    twin.__class__ = getattr(fastdl.nn, type(module).__name__)
    return twin


def run(module, *inputs, **options):
    """Outputs, and gradients of parameters and inputs. What is one tensor stays one."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    out = module(*(leaves[id(x)] for x in inputs), **options)
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y) for y in outputs]
    wanted = [p for p in (*module.parameters(), *leaves.values()) if p.requires_grad]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(module, other, *inputs, **options):
    torch.testing.assert_close(
        run(module, *inputs, **options), run(other, *inputs, **options), rtol=1e-4, atol=1e-5
    )


def ops_of(call):
    seen = fastdl.explain(call)
    return [decision.op for decision in seen.decisions if decision.stage == "call"]


def hides(*shape, share=0.4):
    """A boolean mask that leaves the first key to everyone."""
    mask = torch.rand(shape) < share
    mask[..., 0] = False
    return mask


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, HIDDEN)


def padding(batch=N, keys=S):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[1, -3:] = mask[2, -1:] = True
    return mask


MASKS = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": padding()},
    "float padding": lambda: {"key_padding_mask": torch.randn(N, S)},
    "mask": lambda: {"attn_mask": hides(L, S)},
    "float mask": lambda: {"attn_mask": torch.randn(L, S)},
    "mask of heads": lambda: {"attn_mask": hides(N * H, L, S)},
    "float mask of heads": lambda: {"attn_mask": torch.randn(N * H, L, S)},
    "both": lambda: {"attn_mask": hides(L, S), "key_padding_mask": padding()},
    "both, float": lambda: {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.randn(N, S)},
    "both, of heads": lambda: {"attn_mask": hides(N * H, L, S), "key_padding_mask": padding()},
    "float padding alone": lambda: {
        "attn_mask": hides(L, S), "key_padding_mask": torch.randn(N, S)
    },
    "float mask alone": lambda: {"attn_mask": torch.randn(L, S), "key_padding_mask": padding()},
    "hint": lambda: {"attn_mask": causal(S)[:L], "is_causal": True},
    "hint, float": lambda: {"attn_mask": as_float(causal(S)[:L]), "is_causal": True},
    "hint and padding": lambda: {
        "attn_mask": causal(S)[:L], "key_padding_mask": padding(), "is_causal": True
    },
    "hint that learns, and padding": lambda: {
        "attn_mask": as_float(causal(S)[:L]).requires_grad_(),
        "key_padding_mask": as_float(padding()),
        "is_causal": True,
    },
}  # fmt: skip


# multi-head attention


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_every_mask(masks, need_weights, form, device):
    theirs = nn.MultiheadAttention(E, H).to(device)
    query, memory = torch.randn(L, N, E, device=device), torch.randn(S, N, E, device=device)
    options = {k: v.to(device) if v is not True else v for k, v in MASKS[masks]().items()}
    assert_same(ours(theirs), theirs, query, memory, memory, need_weights=need_weights, **options)


def test_the_gradient_of_masks(form, device):
    """Of those that torch reads; one that a hint stands for has none."""
    theirs = nn.MultiheadAttention(E, H, batch_first=True).to(device)
    x = torch.randn(N, L, E, device=device)
    mask = torch.randn(L, L, device=device, requires_grad=True)
    keys = torch.randn(N, L, device=device, requires_grad=True)

    def found(module, **options):
        y, _ = module(x, x, x, need_weights=False, attn_mask=mask, **options)
        return torch.autograd.grad(y.square().sum(), [mask, keys], allow_unused=True)

    for options in ({}, {"key_padding_mask": keys}, {"key_padding_mask": keys, "is_causal": True}):
        torch.testing.assert_close(found(ours(theirs), **options), found(theirs, **options))
    assert found(ours(theirs), is_causal=True) == found(theirs, is_causal=True) == (None, None)


OPTIONS = {
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "key of zeros": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own widths": {"kdim": 6, "vdim": 4},
    "own widths, no bias": {"kdim": 6, "bias": False},
}


@pytest.mark.parametrize(
    "batch_first, masks", [(True, "none"), (False, "hint"), (True, "hint and padding")]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(options, batch_first, masks, form, device):
    theirs = nn.MultiheadAttention(E, H, batch_first=batch_first, **OPTIONS[options]).to(device)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    widths, places = (E, theirs.kdim, theirs.vdim), (L, S, S)
    inputs = [
        torch.randn(*((N, n) if batch_first else (n, N)), width, device=device)
        for n, width in zip(places, widths, strict=True)
    ]
    given = {k: v.to(device) if v is not True else v for k, v in MASKS[masks]().items()}
    assert_same(ours(theirs), theirs, *inputs, need_weights=False, **given)
    assert_same(ours(theirs), theirs, *inputs, average_attn_weights=False, **given)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_tensor_or_two_or_three(batch_first, form, device):
    theirs = nn.MultiheadAttention(E, H, batch_first=batch_first).to(device)
    x, y, z = torch.randn(3, N, N, E, device=device).unbind()
    for inputs in ((x, x, x), (x, y, y), (x, y, z), (x, x, y)):
        assert_same(ours(theirs), theirs, *inputs)


def test_without_a_batch(form, device):
    theirs = nn.MultiheadAttention(E, H, batch_first=True).to(device)
    query, memory = torch.randn(L, E, device=device), torch.randn(S, E, device=device)
    for options in (
        {},
        {"need_weights": False, "attn_mask": hides(L, S).to(device)},
        {"attn_mask": hides(H, L, S).to(device), "key_padding_mask": padding()[1].to(device)},
    ):
        assert_same(ours(theirs), theirs, query, memory, memory, **options)


def test_static_keys_and_dropped_weights_are_torchs(device):
    weight, out = torch.randn(3 * E, E, device=device), torch.randn(E, E, device=device)
    x, static = torch.randn(L, N, E, device=device), torch.randn(N * H, S, E // H, device=device)
    fixed = (E, H, weight, None, None, None, False)
    for p, options in ((0.0, {"static_k": static, "static_v": static}), (0.5, {})):
        got, expected = (
            (torch.manual_seed(1), f(x, x, x, *fixed, p, out, None, **options))[1]
            for f in (FF.multi_head_attention_forward, F.multi_head_attention_forward)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        with (
            fastdl.policy("fused", on_fallback="error"),
            pytest.raises(fastdl.FallbackError, match="multi_head_attention"),
        ):
            FF.multi_head_attention_forward(x, x, x, *fixed, p, out, None, **options)


def test_weights_with_dropout_are_torchs(device):
    theirs = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True).to(device)
    x = torch.randn(N, L, E, device=device)
    got, expected = ((torch.manual_seed(1), m(x, x, x))[1] for m in (ours(theirs), theirs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_hint_whose_mask_is_not_read(device):
    theirs = nn.MultiheadAttention(E, H, batch_first=True).to(device)
    x, memory = torch.randn(N, L, E, device=device), torch.randn(N, S, E, device=device)
    options = {"attn_mask": causal(S).to(device), "is_causal": True, "need_weights": False}
    assert_same(ours(theirs), theirs, x, memory, memory, **options)


def test_the_signature_is_torchs():
    def parameters(f):
        found = inspect.signature(f).parameters.values()
        return [(p.name, p.default, p.kind) for p in found]

    assert parameters(FF.multi_head_attention_forward) == parameters(F.multi_head_attention_forward)


BAD = {
    "four dimensions": {"query": torch.ones(1, L, N, E)},
    "dimensions of keys": {"key": torch.ones(L, E)},
    "batches": {"key": torch.ones(L, N + 1, E), "value": torch.ones(L, N + 1, E)},
    "one batch of keys": {"key": torch.ones(L, 1, E), "value": torch.ones(L, 1, E)},
    "lengths": {"value": torch.ones(L + 1, N, E)},
    "width": {"embed_dim_to_check": E + 1},
    "heads": {"num_heads": 3},
    "no weight": {"in_proj_weight": None},
    "size of weight": {"in_proj_weight": torch.ones(2 * E, E)},
    "size of bias": {"in_proj_bias": torch.ones(2 * E)},
    "size of own weight": {
        **{f"{name}_proj_weight": torch.ones(E, E) for name in "qk"},
        "use_separate_proj_weight": True,
        "v_proj_weight": torch.ones(E, 3),
    },
    "half of a learned key": {"bias_k": torch.ones(1, 1, E)},
    "size of the last weight": {"out_proj_weight": torch.ones(E, E + 1)},
    "hint without a mask": {"is_causal": True},
    "size of mask": {"attn_mask": torch.ones(L, L + 1, dtype=torch.bool)},
    "row as mask": {"attn_mask": torch.zeros(1, L)},
    "batch of mask": {"attn_mask": torch.ones(N, L, L, dtype=torch.bool)},
    "integer mask": {"attn_mask": torch.ones(L, L, dtype=torch.int64)},
    "size of padding": {"key_padding_mask": torch.ones(N, L + 1, dtype=torch.bool)},
    "integer padding": {"key_padding_mask": torch.ones(N, L, dtype=torch.int64)},
    "dtypes": {"in_proj_weight": torch.ones(3 * E, E, dtype=torch.float64)},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_errors_are_torchs(bad, need_weights):
    x = torch.ones(L, N, E)
    given = {
        "query": x, "key": x, "value": x, "embed_dim_to_check": E, "num_heads": H,
        "in_proj_weight": torch.ones(3 * E, E), "in_proj_bias": None, "bias_k": None,
        "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0,
        "out_proj_weight": torch.ones(E, E), "out_proj_bias": None, "need_weights": need_weights,
    }  # fmt: skip
    FF.multi_head_attention_forward(**given)
    with pytest.raises(Exception) as expected:
        F.multi_head_attention_forward(**given | BAD[bad])
    with pytest.raises(expected.type):
        FF.multi_head_attention_forward(**given | BAD[bad])


class Recorder(TorchDispatchMode):
    """What the dispatcher runs, with the arguments of attention."""

    def __init__(self):
        super().__init__()
        self.names, self.attention = [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if str(func) == "fastdl.attention.default":
            self.attention = args
        return func(*args, **(kwargs or {}))


VIEWS = (
    "view",
    "_unsafe_view",
    "unbind.int",
    "split_with_sizes",
    "permute",
    "transpose.int",
    "detach",
)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_heads_are_views(same, batch_first, fused, device):
    module = fastdl.nn.MultiheadAttention(E, H, batch_first=batch_first).to(device)
    x, y = torch.randn(2, N, L, E, device=device).unbind()
    memory = x if same else y
    with torch.no_grad(), Recorder() as seen:
        module(x, memory, memory, need_weights=False)
    rest = [n for n in seen.names if n.removeprefix("aten.").removesuffix(".default") not in VIEWS]
    linear = "fastdl.linear.default"
    assert rest == [linear] * (1 if same else 2) + ["fastdl.attention.default", linear]


def test_what_masks_become(fused, device):
    """Padding stays a row of keys, and a hint needs no mask."""
    module = fastdl.nn.MultiheadAttention(E, H, batch_first=True).to(device)
    x, future = torch.randn(N, L, E, device=device), causal(L).to(device)
    keys = padding(N, L).to(device)

    def mask_and_limit(**options):
        with torch.no_grad(), Recorder() as seen:
            module(x, x, x, need_weights=False, **options)
        mask, right = seen.attention[3], seen.attention[14]
        return mask if mask is None else (mask.dtype, tuple(mask.shape)), right

    row, square = (torch.bool, (N, 1, 1, L)), (torch.bool, (1, 1, L, L))
    assert mask_and_limit(key_padding_mask=keys) == (row, -1)
    assert mask_and_limit(key_padding_mask=keys.float()) == ((torch.float32, row[1]), -1)
    assert mask_and_limit(attn_mask=future) == (square, -1)
    assert mask_and_limit(attn_mask=future, key_padding_mask=keys) == (
        (torch.bool, (N, 1, L, L)),
        -1,
    )
    assert mask_and_limit(attn_mask=future, is_causal=True) == (None, 0)
    assert mask_and_limit(attn_mask=future, key_padding_mask=keys, is_causal=True) == (row, 0)


def test_a_query_that_sees_nothing_gets_zero(form, device):
    module = ours(nn.MultiheadAttention(E, H, batch_first=True)).to(device)
    x, keys = torch.randn(2, L, E, device=device), torch.zeros(2, L, device=device).bool()
    keys[1] = True
    outputs, gradients = run(module, x, x, x, need_weights=False, key_padding_mask=keys)
    assert (outputs[0][1] == module.out_proj.bias).all() and outputs[0].isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_dropped_weights_keep_nothing(fused, device):
    module = fastdl.nn.MultiheadAttention(E, H).to(device)
    x = torch.randn(L, N, E, device=device)
    y, _ = module(x, x, x)
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [n for n, _ in node.next_functions]
    names = {node.name() for node in nodes}
    assert any("AttentionFunction" in name for name in names)
    assert not any("Softmax" in name for name in names)


def test_autocast(device):
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=True).to(device)
    x, mask = torch.randn(L, N, E, device=device), torch.randn(L, L, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for options in ({"need_weights": False}, {"attn_mask": mask}):
            expected, got = theirs(x, x, x, **options), ours(theirs)(x, x, x, **options)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


# layers


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


@pytest.mark.parametrize("masks", LAYER_MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
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


@pytest.mark.parametrize("change", [_hook, _pre_hook, _own_forward, _wrap, _parametrize])
@pytest.mark.parametrize("make, name", CHILDREN)
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
    "masks, training", [("none", True), ("padding", False), ("both", True), ("float", False)]
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
