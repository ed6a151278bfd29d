"""Every loss computes in fp32 under autocast. The oracle is its value and gradient in fp64."""

import copy
from functools import partial

import pytest
import torch
from mains import parse
from test_cuda import Batches
from test_loop import train_epoch
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

import engine_finetune
import mae.build
import main_pretrain
from engine_linprobe import HeadLosses
from engine_segment import pixel_loss
from examples import (
    complementary_masks,
    cross_decoder,
    frozen_teacher,
    fused_blocks,
    hog_target,
    random_projection,
    two_crops,
)
from mae.data.item import IGNORED, Batch
from mae.evaluate.tasks import Classification, Multilabel, Regression
from mae.inference import get_model
from mae.training.precision import Precision
from mae.uniformity import uniformity
from models_mae import MaskedAutoencoderViT

CPU = torch.device("cpu")
B, C = 64, 10


def assert_exact(loss, gradient, exact, expected):
    """The gradient has the type of the outputs: it equals the one in fp64, rounded to it."""
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
    error = (gradient.double() - expected.to(gradient.dtype).double()).norm() / expected.norm()
    assert error < 5e-4, f"the gradient is off by {error:.2%}"


class Outputs(nn.Module):
    """A model with constant outputs of bf16, as those of a linear layer under autocast."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, imgs):
        return self.outputs


def labels(soft=False):
    draw = torch.Generator().manual_seed(1)
    if soft:
        return torch.rand(B, C, generator=draw).softmax(dim=1)
    return torch.randint(C, (B,), generator=draw)


def pixel_labels():
    masks = torch.randint(C, (4, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    masks[0, :8] = IGNORED
    return masks


numbers = partial(torch.randn, B, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
bits = partial(torch.randint, 2, (B, C), generator=torch.Generator().manual_seed(3))
HEADS = torch.arange(1, 4)[:, None, None] * torch.ones(3, B, C)
SUPERVISED = {
    "cross-entropy": (Classification().loss, labels()),
    "label smoothing": (partial(Classification().loss, smoothing=0.1), labels()),
    "weighted classes": (Classification(class_weight=torch.linspace(0.5, 2, C)).loss, labels()),
    "soft": (SoftTargetCrossEntropy(), labels(soft=True)),
    "BCE": (Multilabel(["map"]).loss, bits()),
    "weighted BCE": (Multilabel(["map"], torch.rand(2, C)).loss, bits()),
    **{f"regression, {kind}": (Regression(["mae"], kind, [0.0] * C, [1.0] * C).loss, numbers())
       for kind in ("l1", "l2", "huber")},
    "segmentation": (pixel_loss, pixel_labels()),
    "heads of several rates": (HeadLosses(Classification().loss), labels()),
}  # fmt: skip


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_loss_of_labels_is_that_of_fp64(name):
    criterion, targets = SUPERVISED[name]
    shape = {"segmentation": (4, C, 16, 16), "heads of several rates": (3, B, C)}.get(name, (B, C))
    torch.manual_seed(0)
    outputs, found, gradients = (3 * torch.randn(shape)).bfloat16(), [], []

    def recorded(*args):
        found.append(criterion(*args))
        return found[-1]

    model = Outputs(outputs)
    model.outputs.register_hook(gradients.append)
    data = Batches([Batch(torch.zeros(len(targets), 3, 4, 4), targets)])
    batch_loss = partial(engine_finetune.loss, criterion=recorded, normalize=nn.Identity())
    train_epoch(batch_loss, model, data, torch.optim.SGD(model.parameters(), lr=0.0), precision=Precision("bf16", CPU))
    exact = outputs.double().requires_grad_()
    is_exact = targets.double() if targets.is_floating_point() else targets
    loss = criterion(exact, is_exact)
    loss.backward()
    assert_exact(found[0], gradients[0], loss, exact.grad)


def built(kind=MaskedAutoencoderViT, **arguments):
    flags = {"model": "mae_vit_mini_patch4", "input_size": 16, "in_chans": 3}
    run = parse(main_pretrain, data_path="unused", **flags, **arguments)
    return mae.build.autoencoder(run.model, run.images, kind)


def teacher(distance, tmp_path):
    model = get_model("vit_mini_patch4", input_size=16, nb_classes=0, global_pool=False)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "teacher.pth")
    given = f"teacher={tmp_path / 'teacher.pth'} distance={distance} class_token=true"
    student = of_class(frozen_teacher.FrozenTeacher, model_args=given)
    features = F.layer_norm(torch.randn(8, 17, 128), (128,))
    student.features = student.target = lambda imgs, **context: features.to(imgs)  # the loss alone
    return student


def of_class(kind, **arguments):
    return built(kind, model_class=f"{kind.__module__}:{kind.__qualname__}", **arguments)


def crops(tmp_path):
    model = of_class(two_crops.TwoCrops)
    model.decoder_head = nn.Identity()  # the loss alone
    return model


PRETRAINING = {
    "pixels": lambda _: built(),
    "norm_pix_loss": lambda _: built(norm_pix_loss=True),
    "uniformity": lambda _: built(uniformity=0.5),
    "complementary_masks": lambda _: of_class(complementary_masks.ComplementaryMasks),
    "cross_decoder": lambda _: of_class(cross_decoder.CrossDecoder),
    "fused_blocks": lambda _: of_class(fused_blocks.FusedBlocks, model_args="hidden=0.5"),
    "hog_target": lambda _: of_class(hog_target.HOGTarget),
    "random_projection": lambda _: of_class(random_projection.RandomProjection),
    "two_crops": crops,
    **{f"frozen_teacher, {distance}": partial(teacher, distance) for distance in frozen_teacher.DISTANCES},
}


@pytest.mark.parametrize(
    ("name", "valid"), [*((name, False) for name in PRETRAINING), ("pixels", True), ("norm_pix_loss", True)]
)
def test_a_loss_of_pre_training_is_that_of_fp64(name, valid, tmp_path):
    """The outputs of encoder (fp32) and decoder (bf16) are constants."""
    torch.manual_seed(0)
    model = PRETRAINING[name](tmp_path).train()
    count, width = 8 * getattr(model, "parts", 1), model.decoder_pred.out_features
    # Class tokens that are alike, and pairs of crops.
    latent = torch.randn(1, 1, 128) + 0.2 * torch.randn(count // 2, 1, 128).repeat_interleave(2, dim=0)
    latent = latent + 0.2 * torch.randn(count, 5, 128)
    tokens = 17 if name.startswith("frozen_teacher") else 16
    pred = torch.randn(count, tokens, width).bfloat16()
    imgs, noise, context = torch.randn(8, 3, 16, 16), torch.rand(8, 16), {}
    if valid:
        context["valid"] = torch.rand(8, 16, 16) > 0.2
    results = []
    for of_latent, of_pred in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        own = copy.deepcopy(model).to(of_latent)
        ours = [leaf.detach().to(dtype, copy=True).requires_grad_()
                for leaf, dtype in ((latent, of_latent), (pred, of_pred))]  # fmt: skip
        own.forward_encoder = fixed_encoder(own, ours[0])
        own.forward_decoder = lambda *args, prediction=ours[1], **rest: prediction
        with torch.autocast("cpu", torch.bfloat16, enabled=of_pred == torch.bfloat16):
            loss = own(imgs.to(of_latent), noise=noise.to(of_latent), **context)[0]
            loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        results.append((loss, [leaf.grad for leaf in ours]))
    (found, gradients), (exact, expected) = results
    for gradient, other in zip(gradients, expected, strict=True):
        if other is not None:
            assert_exact(found, gradient, exact, other)


def fixed_encoder(model, latent):
    """The masks of a model, and a constant latent."""

    def forward_encoder(imgs, mask_ratio, **context):
        tokens = torch.zeros(len(imgs), 16, 1)
        _, mask, ids_restore = model.random_masking(tokens, mask_ratio, **context)
        return latent, mask.to(imgs), ids_restore

    return forward_encoder


def test_the_uniformity_of_features_is_that_of_fp64():
    torch.manual_seed(0)
    features = 0.03 * torch.randn(64, 128) + torch.randn(1, 128)
    leaf, exact = features.clone().requires_grad_(), features.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = uniformity(leaf)
    loss.backward()
    uniformity(exact).backward()
    assert_exact(loss, leaf.grad, uniformity(exact), exact.grad)
