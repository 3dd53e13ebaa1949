"""torch's own sample inputs for its functions: same values, gradients and errors."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastdl.functional as FF

op_db = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="torch ships no sample inputs here"
).op_db


def ours(name):
    """Our function of torch's name, unless it is torch's own."""
    name = name.removeprefix("nn.functional.")
    found = getattr(FF, name, None)
    return None if found is getattr(F, name, None) else found


OURS = {info.name: ours(info.name) for info in op_db if ours(info.name)}
# torch's samples have the table first
OURS["nn.functional.embedding"] = lambda weight, ids, **given: FF.embedding(ids, weight, **given)
INFOS = [info for info in op_db if info.name in OURS and not info.variant_test_name]


def leaves(sample):
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def outcome(function, sample):
    torch.manual_seed(0)
    result = function(sample.input, *sample.args, **sample.kwargs)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    if not outputs[0].requires_grad:
        return outputs
    return [*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), leaves(sample))]


def in_float64(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def test_all_are_there():
    assert len(INFOS) == len(OURS) > 40


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_samples(info, device):
    for sample in info.sample_inputs(device, torch.float32, requires_grad=True):
        given = inspect.signature(OURS[info.name]).bind(sample.input, *sample.args, **sample.kwargs)
        drops = "dropout" in info.name or given.arguments.get("dropout_p")
        if given.arguments.get("inplace") or drops:
            continue  # one writes into its input, the other draws other numbers: test_dropout.py
        truth = outcome(info.op, sample.transform(in_float64))
        mine, theirs = outcome(OURS[info.name], sample), outcome(info.op, sample)
        assert len(mine) == len(truth)
        for a, b, expected in zip(mine, theirs, truth, strict=True):
            off = (b - expected).abs().max().item() if b.numel() else 0.0
            near = {"rtol": 1e-4, "atol": 1e-5 + 3 * off}
            torch.testing.assert_close(a, expected, **near, check_dtype=False)


@pytest.mark.parametrize(
    "info", [info for info in INFOS if info.error_inputs_func], ids=lambda info: info.name
)
def test_error_samples(info, device):
    for bad in info.error_inputs(device):
        sample = bad.sample_input
        with pytest.raises(bad.error_type):
            OURS[info.name](sample.input, *sample.args, **sample.kwargs)


def test_layer_norm_of_integers_fails_as_in_torch(device):
    x = torch.ones(2, 4, dtype=torch.long, device=device)
    for layer_norm in (F.layer_norm, FF.layer_norm):
        with pytest.raises(RuntimeError):
            layer_norm(x, (4,))
