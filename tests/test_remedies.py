"""Remedies work when typed: a wrong command, the remedy in its error message, and the corrected command."""

import re

import pytest
from PIL import Image

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from inference import features
from util import datasets
from util.cli import entry_point

SMALL = {"input_size": 16, "batch_size": 8, "num_workers": 0, "device": "cpu"}
RUN = {**SMALL, "epochs": 1, "warmup_epochs": 0}
MAE, VIT = {**RUN, "model": "mae_vit_mini_patch4", "vis_every": 0}, {**RUN, "model": "vit_mini_patch4"}


def argv_of(settings: dict) -> list[str]:
    argv = []
    for flag, value in settings.items():
        argv += [f"--{flag}", *([] if value is True else str(value).split())]
    return argv


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
    for name, script, settings in (
        ("mae", main_pretrain, MAE),
        ("tuned", main_finetune, VIT),
        ("part", main_finetune, {**VIT, "unfreeze_blocks": 1, "epochs": 2}),
    ):
        settings = {**settings, "data_path": labelled, "output_dir": root / name}
        script.main(entry_point.parse(script.get_args_parser(), argv_of(settings)))
    return root


CASES = {  # script, right settings, wrong ones, and what the error advises
    "another encoder": (
        main_finetune, {**VIT, "finetune": "mae"}, {"model": "vit_tiny_patch16"},
        r"give (--model vit_mini_patch4 --patch_size 4)$"),
    "patch size": (main_knn, {**SMALL, "model": "vit_mini_patch4", "finetune": "mae", "k": 5}, {"patch_size": "8"},
                   r"give (--patch_size 4)$"),
    "pooling": (main_finetune, {**VIT, "eval": True, "resume": "tuned"}, {"cls_token": True}, r"give (--global_pool)$"),
    "channels": (main_finetune, {**VIT, "finetune": "mae"}, {"in_chans": 1, "adapt_input": "error"},
                 r"choose (--adapt_input mean) \("),
    "another decoder": (
        main_pretrain, {**MAE, "init_from": "mae"}, {"decoder_depth": 2}, r"give (--decoder_depth 1)$"),
    "resuming with other channels": (main_pretrain, {**MAE, "resume": "mae"}, {"in_chans": 1}, r"give (--in_chans 3)$"),
    "resuming fine-tuning from pre-training": (
        main_finetune, VIT, {"resume": "mae"}, r": (--finetune .*pth) instead of --resume starts from its weights$"),
    "resuming probing from pre-training": (
        main_linprobe, VIT, {"resume": "mae"}, r": (--finetune .*pth) instead of --resume starts from its weights$"),
    "resuming other blocks": (
        main_finetune, {**VIT, "resume": "part", "epochs": 2}, {"unfreeze_blocks": 2}, r"give (--unfreeze_blocks 1)$"),
    "resuming another batch size": (
        main_pretrain, {**MAE, "resume": "mae"}, {"batch_size": 4}, r"give (--batch_size 4 --accum_iter 2)\b"),
}  # fmt: skip


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
    for split in ("train", "val"):
        for kind in range(2):
            folder = tmp_path / "data" / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for number in range(16):
                Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "data/train/kind1/bad.png").write_bytes(b"")
    data = {"data_path": tmp_path / "data"}
    settings = {**MAE, **data, "output_dir": tmp_path / "out"}
    output = call(main_pretrain, settings)
    assert "bad.png: the file is empty (--on_bad_image skip excludes such images from training)" in output
    assert call(main_pretrain, {**settings, "on_bad_image": "skip", "output_dir": tmp_path / "skip"}) == ""
    output = call(main_knn, {**SMALL, **data, "model": "vit_mini_patch4"})
    assert output.endswith("bad.png: the file is empty")
    output = call(datasets, {"num_workers": 0}, tmp_path / "data")
    assert "main_pretrain.py --on_bad_image skip excludes them" in output


def test_misspelled_names_are_corrected(labelled, tmp_path, call):
    settings = {**MAE, "data_path": labelled, "output_dir": tmp_path / "out"}
    for wrong, right in (("cifar10", "CIFAR10"), ("CIFAR11", "CIFAR10"), ("Flower102", "Flowers102")):
        assert call(main_pretrain, {**settings, "dataset": wrong}).endswith(f"of this name; did you mean {right}?")


def test_the_remedy_for_a_missing_split_works(runs, pictures, tmp_path, call):
    settings = {**VIT, "data_path": pictures, "output_dir": tmp_path / "out"}
    assert call(main_finetune, settings).endswith("no folder val/ in it: add this folder, or give --val_list FILE")
    names = "".join(f"{path} {path.parent.name}\n" for path in sorted(pictures.glob("train/*/*")))
    (tmp_path / "val.txt").write_text(names)
    assert call(main_finetune, {**settings, "val_list": tmp_path / "val.txt"}) == ""
    command = {"model": runs / "mae/checkpoint-0.pth", "out": tmp_path / "f.npz", "split": "val"}
    assert call(features, command, pictures).endswith("no folder val/ in it")  # which has no lists
