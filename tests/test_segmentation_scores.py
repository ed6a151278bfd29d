"""Windows, the confusion matrix and the scores of segmentation."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from mae.evaluate import segmentation
from mae.evaluate.segmentation import (
    Scores,
    confusion_matrix,
    most_likely,
    predict_classes,
    predict_windows,
    window_starts,
)  # fmt: skip


def test_windows_cover_each_side_with_a_stride_of_two_thirds():
    assert window_starts(512, 512) == [0]
    assert window_starts(683, 512) == [0, 171]
    assert window_starts(1024, 252) == [0, 168, 336, 504, 672, 772]
    assert window_starts(5, 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (9, 33), (64, 50)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stitched_windows_of_a_model_of_pixels_are_its_output(size, batch_size):
    image = torch.randn(3, *size, dtype=torch.float64)
    shapes = []

    def model(windows):
        shapes.append(windows.shape)
        return torch.stack([windows.sum(dim=1), windows[:, 0] * windows[:, 1], -windows[:, 2]], dim=1)

    stitched = predict_windows(model, image, (16, 12), batch_size)
    assert stitched.dtype == torch.float32
    torch.testing.assert_close(stitched, model(image[None])[0].float())
    rows, columns = (len(window_starts(max(pair), pair[1])) for pair in zip(size, (16, 12), strict=True))
    assert len(shapes) == -(-rows * columns // batch_size) + 1
    assert {shape[2:] for shape in shapes[:-1]} == {(16, 12)}
    classes = predict_classes(model, image, size, (16, 12), batch_size)
    assert torch.equal(classes, model(image[None])[0].float().argmax(dim=0))


def test_overlapping_windows_are_averaged():
    values = iter([1.0, 4.0])

    def model(windows):
        return torch.stack([torch.full((1, 6, 6), next(values)) for _ in windows])

    stitched = predict_windows(model, torch.zeros(1, 6, 8), (6, 6), 1)
    assert stitched[0, 0].tolist() == [1, 1, 2.5, 2.5, 2.5, 2.5, 4, 4]


def test_logits_are_scaled_to_the_mask_before_classes_are_compared():
    logits = torch.tensor([[[0.0, 3.0]], [[0.8, 0.8]]])  # (2, 1, 2)
    classes = predict_classes(lambda windows: logits[None], torch.zeros(1, 1, 2), (1, 7), (1, 2), 1)
    assert classes.tolist() == [[1, 1, 0, 0, 0, 0, 0]]  # 3 x > 0.8 from the third of seven pixels on
    expected = F.interpolate(logits[None], (1, 7), mode="bilinear", align_corners=True)[0].argmax(dim=0)
    assert torch.equal(classes, expected)


@pytest.mark.parametrize("size", [(13, 9), (5, 40), (37, 20), (1, 7), (200, 3)])
def test_strips_of_scaled_logits_are_pytorchs(size, monkeypatch):
    """Strips of at most 400 logits; an interpolation of all of them at once is the oracle."""
    strips = []
    original = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *args, **options: (strips.append(x.shape), original(
        x, *args, **options))[1])  # fmt: skip
    monkeypatch.setattr(segmentation, "STRIP_VALUES", 400)
    logits = torch.randn(4, 13, 9, generator=torch.Generator().manual_seed(0))
    classes = most_likely(logits, size)
    expected = original(logits[None].double(), size, mode="bilinear", align_corners=True)[0].argmax(dim=0)
    assert torch.equal(classes, expected)
    assert sum(shape[2] for shape in strips) == size[0]
    assert max(4 * shape[2] * size[1] for shape in strips) <= 400


@pytest.mark.parametrize("num_classes", [2, 5, 12])
def test_scores_are_those_of_torchmetrics_and_scikit_learn(num_classes):
    """Random maps with ignored pixels and absent classes."""
    generator = torch.Generator().manual_seed(num_classes)
    used = max(2, num_classes - 2)
    targets = torch.randint(0, used, (4, 30, 40), generator=generator)
    predictions, is_right = targets.clone(), torch.rand(targets.shape, generator=generator) < 0.6
    predictions[~is_right] = torch.randint(0, used, ((~is_right).sum(),), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = 255
    scores = Scores(confusion_matrix(targets.to(torch.uint8), predictions, num_classes).numpy())
    for average, own in (("macro", scores.miou), ("none", scores.iou)):
        metric = MulticlassJaccardIndex(num_classes, average, ignore_index=255)
        expected = 100 * metric(predictions, targets).numpy()  # 0 for absent classes
        np.testing.assert_allclose(np.nan_to_num(own), expected, rtol=1e-6)
    valid = targets != 255
    true, predicted = targets[valid].numpy(), predictions[valid].numpy()
    assert scores.miou == pytest.approx(100 * jaccard_score(true, predicted, average="macro"))
    expected = jaccard_score(true, predicted, labels=range(num_classes), average=None, zero_division=0)
    expected[used:] = np.nan
    np.testing.assert_allclose(scores.iou, 100 * expected)
    assert np.isnan(scores.iou).sum() == num_classes - used
    assert scores.accuracy == pytest.approx(100 * accuracy_score(true, predicted))
    assert scores.matrix.sum() == valid.sum()


def test_scores_by_hand():
    """Classes 0 and 1 share 1 of 2 and 2 of 3 pixels; class 2 is only predicted, class 3 is absent."""
    targets = torch.tensor([0, 0, 1, 1, 255, 1, 4], dtype=torch.uint8)
    matrix = confusion_matrix(targets, torch.tensor([0, 1, 1, 1, 3, 2, 0]), 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = Scores(matrix.numpy())
    assert scores.iou[:3].tolist() == [50.0, 50.0, 0.0]
    assert np.isnan(scores.iou[3])
    assert scores.stats() == {"test_miou": pytest.approx(100 / 3), "test_pixel_acc": 60.0}
    assert str(scores) == "* mIoU 33.333 (3 of 4 classes) pixel accuracy 60.000"
    assert all(np.isnan(score) for score in Scores(np.zeros((2, 2), dtype=int)).stats().values())
