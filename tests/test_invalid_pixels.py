"""Invalid pixels: --nodata, masks of a dataset object, --min_valid and --value_range, from files to losses."""

import io
import sys

import forks
import numpy as np
import pytest
import torch
from mains import (
    argv_of,
    assert_close,
    assert_equal,
    fails,
    lines,
    open_source,
    parse,
    run_section,
    stop_and_resume,
    weights,
)
from PIL import Image
from test_decode import npy, png, saved, tiff
from torchvision import tv_tensors

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from examples.cross_decoder import CrossDecoder
from mae.checkpoints import checkpoint
from mae.data import raw_pixels
from mae.data.decode import decode, decode_item
from mae.data.item import Item
from mae.data.pixels import BadImage, PixelValues, to_tensor
from mae.data.transforms import WithValidPatches, eval_transform, pretrain_transform
from mae.inference.model import get_model
from mae.inference.reconstruct import reconstruct
from mae.recommend import check as data_check
from mae.settings import ImageSpec
from models_mae import MaskedAutoencoderViT, mae_vit_mini_patch4

CLOUDS = '''
import os
import numpy as np
KIND, HIDDEN = os.environ.get("KIND", "mask"), float(os.environ.get("HIDDEN", "7"))
class Clouds(list):
    """Bars of a color for each label, with an invalid rectangle of any values in every third image."""
    def __getitem__(self, index):
        random = np.random.default_rng(index)
        image = random.random((24, 24, 3), dtype=np.float32) / 2
        image[:, :, index % 3] += 0.5
        valid = np.ones((24, 24), bool)
        if index % 3 == 0:
            top, left = random.integers(0, 12, 2)
            valid[top : top + 10, left : left + 11] = False
        image[~valid] = {"mask": HIDDEN, "nan": np.nan, "value": -9999}[KIND]
        return {"image": image, "label": index % 3} | ({"valid": valid} if KIND == "mask" else {})
def open_dataset(split, data_path):
    return Clouds(range(32 if split == "train" else 12))
'''
FLAGS = {"mask": {}, "nan": {"nodata": "nan"}, "value": {"nodata": -9999}}
SMALL = {"input_size": 16, "num_workers": 0, "batch_size": 8, "device": "cpu", "amp": "off"}
RUN = {"epochs": 1, "warmup_epochs": 0, "blr": 0.01}
PRETRAIN = {"model": "mae_vit_mini_patch4", "vis_every": 1, "crop_scale": ".6 1", "norm_pix_loss": True}


@pytest.fixture
def clouds(tmp_path, monkeypatch):
    """Runs a script on clouds; returns its output directory, or what it returns."""
    (tmp_path / "clouds.py").write_text(CLOUDS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(name, main=main_pretrain, kind="mask", hidden=7.0, processes=0, **flags):
        flags = {**SMALL, "dataset": "py:clouds:open_dataset", **FLAGS[kind], **flags}
        flags = {name: value for name, value in flags.items() if value is not None}
        if main is not main_knn:
            flags = {"output_dir": tmp_path / name, **RUN, **(PRETRAIN if main is main_pretrain else {}), **flags}
        monkeypatch.setenv("KIND", kind)
        monkeypatch.setenv("HIDDEN", str(hidden))
        monkeypatch.delitem(sys.modules, "clouds", raising=False)
        if processes:
            forks.run("main_pretrain.py", argv_of(flags), tmp_path / "output", processes, {"PYTHONPATH": str(tmp_path)})
            return tmp_path / name
        found = main.main(parse(main, **flags))
        return tmp_path / name if found is None else found

    return run


def pretrained(out, items, *model, **flags):
    """Pre-trains on a list of items; returns the lines of the log."""
    args = parse(main_pretrain, **{**SMALL, **RUN, **PRETRAIN, "output_dir": out, **flags})
    main_pretrain.main(args, *model, source=lambda split, data_path: items)
    return lines(out)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.uint32, np.int64, np.float32, np.float64])
def test_a_range_maps_values_of_any_type(dtype):
    pixels = np.random.default_rng(0).integers(0, 100, (5, 6, 4)).astype(dtype)
    pixels[2, 3, 1] = 120
    expected = (pixels.astype(np.float64).transpose(2, 0, 1) - 20) / 50
    valid = np.ones((5, 6), bool)
    valid[2, 3] = False  # in all channels
    expected[:, 2, 3] = expected[:, valid].mean(axis=1)
    for data in (npy(pixels), pixels, tiff(pixels, planarconfig="contig")):
        item = decode_item(Item(data), 4, values=PixelValues(120, (20, 70)))
        np.testing.assert_allclose(item.image, expected, rtol=1e-5)
        assert np.array_equal(item.valid, valid)


@pytest.mark.parametrize("data", [
    png(np.full((4, 4, 3), 4095), 16, 2), png(np.full((4, 2, 1), 0x35), 4, 0, size=(4, 4)), b"P5 2 1 15\n\x03\x0f",
    b"P6 1 1 65535\n" + bytes(6), saved(Image.new("1", (4, 4)), "TIFF"), saved(Image.new("L", (4, 4)), "JPEG2000"),
    saved(Image.new("RGB", (4, 4)), "AVIF"),
], ids=["PNG 16", "PNG 4", "PGM 15", "PPM 65535", "TIFF 1", "JPEG 2000", "AVIF"])  # fmt: skip
def test_a_range_is_about_the_values_in_the_file(data):
    """Pillow scales them to 8 or 16 bits, or may do so."""
    decode(data, 3, values=PixelValues("nan"))
    for values in (PixelValues(15), PixelValues(None, (0, 4095))):
        for given in (data, Image.open(io.BytesIO(data))):
            with pytest.raises(BadImage, match="values"):
                decode(given, 3, values=values)


def test_a_range_of_files_with_the_values_that_pillow_reads():
    """Gray PNG of 8 and 16 bits, color PNG, JPEG and TIFF of 8 bits, and arrays."""
    gray = Image.fromarray(np.full((4, 4), 51, np.uint8))
    deep = Image.fromarray(np.full((4, 4), 51, np.uint16))
    for image in (gray, gray.convert("RGB"), deep):
        files = [saved(image, kind) for kind in ("PNG", "TIFF", *["JPEG"] * (image is not deep))]
        for data in (*files, image):
            decoded = decode_item(Item(data), 3, values=PixelValues(None, (0, 102))).image
            assert torch.equal(decoded, torch.full((3, 4, 4), 0.5))


def test_a_transparent_value_of_16_bits_may_be_invalid():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 500]], np.uint16)).save(file, "PNG", transparency=0)
    assert decode_item(Item(file.getvalue()), 1, values=PixelValues(0)).valid.tolist() == [[False, True]]
    assert decode(file.getvalue(), 1).tolist() == [[[1.0, pytest.approx(500 / 65535)]]]


def test_bytes_with_invalid_pixels_remain_bytes():
    pixels = np.full((4, 5, 3), 51, np.uint8)
    assert decode_item(Item(saved(pixels, "PNG")), 3, values=PixelValues(0)).valid is None
    pixels[1, 2] = 0, 50, 50
    for data in (saved(pixels, "PNG"), pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        item = decode_item(Item(data), 3, values=PixelValues(0))
        assert (~item.valid).nonzero().tolist() == [[1, 2]]
        assert (to_tensor(item.image) == 51).all()  # the mean
    assert decode_item(Item(pixels), 3, values=PixelValues(None, (0, 51))).image[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("pixels", "values", "message"),
    [
        (np.full((4, 4), np.nan), PixelValues(-9999), "not finite"),
        (np.full((4, 4), np.inf), PixelValues("nan"), "not finite"),
        (
            Item(np.zeros((4, 4)), valid=torch.ones(4, 5).bool()),
            PixelValues(),
            r"\(4, 5\)",
        ),
        # 0 is white in this file, and black in the picture.
        (tiff(np.zeros((8, 8), np.uint8), photometric="miniswhite"), PixelValues(nodata=0), "`nodata`"),
        (tiff(np.zeros((8, 8), np.uint8), photometric="miniswhite"), PixelValues(None, (0, 9)), "`value_range`"),
        (tiff(np.zeros((8, 8), np.uint16), photometric="miniswhite"), PixelValues(None, (0, 9)), "`value_range`"),
        # Transparent pixels become white, and colors gray.
        (Image.new("RGBA", (4, 4)), PixelValues(nodata=0), "`nodata`"),
        (Image.new("LA", (4, 4)), PixelValues(nodata=0), "`nodata`"),
        (Image.new("P", (4, 4)), PixelValues(nodata=0), "`nodata`"),
    ],
)
def test_other_values_are_one_line_errors(pixels, values, message):
    with pytest.raises(BadImage, match=message) as raised:
        decode_item(pixels if isinstance(pixels, Item) else Item(pixels), 1, values=values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_a_scaled_pixel_is_valid_only_if_its_sources_are(size):
    """The oracle: the values of valid pixels hardly depend on the value of an invalid one."""
    pixels, valid, scaled = torch.rand(1, 20, 20), torch.ones(20, 20, dtype=torch.bool), []
    valid[7, 11] = False
    for value in (0.0, 1.0):
        pixels[0, 7, 11] = value
        scaled.append(eval_transform(size, crop="none")(Item(pixels, valid=valid)))
    assert torch.equal(scaled[0].valid, scaled[1].valid)
    assert 0 < (~scaled[0].valid).sum() < scaled[0].valid.numel() / 2
    difference = (scaled[0].image - scaled[1].image).abs()[0]
    assert difference[scaled[0].valid].max() < 0.01 < difference[~scaled[0].valid].max()


def test_patches_with_few_valid_pixels_are_invalid():
    valid = torch.ones(16, 16, dtype=torch.bool)
    valid[:2, :4] = False  # half of the first patch
    valid[4:6, :4] = False  # more than half of the one below
    valid[6, 0] = False
    expected = valid.clone()
    expected[4:8, :4] = False
    coordinates = torch.arange(256.0).view(16, 16)  # a map is complete
    picture = Item(torch.rand(3, 16, 16), valid=valid, inputs={"map": tv_tensors.Image(coordinates)})
    transform = eval_transform(16, crop="none")
    found = WithValidPatches(transform, (4, 4), 0.5, 4)(picture)
    assert torch.equal(found.valid, expected) and torch.equal(found.inputs["map"], coordinates)
    with pytest.raises(BadImage, match="14 of its 16 patches"):
        WithValidPatches(transform, (4, 4), 1.0, 15)(picture)


def test_crops_are_drawn_until_enough_patches_are_valid():
    picture = Item(torch.rand(3, 64, 64), valid=torch.arange(64).expand(64, 64) >= 40)
    augment = pretrain_transform(16, (0.05, 0.3))

    def number_of_valid(transform):
        valid = transform(picture).valid
        return 256 if valid is None else int(valid.sum())

    plain, checked = (
        min(number_of_valid(transform) for _ in range(40))
        for transform in (augment, WithValidPatches(augment, (4, 4), 0.5, 4))
    )
    assert plain < 64
    assert checked >= 4 * 8


@pytest.fixture
def cloudy():
    """Images, and valid pixels: the first image has a patch without valid pixels, and one with some."""
    valid = torch.ones(3, 16, 16, dtype=torch.bool)
    valid[0, :4, :4] = False
    valid[0, 4:6, 8:12] = False
    valid[1, 8:, :] = False
    return torch.rand(3, 3, 16, 16), valid


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_invalid_pixels_change_nothing_and_have_no_gradient(norm_pix_loss, cloudy):
    images, valid = cloudy
    model = mae_vit_mini_patch4(img_size=16, norm_pix_loss=norm_pix_loss)
    noise, found = torch.rand(3, 16), []
    for value in (0.0, 1e6, torch.nan):
        model.zero_grad()
        inputs = images.masked_fill(~valid[:, None], value).requires_grad_()
        loss, pred, mask = model(inputs, noise=noise, valid=valid)
        loss.backward()
        gradient = inputs.grad.masked_select(~valid[:, None])
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert inputs.grad.isfinite().all()
        assert inputs.grad.masked_select(valid[:, None]).abs().sum() > 0
        found.append([loss, pred, mask, *(p.grad for p in model.parameters() if p.grad is not None)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    assert mask[0, 0] == 1
    assert mask[1, 8:].all()
    assert (mask == 0).sum(dim=1).tolist() == [4, 4, 4]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_equals_arithmetic_by_hand(norm_pix_loss, cloudy):
    images, valid = cloudy
    model = mae_vit_mini_patch4(img_size=16, norm_pix_loss=norm_pix_loss)
    pred, mask, losses = torch.rand(3, 16, 48), (torch.rand(3, 16) < 0.7).float(), []
    for number in range(3):
        patches = []
        for patch in np.flatnonzero(mask[number]):
            rows, columns = (slice(4 * place, 4 * place + 4) for place in divmod(int(patch), 4))
            inside = valid[number, rows, columns].numpy().flatten()
            pixels = images[number, :, rows, columns].permute(1, 2, 0).reshape(16, 3).double().numpy()[inside]
            if inside.any():
                if norm_pix_loss:
                    pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
                patches.append(((pred[number, patch].reshape(16, 3).double().numpy()[inside] - pixels) ** 2).mean())
        losses.append(np.mean(patches))
    assert float(model.forward_loss(images, pred, mask, valid=valid)) == pytest.approx(np.mean(losses), rel=1e-5)
    mask[:] = torch.arange(16) >= 4
    everything = model.forward_loss(images, pred, mask, valid=torch.ones_like(valid))
    plain = model.forward_loss(images, pred, mask)
    assert float(everything) == pytest.approx(float(plain), rel=1e-5)


def test_given_masks(cloudy):
    images, valid = cloudy
    model = mae_vit_mini_patch4(img_size=16).eval()
    with pytest.raises(ValueError, match=r"valid .*\(3, 8, 8\)"):
        model(images, valid=valid[:, :8, :8])
    with pytest.raises(RuntimeError, match="4 patches with valid pixels"):
        model(images, valid=valid & (torch.arange(3) != 1)[:, None, None])
    mask = torch.ones(3, 16)
    mask[:, 1:5] = 0
    inputs = images.masked_fill(~valid[:, None], torch.nan)
    result = model.reconstruct(inputs, mask=mask, valid=valid)
    assert torch.equal(result.mask, mask)
    assert all(part.isfinite().all() for part in result)
    mask[0, :2] = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"mask .*valid pixels"):
        model(inputs, mask=mask, valid=valid)


class Reversed(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio, noise=None, **context):
        return super().random_masking(x, mask_ratio, -noise)


def test_masks_that_ignore_invalid_patches_are_an_error(cloudy):
    images, valid = cloudy
    model = Reversed(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32,
                     decoder_depth=1, decoder_num_heads=2)  # fmt: skip
    with pytest.raises(RuntimeError, match="random_masking"):
        model(images, valid=valid)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2}
    cross = CrossDecoder(img_size=16, patch_size=4, **shape, decoder_depth=1).train()
    assert cross(images, valid=valid)[0].isfinite()  # its mask has the predicted patches only


class Brightness(MaskedAutoencoderViT):
    """A target of its own, which does not know which pixels are valid."""

    def target(self, imgs, **context):
        return super().target(imgs).mean(dim=-1, keepdim=True).expand(-1, -1, 48)


def test_a_target_that_ignores_invalid_pixels_is_refused_where_there_are_any(tmp_path):
    items = [(np.random.default_rng(number).random((16, 16, 3), dtype=np.float32), 0) for number in range(8)]
    flags = {"nodata": 5, "mean": "0 0 0", "std": "1 1 1"}
    assert np.isfinite(pretrained(tmp_path / "valid", items, Brightness, **flags)[0]["train_loss"])
    items[5][0][3:8] = 5
    with pytest.raises(ValueError, match=r"Brightness.target"):
        pretrained(tmp_path / "invalid", items, Brightness, **flags)


GROUPS = {"encoder": "examples.channel_groups:ChannelGroups", "encoder_args": "groups=3"}


VALUES = {"hidden": {"hidden": 1e5}, "nan": {"kind": "nan"}, "value": {"kind": "value", "num_workers": 1},
          "cached": {"cache_images": True}}  # fmt: skip


@pytest.mark.parametrize(("own", "names"), [({}, VALUES), (GROUPS, ["hidden"])], ids=["plain", "groups"])
def test_a_run_does_not_depend_on_the_values_of_invalid_pixels(own, names, clouds):
    """With masks, NaN and a value; also in a worker process, and with decoded images in a file."""
    first = weights(clouds("first", **own), "checkpoint-0.pth")
    for name in names:
        assert_equal(first, weights(clouds(name, **VALUES[name], **own), "checkpoint-0.pth"))


@pytest.mark.parametrize("own", [{}, {"num_workers": 1, "value_range": "0 1", "mean": ".4 .4 .4", "std": ".3 .3 .3"}])
def test_pixels_that_a_mask_marks_invalid_may_be_nan(own, clouds):
    """The losses of pre-training are those with zeros there, and so are the weights."""
    zeros = clouds("zeros", hidden=0.0, **own)
    for hidden in (np.nan, np.inf):
        found = clouds(f"{hidden}", hidden=hidden, **own)
        assert [line["train_loss"] for line in lines(found)] == [line["train_loss"] for line in lines(zeros)]
        assert_equal(weights(zeros, "checkpoint-0.pth"), weights(found, "checkpoint-0.pth"))


@pytest.mark.parametrize("kind", ["array", "tensor", "npy", "tiff"])
def test_nan_counts_nowhere_under_a_mask_and_is_refused_elsewhere(kind, tmp_path, capsys):
    """Also in the facts of `python -m mae.data`: statistics and number of channels."""
    image = np.random.default_rng(0).random((8, 9, 4), dtype=np.float32)
    valid = np.ones((8, 9), bool)
    valid[2:5, 3:] = False
    image[~valid] = np.nan
    image[2, 3, 1:] = 0.5  # one channel is enough
    data = {"array": image, "tensor": torch.from_numpy(image).permute(2, 0, 1), "npy": npy(image),
            "tiff": tiff(image, planarconfig="contig", photometric="minisblack")}[kind]  # fmt: skip
    item = decode_item(Item(data, valid=torch.from_numpy(valid)), 4)
    expected = image[valid].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(item.image[:, 3, 4], expected, rtol=1e-6)
    assert np.array_equal(item.valid, valid)
    items = [{"image": data, "valid": valid}] * 3
    data_check.main(parse(data_check, num_workers=0), source=lambda split, data_path: items)
    report = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert (report["unreadable"], report["--in_chans"]) == ("0", "4")
    np.testing.assert_allclose(np.float64(report["--mean"].split()), expected, rtol=1e-3)
    valid[2, 3] = True
    with pytest.raises(BadImage, match="not finite"):
        decode_item(Item(data, valid=torch.from_numpy(valid)), 4)


def test_an_interrupted_run_resumes_exactly(clouds, monkeypatch):
    settings = {"kind": "nan", "batch_size": 4, "min_valid": 0.7}
    parts = stop_and_resume(monkeypatch, clouds, 3, **settings)
    assert_equal(weights(clouds("whole", **settings), "checkpoint-0.pth"), weights(parts, "checkpoint-0.pth"))
    with pytest.raises(ValueError, match="nodata=nan"):
        clouds("parts", **{**settings, "kind": "value"}, resume="auto", epochs=2)


@pytest.mark.slow
def test_two_processes_train_as_one(clouds):
    """Also with decoded images in a file, which one process writes."""
    one, two = clouds("one", batch_size=8), clouds("two", batch_size=4, processes=2)
    cached = clouds("cached", batch_size=4, processes=2, cache_images=True)
    assert_close(one, two, "checkpoint-0.pth")
    assert_equal(weights(two, "checkpoint-0.pth"), weights(cached, "checkpoint-0.pth"))


@pytest.mark.parametrize("main", [main_finetune, main_linprobe, main_knn])
def test_classification_sees_the_mean(main, clouds):
    """The flag is recorded: scripts that start from the checkpoint read images alike."""
    encoder = clouds("encoder", kind="value") / "checkpoint-0.pth"
    assert checkpoint.read(encoder)["args"]["nodata"] == -9999
    flags = {"finetune": encoder, "model": "vit_mini_patch4"}
    flags |= {"k": 5} if main is main_knn else {"aa": "none"} if main is main_finetune else {}
    ways = {"value": {"kind": "value", "nodata": None}, "mask": {"hidden": 1e5}, "other": {}}
    found = [clouds(name, main, **flags, **own) for name, own in ways.items()]
    for other in found[1:]:
        if main is main_knn:
            assert found[0] == other
        else:
            assert_equal(*(weights(out, "checkpoint-0.pth") for out in (found[0], other)))


def test_features_and_predictions(clouds):
    """An array with NaN has the features of the array with the mean; the model records how to read images."""
    model = get_model(clouds("encoder", kind="nan") / "checkpoint-0.pth")
    image = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    filled = image.copy()
    image[3:9, 5:], filled[3:9, 5:] = np.nan, model.normalize.mean.flatten()
    torch.testing.assert_close(model.extract_feat(image), model.extract_feat(filled))
    two = model.prepare([image, (filled * 255).astype(np.uint8)])  # bytes and floats have one range
    assert two.abs().max() < 4


def test_a_reconstruction_has_the_mean_in_place_of_invalid_pixels(clouds):
    """As in training, whatever the valid pixels are."""
    model = get_model(clouds("encoder", kind="nan") / "checkpoint-0.pth")
    image = np.full((16, 16, 3), 0.9, np.float32)
    image[:, :8] = np.nan
    result = reconstruct(model, image)
    assert result.original[0, :, :, 2].abs().max() == 0 and result.original[0, :, :, 14].abs().min() > 0.5


def test_a_policy_that_would_leave_valid_pixels_behind_is_refused(clouds):
    with pytest.raises(ValueError, match="aa=none"):
        clouds("tuned", main_finetune, model="vit_mini_patch4", value_range="0 1")


def test_statistics_exclude_invalid_pixels(tmp_path):
    generator, pixels = np.random.default_rng(0), []
    for number in range(5):
        image = generator.integers(-500, 2000, (8, 9, 2)).astype(np.int16)
        image[number : number + 3, :4] = -9999
        pixels.append(((image + 500) / 2500)[(image != -9999).all(axis=2)])
        np.save(tmp_path / f"{number}.npy", image)
    flags = ["--in_chans", 2, "--nodata", -9999, "--num_workers", 1, "--value_range", -500, 2000]
    output = forks.run("mae/data/__main__.py", [tmp_path, *flags], tmp_path / "output")
    report, pixels = {line.split()[0]: line.split()[1:] for line in output.splitlines()}, np.concatenate(pixels)
    np.testing.assert_allclose(np.float64(report["--mean"]), pixels.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(np.float64(report["--std"]), pixels.std(axis=0), rtol=1e-3)
    assert report["invalid"][0] == f"{1 - len(pixels) / 360:.2%}"


@pytest.mark.slow
def test_the_commands_of_the_document_run(tmp_path):
    assert "invalid     23.44%" in run_section("docs/data.md", "## Invalid pixels", tmp_path)
    assert np.isfinite(lines(tmp_path / "runs/nodata")[-1]["train_loss"])


def test_an_image_with_valid_crops_only_does_not_end_a_run(tmp_path):
    """Its center, which the reconstructions in TensorBoard show, has too few valid patches."""
    images = [np.random.default_rng(number).random((32, 32, 3), dtype=np.float32) for number in range(16)]
    images[0][8:24, 8:24] = np.nan
    flags = {"nodata": "nan", "mean": ".5 .5 .5", "std": ".3 .3 .3", "crop_scale": ".1 .2", "on_bad_image": "error"}
    assert np.isfinite(pretrained(tmp_path, [(image, 0) for image in images], **flags)[-1]["train_loss"])


def test_pixel_baselines_see_the_mean_of_an_image(tmp_path):
    image = np.random.default_rng(0).random((16, 16, 1), dtype=np.float32)
    image[:5] = np.nan
    (tmp_path / "a.npy").write_bytes(npy(image))
    (tmp_path / "b.npy").write_bytes(npy(np.full_like(image, np.nan)))
    source = open_source("train", str(tmp_path))
    rows = raw_pixels.read(source, ImageSpec(16, 1, crop="none", nodata="nan"), 0)
    image[:5] = np.nanmean(image)
    np.testing.assert_allclose(rows, [image.flatten(), np.zeros(256)], rtol=1e-5)


def test_segmentation_sees_the_mean(tmp_path):
    """The values of invalid pixels do not change the weights of a head."""
    valid = np.ones((24, 24), bool)
    valid[4:12, 3:20] = False

    def scene(number, hidden):
        image = np.random.default_rng(number).random((24, 24, 3), dtype=np.float32)
        image[~valid] = hidden
        return {"image": image, "label": np.where(valid, image[:, :, 0] > 0.5, 255).astype(np.uint8), "valid": valid}

    found = []
    for hidden in (0.0, 1e5):
        out = tmp_path / str(hidden)
        flags = {**SMALL, "epochs": 1, "warmup_epochs": 0, "model": "vit_mini_patch4", "nb_classes": 2, "batch_size": 2}
        items = [scene(number, hidden) for number in range(4)]
        args = parse(main_segment, **flags, output_dir=out)
        main_segment.main(args, source=lambda split, data_path, items=items: items)
        found.append(weights(out, "checkpoint-0.pth"))
    assert_equal(*found)


@pytest.mark.parametrize(("valid", "message"), [
    (np.zeros((24, 24), bool), r"0 of its 16 patches have valid pixels .*, and 4 are visible"),
    (np.ones((24, 24)), r"valid is torch.float64: give booleans"),
    (np.ones((1, 24, 24), bool), r"mask of valid pixels has the shape \(1, 24, 24\)"),
])  # fmt: skip
def test_wrong_items_are_one_line_errors(valid, message, tmp_path):
    items = [{"image": np.ones((24, 24, 3), np.float32), "label": 0} for _ in range(16)]
    items[3]["valid"] = valid
    with pytest.raises(ValueError, match=message) as raised:
        pretrained(tmp_path / "error", items)
    assert "\n" not in str(raised.value)
    if isinstance(raised.value, BadImage):
        assert pretrained(tmp_path / "skip", items, on_bad_image="skip")[0]["bad_images"] == 1


def test_a_worker_process_names_the_file_with_fewer_valid_patches_than_are_visible(tmp_path, capsys, monkeypatch):
    """4 of 16 patches are visible: a file with 4 valid patches is trained on."""
    files = tmp_path / "files" / "train"
    files.mkdir(parents=True)
    for number in range(8):
        image = np.random.default_rng(number).random((16, 16, 3), dtype=np.float32)
        if number == 5:
            image[4:] = np.nan
        np.save(files / f"{number}.npy", image)
    flags = {**SMALL, **RUN, "model": "mae_vit_mini_patch4", "vis_every": 0, "nodata": "nan", "crop": "none"}
    flags |= {"data_path": files.parent}
    main_pretrain.main(parse(main_pretrain, **flags, output_dir=tmp_path / "enough"))
    assert np.isfinite(lines(tmp_path / "enough")[0]["train_loss"])
    image[:, 4:] = np.nan
    image[8:] = np.nan
    np.save(files / "7.npy", image)
    flags |= {"num_workers": 2, "output_dir": tmp_path / "few"}
    assert f"error: {files}/7.npy: 2 of its 16 patches" in fails(capsys, monkeypatch, main_pretrain, *argv_of(flags))


def test_wrong_flags_are_errors(capsys):
    for flag, value in (("nodata", "white"), ("value_range", "5 5"), ("min_valid", "0")):
        with pytest.raises(SystemExit):
            parse(main_pretrain, **{flag: value})
        error, _usage = capsys.readouterr().err.splitlines()
        assert f"--{flag}: " in error and value in error
