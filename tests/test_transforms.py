"""Statistics, crops and normalization."""

import itertools
import pickle
import random
import tarfile
from functools import partial

import augmentations
import numpy as np
import pytest
import torch
from mains import call
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms as tv

import main_finetune
import main_linprobe
import main_pretrain
from mae.data import transforms
from mae.data.decode import decode
from mae.data.transforms import IMAGENET_MEAN

BICUBIC = tv.InterpolationMode.BICUBIC


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(50, 70, 3), dtype=np.uint8))


def seeded(functions, picture, seed):
    """The results of transforms with equal random numbers."""
    results = []
    for function in functions:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        results.append(function(picture))
    return results


@pytest.mark.parametrize(("size", "resized"), [(32, 32), (112, 128), (224, 256), (256, 256)])
def test_the_evaluation_transform_equals_torchvisions(photo, size, resized):
    oracle = tv.Compose([tv.Resize(resized, interpolation=BICUBIC), tv.CenterCrop(size), tv.PILToTensor()])
    assert torch.equal(augmentations.eval_transform(size)(photo), oracle(photo))


@pytest.mark.parametrize(("size", "share"), [((32, 48), 1), ((48, 160), 1), ((128, 112), 0.875), ((256, 240), 0.875)])
def test_rectangular_evaluation_covers(photo, size, share):
    covered = (int(size[0] / share), int(size[1] / share))
    factor = max(covered[0] / 50, covered[1] / 70)
    resized = photo.resize((max(covered[1], round(70 * factor)), max(covered[0], round(50 * factor))), Image.BICUBIC)
    left, top = round((resized.width - size[1]) / 2), round((resized.height - size[0]) / 2)
    expected = resized.crop((left, top, left + size[1], top + size[0]))
    assert torch.equal(augmentations.eval_transform(size)(photo), tv.functional.pil_to_tensor(expected))


def test_a_strip_is_cropped_before_it_is_scaled():
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(2, 60_000), dtype=np.uint8))
    out = augmentations.eval_transform(224)(strip)  # 15 gigabytes if the strip were scaled before the crop
    middle = strip.crop((29_990, 0, 30_010, 2)).resize((2560, 256), Image.BICUBIC)
    assert torch.equal(out, tv.functional.pil_to_tensor(tv.functional.center_crop(middle, 224)))


def test_flip_and_crop_can_be_turned_off(photo):
    square = photo.crop((0, 0, 50, 50))
    pixels = tv.functional.pil_to_tensor(square)
    assert torch.equal(augmentations.eval_transform(50, crop_pct=1)(square), pixels)
    for hflip, expected in ((0, pixels), (1, pixels.flip(-1))):
        assert torch.equal(augmentations.pretrain_transform(50, crop_scale=(1, 1), hflip=hflip)(square), expected)
    with pytest.raises(ValueError, match=r"crop_scale=\[0.5, 0.2\]"):
        augmentations.pretrain_transform(50, crop_scale=(0.5, 0.2))


AUGMENTATIONS = {
    "pre-training": lambda size, **options: augmentations.pretrain_transform(size, **options),
    "fine-tuning": lambda size, **options: augmentations.finetune_transform(size, [0.5] * 2, **options),
    "probe": lambda size, **options: augmentations.probe_transform(size, **options),
}


def coordinates(height, width):
    """A float picture (2, height, width): each pixel contains its row and its column."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([rows, columns])


def region(out, inner=0.2):
    """The height and width of the part of the picture that an output shows, in pixels, from its linear inner part."""
    spans = []
    for channel, dim in ((out[0], 0), (out[1], 1)):
        side = channel.shape[dim]
        if side == 1:
            spans.append(1.0)
            continue
        line = channel.mean(1 - dim)
        first, last = int(side * inner), side - 1 - int(side * inner)
        spans.append(abs((line[last] - line[first]).item()) / (last - first) * side)
    return spans


def areas_and_ratios(outputs, height, width):
    """The share of a picture (height, width) that each crop shows, and its distortion."""
    regions = np.array([region(out) for out in outputs])
    return regions.prod(axis=1) / (height * width), (regions[:, 1] / width) / (regions[:, 0] / height)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_crops_of_pictures_with_another_aspect_ratio_than_the_input(name):
    """A square photograph for an input of 64 x 16 pixels: never stretched by more than 4/3."""
    transform, picture = AUGMENTATIONS[name]((64, 16)), coordinates(80, 80)
    _, ratios = areas_and_ratios([transform(picture) for _ in range(60)], 64, 16)
    assert 0.68 < min(ratios) < max(ratios) < 1.45


def test_the_range_of_aspect_ratios_is_a_setting():
    for ratio in (1, 2):
        transform = augmentations.pretrain_transform((64, 128), (0.3, 0.4), crop_ratio=(ratio, ratio))
        _, ratios = areas_and_ratios([transform(coordinates(128, 256)) for _ in range(20)], 64, 128)
        assert ratios == pytest.approx(ratio, rel=0.06)
    with pytest.raises(ValueError, match=r"crop_ratio=\[2, 1\]"):
        augmentations.pretrain_transform(32, crop_ratio=(2, 1))


@pytest.mark.parametrize("make", [*AUGMENTATIONS.values(), augmentations.eval_transform])
def test_without_a_crop_the_whole_image_is_the_input(make):
    for size in ((1024, 128), (1, 200), (32, 32)):
        picture = torch.rand(2, *size)
        out = make(size, crop="none")(picture)
        assert torch.equal(out, picture) or torch.equal(out, picture.flip(-1))
    assert region(make((64, 16), crop="none")(coordinates(100, 100))) == pytest.approx([100, 100], rel=0.02)


SCRIPTS = {main_pretrain: ["--model", "mae_vit_mini_patch4", "--vis_every", 0],
           main_finetune: ["--model", "vit_mini_patch4", "--aa", "none", "--reprob", 0],
           main_linprobe: ["--model", "vit_mini_patch4"]}  # fmt: skip


def inputs_of(script, data, size, output_dir, *flags):
    """The normalized images of a training with its evaluations, in the order in which the model receives them."""
    images, patch = [], [max(1, side // 8) for side in size]

    def record(module, args, result):
        if isinstance(module, transforms.Normalize):
            images.extend(result)

    argv = [*SCRIPTS[script], "--data_path", data, "--output_dir", output_dir, "--input_size", *size, "--patch_size",
            *patch, "--batch_size", 4, "--num_workers", 0, "--device", "cpu", "--warmup_epochs", 0, *flags]  # fmt: skip
    hook = torch.nn.modules.module.register_module_forward_hook(record)
    call(script, *argv)
    hook.remove()
    return images


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1024, 128), (224, 448), (1, 200), (96, 96)])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_read_undistorted_crops_from_files(script, size, tmp_path):
    """Files with the coordinates of their pixels and 1 if they are for training, in folders and in a tar file.

    All of a picture can be seen, and it is distorted by 3/4 to 4/3."""
    height, width = size
    data = tmp_path / "data"
    for split, label in itertools.product(("train", "val"), "ab"):
        (data / split / label).mkdir(parents=True)
        pixels = torch.cat([coordinates(*size), torch.full((1, *size), float(split == "train"))])
        for number in range(8 if split == "train" else 1):
            np.save(data / split / label / f"{number}.npy", pixels.numpy())
    if script is main_pretrain:
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            archive.add(data / "train", "train")
        data = tmp_path / "data.tar"
    flags = ["--in_chans", 3, "--mean", 0, 0, 0, "--std", 1, 1, 1, "--lr", 0]
    images = inputs_of(script, data, size, tmp_path / "run", *flags, "--epochs", 4)
    train, val = ([image[:2] for image in images if image[2].mean().round() == part] for part in (1, 0))
    of_share = 16 if script is main_pretrain else 0  # for the share of the variance that is explained
    assert (len(train), bool(val)) == (64 + of_share, script is not main_pretrain)
    areas, ratios = areas_and_ratios(train, height, width)
    assert max(areas) > 0.7
    assert np.std(areas) > 0.1  # crops, not the whole picture
    assert height == 1 or (min(areas) > 0.05 and 0.7 < min(ratios) < 0.85 and 1.15 < max(ratios) < 1.4)
    share = 0.875 if min(size) >= 112 else 1
    for image in val:
        assert region(image) == pytest.approx([max(1, share * height), share * width], rel=0.02)
    for image in inputs_of(script, data, size, tmp_path / "whole", *flags, "--epochs", 1, "--crop", "none"):
        assert torch.equal(image[:2], coordinates(*size)) or torch.equal(image[:2], coordinates(*size).flip(-1))


def test_vertical_flips_and_rotations_of_images_without_an_upper_side(photo):
    square = photo.crop((0, 0, 48, 48))
    pixels = tv.functional.pil_to_tensor(square)
    for name in ("pre-training", "fine-tuning"):
        make = partial(AUGMENTATIONS[name], 48, crop="none", hflip=0)
        assert torch.equal(make(vflip=1)(square), pixels.flip(-2))
        found = {tuple(make(rotate90=True)(square).flatten()[:200].tolist()) for _ in range(40)}
        assert found == {tuple(pixels.rot90(k, (1, 2)).flatten()[:200].tolist()) for k in range(4)}
    with pytest.raises(ValueError, match=r"`rotate90`: input_size=\[32, 48\]"):
        augmentations.pretrain_transform((32, 48), rotate90=True)


def test_normalize_and_back():
    mean, std = transforms.channel_statistics(3)
    assert (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    normalize, imgs = transforms.Normalize(mean, std), torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(normalize(imgs), tv.Normalize(mean, std)(imgs.float() / 255))
    torch.testing.assert_close(normalize.inverse(normalize(imgs)), imgs.float() / 255)


def test_statistics_in_0_to_255_are_errors():
    normalize = transforms.Normalize([123.7], [58.4])
    with pytest.raises(ValueError, match=r"mean=\[123\.7\]: "):
        normalize(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert normalize(torch.full((1, 1, 2, 2), 123.7)).abs().max() < 1e-6  # a float image has its own range
    assert normalize.inverse(normalize(torch.full((1, 1, 2, 2), 123.7))).mean() == pytest.approx(0.5)


def test_statistics_of_other_channel_counts():
    mean, std = transforms.channel_statistics(5)
    assert mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 5)
    assert std == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 5)
    assert transforms.channel_statistics(2, [0.1, 0.2], [1, 2]) == ([0.1, 0.2], [1, 2])
    for wrong, message in (((3, [0.1, 0.2]), "`mean`"),
                           ((2, [0.1, 0.2], [1, 1, 1]), "`std`")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            transforms.channel_statistics(*wrong)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_finetune_transform_equals_timms(photo, mode):
    """With equal seeds, the pixels equal those of timm's transform without normalization."""
    photo, mean = photo.convert(mode), IMAGENET_MEAN if mode == "RGB" else (0.5,)
    policy = "rand-m9-mstd0.5-inc1"
    oracle = create_transform((len(mean), 32, 32), is_training=True, auto_augment=policy, interpolation="bicubic",
                              mean=mean, normalize=False)  # fmt: skip
    means = set()
    for seed in range(40):
        results = seeded((augmentations.finetune_transform(32, mean, policy), oracle), photo, seed)
        assert torch.equal(*results)
        assert results[0].shape == (len(mean), 32, 32)
        means.add(results[0].float().mean().item())
    assert len(means) == 40


def test_posterizing_to_no_bits_leaves_black(photo):
    """Pillow rejects 0 bits, which rand-m9-mstd0.5-inc1 samples for about one picture in several hundred."""
    transform = augmentations.finetune_transform(8, IMAGENET_MEAN, "rand-m10-n4-mstd1.5-inc1")
    op = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    assert not np.asarray(op(photo, 0)).any()
    assert np.array_equal(op(photo, 8), photo)
    assert np.array_equal(op(photo, 3), np.asarray(photo) & 0b11100000)
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        assert transform(photo).shape == (3, 8, 8)


def test_finetune_transform_without_policy_takes_any_image():
    transform = augmentations.finetune_transform((16, 24), [0.5] * 5, "none")
    assert transform(torch.rand(5, 40, 50)).shape == (5, 16, 24)
    with pytest.raises(ValueError, match="`color_jitter`"):
        augmentations.finetune_transform(16, [0.5] * 5, "rand-m9")(torch.rand(5, 40, 50))
    with pytest.raises(ValueError, match="aa=abc"):
        augmentations.finetune_transform(16, IMAGENET_MEAN, "abc")


@pytest.mark.parametrize("transform", [
    augmentations.pretrain_transform(16), augmentations.eval_transform((16, 24)), augmentations.probe_transform(16),
    augmentations.finetune_transform(16, IMAGENET_MEAN, "rand-m9-mstd0.5-inc1"), augmentations.scaled_transform(0),
])  # fmt: skip
def test_transforms_can_be_pickled_for_spawned_workers(transform, photo):
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(*seeded((transform, copy), photo, 0))


def test_pixels_in_memory_are_scaled_as_by_pillow():
    """Bit for bit, for gray and color, noise and black and white, enlarged and reduced."""
    generator = np.random.default_rng(0)
    for number in range(60):
        height, width, *size = generator.integers(1, 65, 4).tolist()
        pixels = generator.integers(0, 256, (height, width, (1, 3)[number % 2]), dtype=np.uint8)
        if number % 3 == 0:
            pixels = 255 * (pixels > 127).astype(np.uint8)
        expected = Image.fromarray(pixels.squeeze(2) if number % 2 == 0 else pixels)
        expected = np.asarray(expected.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, -1)
        picture = decode(pixels, pixels.shape[2])
        found = augmentations.eval_transform(size, crop="none")(picture)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
