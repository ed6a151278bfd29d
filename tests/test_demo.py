"""The parts of the demo; `.ci/run` runs the complete demo."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from mains import call
from PIL import Image
from test_compare_answer import results_of

from benchmarks import demo_seeds
from demo import epochs as choose_epochs
from demo import report
from mae.compare import summary
from mae.compare.summary import Result
from mae.compare.verdict import ENCODER, PIXELS, RANDOM
from mae.evaluate import knn


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
    for split, count in (("train", 40), ("val", 10)):
        for folder in (unpacked / split).iterdir():
            (data / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (data / split / folder.name / path.name).symlink_to(path)
    run = pretrain(data_path=data, input_size=28, in_chans=1, batch_size=50, mean=0.286, std=0.353)
    scores = {labels: np.arange(10) < right for labels, right in ((500, [[7], [8], [9]]), (2000, [[6]]))}
    found = results_of(dict.fromkeys((ENCODER, PIXELS, RANDOM), scores), 10000, 10)
    (tmp_path / "answer.json").write_text(json.dumps(found))
    accuracies = {("pixels", "RBF-SVM"): 65, ("scratch", "fine-tuned"): 40, ("pretrained", "fine-tuned"): 70}
    written = [Result(*row, 50, draw, acc + draw, "", 1.0, "") for row, acc in accuracies.items() for draw in (0, 1)]
    (tmp_path / "compared").mkdir()
    summary.write(tmp_path / "compared", written)
    out = tmp_path / "report"
    given = ["--checkpoint", run / "checkpoint-1.pth", "--data_path", data, "--out", out]
    script("demo/report.py", *given)
    assert [path.name for path in out.iterdir()] == ["reconstructions.png"]
    picture = np.array(Image.open(out / "reconstructions.png").convert("L")).astype(float)
    assert picture.std() > 30  # not blank
    script("demo/report.py", *given, "--answer", tmp_path / "answer.json", "--comparison", tmp_path / "compared")
    results = json.loads((out / "results.json").read_text())
    assert results["trained"]["50"] == {
        "pixels (RBF-SVM)": [65, 66], "transformer from scratch (fine-tuned)": [40, 41],
        "the encoder (fine-tuned)": [70, 71],
    }  # fmt: skip
    assert results["frozen"]["500"]["pixels (RBF-SVM)"] == pytest.approx([70, 80, 90])
    assert results["frozen"]["2000"]["the encoder (k-NN)"] == pytest.approx([60])
    table = (out / "table.md").read_text()
    assert "| the encoder (k-NN) | 80.0 ± 10.0 | 60.0 |" in table and found["sentences"][0] in table
    assert "| transformer from scratch (fine-tuned) | 40.5 ± 0.7 |" in table
    (tmp_path / "wrong").mkdir()
    summary.write(tmp_path / "wrong", written[:-2])
    with pytest.raises(ValueError, match="no encoder pretrained"):
        report.of_comparison(tmp_path / "wrong")


def test_margins_of_the_seeds_are_to_the_strongest_classifier_of_pixels_on_the_same_labels(monkeypatch):
    pixels = {"pixels (logistic regression)": 80.0, "pixels (RBF-SVM)": 82.0}
    rows = [
        {
            "seed": seed, "part": "demo", "machine": "M",
            "frozen": {
                "500": pixels | {"the encoder (k-NN)": 81.0 + seed}, "10000": pixels | {"the encoder (k-NN)": 90.0},
            },
            "trained": {"500": {"pixels (RBF-SVM)": 70.0, "the encoder (fine-tuned)": 75.0}},
        }
        for seed in (0, 2)
    ]  # fmt: skip
    tuned = {"trained": {"10000": {"the encoder (fine-tuned)": 88.0}}}
    rows.append({"seed": 2, "part": "all labels", "machine": "M", **tuned})
    monkeypatch.setattr(demo_seeds, "read", lambda: rows)
    lines = demo_seeds.table().splitlines()
    assert "| pixels (RBF-SVM) | 82.0 | +0.0 | 82.0 | +0.0 |" in lines
    assert "| the encoder (k-NN) | 82.0 (81.0 to 83.0) | +0.0 (-1.0 to +1.0) | 90.0 | +8.0 |" in lines
    assert "| the encoder (fine-tuned) | 75.0 | +5.0 | 88.0 | +6.0 |" in lines
    assert "2 seeds" in lines[-1] and "1 seed." in lines[-1]
