"""The corruptions of the Fashion-MNIST study: their effect on an image, and the table."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.fashion_mnist import corruptions
from inference import get_model
from util.cli import entry_point


@pytest.fixture(scope="module")
def images():
    return np.load(corruptions.ARCHIVE)["val_images"][:40]


def test_every_corruption_grows_with_its_severity(images):
    for corruption in corruptions.CORRUPTIONS:
        made = [corruptions.corrupt(images, corruption, severity) for severity in range(1, 6)]
        assert all(one.shape == images.shape and one.dtype == np.uint8 for one in made)
        away = [np.abs(one.astype(int) - images).mean() for one in made]
        assert away == sorted(away), corruption.__name__
        assert away[0] > 0
        again = corruptions.corrupt(images, corruption, 3)
        assert np.array_equal(again, made[2])


def test_the_strength_of_each_corruption(images):
    rng = np.random.default_rng(0)
    plain = np.full((400, 400), 128, dtype=np.uint8)
    assert np.asarray(corruptions.noise(Image.fromarray(plain), 20, rng)).std() == pytest.approx(20, rel=0.02)
    covered = corruptions.corrupt(np.zeros((1, 28, 28), np.uint8), corruptions.occlusion, 2)[0]
    assert sorted(np.unique(covered)) == [0, 128]
    assert (covered == 128).sum() == 7 * 7
    flat = corruptions.corrupt(images, corruptions.contrast, 5)[0]
    assert flat.std() == pytest.approx(0.1 * images[0].std(), abs=1)
    assert flat.mean() == pytest.approx(images[0].mean(), abs=1)
    turned = [corruptions.rotation(Image.fromarray(images[0]), 45, np.random.default_rng(seed)) for seed in range(8)]
    assert len({one.tobytes() for one in turned}) == 2  # to the left or to the right


def save(path, classes, prediction):
    """Saves a classifier that predicts one class for all images."""
    shape = {"input_size": 28, "patch_size": 14, "in_chans": 1}
    model = get_model("vit_mini_patch4", **shape, nb_classes=len(classes), classes=classes)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.eye(len(classes))[classes.index(prediction)]
    torch.save({"model": model.state_dict(), "args": model.settings}, path)
    return str(path)


def test_accuracy_with_either_kind_of_class_names(tmp_path, capsys, monkeypatch):
    """One model uses the class names of the dataset, the other the names of the folders, in another order."""
    archive = dict(np.load(corruptions.ARCHIVE))
    archive |= {"val_images": archive["val_images"][:200], "val_labels": archive["val_labels"][:200]}
    np.savez(tmp_path / "fewer.npz", **archive)
    monkeypatch.setattr(corruptions, "ARCHIVE", tmp_path / "fewer.npz")
    names = [str(name) for name in archive["classes"]]
    first = save(tmp_path / "a.pth", names, "Bag")
    second = save(tmp_path / "b.pth", sorted(corruptions.folder_of(name) for name in names), "bag")
    argv = ["--pretrained", first, "--scratch", second, "--out", str(tmp_path)]
    corruptions.main(entry_point.parse(corruptions.get_args_parser(), argv))
    share = 100 * (archive["classes"][archive["val_labels"]] == "Bag").mean()
    output = capsys.readouterr().out
    assert f"| no corruption | {share:.1f} |  | {share:.1f} |  |" in output
    assert f"| mean | {share:.1f} | 1.00 | {share:.1f} | 1.00 |" in output
    assert (tmp_path / "corruptions.md").read_text() in output
    assert Image.open(tmp_path / "corruptions.png").width > 1000
    with pytest.raises(ValueError, match="no classifier of Fashion-MNIST"):
        corruptions.load(save(tmp_path / "c.pth", ["cat", "dog"], "cat"))
