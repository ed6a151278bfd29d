"""What the log of a run says in sentences: the images that it has processed, and the gain since half of its updates."""

import html
import json
import re

from mains import call, lines

from mae.inference import progress, report


def text_of(page):
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]+>", " ", page)))


def entry(epoch, **measures):
    return {"epoch": epoch, "images_per_s": 1000.0, "seconds": 10.0, **measures}


def test_the_gain_is_that_since_half_of_the_epochs():
    entries = [entry(epoch, train_explained=0.1 * epoch) for epoch in range(8)]
    for epoch, knn in ((1, 60.0), (3, 70.0), (5, 74.0), (7, 75.5)):
        entries[epoch] |= {progress.KNN: knn, "test_explained": knn / 200}
    text = progress.sentences(entries, 8, 10_000)
    assert "about 80,000 images, 10.0% of the 800,000 that measured runs needed" in text
    assert (
        "From epoch 3 to epoch 7, k-NN has changed by +5.5 points to 75.5 % and the explained variance of held-out "
        "images has changed by +2.8 points to 37.8 %."
    ) in text
    assert "training images has" not in text and "learning rate has not fallen" not in text


def test_a_run_that_goes_on_says_so_and_claims_no_gain_of_one_epoch():
    text = progress.sentences([entry(0, train_explained=0.2)], 5, 10_000)
    assert "It has ended 1 of 5 epochs" in text and "From epoch" not in text


def test_measures_that_are_not_finite_and_resumed_epochs():
    """log.txt has null, which is read as NaN. The rate of a resumed epoch is that of its rest."""
    entries = [entry(epoch, train_explained=value) for epoch, value in enumerate((0.0, 0.2, 0.3, float("nan")))]
    entries[2]["images_per_s"] = 1.0
    text = progress.sentences(entries, 4, 10_000)
    assert "about 40,000 images" in text and "nan" not in text
    assert "From epoch 0 to epoch 2, the explained variance of training images has changed by +30.0 points" in text


def test_the_page_of_a_run_has_them(pretrain, labelled):
    run = pretrain(data_path=labelled, epochs=2, probe_every=1, probe_path=labelled)
    last = lines(run)[-1]
    text = text_of(call(report, run, device="cpu", num_workers=0).read_text().split("<h2>")[1])
    assert re.search(rf"From epoch 0 to epoch 1, k-NN .* to {last[progress.KNN]:.1f} % and", text)
    assert "less than 0.1% of the 800,000 that measured runs needed" in text


def test_a_continued_run_has_no_such_sentence(pretrain, pictures):
    start = pretrain("start", data_path=pictures, epochs=1)
    run = pretrain("continued", data_path=pictures, epochs=1, init_from=start / "checkpoint-0.pth")
    assert json.loads((run / "environment.jsonl").read_text().splitlines()[-1])["settings"]["init_from"]
    assert "has processed" not in call(report, run, device="cpu", num_workers=0).read_text()
