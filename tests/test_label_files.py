"""Labels in a CSV file beside the images of a folder, and lists with labels for a part of their images."""

import numpy as np
import pytest
from mains import open_source, parse
from PIL import Image

from mae.data import labels
from mae.files import spreadsheet
from mae.recommend import check, label_files
from mae.settings.choices import CLASSIFICATION, REGRESSION

COUNT = 24


def folder_with(tmp_path, *rows):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def found_in(folder, task=None):
    return label_files.find(open_source("train", str(folder)), folder, task)


def test_the_check_uses_a_csv_file_beside_the_images(tmp_path, capsys):
    """Ids without a suffix, two images without a label, a row without an image."""
    named = [f"{number:02},{'ab'[number % 2]},{number}" for number in range(COUNT - 2)]
    folder = folder_with(tmp_path, "id,class,note", *named, "other,a,")
    check.main(parse(check, str(folder), num_workers=0))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["classes"].split()[1] == "2,"
    for text in ("column class", CLASSIFICATION, "2 images", "1 row"):
        assert text in lines["labels"]
    found, _ = found_in(folder)
    file = tmp_path / "mine_labels.csv"
    settings = found.write(file, open_source("train", str(folder)), folder, only_labelled=False)
    again = open_source("train", str(folder), **settings)
    assert len(again) == COUNT
    assert again.labels.tolist() == [number % 2 for number in range(COUNT - 2)] + [-1, -1]
    with pytest.raises(ValueError, match="no label"):  # a supervised training
        labels.require(again, "train")
    written = file.read_text()
    found.write(file, again, folder, only_labelled=False)
    with pytest.raises(ValueError, match="mine_labels"):
        found.write(file, again, folder, only_labelled=True)
    assert file.read_text() == written


def test_whole_numbers_with_many_values_are_no_classes(tmp_path):
    folder = folder_with(tmp_path, "image,age", *(f"{number:02}.png,{20 + number}" for number in range(COUNT)))
    found, (line,) = found_in(folder)
    assert found.task == REGRESSION
    assert f"task={CLASSIFICATION}" in line
    assert found_in(folder, CLASSIFICATION)[0].task == CLASSIFICATION
    file = tmp_path / "labels.csv"
    settings = found.write(file, open_source("train", str(folder)), folder, only_labelled=True)
    assert settings["task"] == REGRESSION
    assert spreadsheet.read(file.read_text())[1] == ["00.png", "20"]
    assert found_in(folder_with(tmp_path, "image,stars", *(f"{n:02},{n % 5}" for n in range(COUNT))))[0].task == (
        CLASSIFICATION
    )


@pytest.mark.parametrize(
    "rows",
    [
        ["name,label", "a,1", "b,2"],
        ["name,label", "00,1", "00.png,2"],
        ["name,x,y", "00,1,2"],
        ["name,caption", *(f"{number:02},text {number}" for number in range(COUNT))],
    ],
    ids=["no image", "an image twice", "two columns", "captions"],
)
def test_a_file_that_does_not_fit_is_named_with_the_flag_of_lists(tmp_path, rows):
    found, (line,) = found_in(folder_with(tmp_path, *rows))
    assert found is None
    assert "labels.csv" in line and "train_list=" in line
