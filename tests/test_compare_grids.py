"""The choice of hyperparameters of a comparison: grids that are extended, and poolings that are tried."""

import json
import math
import re
import shutil
from collections import Counter

import pytest
import torch
from mains import call
from test_main_compare import rows

import main_compare
import main_knn
from mae.compare import grids, store
from mae.data import run_data
from mae.inference import get_model
from mae.training.nonfinite import NonFiniteLoss


def peaked(places, computed):
    """Scores of options with one peak each, by value."""

    def scores_of(option, values):
        computed.extend((option, value) for value in values)
        place, height = places[option]
        return {value: height - abs(math.log(value / place)) for value in values}

    return scores_of


def test_a_grid_that_ends_at_its_best_value_is_extended():
    for place, expected in ((1000, 1000), (0.09, 0.1), (30, 10), (2000, 3000)):
        computed = []
        assert grids.choose(["a"], [1.0, 10.0, 100.0], peaked({"a": (place, 0)}, computed)) == ("a", expected)
        assert len(computed) == len(set(computed))
    lower = grids.choose(["a"], [1.0, 10.0], lambda _, values: {v: abs(math.log(v / 1000)) for v in values}, True)
    assert lower == ("a", 1000.0)


def test_the_grid_of_each_option_is_extended():
    """The option that is better in the first grid is worse in the end."""
    computed = []
    assert grids.choose(["a", "b"], [1, 10, 100], peaked({"a": (10, 0), "b": (1000, 1)}, computed)) == ("b", 1000)
    assert {value for option, value in computed if option == "a"} == {
        value for option, value in computed if option == "b"
    }


def test_ties_and_limits_of_a_grid():
    """Values that are equally good do not extend it; numbers of neighbors have limits; a single value is kept."""

    def same(_, values):
        return dict.fromkeys(values, 50.0)

    assert grids.choose(["a", "b"], [1, 5, 20], same) == ("a", 5)
    assert grids.choose(["a"], [7], same) == ("a", 7)
    assert grids.choose(["a"], [1, 5, 20], peaked({"a": (1000, 0)}, []), least=1, most=38) == ("a", 38)
    assert grids.choose(["a"], [5, 20], peaked({"a": (0.01, 0)}, []), least=1, most=38) == ("a", 1)


def test_every_protocol_extends_its_grid_and_names_its_choice(labelled, tmp_path, monkeypatch):
    """The scores are given: the best rate is 900, the best k is all neighbors, and the class token is better.

    A rate of the extended grid diverges.
    """
    model = get_model("vit_mini_patch4", input_size=16, nb_classes=0, global_pool=False)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "mine.pth")

    def run(folder, script, settings, *_):
        score = 5.0 * (settings.get("global_pool") is False)
        ks = settings.get("k", [])
        of_k = {f"acc1_k{k}": 50 + score + math.log(k) for k in (ks if isinstance(ks, list) else [ks])}
        rate = settings.get("blr", 1)
        assert not isinstance(rate, list), "each rate is one head"
        if rate > 2000:
            folder.mkdir(parents=True)
            raise ValueError("the script has failed") from NonFiniteLoss("loss nan")
        return {"seconds": 1.0, **of_k, "test_acc1": 50 + score - abs(math.log(rate / 900))}

    monkeypatch.setattr(store, "run_once", run)
    monkeypatch.setattr(store, "kept", lambda *_: {"parameters": 1, "images_per_s": 1.0})
    text = call(main_compare, "--encoders", tmp_path / "mine.pth", "--protocols", "knn", "linear", "attentive",
                "lora", "finetune", "--labels", "48", "--draws", 1, "--blr", "1", "3", data_path=labelled, device="cpu",
                output_dir=tmp_path / "out", num_workers=0)  # fmt: skip
    chosen = {row["protocol"]: row["chosen"] for row in rows(tmp_path / "out")}
    assert chosen == {"k-NN": "k 38, class token", "linear probe": "blr 1000, class token",
                      "attentive probe": "blr 1000", "LoRA": "blr 1000", "fine-tuned": "blr 1000"}  # fmt: skip
    for protocol, choice in chosen.items():
        assert re.search(rf"mine \({protocol}\) \| .*\({choice}\) \|", text)
    assert re.search(r"With 48 labels, mine \(k-NN\) .*\(k 38, class token\)", text)
    (command,) = (row["command"] for row in rows(tmp_path / "out") if row["protocol"] == "linear probe")
    assert "--cls_token" in command and "--blr 1000" in command


ENCODERS = """
from models_vit import Encoder

PASSES = []

class Class(Encoder):
    def class_features(self, tokens):
        return super().patch_tokens(tokens).mean(dim=1)

    def patch_tokens(self, tokens):
        return super().patch_tokens(tokens) * 0 + 1

    def get_intermediate_layers(self, imgs, *args, **options):
        PASSES.append(len(imgs))
        return super().get_intermediate_layers(imgs, *args, **options)

class Patches(Class):
    def class_features(self, tokens):
        return super().class_features(tokens) * 0 + 1

    def patch_tokens(self, tokens):
        return Encoder.patch_tokens(self, tokens)
"""


@pytest.mark.parametrize(("name", "title", "flag"), [
    ("Class", "class token", "--cls_token"), ("Patches", "mean of the patches", "--global_pool"),
])  # fmt: skip
def test_held_out_images_choose_the_pooling_that_knows(labelled, own_module, tmp_path, name, title, flag):
    """The other pooling is constant. The features of all come from one pass over the labels of each split."""
    own_module("two_poolings", ENCODERS)
    (tmp_path / "linear.yaml").write_text(
        "epochs: 20\nwarmup_epochs: 0\nblr: 30\nbatch_size: 8\ncache_features: true\neval_every: 20\n"
    )
    text = call(main_compare, "--encoders", "scratch", "--protocols", "knn", "linear", "--labels", "all", "--recipes",
                f"linear={tmp_path / 'linear.yaml'}", data_path=labelled, model="vit_mini_patch4", input_size=16,
                encoder=f"two_poolings:{name}", device="cpu", amp="off", num_workers=0,
                output_dir=tmp_path / "out")  # fmt: skip
    import two_poolings

    flags = {title: [flag], "class token and mean of the patches": ["--pool", "both"]}  # both poolings know, too
    for row in rows(tmp_path / "out"):
        chosen = flags[row["chosen"].partition(", ")[2]]
        assert float(row["accuracy"]) > 60 and " ".join(chosen) in row["command"]
        assert row["chosen"].partition(", ")[2] in text
    assert sum(two_poolings.PASSES) == 2 * 5 * 48  # of k-NN and of the linear probe, in five splits


def test_a_folder_of_classes_is_compared_without_a_validation_set(labelled, tmp_path, capsys, monkeypatch):
    """A fifth of the images stands for it: of all draws and scripts the same, and no choice is made on it."""
    images, chosen = shutil.copytree(labelled / "train", tmp_path / "images"), []
    (tmp_path / "knn.yaml").write_text("k: [1, 5]\n")

    def opened(*args, **options):
        train, val, record = run_data.RunData.open_pair(*args, **options)
        chosen.append([{source.name(index) for index in range(len(source))} for source in (train, val)])
        return train, val, record

    shared = ["--model", "vit_mini_patch4", "--input_size", "16", "--device", "cpu", "--num_workers", "0"]
    monkeypatch.setattr(main_knn, "open_labelled", lambda data, *_: opened(data))
    call(main_compare, *shared, "--encoders", "scratch", "--protocols", "knn", "--labels", "12", "--draws", "2",
         "--recipes", f"knn={tmp_path / 'knn.yaml'}", data_path=images, output_dir=tmp_path / "out")  # fmt: skip
    assert re.search(r"10 of 48 training images are held out", capsys.readouterr().out)
    *choices, first, second = chosen
    assert first[1] == second[1] and len(first[1]) == 10 and first[0] != second[0]
    for train, val in chosen:
        assert not train & val and not train & first[1]
    assert choices and all(val <= first[0] and len(val) == 2 for _, val in choices)
    capsys.readouterr()
    call(main_knn, *shared, "--k", "1", data_path=images)
    (line,) = re.findall(r".*no validation set.*", capsys.readouterr().out)
    assert "10 of 48 training images are held out" in line


def test_few_labels_have_several_draws_by_default(labelled, tmp_path, capsys):
    """As many as have 2,500 labels together, at most 10; a line says so. All labels are one draw."""
    small = ["--input_size", 16, "--num_workers", 0, "--labels", "12", "all", "--encoders", "pixels"]
    call(main_compare, "--data_path", labelled, "--output_dir", tmp_path, *small)
    found = Counter((row["protocol"], row["labels"]) for row in rows(tmp_path))
    assert found == {(name, labels): draws for name in ("logistic regression", "RBF-SVM")
                     for labels, draws in (("12", 10), ("48", 1))}  # fmt: skip
    assert "draws: 10 of 12 labels, 1 of 48 labels" in capsys.readouterr().out


def test_few_labels_choose_hyperparameters_on_several_fifths(labelled, tmp_path):
    """By default, by the mean over the first five draws."""
    small = ["--input_size", 16, "--model", "vit_mini_patch4", "--num_workers", 0, "--device", "cpu"]
    call(main_compare, "--data_path", labelled, "--output_dir", tmp_path, *small, "--labels", "30", "--encoders",
         "scratch", "--protocols", "knn")  # fmt: skip
    found = {}
    for draw in range(5):
        for file in tmp_path.glob(f"runs/choices/scratch/knn/30/{draw}/*/*/run.json"):
            pooling = file.relative_to(tmp_path).parts[6]
            for name, score in json.loads(file.read_text())["scores"].items():
                if match := re.fullmatch(r"acc1_k(\d+)", name):
                    found.setdefault((pooling, int(match[1])), []).append(score)
    assert {len(scores) for scores in found.values()} == {5}
    assert not (tmp_path / "runs/choices/scratch/knn/30/5").exists()
    means = {key: sum(scores) / 5 for key, scores in found.items()}
    (chosen,) = {row["chosen"] for row in rows(tmp_path)}
    k, pooling = re.fullmatch(r"k (\d+), (.*)", chosen).groups()
    named = {"class token": "cls", "mean of the patches": "avg"}[pooling]
    assert means[named, int(k)] == pytest.approx(max(means.values()))
