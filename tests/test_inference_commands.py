"""The commands predict, reconstruct and features: files, output, and error messages."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import fails
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

from mae.cli import entry_point
from mae.data import loader, transforms
from mae.inference import export, features, get_model, predict, reconstruct
from mae.inference.model import picture_of
from mae.reconstruction import Reconstruction
from mae.training import feature_files

PHOTOS = sorted((ROOT / "demo" / "photos").glob("*.jpg"))


def run(module, *argv):
    return module.main(entry_point.parse_command(module.get_args_parser(), [str(part) for part in argv])[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    mae = get_model("mae_vit_mini_patch4")
    export.export(mae, "safetensors", folder / "mae.safetensors")
    export.export(export.encoder_of(mae), "safetensors", folder / "encoder.safetensors")
    classifier = get_model("vit_mini_patch4", nb_classes=6, classes=list("abcdef"))
    export.export(classifier, "safetensors", folder / "classifier.safetensors")
    return folder


def test_predict(files, tmp_path, capsys):
    found = run(predict, *PHOTOS, "--model", files / "classifier.safetensors", "--topk", 3, "--out", tmp_path / "p.png")
    said = capsys.readouterr().out.splitlines()
    assert (len(said), said[0]) == (3 * 4, str(PHOTOS[0]))
    assert said[1].split() == [f"{found[0]['pred_score']:.2%}", found[0]["pred_class"]]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (800, 780)
    model = get_model(files / "classifier.safetensors")
    with Image.open(PHOTOS[0]) as photo:
        assert np.array_equal(picture_of(model, PHOTOS[0]), photo.convert("RGB"))
    for path, prediction in zip(PHOTOS, found, strict=True):
        np.testing.assert_allclose(prediction["pred_scores"], model.predict(path)["pred_scores"], rtol=1e-5)
    run(predict, PHOTOS[0], "--model", files / "classifier.safetensors", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["image"], told["pred_class"]) == (str(PHOTOS[0]), found[0]["pred_class"])
    assert len(told["top"]) == 5 and "classes" not in told  # 1,000 names a line


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_the_picture_of_predictions_has_any_image_that_the_model_accepts(tmp_path, in_chans, monkeypatch):
    """16-bit and float images, and images with many channels, which matplotlib does not draw."""
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 60), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    floats = np.random.default_rng(0).random((40, 60, in_chans), dtype=np.float32)
    np.save(tmp_path / "floats.npy", floats)
    images = [tmp_path / name for name in ("deep.png", "floats.npy")[in_chans == 5 :]]
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", nb_classes=6, in_chans=in_chans)
    export.export(model, "safetensors", tmp_path / "m.safetensors")
    pictures, draw = [], predict.draw
    monkeypatch.setattr(predict, "draw", lambda *given: pictures.extend(given[1]) or draw(*given))
    run(predict, *images, "--model", tmp_path / "m.safetensors", "--out", tmp_path / "out.png")
    assert {(picture.shape, picture.dtype) for picture in pictures} == {((40, 60, 3), np.dtype(np.uint8))}
    given = [(pixels / 65535)[:, :, None].repeat(3, 2), floats.repeat(3 if in_chans == 1 else 1, axis=2)[:, :, :3]]
    low, high = np.quantile(given[in_chans == 5 :], (0.005, 0.995))  # of all images
    for picture, image in zip(pictures, given[in_chans == 5 :], strict=True):
        expected = (255 * (image - low) / (high - low)).clip(0, 255)
        assert np.abs(picture - expected).max() < 0.51


def test_classes_of_the_same_name_have_their_own_bars(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: figures.append(figure) or save(figure, *args))
    top = [("crane", 0.4), (r"$\frac{1$", 0.3), ("crane", 0.2)]  # an invalid formula
    predict.draw(["folder/bird.png"], [np.zeros((8, 8, 3), np.uint8)], [{"top": top}], tmp_path / "p.png")
    picture, bars = figures[0].axes
    assert (picture.get_title(), bars.get_xlabel()) == ("bird.png", "probability (%)")
    places = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in bars.patches]
    assert places == [(0, 20.0), (1, 30.0), (2, 40.0)]
    assert [label.get_text() for label in bars.get_yticklabels()][::2] == ["crane", "crane"]


def test_reconstruct_any_size(files, tmp_path, capsys):
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 300, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    painted = run(reconstruct, PHOTOS[0], tmp_path / "wide.png", tmp_path / "dot.png", "--model",
                  files / "mae.safetensors", "--out", tmp_path / "grid.png")  # fmt: skip
    assert [tuple(row.original.shape[2:]) for row in painted] == [(32, 32), (32, 104), (32, 32)]
    with Image.open(tmp_path / "grid.png") as picture:
        step = 5 * 104 + 2  # 32 pixels are shown as 160, with a gap behind each column
        assert picture.width == 4 * step
        for column in range(4):  # narrow pictures stand in the middle of their columns
            middle = picture.crop((column * step + 182, 60, column * step + 340, 61))
            assert picture.getpixel((column * step + 90, 60)) == (255, 255, 255)
            assert middle.getextrema() != ((255, 255),) * 3
    said = capsys.readouterr().out
    assert "wide.png: 156 of 8 x 26 patches masked, PSNR " in said


def test_the_command_uses_its_flags(files, tmp_path):
    flags = ["--mask_ratio", 0.5, "--seed", 4, "--short_side", 24, "--model", files / "mae.safetensors"]
    model = get_model(files / "mae.safetensors")
    one, same, other = (reconstruct.reconstruct(model, PHOTOS[0], 0.5, seed).mask for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.sum() == 32
    (found,) = run(reconstruct, PHOTOS[1], *flags, "--out", tmp_path / "o.png")
    assert torch.equal(found.pasted, reconstruct.reconstruct(model, PHOTOS[1], 0.5, 4, None, 24).pasted)
    (found,) = run(reconstruct, PHOTOS[1], *flags, "--out", tmp_path / "o.png", "--mask_box", 1, 2, 30, 40)
    expected = reconstruct.reconstruct(model, PHOTOS[1], mask_boxes=[(1, 2, 30, 40)], short_side=24)
    assert torch.equal(found.mask, expected.mask)


def test_a_model_that_was_trained_with_blocks_reconstructs_blocks(pretrain, tmp_path):
    """The picture has 4 x 6 patches: 6 blocks, of which one is visible."""
    model = get_model(pretrain("blocks", mask_block=2, mask_ratio=0.5, epochs=1) / "checkpoint-0.pth")
    masks = set()
    for seed in range(8):
        mask = reconstruct.reconstruct(model, Image.new("RGB", (96, 64)), 0.75, seed).mask.view(2, 2, 3, 2)
        blocks = mask.float().mean(dim=(1, 3))
        assert sorted(blocks.flatten().tolist()) == [0, 1, 1, 1, 1, 1]
        masks.add(tuple(blocks.flatten().tolist()))
    assert len(masks) > 2


def test_psnr_is_of_the_masked_pixels(files):
    """A quarter of the pixels is masked and has an error of 0.1: 20 dB."""
    mae = get_model(files / "mae.safetensors")
    original = mae.normalize(torch.full((1, 3, 32, 32), 0.5))
    pasted = original.clone()
    pasted[:, :, :8, :8] = mae.normalize(torch.full((1, 3, 8, 8), 0.6))
    mask = torch.zeros(1, 64)
    mask[0, [0, 1, 8, 9]] = 1
    reconstruction = Reconstruction(*[original] * len(Reconstruction._fields))._replace(pasted=pasted, mask=mask)
    assert reconstruct.psnr(mae, reconstruction) == pytest.approx(20.0, abs=1e-3)


def test_values_of_an_unknown_range_have_no_psnr():
    """The error is in standard deviations: .5 of all masked pixels."""
    mae = SimpleNamespace(normalize=transforms.Normalize([300.0], [20.0]))
    original = torch.zeros(1, 1, 8, 8)
    pasted = original.clone()
    pasted[..., :4, :4] = 0.5
    mask = torch.tensor([[1.0, 0, 0, 0]])
    result = Reconstruction(*[original] * len(Reconstruction._fields))._replace(pasted=pasted, mask=mask)
    assert reconstruct.error_text(mae, result) == "RMSE 0.500 standard deviations"


@pytest.mark.parametrize("nodata", [None, 0])
def test_an_opened_picture_is_reconstructed_like_its_file(nodata, tmp_path):
    """The values of the opened picture are from 0 to 1: their range and invalid value are not applied again."""
    pixels = np.random.default_rng(0).integers(1000, 5000, (32, 32)).astype(np.uint16)
    pixels[:4, :4] = 0
    np.save(tmp_path / "p.npy", pixels)
    model = get_model("mae_vit_mini_patch4", in_chans=1, value_range=[1000, 5000], nodata=nodata, mean=[0.5], std=[0.2])
    picture = model.open(tmp_path / "p.npy")
    assert torch.equal(model.open(picture).nan_to_num(-1), picture.nan_to_num(-1))
    found, expected = (reconstruct.reconstruct(model, image).original for image in (picture, tmp_path / "p.npy"))
    assert torch.equal(found, expected)


def test_uncropped_images_are_scaled_to_the_short_side_of_the_model():
    for patch, width in ((1, 51), (4, 48)):  # 50.67 is rounded
        square = get_model("mae_vit_mini_patch4", input_size=32, patch_size=patch)
        assert reconstruct.uncropped_input(square, Image.new("RGB", (95, 60))).shape == (1, 3, 32, width)
    wide = get_model("mae_vit_mini_patch4", input_size=[16, 32])
    assert reconstruct.uncropped_input(wide, Image.new("RGB", (90, 60))).shape == (1, 3, 16, 24)
    assert reconstruct.uncropped_input(wide, Image.new("RGB", (90, 60)), 20).shape == (1, 3, 20, 28)


def test_models_of_whole_images_reconstruct_them_at_the_input_size():
    model = get_model("mae_vit_mini_patch4", input_size=[16, 32], crop="none")
    assert reconstruct.uncropped_input(model, Image.new("RGB", (60, 90))).shape == (1, 3, 16, 32)
    assert reconstruct.uncropped_input(model, Image.new("RGB", (90, 60)), 20).shape == (1, 3, 20, 28)
    result = reconstruct.reconstruct(model, Image.new("RGB", (60, 90)), mask_boxes=[(30, 0, 30, 90)])
    assert result.mask.reshape(4, 8).tolist() == [[0] * 4 + [1] * 4] * 4


def test_reconstruct_rectangles(files, tmp_path):
    model = get_model(files / "mae.safetensors")
    picture = Image.new("RGB", (640, 320))  # 64 x 32 for the model: a tenth
    painted = reconstruct.reconstruct(model, picture, mask_boxes=[(0, 0, 40, 80), (600, 280, 100, 100)])
    mask = painted.mask.view(8, 16)
    assert mask[:2, 0].all() and mask[7, 15] == 1 and mask.sum() == 3
    with pytest.raises(ValueError, match="visible"):
        reconstruct.reconstruct(model, picture, mask_boxes=[(0, 0, 640, 320)])
    argv = [PHOTOS[0], "--model", files / "mae.safetensors", "--out", tmp_path / "grid.png"]
    (one,), (other,) = (run(reconstruct, *argv, flag, 100, 100, 5, 5) for flag in ("--mask_box", "--hide"))
    assert one.mask.sum() == 1 and torch.equal(one.mask, other.mask)


def test_a_rectangle_masks_every_pixel_that_it_touches():
    """Of an image of 300 x 100 pixels, scaled to 30 x 10; 24 x 8 of them are covered, between margins of 3 and 1."""
    for box, rows, columns in (
        ((130, 50, 1, 1), (4, 5), (10, 11)), ((130, 50, 10, 10), (4, 5), (10, 11)),
        ((130, 50, 11, 11), (4, 6), (10, 12)), ((129, 49, 2, 2), (3, 5), (9, 11)),
        ((0, 0, 31, 11), (0, 1), (0, 1)), ((269, 89, 900, 900), (7, 8), (23, 24)),  # from and to a covered pixel
    ):  # fmt: skip
        expected = torch.zeros(8, 24)
        expected[slice(*rows), slice(*columns)] = 1
        assert torch.equal(reconstruct.boxes_to_mask([box], (100, 300), (10, 30), (8, 24)), expected), box
    for box in ((0, 0, 30, 100), (270, 0, 30, 100), (0, 0, 300, 10), (130, 50, 0, 5), (-9, 0, 9, 100), (300, 0, 9, 9)):
        with pytest.raises(ValueError, match="300 x 100"):
            reconstruct.boxes_to_mask([box], (100, 300), (10, 30), (8, 24))


def test_a_rectangle_is_where_the_image_shows_it(files):
    """A white rectangle on black: the mask is that of the patches that are not black, also beside cropped margins."""
    mae = get_model(files / "mae.safetensors")
    for size, box in (((100, 64), (2, 3, 5, 5)), ((73, 130), (60, 100, 5, 6)), ((64, 103), (20, 50, 9, 30))):
        pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
        left, top, width, height = box
        pixels[top : top + height, left : left + width] = 255
        result = reconstruct.reconstruct(mae, Image.fromarray(pixels), mask_boxes=[box])
        bright = mae.patchify(mae.normalize.inverse(result.original)).amax(dim=2) > 0.5
        assert result.mask[bright].all() and bright.any()
        assert result.mask.sum() <= bright.sum() + 3


def test_a_rectangle_outside_of_the_image_is_an_error(files, tmp_path, capsys):
    Image.new("RGB", (80, 40)).save(tmp_path / "small.png")
    argv = [tmp_path / "small.png", "--model", files / "mae.safetensors", "--out", tmp_path / "grid.png"]
    for box in ((100, 10, 20, 20), (-30, 0, 10, 10), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match=r"small.png: mask_box="):
            run(reconstruct, *argv, "--mask_box", *box)
    (result,) = run(reconstruct, *argv, "--mask_box", 20, 10, 20, 10)
    assert 0 < result.mask.sum() < result.mask.numel()
    run(reconstruct, *argv, "--mask_box", 60, 20, 50, 50)
    assert "mask_box=[60, 20, 50, 50]" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "pool"), [(".npz", "avg"), (".NPZ", "tokens"), (".safetensors", None)])
def test_features(files, labelled, tmp_path, suffix, pool):
    out = tmp_path / f"features{suffix}"
    flags = ["--batch_size", 7, "--split", "val", *(["--pool", pool] if pool else [])]
    run(features, labelled, "--model", files / "encoder.safetensors", "--out", out, *flags)
    if suffix == ".safetensors":
        with safe_open(out, "np") as file:
            found = {key: file.get_tensor(key) for key in ("features", "labels")}
            names, classes = (json.loads(file.metadata()[key]) for key in ("names", "classes"))
    else:
        found = np.load(out)
        names, classes = found["names"].tolist(), found["classes"].tolist()
    with torch.no_grad():
        expected = get_model(files / "encoder.safetensors").extract_feat(names, pool or "cls").numpy()
    assert expected.shape == (23, 65, 128) if pool == "tokens" else (23, 128)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)
    assert all(f"/{classes[label]}/" in name for label, name in zip(found["labels"], names, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


class Weighed:
    """Images with two numbers each, which are no classes."""

    numbers = ([20.5, 3.0], [31.25, 4.0], [18.0, 5.5])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return np.full((32, 32, 3), 80 * index, np.uint8), self.numbers[index]


def weighed(split, data_path):
    return Weighed()


def test_features_of_images_with_numbers(files, tmp_path):
    model, out = files / "encoder.safetensors", tmp_path / "features.npz"
    flags = ["--dataset", "py:test_inference_commands:weighed", "--num_workers", 0]
    run(features, "--model", model, "--out", out, *flags)
    found = np.load(out)
    np.testing.assert_array_equal(found["labels"], Weighed.numbers)
    expected = get_model(model).extract_feat([image for image, _ in Weighed()])
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)


def test_a_line_of_pixels_is_refused_and_not_scaled_to_millions_of_patches(files, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (20000, 1)).save(tmp_path / "line.png")
    argv = [tmp_path / "line.png", "--model", files / "mae.safetensors", "--out", tmp_path / "o.png"]
    error = fails(capsys, monkeypatch, reconstruct, *argv)
    assert "line.png" in error and "20000 x 1" in error and not (tmp_path / "o.png").exists()


def test_features_resume_after_an_interruption(files, pictures, tmp_path, monkeypatch, capsys):
    argv = [pictures, "--model", files / "encoder.safetensors", "--batch_size", 4, "--num_workers", 0, "--pool", "avg"]
    run(features, *argv, "--out", tmp_path / "whole.npz")
    seen = []

    def stops(samples, *given, **named):
        for number, batch in enumerate(loader_of(samples, *given, **named)):
            seen.append(len(batch[0]))
            if number == 3 and len(seen) == 4:
                raise KeyboardInterrupt
            yield batch

    loader_of = loader.eval_loader
    monkeypatch.setattr(loader, "eval_loader", stops)
    monkeypatch.setattr(feature_files, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        run(features, *argv, "--out", tmp_path / "parts.npz")
    capsys.readouterr()
    for _ in range(2):
        shutil.copytree(tmp_path / "parts.npz.partial", tmp_path / "copy", dirs_exist_ok=True)
        run(features, *argv, "--out", tmp_path / "parts.npz")
        assert "resuming after 12 of 24 images" in capsys.readouterr().out
        whole, parts = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "parts.npz")
        np.testing.assert_array_equal(whole["features"], parts["features"])
        shutil.copytree(tmp_path / "copy", tmp_path / "parts.npz.partial")
        with (tmp_path / "parts.npz.partial" / "features.f32").open("ab") as file:
            file.write(b"rows after the last note")
    assert sum(seen[:5]) == 16 + 4  # the fourth batch was drawn, and stopped in


@pytest.mark.parametrize("change", ["weights", "split", "pool", "precision", "crop", "note", "image"])
def test_features_with_other_settings_start_again(files, labelled, tmp_path, capsys, monkeypatch, change):
    """The rows equal those of a command without interruption, despite the existing files."""
    shutil.copy(files / "encoder.safetensors", tmp_path / "model.safetensors")

    def stop(*args, **named):
        raise KeyboardInterrupt

    out, partial = tmp_path / "f.npz", tmp_path / "f.npz.partial"
    folder = shutil.copytree(labelled, tmp_path / "images")
    argv = [folder, "--model", tmp_path / "model.safetensors", "--out", out, "--num_workers", 0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # stopped at its end
        patch.setattr(np, "savez", stop)
        run(features, *argv)
    flags = {"split": ["--split", "val"], "pool": ["--pool", "avg"], "precision": ["--amp", "bf16"]}.get(change, [])
    if change == "weights":
        other = get_model(files / "encoder.safetensors")
        other.cls_token.data.add_(1)
        export.export(other, "safetensors", tmp_path / "model.safetensors")
    elif change == "crop":
        other = get_model(files / "encoder.safetensors", crop_pct=0.5)
        export.export(other, "safetensors", tmp_path / "model.safetensors")
    elif change == "note":
        (partial / "done.json").write_text("{")
    elif change == "image":
        Image.new("RGB", (20, 20)).save(folder / "train" / "kind1" / "01.png")
    capsys.readouterr()
    run(features, *argv, *flags)
    said = capsys.readouterr().out
    assert said.count(f"warning: {partial} can't be resumed (") == 1
    assert not partial.exists()
    found = np.load(out)
    run(features, *argv[:4], tmp_path / "new.npz", "--num_workers", 0, *flags)
    np.testing.assert_array_equal(found["features"], np.load(tmp_path / "new.npz")["features"])


def test_features_of_images_without_classes(files, pictures, tmp_path):
    for number, file in enumerate(sorted((pictures / "train").rglob("*.*"))[:5]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "flat" / f"{number}{file.suffix}")
    for suffix in (".npz", ".safetensors"):
        out = tmp_path / f"f{suffix}"
        run(features, tmp_path / "flat", "--model", files / "encoder.safetensors", "--out", out, "--num_workers", 0)
    found = np.load(tmp_path / "f.npz")
    assert set(found) == {"features", "names"}
    assert found["features"].shape == (5, 128)
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert set(file.keys()) == {"features"}
        np.testing.assert_array_equal(file.get_tensor("features"), found["features"])


def test_features_without_unreadable_images(files, labelled, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(labelled / "train", tmp_path / "images")
    argv = [folder, "--model", files / "encoder.safetensors", "--num_workers", 0, "--batch_size", 4, "--out"]
    run(features, *argv, tmp_path / "all.npz")
    (folder / "kind3" / "03.png").write_text("text")
    monkeypatch.setattr(feature_files, "SAVE_EVERY", 1)
    said = fails(capsys, monkeypatch, features, *argv, tmp_path / "f.npz")
    assert f"{folder}/kind3/03.png: the file is not an image" in said
    assert "on_bad_image=skip" in said and not list(tmp_path.glob("f.npz*"))
    run(features, *argv, tmp_path / "f.npz", "--on_bad_image", "skip")
    assert f"{folder}/kind3/03.png: the file is not an image" in capsys.readouterr().out
    found, whole = np.load(tmp_path / "f.npz"), np.load(tmp_path / "all.npz")
    good = [not name.endswith("03.png") for name in whole["names"]]
    assert found["names"].tolist() == whole["names"][good].tolist()
    np.testing.assert_array_equal(found["labels"], whole["labels"][good])
    np.testing.assert_allclose(found["features"], whole["features"][good], rtol=1e-4, atol=1e-5)


def test_features_on_a_full_disk_fail_in_one_line_and_resume(files, labelled, small_disk, capsys, monkeypatch):
    """A write to a memory map would end the process with SIGBUS."""
    monkeypatch.setattr(feature_files, "SAVE_EVERY", 1)
    argv = [labelled, "--model", files / "encoder.safetensors", "--out", small_disk / "f.npz", "--num_workers", 0,
            "--batch_size", 4, "--pool", "tokens"]  # fmt: skip
    said = fails(capsys, monkeypatch, features, *argv)
    assert f"can't write {small_disk}/f.npz.partial (No space left on device): free space there" in said
    assert not (small_disk / "f.npz").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    run(features, *argv)
    assert "resuming after" in capsys.readouterr().out
    assert np.load(small_disk / "f.npz")["features"].shape == (48, 65, 128)


def test_invalid_inputs_are_errors(files, pictures, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    classifier, encoder, mae = (files / f"{kind}.safetensors" for kind in ("classifier", "encoder", "mae"))
    grid = ["--out", tmp_path / "grid.png"]
    for module, argv, wanted in (
        (predict, [tmp_path / "text.jpg", "--model", classifier], "text.jpg"),
        (predict, [tmp_path / "bomb.png", "--model", classifier], "bomb.png"),
        (predict, [PHOTOS[0], "--model", encoder], "classification head"),
        (predict, [PHOTOS[0], "--model", mae], "classification head"),
        (reconstruct, [PHOTOS[0], "--model", encoder, *grid], "mae_visualize_vit_large"),
        (reconstruct, [PHOTOS[0], "--model", classifier, *grid], "mae_visualize_vit_large"),
        (features, [pictures, "--model", mae, "--out", tmp_path / "f.csv"], ".npz"),
        (features, [tmp_path / "none", "--model", mae, "--out", tmp_path / "f.npz"], f"={tmp_path}/none: ")
    ):  # fmt: skip
        assert wanted in fails(capsys, monkeypatch, module, *argv)


def test_an_unwritable_output_is_an_error_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.png").mkdir()  # and the model does not exist
    for module in (predict, reconstruct):
        command = [PHOTOS[0], "--model", "nothing.pth", "--out"]
        for name in ("grid", "grid.txt", "nowhere/grid.png", "folder.png"):
            said = fails(capsys, monkeypatch, module, *command, tmp_path / name)
            assert "--out: " in said and str(tmp_path / Path(name).parts[0]) in said
    command = [tmp_path, "--model", "nothing.pth", "--out", tmp_path / "nowhere/f.npz"]
    assert f"{tmp_path}/nowhere" in fails(capsys, monkeypatch, features, *command)


def test_an_export_with_the_suffix_of_another_format_is_an_error(files, tmp_path, capsys, monkeypatch):
    """Before the model is read: the model does not exist."""
    assert export.SUFFIXES.keys() == export.WRITERS.keys()
    for to, name, other in (("safetensors", "x.pth", "x.safetensors"), ("reference", "x.safetensors", "x.pth"),
                            ("onnx", "x", "x.onnx"), ("torch_export", "x.onnx", "x.pt2"), ("timm", "x.onnx", "x"),
                            ("transformers", "x.safetensors", "x")):  # fmt: skip
        argv = ("--model", "nothing.pth", "--to", to, "--out", tmp_path / name)
        assert f"out={tmp_path / other}" in fails(capsys, monkeypatch, export, *argv)
        export.check_suffix(to, tmp_path / other)
    export.check_suffix("transformers", tmp_path / "vit-1.5")
    with pytest.raises(ValueError, match="out="):
        export.export(get_model(files / "mae.safetensors"), "safetensors", tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


class Numbers(list):
    classes = ()

    @property
    def labels(self):
        return np.array(self)


def test_two_processes_do_not_write_the_same_features(tmp_path):
    """The second of two starts is refused while the first computes, and reads the result afterwards."""

    def first(rest):
        with pytest.raises(ValueError, match="rows"):
            feature_files.extract(None, Numbers(range(4)), tmp_path / "rows")
        yield [torch.arange(8.0).view(4, 2)]

    features, labels = feature_files.extract(first, Numbers(range(4)), tmp_path / "rows")
    assert torch.equal(features, torch.arange(8.0).view(4, 2)) and labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(feature_files.extract(None, Numbers(range(4)), tmp_path / "rows")[0], features)


def test_an_interrupted_computation_of_other_features_is_not_resumed(tmp_path, monkeypatch):
    """Of three computations, the second has other settings, and is interrupted before it records its progress."""
    monkeypatch.setattr(feature_files, "SAVE_EVERY", 2)

    def compute(value, batches):
        def encode(rest):
            for number in range(len(rest) // 2):
                if number == batches:
                    raise KeyboardInterrupt
                yield [torch.full((2, 3), float(value))]

        return feature_files.extract(encode, Numbers(range(8)), tmp_path / "rows", {"model": value})[0]

    for value, batches in ((1, 2), (2, 1)):
        with pytest.raises(KeyboardInterrupt):
            compute(value, batches)
    assert (compute(1, 4) == 1).all()
