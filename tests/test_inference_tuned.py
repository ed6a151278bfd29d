"""The page about a fine-tuned run: the accuracy with its interval, confused classes, wrong images."""

import html
import math
import re

import numpy as np
import pytest
from golden_settings import parser_of
from mains import call, lines
from PIL import Image
from test_inference_report import Page

import main_finetune
from mae.cli import entry_point
from mae.inference import get_model, report


@pytest.fixture(scope="module")
def run(classify_once):
    return classify_once(main_finetune, "a<b>&c", epochs=3, warmup_epochs=0, lr=5e-5, crop="none", aa="none")


@pytest.fixture(scope="module")
def page(run):
    return Page(call(report, run, device="cpu", num_workers=0))


def predictions(run, labelled):
    """The classes of the validation images, and those that the best checkpoint predicts."""
    model = get_model(run / "checkpoint-best.pth")
    files = sorted((labelled / "val").glob("*/*.png"))
    found = [model.predict(Image.open(file).convert("RGB"))["pred_class"] for file in files]
    return [file.parent.name for file in files], found


def test_the_accuracy_is_that_of_the_best_checkpoint(page, run):
    best = max(entry["test_acc1"] for entry in lines(run))
    text = " ".join(page.words)
    low, high = map(float, re.search(rf"{best:.1f} % \((.*?) to (.*?)\)", text).groups())
    for bound in (low / 100, high / 100):  # as many standard errors of this accuracy away as a 95 % interval has
        assert abs(best / 100 - bound) / math.sqrt(bound * (1 - bound) / 23) == pytest.approx(1.96, abs=0.02)
    assert "3 of 3" in text
    assert "checkpoint-best.pth is the best of 3 evaluations on these images" in text


def test_the_losses_are_those_of_the_shown_checkpoint():
    entries = [
        {"epoch": epoch, "test_loss": loss, "train_loss": 2 * loss, "seconds": 1.0, "images_per_s": 10.0}
        for epoch, loss in enumerate((0.5, 0.25, 0.75))
    ]
    facts = report.facts_of(entries, report.up_to(entries, 2), {"epochs": 3})
    assert (facts["training loss"], facts["epochs"]) == ("0.5", "3 of 3")


def test_confused_classes_and_wrong_images_are_those_of_the_predictions(page, run, labelled):
    truth, found = predictions(run, labelled)
    wrong = [f"{a}, taken for {b}" for a, b in zip(truth, found, strict=True) if a != b]
    assert wrong, "the run should make mistakes"
    captions = [html.unescape(text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page.text)]
    assert sorted(captions) == sorted(wrong)
    pairs = {text: wrong.count(text) for text in wrong}
    (most,) = {max(pairs.values())}
    first = re.search(r"(\d+) of the \d+ images of (\S+) are taken for (\S+)\.", page.text)
    assert int(first[1]) == most == pairs[f"{first[2]}, taken for {first[3]}"]
    sizes, drawings = page.pictures()
    assert len(sizes) == len(wrong) and len(drawings) >= 2  # curves, and the matrix


def test_the_page_is_one_file_and_its_commands_parse(page, run):
    assert all(address.startswith("data:") for address in page.addresses)
    assert "<b>" not in page.text.partition('class="facts"')[0]
    *commands, _ = page.commands
    assert [words[2] for words in commands] == ["main_finetune", "mae.inference.predict", "mae.inference.export"]
    for _, _, module, *flags in commands:
        assert str(run / "checkpoint-best.pth") in flags
        assert entry_point.parse_command(parser_of(module), flags)


def test_the_last_line_of_a_run_is_the_command_of_its_page(classify, capsys):
    out = classify(main_finetune, epochs=1, warmup_epochs=0)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: python -m mae.inference.report {out}"


def test_held_out_images_are_those_of_the_run(classify, labelled):
    """Without val/ or with --val_fraction, the page evaluates on the images that the run held out."""
    out = classify(main_finetune, val_fraction=0.25, epochs=1, warmup_epochs=0)
    page = Page(call(report, out, device="cpu", num_workers=0))
    (entry,) = lines(out)
    text = " ".join(page.words)
    assert re.search(r"\b12\b", text) and f"{entry['test_acc1']:.1f} % (" in text


def test_a_model_of_numbers_has_scores_and_no_classes(classify, labelled, tmp_path):
    for split in ("train", "val"):
        files = sorted((labelled / split).glob("*/*.png"))
        rows = [f"{file.relative_to(labelled)},{np.asarray(Image.open(file)).mean()}\n" for file in files]
        (tmp_path / f"{split}.csv").write_text("".join(["path,brightness\n", *rows]))
    lists = {"train_list": tmp_path / "train.csv", "val_list": tmp_path / "val.csv"}
    out = classify(main_finetune, **lists, task="regression", label_columns="brightness", epochs=1, warmup_epochs=0)
    page = Page(call(report, out, device="cpu", num_workers=0))
    text = " ".join(page.words)
    assert "Images that are wrong" not in text and "accuracy" not in text
    assert f"{lines(out)[-1]['test_mae']:.4g}" in text
