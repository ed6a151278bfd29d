"""The demo and the commands that measure, on small inputs with known results."""

import argparse
import base64
import io
import json
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.axes import Axes
from PIL import Image

import hubconf
import models_build
from benchmarks import machine, saving, targets
from demo import app, outputs, report, unpack_data
from inference import get_model, maps, reconstruct
from util.data.joint_transforms import fitted
from util.data.transforms import to_tensor
from util.settings import specs

CAT = ROOT / "demo" / "photos" / "chelsea.jpg"  # 451 x 300: 8 x 12 patches of the smallest model


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return get_model("mae_vit_mini_patch4")


# ------------------------------------------------------------------------------------------------------------ unpacking


def test_unpacked_images_have_their_class_number_and_pixels(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    sets = {f"{split}_images": generator.integers(0, 256, (count, 4, 4), np.uint8) for split, count in
            (("train", 6), ("val", 3))}  # fmt: skip
    labels = {"train_labels": np.array([0, 1, 1, 0, 1, 0]), "val_labels": np.array([1, 0, 1])}
    np.savez(tmp_path / "few.npz", classes=np.array(["T-shirt/top", "Ankle boot"]), **sets, **labels)
    monkeypatch.setattr(unpack_data, "ARCHIVE", tmp_path / "few.npz")
    unpack_data.unpack(tmp_path / "out")
    for split in ("train", "val"):
        expected = {
            f"{('t-shirt_top', 'ankle_boot')[label]}/{number:05}.png"
            for number, label in enumerate(labels[f"{split}_labels"])
        }
        files = {f"{path.parent.name}/{path.name}": path for path in (tmp_path / "out" / split).glob("*/*")}
        assert files.keys() == expected
        for name, path in files.items():
            assert np.array_equal(np.array(Image.open(path)), sets[f"{split}_images"][int(name[-9:-4])])


# --------------------------------------------------------------------------------------------------------------- report


def test_the_probe_is_selected_on_training_images_and_scored_on_test_images(monkeypatch):
    fits, scores = [], []

    class Regression:
        def __init__(self, C, max_iter):
            self.strength = C

        def fit(self, features, targets):
            fits.append((self.strength, len(targets)))
            return self

        def score(self, features, targets):
            scores.append((self.strength, len(targets)))
            return self.strength  # the highest value is selected

    monkeypatch.setattr(report, "LogisticRegression", Regression)
    assert report.probe(np.zeros((50, 3)), np.zeros(50), np.zeros((7, 3)), np.zeros(7)) == 1.0
    assert fits == [(0.1, 40), (1.0, 40), (1.0, 50)]
    assert scores == [(0.1, 10), (1.0, 10), (1.0, 7)]


def test_features_of_the_report(mae):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = mae.forward_features(mae.normalize(images)).numpy()
    features = report.encode(mae, images)
    np.testing.assert_allclose(features[:, :128], tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features[:, 128:], tokens[:, 1:].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_neighbors_returns_the_accuracy():
    """Classes are separate clusters; one of five test labels is wrong."""
    angles = np.linspace(0, 1, 40)
    train = np.concatenate([np.stack([np.cos(a + angles), np.sin(a + angles)], axis=1) for a in (0.0, 3.0)])
    labels = np.repeat([0, 1], 40)
    test, test_labels = train[[0, 20, 39, 45, 79]], np.array([0, 0, 0, 1, 0])
    assert report.neighbors(train.astype(np.float32), labels, test.astype(np.float32), test_labels) == 0.8


def test_the_accuracy_is_that_of_the_last_epoch(tmp_path):
    (tmp_path / "log.txt").write_text('{"test_acc1": 10.0}\n{"test_acc1": 62.5}\n')
    assert report.last_accuracy(tmp_path) == 0.625


def test_the_loss_is_drawn_over_finished_epochs(tmp_path, monkeypatch):
    plots = []
    original = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: plots.append(a) or original(self, *a, **k))
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 0.9}\n{"epoch": 1, "train_loss": 0.5}\n')
    report.draw_loss(tmp_path, tmp_path / "loss.png")
    assert plots == [([1, 2], [0.9, 0.5])]


def test_rows_of_the_report_use_the_named_models(labelled, tmp_path, monkeypatch):
    """The images and the model of each row of the table."""
    torch.manual_seed(1)
    model = get_model("mae_vit_mini_patch4", input_size=20, in_chans=3)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "classes": None}}, tmp_path / "c.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 0.9, "test_acc1": 25.0}\n')
    for name, accuracy in (("scratch", 30.0), ("finetuned", 60.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text(json.dumps({"test_acc1": accuracy}))
    probes = []
    monkeypatch.setattr(report, "probe", lambda *arguments: probes.append(arguments) or 0.5)
    monkeypatch.setattr(report, "neighbors", lambda *arguments: 0.25)
    monkeypatch.setattr(report, "PICTURES", 2)
    report.main(argparse.Namespace(
        checkpoint=tmp_path / "c.pth", data_path=str(labelled), out=tmp_path / "out", finetuned=tmp_path / "finetuned",
        scratch=tmp_path / "scratch", train_per_class=3,
    ))  # fmt: skip
    raw, untrained, trained, subset = probes
    assert [(len(arguments[0]), len(arguments[2])) for arguments in probes] == [(48, 23), (48, 23), (48, 23), (18, 23)]
    assert raw[0].shape == (48, 3 * 20 * 20)
    assert 0 <= raw[0].min() < raw[0].max() <= 1
    images, labels = report.read_images(model, str(labelled), "val")
    np.testing.assert_allclose(trained[2], report.encode(model, images), rtol=1e-4, atol=1e-5)
    assert not np.allclose(untrained[2], trained[2], atol=0.01)
    assert np.array_equal(raw[3], labels)
    assert np.bincount(subset[1]).tolist() == [3] * 6
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["18 labels: transformer from scratch"] == 0.3
    assert results["18 labels: the same, fine-tuned from the pre-trained encoder"] == 0.6


# -------------------------------------------------------------------------------------------------------- the web page


def picture_of(model, batch):
    return np.asarray(outputs.to_image(model, batch))


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
    (slider,) = [part["props"] for part in app.build(model).config["components"]
                 if part["type"] == "slider"]  # fmt: skip
    assert (slider["maximum"], slider["value"]) == (largest, min(largest, 0.75))
    for photo in (str(tmp_path / "square.png"), str(CAT)):
        assert outputs.draw_mask(model, photo, slider["maximum"], 0)[1] is not None
    if block and block > 1:
        with pytest.raises(ValueError, match="leaves none of the"):
            outputs.draw_mask(model, str(tmp_path / "square.png"), slider["maximum"] + slider["step"], 0)


def test_another_mask_is_never_the_present_one(tmp_path):
    """Two patches have two masks with one masked patch; every second seed repeats one, on average."""
    Image.new("RGB", (16, 8)).save(tmp_path / "small.png")
    torch.manual_seed(0)
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
        original, bright, _, legend = outputs.look_inside(mae, str(CAT), choices[head])
        assert np.array_equal(np.asarray(original), picture_of(mae, imgs))
        wanted = outputs._enlarge(maps.overlay(mae, imgs[0], expected))
        assert np.array_equal(np.asarray(bright), np.asarray(wanted))
        assert f"0 %<i></i>{100 * expected.max():.1f} %" in legend


def test_the_page_displays_the_queries_of_an_attentive_probe(mae, tmp_path):
    settings = {"model": "vit_mini_patch4", "input_size": 40, "patch_size": 4, "in_chans": 3, "global_pool": False,
                "nb_classes": 3, "probe": "attentive", "num_queries": 2}  # fmt: skip
    probe = models_build.probe(*specs(settings))
    torch.nn.init.normal_(probe.head.pool.queries)
    torch.save({"model": probe.state_dict(), "args": settings}, tmp_path / "probe.pth")
    classifier = get_model(tmp_path / "probe.pth")
    choices = outputs.attention_maps(mae, classifier)
    assert [choice.name for choice in choices[5:]] == ["mean of all queries", "query 1", "query 2"]
    imgs = reconstruct.uncropped_input(
        classifier, Image.open(CAT)
    )  # 60 x 40 pixels; that of the autoencoder has 48 x 32
    of_all = maps.query_attention(classifier, imgs)[0]
    for choice, expected in zip(choices[5:], (of_all.mean(dim=0), *of_all), strict=True):
        original, bright, colors, legend = outputs.look_inside(mae, str(CAT), choice)
        wanted = outputs._enlarge(maps.overlay(classifier, imgs[0], expected))
        assert np.array_equal(np.asarray(bright), np.asarray(wanted))
        assert original.size == colors.size == bright.size == (480, 320)
        assert f"0 %<i></i>{100 * expected.max():.1f} %" in legend
    components = app.build(mae, classifier).config["components"]
    menus = [part["props"] for part in components if part["type"] == "dropdown"]
    assert [name for name, _ in menus[0]["choices"]] == [choice.name for choice in choices]


def test_a_probe_of_gray_images_looks_inside_next_to_a_model_of_colors(mae, tmp_path):
    settings = {"model": "vit_mini_patch4", "input_size": 32, "patch_size": 4, "in_chans": 1, "global_pool": False,
                "nb_classes": 3, "probe": "attentive", "num_queries": 2}  # fmt: skip
    probe = models_build.probe(*specs(settings))
    torch.nn.init.normal_(probe.head.pool.queries)
    torch.save({"model": probe.state_dict(), "args": settings}, tmp_path / "probe.pth")
    classifier = get_model(tmp_path / "probe.pth")
    imgs = reconstruct.uncropped_input(classifier, Image.open(CAT).convert("L"))
    wanted = outputs._enlarge(maps.overlay(classifier, imgs[0], maps.query_attention(classifier, imgs)[0, 1]))
    _, bright, _, _ = outputs.look_inside(mae, str(CAT), outputs.attention_maps(mae, classifier)[-1])
    assert np.array_equal(np.asarray(bright), np.asarray(wanted))


def test_the_page_segments_like_the_model(tmp_path):
    torch.manual_seed(0)
    settings = {"model": "vit_mini_patch4", "input_size": 32, "patch_size": 4, "in_chans": 3, "nb_classes": 3,
                "head": "linear", "short_side": 32, "classes": ["sky", "<b>", "cat"]}  # fmt: skip
    own = models_build.segmenter(*specs(settings))
    torch.nn.init.normal_(own.head.classifier.weight)
    torch.save({"model": own.state_dict(), "args": settings}, tmp_path / "segmenter.pth")
    model = get_model(tmp_path / "segmenter.pth")
    colored, legend = outputs.segment(model, str(CAT), 1.0)
    pixels = model.normalize(to_tensor(fitted(Image.open(CAT), 32)))
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
    components = app.build(model).config["components"]
    assert [part["props"]["label"] for part in components if part["type"] == "tabitem"] == [
        "Segment",
        "Attention and features",
    ]


def test_the_page_classifies_like_the_model(tmp_path):
    torch.manual_seed(0)
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


def test_a_small_file_with_very_many_pixels_is_not_decoded(mae, tmp_path):
    """A PNG file of 18 KB would fill more than a gigabyte."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a.png", compress_level=9)
    assert (tmp_path / "a.png").stat().st_size < 30_000
    assert "a.png: its 12000 x 12000 pixels are more than the limit" in outputs.check(mae, str(tmp_path / "a.png"))
    assert outputs.open_usable(mae, str(tmp_path / "a.png")) is None


def test_the_page_rejects_images_in_an_escaped_message(mae, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "MAX_PIXELS", 101_000)
    strip, large = (
        "the aspect ratio of {} x {} pixels exceeds 4 to 1; crop",
        "its {} x {} pixels are more than the limit",
    )
    for size, expected in (
        ((400, 100), None),
        ((100, 401), strip),
        ((401, 100), strip),
        ((252, 400), None),
        ((253, 400), large),
    ):
        path = str(tmp_path / "a<b>.png")
        Image.new("RGB", size).save(path)
        message = outputs.check(mae, path)
        if expected is None:
            assert message == ""
            assert outputs.open_usable(mae, path).size == size
            continue
        assert f"a&lt;b&gt;.png: {expected.format(*size)}" in message and 'role="alert"' in message
        assert str(tmp_path) not in message
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
    panel, batch = app._panel("original"), torch.zeros(1, 3, 32, 32)
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


# ---------------------------------------------------------------------------------------------------------- benchmarks


def test_saving_prints_its_share_of_the_time(monkeypatch, capsys):
    """An update takes 1 s, or 3 s during a write; the copy takes 2 s. The cost per 15 minutes is 2 + 2 * (3 - 1) s."""
    clock, steps = SimpleNamespace(now=0.0), []

    def advance(seconds):
        clock.now += seconds

    class Slow:
        def __init__(self, *_, **__):
            self.writing = SimpleNamespace(done=lambda: len(steps) >= 17)

        def save(self, *_):
            advance(2)

        def close(self):
            pass

    class Model(torch.nn.Linear):
        patch_embed = SimpleNamespace(img_size=(4, 4))

        def forward(self, images):
            steps.append(clock.now)
            advance(3 if len(steps) > 15 else 1)
            return self.weight.sum(), None, None

    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(saving, "Saver", Slow)
    monkeypatch.setattr(saving.models_mae, "mae_vit_mini_patch4", lambda: Model(2, 2))
    saving.main(argparse.Namespace(model="mae_vit_mini_patch4", batch_size=2, save_minutes=15.0, folder=None))
    output = capsys.readouterr().out
    assert "| the training loop blocks for | 2.00 s |" in output
    assert "| the file is complete after | 8.0 s |" in output
    assert "| an update, median | 1.00 s |" in output
    assert "| an update during the write, median | 3.00 s |" in output
    assert "| share of the run, one save every 15 minutes | 0.67% |" in output


def test_a_result_without_git_has_no_commit(tmp_path, monkeypatch):
    commit = machine.commit()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ("-c", "user.name=a", "-c", "user.email=b")
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "c"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert machine.commit() == commit  # of the code, not of the working directory
    monkeypatch.setenv("PATH", "")
    machine.write("a", torch.device("cpu"), {}, {}, tmp_path)
    assert machine.read("a", tmp_path)["machine"]["commit"] is None


def test_a_result_has_its_settings_and_machine(tmp_path):
    settings = {"out": tmp_path, "name": "x", "batch_size": 64}
    machine.write("a", torch.device("cpu"), settings, {"images_per_second": {"ours": 3.0}}, tmp_path / "new")
    result = machine.read("a", tmp_path / "new")
    assert result["settings"] == {"batch_size": 64}
    assert result["images_per_second"] == {"ours": 3.0}
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["gpu"] is None
    assert machine.read("b", tmp_path / "new") is None


def test_ratios_use_the_fastest_other_implementation(tmp_path, monkeypatch):
    result = {"images_per_second": {"ours compiled": 6.0, "ours eager": 5.0, "plain": 4.0, "transformers": 3.0},
              "flops_per_image": 10.0, "peak_flops": 80.0}  # fmt: skip
    assert targets.ratio("ours compiled", "transformers", "plain")(result) == 1.5
    assert targets.share_of_peak(result) == 0.75
    monkeypatch.setattr(targets, "ROWS", [("most", "a", lambda result: result["wait"], -0.02, "{:.1%}"),
                                          ("least", "b", lambda result: result["wait"], 0.5, "{:.2f}")])  # fmt: skip
    (tmp_path / "a.json").write_text('{"wait": 0.01, "machine": {"gpu": null, "processor": "AMD EPYC"}}')
    (tmp_path / "a_tunables.json").write_text('{"wait": 0.005}')
    assert targets.table([tmp_path]).splitlines() == [
        "| | target | AMD EPYC |",
        "|---|---|---|",
        "| most | 2.0% | 1.0% (0.5%) |",
    ]
    (tmp_path / "gpu").mkdir()
    with pytest.raises(ValueError, match=r"gpu has no measurements; `\./run bench .*gpu` writes them$"):
        targets.table([tmp_path / "gpu"])
    (tmp_path / "gpu" / "b.json").write_text('{"wait": 0.7, "machine": {"gpu": "NVIDIA H200", "processor": "Intel"}}')
    assert targets.table([tmp_path, tmp_path / "gpu"]).splitlines()[::3] == [
        "| | target | AMD EPYC | NVIDIA H200 |",
        "| least | 0.50 |  | 0.70 |",
    ]
    assert machine.find("b", tmp_path)["wait"] == 0.7
    assert machine.find("a", tmp_path) is None


def test_the_default_folder_of_a_result_names_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "processor", lambda: "Intel Xeon, AMX")
    machine.write("a", torch.device("cpu"), {}, {}, None)
    assert machine.folders(tmp_path) == [tmp_path / "intel_xeon_amx"]
    assert machine.read("a", tmp_path / "intel_xeon_amx")


def test_the_requirements_of_a_space_are_those_of_the_code():
    """gradio comes with a Space."""
    text = (ROOT / "demo" / "SPACE.md").read_text(encoding="utf-8")
    requirements = text.partition("`requirements.txt`:\n\n```\n")[2].partition("```")[0].split()
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    assert sorted(requirements) == sorted(names.get(name, name) for name in hubconf.dependencies)
