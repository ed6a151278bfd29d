"""Remedies work when typed: a wrong command, the remedy in its error message, and the corrected command."""

import re
import shutil
from pathlib import Path

import mains
import pytest
from mains import argv_of
from PIL import Image

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from mae.checkpoints import run_directory
from mae.cli import entry_point
from mae.recommend import check as datasets

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


def flags_of(remedy: str) -> list[str]:
    """Types the settings of a message by the rule of --help."""
    flags = []
    for name, value in re.findall(r"(\w+)=(\[.*?\]|[^\s,]+)", remedy):
        beside = "--cls_token" if name == "global_pool" else f"--no_{name}"
        words = value.strip("[]").split(", ")
        flags += {"true": [f"--{name}"], "false": [beside]}.get(value, [f"--{name}", *words])
    return flags


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
        "give model=vit_mini_patch4 patch_size=4"),
    "patch size": (main_knn, {**SMALL, "model": "vit_mini_patch4", "finetune": "mae", "k": 5}, {"patch_size": "8"},
                   "give patch_size=4"),
    "pooling": (main_finetune, {**VIT, "eval": True, "resume": "tuned"}, {"cls_token": True}, "give global_pool=true"),
    "channels": (main_finetune, {**VIT, "finetune": "mae"}, {"in_chans": 1, "adapt_input": "error"},
                 "give adapt_input=mean"),
    "another decoder": (
        main_pretrain, {**MAE, "init_from": "mae"}, {"decoder_depth": 2}, "give decoder_depth=1"),
    "resuming with other channels": (main_pretrain, {**MAE, "resume": "mae"}, {"in_chans": 1}, "give in_chans=3"),
    "resuming fine-tuning from pre-training": (
        main_finetune, VIT, {"resume": "mae"}, r"finetune=\S+pth instead of"),
    "resuming probing from pre-training": (
        main_linprobe, VIT, {"resume": "mae"}, r"finetune=\S+pth instead of"),
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
    assert call(script, {}, *argv_of(typed), *flags_of(remedy[0])) == ""


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
    assert run_directory.position(Path(output.split()[-1])) == run_directory.position(runs / "part/checkpoint-1.pth")


def test_a_folder_without_splits_needs_no_list_or_both(runs, labelled, tmp_path, call):
    """With a list of validation images only, these images would be training images, too."""
    lists = {split: tmp_path / f"{split}.txt" for split in ("train", "val")}
    for split, file in lists.items():
        names = sorted(labelled.glob(f"{split}/*/*"))
        file.write_text("".join(f"{name} {name.parent.name}\n" for name in names))
    shutil.copytree(labelled / "train", tmp_path / "flat")
    packed = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "flat")
    knn = {**SMALL, "model": "vit_mini_patch4", "k": 1}
    compare = {"input_size": 16, "encoders": "scratch", "num_workers": 0, "output_dir": tmp_path / "compare"}
    one = ", or give train_list=FILE"
    for path in (tmp_path / "flat", packed):
        assert call(main_knn, {**knn, "data_path": path}) == ""  # a part of the images is held out
        for script, settings in ((main_knn, knn), (main_compare, compare)):
            assert call(script, {**settings, "data_path": path, "val_list": lists["val"]}).endswith(one)
    given = {"data_path": tmp_path / "flat", "val_list": lists["val"]}
    assert call(main_knn, {**knn, **given, "train_list": lists["train"]}) == ""
    assert call(main_knn, {**knn, **given, "val_fraction": 0.2}) == ""  # the list is not used
    evaluation = {**VIT, "eval": True, "resume": runs / "tuned/checkpoint-0.pth"}
    assert call(main_finetune, {**evaluation, **given}) == ""  # the folder is not used


def test_a_folder_of_torchvision_has_a_warning(tmp_path, call, capsys):
    root = tmp_path / "data"
    (root / "flowers-102/jpg").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(root / "flowers-102/jpg/1.jpg")
    assert call(datasets, {"num_workers": 0}, root) == ""
    assert "torchvision's dataset Flowers102" in capsys.readouterr().out
