"""The formats of iNaturalist and Places."""

import json

import pytest
import torchvision
from conftest import ROOT
from mains import lines, open_source
from PIL import Image
from test_sources import annotations_of

import main_finetune
import main_linprobe


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 24)).save(path)


def test_fine_tuning_and_probing_on_inaturalist(classify, tmp_path):
    """Images of both splits are in the same folders. JSON files assign them to splits."""
    for split, numbers in (("train", range(18)), ("val", range(18, 24))):
        categories = [(n, f"Anas {'cba'[n]}") for n in range(3)]
        document = annotations_of(categories, [number % 3 for number in numbers], numbers[0])
        (tmp_path / f"{split}2018.json").write_text(json.dumps(document))
        for number in numbers:
            save(tmp_path / f"train_val2018/Aves/{number}.jpg")
    lists = {f"{split}_list": tmp_path / f"{split}2018.json" for split in ("train", "val")}
    for main, config in ((main_finetune, "finetune_inat2018"), (main_linprobe, "linprobe_vit_base")):
        recipe = ROOT / f"recipes/{config}.yaml"
        out = classify(main, main.__name__, config=recipe, data_path=tmp_path, **lists, batch_size=6)
        assert "test_acc1" in lines(out)[-1]


@pytest.mark.parametrize("size", ["large", "256"])
def test_places365_in_torchvisions_layout(size, tmp_path, monkeypatch):
    """The lists are short, so the digests of the complete lists are removed."""
    dataset = torchvision.datasets.Places365
    monkeypatch.setattr(dataset, "_CATEGORIES_META", ("categories_places365.txt", None))
    lists = {"train-standard": ("places365_train_standard.txt", None), "val": ("places365_val.txt", None)}
    monkeypatch.setattr(dataset, "_FILE_LIST_META", lists)
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/a/airplane_cabin 1\n")
    (tmp_path / "places365_train_standard.txt").write_text("/a/airfield/1.jpg 0\n/a/airplane_cabin/2.jpg 1\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_1.jpg 1\n")
    for name in (f"data_{size}_standard/a/airfield/1.jpg", f"data_{size}_standard/a/airplane_cabin/2.jpg",
                 f"val_{size}/Places365_val_1.jpg"):  # fmt: skip
        save(tmp_path / name)
    train, val = (open_source(split, str(tmp_path), dataset="Places365") for split in ("train", "val"))
    assert train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1]
    assert train[1][0].startswith(b"\xff\xd8")
    assert val[0][0].startswith(b"\xff\xd8")
    assert len(train.classes) == 2
