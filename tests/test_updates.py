"""Two updates of a script equal those of its formulas: crops, masks, normalization, loss, rates, optimizer.

The weights before the first update are those of a run with a learning rate of 0. A batch is the complete training set.
"""

import math
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from mains import lines, weights
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F
from torchvision import transforms as tv

import main_finetune
import main_linprobe
from mae.data.sampler import EpochBatches
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
BICUBIC = tv.InterpolationMode.BICUBIC


def seed(*position: int) -> None:
    """Seeds all generators for a sample of (seed, epoch, index), or a batch of (seed, epoch, iteration, rank)."""
    key = zlib.crc32(struct.pack(f"<{len(position)}q", *position))
    torch.manual_seed(key), random.seed(key), np.random.seed(key)


def batch_of(folder, transform, epoch, *, run_seed=0, num_noise=0, mode="RGB"):
    """The images (uint8), labels and noise of all training images, in the order of their names."""
    files = sorted((folder / "train").glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    images, noise = [], []
    for index, file in enumerate(files):
        seed(run_seed, epoch, index)
        noise.append(torch.rand(num_noise))  # before the augmentation
        images.append(transform(Image.open(file).convert(mode)))
    return torch.stack(images), torch.tensor([classes.index(file.parent.name) for file in files]), torch.stack(noise)


def normalized(images, statistics=IMAGENET):
    return tv.functional.normalize(images / 255, *statistics)


def rate(epoch, epochs, lr, min_lr):
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def assert_updates(model, losses, start, result, *, scales, lr, min_lr, betas, weight_decay, clip_grad=None):
    """Checks the weights after one update per epoch with the gradients of `losses`, functions of the epoch.

    Args:
        scales: the factor of the rate of each parameter, and whether it has weight decay.
    """
    model.load_state_dict(start)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [{"params": [parameter], "weight_decay": weight_decay * scales[name][1]}
              for name, parameter in named.items()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=betas)
    certain = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in named.items()}
    values = []
    for epoch in range(2):
        optimizer.zero_grad()
        values.append(losses(epoch))
        values[-1].backward()
        if clip_grad:
            assert torch.nn.utils.clip_grad_norm_(named.values(), clip_grad) > clip_grad
        for group, name in zip(optimizer.param_groups, named, strict=True):
            group["lr"] = rate(epoch, 2, lr, min_lr) * scales[name][0]
            certain[name] &= named[name].grad.abs() > 1e-5  # the sign of others depends on rounding
        optimizer.step()
    assert sum(mask.float().mean() for mask in certain.values()) > 0.5 * len(certain)
    for name, parameter in named.items():
        found, expected = (value[certain[name]] for value in (result[name], parameter.detach()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * lr, msg=name)
    return [value.item() for value in values]


DEFAULTS = {"size": (16, 16), "patch": (4, 4), "scale": (0.2, 1.0), "flip": 0.5, "mode": "RGB", "statistics": IMAGENET,
            "seed": 0, "mask_ratio": 0.75, "weight_decay": 0.05, "min_lr": 0.0, "model": {}}  # fmt: skip
OTHERS = {"size": (16, 24), "patch": (8, 4), "scale": (0.3, 0.9), "flip": 1.0, "mode": "L",
          "statistics": ([0.1], [0.7]), "seed": 11, "mask_ratio": 0.6, "weight_decay": 0.3, "min_lr": 0.004,
          "clip_grad": 0.1, "model": {"in_chans": 1, "norm_pix_loss": True, "decoder_depth": 3}}  # fmt: skip
FLAGS = {"input_size": "16 24", "patch_size": "8 4", "crop_scale": "0.3 0.9", "hflip": 1.0, "in_chans": 1, "mean": 0.1,
         "std": 0.7, "seed": 11, "mask_ratio": 0.6, "weight_decay": 0.3, "min_lr": 0.004, "clip_grad": 0.1,
         "norm_pix_loss": True, "decoder_depth": 3, "batch_size": 6, "accum_iter": 4,
         "grad_checkpointing": True}  # fmt: skip


@pytest.mark.parametrize(("values", "flags"), [(DEFAULTS, {}), (OTHERS, FLAGS)], ids=["defaults", "flags"])
def test_updates_of_pretraining(pretrain, pictures, values, flags):
    flags = {"batch_size": 24, "warmup_epochs": 0, "lr": 0.01, "save_every": 1, **flags}
    start = weights(pretrain("start", **flags | {"lr": 0, "min_lr": 0, "epochs": 1}), "checkpoint-0.pth")
    out = pretrain("run", **flags)
    aspect, patch = values["size"][1] / values["size"][0], values["patch"]
    crop = tv.RandomResizedCrop(values["size"], values["scale"], (3 / 4 * aspect, 4 / 3 * aspect), BICUBIC)
    transform = tv.Compose([crop, tv.RandomHorizontalFlip(values["flip"]), tv.PILToTensor()])
    model = mae_vit_mini_patch4(img_size=values["size"], patch_size=patch, **values["model"])
    num_patches = (values["size"][0] // patch[0]) * (values["size"][1] // patch[1])

    def loss(epoch):
        images, _, noise = batch_of(pictures, transform, epoch, run_seed=values["seed"], num_noise=num_patches,
                                    mode=values["mode"])  # fmt: skip
        return model(normalized(images, values["statistics"]), values["mask_ratio"], noise=noise)[0]

    # Biases and 1-D weights have no weight decay; the class and mask tokens have it, as published.
    scales = {name: (1.0, parameter.ndim > 1) for name, parameter in model.named_parameters()}
    losses = assert_updates(model, loss, start, weights(out), scales=scales, lr=0.01, min_lr=values["min_lr"],
                            betas=(0.9, 0.95), weight_decay=values["weight_decay"],
                            clip_grad=values.get("clip_grad"))  # fmt: skip
    assert [line["train_loss"] for line in lines(out)] == pytest.approx(losses, rel=1e-4)


def layer_scales(model, layer_decay):
    """The published rule for 4 blocks: embeddings are layer 0, block i is layer i + 1, the rest is layer 5."""
    scales = {}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        layer = 0 if first in ("cls_token", "pos_embed", "patch_embed") else 5
        layer = int(name.split(".")[1]) + 1 if first == "blocks" else layer
        scales[name] = (layer_decay ** (5 - layer), parameter.ndim > 1 and first not in ("pos_embed", "cls_token"))
    return scales


def finetuned(classify, **flags):
    flags = {"batch_size": 48, "warmup_epochs": 0, "lr": 0.01, **flags}
    start = weights(classify(main_finetune, "start", **flags | {"lr": 0, "min_lr": 0, "epochs": 1}), "checkpoint-0.pth")
    return start, classify(main_finetune, **flags)


def test_updates_of_finetuning_with_all_augmentation(classify, labelled):
    """The batch is normalized, then erased, then mixed; drop path is last."""
    start, out = finetuned(classify, mixup=0.8, cutmix=1.0, drop_path=0.2, reprob=0.6, recount=3)
    model = vit_mini_patch4(img_size=16, num_classes=6, global_pool=True, drop_path_rate=0.2).train()
    transform = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=None,
                                 interpolation="bicubic", normalize=False, mean=IMAGENET[0])  # fmt: skip
    erase = RandomErasing(0.6, mode="pixel", max_count=3, device="cpu")
    mixup = Mixup(0.8, 1.0, None, 1.0, 0.5, "batch", True, 0.1, 6)

    def loss(epoch):
        images, labels, _ = batch_of(labelled, transform, epoch)
        order = EpochBatches(48, 48, 0)
        order.seek(epoch)
        indices = [index for _, index in next(iter(order))]
        seed(0, epoch, 0, 0)
        inputs, targets = mixup(erase(normalized(images[indices])), labels[indices])
        return SoftTargetCrossEntropy()(model(inputs), targets)

    losses = assert_updates(model, loss, start, weights(out), scales=layer_scales(model, 0.75), lr=0.01, min_lr=1e-6,
                            betas=(0.9, 0.999), weight_decay=0.05)  # fmt: skip
    assert [line["train_loss"] for line in lines(out)] == pytest.approx(losses, rel=1e-4)


def test_updates_of_finetuning_by_flags(classify, labelled):
    start, out = finetuned(classify, cls_token=True, aa="none", color_jitter=0.4, crop_scale="0.5 0.9", hflip=0.8,
                           smoothing=0.2, reprob=0, drop_path=0, layer_decay=0.5, weight_decay=0.2, min_lr=0.002,
                           mean="0.1 0.2 0.3", std="0.4 0.5 0.6", seed=7, batch_size=12, accum_iter=4, clip_grad=0.3,
                           input_size="16 24")  # fmt: skip
    model = vit_mini_patch4(img_size=(16, 24), num_classes=6, global_pool=False)
    crop = tv.RandomResizedCrop((16, 24), (0.5, 0.9), (9 / 8, 2), BICUBIC)
    transform = tv.Compose([crop, tv.RandomHorizontalFlip(0.8), tv.ColorJitter(0.4, 0.4, 0.4), tv.PILToTensor()])

    def loss(epoch):
        images, labels, _ = batch_of(labelled, transform, epoch, run_seed=7)
        inputs = normalized(images, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
        return F.cross_entropy(model(inputs), labels, label_smoothing=0.2)

    losses = assert_updates(model, loss, start, weights(out), scales=layer_scales(model, 0.5), lr=0.01, min_lr=0.002,
                            betas=(0.9, 0.999), weight_decay=0.2, clip_grad=0.3)  # fmt: skip
    assert [line["train_loss"] for line in lines(out)] == pytest.approx(losses, rel=1e-4)


def crop_once(picture):
    """The published crop: area uniform from .08 to 1, logarithm of the ratio uniform, clipped to the picture."""
    width, height = picture.size
    area = width * height * random.uniform(0.08, 1.0)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    cut_height, cut_width = (min(round(math.sqrt(area * r)), side) for r, side in ((1 / ratio, height), (ratio, width)))
    top, left = random.randint(0, height - cut_height), random.randint(0, width - cut_width)
    return tv.functional.resize(picture.crop((left, top, left + cut_width, top + cut_height)), [16, 16], BICUBIC)


@pytest.mark.parametrize(("weight_decay", "cached"), [(0, {}), (0.2, {"cache_features": True})])
def test_updates_of_linear_probing(classify, labelled, weight_decay, cached):
    """LARS: the rate of the weights is scaled by norms; biases have neither scaling nor weight decay.

    Stored features are those of the evaluation, without augmentation.
    """
    flags = {"batch_size": 48, "warmup_epochs": 0, "weight_decay": weight_decay, "blr": 16, "epochs": 2, **cached}
    start = weights(classify(main_linprobe, "start", **flags | {"lr": 0, "epochs": 1}), "checkpoint-0.pth")
    result = weights(classify(main_linprobe, **flags))
    encoder = vit_mini_patch4(img_size=16, num_classes=0, global_pool=False).eval()
    encoder.load_state_dict({name: value for name, value in start.items() if not name.startswith("head.")})
    center = [tv.Resize(16, BICUBIC), tv.CenterCrop(16)]
    transform = tv.Compose([*(center if cached else [crop_once, tv.RandomHorizontalFlip()]), tv.PILToTensor()])
    weight, bias = start["head.1.weight"].clone(), start["head.1.bias"].clone()
    assert (weight.std().item(), bias.abs().max().item()) == (pytest.approx(0.01, rel=0.1), 0)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(2):
        images, labels, _ = batch_of(labelled, transform, epoch)
        with torch.no_grad():
            features = F.batch_norm(encoder.forward_features(normalized(images)), None, None, training=True, eps=1e-6)
        error = ((features @ weight.T + bias).softmax(dim=1) - F.one_hot(labels, 6)) / 48
        gradient = error.T @ features + weight_decay * weight
        momentum[0] = 0.9 * momentum[0] + gradient * 0.001 * weight.norm() / gradient.norm()
        momentum[1] = 0.9 * momentum[1] + error.sum(dim=0)
        weight -= rate(epoch, 2, 16 * 48 / 256, 0) * momentum[0]
        bias -= rate(epoch, 2, 16 * 48 / 256, 0) * momentum[1]
    torch.testing.assert_close(result["head.1.weight"], weight, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result["head.1.bias"], bias, rtol=1e-3, atol=1e-6)
    assert [name for name in encoder.state_dict() if not torch.equal(result[name], start[name])] == []


def test_every_flag_of_pretraining_changes_the_training(pretrain):
    base = {"batch_size": 12, "warmup_epochs": 0}
    plain = pretrain("start", **base)
    for number, flags in enumerate([
        {"drop_path": 0.5}, {"vflip": 1}, {"rotate90": True}, {"crop_ratio": "1 1"}, {"crop": "none"},
        {"masking": "block"}, {"masking": "grid"}, {"mask_block": 2}, {"learned_pos_embed": True},
        {"num_cls_tokens": 2}, {"repeated_sampling": 2}, {"updates_per_epoch": 1}, {"amp": "bf16"}, {"blr": 0.02},
        {"warmup_epochs": 0.5}, {"start_epoch": 1}, {"batch_size": 8}, {"init_from": plain / "checkpoint-1.pth"},
    ]):  # fmt: skip
        changed = pretrain(str(number), **base | flags)
        losses = [[line["train_loss"] for line in lines(out)] for out in (plain, changed)]
        assert losses[0] != losses[1], flags
        assert len(losses[1]) == (1 if "start_epoch" in flags else 2), flags


def test_every_flag_of_finetuning_changes_the_result(classify):
    base = {"epochs": 1, "warmup_epochs": 0, "lr": 0.01, "batch_size": 24, "mixup": 0.8, "cutmix": 1.0, "reprob": 1}
    plain = lines(classify(main_finetune, **base))[0]
    for number, flags in enumerate([
        {"vflip": 1}, {"rotate90": True}, {"crop_ratio": "1 1"}, {"crop": "none"}, {"remode": "const"},
        {"mixup_prob": 0}, {"mixup_switch_prob": 0}, {"mixup_mode": "elem"}, {"cutmix_minmax": "0.1 0.2"},
        {"amp": "bf16"}, {"unfreeze_blocks": 0}, {"num_cls_tokens": 2}, {"crop_pct": 0.5}, {"train_per_class": 4},
    ]):  # fmt: skip
        other = lines(classify(main_finetune, str(number), **base | flags))[0]
        assert plain["test_loss"] != other["test_loss"], flags
        assert (plain["train_loss"] == other["train_loss"]) == ("crop_pct" in flags), flags
