"""Multi-head attention: torch's results from fused parts."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701

import fastdl
import fastdl.functional as FF
from attention_forms import MASKS, E, H, L, N, S, assert_same, causal, hides, ours, padding, run


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
