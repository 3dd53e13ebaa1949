"""Who computes an op, and how a user learns and decides it."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fastdl
import fastdl.functional as FF


@pytest.fixture(autouse=True)
def _policy_as_it_was():
    yield
    fastdl.set_policy()


def linear_args(dtype=torch.float32, device="cpu"):
    return torch.ones(3, 8, dtype=dtype, device=device), torch.ones(
        5, 8, dtype=dtype, device=device
    )


def test_fp64_goes_to_the_definition_and_says_so():
    seen = fastdl.explain(FF.linear, *linear_args(torch.float64))
    assert not seen.fused
    assert "float32, float16 and bfloat16" in str(seen)


def test_explain_names_decisions_kernel_and_config(device):
    seen = fastdl.explain(FF.linear, *linear_args(device=device))
    assert seen.fused
    assert "linear (call): fused" in str(seen)
    assert "BLOCK_M" in str(seen) and "[rule]" in str(seen)


def test_explain_leaves_random_numbers_alone(device):
    state = torch.get_rng_state()
    fastdl.explain(FF.dropout, torch.ones(8, device=device), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_error_on_fallback():
    with (
        fastdl.policy("fused", on_fallback="error"),
        pytest.raises(fastdl.FallbackError, match="linear does not run fused: the kernels take"),
    ):
        FF.linear(*linear_args(torch.float64))


def test_warning_on_fallback():
    with fastdl.policy(on_fallback="warn"), pytest.warns(UserWarning, match="linear runs in torch"):
        FF.linear(*linear_args(torch.float64))


def test_silence_is_the_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FF.linear(*linear_args(torch.float64))


def test_the_definition_on_request(device):
    with fastdl.policy("definition", on_fallback="error"):
        assert not fastdl.explain(FF.linear, *linear_args(device=device)).fused


def test_policies_nest_and_end():
    fastdl.set_policy("fused", on_fallback="error")
    with fastdl.policy("definition"), fastdl.policy("auto"):
        FF.linear(*linear_args(torch.float64))
    with pytest.raises(fastdl.FallbackError):
        FF.linear(*linear_args(torch.float64))


def test_a_policy_is_its_threads_own():
    fastdl.set_policy("fused", on_fallback="error")
    failed = []

    def other():
        try:
            FF.linear(*linear_args(torch.float64))
        except fastdl.FallbackError as error:
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("bad", [("fast", "silent"), ("auto", "loud")])
def test_an_unknown_policy_names_those_there_are(bad):
    with pytest.raises(ValueError, match="allowed are"):
        fastdl.set_policy(*bad)


def test_tensor_subclasses_without_a_rule_go_to_the_definition(device):
    class Mine(torch.Tensor):
        pass

    x, w = linear_args(device=device)
    seen = fastdl.explain(FF.linear, x.as_subclass(Mine), w)
    assert not seen.fused and "subclass" in str(seen)


def test_a_policy_is_seen_inside_a_compiled_graph(device):
    x, w = linear_args(device=device)
    compiled = torch.compile(FF.linear, backend="eager", fullgraph=True)
    with fastdl.policy("definition"):
        assert not fastdl.explain(compiled, x, w).fused
    with fastdl.policy("fused"):
        assert fastdl.explain(compiled, x, w).fused


def test_threads_share_the_interpreter(device):
    """Kernels launched from several threads at once give what they give alone."""
    xs = [torch.randn(33, 16, device=device) for _ in range(4)]
    w = torch.randn(20, 16, device=device)
    expected = [FF.linear(x, w, activation="gelu") for x in xs]
    got = [None] * 4

    def work(i):
        got[i] = FF.linear(xs[i], w, activation="gelu")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# torch 2.11 keeps an object for a thread without a reference of its own, and drops one in the end
CARELESS = """
import ctypes, torch

kept = {}

def stash(key, thing):
    before, kept[key] = kept.get(key), id(thing)
    if before is not None:
        ctypes.pythonapi.Py_DecRef(ctypes.c_void_p(before))

ctypes.pythonapi.Py_DecRef.argtypes = [ctypes.c_void_p]
torch._C._stash_obj_in_tls = stash
import fastdl

for _ in range(3000):
    with fastdl.policy("definition"):
        made = [fastdl.policy(on_fallback="warn")]
print("alive")
"""


def test_a_policy_outlives_a_torch_that_keeps_no_reference():
    done = subprocess.run([sys.executable, "-c", CARELESS], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr
