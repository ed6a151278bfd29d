"""The table of models in docs/zoo.md agrees with the published numbers."""

import pytest

from benchmarks import model_table


@pytest.mark.parametrize(("size", "pixels", "millions", "billions"), [
    ("base_patch16", 224, 86.567656, 17.58), ("large_patch16", 224, 304.326632, 61.60),
    ("huge_patch14", 224, 632.045800, 167.40), ("huge_patch14", 448, 633.03, 732.13)
])  # fmt: skip
def test_published_numbers(size, pixels, millions, billions):
    row = model_table.measure(size, pixels)
    assert row["classifier"] / 1e6 == pytest.approx(millions, abs=0.005)
    assert row["all_tokens"] / 1e9 == pytest.approx(billions, abs=0.005)
    assert row["masked"] < row["all_tokens"]
