"""Classes of the training and the validation set, and subsets of a dataset."""

import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from mains import call, lines, open_source, weights
from PIL import Image
from sklearn import metrics as sk

import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint
from mae.data import labels
from mae.data.kinds.folders import find_files
from mae.data.kinds.shards import Shards
from mae.inference import get_model
from mae.recommend import check as datasets
from models_vit import vit_mini_patch4


def folders(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (4, 4), number).save(root / name / f"{number}.png")
    return find_files(root)


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_images_without_labels(tmp_path):
    folders(tmp_path / "flat", deep=2)
    Image.new("L", (4, 4)).save(tmp_path / "flat" / "1.png")
    flat = find_files(tmp_path / "flat")
    with pytest.raises(ValueError, match="`val_list`"):
        labels.require(flat, "val")
    with pytest.raises(ValueError, match="pre-training"):
        labels.require(Shards("https://example.org/{0..3}.tar", 10), "train")
    named = folders(tmp_path / "named", cat=1)
    assert labels.require(named, "val") is named
    some = folders(tmp_path / "some", cat=2)
    some.labels = np.array([0, -1])  # as of an image above the class folders
    with pytest.raises(ValueError, match=r"/cat/1.png"):
        labels.require(some, "train")


def test_labels_count_the_models_classes(tmp_path, caplog):
    source = folders(tmp_path, cat=1, emu=2)
    assert labels.counted_as(source, ["cat", "emu"]) is source
    mapped = labels.counted_as(source, ["ant", "cat", "dog", "emu"])
    assert [mapped[index][1] for index in range(3)] == list(mapped.labels) == [1, 3, 3]
    assert mapped.classes == ["ant", "cat", "dog", "emu"]
    assert mapped.name(2) == source.name(2)
    assert mapped[2][0] == source[2][0]
    assert "the images have only 2 of the model's 4 classes" in caplog.text
    with pytest.raises(ValueError, match="emu"):
        labels.counted_as(source, ["cat", "dog"])


def test_some_of_each_class_grow_with_their_number(tmp_path):
    source = folders(tmp_path, cat=9, dog=7)
    few, more, other = (labels.some_of_each_class(source, *options) for options in ((2, 0), (5, 0), (5, 1)))
    assert np.bincount(few.labels).tolist() == [2, 2]
    assert np.bincount(more.labels).tolist() == [5, 5]
    assert set(names(few)) < set(names(more)) != set(names(other))
    with pytest.raises(ValueError, match=r"train_per_class=8: .*dog"):
        labels.some_of_each_class(source, 8, seed=0)


def test_held_out_images_are_in_no_other_part(tmp_path):
    source = folders(tmp_path, cat=9, dog=11)
    (rest, held), (_, other) = (labels.hold_out(source, 0.2, seed=seed, flag="--held_out") for seed in (0, 1))
    assert (len(rest), len(held)) == (16, 4)
    assert sorted(names(rest) + names(held)) == sorted(names(source))
    assert set(names(other)) != set(names(held))


@pytest.mark.parametrize(("count", "share", "expected"), [(20, 0.02, 1), (10, 0.99, 9), (3, 0.1, 1), (2, 0.9, 1)])
def test_both_parts_have_images(tmp_path, count, share, expected):
    rest, held_out = labels.hold_out(folders(tmp_path, cat=count), share, seed=0, flag="--val_fraction")
    assert (len(rest), len(held_out)) == (count - expected, expected)
    with pytest.raises(ValueError, match=r"--val_fraction 0.5"):
        labels.hold_out(folders(tmp_path / "one", cat=1), 0.5, seed=0, flag="--val_fraction 0.5")


def test_the_labels_of_both_sets_count_the_same_classes(tmp_path):
    """Lists may name the classes in any order."""
    train = folders(tmp_path / "train", cat=5, dog=6)
    val = folders(tmp_path / "val", cat=2, dog=1)
    val.classes, val.labels = ["dog", "cat"], 1 - val.labels
    sets = {"train": train, "val": val}
    options = {"nb_classes": 2, "train_per_class": 4, "seed": 0}
    few, tested = labels.open_pair(lambda split: sets[split], **options)
    assert few.classes == tested.classes == ["cat", "dog"]
    assert [tested[index][1] for index in range(3)] == tested.labels.tolist() == [0, 0, 1]
    assert np.bincount(few.labels).tolist() == [4, 4]
    with pytest.raises(ValueError, match="`nb_classes`"):
        labels.open_pair(lambda split: sets[split], **options | {"nb_classes": 3})


def write_lists(folder, labelled, names, suffix="csv"):
    """Writes lists of `labelled` in which the classes have other names; returns the flags."""
    flags = {"data_path": labelled}
    for split in ("train", "val"):
        files = sorted((labelled / split).glob("*/*"))
        rows = [(f"{file.relative_to(labelled)}", names[int(file.parent.name[-1])]) for file in files]
        rows = [(file, name) for file, name in rows if name is not None]
        texts = {"json": json.dumps(rows), "txt": "".join(f"{file} {name}\n" for file, name in rows)}
        cells = [("path", "label"), *rows]
        texts["csv"] = "".join(f'"{file}","{str(name).replace(chr(34), chr(34) * 2)}"\n' for file, name in cells)
        flags[f"{split}_list"] = folder / f"{split}.{suffix}"
        flags[f"{split}_list"].write_text(texts[suffix])
    return flags


def recorded(out):
    return checkpoint.read(out / "checkpoint-0.pth")["args"]["classes"]


def test_labels_are_numbers_only_if_all_are_integers(classify, labelled, tmp_path, capsys):
    """Names are never merged. Folders of the same names have the same classes."""
    flags = {"epochs": 1, "lr": 0, "warmup_epochs": 0}
    names = ["1_11", "11_1", "001", "1", "4E5", "٣"]
    for suffix in ("txt", "json", "csv"):
        for own, expected in ((names, sorted(names)), ([10, 9, 2, 3, 4, 5], ["2", "3", "4", "5", "9", "10"])):
            lists = write_lists(tmp_path, labelled, own, suffix)
            assert open_source("val", str(labelled), str(lists["val_list"])).classes == expected, suffix
    lists = write_lists(tmp_path, labelled, names)
    out = classify(main_finetune, **flags, **lists)
    assert recorded(out) == sorted(names)
    assert re.search("`train_list` .*001, 1 are different classes", capsys.readouterr().out)
    for number, name in enumerate(names):
        shutil.copytree(labelled / "val" / f"kind{number}", tmp_path / "folders/val" / name)
    for data in ({"data_path": tmp_path / "folders"}, lists):
        assert len(classify(main_finetune, eval=True, resume=out / "checkpoint-0.pth", **data).labels) == 23


@pytest.mark.parametrize("text", ["1_5", "٣"])
def test_targets_and_extras_are_decimals(text, tmp_path):
    """float() takes 1_5 for 15."""

    def read(text, **options):
        (tmp_path / "0.png").touch()
        (tmp_path / "list.csv").write_text(f"path,label,dose\n0.png,{text},{text}\n")
        return open_source("train", file_list=str(tmp_path / "list.csv"), task="regression", **options)

    assert [read(good).labels.item() for good in ("1.50", "-.5", "1e-3", "7")] == [1.5, -0.5, 0.001, 7]
    for options in ({}, {"label_columns": ["dose"]}, {"extras": ["dose"]}):
        with pytest.raises(ValueError, match=text):
            read(text, **options)


ONCE = {"epochs": 1, "warmup_epochs": 0}


def test_a_new_head_has_an_output_for_each_id_that_occurs(classify, labelled, tmp_path):
    """The ids are the names of the outputs, and an evaluation finds them. --nb_classes: the ids are the outputs."""
    lists = write_lists(tmp_path, labelled, ["7", "12", "3", "200001", "5", "1"])
    for main, own in ((main_finetune, {"aa": "none", "lr": 0.003}), (main_linprobe, {})):
        out = classify(main, main.__name__, **ONCE, **own, **lists)
        assert recorded(out) == ["1", "3", "5", "7", "12", "200001"]
    assert classify(main_knn, k=5, **lists) == classify(main_knn, k=5)
    tuned = tmp_path / "main_finetune/checkpoint-0.pth"
    whole = classify(main_finetune, eval=True, resume=tuned, **lists)
    assert whole.loss == pytest.approx(lines(tuned.parent)[-1]["test_loss"])
    few = write_lists(tmp_path, labelled, ["7", "12", None, "200001", None, None])
    assert {*classify(main_finetune, eval=True, resume=tuned, **few).labels.tolist()} == {3, 4, 5}
    lists = write_lists(tmp_path, labelled, ["7", "9", "3", "2", "5", "1"])
    assert recorded(classify(main_finetune, "all", **ONCE, **lists, nb_classes=10)) == list("0123456789")


def test_a_head_that_exists_is_not_renumbered(classify, tmp_path):
    """Ids of 50 of 1000 classes are outputs of a published head. Where a file records names, these decide."""
    torch.manual_seed(0)
    model = vit_mini_patch4(img_size=16, num_classes=1000, global_pool=True)
    model.head.weight.data.normal_()
    generator, ids = np.random.default_rng(0), np.random.default_rng(1).permutation(1000)[:50]
    pictures = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in ids]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "val.txt").write_text("".join(f"{number}.png {own}\n" for number, own in enumerate(ids)))
    named, bare = [str(number) for number in range(1000)], {"model": model.state_dict()}
    torch.save(bare, tmp_path / "bare.pth")
    torch.save({**bare, "args": {"model": "vit_mini_patch4", "classes": named}}, tmp_path / "earlier.pth")
    torch.save({**bare, "args": {"model": "vit_mini_patch4", "classes": named[::-1]}}, tmp_path / "names.pth")
    logits = get_model(tmp_path / "bare.pth", input_size=16, crop_pct=1)
    predicted = np.array([logits.predict(picture)["pred_label"] for picture in pictures])
    for name, outputs in (("bare", ids), ("earlier", ids), ("names", 999 - ids)):
        flags = {"eval": True, "resume": tmp_path / f"{name}.pth", "data_path": tmp_path, "crop_pct": 1}
        found = classify(main_finetune, **flags, val_list=tmp_path / "val.txt")
        assert found.labels.tolist() == outputs.tolist(), name
        assert found.predictions.tolist() == predicted.tolist()
    (tmp_path / "val.txt").write_text("0.png 0\n1.png 1000\n")
    with pytest.raises(ValueError, match="1000"):
        classify(main_finetune, **flags | {"resume": tmp_path / "bare.pth"}, val_list=tmp_path / "val.txt")


@pytest.mark.parametrize(("ids", "flags", "is_kept"), [
    ("123456", {}, False), ("123450", {"nb_classes": 6}, True),
])  # fmt: skip
def test_a_head_without_names_is_kept_for_its_own_ids(ids, flags, is_kept, classify, labelled, tmp_path):
    model = vit_mini_patch4(img_size=16, num_classes=6, global_pool=True)
    model.head.weight.data.normal_()
    torch.save({"model": model.state_dict()}, tmp_path / "six.pth")
    lists = write_lists(tmp_path, labelled, ids)
    out = classify(main_finetune, **ONCE, lr=0, finetune=tmp_path / "six.pth", **lists, **flags)
    assert (weights(out, "checkpoint-0.pth")["head.weight"].std() > 0.5) == is_kept


def test_many_classes_take_memory_for_images_and_classes_only(classify, labelled, tmp_path):
    """A matrix of 20,000 x 20,000 takes 3.2 GB, and 400 MB with one byte for each pair."""
    model = vit_mini_patch4(img_size=16, num_classes=20_000, global_pool=True)
    torch.save({"model": model.state_dict()}, tmp_path / "many.pth")
    lists = write_lists(tmp_path, labelled, ["19999", "0", "777", "3", "12345", "1"])
    tracemalloc.start()
    try:
        found = classify(main_finetune, eval=True, resume=tmp_path / "many.pth", **lists,
                         metric="macro_f1 balanced_accuracy kappa auroc average_precision")  # fmt: skip
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    truth, own = found.labels, found.predictions
    assert found.metrics["macro_f1"] == pytest.approx(sk.f1_score(truth, own, average="macro", zero_division=0))
    assert found.metrics["balanced_accuracy"] == pytest.approx(
        np.mean([(own == n)[truth == n].mean() for n in {*truth}])
    )


def test_metrics_leave_out_a_class_without_validation_images(classify, labelled, tmp_path, capsys):
    data = shutil.copytree(labelled, tmp_path / "data")
    shutil.rmtree(data / "val/kind5")
    flags = {"aa": "none", "lr": 0.003, "epochs": 2, "warmup_epochs": 0, "data_path": data}
    out = classify(main_finetune, **flags, metric="balanced_accuracy macro_f1 accuracy")
    assert "none is of kind5" in capsys.readouterr().out
    state = checkpoint.read(out / "checkpoint-1.pth")
    assert (len(state["model"]["head.weight"]), state["args"]["classes"][5]) == (6, "kind5")
    found = classify(main_finetune, eval=True, resume=out / "checkpoint-1.pth", data_path=data)
    truth, own = found.labels, found.predictions
    assert {*truth.tolist()} == {0, 1, 2, 3, 4}
    recalls = [(own == label)[truth == label].mean() for label in range(5)]
    for name, value in (("balanced_accuracy", np.mean(recalls)), ("accuracy", (own == truth).mean()),
                        ("macro_f1", sk.f1_score(truth, own, average="macro", zero_division=0))):  # fmt: skip
        assert lines(out)[-1][f"test_{name}"] == pytest.approx(value), name


@pytest.mark.parametrize("separator", ["|", ",", "/", "[]"])
def test_several_labels_need_semicolons(separator, classify, labelled, tmp_path):
    """Another separator would make each combination a class."""
    combined = ["red", "green", "red;green", "blue", "blue;red", "green;blue;red"]
    own = [json.dumps(text.split(";")) if separator == "[]" else text.replace(";", separator) for text in combined]

    flags = {**ONCE, "aa": "none", "task": "multilabel"}
    with pytest.raises(ValueError, match="label"):
        classify(main_finetune, **flags, **write_lists(tmp_path, labelled, own))
    lists = write_lists(tmp_path, labelled, combined)
    assert recorded(classify(main_finetune, **flags, **lists)) == ["blue", "green", "red"]


def test_pretraining_does_not_read_labels(pretrain, pictures, tmp_path, capsys):
    """Half of the labels, a row for each box, and negative ids. The run is that of a list without labels."""
    files = sorted(str(file.relative_to(pictures)) for file in pictures.glob("train/*/*"))
    half = [(file, "cat" if number % 2 else None) for number, file in enumerate(files)]
    below = [(file, -7) for file in files]
    boxes = [(file, number) for number, file in enumerate([*files, *files])]
    losses = {}
    for name, rows in (("none", files), ("half", half), ("below", below), ("boxes", boxes)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        out = pretrain(name, train_list=tmp_path / f"{name}.json", epochs=1)
        losses[name] = [line["train_loss"] for line in lines(out)]
        assert ("24 of its 48 rows repeat a file" in capsys.readouterr().out) == (name == "boxes")
    assert losses["half"] == losses["below"] == losses["none"] != losses["boxes"]
    call(datasets, pictures, train_list=tmp_path / "half.json", num_workers=0)
    assert "images      24" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_outputs_without_images(classify, labelled, tmp_path):
    """--nb_classes, and runs of an earlier version, have an output for each number up to the highest id."""
    flags = {**ONCE, **write_lists(tmp_path, labelled, "012457"), "aa": "none"}
    classify(main_finetune, **flags, nb_classes=8)
    out = classify(main_finetune, **flags | {"resume": "auto", "epochs": 2})
    assert (len(lines(out)), checkpoint.read(out / "checkpoint-1.pth")["args"]["classes"]) == (2, list("01234567"))


def test_messages_of_lists_are_about_what_is_read(tmp_path, caplog):
    """Pre-training reads no labels, and names of columns are no labels that a blank joins."""
    image = tmp_path / "image.png"
    Image.new("L", (4, 4)).save(image)
    (tmp_path / "both.csv").write_text(f"path,class,label\n{image},a,b\n")
    (tmp_path / "both.json").write_text(json.dumps([{"path": str(image), "class": "a", "label": "b"}]))
    (tmp_path / "findings.csv").write_text(f"path,Lung Lesion,Lung Opacity\n{image},0,1\n")
    for name in ("both.csv", "both.json"):
        assert open_source("train", file_list=tmp_path / name, task=None).classes == []
        assert not caplog.records
        assert open_source("train", file_list=tmp_path / name).classes == ["b"]
        assert "label and class, and label is read; give label_columns=" in caplog.text
        caplog.clear()
    columns = ["Lung Lesion", "Lung Opacity"]
    read = open_source("train", file_list=tmp_path / "findings.csv", task="multilabel", label_columns=columns)
    assert read.labels.tolist() == [[0, 1]]
    assert not caplog.records


def tags_of(tmp_path, cells, suffix=".csv"):
    rows = []
    for number, cell in enumerate(cells):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
        rows.append({"path": f"{number}.png", "label": cell})
    text = (
        json.dumps(rows)
        if suffix == ".json"
        else "path,label\n" + "".join(f"{n}.png,{c}\n" for n, c in enumerate(cells))
    )
    path = tmp_path / f"list{suffix}"
    path.write_text(text)
    return open_source("train", file_list=path, task="multilabel")


@pytest.mark.parametrize(("cells", "message"), [
    (["0;1;1", "1;0;0", "1;1;0"], "the labels 0;1;1 are a vector of 0 and 1: give a column for each class"),
    (["1.0;0.0;1.0", "", "0.0;1.0;0.0"], "are a vector of 0 and 1"), (["True;False", "False;False"], "are a vector"),
    (["haze primary", "clear primary", "clear water", "haze", "water", "haze water"], "haze primary.* separate"),
    (["haze\tprimary", "clear\tprimary", "clear\twater", "haze", "water"], "separate labels by ;"),
])  # fmt: skip
def test_labels_with_other_separators_are_refused(tmp_path, cells, message):
    """Each combination would be a class, or 0 and 1 would be."""
    with pytest.raises(ValueError, match=message):
        tags_of(tmp_path, cells)
    if cells[0] == "0;1;1":
        with pytest.raises(ValueError, match=message):
            tags_of(tmp_path, [[int(part) for part in cell.split(";")] for cell in cells], ".json")


def test_names_of_several_words_and_booleans(tmp_path):
    assert tags_of(tmp_path, ["polar bear", "brown bear", "polar bear"]).classes == ["brown bear", "polar bear"]
    fruits = [f"{state} {fruit}" for state in ("healthy", "rotten") for fruit in ("apple", "banana", "orange")]
    assert len(tags_of(tmp_path, fruits).classes) == 6
    assert tags_of(tmp_path, ["a;b", "a;a", ""]).labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    for suffix, cells in ((".json", [True, False]), (".csv", ["True", "false"])):
        source = tags_of(tmp_path, cells, suffix)
        assert (source.classes, source.labels.tolist()) == (["label"], [[1], [0]])


def test_some_of_each_class_of_a_head_with_other_outputs(tmp_path):
    lists = {name: tmp_path / f"{name}.txt" for name in ("train", "val")}
    for name, path in lists.items():
        path.write_text("".join(f"{name}{number}.png {number % 3 * 2}\n" for number in range(6)))
        for number in range(6):
            Image.new("L", (4, 4)).save(tmp_path / f"{name}{number}.png")
    train, val = labels.open_pair(
        lambda split: open_source(split, file_list=lists[split]), nb_classes=8, train_per_class=1
    )
    assert sorted(np.asarray(train.labels).tolist()) == [0, 2, 4]
    assert val.classes == [str(number) for number in range(8)]
