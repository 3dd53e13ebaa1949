"""Whatever users do to a model, before optimize or after it, does what it does without."""

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.robustness import KINDS, Kind, assert_close, cases, classes, convolution, form, results
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastdl

__all__ = ["form"]  # the fixture

# Changes of a model, as (model, kind) -> model.
CHANGES: dict[str, Callable[[nn.Module, Kind], nn.Module]] = {}


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


def inside(model):
    """Every object that modules hold, and that their dicts of parameters, hooks and so on hold."""
    held = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held[name, key] = id(value)
            if isinstance(value, dict):
                held |= {(name, key, inner): id(kept) for inner, kept in value.items()}
    return held


def _takes_long(kind, name):
    return name.startswith("compiled") or (name in ("scripted", "traced") and kind != "sequential")


PAIRS = itertools.product(KINDS, CHANGES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name", "form"), cases(PAIRS, _takes_long), indirect=["form"])
def test_a_change(kind, name, when, form):
    kind, change = KINDS[kind], CHANGES[name]
    original, x = kind.make(), torch.randn(kind.shape)
    seeded = functools.partial(torch.manual_seed, 1)
    seeded()
    expected = change(copy.deepcopy(original), kind)
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
    assert classes(model) == classes(expected)
    assert inside(model) == kept
    exact = {} if "own_forward" in name else {"rtol": 0, "atol": 0}  # it has kept what it was given
    torch.testing.assert_close(results(model, x), results(expected, x), **exact)
