"""Recurrent networks: every option of torch's modules, their routes, and compiled graphs."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastdl
import fastdl.functional as FF
import fastdl.nn as fnn
from fastdl import tuned
from fastdl.contract.evaluate import floats

STEPS, BATCH, FEATURES, UNITS = 3, 3, 4, 5
FORMS = ("batched", "unbatched", "packed", "unsorted")
TWIN = {nn.LSTM: fnn.LSTM, nn.GRU: fnn.GRU, nn.RNN: fnn.RNN}
CELL = {nn.LSTMCell: fnn.LSTMCell, nn.GRUCell: fnn.GRUCell, nn.RNNCell: fnn.RNNCell}

# Each form and direction of each class, and among these both values of every other option.
CHOICES = [
    (cls, form, {
        "bidirectional": both,
        "num_layers": 1 + (i + both) % 2,
        "bias": i % 4 != 1,
        "batch_first": i % 3 == 0,
        **({"nonlinearity": "relu"} if cls is nn.RNN and i % 4 < 2 else {}),
    }, (i + i // 4) % 2 == 0)
    for i, (both, cls, form) in enumerate(itertools.product((False, True), TWIN, FORMS))
]  # fmt: skip


def twins(cls, device, *args, **options):
    """torch's module and ours in the same state."""
    theirs = cls(*args, **options).to(device)
    ours = {**TWIN, **CELL}[cls](*args, **options).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def example(form, module, with_state, device):
    """An input of this form, with leaves for gradients."""
    shape = (STEPS, FEATURES) if form == "unbatched" else (STEPS, BATCH, FEATURES)
    if module.batch_first and form != "unbatched":
        shape = (BATCH, STEPS, FEATURES)
    leaves = [torch.randn(shape, device=device, requires_grad=True)]
    x, hx = leaves[0], None
    if form in ("packed", "unsorted"):
        lengths = [3, 2, 1] if form == "packed" else [1, 3, 2]
        x = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=form == "packed")
    if with_state:
        count = module.num_layers * (1 + module.bidirectional)
        batch = () if form == "unbatched" else (BATCH,)
        widths = [module.proj_size or module.hidden_size, module.hidden_size]
        states = [
            torch.randn(count, *batch, n, device=device, requires_grad=True)
            for n in widths[: 1 + isinstance(module, nn.LSTM)]
        ]
        leaves += states
        hx = tuple(states) if len(states) == 2 else states[0]
    return x, hx, leaves


def outcome(module, x, hx, leaves):
    """Outputs, states and every gradient."""
    result = module(x, hx)
    outputs = floats(result)
    back = [torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape) for y in outputs]
    return (
        result,
        outputs,
        torch.autograd.grad(outputs, [*leaves, *module.parameters()], back, True),
    )


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def compare(theirs, ours, x, hx, leaves):
    expected, outputs, gradients = outcome(theirs, x, hx, leaves)
    result, *got = outcome(ours, x, hx, leaves)
    same(got, [outputs, gradients])
    if isinstance(x, PackedSequence):
        assert type(result[0]) is PackedSequence
        for a, b in zip(result[0][1:], expected[0][1:], strict=True):
            assert a is b or torch.equal(a, b)


@pytest.mark.parametrize(
    ("cls", "form", "options", "with_state"),
    CHOICES,
    ids=lambda x: getattr(x, "__name__", None) or (x if isinstance(x, str) else ""),
)
def test_as_torch(cls, form, options, with_state, device, fused):
    theirs, ours = twins(cls, device, FEATURES, UNITS, **options)
    compare(theirs, ours, *example(form, theirs, with_state, device))


def test_projection_is_torchs(device):
    for form, both in itertools.product(FORMS, (False, True)):
        options = {"proj_size": 2, "num_layers": 2, "bidirectional": both, "batch_first": both}
        theirs, ours = twins(nn.LSTM, device, FEATURES, UNITS, **options)
        x, *rest = example(form, theirs, True, device)
        compare(theirs, ours, x, *rest)
    with fastdl.policy("fused", on_fallback="error"), pytest.raises(fastdl.FallbackError) as error:
        ours(x)
    assert "torch has this option" in str(error.value)


def test_dropout_lies_between_layers(device, fused):
    theirs, ours = twins(nn.LSTM, device, FEATURES, UNITS, 2, dropout=1.0)
    x, *rest = example("batched", theirs, True, device)
    compare(theirs, ours, x, *rest)
    compare(theirs.eval(), ours.eval(), x, *rest)
    ours = fnn.GRU(FEATURES, UNITS, 2, dropout=0.5).to(device)
    first, second = (ours(x)[0] for _ in range(2))
    assert not torch.equal(first, second)
    same(ours.eval()(x)[0], ours(x)[0])
    alone = fnn.GRU(FEATURES, UNITS, 1).to(device)
    alone.dropout = 0.5
    same(alone(x)[0], alone.eval()(x)[0])


@pytest.mark.parametrize("cls", CELL)
def test_cells(cls, device, fused):
    kinds = ("tanh", "relu") if cls is nn.RNNCell else ("",)
    for bias, batch, state, kind in itertools.product(
        (True, False), ((), (3,)), (True, False), kinds
    ):
        options = {"bias": bias} | ({"nonlinearity": kind} if kind else {})
        theirs, ours = twins(cls, device, FEATURES, UNITS, **options)
        x = torch.randn(*batch, FEATURES, device=device, requires_grad=True)
        states = [torch.randn(*batch, UNITS, device=device, requires_grad=True) for _ in range(2)]
        states = states if cls is nn.LSTMCell else states[:1]
        hx = (tuple(states) if len(states) == 2 else states[0]) if state else None
        compare(theirs, ours, x, hx, [x, *states] if state else [x])


def test_one_bias_of_a_cell(device, fused):
    x, h = torch.randn(3, 4, device=device), torch.randn(3, 5, device=device)
    w, u, b = (torch.randn(*s, device=device) for s in ((15, 4), (15, 5), (15,)))
    same(FF.gru_cell(x, h, w, u, None, b), torch.gru_cell(x, h, w, u, None, b))
    same(FF.gru_cell(x, h, w, u, b), torch.gru_cell(x, h, w, u, b))


def test_bad_cells():
    with pytest.raises(ValueError, match=r"\(1, 2, 4\)"):
        fnn.LSTMCell(4, 5)(torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match=r"hx\[1\] is \(1, 2, 5\)"):
        fnn.LSTMCell(4, 5)(torch.randn(2, 4), (torch.randn(2, 5), torch.randn(1, 2, 5)))
    cell = fnn.RNNCell(4, 5, nonlinearity="sin")
    with pytest.raises(RuntimeError, match="'sin'"):
        cell(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="3 weights"):
        FF.rnn(torch.randn(2, 2, 4), None, list(fnn.RNN(4, 5).parameters())[:3])
    with pytest.raises(ValueError, match="'sin'"):
        FF.rnn(torch.randn(2, 2, 4), None, list(fnn.RNN(4, 5).parameters()), nonlinearity="sin")


def test_torch_runs_until_a_measurement_says_otherwise(device):
    x, module = torch.randn(STEPS, BATCH, FEATURES, device=device), fnn.GRU(FEATURES, UNITS)
    module = module.to(device)

    def reasons():
        decisions = fastdl.explain(module, x).decisions
        return {decision.reason.name for decision in decisions if decision.reason is not None}

    assert reasons() == {"UNMEASURED"}
    sizes = (STEPS, BATCH, UNITS)
    for config in tuned.CANDIDATES["gru"](x.dtype, sizes, tuned.device_of(x)):
        with tuned.forced("gru", x.dtype, sizes, config):
            assert not reasons() and fastdl.explain(module, x).fused
    with tuned.forced("gru", x.dtype, sizes, tuned.Config({}, variant="torch")):
        assert reasons() == {"MEASURED"}
        with fastdl.policy("fused"):
            assert not reasons()


@pytest.mark.parametrize("cls", TWIN)
def test_in_one_graph(cls, device):
    """Under the policy that everybody has, with a module that Dynamo would not enter."""
    aot_autograd = importlib.import_module("torch._dynamo.backends.common").aot_autograd
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(TWIN[cls](FEATURES, UNITS, 2, batch_first=True)).to(device)
    x = torch.randn(BATCH, STEPS, FEATURES, device=device)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y, _ = torch.compile(model, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    same(y, model(x)[0])
    found = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    for op in ("recurrence", "recurrence_backward"):
        assert found.count(f"fastdl.{op}.default") == 2, op


def test_state_of_a_module(device, fused):
    theirs, ours = twins(nn.LSTM, device, FEATURES, UNITS, 2, bidirectional=True)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device)
    expected = ours(x)[0]
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        twin.flatten_parameters()
        same(twin(x)[0], expected)
    doubled = {name: 2 * p for name, p in ours.named_parameters()}
    theirs.load_state_dict(doubled)
    same(torch.func.functional_call(ours, doubled, (x,))[0], theirs(x)[0])
    ours.weight_hh_l0 = nn.Parameter(2 * ours.weight_hh_l0)
    assert not torch.equal(ours(x)[0], expected)


def test_optimizer_swaps_them(device):
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 5), "cell": nn.GRUCell(4, 5)}).to(device)
    assert {site.op for site in fastdl.plan(model)} == {"lstm", "gru_cell"}
    fastdl.optimize(model)
    assert (type(model["lstm"]), type(model["cell"])) == (fnn.LSTM, fnn.GRUCell)
    fastdl.restore(model)
    assert (type(model["lstm"]), type(model["cell"])) == (nn.LSTM, nn.GRUCell)


def test_layer_norm_module(device, fused):
    """Against cells of torch's own modules, unbatched too."""
    module = fnn.LayerNormLSTM(FEATURES, UNITS, batch_first=True, eps=1e-3).to(device)
    assert repr(module) == "LayerNormLSTM(4, 5, batch_first=True, eps=0.001)"
    norms = {
        part: nn.LayerNorm(n, 1e-3).to(device) for part, n in (("ih", 20), ("hh", 20), ("c", 5))
    }
    for part, norm in norms.items():
        for name, own in norm.named_parameters():
            own.data.normal_()
            getattr(module, f"norm_{part}_{name}_l0").data.copy_(own)
    x = torch.randn(BATCH, STEPS, FEATURES, device=device)
    h = c = torch.zeros(BATCH, UNITS, device=device)
    for t in range(STEPS):
        gates = norms["ih"](x[:, t] @ module.weight_ih_l0.t()) + norms["hh"](
            h @ module.weight_hh_l0.t()
        )
        i, f, g, o = gates.chunk(4, -1)
        c = norms["c"](f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
        same(module(x)[0][:, t], h)
    same(module(x)[1], (h[None], c[None]))
    same(module(x[0])[0], module(x)[0][0])
    twin = pickle.loads(pickle.dumps(module))
    same(twin(x)[0], module(x)[0])


module_db = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch ships no sample modules here"
).module_db
INFOS = [info for info in module_db if info.module_cls in {**TWIN, **CELL}]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torchs_samples(info, device):
    def samples(inputs):
        return inputs(info, device=device, dtype=torch.float32, requires_grad=True, training=True)

    assert len(INFOS) == 6
    for sample in samples(info.module_inputs_func):
        made, given = sample.constructor_input, sample.forward_input
        theirs, ours = twins(info.module_cls, device, *made.args, **made.kwargs)
        with fastdl.policy("fused", on_fallback="silent"):
            same(ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs))
    for bad in samples(info.module_error_inputs_func):
        made = bad.module_error_input.constructor_input
        given = bad.module_error_input.forward_input
        with pytest.raises(bad.error_type):
            module = {**TWIN, **CELL}[info.module_cls](*made.args, **made.kwargs).to(device)
            module(*given.args, **given.kwargs)
