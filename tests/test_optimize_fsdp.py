"""The module engine on classes that FSDP2 has generated."""

import pickle

import pytest
import torch
import torch.distributed as dist

import fastdl
from test_optimize import X, mlp, patterns


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_counts_as_the_class_under_it(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, x = mlp(p=0.0), torch.randn(X)
    expected = model(x)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    classes = [type(module) for module in model.modules()]
    fastdl.optimize(model)
    assert isinstance(model[3], FSDPModule) and isinstance(model[3], fastdl.nn.Linear)
    assert patterns(fastdl.report(model).replaced)[:2] == [
        ("0", "Linear + GELU + Dropout"),
        ("3", "Linear"),
    ]
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    with pytest.raises(pickle.PicklingError, match="FSDPSequential"):
        pickle.dumps(model)
    fastdl.restore(model)
    assert [type(module) for module in model.modules()] == classes
