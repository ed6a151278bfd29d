"""The web page without a browser: its pictures, texts and examples. demo_app.py visits it in a browser."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from demo import app, outputs, unpack_data
from mae import build
from mae.data.item import Item
from mae.data.transforms import scaled_transform
from mae.inference import get_model, maps, reconstruct
from mae.settings import specs

CAT = ROOT / "demo" / "photos" / "chelsea.jpg"  # 451 x 300: 8 x 12 patches of the smallest model


@pytest.fixture
def mae():
    return get_model("mae_vit_mini_patch4")


def picture_of(model, batch):
    return np.asarray(outputs.to_image(model, batch))


def assert_overlay(look, model, image, weights):
    """What `look_inside` returns shows attention weights over an image."""
    assert np.array_equal(np.asarray(look[1]), np.asarray(outputs.enlarge(maps.overlay(model, image, weights))))
    assert f"0 %<i></i>{100 * weights.max():.1f} %" in look[3]


def test_the_page_masks_the_selected_patches(mae):
    masked = [3, 17, 95]
    *panels, caption = outputs.apply_mask(mae, str(CAT), " ".join(map(str, masked)))
    mask = torch.zeros(1, 96)
    mask[0, masked] = 1
    expected = mae.reconstruct(reconstruct.uncropped_input(mae, Image.open(CAT)), mask=mask)
    assert "<b>3 of 96 patches are masked</b>, by you" in caption
    for number in range(4):
        assert np.array_equal(np.asarray(panels[number]), picture_of(mae, expected[number]))


def test_the_page_masks_by_ratio_and_seed(mae):
    for ratio, seed, count in ((0.25, 0, 24), (0.5, 3, 48), (0.5, None, 48)):
        editor, *panels, caption = outputs.draw_mask(mae, str(CAT), ratio, seed)
        result = reconstruct.reconstruct(mae, str(CAT), ratio, seed or 0)
        assert f"<b>{count} of 96 patches are masked</b>, at random with seed {seed or 0}." in caption
        assert f"PSNR <b>{reconstruct.psnr(mae, result):.2f} dB</b>" in caption
        assert np.array_equal(np.asarray(panels[3]), picture_of(mae, result.pasted))
        assert editor["value"] == " ".join(map(str, result.mask[0].nonzero()[:, 0].tolist()))
        assert (editor["rows"], editor["columns"]) == (8, 12)
        picture = Image.open(io.BytesIO(base64.b64decode(editor["picture"].partition(",")[2])))
        assert picture.size == (480, 320)


@pytest.mark.parametrize(
    ("block", "size", "largest"), [(None, 32, 0.95), (1, 32, 0.95), (4, 32, 0.75), (3, 32, 0.85), (2, [16, 32], 0.75)]
)  # blocks of a square image: 64, 64, 4, 9, 4
def test_every_ratio_of_the_page_leaves_a_block_visible(block, size, largest, tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "square.png")
    model = get_model("mae_vit_mini_patch4", input_size=size, mask_block=block)
    (slider,) = [part["props"] for part in app.build(model).config["components"] if part["type"] == "slider"]
    assert (slider["maximum"], slider["value"]) == (largest, min(largest, 0.75))
    for photo in (str(tmp_path / "square.png"), str(CAT)):
        assert outputs.draw_mask(model, photo, slider["maximum"], 0)[1] is not None
    if block and block > 1:
        with pytest.raises(ValueError, match="leaves 0 of"):
            outputs.draw_mask(model, str(tmp_path / "square.png"), slider["maximum"] + slider["step"], 0)


def test_another_mask_is_never_the_present_one(tmp_path):
    """Two patches have two masks with one masked patch; every second seed repeats one, on average."""
    Image.new("RGB", (16, 8)).save(tmp_path / "small.png")
    model = get_model("mae_vit_mini_patch4", input_size=[8, 16], patch_size=8)
    seed, masked = 2**32 - 4, "0"
    for _ in range(6):
        seed, editor, *_, caption = outputs.another_mask(model, str(tmp_path / "small.png"), 0.5, seed, masked)
        assert editor["value"] == {"0": "1", "1": "0"}[masked]
        assert f"at random with seed {seed}." in caption
        masked = editor["value"]
    assert 0 <= seed < 100
    assert outputs.another_mask(model, None, 0.5, 3, "") == [3, {"value": "", "picture": ""}, *[None] * 4, ""]


def test_masks_that_can_not_be_reconstructed_are_errors_without_pictures(mae):
    for masked, message in ((range(96), "all patches are masked"), ([96], "the mask does not belong to this image")):
        *panels, caption = outputs.apply_mask(mae, str(CAT), " ".join(map(str, masked)))
        assert panels == [None] * 4
        assert message in caption and 'role="alert"' in caption
    *panels, caption = outputs.apply_mask(mae, str(CAT), "")
    assert caption == "<p><b>0 of 96 patches are masked</b>, by you.</p>"
    assert np.array_equal(np.asarray(panels[0]), np.asarray(panels[3]))


def test_the_page_displays_the_selected_head(mae):
    imgs = reconstruct.uncropped_input(mae, Image.open(CAT))
    attention = maps.attention(mae, imgs)[0]
    choices = outputs.attention_maps(mae, None)
    assert [choice.name for choice in choices] == ["mean of all heads", *(f"head {n}" for n in (1, 2, 3, 4))]
    for head, expected in ((0, attention.mean(dim=0)), (1, attention[0]), (4, attention[3])):
        look = outputs.look_inside(mae, str(CAT), choices[head])
        assert np.array_equal(np.asarray(look[0]), picture_of(mae, imgs))
        assert_overlay(look, mae, imgs[0], expected)


def attentive_probe(file, side, channels):
    """A probe with random queries, from a file."""
    settings = {"model": "vit_mini_patch4", "input_size": side, "patch_size": 4, "in_chans": channels,
                "global_pool": False, "nb_classes": 3, "probe": "attentive", "num_queries": 2}  # fmt: skip
    probe = build.probe(*specs(settings))
    torch.nn.init.normal_(probe.head.pool.queries)
    torch.save({"model": probe.state_dict(), "args": settings}, file)
    return get_model(file)


def test_the_page_displays_the_queries_of_an_attentive_probe(mae, tmp_path):
    classifier = attentive_probe(tmp_path / "probe.pth", 40, 3)
    choices = outputs.attention_maps(mae, classifier)
    assert [choice.name for choice in choices[5:]] == ["mean of all queries", "query 1", "query 2"]
    imgs = reconstruct.uncropped_input(classifier, Image.open(CAT))  # 60 x 40 pixels; the autoencoder has 48 x 32
    of_all = maps.query_attention(classifier, imgs)[0]
    for choice, expected in zip(choices[5:], (of_all.mean(dim=0), *of_all), strict=True):
        look = outputs.look_inside(mae, str(CAT), choice)
        assert {picture.size for picture in look[:3]} == {(480, 320)}
        assert_overlay(look, classifier, imgs[0], expected)
    components = app.build(mae, classifier).config["components"]
    menus = [part["props"] for part in components if part["type"] == "dropdown"]
    assert [name for name, _ in menus[0]["choices"]] == [choice.name for choice in choices]


def test_a_probe_of_gray_images_looks_inside_next_to_a_model_of_colors(mae, tmp_path):
    classifier = attentive_probe(tmp_path / "probe.pth", 32, 1)
    imgs = reconstruct.uncropped_input(classifier, Image.open(CAT).convert("L"))
    look = outputs.look_inside(mae, str(CAT), outputs.attention_maps(mae, classifier)[-1])
    assert_overlay(look, classifier, imgs[0], maps.query_attention(classifier, imgs)[0, 1])


def test_the_page_segments_like_the_model(tmp_path):
    settings = {"model": "vit_mini_patch4", "input_size": 32, "patch_size": 4, "in_chans": 3, "nb_classes": 3,
                "head": "linear", "short_side": 32, "classes": ["sky", "<b>", "cat"]}  # fmt: skip
    own = build.segmenter(*specs(settings))
    torch.nn.init.normal_(own.head.classifier.weight)
    torch.save({"model": own.state_dict(), "args": settings}, tmp_path / "segmenter.pth")
    model = get_model(tmp_path / "segmenter.pth")
    colored, legend = outputs.segment(model, str(CAT), 1.0)
    pixels = model.normalize(scaled_transform(32)(Item(Image.open(CAT))).image)
    classes = model.segment(pixels)
    assert classes.shape == (32, 48) and len(np.unique(classes)) > 1
    assert not model.colors[0].any() and (classes == 0).any()
    plain, _ = outputs.segment(model, str(CAT), 0.0)
    colors, large = model.colors[classes].repeat(10, axis=0).repeat(10, axis=1), classes.repeat(10, axis=0)
    expected = np.where((large.repeat(10, axis=1) == 0)[:, :, None], np.asarray(plain), colors)
    assert np.array_equal(np.asarray(colored), expected)  # black, the color of the first class, is transparent
    shares = np.bincount(classes.ravel(), minlength=3) / classes.size
    for name, share in zip(("sky", "&lt;b&gt;", "cat"), shares, strict=True):
        assert (f"{name}: {100 * share:.1f} %" in legend) == bool(share)
    assert np.array_equal(np.asarray(plain), np.asarray(outputs.to_image(model, pixels[None])))
    assert outputs.segment(model, None, 0.5) == [None, ""]
    tabs = [part["props"]["label"] for part in app.build(model).config["components"] if part["type"] == "tabitem"]
    assert tabs == ["Segment", "Attention and features"]


def test_the_page_classifies_like_the_model(tmp_path):
    classifier = get_model("vit_mini_patch4", nb_classes=7)
    deep = tmp_path / "deep.npy"
    np.save(deep, np.random.default_rng(0).integers(0, 2**16, (40, 50, 3), dtype=np.uint16))
    for path in (str(CAT), str(deep)):
        assert outputs.classify(classifier, path) == pytest.approx(dict(classifier.predict(path)["top"]))


def test_the_most_likely_of_two_classes_with_one_name_is_displayed():
    classifier = get_model("vit_mini_patch4", nb_classes=3, classes=["crane", "owl", "crane"])
    torch.nn.init.zeros_(classifier.head.weight)
    classifier.head.bias.data = torch.tensor([0.1, 0.2, 0.7]).log()
    assert outputs.classify(classifier, str(CAT)) == pytest.approx({"crane": 0.7, "owl": 0.2})


def test_the_page_rejects_images_in_an_escaped_message(mae, tmp_path, monkeypatch):
    path = str(tmp_path / "a<b>.png")
    Image.new("1", (12_000, 12_000)).save(path)  # a file of 18 KB, which would fill more than a gigabyte
    assert "its 12000 x 12000 pixels of 1 channels are more than the limit" in outputs.check(mae, path)
    assert outputs.open_usable(mae, path) is None
    monkeypatch.setattr(outputs, "MAX_PIXELS", 101_000)
    for size in ((400, 100), (252, 400)):
        Image.new("RGB", size).save(path)
        assert outputs.check(mae, path) == ""
        assert outputs.open_usable(mae, path).size == size
    for size, expected in (((100, 401), "aspect ratio"), ((401, 100), "aspect ratio"), ((253, 400), "the limit")):
        Image.new("RGB", size).save(path)
        message = outputs.check(mae, path)
        assert "a&lt;b&gt;.png: " in message and f"{size[0]} x {size[1]} pixels" in message and expected in message
        assert 'role="alert"' in message and str(tmp_path) not in message
        assert outputs.draw_mask(mae, path, 0.5, 0) == [{"value": "", "picture": ""}, *[None] * 4, ""]
        assert outputs.apply_mask(mae, path, "3") == [*[None] * 4, ""]
        assert outputs.look_inside(mae, path, outputs.attention_maps(mae, None)[0]) == [None, None, None, ""]
        assert outputs.classify(mae, path) is None
    assert outputs.check(mae, None) == ""
    deleted = str(tmp_path / "deleted.png")
    assert "No such file" in outputs.check(mae, deleted)
    for answer in (outputs.draw_mask(mae, deleted, 0.5, 0), outputs.apply_mask(mae, deleted, "3")):
        assert "the upload was deleted" in answer[-1] and answer[-2] is None


def test_equal_pictures_are_files_of_their_own(mae):
    """A visitor loads one of them while another is written."""
    panel, batch = app.image_panel("original"), torch.zeros(1, 3, 32, 32)
    first, second = (panel.postprocess(outputs.to_image(mae, batch)).path for _ in range(2))
    assert first != second
    assert np.array_equal(Image.open(first), Image.open(second))


def test_the_page_describes_models(mae):
    assert outputs.describe(mae) == "<b>mae_vit_mini_patch4</b>: input 32 × 32 pixels, RGB; 64 patches of 4 × 4 pixels"
    settings = {"input_size": [32, 64], "patch_size": [8, 16], "in_chans": 4, "nb_classes": 13}
    names = ["<b>", *"cdefghijklmn"]
    text = outputs.describe(get_model("vit_mini_patch4", classes=names, **settings))
    assert "input 64 × 32 pixels, 4 channels; 16 patches of 16 × 8 pixels; 13 classes: &lt;b&gt;, c, d" in text
    assert text.endswith("l, m, …")
    text = outputs.describe(get_model("vit_mini_patch4", nb_classes=2))
    assert text.endswith("2 classes: class 0, class 1")


def test_examples_are_of_the_models_kind(tmp_path):
    def alts(channels: int, samples=None) -> list[str]:
        page = app.build(get_model("mae_vit_mini_patch4", in_chans=channels), samples=samples)
        return re.findall(r'alt="(.*?)"', str(page.config["components"]))

    assert alts(3) == ["astronaut", "chelsea", "coffee"]
    assert alts(1)[:2] == ["ankle_boot", "bag"] and len(alts(1)) == 10
    assert alts(4) == []
    classifier = str(app.build(get_model("vit_mini_patch4", nb_classes=2)).config["components"])
    assert "<h1>Vision transformer</h1>" in classifier and "2 classes: class 0, class 1." in classifier
    for number in range(43):
        folder = tmp_path / f"class{number // 4:02}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{number:02}.png")
    (tmp_path / "class00" / "bad.png").write_text("no image")
    (tmp_path / "class00" / "notes.txt").write_text("no image")
    assert alts(3, tmp_path) == ["00", *(f"{number:02}" for number in range(7, 36, 4))]  # bad.png would be the second


def test_examples_of_clothes_are_test_images():
    """The first of each class."""
    archive = np.load(unpack_data.ARCHIVE)
    names = [unpack_data.folder_of(name) for name in archive["classes"]]
    assert sorted(path.stem for path in app.SAMPLES[1].glob("*.png")) == sorted(names)
    for label, name in enumerate(names):
        first = archive["val_images"][np.argmax(archive["val_labels"] == label)]
        assert np.array_equal(np.array(Image.open(app.SAMPLES[1] / f"{name}.png")), first)
