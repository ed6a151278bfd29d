"""The choice of hyperparameters in a comparison: rates of trainings, and poolings."""

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
from mae.compare import store
from mae.compare.predictors import BASELINES
from mae.inference import get_model
from mae.settings.choices import CLASSIFICATION
from mae.training.nonfinite import NonFiniteLoss

TITLES = [each.title for each in BASELINES[CLASSIFICATION]]


def test_every_training_extends_its_grid_and_names_its_choice(labelled, tmp_path, monkeypatch):
    """The scores are given: the best rate is 900. A rate of the extended grid diverges."""
    model = get_model("vit_mini_patch4", input_size=16, nb_classes=0, global_pool=False)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "mine.pth")
    tried = Counter()

    def run(folder, script, settings, *_):
        rate = settings["blr"]
        tried[folder] += 1
        if rate > 2000:
            folder.mkdir(parents=True)
            raise ValueError("the script has failed") from NonFiniteLoss("loss nan")
        return {"seconds": 1.0, "test_acc1": 50 - abs(math.log(rate / 900))}

    monkeypatch.setattr(store, "run_once", run)
    text = call(main_compare, "--encoders", tmp_path / "mine.pth", "--protocols", "attentive", "lora", "finetune",
                "--labels", "48", "--draws", 1, "--blr", "1", "3", data_path=labelled, device="cpu",
                output_dir=tmp_path / "out", num_workers=0)  # fmt: skip
    chosen = {row["protocol"]: row["chosen"] for row in rows(tmp_path / "out")}
    assert chosen == dict.fromkeys(("attentive probe", "LoRA", "fine-tuned"), "blr 1000")
    for protocol, choice in chosen.items():
        assert re.search(rf"mine \({protocol}\) \| .*\({choice}\) \|", text)
    assert {*tried.values()} == {1}


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


@pytest.mark.parametrize(("name", "title"), [("Class", "class token"), ("Patches", "mean of the patches")])
def test_the_labels_choose_the_pooling_that_knows(labelled, own_module, tmp_path, name, title):
    """The other pooling is constant. The features of all poolings and protocols come from one pass."""
    own_module("two_poolings", ENCODERS)
    text = call(main_compare, "--encoders", "scratch", "--protocols", "knn", "linear", "--labels", "all",
                data_path=labelled, model="vit_mini_patch4", input_size=16, encoder=f"two_poolings:{name}",
                device="cpu", amp="off", num_workers=0, output_dir=tmp_path / "out")  # fmt: skip
    import two_poolings

    for row in rows(tmp_path / "out"):
        chosen = row["chosen"].partition(", ")[2]
        assert chosen in (title, "class token and mean of the patches")  # both poolings know, too
        assert float(row["accuracy"]) > 60 and chosen in text
    assert sum(two_poolings.PASSES) == 48 + 23
    assert not (tmp_path / "out/runs/features").exists()


def test_a_folder_of_classes_is_compared_without_a_validation_set(labelled, tmp_path, capsys, monkeypatch):
    """A fifth of the images stands for it: of all draws and scripts the same, and no choice is made on it."""
    images, opened = shutil.copytree(labelled / "train", tmp_path / "images"), []
    open_features = main_knn.open_features

    def recorded(session, data, *sources, **options):
        opened.append([{source.name(index) for index in range(len(source))} for source in sources[:2]])
        return open_features(session, data, *sources, **options)

    monkeypatch.setattr(main_knn, "open_features", recorded)
    shared = ["--model", "vit_mini_patch4", "--input_size", "16", "--device", "cpu", "--num_workers", "0"]
    call(main_compare, *shared, "--encoders", "scratch", "--protocols", "knn", "--labels", "12", "--draws", "2",
         data_path=images, output_dir=tmp_path / "out")  # fmt: skip
    assert re.search(r"10 of 48 training images are held out", capsys.readouterr().out)
    call(main_knn, *shared, "--k", "1", data_path=images)
    (line,) = re.findall(r".*no validation set.*", capsys.readouterr().out)
    assert "10 of 48 training images are held out" in line
    (train, val), (rest, same) = opened
    assert val == same and len(val) == 10 and len(rest) == 38
    assert train < rest and 12 < len(train) <= 24  # of two draws


def test_few_labels_have_several_draws_by_default(labelled, tmp_path, capsys):
    """As many as have 2,500 labels together, at most 10; a line says so. All labels are one draw."""
    small = ["--input_size", 16, "--num_workers", 0, "--labels", "12", "all", "--encoders", "pixels"]
    call(main_compare, "--data_path", labelled, "--output_dir", tmp_path, *small)
    found = Counter((row["protocol"], row["labels"]) for row in rows(tmp_path))
    assert found == {(name, labels): draws for name in TITLES
                     for labels, draws in (("12", 10), ("48", 1))}  # fmt: skip
    assert "draws: 10 of 12 labels, 1 of 48 labels" in capsys.readouterr().out
