"""The faster ways to the same numbers: off and on agree in fp64."""

import pytest
import torch
from test_models_mae import build

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT


def loss_and_gradients(model: MaskedAutoencoderViT, *args, **kwargs) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def relative_difference(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("img_size", [16, (12, 28)])  # the model's own, and another
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.1])
def test_the_short_way_to_the_loss_is_the_same_mathematics(norm_pix_loss, img_size, ratio):
    model = build(norm_pix_loss=norm_pix_loss).double()
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    imgs = torch.randn(5, 3, height, width, dtype=torch.double)
    noise = torch.rand(5, height * width // 16)
    short = loss_and_gradients(model, imgs, ratio, noise=noise, loss_only=True)
    assert relative_difference(short, loss_and_gradients(model, imgs, ratio, noise=noise)) < 1e-12
    mask = noise.argsort(dim=1).argsort(dim=1) >= int(noise.shape[1] * (1 - ratio))
    given = loss_and_gradients(model, imgs, mask=mask, loss_only=True)
    assert relative_difference(given, short) < 1e-12


def test_the_short_way_computes_less(monkeypatch):
    model, imgs = build(), torch.randn(2, 3, 16, 16)
    seen = []
    embed = models_vit.PatchEmbed.forward
    monkeypatch.setattr(
        models_vit.PatchEmbed, "forward", lambda *a: seen.append("every patch is embedded") or embed(*a)
    )
    model.decoder_pred.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(imgs, loss_only=True)
    model(imgs)
    assert seen == [12, "every patch is embedded", 17]


@pytest.mark.parametrize("length", [5, 64, 65])
@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16])
def test_both_ways_of_attention_agree(length, dtype):
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


@pytest.mark.parametrize("step", models_mae.PUBLISHED_STEPS)
def test_a_step_that_somebody_changed_is_taken(step, monkeypatch):
    calls = []

    class Changed(MaskedAutoencoderViT):
        pass

    def changed(self, *args, **kwargs):
        calls.append(step)
        return models_mae.PUBLISHED_STEPS[step](self, *args, **kwargs)

    imgs, model = torch.randn(2, 3, 16, 16), build()
    model(imgs, loss_only=True)
    assert not calls
    setattr(Changed, step, changed)
    Changed(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4)(imgs, loss_only=True)
    assert len(calls) == 1
    with monkeypatch.context() as patch:
        patch.setattr(model, step, changed.__get__(model))
        model(imgs, loss_only=True)
    assert len(calls) == 2
    monkeypatch.setattr(MaskedAutoencoderViT, step, changed)
    model(imgs, loss_only=True)
    assert len(calls) == 3


class Patches(models_vit.PatchEmbed):
    def forward(self, imgs):
        return 2 * super().forward(imgs)


class Projection(torch.nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) + 1


class OwnBlock(models_vit.Block):
    def forward(self, x):
        return super().forward(x) + 1


class OwnAttention(models_vit.Attention):
    def forward(self, x):
        return super().forward(x) + 1


CHANGES = {
    "patch_embed": lambda model: setattr(model, "patch_embed", Patches(16, 4, 3, 32)),
    "proj": lambda model: setattr(model.patch_embed, "proj", Projection(model.patch_embed.proj)),
    "sequential": lambda model: setattr(model.patch_embed, "proj", torch.nn.Sequential(model.patch_embed.proj)),
    "hook": lambda model: model.patch_embed.register_forward_hook(lambda *given: 2 * given[2]),
    "decoder_block": lambda model: model.decoder_blocks.__setitem__(1, OwnBlock(16, 2)),
    "decoder_attention": lambda model: setattr(model.decoder_blocks[1], "attn", OwnAttention(16, 2)),
    "no_block": lambda model: model.decoder_blocks.__setitem__(1, torch.nn.Identity()),
    "block": lambda model: model.blocks.__setitem__(1, OwnBlock(32, 4)),
    "attention": lambda model: setattr(model.blocks[1], "attn", OwnAttention(32, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_somebody_changed_are_used(change):
    model, imgs, noise = build(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    CHANGES[change](model)
    torch.testing.assert_close(model(imgs, noise=noise, loss_only=True), model(imgs, noise=noise)[0])


def test_a_ratio_that_removes_nothing():
    assert build()(torch.randn(2, 3, 16, 16), 1e-17, loss_only=True) == 0


def test_recomputed_blocks_change_nothing():
    model, imgs, noise = build(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    before = loss_and_gradients(model, imgs, noise=noise, loss_only=True)
    kept = saved_bytes(model, imgs)
    models_vit.recompute_blocks(model)
    assert all(map(torch.equal, loss_and_gradients(model, imgs, noise=noise, loss_only=True), before))
    assert saved_bytes(model, imgs) < 0.5 * kept


def saved_bytes(model: MaskedAutoencoderViT, imgs: torch.Tensor) -> int:
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(imgs, loss_only=True)
    return total
