"""Units and dtypes of FSDP, in a process group of one process. test_sharded.py trains with it."""

import pytest
import torch
import torch.distributed as td

from models_mae import mae_vit_mini_patch4
from util import dist
from util.training import fsdp


@pytest.fixture
def process_group(monkeypatch):
    """`shard` rejects a single process: its check gets 2, its mesh the real number."""
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    numbers = iter([2])
    monkeypatch.setattr(dist, "world_size", lambda: next(numbers, 1))
    yield
    dist.teardown()


@pytest.mark.parametrize(
    ("device", "dtype", "travels_as"),
    [("cpu", torch.bfloat16, None), ("cuda", torch.bfloat16, torch.bfloat16), ("cuda", None, None)],
)
def test_gradients_are_averaged_in_fp32(process_group, monkeypatch, device, dtype, travels_as):
    policies = []
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *args: args)
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh, mp_policy=None: policies.append((mesh, mp_policy)))
    monkeypatch.setattr(fsdp, "register_fsdp_forward_method", lambda *_: None)
    monkeypatch.setattr(fsdp, "initialize", lambda *_: None)
    with torch.device("meta"):
        model = mae_vit_mini_patch4(img_size=16)
    fsdp.shard(model, model.blocks, torch.device(device), dtype, "reconstruct")
    assert [mesh for mesh, _ in policies] == [(device, (1,))] * 5
    *units, root = [policy for _, policy in policies]
    assert root is None
    found = {(policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) for policy in units}
    assert found == {(travels_as, torch.float32, False)}
