"""Fine-tuning and probing on folders and lists in the formats of iNaturalist and Places, with their recipes."""

import io
import json

import numpy as np
import pytest
import torchvision
from conftest import ROOT
from mains import call, lines
from PIL import Image

import main_finetune
import main_linprobe
from util.datasets import open_source


def save(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.eye(3, dtype=np.uint8)[label % 3] * 200
    Image.fromarray(np.broadcast_to(color, (24, 30, 3)).copy()).save(path)


def inaturalist(root):
    """Writes images of both splits into the same folders. JSON files assign them to splits."""
    categories = [{"id": n, "name": f"Anas {'cba'[n]}", "supercategory": "Aves"} for n in range(3)]
    for split, count in (("train", 18), ("val", 6)):
        images, annotations = [], []
        for number in range(count):
            name = f"train_val2018/Aves/{number % 3}/{split}{number}.jpg"
            save(root / name, number % 3)
            images.append({"id": number, "file_name": name, "width": 30, "height": 24, "license": 3})
            annotations.append({"id": number, "image_id": number, "category_id": number % 3})
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}2018.json").write_text(json.dumps(document))
    return root / "train2018.json", root / "val2018.json"


def places205(root):
    for split, count in (("train", 18), ("val", 6)):
        names = [f"{'abc'[number % 3]}/place/gsun_{split}{number}.jpg" for number in range(count)]
        for number, name in enumerate(names):
            save(root / name, number % 3)
        rows = (f"{name} {number % 3}\n" for number, name in enumerate(names))
        (root / f"{split}_places205.csv").write_text("".join(rows))
    return root / "train_places205.csv", root / "val_places205.csv"


def places365(root):
    for split, count in (("train", 18), ("val", 6)):
        for number in range(count):
            category = ("airfield", "airplane_cabin", "zen_garden")[number % 3]
            save(root / split / category / f"{split}{number:08d}.jpg", number % 3)
    return ()


@pytest.mark.parametrize(("recipe", "make"), [
    ("inat2018", inaturalist), ("places205", places205), ("places365", places365),
])  # fmt: skip
def test_fine_tuning_and_probing(recipe, make, tmp_path):
    lists = dict(zip(("train", "val"), make(tmp_path / "data"), strict=False))
    flags = {"data_path": tmp_path / "data", **{f"{split}_list": file for split, file in lists.items()},
             "model": "vit_mini_patch4", "input_size": 16, "num_workers": 0, "device": "cpu", "batch_size": 6,
             "epochs": 2, "warmup_epochs": 1}  # fmt: skip
    for main, config in ((main_finetune, f"finetune_{recipe}"), (main_linprobe, "linprobe_vit_base")):
        out = tmp_path / main.__name__
        call(main, config=ROOT / "recipes" / f"{config}.yaml", **flags, output_dir=out)
        assert "test_acc1" in lines(out)[-1]
    for split, count in (("train", 18), ("val", 6)):
        source = open_source(split, str(tmp_path / "data"), str(lists[split]) if lists else None)
        assert (len(source.classes), len(source)) == (3, count)
        for index in range(count):  # the color determines the label
            data_of, label = source[index]
            assert np.asarray(Image.open(io.BytesIO(data_of))).mean(axis=(0, 1)).argmax() == label


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
        save(tmp_path / name, 0)
    train, val = (open_source(split, str(tmp_path), dataset="Places365") for split in ("train", "val"))
    assert train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1]
    assert train[1][0].startswith(b"\xff\xd8")
    assert val[0][0].startswith(b"\xff\xd8")
    assert len(train.classes) == 2
