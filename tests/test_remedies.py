"""Remedies work when typed: a wrong command, the remedy in its error message, and the corrected command."""

import itertools
import re
import shutil
from pathlib import Path

import mains
import numpy as np
import pytest
from mains import argv_of
from PIL import Image

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from mae.checkpoints import checkpoint
from mae.cli import entry_point
from mae.data import check as datasets
from mae.data.decode import BadImage
from mae.inference import features

SMALL = {"input_size": 16, "batch_size": 8, "num_workers": 0, "device": "cpu"}
RUN = {**SMALL, "epochs": 1, "warmup_epochs": 0}
MAE, VIT = {**RUN, "model": "mae_vit_mini_patch4", "vis_every": 0}, {**RUN, "model": "vit_mini_patch4"}


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a script in this process; returns its last line, or an empty string after a success."""

    def call(script, settings: dict, *argv) -> str:
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, argv), *argv_of(settings)])
        capsys.readouterr()
        try:
            entry_point.run(script.main, script.get_args_parser())
        except SystemExit:
            output = capsys.readouterr().err
            assert "Traceback" not in output
            return next(line for line in output.splitlines() if "error: " in line)
        return ""

    return call


@pytest.fixture(scope="module")
def runs(labelled, tmp_path_factory):
    """Run directories of pre-training and of fine-tuned classifiers: with pooling, and with frozen blocks."""
    root = tmp_path_factory.mktemp("runs")
    for name, script, settings in (("mae", main_pretrain, MAE), ("tuned", main_finetune, VIT),
                                   ("part", main_finetune, {**VIT, "unfreeze_blocks": 1, "epochs": 2})):  # fmt: skip
        mains.call(script, **settings, data_path=labelled, output_dir=root / name)
    return root


CASES = {  # script, right settings, wrong ones, and what the error advises
    "another encoder": (
        main_finetune, {**VIT, "finetune": "mae"}, {"model": "vit_tiny_patch16"},
        r"give (--model vit_mini_patch4 --patch_size 4)$"),
    "patch size": (main_knn, {**SMALL, "model": "vit_mini_patch4", "finetune": "mae", "k": 5}, {"patch_size": "8"},
                   r"give (--patch_size 4)$"),
    "pooling": (main_finetune, {**VIT, "eval": True, "resume": "tuned"}, {"cls_token": True}, r"give (--global_pool)$"),
    "channels": (main_finetune, {**VIT, "finetune": "mae"}, {"in_chans": 1, "adapt_input": "error"},
                 r"give (--adapt_input mean),"),
    "another decoder": (
        main_pretrain, {**MAE, "init_from": "mae"}, {"decoder_depth": 2}, r"give (--decoder_depth 1)$"),
    "resuming with other channels": (main_pretrain, {**MAE, "resume": "mae"}, {"in_chans": 1}, r"give (--in_chans 3)$"),
    "resuming fine-tuning from pre-training": (
        main_finetune, VIT, {"resume": "mae"}, r": (--finetune .*pth) instead of --resume starts from its weights$"),
    "resuming probing from pre-training": (
        main_linprobe, VIT, {"resume": "mae"}, r": (--finetune .*pth) instead of --resume starts from its weights$"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_remedy_works_when_typed(case, runs, labelled, tmp_path, call):
    script, right, wrong, pattern = CASES[case]
    right = {**right, "data_path": labelled}
    if script is not main_knn:
        right["output_dir"] = tmp_path / "out"
    for settings in (right, wrong := dict(wrong)):
        for flag in {"finetune", "init_from", "resume"} & settings.keys():
            settings[flag] = next((runs / str(settings[flag])).glob("checkpoint-0.pth"))
    output = call(script, {**right, **wrong})
    remedy = re.search(pattern, output)
    assert remedy, output
    typed = {flag: value for flag, value in {**right, **wrong}.items() if flag != "resume" or flag in right}
    assert call(script, {}, *argv_of(typed), *remedy[1].split()) == ""


def test_the_remedy_for_a_diverging_learning_rate_works(labelled, tmp_path, call):
    settings = {**MAE, "data_path": labelled, "output_dir": tmp_path / "out", "lr": 1e30}
    output = call(main_pretrain, settings)
    assert "a lower learning rate (--lr, or --blr if --lr is not given)" in output
    assert call(main_pretrain, {**settings, "lr": 1e-4, "output_dir": tmp_path / "lower"}) == ""


def test_on_bad_image_is_suggested_only_by_scripts_that_have_it(labelled, tmp_path, call):
    bad = shutil.copytree(labelled, tmp_path / "data") / "train/kind1/bad.png"
    bad.write_bytes(b"")
    settings = {**MAE, "data_path": tmp_path / "data", "output_dir": tmp_path / "out", "batch_size": 49}
    output = call(main_pretrain, settings)
    assert "bad.png: the file is empty (--on_bad_image skip excludes such images from training)" in output
    assert call(main_pretrain, {**settings, "on_bad_image": "skip", "output_dir": tmp_path / "skip"}) == ""
    output = call(main_knn, {**SMALL, "data_path": tmp_path / "data", "model": "vit_mini_patch4"})
    assert output.endswith("bad.png: the file is empty")
    output = call(datasets, {"num_workers": 0}, tmp_path / "data")
    assert "main_pretrain.py --on_bad_image skip excludes up to" in output


def test_misspelled_names_are_corrected(labelled, tmp_path, call):
    settings = {**MAE, "data_path": labelled, "output_dir": tmp_path / "out"}
    assert call(main_pretrain, {**settings, "model": "mae_vit_mini_ptach4"}).endswith("mean mae_vit_mini_patch4?")
    assert call(main_finetune, {"model": "mae_vit_mini_patch4"}).endswith("mean vit_mini_patch4?")
    (tmp_path / "recipe.yaml").write_text("model: vit_basepatch16\n")
    assert call(main_finetune, {"config": tmp_path / "recipe.yaml"}).endswith("mean vit_base_patch16?")


def test_a_run_directory_is_not_a_file_and_has_a_newest_checkpoint(runs, labelled, tmp_path, call):
    newest = str(runs / "mae/checkpoint-0.pth")
    data = {"data_path": labelled, "output_dir": tmp_path / "out"}
    for script, settings, flag in (
        (main_finetune, {**VIT, **data}, "finetune"),
        (main_pretrain, {**MAE, **data}, "init_from"),
        (main_pretrain, {**MAE, **data}, "resume"),
    ):
        output = call(script, {**settings, flag: runs / "mae"})
        assert output.endswith(newest)
        assert call(script, {**settings, flag: newest, "output_dir": tmp_path / f"{script.__name__}-{flag}"}) == ""
    output = call(main_finetune, {**VIT, **data, "eval": True, "resume": runs / "part"})  # of two epochs
    assert checkpoint.position(Path(output.split()[-1])) == checkpoint.position(runs / "part/checkpoint-1.pth")


def test_the_remedy_for_a_missing_split_works(runs, pictures, tmp_path, call):
    settings = {**VIT, "data_path": pictures, "output_dir": tmp_path / "out"}
    assert call(main_finetune, settings).endswith("no folder val/ in it: add this folder, or give --val_list FILE")
    names = "".join(f"{path} {path.parent.name}\n" for path in sorted(pictures.glob("train/*/*")))
    (tmp_path / "val.txt").write_text(names)
    assert call(main_finetune, {**settings, "val_list": tmp_path / "val.txt"}) == ""
    command = {"model": runs / "mae/checkpoint-0.pth", "out": tmp_path / "f.npz", "split": "val"}
    assert call(features, command, pictures).endswith("no folder val/ in it: add this folder, or give val_list=FILE")


def test_a_folder_without_splits_needs_both_lists(runs, labelled, tmp_path, call):
    """With a list of validation images only, these images would be training images, too."""
    lists = {split: tmp_path / f"{split}.txt" for split in ("train", "val")}
    for split, file in lists.items():
        names = sorted(labelled.glob(f"{split}/*/*"))
        file.write_text("".join(f"{name} {name.parent.name}\n" for name in names))
    shutil.copytree(labelled / "train", tmp_path / "flat")
    packed = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "flat")
    knn = {**SMALL, "model": "vit_mini_patch4", "k": 1}
    compare = {"input_size": 16, "encoders": "scratch", "num_workers": 0, "output_dir": tmp_path / "compare"}
    both, one = " train/ and val/, or give --train_list FILE --val_list FILE", ", or give --train_list FILE"
    for path in (tmp_path / "flat", packed):
        for script, settings in ((main_knn, knn), (main_compare, compare)):
            assert call(script, {**settings, "data_path": path}).endswith(both)
            assert call(script, {**settings, "data_path": path, "val_list": lists["val"]}).endswith(one)
    given = {"data_path": tmp_path / "flat", "val_list": lists["val"]}
    assert call(main_knn, {**knn, **given, "train_list": lists["train"]}) == ""
    assert call(main_knn, {**knn, **given, "val_fraction": 0.2}) == ""  # the list is not used
    evaluation = {**VIT, "eval": True, "resume": runs / "tuned/checkpoint-0.pth"}
    assert call(main_finetune, {**evaluation, **given}) == ""  # the folder is not used


def test_images_of_five_channels_need_in_chans(tmp_path, call, capsys):
    """The check lists 20 images, and counts the others."""
    (tmp_path / "five").mkdir()
    for number in range(24):
        np.save(tmp_path / f"five/{number:02}.npy", np.full((5, 16, 16), number, dtype=np.uint8))
    alone = {"num_workers": 0}
    with pytest.raises(BadImage, match=r"24 of 24 images can't be read"):
        mains.call(datasets, tmp_path / "five", num_workers=0)
    listed = capsys.readouterr().out
    assert "19.npy" in listed and "20.npy" not in listed and "and 4 more" in listed
    assert "it has 5 channels, and in_chans=3" in listed
    assert call(datasets, {**alone, "in_chans": 5}, tmp_path / "five") == ""
    settings = {**MAE, "data_path": tmp_path / "five", "output_dir": tmp_path / "out"}
    assert "it has 5 channels, and --in_chans 3" in call(main_pretrain, settings)
    assert call(main_pretrain, {**settings, "in_chans": 5}) == ""


def test_a_class_above_those_of_the_masks_needs_nb_classes(tmp_path, call):
    for split, part in itertools.product(("train", "val"), ("images", "masks")):
        (tmp_path / split / part).mkdir(parents=True)
        for number in range(4):
            image = Image.new("L", (16, 16), 2 if part == "masks" else 50 * number)
            image.save(tmp_path / split / part / f"{number}.png")
    settings = {**RUN, "model": "vit_mini_patch4", "data_path": tmp_path, "output_dir": tmp_path / "out",
                "batch_size": 2, "head": "linear"}  # fmt: skip
    for wrong in ({"nb_classes": 2}, {"nb_classes": 2, "on_bad_image": "error", "batch_size": 4}):
        output = call(main_segment, {**settings, **wrong})
        assert "it has the value 2, and the 2 classes are 0 to 1" in output
        assert "correct --nb_classes" in output
    assert call(main_segment, {**settings, "nb_classes": 3}) == ""


def test_a_folder_of_torchvision_has_a_warning(tmp_path, call, capsys):
    root = tmp_path / "data"
    (root / "flowers-102/jpg").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(root / "flowers-102/jpg/1.jpg")
    assert call(datasets, {"num_workers": 0}, root) == ""
    assert "torchvision's dataset Flowers102" in capsys.readouterr().out
