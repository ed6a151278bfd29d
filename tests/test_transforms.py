"""Statistics, crops and normalization."""

import itertools
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_jpeg import photographs
from timm.data import auto_augment, create_transform
from torchvision import transforms as tv

import main_finetune
import main_linprobe
import main_pretrain
from util.cli import entry_point
from util.data import crops, transforms
from util.data.transforms import IMAGENET_MEAN


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "resized"), [(32, 32), (112, 128), (224, 256), (256, 256)])
def test_the_evaluation_transform_equals_torchvisions(photo, size, resized):
    oracle = tv.Compose(
        [tv.Resize(resized, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(size), tv.PILToTensor()]
    )
    assert torch.equal(transforms.eval_transform(size)(photo), oracle(photo))


@pytest.mark.parametrize(("size", "share"), [((32, 48), 1), ((48, 160), 1), ((128, 112), 0.875), ((256, 240), 0.875)])
def test_rectangular_evaluation_covers(photo, size, share):
    out = transforms.eval_transform(size)(photo)
    assert out.shape == (3, *size)
    covered = (int(size[0] / share), int(size[1] / share))
    factor = max(covered[0] / 50, covered[1] / 70)
    resized = photo.resize((max(covered[1], round(70 * factor)), max(covered[0], round(50 * factor))), Image.BICUBIC)
    left, top = (resized.width - size[1]) / 2, (resized.height - size[0]) / 2
    expected = resized.crop((round(left), round(top), round(left) + size[1], round(top) + size[0]))
    assert torch.equal(out, tv.functional.pil_to_tensor(expected))
    white = transforms.eval_transform(size)(Image.new("RGB", (70, 50), "white"))
    assert (white == 255).all()


def test_crop_pct_1_evaluates_the_full_image(photo):
    square = photo.crop((0, 0, 50, 50))
    assert torch.equal(transforms.eval_transform(50, crop_pct=1)(square), tv.functional.pil_to_tensor(square))
    assert transforms.eval_transform((16, 24), crop_pct=1)(photo).shape == (3, 16, 24)


def test_a_strip_is_cropped_before_it_is_scaled():
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(2, 60_000), dtype=np.uint8))
    out = transforms.eval_transform(224)(strip)  # 15 gigabytes if the strip were scaled before the crop
    middle = strip.crop((29_990, 0, 30_010, 2)).resize((2560, 256), Image.BICUBIC)
    assert torch.equal(out, tv.functional.pil_to_tensor(tv.functional.center_crop(middle, 224)))


def test_pretraining_crops_the_published_share(photo):
    wide = Image.fromarray(np.tile(np.arange(0, 256, dtype=np.uint8), (256, 1)))
    transform, spans = transforms.pretrain_transform(64), []
    for _ in range(300):
        row = transform(wide)[0, 32].float()
        spans.append((row.max() - row.min()).item() / 255)
    assert 0.35 < min(spans) < 0.5  # sqrt(.2) of the side, narrower with a tall ratio
    assert max(spans) > 0.95
    out = transforms.pretrain_transform((16, 24))(photo)
    assert out.dtype == torch.uint8
    assert out.shape == (3, 16, 24)


def test_pretraining_crops_equal_torchvisions(photo):
    scale, bicubic = (0.2, 1.0), tv.InterpolationMode.BICUBIC
    oracle = tv.Compose(
        [tv.RandomResizedCrop(24, scale, interpolation=bicubic), tv.RandomHorizontalFlip(0.5), tv.PILToTensor()]
    )
    for seed in range(10):
        results = []
        for transform in (transforms.pretrain_transform(24), oracle):
            torch.manual_seed(seed)
            results.append(transform(photo))
        assert torch.equal(*results)


def test_flip_and_crop_can_be_turned_off(photo):
    plain = transforms.pretrain_transform(50, crop_scale=(1, 1), hflip=0)
    square = photo.crop((0, 0, 50, 50))
    assert torch.equal(plain(square), tv.functional.pil_to_tensor(square))
    flipped = transforms.pretrain_transform(50, crop_scale=(1, 1), hflip=1)(square)
    assert torch.equal(flipped.flip(-1), tv.functional.pil_to_tensor(square))
    with pytest.raises(ValueError, match=r"--crop_scale 0.5 0.2"):
        transforms.pretrain_transform(50, crop_scale=(0.5, 0.2))


AUGMENTATIONS = {
    "pre-training": lambda size, **options: transforms.pretrain_transform(size, **options),
    "fine-tuning": lambda size, **options: transforms.finetune_transform(size, [0.5] * 2, **options),
    "probe": lambda size, **options: transforms.probe_transform(size, **options),
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


@pytest.mark.parametrize("size", [(1024, 128), (128, 1024), (224, 448), (1, 200), (64, 16), (96, 96)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_crops_have_the_aspect_ratio_of_the_input(name, size):
    """A picture with the aspect ratio of the input: all of it can be seen, and it is distorted by 3/4 to 4/3."""
    torch.manual_seed(0)
    random.seed(0)
    height, width = size
    picture, transform = coordinates(height, width), AUGMENTATIONS[name](size)
    areas, ratios = [], []
    for _ in range(60):
        out = transform(picture)
        assert out.shape == (2, *size)
        rows, columns = region(out)
        areas.append(rows * columns / (height * width))
        ratios.append((columns / width) / (rows / height))
    assert max(areas) > 0.75
    if height > 1:
        assert min(areas) > 0.05
        assert 0.7 < min(ratios) < 0.85
        assert 1.15 < max(ratios) < 1.4
    assert np.std(areas) > 0.1  # crops, not the whole picture


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_crops_of_pictures_with_another_aspect_ratio_than_the_input(name):
    """A square photograph for an input of 64 x 16 pixels: never stretched by more than 4/3."""
    torch.manual_seed(0)
    random.seed(0)
    transform = AUGMENTATIONS[name]((64, 16))
    for _ in range(60):
        rows, columns = region(transform(coordinates(80, 80)))
        assert 0.68 < (columns / 16) / (rows / 64) < 1.45


def test_the_range_of_aspect_ratios_is_a_setting():
    for ratio in ((1, 1), (2, 2)):
        transform = transforms.pretrain_transform((64, 128), (0.3, 0.4), crop_ratio=ratio)
        for _ in range(20):
            rows, columns = region(transform(coordinates(128, 256)))
            assert (columns / 128) / (rows / 64) == pytest.approx(ratio[0], rel=0.06)
    with pytest.raises(ValueError, match=r"--crop_ratio 2 1"):
        transforms.pretrain_transform(32, crop_ratio=(2, 1))


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "evaluation"])
def test_without_a_crop_the_whole_image_is_the_input(name):
    make = {**AUGMENTATIONS, "evaluation": lambda size, crop: transforms.eval_transform(size, crop=crop)}[name]
    for size in ((1024, 128), (1, 200), (32, 32)):
        picture = torch.rand(2, *size)
        out = make(size, crop="none")(picture)
        assert torch.equal(out, picture) or torch.equal(out, picture.flip(-1))
    out = make((64, 16), crop="none")(coordinates(100, 100))
    assert region(out) == pytest.approx([100, 100], rel=0.02)


def test_evaluation_sees_the_center_undistorted():
    for size, share in (((1024, 128), 0.875), ((64, 16), 1), ((1, 200), 1), ((128, 256), 0.875)):
        out = transforms.eval_transform(size)(coordinates(*size))
        rows, columns = region(out)
        assert columns == pytest.approx(share * size[1], rel=0.02)
        assert size[0] == 1 or rows == pytest.approx(share * size[0], rel=0.02)
        middle = out[1, size[0] // 2].mean().item()
        assert middle == pytest.approx(size[1] / 2, abs=1)


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
    script.main(entry_point.parse(script.get_args_parser(), list(map(str, argv))))
    hook.remove()
    return images


@pytest.mark.parametrize("size", [(1024, 128), (224, 448), (1, 200), (96, 96)])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_read_undistorted_crops_from_files(script, size, tmp_path):
    """Files with the coordinates of their pixels and 1 if they are for training, in folders and in a tar file."""
    height, width = size
    for split, label in itertools.product(("train", "val"), "ab"):
        (tmp_path / "data" / split / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.cat([coordinates(*size), torch.full((1, *size), float(split == "train"))])
        for number in range(8 if split == "train" else 1):
            np.save(tmp_path / "data" / split / label / f"{number}.npy", pixels.numpy())
    data = tmp_path / "data"
    if script is main_pretrain:
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            archive.add(data / "train", "train")
        data = tmp_path / "data.tar"
    flags = ["--in_chans", 3, "--mean", 0, 0, 0, "--std", 1, 1, 1, "--lr", 0]
    images = inputs_of(script, data, size, tmp_path / "run", *flags, "--epochs", 4)
    train, val = ([image[:2] for image in images if image[2].mean().round() == part] for part in (1, 0))
    areas, ratios = [], []
    for image in train:
        rows, columns = region(image)
        areas.append(rows * columns / (height * width))
        ratios.append((columns / width) / (rows / height))
    assert (len(train), bool(val)) == (64, script is not main_pretrain)
    assert max(areas) > 0.7
    assert np.std(areas) > 0.1
    assert height == 1 or 0.7 < min(ratios) < max(ratios) < 1.4
    share = 0.875 if min(size) >= 112 else 1
    for image in val:
        rows, columns = region(image)
        assert columns == pytest.approx(share * width, rel=0.02)
        assert height == 1 or rows == pytest.approx(share * height, rel=0.02)
    for image in inputs_of(script, data, size, tmp_path / "whole", *flags, "--epochs", 1, "--crop", "none"):
        assert torch.equal(image[:2], coordinates(*size)) or torch.equal(image[:2], coordinates(*size).flip(-1))


@pytest.mark.parametrize(
    ("size", "flags"),
    [((32, 96), []), ((96, 32), ["--crop", "none"]), ((48, 48), ["--vflip", 0.5, "--rotate90"])],
    ids=["random", "none", "turned"],
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_fast_decoder_changes_no_pixel(script, size, flags, tmp_path):
    if script is main_linprobe and "--vflip" in flags:
        pytest.skip("probes have no such flags")
    for split in ("train", "val"):
        for number, picture in enumerate(photographs()[:2] * 2):
            folder = tmp_path / "data" / split / f"kind{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            left, top = 30 * number, 20 * number
            picture.convert("RGB").crop((left, top, left + 90, top + 60)).save(folder / f"{number}.jpg", quality=90)
    plain, fast = (
        inputs_of(script, tmp_path / "data", size, tmp_path / str(len(fast)), *flags, *fast, "--epochs", 3)
        for fast in ([], ["--fast_jpeg"])
    )
    assert len(plain) == len(fast) >= 12
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, fast, strict=True))


def test_vertical_flips_and_rotations_of_images_without_an_upper_side(photo):
    square = photo.crop((0, 0, 48, 48))
    pixels = tv.functional.pil_to_tensor(square)
    options = {"crop": "none", "hflip": 0}
    for make in (
        transforms.pretrain_transform,
        lambda size, **options: transforms.finetune_transform(size, [0.5] * 3, **options),
    ):
        assert torch.equal(make(48, **options, vflip=1)(square), pixels.flip(-2))
        found = {tuple(make(48, **options, rotate90=True)(square).flatten()[:200].tolist()) for _ in range(40)}
        assert found == {tuple(pixels.rot90(k, (1, 2)).flatten()[:200].tolist()) for k in range(4)}
    with pytest.raises(ValueError, match="--rotate90: --input_size 32 48"):
        transforms.pretrain_transform((32, 48), rotate90=True)


def test_normalize_and_back():
    mean, std = transforms.channel_statistics(3)
    assert mean == [0.485, 0.456, 0.406]
    assert std == [0.229, 0.224, 0.225]
    normalize = transforms.Normalize(mean, std)
    imgs = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    oracle = tv.Normalize(mean, std)(imgs.float() / 255)
    torch.testing.assert_close(normalize(imgs), oracle)
    torch.testing.assert_close(normalize.inverse(normalize(imgs)), imgs.float() / 255)


def test_statistics_in_0_to_255_are_errors():
    normalize = transforms.Normalize([123.7], [58.4])
    with pytest.raises(ValueError, match=r"--mean 123\.7: "):
        normalize(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert normalize(torch.full((1, 1, 2, 2), 123.7)).abs().max() < 1e-6  # a float image has its own range
    assert normalize.inverse(normalize(torch.full((1, 1, 2, 2), 123.7))).mean() == pytest.approx(0.5)


def test_statistics_of_other_channel_counts():
    mean, std = transforms.channel_statistics(5)
    assert mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 5)
    assert std == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 5)
    assert transforms.channel_statistics(2, [0.1, 0.2], [1, 2]) == ([0.1, 0.2], [1, 2])
    with pytest.raises(ValueError, match=r"--mean has 2 values for 3 channels.*--in_chans 2"):
        transforms.channel_statistics(3, [0.1, 0.2])
    with pytest.raises(ValueError, match=r"--std .*3 .*2 channels"):
        transforms.channel_statistics(2, [0.1, 0.2], [1, 1, 1])


# ------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_finetune_transform_equals_timms(photo, mode):
    """With equal seeds, the pixels equal those of timm's transform without normalization."""
    photo = photo.convert(mode)
    mean = IMAGENET_MEAN if mode == "RGB" else (0.5,)
    transform_ours = transforms.finetune_transform(32, mean, "rand-m9-mstd0.5-inc1")
    transform_timm = create_transform(
        (len(mean), 32, 32), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=mean,
        normalize=False,
    )  # fmt: skip
    means = set()
    for seed in range(40):
        results = []
        for transform in (transform_ours, transform_timm):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            results.append(transform(photo))
        assert torch.equal(results[0], results[1])
        assert results[0].shape == (len(mean), 32, 32)
        means.add(results[0].float().mean().item())
    assert len(means) == 40


def test_posterizing_to_no_bits_leaves_black(photo):
    """Pillow rejects 0 bits, which rand-m9-mstd0.5-inc1 samples for about one picture in several hundred."""
    transform = transforms.finetune_transform(8, IMAGENET_MEAN, "rand-m10-n4-mstd1.5-inc1")
    op = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    assert not np.asarray(op(photo, 0)).any()
    assert np.array_equal(op(photo, 8), photo)
    assert np.array_equal(op(photo, 3), np.asarray(photo) & 0b11100000)
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        assert transform(photo).shape == (3, 8, 8)


def test_finetune_transform_without_policy_takes_any_image():
    transform = transforms.finetune_transform((16, 24), [0.5] * 5, "none")
    assert transform(torch.rand(5, 40, 50)).shape == (5, 16, 24)
    with pytest.raises(ValueError, match=r"--aa .*--color_jitter .*give --aa none"):
        transforms.finetune_transform(16, [0.5] * 5, "rand-m9")(torch.rand(5, 40, 50))
    with pytest.raises(ValueError, match="--aa abc"):
        transforms.finetune_transform(16, IMAGENET_MEAN, "abc")


def test_probe_crop_uses_its_first_random_numbers(photo):
    """Area and ratio are the published ones, rounded and clipped to the picture. The first sample is used."""
    crop = crops.CropOnce(16, scale=(0.08, 1.0))
    areas, ratios = [], []
    for seed in range(2000):
        random.seed(seed)
        top, left, height, width = crop.get_params(photo, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= 50 - height
        assert 0 <= left <= 70 - width
        random.seed(seed)
        area = 3500 * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        assert height == min(round((area / ratio) ** 0.5), 50)
        assert width == min(round((area * ratio) ** 0.5), 70)
        areas.append(area / 3500)
        ratios.append(np.log(ratio))
    assert np.mean(areas) == pytest.approx(0.54, abs=0.02)
    assert np.mean(ratios) == pytest.approx(0, abs=0.02)
    assert transforms.probe_transform((16, 24))(photo).shape == (3, 16, 24)


@pytest.mark.parametrize(
    "transform",
    [transforms.pretrain_transform(16), transforms.eval_transform((16, 24)), transforms.probe_transform(16),
     transforms.finetune_transform(16, IMAGENET_MEAN, "rand-m9-mstd0.5-inc1"), transforms.to_tensor],
)  # fmt: skip
def test_transforms_can_be_pickled_for_spawned_workers(transform, photo):
    copy = pickle.loads(pickle.dumps(transform))
    results = []
    for function in (transform, copy):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        results.append(function(photo))
    assert torch.equal(*results)


def test_small_pictures_in_memory_are_scaled_as_by_pillow():
    """Bit for bit, for gray and color, noise and black and white, enlarged and reduced."""
    generator = np.random.default_rng(0)
    for number in range(600):
        height, width, *size = generator.integers(1, 65, 4).tolist()
        pixels = generator.integers(0, 256, (height, width, (1, 3)[number % 2]), dtype=np.uint8)
        if number % 3 == 0:
            pixels = 255 * (pixels > 127).astype(np.uint8)
        expected = Image.fromarray(pixels.squeeze(2) if number % 2 == 0 else pixels)
        expected = np.asarray(expected.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, -1)
        found = crops.scale(torch.from_numpy(pixels).permute(2, 0, 1), *size).permute(1, 2, 0)
        assert np.array_equal(found.numpy(), expected)
