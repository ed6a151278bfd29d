"""FSDP in a process group of one process: units, dtypes and initial weights."""

import pytest
import torch
import torch.distributed as td
from torch.distributed.fsdp import FSDPModule

from models_mae import mae_vit_mini_patch4
from util import dist
from util.training import fsdp

CPU = torch.device("cpu")


@pytest.fixture
def process_group(monkeypatch):
    """`shard` rejects a single process: its check gets 2, its mesh the real number."""
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    numbers = iter([2])
    monkeypatch.setattr(dist, "world_size", lambda: next(numbers, 1))
    yield
    dist.teardown()


def build(**options) -> torch.nn.Module:
    with torch.device("meta"):
        return mae_vit_mini_patch4(img_size=16, **options)


@pytest.mark.parametrize("options", [{}, {"num_cls_tokens": 3, "learned_pos_embed": True}], ids=["mae", "pixio"])
def test_a_sharded_model_has_the_weights_and_outputs_of_a_plain_one(process_group, options):
    torch.manual_seed(3)
    plain = mae_vit_mini_patch4(img_size=16, **options)
    torch.manual_seed(3)
    model = build(**options)
    fsdp.shard(model, [*model.blocks, *model.decoder_blocks], CPU, None, "reconstruct")
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs), name
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert units == {"", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "decoder_blocks.0"}
    assert dist.is_sharded(model)
    assert model.num_prefix_tokens == options.get("num_cls_tokens", 1)
    assert not dist.is_sharded(plain)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    torch.testing.assert_close(model(imgs, noise=noise)[0], plain(imgs, noise=noise)[0])
    with torch.no_grad():
        pasted = plain.reconstruct(imgs, noise=noise).pasted
    torch.testing.assert_close(model.reconstruct(imgs, noise=noise).pasted, pasted)  # gathers the weights too


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
    model = build()
    fsdp.shard(model, model.blocks, torch.device(device), dtype, "reconstruct")
    assert [mesh for mesh, _ in policies] == [(device, (1,))] * 5
    *units, root = [policy for _, policy in policies]
    assert root is None
    for policy in units:
        assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (
            travels_as, torch.float32, False
        )  # fmt: skip
