"""The optimizers in use: scaled and clipped gradients, master weights, and shards."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastdl
from fastdl import optim
from fastdl.optim import SGD, AdamW
from optimizer_forms import (
    BOTH,
    CLASSES,
    SHAPES,
    assert_states,
    distance,
    give_gradients,
    made,
    same,
    take_steps,
    theirs,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    "cls, options",
    [
        (AdamW, {"fused": True, "weight_decay": 0.3}),
        (AdamW, {}),
        (SGD, {"fused": True, "momentum": 0.9, "dampening": 0.5}),
        (SGD, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradient_scaler(fused, device, cls, options, clip):
    """The first steps are skipped; torch, not fused, has the scaler unscale, skip and clip."""
    ours, other = made(device), made(device)
    plain = {**options, "fused": None}
    inside = clip if options.get("fused") else None
    found = []
    for params, optimizer in (
        (ours, cls(ours, lr=0.1, clip_grad_norm=inside, **options)),
        (other, theirs(cls, other, lr=0.1, **plain)),
    ):
        scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=1000)
        for seed in range(5):
            give_gradients(params, seed, scaler.scale(torch.ones((), device=device)).item())
            if seed < 2:
                params[1].grad[3] = float("inf")
            before = [p.detach().clone() for p in params]
            if clip is not None and (params is other or inside is None):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, clip)
            scaler.step(optimizer)
            scaler.update()
            if seed < 2:
                same(params, before)
        assert scaler.get_scale() == 16.0
        found.append(optimizer.state_dict())
        found[-1]["param_groups"][0]["fused"] = None
    assert distance(ours, other) < 1e-6
    if clip is None or inside is None:
        assert distance([p.grad for p in ours], [p.grad for p in other]) < 1e-6
    assert_states(*found, rtol=1e-5, atol=1e-6)


@CLASSES
@pytest.mark.parametrize("max_norm", [0.01, 1e6, 0.0])
def test_clip_grad_norm(fused, device, cls, max_norm):
    ours, other = made(device), made(device)
    for params in (ours, other):  # of two types
        params[1].data = params[1].data.bfloat16()
    optimizer = cls([{"params": ours[:1]}, {"params": ours[1:]}], lr=0.1, clip_grad_norm=max_norm)
    expected = theirs(cls, other, lr=0.1, fused=True)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(other, seed)
        kept = [p.grad.clone() for p in ours]
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(other, max_norm)
        expected.step()
        same([p.grad for p in ours], kept)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-3, atol=0)
    floats = [i for i in range(len(ours)) if i != 1]
    assert distance([ours[i] for i in floats], [other[i] for i in floats]) < 2e-4
    torch.testing.assert_close(ours[1], other[1])
    exact = torch.stack([g.double().norm() for g in kept]).norm()
    torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=1e-6, atol=0)


def test_clipping_a_gradient_that_is_not_finite(fused, device):
    ours, other = made(device), made(device)
    for params in (ours, other):
        give_gradients(params, 0)
        params[0].grad[1, 2] = float("nan")
    SGD(ours, clip_grad_norm=1.0).step()
    nn.utils.clip_grad_norm_(other, 1.0)
    torch.optim.SGD(other).step()
    same(ours, other)


@pytest.mark.parametrize("cls, options", [BOTH[i] for i in (1, 3, 7, 10, 11)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(fused, device, cls, options, dtype):
    """The parameters are the rounding of what torch does to copies of them in float32."""
    ours = made(device, dtype)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    ours.append(nn.Parameter(torch.ones(9, device=device)))
    exact.append(nn.Parameter(torch.ones(9, device=device)))
    optimizer, expected = cls(ours, master_weights=True, **options), theirs(cls, exact, **options)
    for seed in range(6):
        give_gradients(ours, seed)
        for p, q in zip(exact, ours, strict=True):
            p.grad = q.grad.float()
        optimizer.step()
        expected.step()
        if seed == 2:  # through a file
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = cls(ours, master_weights=True, **options)
            optimizer.load_state_dict(state)
    masters = [optimizer.state[p]["master_param"] for p in ours[:-1]]
    assert distance(masters, exact[:-1]) < 1e-6
    same([p.detach() for p in ours[:-1]], [m.to(dtype) for m in masters])
    assert distance(ours[-1:], exact[-1:]) < 1e-6
    assert "master_param" not in optimizer.state.get(ours[-1], {})
    for p in ours[:-1]:
        floats = [v for v in optimizer.state[p].values() if v.dim()]
        assert all(v.dtype == torch.float32 for v in floats)


@CLASSES
@pytest.mark.parametrize("mode", ["fused", "definition"])
def test_what_users_write_into_a_parameter_counts(device, cls, mode):
    (p,), (q,) = made(device, torch.bfloat16, SHAPES[:1]), made(device, shapes=SHAPES[:1])
    q.data = p.detach().float()
    optimizer, expected = cls([p], lr=0.1, master_weights=True), theirs(cls, [q], lr=0.1)
    with fastdl.policy(mode):
        for seed in range(3):
            give_gradients([p], seed)
            q.grad = p.grad.float()
            optimizer.step()
            expected.step()
            with torch.no_grad():
                p[1, :5] = q[1, :5] = 0.5
    take_steps(optimizer, [p], [3])
    q.grad = p.grad.float()
    expected.step()
    assert distance([optimizer.state[p]["master_param"]], [q]) < 1e-6


@CLASSES
def test_master_weights_from_a_checkpoint_of_torch_and_to_one(fused, device, cls):
    options = {"momentum": 0.9} if cls is SGD else {}
    params = made(device, torch.bfloat16)
    plain = theirs(cls, params, **options)
    take_steps(plain, params, range(2))
    optimizer = cls(params, master_weights=True, **options)
    optimizer.load_state_dict(plain.state_dict())
    take_steps(optimizer, params, [2])
    assert all(optimizer.state[p]["master_param"].dtype == torch.float32 for p in params)
    plain.load_state_dict(optimizer.state_dict())
    take_steps(plain, params, [3])


FALLBACKS = [
    (AdamW, torch.float64, {}, "float32, float16 and bfloat16"),
    (SGD, torch.float64, {"momentum": 0.9}, "float32, float16 and bfloat16"),
    (AdamW, torch.complex64, {"amsgrad": True}, "float32, float16 and bfloat16"),
    (AdamW, torch.float32, {"differentiable": True}, "this option"),
    (SGD, torch.float32, {"differentiable": True, "momentum": 0.9}, "this option"),
    (AdamW, torch.float32, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}, "this option"),
]


@pytest.mark.parametrize("cls, dtype, options, says", FALLBACKS)
def test_torch_does_what_kernels_do_not(cls, dtype, options, says):
    ours, other = made(dtype=dtype), made(dtype=dtype)
    optimizer, expected = cls(ours, lr=0.1, **options), theirs(cls, other, lr=0.1, **options)
    for params, step in ((ours, optimizer), (other, expected)):
        if options.get("differentiable"):
            params[:] = [p.detach() for p in params]
            step.param_groups[0]["params"] = params
        take_steps(step, params, range(3))
    same([p.detach() for p in ours], [p.detach() for p in other])
    give_gradients(ours, 3)
    with fastdl.policy(on_fallback="error"), pytest.raises(fastdl.FallbackError, match=says):
        optimizer.step()
    seen = fastdl.explain(optimizer.step)
    assert not seen.fused and says in str(seen)


def test_sparse_gradients():
    p, q = (nn.Parameter(torch.ones(5, 2)) for _ in range(2))
    for x, cls in ((p, SGD), (q, torch.optim.SGD)):
        optimizer = cls([x], lr=0.1)
        x.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2))
        optimizer.step()
    same([p], [q])
    p.grad = q.grad
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW([p]).step()


@CLASSES
def test_one_parameter_goes_to_torch_and_the_others_do_not(device, cls):
    options = {"momentum": 0.9} if cls is SGD else {}
    ours, other = made(device), made(device)
    for params in (ours, other):
        params.append(nn.Parameter(torch.ones(6, 8, device=device)[:, ::2]))
        params.append(nn.Parameter(torch.ones(6, dtype=torch.float64, device=device)))
    optimizer = cls(ours, lr=0.1, clip_grad_norm=0.1, **options)
    expected = theirs(cls, other, lr=0.1, **options)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(other, seed)
        assert len(fastdl.explain(optimizer.step).launches) == 2
        nn.utils.clip_grad_norm_(other, 0.1)
        expected.step()
    assert distance(ours, other) < 1e-6
    assert_states(optimizer.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


@CLASSES
def test_master_weights_in_torch(device, cls):
    ours = made(device, torch.bfloat16)
    with fastdl.policy("definition"):
        optimizer = cls(ours, lr=0.1, master_weights=True)
        assert not fastdl.explain(take_steps, optimizer, ours, range(3)).fused
    other = made(device, torch.bfloat16)
    fused = cls(other, lr=0.1, master_weights=True)
    take_steps(fused, other, range(3))
    masters = [[o.state[p]["master_param"] for p in ps] for o, ps in
               ((optimizer, ours), (fused, other))]  # fmt: skip
    assert distance(*masters) < 1e-6


@CLASSES
def test_what_users_do_with_optimizers(fused, device, cls):
    ours, other = made(device), made(device)
    calls = []
    for params, make in ((ours, cls), (other, getattr(torch.optim, cls.__name__))):
        optimizer = make(params[:2], lr=0.1)
        optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
        optimizer.register_step_post_hook(lambda *args: calls.append("after"))
        optimizer.add_param_group({"params": params[2:], "lr": 0.2})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item()]
        scheduler.step()
        for again in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
            copied = again(optimizer)
            leaves = [p for group in copied.param_groups for p in group["params"]]
            take_steps(copied, leaves, [7])
            assert type(copied) is type(optimizer)
        take_steps(optimizer, params, [7])
        same(params, leaves)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        calls.append(losses)
    half = len(calls) // 2
    assert calls[:half] == calls[half:]
    assert calls.count("before") == calls.count("after") >= 6
    assert distance(ours, other) < 1e-6


@CLASSES
def test_options_outlive_pickling(device, cls):
    params = made(device)
    optimizer = cls(params, master_weights=True, clip_grad_norm=2.0)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.master_weights and copied.clip_grad_norm == 2.0
    # a checkpoint has torch's groups
    plain = theirs(cls, params)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


@CLASSES
def test_autograd_sees_the_write(fused, device, cls):
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = cls([p], lr=0.1)
    y = p.square().sum()
    y.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def shard_and_step(rank, size, path):
    """Steps of a sharded net, whose checkpoint goes into new optimizers on the way."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        for cls in (AdamW, SGD):
            options = {"lr": 0.1} if cls is AdamW else {"lr": 0.1, "momentum": 0.9}
            _step_sharded(cls, size, options)
    finally:
        dist.destroy_process_group()


def _step_sharded(cls, size, options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (size,)))
    optimizer = cls(sharded.parameters(), clip_grad_norm=0.1, **options)
    expected = getattr(torch.optim, cls.__name__)(plain.parameters(), **options)
    x = torch.randn(4, 5)
    for step in range(4):
        for net in (sharded, plain):
            net.zero_grad()
            net(x).square().sum().backward()
        with fastdl.policy("fused", on_fallback="error"):
            launches = fastdl.explain(optimizer.step).launches
        # the last layer has one row, which one process has
        assert len(launches) == 1
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        expected.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5, atol=0)
        if step == 1:
            state = get_optimizer_state_dict(sharded, optimizer)
            optimizer = cls(sharded.parameters(), clip_grad_norm=0.1, **options)
            set_optimizer_state_dict(sharded, optimizer, state)
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert all(type(v) is type(p) for k, v in optimizer.state[p].items() if k != "step")
        torch.testing.assert_close(p.full_tensor(), q)


needs_gloo = pytest.mark.skipif(
    not dist.is_available() or torch.cuda.is_available(), reason="shards on CPUs"
)


@needs_gloo
def test_sharded_parameters(tmp_path):
    shard_and_step(0, 1, tmp_path / "store")


@needs_gloo
@pytest.mark.slow
def test_sharded_parameters_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(shard_and_step, (2, tmp_path / "store"), nprocs=2)


@CLASSES
def test_signature_and_errors(cls):
    reference = getattr(torch.optim, cls.__name__)
    ours = [*inspect.signature(cls).parameters.values()]
    expected = [*inspect.signature(reference).parameters.values()]
    assert [(p.name, p.default, p.kind) for p in ours[: len(expected)]] == [
        (p.name, p.default, p.kind) for p in expected
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(expected) :])
    params = made()
    for bad in ({"lr": -1.0}, {"weight_decay": -1.0}, {"fused": True, "foreach": True}):
        with pytest.raises((ValueError, RuntimeError)) as given:
            cls(params, **bad)
        with pytest.raises(type(given.value), match="^" + str(given.value).replace("`", ".") + "$"):
            reference(params, **bad)
    with pytest.raises(ValueError, match=f"{cls.__name__}: clip_grad_norm is -1"):
        cls(params, clip_grad_norm=-1)
    with pytest.raises(ValueError, match="differentiable"):
        cls(params, master_weights=True, differentiable=True)
    assert optim.AdamW is AdamW
