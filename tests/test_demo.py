"""The parts of the demo; `.ci/run` runs the complete demo."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import call
from PIL import Image
from sklearn.linear_model import LogisticRegression

from demo import epochs as choose_epochs
from demo import report
from mae.compare import summary
from mae.compare.summary import Result
from mae.evaluate import knn, pictures
from mae.inference import get_model


def script(*argv, cwd=ROOT):
    subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("images")
    script("demo/unpack_data.py", "--out", out)
    return out


@pytest.mark.slow
def test_unpacked_files_equal_the_images_of_the_archive(unpacked):
    archive = np.load(ROOT / "demo/data/fashion_mnist_12k.npz")
    assert len(list(unpacked.glob("train/*/*.png"))) == 10_000
    assert len(list(unpacked.glob("val/*/*.png"))) == 2_000
    assert len(list((unpacked / "train").iterdir())) == 10
    for number in (0, 7, 1999):
        (path,) = unpacked.glob(f"val/*/{number:05}.png")
        assert np.array_equal(np.array(Image.open(path)), archive["val_images"][number])
        name = archive["classes"][archive["val_labels"][number]]
        assert path.parent.name == name.lower().replace("/", "_").replace(" ", "_")


@pytest.mark.parametrize(("images_per_s", "epochs"), [(9_000, 90), (4_500, 60), (500, 45)])
def test_a_slower_machine_trains_the_demo_for_fewer_epochs(images_per_s, epochs, tmp_path, capsys):
    (tmp_path / "log.txt").write_text("".join(json.dumps({"images_per_s": rate}) + "\n" for rate in (9, images_per_s)))
    call(choose_epochs, tmp_path)
    assert int(capsys.readouterr().out) == epochs


def test_an_interrupted_command_leaves_the_pictures_that_exist(unpacked, tmp_path):
    """No byte can be written to a file, as after a kill or on a full disk."""
    first = min(unpacked.glob("train/*/*.png"), key=lambda path: path.name)
    copy = tmp_path / first.relative_to(unpacked)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(first.read_bytes())
    for folder in (tmp_path, "/proc/nowhere"):  # root can write to all other folders
        command = f"ulimit -f 0; exec {sys.executable} demo/unpack_data.py --out {folder}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert f"--out {folder} " in done.stderr
    assert copy.read_bytes() == first.read_bytes()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [copy]


def test_the_regression_of_the_report_is_selected_on_training_images():
    """A fifth of the training images selects the strength; all of them train the result."""
    generator = np.random.default_rng(1)
    labels, test_labels = generator.integers(0, 3, 60), generator.integers(0, 3, 90)
    train, test = (generator.normal(size=(len(own), 20)) + own[:, None] / 2 for own in (labels, test_labels))
    order, scores = np.random.default_rng(0).permutation(60), {}
    for strength in report.STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=report.ITERATIONS)
        scores[strength] = model.fit(train[order[12:]], labels[order[12:]]).score(train[order[:12]], labels[order[:12]])
    best = LogisticRegression(C=max(scores, key=scores.get), max_iter=report.ITERATIONS).fit(train, labels)
    assert report.probe(train, labels, test, test_labels) == best.score(test, test_labels)


def test_features_of_the_report():
    mae = get_model("mae_vit_mini_patch4")
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
    assert knn.accuracy(train.astype(np.float32), labels, test.astype(np.float32), test_labels, 20) == 0.8


@pytest.mark.slow
def test_the_report_of_a_small_run(unpacked, pretrain, tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 40), ("val", 8)):
        for folder in (unpacked / split).iterdir():
            (data / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (data / split / folder.name / path.name).symlink_to(path)
    run = pretrain(data_path=data, input_size=28, in_chans=1, batch_size=50, mean=0.286, std=0.353)
    rows = {("pixels", "logistic regression"): 60, ("pixels", "RBF-SVM"): 65, ("scratch", "fine-tuned"): 40,
            ("pretrained", "fine-tuned"): 70}  # fmt: skip
    written = [Result(*row, 50, draw, acc + draw, "", 1.0, "") for row, acc in rows.items() for draw in (0, 1)]
    (tmp_path / "compared").mkdir()
    summary.write(tmp_path / "compared", written)
    out = tmp_path / "report"
    script("demo/report.py", "--checkpoint", run / "checkpoint-1.pth", "--data_path", data, "--comparison",
           tmp_path / "compared", "--out", out)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert {"raw pixels", "untrained encoder", "pre-trained encoder"} < results.keys()
    assert all(0.25 < results[name] < 1 for name in results if "labels" not in name)
    assert results["50 labels: the same, fine-tuned from the pre-trained encoder"] == pytest.approx(0.705)
    table = (out / "table.md").read_text()
    assert f"| raw pixels | {results['raw pixels']:.1%} | {results['raw pixels, neighbours']:.1%} |" in table
    assert "| transformer from scratch | 40.5% | 0.7 |" in table
    picture = np.array(Image.open(out / "reconstructions.png").convert("L")).astype(float)
    assert picture.std() > 30  # not blank
    rows = np.asarray(Image.open(out / "neighbors.png").convert("L"))[pictures.HEADER :]
    scale = report.SIDE // 28
    side = 28 * scale + pictures.GAP
    assert rows.shape == (12 * side - pictures.GAP, 7 * side - pictures.GAP)
    first, last = (rows[top::scale, ::scale][:28, :28] for top in (0, 11 * side))
    tests = [file for folder in sorted((data / "val").iterdir()) for file in sorted(folder.iterdir())]
    for drawn, file in ((first, tests[0]), (last, tests[-1])):
        assert np.array_equal(drawn, Image.open(file))
    two_counts = [*written, written[0]._replace(labels=100)]
    cases = ((two_counts, r"\[50, 100\]"), (written[:-2], "pretrained"), ([], "results.csv"))
    for number, (wrong, message) in enumerate(cases):
        folder = tmp_path / f"wrong{number}"
        folder.mkdir()
        if wrong:
            summary.write(folder, wrong)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{re.escape(str(folder))}.*{message}"):
            report.few_labels(folder)
