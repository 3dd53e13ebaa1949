"""Whatever users do to a model, before optimize or after it, does what it does without."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastdl


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return x + self.act(self.fc(self.norm(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def mlp():
    return nn.Sequential(
        nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU()
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Kind(NamedTuple):
    """A model, the shape of its input, and those of its parameters that a change is made to."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]

    def targets(self, model):
        return [(model.get_submodule(path), name) for path, name in self.parameters]


ROWS = (2, 3, 8)
KINDS = {
    "modules": Kind(Modules, ROWS, (("fc", "weight"), ("norm", "weight"))),
    "sequential": Kind(mlp, ROWS, (("0", "weight"), ("3", "weight"))),
    "attention": Kind(
        Attention, ROWS, (("attn", "in_proj_weight"),)
    ),
    "encoder": Kind(
        encoder, ROWS, (("self_attn", "in_proj_weight"), ("linear1", "weight"), ("norm1", "weight"))
    ),
    "lstm": Kind(Recurrent, ROWS, (("rnn", "weight_hh_l0"),)),
    "conv": Kind(convolution, (2, 3, 5, 5), (("0", "weight"), ("1", "weight"))),
}  # fmt: skip

# Changes of a model, as (model, kind) -> model.
CHANGES: dict[str, Callable[[nn.Module, Kind], nn.Module]] = {}
USES: dict[str, Callable] = {}


def change(function):
    """A change of the whole model."""
    CHANGES[function.__name__.strip("_")] = lambda model, kind: function(model)
    return function


def change_each(function):
    """A change of the modules that hold a kind's parameters."""

    def changed(model, kind):
        for module, name in kind.targets(model):
            function(module, name)
        return model

    CHANGES[function.__name__.strip("_")] = changed
    return function


def _is_matrix(module, name):
    return getattr(module, name).dim() > 1


# parametrized, pruned, weight-normed


@change_each
def weight_norm(module, name):
    if _is_matrix(module, name):
        parametrizations.weight_norm(module, name)


@change_each
def weight_norm_of_old(module, name):
    if _is_matrix(module, name):
        nn.utils.weight_norm(module, name)


# In train mode each access of a weight is a step of the power iteration, and torch's modules access
# some of them more often than ours.
@change_each
def spectral_norm(module, name):
    if _is_matrix(module, name):
        parametrizations.spectral_norm(module, name)
    module.eval()


@change_each
def spectral_norm_of_old(module, name):
    if _is_matrix(module, name):
        nn.utils.spectral_norm(module, name)


@change_each
def pruned(module, name):
    prune.random_unstructured(module, name, 0.5)


@change_each
def pruned_for_good(module, name):
    prune.random_unstructured(module, name, 0.5)
    prune.remove(module, name)


# hooks, and forwards of the user's


def _doubled(y):
    return (y[0] * 2, *y[1:]) if isinstance(y, tuple) else y * 2


@change_each
def forward_hook(module, name):
    module.register_forward_hook(lambda m, args, y: _doubled(y))


@change_each
def forward_hook_always(module, name):
    module.register_forward_hook(
        lambda m, args, kwargs, y: _doubled(y), always_call=True, with_kwargs=True
    )


@change_each
def forward_pre_hook(module, name):
    module.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0].sin(), *args[1:]), kwargs), with_kwargs=True
    )


def _doubled_gradients(grads):
    return tuple(None if g is None else g * 2 for g in grads)


@change_each
def backward_hook(module, name):
    module.register_full_backward_hook(lambda m, dx, dy: _doubled_gradients(dx))


@change_each
def backward_pre_hook(module, name):
    module.register_full_backward_pre_hook(lambda m, dy: _doubled_gradients(dy))


@change_each
def tensor_hook(module, name):
    getattr(module, name).register_hook(lambda dw: dw * 2)


@change_each
def state_dict_hooks(module, name):
    module.register_state_dict_post_hook(
        lambda m, state, prefix, _: state.update({f"{prefix}extra": torch.ones(1)})
    )
    module.register_load_state_dict_pre_hook(
        lambda m, state, prefix, *_: state.pop(f"{prefix}extra", None)
    )
    module.load_state_dict(module.state_dict())


@change
def own_forward(model):
    forward = model.forward
    model.forward = lambda x: forward(x).sin()
    return model


@change_each
def own_forward_of_children(module, name):
    forward = module.forward
    module.forward = lambda *args, **kwargs: _doubled(forward(*args, **kwargs))


@change_each
def compiled_children(module, name):
    module.compile(backend="eager")


# parameters


@change_each
def frozen(module, name):
    getattr(module, name).requires_grad_(False)


@change
def all_frozen(model):
    return model.requires_grad_(False)


@change_each
def parameter_replaced(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


@change_each
def tensors_swapped(module, name):
    if not isinstance(module, nn.LSTM):  # it has weak references to its weights
        twin = nn.Parameter(getattr(module, name).detach() * 2)
        torch.utils.swap_tensors(getattr(module, name), twin)


@change_each
def data_replaced(module, name):
    getattr(module, name).data = getattr(module, name).data * 2


@change
def initialised(model):
    def initialise(module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    return model.apply(initialise)


@change
def doubled_state(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    return model


@change
def from_meta(model):
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model


@change
def from_meta_by_assignment(model):
    state = copy.deepcopy(model.state_dict())
    model = model.to("meta")
    model.load_state_dict(state, assign=True)
    return model.train()


@change
def in_float64(model):
    return model.double()


@change
def in_bfloat16(model):
    return model.bfloat16()


@change
def there_and_back(model):
    return model.double().float()


@change
def in_shared_memory(model):
    return model.share_memory()


@change
def in_other_memory_format(model):
    return model.to(memory_format=torch.channels_last)


# copies and wrappers


@change
def copied(model):
    return copy.copy(model)


@change
def deepcopied(model):
    return copy.deepcopy(model)


@change
def pickled(model):
    return pickle.loads(pickle.dumps(model))


@change
def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@change
def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


@change
def data_parallel(model):
    return nn.DataParallel(model)


@change
def compiled(model):
    return torch.compile(model, backend="eager")


@change
def compiled_with_autograd(model):
    return torch.compile(model, backend="aot_eager")


@change
def evaluated(model):
    return model.eval()


@change
def toggled(model):
    return model.eval().train()


@change
def batch_norm_for_many(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@change
def scripted(model):
    return torch.jit.script(model)


def _traced(model, kind):
    return torch.jit.trace(model, torch.randn(kind.shape))


CHANGES["traced"] = _traced


def _fused_by_torch(model, kind):
    if kind.make is not convolution:
        return model
    conv, norm, act = model.eval()
    return nn.Sequential(nn.utils.fuse_conv_bn_eval(conv, norm), act)


CHANGES["fused_by_torch"] = _fused_by_torch


# the matrix


def results(model, x):
    """Output, gradients and buffers of a run."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = x.to(dtype, copy=True).requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape))
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d {name}"] = parameter.grad
    model.zero_grad()
    return found | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def assert_close(found, expected):
    # in bfloat16 torch's own parts are rounded between them
    wide = {"rtol": 0.05, "atol": 0.05} if expected["y"].dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **wide or {"rtol": 1e-4, "atol": 1e-5})


def inside(model):
    """All that a module has beside its class."""
    return [(name, vars(module)) for name, module in model.named_modules()]


@pytest.fixture(params=["definition", pytest.param("fused", marks=pytest.mark.slow)])
def form(request):
    """The kernels are slow to interpret, and what lies around them is the same for both."""
    with fastdl.policy(request.param):
        yield


def _pairs():
    """Each kind with each change. What takes long to build is quick for one kind only."""
    for kind in KINDS:
        for name in CHANGES:
            long = name.startswith(("compiled", "scripted", "traced")) and kind != "sequential"
            yield pytest.param(kind, name, marks=[pytest.mark.slow] if long else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name"), _pairs())
def test_a_change(kind, name, when, form):
    kind, change = KINDS[kind], CHANGES[name]
    original, x = kind.make(), torch.randn(kind.shape)
    seeded = functools.partial(torch.manual_seed, 1)
    seeded()
    expected = change(copy.deepcopy(original), kind)
    classes = [str(type(module)) for module in expected.modules()]
    wanted = results(expected, x)

    model = copy.deepcopy(original)
    seeded()
    if when == "before":
        model = fastdl.optimize(change(model, kind))
    else:
        model = change(fastdl.optimize(model), kind)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert_close(results(model, x), wanted)

    kept = inside(model)
    for buffer, other in zip(model.buffers(), expected.buffers(), strict=True):
        buffer.data.copy_(other)
    fastdl.restore(model)
    assert [str(type(module)) for module in model.modules()] == classes
    assert all(a[1] is b[1] for a, b in zip(inside(model), kept, strict=True))
    exact = {} if "own_forward" in name else {"rtol": 0, "atol": 0}  # it has kept what it was given
    torch.testing.assert_close(results(model, x), results(expected, x), **exact)
