"""Units and dtypes of FSDP, in a process group of one process. test_sharded.py trains with it."""

import pytest
import torch
from mains import lines

from mae import parallel
from mae.training import fsdp
from models_mae import mae_vit_mini_patch4


@pytest.fixture
def process_group():
    parallel.init("cpu", needs_group=True)
    yield
    parallel.teardown()


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


def test_one_process_trains_saves_and_resumes_as_without_fsdp(pretrain, capsys):
    flags = {"batch_size": 12, "save_every": 1, "vis_every": 1}  # pictures gather the weights
    expected = [line["train_loss"] for line in lines(pretrain("plain", **flags))]
    try:
        sharded = pretrain("sharded", fsdp=True, **flags)
        resumed = pretrain("resumed", fsdp=True, resume=sharded / "checkpoint-0", **flags)
    finally:
        parallel.teardown()
    assert "warning: `fsdp`" in capsys.readouterr().out
    without = pretrain("without", resume=sharded / "checkpoint-0", **flags)
    for epoch, out in ((0, sharded), (1, resumed), (1, without)):
        assert [line["train_loss"] for line in lines(out)] == pytest.approx(expected[epoch:], rel=1e-6)
