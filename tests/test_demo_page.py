"""The web page without a browser: masks, errors and examples. demo_app.py visits it in a browser."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import call
from PIL import Image

from demo import app, unpack_data
from mae.inference import export, get_model, reconstruct

CAT = str(ROOT / "demo" / "photos" / "chelsea.jpg")  # 451 x 300: 8 x 12 patches of the smallest model, 320 x 480 pixels


@pytest.fixture
def mae():
    return get_model("mae_vit_mini_patch4")


def test_a_click_masks_a_patch(mae):
    mask, *_ = app.answer(mae, CAT, "", lambda picture: reconstruct.reconstruct(mae, picture, 0.5, 3))
    row, column = divmod(int(mask[0].argmin()), 12)  # a visible patch
    by_hand, caption, *panels = app.answer(
        mae, CAT, "by you", lambda picture: app.toggle(mae, picture, mask, 40 * column + 39, 40 * row)
    )
    expected = mask.clone()
    expected[0, 12 * row + column] = 1
    assert torch.equal(by_hand, expected)
    result = mae.reconstruct(reconstruct.uncropped_input(mae, Image.open(CAT)), mask=expected)
    assert "<b>49 of 96 patches are masked</b>, by you" in caption
    assert f"<b>PSNR {reconstruct.psnr(mae, result):.2f} dB</b>" in caption
    for panel, part in zip(panels, (result.masked, result.pasted, result.original), strict=True):
        assert np.array_equal(np.asarray(panel), np.asarray(app.to_picture(mae, part)))


def test_a_click_on_a_file_with_invalid_pixels(tmp_path):
    """They are the mean in the reconstruction, as without a click."""
    values = np.random.default_rng(0).random((32, 32, 1), dtype=np.float32)
    values[:8] = np.nan
    np.save(tmp_path / "a.npy", values)
    model = get_model("mae_vit_mini_patch4", in_chans=1, input_size=32, nodata="nan")
    mask = torch.zeros(1, 64)
    result = app.toggle(model, app.open_photo(model, str(tmp_path / "a.npy")), mask, 0, 0)
    assert all(part.isfinite().all() for part in result)


def test_the_last_visible_patch_stays_visible(mae):
    mask = torch.ones(1, 96)
    mask[0, 95] = 0
    kept, caption, *panels = app.answer(
        mae, CAT, "by you", lambda picture: app.toggle(mae, picture, mask, 480, 320), "unchanged"
    )
    assert {kept, *panels} == {"unchanged"} and 'role="alert"' in caption and "visible patch" in caption


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_format_is_reconstructed(channels, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (40, 70, 3), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", values)
    Image.fromarray(values[:, :, 0]).save(tmp_path / "deep.png")
    Image.new("CMYK", (70, 40)).save(tmp_path / "print.tif")
    Image.new("L", (40, 10)).save(tmp_path / "strip.bmp")
    model = get_model("mae_vit_mini_patch4", in_chans=channels)
    for file in sorted(tmp_path.iterdir()):
        mask, _, *panels = app.answer(
            model, str(file), "", lambda picture: reconstruct.reconstruct(model, picture, 0.5)
        )
        size = (1280, 320) if file.name == "strip.bmp" else (560, 320)
        assert {panel.size for panel in panels} == {size}
        assert mask.sum() == size[0] * size[1] // 40**2 // 2


def test_the_page_rejects_images_in_an_escaped_message(mae, tmp_path, monkeypatch):
    path = tmp_path / "a<b>.png"
    monkeypatch.setattr(app, "MAX_PIXELS", 101_000)
    for size, said in (((253, 400), "the limit"), ((401, 100), "aspect ratio"), (None, "No such file")):
        if size:
            Image.new("RGB", size).save(path)
        else:
            path.unlink()  # uploads are deleted after an hour
        mask, caption, *panels = app.answer(mae, str(path), "", lambda picture: None)
        assert said in caption and "a&lt;b&gt;.png" in caption and 'role="alert"' in caption
        assert str(tmp_path) not in caption and [mask, *panels] == [None] * 4
    assert app.answer(mae, None, "", lambda picture: None) == [None, "", None, None, None]


def test_equal_pictures_are_files_of_their_own(mae):
    """A visitor loads one of them while another is written."""
    panel, batch = app.gr.Image(format="png"), torch.zeros(1, 3, 32, 32)
    first, second = (panel.postprocess(app.to_picture(mae, batch)).path for _ in range(2))
    assert first != second
    assert np.array_equal(Image.open(first), Image.open(second))


def test_examples_are_of_the_models_kind(mae, tmp_path):
    names = [Path(file).stem for file in app.find_examples(mae, None)]
    assert names == ["astronaut", "chelsea", "coffee"]
    assert len(app.find_examples(get_model("mae_vit_mini_patch4", in_chans=1), None)) == 10
    four = get_model("mae_vit_mini_patch4", in_chans=4)
    assert app.find_examples(four, None) == {} and app.build(four)
    for number in range(43):
        folder = tmp_path / f"class{number // 4:02}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{number:02}.png")
    (tmp_path / "class00" / "bad.png").write_text("no image")
    files = app.find_examples(mae, tmp_path)
    assert len(files) == 9 and not any("bad" in file for file in files)


def test_examples_of_clothes_are_test_images():
    """The first of each class."""
    archive = np.load(unpack_data.ARCHIVE)
    names = [unpack_data.folder_of(name) for name in archive["classes"]]
    assert sorted(path.stem for path in app.SAMPLES[1].glob("*.png")) == sorted(names)
    for label, name in enumerate(names):
        first = archive["val_images"][np.argmax(archive["val_labels"] == label)]
        assert np.array_equal(np.array(Image.open(app.SAMPLES[1] / f"{name}.png")), first)


def test_invalid_flags_are_errors(mae, tmp_path):
    files = [tmp_path / "mae.safetensors", tmp_path / "encoder.safetensors"]
    for model, file in zip((mae, export.encoder_of(mae)), files, strict=True):
        export.export(model, "safetensors", file)
    with pytest.raises(ValueError, match="--samples"):
        call(app, model=files[0], samples=tmp_path / "none")
    with pytest.raises(ValueError, match=r"encoder.safetensors"):
        call(app, model=files[1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}"):
            call(app, model=files[0], port=port)
