"""The study of defects: scratches, and the rows of its table."""

import numpy as np
import torch

from benchmarks import anomalies, cells


def images(name: str) -> anomalies.Images:
    draw = np.random.default_rng(0)
    pixels = [(255 * cells.image(name, draw)).round().astype(np.uint8) for _ in range(30)]
    bad = [anomalies.scratched(one, draw) for one in pixels[20:]]
    masks = [np.zeros((cells.SIDE, cells.SIDE), bool)] * 10 + [mask for _, mask in bad]
    normal, tested = (torch.from_numpy(np.stack(part))[:, None]
                      for part in (pixels[:10], pixels[10:20] + [one for one, _ in bad]))  # fmt: skip
    return anomalies.Images(name, normal, tested, torch.from_numpy(np.stack(masks)))


def test_a_scratch_is_a_bright_line():
    draw = np.random.default_rng(0)
    for _ in range(50):
        image, mask = anomalies.scratched(np.full((cells.SIDE, cells.SIDE), 30, np.uint8), draw)
        assert 4 <= mask.sum() <= 60
        assert image[mask].min() > 30 + 0.2 * 70 and (image >= 30).all() and image.max() <= 170
        assert np.median(image[~mask]) == 30


def test_the_area_is_the_share_of_pairs_in_order(monkeypatch):
    monkeypatch.setattr(anomalies, "TESTED", 2)
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[2, 0, 0] = True
    maps = torch.arange(16.0).view(4, 2, 2)  # 8 of 15 other pixels have a lower value than that of the mask
    found = anomalies.areas(torch.tensor([1.0, 3.0, 2.0, 4.0]), maps, masks)
    np.testing.assert_allclose(found, (0.75, 8 / 15))


def test_a_row_of_each_method(monkeypatch):
    monkeypatch.setattr(anomalies, "TESTED", 10)
    rows = [
        *anomalies.measure("pixels", anomalies.Pixels(), [images(cells.CLASSES[0]), images(cells.CLASSES[4])], None)
    ]
    assert [row[0] for row in rows] == ["pixels"] * 3 and len({row[1] for row in rows}) == 3
    for _, _, image, filled, rings, pixel in rows:
        assert abs((float(filled) + float(rings)) / 2 - float(image)) < 0.002
        assert pixel == "" or 0.4 < float(pixel) <= 1
