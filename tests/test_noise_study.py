"""The study of noise: images, runs and table."""

import numpy as np
import pytest
from conftest import ROOT
from mains import parse
from PIL import Image

from benchmarks import noise
from mae.recommend import rules
from mae.recommend.facts import Images

pytestmark = pytest.mark.usefixtures("forked")


def rows_of(with_: list[float], without: list[float]) -> list[dict]:
    return [
        {"kind": "cells", "noise": 0.3, "norm_pix_loss": on, "seed": seed, "k-NN": accuracy}
        for on, accuracies in ((True, with_), (False, without))
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_test_is_paired():
    """The differences are 4, 5 and 6: t is 5 times the root of 3, and p is 1 - t / root(t ** 2 + 2) for three pairs."""
    *_, row = noise.table(rows_of([50, 60, 70], [54, 65, 76])).splitlines()
    assert row == "| cells | 0.3 | 50.00 60.00 70.00 | 54.00 65.00 76.00 | -5.00 | 0.013 |"


def test_a_run_without_a_partner_is_left_out():
    *_, row = noise.table(rows_of([50, 60], [54])).splitlines()
    assert row == "| cells | 0.3 | 50.00 | 54.00 | -4.00 |  |"


@pytest.mark.slow
def test_each_run_is_done_once(tmp_path, monkeypatch):
    clean = tmp_path / "clean"
    for split, count in (("train", 64), ("val", 4)):
        for label in range(2):
            out = clean / split / str(label)
            out.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((28, 28), 120 + 8 * label, np.uint8)).save(out / f"{number}.png")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(noise, "WORK", tmp_path / "runs")
    monkeypatch.setattr(noise.scripts, "DATA", clean)
    monkeypatch.setattr(noise, "EPOCHS", {"garments": 1})
    for name in ("ROWS", "PAGE"):
        monkeypatch.setattr(noise, name, tmp_path / name)
    noise.PAGE.write_text("<!-- python benchmarks/noise.py -->\n<!-- end -->\n")
    noise.main(parse(noise, "--seeds", 0, "--noise", 0.1))
    noisy = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "runs").rglob("*.png"))]
    assert len(noisy) == 2 * 68
    assert np.std(noisy[:64]) == pytest.approx(0.1 * 255, rel=0.02)

    rows = noise.read()
    assert [row["norm_pix_loss"] for row in rows] == [True, False]
    noise.main(parse(noise, "--seeds", 0, "--noise", 0.1))
    assert noise.read() == rows
    assert noise.PAGE.read_text().count("| garments | 0.1 | ") == 1


def test_the_recipe_names_the_images_on_which_normalized_pixels_were_worse():
    found = {(row["kind"], row["noise"], row["seed"], row["norm_pix_loss"]): row["k-NN"] for row in noise.read()}
    differences: dict[tuple[str, float], list[float]] = {}
    for kind, level, seed, on in found:
        if on and (kind, level, seed, False) in found:
            difference = found[kind, level, seed, True] - found[kind, level, seed, False]
            differences.setdefault((kind, level), []).append(difference)
    worse = {kind for (kind, _), values in differences.items() if sum(values) < 0}
    images = Images(
        count=1000, distinct=1000, bad=0, height=28, width=28, shorter=28, spread=(28, 28), has_one_shape=True,
        in_chans=1, mean=[0.5], std=[0.2], value_range=None, is_deep=False, num_bytes=1e6,
    )  # fmt: skip
    lines = {line.name: line for line in rules.optimization_lines(images, noise.ONE_CORE, noise.MODEL)}
    assert worse
    assert all(kind in lines["norm_pix_loss"].reason for kind in worse)
