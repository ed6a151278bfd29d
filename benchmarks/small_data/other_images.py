"""Pre-training on about 1,000 images of other kinds: digits of 8 x 8 pixels, and photographs of 96 x 96 pixels.

    python benchmarks/small_data/other_images.py digits         # 15 minutes on two CPU cores
    python benchmarks/small_data/other_images.py photographs    # 30 minutes

Encoders are pre-trained without labels. main_compare.py then compares them with the same architecture
from scratch, and with raw pixels. DATASET.md and DATASET.csv are written beside this file: the accuracies, and the
command of every run. The same command resumes an interrupted study. The images and the encoders are in
runs/small_data/DATASET.

digits: the 1,797 images of scikit-learn, 1,000 of them for pre-training and 100 or all labels.
photographs: random squares of 16 photographs of scikit-image and scikit-learn, which are the classes. The training
images are from the left 60 % of a photograph, the test images from the rest.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.ablation import ROOT, Ablation, Run
from benchmarks.image_sets import SIDE, WORK, images_of

HERE = Path(__file__).parent


class Dataset(NamedTuple):
    """A dataset with the encoders and the flags of its study."""

    images: int
    shared: dict[str, Any]  # flags of main_pretrain.py
    encoders: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]  # flags of main_compare.py


EVALUATION = {"num_workers": 1, "crop_pct": 1, "protocols": ["linear", "finetune"], "draws": [3]}
SHARED = {"model": "mae_vit_mini_patch4", "batch_size": 64, "lr": 1e-3, "amp": "bf16", "num_workers": 1}
DIGITS = {"input_size": 8, "in_chans": 1, "mean": [0.306], "std": [0.377]}
DATASETS = {
    "digits": Dataset(
        1_000,
        {**SHARED, **DIGITS, "crop_scale": [0.8, 1], "hflip": 0},
        {"patch-2": {"patch_size": 2}, "patch-1": {"patch_size": 1},
         "patch-2-mask-0.5": {"patch_size": 2, "mask_ratio": 0.5}},
        {**EVALUATION, **DIGITS, "labels": [100, "all"], "budget": [100, 50]},
    ),
    "photographs": Dataset(
        960,
        {**SHARED, "input_size": SIDE},
        {"patch-12": {"patch_size": 12}, "patch-16": {"patch_size": 16},
         "patch-12-crop-0.6": {"patch_size": 12, "crop_scale": [0.6, 1]}},
        {**EVALUATION, "input_size": SIDE, "labels": [160, "all"], "budget": [60, 20]},
    ),
}  # fmt: skip
EPOCHS = 200


def study(name: str) -> Ablation:
    """Returns the study of a dataset."""
    dataset, work = DATASETS[name], WORK / name
    runs = {encoder: Run(dataset.images, EPOCHS, flags) for encoder, flags in dataset.encoders.items()}
    data, recipe = work / "images", f"finetune={(HERE / f'finetune_{name}.yaml').relative_to(ROOT)}"
    evaluation = {**dataset.evaluation, "data_path": data, "recipes": [recipe]}
    return Ablation(HERE, work, runs, dataset.shared, evaluation, data=data, baselines=["scratch", "pixels"])


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS, help="the images")
    return parser


def main() -> None:
    """Writes the images, pre-trains the encoders and compares them."""
    name = get_args_parser().parse_args().dataset
    os.chdir(ROOT)
    images_of(name)
    ablation = study(name)
    ablation.pretrain(list(ablation.runs))
    out = ablation.compare(list(ablation.runs), ablation.baselines)
    for file in ("table.md", "results.csv"):
        shutil.copyfile(out / file, HERE / f"{name}{Path(file).suffix}")


if __name__ == "__main__":
    main()
