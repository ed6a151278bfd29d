"""The two attention kernels agree; activation checkpointing saves memory and gives equal results."""

import pytest
import torch
from test_models_mae import build

import mae.build
import models_vit
from models_mae import MaskedAutoencoderViT


def loss_and_gradients(model: MaskedAutoencoderViT, *args, **kwargs) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(*args, **kwargs)[0]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def relative_difference(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ones, others, strict=True))


def saved_bytes(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes that the loss saves for the backward pass, without the weights; shared storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss = model(images)[0]  # keeps the storages alive, so that no address is used twice
    return sum(sizes.values())


@pytest.mark.parametrize("length", [5, 64, 65])
@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16])
def test_both_attention_kernels_agree(length, dtype):
    q, k, v = (torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours = models_vit.attend(q, k, v)
    plain = models_vit.attention_weights(q, k) @ v
    ones, others, last = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (ours, fused, plain))
    bound = {torch.double: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative_difference([ours, *ones], [fused, *others]) < bound
    assert relative_difference([ours, *ones], [plain, *last]) < bound
    on_cpu = plain if dtype == torch.bfloat16 or length <= 64 else fused
    assert torch.equal(ours, on_cpu)
    with torch.no_grad():
        assert torch.equal(models_vit.attend(*torch.stack([q, k, v]).detach()), fused)  # which is faster there


def test_checkpointed_blocks_give_equal_gradients():
    model, imgs, noise = build(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    before = loss_and_gradients(model, imgs, noise=noise)
    kept = saved_bytes(model, imgs)
    mae.build.set_grad_checkpointing(model)
    assert all(map(torch.equal, loss_and_gradients(model, imgs, noise=noise), before))
    assert saved_bytes(model, imgs) < 0.5 * kept
