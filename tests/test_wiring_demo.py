"""The demo and the commands behind the documents' numbers: on small inputs with known answers."""

import argparse
import base64
import io
import json
import re
from types import SimpleNamespace

import gradio
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.axes import Axes
from PIL import Image

from benchmarks import machine, saving, targets
from demo import app, report, segmentation, unpack_data
from inference import get_model, maps, reconstruct
from util.cli import entry_point

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
        found = {f"{path.parent.name}/{path.name}": path for path in (tmp_path / "out" / split).glob("*/*")}
        assert found.keys() == expected
        for name, path in found.items():
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
            return self.strength  # the strongest wins

    monkeypatch.setattr(report, "LogisticRegression", Regression)
    assert report.probe(np.zeros((50, 3)), np.zeros(50), np.zeros((7, 3)), np.zeros(7)) == 1.0
    assert fits == [(0.1, 40), (1.0, 40), (1.0, 50)]
    assert scores == [(0.1, 10), (1.0, 10), (1.0, 7)]


def test_features_of_the_report(mae):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = mae.forward_features(mae.normalize(images)).numpy()
    found = report.encode(mae, images)
    np.testing.assert_allclose(found[:, :128], tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 128:], tokens[:, 1:].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_neighbours_returns_the_accuracy():
    """The class is where a point lies: every test point but one of the wrong label is right."""
    angles = np.linspace(0, 1, 40)
    train = np.concatenate([np.stack([np.cos(a + angles), np.sin(a + angles)], axis=1) for a in (0.0, 3.0)])
    labels = np.repeat([0, 1], 40)
    test, test_labels = train[[0, 20, 39, 45, 79]], np.array([0, 0, 0, 1, 0])
    assert report.neighbours(train.astype(np.float32), labels, test.astype(np.float32), test_labels) == 0.8


def test_the_accuracy_is_that_of_the_last_epoch(tmp_path):
    (tmp_path / "log.txt").write_text('{"test_acc1": 10.0}\n{"test_acc1": 62.5}\n')
    assert report.last_accuracy(tmp_path) == 0.625


def test_the_loss_is_drawn_over_finished_epochs(tmp_path, monkeypatch):
    drawn = []
    plain = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(a) or plain(self, *a, **k))
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 0.9}\n{"epoch": 1, "train_loss": 0.5}\n')
    report.draw_loss(tmp_path / "log.txt", tmp_path / "loss.png")
    assert drawn == [([1, 2], [0.9, 0.5])]


def test_rows_of_the_report_use_the_named_models(labelled, tmp_path, monkeypatch):
    """Which images and which model each row of the table takes."""
    torch.manual_seed(1)
    model = get_model("mae_vit_mini_patch4", input_size=20, in_chans=3)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "classes": None}}, tmp_path / "c.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 0.9, "test_acc1": 25.0}\n')
    for name, accuracy in (("scratch", 30.0), ("finetuned", 60.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text(json.dumps({"test_acc1": accuracy}))
    probes = []
    monkeypatch.setattr(report, "probe", lambda *given: probes.append(given) or 0.5)
    monkeypatch.setattr(report, "neighbours", lambda *given: 0.25)
    monkeypatch.setattr(report, "PICTURES", 2)
    report.main(argparse.Namespace(
        checkpoint=tmp_path / "c.pth", data_path=str(labelled), out=tmp_path / "out", finetuned=tmp_path / "finetuned",
        scratch=tmp_path / "scratch", train_per_class=3,
    ))  # fmt: skip
    raw, untrained, trained, few = probes
    assert [(len(given[0]), len(given[2])) for given in probes] == [(48, 23), (48, 23), (48, 23), (18, 23)]
    assert raw[0].shape == (48, 3 * 20 * 20)
    assert 0 <= raw[0].min() < raw[0].max() <= 1
    images, labels = report.read_images(model, str(labelled), "val")
    np.testing.assert_allclose(trained[2], report.encode(model, images), rtol=1e-4, atol=1e-5)
    assert not np.allclose(untrained[2], trained[2], atol=0.01)
    assert np.array_equal(raw[3], labels)
    assert np.bincount(few[1]).tolist() == [3] * 6
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["18 labels: transformer from scratch"] == 0.3
    assert results["18 labels: the same, fine-tuned from the pre-trained encoder"] == 0.6


# -------------------------------------------------------------------------------------------------------- segmentation


def test_labels_of_segmentation_are_the_classes_of_both_halves():
    pictures, labels = segmentation.make_pictures("val", 40, seed=1)
    archive = np.load(segmentation.ARCHIVE)
    left, right = np.random.default_rng(1).integers(2000, size=(2, 40))
    for number in range(40):
        for source, part in ((left, slice(0, 8)), (right, slice(20, 28))):
            own = archive["val_images"][source[number]][:, part]
            assert np.array_equal(pictures[number, 0, :, part], own)
            expected = np.where(own > 30, archive["val_labels"][source[number]] + 1, 0)
            assert np.array_equal(labels[number, :, part], expected)


def test_a_head_standardises_its_features():
    features = torch.randn(200, 5, 2, 2) * 7 + 3
    head = segmentation.Head(features, 2, 3)
    seen = []
    head.linear.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert head(features).shape == (200, 3, 4, 4)
    torch.testing.assert_close(seen[0].mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[0].std(dim=(0, 2, 3)), torch.ones(5), rtol=0, atol=1e-3)


def test_rows_of_segmentation_use_the_named_models(tmp_path, monkeypatch):
    torch.manual_seed(1)
    model = get_model("mae_vit_mini_patch4", input_size=28, patch_size=7, in_chans=1)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "model.pth")
    calls = []

    def segment(encoder, seen, tested, layers):
        calls.append((encoder.blocks[0].mlp.fc1.weight, seen, tested, layers))
        return torch.zeros_like(tested[1])

    monkeypatch.setattr(segmentation, "segment", segment)
    argv = ["--model", tmp_path / "model.pth", "--pictures", 30, "--layers", 2, "--out", tmp_path, "--device", "cpu"]
    segmentation.main(entry_point.parse(segmentation.get_args_parser(), [str(part) for part in argv]))
    (untrained, *_), (trained, seen, tested, layers) = calls
    assert torch.equal(trained, model.blocks[0].mlp.fc1.weight)
    assert not torch.equal(untrained, trained)
    assert layers == 2
    assert torch.equal(seen[0], segmentation.make_pictures("train", 30, 0)[0])
    assert torch.equal(tested[0], segmentation.make_pictures("val", 1000, 1)[0])


def test_the_head_uses_the_given_number_of_blocks(monkeypatch):
    model = get_model("mae_vit_mini_patch4", input_size=28, patch_size=7, in_chans=1)
    shapes = []
    monkeypatch.setattr(segmentation, "train", lambda head, features, labels: shapes.append(features.shape))
    pictures = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.ones(4, 28, 28, dtype=torch.int64)
    assert segmentation.segment(model, pictures, pictures, 3).shape == (4, 28, 28)
    assert shapes == [(4, 3 * 128, 4, 4)]


# -------------------------------------------------------------------------------------------------------- the web page


def picture_of(model, batch):
    return np.asarray(app._image(model, batch))


def test_the_page_masks_the_selected_patches(mae):
    masked = [3, 17, 95]
    *panels, caption = app.paint(mae, str(CAT), 0.5, 0, " ".join(map(str, masked)))
    mask = torch.zeros(1, 96)
    mask[0, masked] = 1
    expected = mae.reconstruct(reconstruct.uncropped_input(mae, Image.open(CAT)), mask=mask)
    assert "**3 of 96 patches are masked**" in caption
    for number in range(4):
        assert np.array_equal(np.asarray(panels[number]), picture_of(mae, expected[number]))


def test_the_page_masks_by_ratio_and_seed(mae):
    for ratio, seed, count in ((0.25, 0, 24), (0.5, 3, 48)):
        *shown, said = app.paint(mae, str(CAT), ratio, seed, "")
        painted = reconstruct.reconstruct(mae, str(CAT), ratio, seed)
        assert f"**{count} of 96 patches are masked**, chosen by seed {seed}" in said
        assert f"PSNR: **{reconstruct.psnr(mae, painted):.2f} dB**" in said
        assert np.array_equal(np.asarray(shown[3]), picture_of(mae, painted.pasted))
    canvas, *_ = app.open_photo(mae, str(CAT), 0.5, 0)
    picture = Image.open(io.BytesIO(base64.b64decode(canvas.props["picture"].partition(",")[2])))
    assert (canvas.props["rows"], canvas.props["columns"]) == (8, 12)
    assert picture.size == (480, 320)


def test_the_page_shows_the_chosen_head(mae):
    imgs = reconstruct.uncropped_input(mae, Image.open(CAT))
    attention = maps.attention(mae, imgs)[0]
    for head, expected in ((0, attention.mean(dim=0)), (1, attention[0]), (4, attention[3])):
        bright, _ = app.look_inside(mae, str(CAT), head)
        wanted = app._enlarge(maps.overlay(mae, imgs[0], expected))
        assert np.array_equal(np.asarray(bright), np.asarray(wanted))


def test_the_page_rejects_strips_with_an_escaped_message(mae, tmp_path):
    for size, refused in (((400, 100), False), ((100, 401), True), ((401, 100), True)):
        path = tmp_path / "a<b>.png"
        Image.new("RGB", size).save(path)
        if not refused:
            assert app._open(mae, str(path)).size == size
            continue
        with pytest.raises(gradio.Error, match=r"a&lt;b&gt;\.png: the aspect ratio of .* exceeds 4 to 1") as stop:
            app.paint(mae, str(path), 0.5, 0, "")
        assert str(tmp_path) not in str(stop.value)


# ---------------------------------------------------------------------------------------------------------- benchmarks


def test_saving_prints_its_share_of_the_time(monkeypatch, capsys):
    """A step takes 1 s, one beside the saving 3 s, the copy 2 s: of 15 minutes, 2 + 2 * (3 - 1) s."""
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
    said = capsys.readouterr().out
    assert "| the training loop blocks for | 2.00 s |" in said
    assert "| the file is complete after | 8.0 s |" in said
    assert "| an update, median | 1.00 s |" in said
    assert "| an update during the write, median | 3.00 s |" in said
    assert "| share of the run, one save every 15 minutes | 0.67% |" in said


def test_a_result_has_its_settings_and_machine(tmp_path):
    settings = {"out": tmp_path, "name": "x", "batch_size": 64}
    machine.write("a", torch.device("cpu"), settings, {"images_per_second": {"ours": 3.0}}, tmp_path / "new")
    found = machine.read("a", tmp_path / "new")
    assert found["settings"] == {"batch_size": 64}
    assert found["images_per_second"] == {"ours": 3.0}
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["gpu"] is None
    assert machine.read("b", tmp_path / "new") is None


def test_ratios_use_the_fastest_other_implementation(tmp_path, monkeypatch):
    found = {"images_per_second": {"ours compiled": 6.0, "ours eager": 5.0, "plain": 4.0, "transformers": 3.0},
             "flops_per_image": 10.0, "peak_flops": 80.0}  # fmt: skip
    assert targets.ratio("ours compiled", "transformers", "plain")(found) == 1.5
    assert targets.share_of_peak(found) == 0.75
    monkeypatch.setattr(targets, "ROWS", [("most", "a", lambda found: found["wait"], -0.02, "{:.1%}"),
                                          ("least", "b", lambda found: found["wait"], 0.5, "{:.2f}")])  # fmt: skip
    (tmp_path / "a.json").write_text('{"wait": 0.01}')
    (tmp_path / "a_tunables.json").write_text('{"wait": 0.005}')
    assert targets.table(tmp_path).splitlines()[2:] == [
        "| most | 2.0% | 1.0% | 0.5% |",
        "| least | 0.50 | not measured |  |",
    ]
    assert re.match(r"\| \| target \| measured \|", targets.table(tmp_path))
