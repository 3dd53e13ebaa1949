"""The graph engine: what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from graph_forms import Compiled, check_same, only_fused, tensors

# What must be left alone. Each function goes wrong if its rule is missing.

W = torch.randn(8, 8)


def write_to_input(x):
    h = F.linear(x, W)
    x.add_(1)
    return F.gelu(h)


def write_to_view(x):
    h, view = F.linear(x, W), x.view(-1)
    view.mul_(2)
    return F.gelu(h)


def write_item(x):
    h = F.linear(x, W)
    x[0] = 1
    return F.gelu(h)


def write_with_operator(x):
    h = F.linear(x, W)
    x += 1
    return F.gelu(h)


def write_through_out(x):
    h = F.linear(x, W)
    torch.add(x, 1, out=x)
    return F.gelu(h)


def write_inplace_argument(x):
    h = F.linear(x, W)
    F.relu(x, inplace=True)
    return F.gelu(h)


def write_by_keyword(x):
    h = F.linear(x, W)
    torch.relu_(input=x)
    return F.gelu(h)


def write_to_normalize_rows(x):
    h = F.linear(W, x, None)
    F.embedding(torch.tensor([1]), x, max_norm=0.1)
    return F.gelu(h)


def write_of_a_list(x):
    h = F.linear(x, W)
    torch._foreach_add_([x], 1)
    return F.gelu(h)


@torch.library.custom_op("fastdl_test::bump", mutates_args=("x",))
def bump_op(x: torch.Tensor) -> None:
    x.add_(1)


def write_of_an_op(x):
    h = F.linear(x, W)
    torch.ops.fastdl_test.bump(x)
    return F.gelu(h)


def write_of_an_overload(x):
    h = F.linear(x, W)
    bump_op(x)
    return F.gelu(h)


def write_of_statistics(x):
    h = F.linear(x, W)
    F.batch_norm(W[:3], x[0], x[1], training=True)
    return F.gelu(h)


@torch.compiler.allow_in_graph
def bump(x):
    return x.add_(1)


def write_of_an_unknown_function(x):
    h = F.linear(x, W)
    bump(x)
    return F.gelu(h)


WRITES = [f for name, f in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("function", WRITES)
def test_writes_between(function):
    # written to are tensors of the graph, since its inputs are guarded by a rule of their own
    compiled = check_same(lambda x: function(x * 1), *tensors((3, 8), grad=False))
    assert "gelu" not in str(compiled.fused[0].kwargs)
    assert any("write" in reason for reason in compiled.reasons)


def test_write_between_of_a_checkpoint():
    def f(x):
        h = F.linear(x, W)
        checkpoint(lambda x: x.add_(1), x, use_reentrant=False)
        return F.gelu(h)

    compiled = check_same(f, *tensors((3, 8), grad=False))
    assert "gelu" not in str([n.kwargs for n in compiled.fused])


def test_inputs_may_share_memory_at_the_next_call():
    def f(x, y):
        h = F.linear(x, W)
        y.add_(1)
        return F.gelu(h)

    compiled = Compiled(f)
    compiled(torch.randn(3, 8), torch.randn(24))
    x = torch.randn(3, 8)
    copied = x.clone()
    torch.testing.assert_close(compiled(x, x.view(-1)), F.gelu(F.linear(copied, W)))
    assert len(compiled.graphs) == 1


def test_write_to_something_else_is_no_hazard():
    def f(x):
        h, other = F.linear(x, W), torch.zeros(8)
        other.add_(1)
        return F.gelu(h) + other

    assert only_fused(check_same(f, *tensors((3, 8)))) == ["linear"]


def test_write_to_what_backward_needs():
    # hardtanh in torch keeps its input, the fused op its output
    def f(x, w):
        h = F.hardtanh(F.linear(x, w))
        h.mul_(2)
        return h

    compiled = check_same(f, *tensors((3, 8), (8, 8)))
    assert "h.mul_" in str(compiled.reasons) or "backward may need" in str(compiled.reasons)
    with torch.no_grad():
        compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
        assert compiled.calls == ["linear", "mul_"]


@pytest.mark.parametrize("mode", ["grad", "autocast"])
def test_modes_are_boundaries(mode):
    def f(x, w):
        context = torch.no_grad() if mode == "grad" else torch.autocast("cpu", torch.bfloat16)
        with context:
            h = F.linear(x, w)
        return F.gelu(h)

    compiled = check_same(f, *tensors((3, 8), (8, 8)), atol=1e-2)
    assert any("changes the mode" in reason for reason in compiled.reasons)
    assert only_fused(compiled) == ["linear", "activation"]


def test_intermediate_with_another_reader():
    def f(x, w):
        h = F.linear(x, w)
        return F.gelu(h), h

    compiled = check_same(f, *tensors((3, 8), (8, 8)))
    assert any("also used by output" in reason for reason in compiled.reasons)


def test_prenorm_result_used_too_early():
    def f(x, r):
        h = x + r
        early = h * 2
        return F.layer_norm(h, (8,), early[0]), h

    compiled = check_same(f, *tensors((3, 8), (3, 8)))
    assert compiled.fused[0].kwargs == {}


# In place: absorbed if nobody can tell.


@pytest.mark.parametrize(
    "tail",
    [
        lambda h, r: F.relu(h, inplace=True),
        lambda h, r: h.relu_(),
        lambda h, r: torch.relu_(h),
        lambda h, r: h.add_(r),
        lambda h, r: F.hardtanh(h, inplace=True),
    ],
)
def test_absorbed_in_place(tail):
    compiled = check_same(lambda x, w, r: tail(F.linear(x, w), r), *tensors((3, 8), (8, 8), (3, 8)))
    assert compiled.calls == ["linear"]


def test_absorbed_one_after_the_other():
    def f(x, r):
        return F.relu(F.linear(x, W), inplace=True).add_(r)

    assert check_same(f, *tensors((3, 8), (3, 8), grad=False)).calls == ["linear"]


def test_absorbed_augmented_assignment():
    def f(x, w, r):
        h = F.gelu(F.linear(x, w))
        h += r
        return h

    assert check_same(f, *tensors((3, 8), (8, 8), (3, 8))).calls == ["linear"]


def test_in_place_on_an_input_stays():
    compiled = check_same(lambda x: F.relu(x, inplace=True), *tensors((3, 8), grad=False))
    assert compiled.fused == []
    assert "writes to its input" in compiled.reasons[0]


def test_in_place_with_another_reader_stays():
    # z * sigmoid_(z) is sigmoid(z) squared
    def f(x, w):
        z = F.linear(x, w)
        return z * z.sigmoid_()

    compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
    assert any("has another reader" in reason for reason in compiled.reasons)


def test_in_place_with_a_reader_outside_stays():
    def f(x, w):
        z = F.linear(x, w)
        y = F.relu(z, inplace=True)
        return y + 1, z

    compiled = check_same(f, *tensors((3, 8), (8, 8), grad=False))
    assert compiled.calls[:2] == ["linear", "relu"]


def test_in_place_does_not_promote():
    def f(x, w, r):
        h = F.linear(x, w)
        h += r
        return h

    x, w = tensors((3, 8), (8, 8), dtype=torch.bfloat16)
    compiled = check_same(f, x, w, *tensors((3, 8)), atol=2e-2)
    assert "changes the shape or dtype" in str(compiled.reasons)


# Shapes, dtypes and kinds of arguments.


@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 1, 8)])
def test_residual_that_enlarges_the_result(shape):
    def f(x, w, r):
        return F.gelu(F.linear(x, w)) + r

    compiled = check_same(f, *tensors((3, 8), (8, 8), shape))
    assert "residual" not in compiled.fused[0].kwargs


def test_residual_that_promotes():
    x, w = tensors((3, 8), (8, 8), dtype=torch.bfloat16)

    def f(x, w, r):
        return F.linear(x, w) + r

    assert "residual" not in check_same(f, x, w, *tensors((3, 8)), atol=2e-2).fused[0].kwargs


def test_modulation_that_enlarges_the_result():
    def f(x, scale, shift):
        return F.layer_norm(x, (8,)) * (1 + scale) + shift

    compiled = check_same(f, *tensors((3, 8), (2, 1, 8), (2, 1, 8)))
    assert compiled.fused[0].kwargs == {}


@pytest.mark.parametrize("addend", [1.0, 2])
def test_number_is_no_residual(addend):
    compiled = check_same(lambda x, w: F.linear(x, w) + addend, *tensors((3, 8), (8, 8)))
    assert compiled.calls == ["linear", "add"]
    assert "residual is not a tensor" in compiled.reasons


def test_unknown_number_is_no_parameter():
    compiled = Compiled(lambda x, slope: F.leaky_relu(x, slope), dynamic=True)
    x = torch.randn(4, 8)
    for slope in (0.1, 0.2):
        torch.testing.assert_close(compiled(x, slope), F.leaky_relu(x, slope))
    assert compiled.reasons == ["name is not a constant"]


def test_scaled_sum_is_no_residual():
    def f(x, w, r):
        return torch.add(F.linear(x, w), r, alpha=2)

    assert check_same(f, *tensors((3, 8), (8, 8), (3, 8))).calls == ["linear", "add"]


def test_option_that_the_op_has_not():
    def f(x, cudnn):
        return torch.layer_norm(x, (8,), None, None, 1e-5, cudnn)

    for cudnn in (True, False):
        compiled = Compiled(f)
        compiled(torch.randn(3, 8), cudnn)
        assert bool(compiled.fused) == cudnn


def test_product_with_a_vector():
    """A call that torch takes and the op may refuse is left, or replaced by what computes it."""
    check_same(lambda x, w: F.gelu(F.linear(x, w)), *tensors((3, 8), (8,)))


def test_transforms_are_left_to_torch():
    w = torch.randn(8, 8)

    def f(x):
        return torch.func.grad(lambda t: F.gelu(F.linear(t, w)).sum())(x)

    compiled = check_same(f, *tensors((3, 8), grad=False))
    assert compiled.fused == []
    assert "torch.func" in compiled.reasons[0]
