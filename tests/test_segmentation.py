"""The segmentation example: features of patches, a linear head, and the mean IoU."""

import numpy as np
import pytest
import torch
from PIL import Image

from demo import segmentation
from inference import get_model, maps
from util.cli import entry_point


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "vit_tiny_patch16"])
def test_shapes_at_1024_pixels(name):
    model = get_model(name)
    features = maps.dense(model, torch.zeros(1, 3, 1024, 1024))
    assert features.shape == (1, 4 * 192, 64, 64)
    head = segmentation.Head(features, patch=16, num_classes=21)
    assert head(features).shape == (1, 21, 1024, 1024)
    for layers in (0, 13):
        with pytest.raises(ValueError, match=f"layers={layers}: the encoder has 12 blocks"):
            maps.dense(model, torch.zeros(1, 3, 1024, 1024), layers)
    wide = maps.dense(model, torch.zeros(1, 3, 1024, 512), layers=1)
    assert wide.shape == (1, 192, 64, 32)


def test_features_are_in_the_order_of_patches():
    """A change of one patch changes the features of this patch most."""
    torch.manual_seed(0)
    model = get_model("mae_vit_mini_patch4", input_size=[32, 48])
    images = torch.zeros(1, 3, 32, 48)
    changed = images.clone()
    changed[:, :, 4 * 5 : 4 * 6, 4 * 9 : 4 * 10] = 3.0
    distance = (maps.dense(model, images) - maps.dense(model, changed)).norm(dim=1)[0]
    assert divmod(int(distance.argmax()), 12) == (5, 9)


def test_mean_iou_by_hand():
    """Classes 0 and 1 share 1 of 2 and 2 of 3 pixels; class 2 is absent."""
    labels, predictions = torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 1], [1, 1]]])
    assert segmentation.mean_iou(predictions, labels, 3) == pytest.approx(100 * (1 / 2 + 2 / 3) / 3)


def test_images_combine_two_garments():
    pictures, labels = segmentation.make_pictures("train", 50, seed=3)
    archive = np.load(segmentation.ARCHIVE)
    assert pictures.shape == (50, 1, 28, 28)
    for picture, label in zip(pictures[:, 0], labels, strict=True):
        assert torch.equal(label > 0, picture > segmentation.INK)
        assert len(label.unique()) <= 3
        assert max(len(label[:, :8].unique()), len(label[:, 21:].unique())) <= 2
    images = {image.tobytes() for image in archive["train_images"][:, :, :8]}
    assert all(np.ascontiguousarray(picture[:, :8]).tobytes() in images for picture in pictures[:, 0].numpy())
    assert torch.equal(segmentation.make_pictures("train", 50, seed=3)[0], pictures)


def test_the_command(tmp_path, capsys):
    torch.manual_seed(1)
    model = get_model("mae_vit_mini_patch4", input_size=28, patch_size=7, in_chans=1)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "model.pth")
    argv = ["--model", tmp_path / "model.pth", "--pictures", 300, "--layers", 2, "--out", tmp_path, "--device", "cpu"]
    scores = segmentation.main(entry_point.parse(segmentation.get_args_parser(), [str(part) for part in argv]))
    output = capsys.readouterr().out
    assert all(f"| {title} | {score:.1f}% |" in output for title, score in scores.items())
    assert all(5 < score < 60 for score in scores.values())
    assert Image.open(tmp_path / "segmentation.png").width > 900
    model = get_model("mae_vit_mini_patch4", input_size=32)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="the images are gray and have 28 x 28 pixels"):
        argv[1] = tmp_path / "other.pth"
        segmentation.main(entry_point.parse(segmentation.get_args_parser(), [str(part) for part in argv]))
