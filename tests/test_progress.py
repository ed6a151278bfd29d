"""The section of a page on more time: what the run gained in the last doubling of its updates, and longer runs."""

import html
import json
import re

import pytest
from mains import call, lines

from benchmarks import forecast, leaderboard, longer_runs
from mae.inference import more_time, report
from mae.settings import ImageSpec

GARMENTS = ImageSpec(input_size=28, in_chans=1)


def text_of(page):
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]+>", " ", page)))


def entry(epoch, **measures):
    return {"epoch": epoch, "images_per_s": 1000.0, "seconds": 10.0, **measures}


def test_the_gain_is_that_since_half_of_the_epochs():
    entries = [entry(epoch, train_explained=0.1 * epoch) for epoch in range(8)]
    for epoch, knn in ((1, 60.0), (3, 70.0), (5, 74.0), (7, 75.5)):
        entries[epoch] |= {more_time.KNN: knn, "test_explained": knn / 200}
    text = text_of(more_time.section(entries, 8, GARMENTS, 10_000))
    assert "about 80,000 images, 10.0% of the 800,000 that measured runs needed" in text
    assert (
        "From epoch 3 to epoch 7, k-NN has changed by +5.5 points to 75.5 % and the explained variance of held-out "
        "images has changed by +2.8 points to 37.8 %."
    ) in text
    assert "training images has" not in text and "learning rate has not fallen" not in text


def test_a_run_that_goes_on_says_so_and_claims_no_gain_of_one_epoch():
    text = text_of(more_time.section([entry(0, train_explained=0.2)], 5, GARMENTS, 10_000))
    assert "It has ended 1 of 5 epochs" in text and "From epoch" not in text


@pytest.mark.parametrize(("images", "count", "kinds"), [
    (GARMENTS, 10_000, ["images of Fashion-MNIST", "letters", "generated cells", "generated spectrograms"]),
    (ImageSpec(input_size=96, in_chans=3), 1_500, ["squares of photographs"]),
    (ImageSpec(input_size=96, in_chans=3), 500_000, []),
    (ImageSpec(input_size=224, in_chans=3), 1_000, []),
    (ImageSpec(input_size=28, in_chans=5), 10_000, []),
])  # fmt: skip
def test_longer_runs_are_of_near_images(images, count, kinds):
    text = text_of(more_time.section([entry(0)], 1, images, count))
    assert [row["kind"] for row in more_time.longer_runs() if row["kind"] in text] == kinds
    assert ("No longer runs were measured" in text) == (not kinds)


def test_measures_that_are_not_finite_and_resumed_epochs():
    """log.txt has null, which is read as NaN. The rate of a resumed epoch is that of its rest."""
    entries = [entry(epoch, train_explained=value) for epoch, value in enumerate((0.0, 0.2, 0.3, float("nan")))]
    entries[2]["images_per_s"] = 1.0
    text = text_of(more_time.section(entries, 4, GARMENTS, 10_000))
    assert "about 40,000 images" in text and "nan" not in text
    assert "From epoch 0 to epoch 2, the explained variance of training images has changed by +30.0 points" in text


def test_longer_runs_are_those_of_the_study():
    """python benchmarks/longer_runs.py rewrites them."""
    assert longer_runs.FILE.read_text() == longer_runs.text()
    counts = {row["kind"]: row["images"] for row in leaderboard.read() if row["budget"] == 5}
    assert counts == {leaderboard.KINDS[kind][0]: count for kind, count in forecast.IMAGES.items()}


def test_the_page_of_a_run_has_the_section(pretrain, labelled):
    run = pretrain(data_path=labelled, epochs=2, probe_every=1, probe_path=labelled)
    last = lines(run)[-1]
    page = call(report, run, device="cpu", num_workers=0).read_text()
    section = text_of(page.split("<h2>")[2])
    assert section.startswith("Would more time help?")
    assert re.search(rf"From epoch 0 to epoch 1, k-NN .* to {last[more_time.KNN]:.1f} % and", section)
    assert "less than 0.1% of the 800,000 that measured runs needed" in section


def test_a_continued_run_has_no_such_section(pretrain, pictures):
    start = pretrain("start", data_path=pictures, epochs=1)
    run = pretrain("continued", data_path=pictures, epochs=1, init_from=start / "checkpoint-0.pth")
    assert json.loads((run / "environment.jsonl").read_text().splitlines()[-1])["settings"]["init_from"]
    assert "more time" not in call(report, run, device="cpu", num_workers=0).read_text()
