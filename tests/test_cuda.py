"""Tests that need a GPU; skipped without one (./run test-cuda)."""

from functools import partial

import pytest
import torch
from test_loop import train_epoch

import engine_pretrain
from mae.data.batches import prefetch, to_host
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.inference.model import Segmenter
from mae.training import log
from mae.training.compiling import compile_model
from mae.training.precision import Precision
from mae.training.transaction import Loader
from models_mae import mae_vit_mini_patch4
from models_vit import PatchEmbed, vit_mini_patch4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


class Batches(list, Loader):
    """As `loader.TrainLoader`: images in pinned memory."""

    images_per_iteration = 8

    def counts(self) -> dict[str, int]:
        return {}


def batches(count: int = 12) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return Batches(
        Batch(
            torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8, generator=generator).pin_memory(),
            torch.zeros(8, dtype=torch.int64).pin_memory(),
            noise=torch.rand(8, 64, generator=generator).pin_memory(),
        )
        for _ in range(count)
    )


def train(device: torch.device, amp: str, compiled: bool = False, may_wait: bool = True) -> list[float]:
    """The loss of each update. A synchronization with the device is an error after the first two updates."""
    torch.manual_seed(0)
    model = mae_vit_mini_patch4(in_chans=1).to(device)
    if compiled:
        compile_model(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []

    class Log(log.NullLog):
        def update(self, iterations: int, lr: float, loss: float, grad_norm: float, terms: object = None) -> None:
            losses.append(loss)

    def schedule(epoch: float) -> float:
        if epoch > 0.1 and not may_wait:
            torch.cuda.set_sync_debug_mode("error")
        return 1e-3

    loss = partial(engine_pretrain.loss, mask_ratio=0.75, normalize=Normalize([0.5], [0.25]).to(device))
    train_epoch(loss, model, batches(), optimizer, schedule=schedule, precision=Precision(amp, device), log=Log())
    return losses


def test_no_update_synchronizes_with_the_device():
    try:
        assert len(train(CUDA, "bf16", may_wait=False)) == 12
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("amp", "least", "most"), [("off", 0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-3, 1e-2)])
def test_relative_error_of_a_product(amp, least, most):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    expected = a.double() @ b.double()
    with Precision(amp, CUDA).autocast():
        found = (a.to(CUDA) @ b.to(CUDA)).cpu().double()
    assert least < (found - expected).norm() / expected.norm() < most


@pytest.mark.parametrize(("amp", "expected"), [({}, torch.bfloat16), ({"amp": "off"}, torch.float32)])
def test_segmentation_is_in_bf16_by_default(amp, expected):
    settings = {"model": "vit_mini_patch4", "in_chans": 3, "input_size": 32, "nb_classes": 3, "head": "linear"}
    model, found = Segmenter(settings).to(CUDA), []
    model.head.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    assert model.segment(torch.zeros(3, 40, 40), **amp).shape == (40, 40)
    assert set(found) == {expected}


@pytest.mark.parametrize("compiled", [False, True])
def test_losses_equal_those_on_a_cpu(compiled):
    expected = train(torch.device("cpu"), "off")
    assert train(CUDA, "off", compiled) == pytest.approx(expected, rel=1e-3)
    assert train(CUDA, "bf16", compiled) == pytest.approx(expected, rel=3e-2)


def test_compiled_blocks_drop_paths():
    model, images = vit_mini_patch4(img_size=16, drop_path_rate=0.9).to(CUDA), torch.randn(8, 3, 16, 16, device=CUDA)
    expected = model.eval()(images)
    compile_model(model, CUDA)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    outputs = [model.train()(images) for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_memory_does_not_grow_over_epochs():
    def reserved() -> int:
        for _ in prefetch(iter(batches()), CUDA):
            pass
        return torch.cuda.memory_reserved()

    assert len({reserved() for _ in range(4)}) == 1


def test_batches_are_copied_completely_and_in_order():
    for ours, theirs in zip(prefetch(iter(batches()), CUDA), batches(), strict=True):
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        assert torch.equal(ours.noise.cpu(), theirs.noise)


def test_patches_are_embedded_as_on_a_cpu():
    embed, imgs = PatchEmbed((32, 48), (4, 8), in_chans=3, embed_dim=16), torch.rand(2, 3, 32, 48)
    expected = embed(imgs)
    torch.testing.assert_close(embed.to(CUDA)(imgs.to(CUDA)).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_each_result_is_copied_to_the_host_after_the_next_one_is_launched():
    launched, seen = [], []

    def results():
        for number in range(4):
            launched.append(number)
            yield torch.full((1000, 1000), float(number), device=CUDA)

    for values in to_host(results()):
        seen.append((values.unique().tolist(), launched[-1]))
    assert seen == [([0.0], 1), ([1.0], 2), ([2.0], 3), ([3.0], 3)]
