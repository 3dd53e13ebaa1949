"""Sharded models, and models in the hands of PEFT, do the same when they are optimized."""

import copy

import pytest
import torch
import torch.distributed as dist
from tests.robustness import KINDS, classes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastdl

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or torch.cuda.is_available(), reason="shards on CPUs"
)

# ways to spread a model over processes, as (model, mesh) -> model


def replicated(model, mesh):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model, mesh):
    return fully_shard(model, mesh=mesh)


def sharded_in_parts(model, mesh):
    for child in model.children():
        if list(child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLANS = {
    "modules": {"fc": ColwiseParallel(output_layouts=Replicate())},
    "sequential": {"0": ColwiseParallel(), "3": RowwiseParallel()},
    "encoder": {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()},
}

SPREADS = [(spread, kind) for spread in (replicated, sharded, sharded_in_parts) for kind in KINDS]
SPREADS += [
    (lambda model, mesh, plan=plan: parallelize_module(model, mesh, plan), kind)
    for kind, plan in PLANS.items()
]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model, x):
    """Output, gradients and parameters of a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    y = whole(model(x))
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d {name}": whole(p.grad) for name, p in model.named_parameters()}
    optimizer.step()
    return found | {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def spread_and_train(rank, size, path, form):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        for spread, kind in SPREADS:
            with fastdl.policy(form):
                _compare(lambda model, spread=spread: spread(model, mesh), KINDS[kind])
    finally:
        dist.destroy_process_group()


def _compare(spread, kind):
    torch.manual_seed(0)
    original, x = kind.make(), torch.randn(kind.shape)
    theirs = spread(copy.deepcopy(original))
    expected = trained(theirs, x)
    after = trained(theirs, x)
    for model in (
        fastdl.optimize(spread(copy.deepcopy(original))),
        spread(fastdl.optimize(copy.deepcopy(original))),
    ):
        assert fastdl.report(model).replaced
        torch.testing.assert_close(trained(model, x), expected, rtol=1e-4, atol=1e-5)
        _through_a_checkpoint(model)
        fastdl.restore(model)
        assert classes(model) == classes(theirs)
        torch.testing.assert_close(trained(model, x), after, rtol=1e-4, atol=1e-5)


def _through_a_checkpoint(model):
    """The state of all processes is written, spoilt, and read again."""
    options = StateDictOptions(full_state_dict=True)
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(get_model_state_dict(model, options=options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, state, options=options)
    now = {name: whole(p).detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(now, before, rtol=0, atol=0)


@needs_gloo
def test_spread_over_one_process(tmp_path):
    spread_and_train(0, 1, tmp_path / "store", "definition")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("form", ["definition", "fused"])
def test_spread_over_two_processes(tmp_path, form):
    torch.multiprocessing.spawn(spread_and_train, (2, tmp_path / "store", form), nprocs=2)


@needs_gloo
def test_spread_in_layers_of_both(tmp_path):
    """Parametrized and sharded on top of our class: restore finds it, and optimize it again."""
    path = tmp_path / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = fully_shard(fastdl.optimize(nn.Linear(8, 8)), mesh=mesh)
        for _ in range(2):
            assert isinstance(fastdl.restore(model), nn.Linear)
            assert not isinstance(model, fastdl.nn.Linear)
            assert isinstance(fastdl.optimize(model), fastdl.nn.Linear)
        nn.utils.parametrizations.weight_norm(fastdl.optimize(layer := nn.Linear(8, 8)))
        fully_shard(layer, mesh=mesh)
        assert isinstance(layer, fastdl.nn.Linear)
        x = torch.randn(2, 8)
        y = layer(x)
        assert not isinstance(fastdl.restore(layer), fastdl.nn.Linear)
        torch.testing.assert_close(layer(x), y)
    finally:
        dist.destroy_process_group()


# PEFT


@pytest.fixture(scope="module")
def llama():
    """A small model whose head is its embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def learned(model):
    """Logits and gradients of a batch."""
    ids = torch.arange(12).reshape(2, 6)
    result = model(input_ids=ids, labels=ids)
    found = {"logits": result.logits.detach()}
    if result.loss.requires_grad:
        result.loss.backward()
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "saved", [None, pytest.param(["lm_head"], marks=pytest.mark.slow), ["norm"]]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(llama, saved, when):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            target_modules=["q_proj", "down_proj", "embed_tokens"], r=2, modules_to_save=saved,
            init_lora_weights=False, ensure_weight_tying=saved is None,
        )  # fmt: skip
        return peft.get_peft_model(model, config)

    original, model = lora(copy.deepcopy(llama)), copy.deepcopy(llama)
    model = fastdl.optimize(lora(model)) if when == "before" else lora(fastdl.optimize(model))
    layer = model.base_model.model.model.layers[0].self_attn
    assert type(layer.q_proj.base_layer) is fastdl.nn.Linear
    assert list(model.state_dict()) == list(original.state_dict())
    same(learned(model), learned(original))
    with model.disable_adapter(), original.disable_adapter():
        same(learned(model), learned(original))
    merged, expected = model.merge_and_unload(), original.merge_and_unload()
    same(learned(merged), learned(expected))
    assert type(layer.q_proj) is fastdl.nn.Linear
    fastdl.restore(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]


def test_tied_weights_of_a_model_of_transformers(llama, tmp_path):
    model = fastdl.optimize(copy.deepcopy(llama))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same(learned(model), learned(llama))
    model.resize_token_embeddings(40)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.gradient_checkpointing_enable()
    model.train()
    model.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path)
    same(learned(again), learned(model))
    assert not any(type(m).__module__.startswith("fastdl") for m in again.modules())
