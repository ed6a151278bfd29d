"""Pre-training on few images: which settings matter, measured on subsets of Fashion-MNIST with two CPU cores.

    python demo/unpack_data.py
    python benchmarks/small_data/study.py                     # all; about three hours
    python benchmarks/small_data/study.py patch-7 mask-0.9    # these; the table has all so far

Each encoder is pre-trained without labels on 1,000 or 10,000 images. main_compare.py then
evaluates them, and the same architecture from scratch, with 500 labels: a linear probe and fine-tuning, three random
subsets each. table.md and results.json are written beside this file; an encoder that has a result there is left out.
The same command resumes an interrupted study. The encoders are in runs/small_data.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.ablation import DATA, PRETRAIN, Ablation, Run

BASE = {**PRETRAIN, "patch_size": 4, "amp": "bf16", "num_workers": 1}
EVALUATION = {
    "data_path": DATA, "input_size": 28, "in_chans": 1, "crop_pct": 1, "num_workers": 1,
    "protocols": ["linear", "finetune"], "labels": [500], "draws": [3], "budget": [30],
    "recipes": ["finetune=recipes/finetune_fashion_mnist_full.yaml"],
}  # fmt: skip
# Each row differs from "base", or from "1000-images", in one setting.
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "base": (10_000, 20, {}),
    "1000-images": (1_000, 200, {}),
    "epochs-5": (10_000, 5, {}),
    "epochs-80": (10_000, 80, {}),
    "mask-0.5": (10_000, 20, {"mask_ratio": 0.5}),
    "mask-0.9": (10_000, 20, {"mask_ratio": 0.9}),
    "patch-7": (10_000, 20, {"patch_size": 7}),
    "patch-2": (10_000, 20, {"patch_size": 2}),
    "crop-0.2": (10_000, 20, {"crop_scale": [0.2, 1]}),
    "no-crop": (10_000, 20, {"crop_scale": [1, 1]}),
    "lr-0.0003": (10_000, 20, {"lr": 3e-4}),
    "lr-0.003": (10_000, 20, {"lr": 3e-3}),
    "decoder-2": (10_000, 20, {"decoder_depth": 2}),
    "normalized-target": (10_000, 20, {"norm_pix_loss": True}),
    "1000-images-epochs-20": (1_000, 20, {}),
    "1000-images-epochs-1000": (1_000, 1_000, {}),
    "1000-images-mask-0.5": (1_000, 200, {"mask_ratio": 0.5}),
    "1000-images-crop-0.2": (1_000, 200, {"crop_scale": [0.2, 1]}),
}
STUDY = Ablation(
    Path(__file__).parent,
    Path("runs/small_data"),
    {name: Run(*settings) for name, settings in SETTINGS.items()},
    BASE,
    EVALUATION,
    baselines=["scratch"],
)


get_args_parser = partial(STUDY.get_args_parser, __doc__)

if __name__ == "__main__":
    STUDY.main(get_args_parser().parse_args())
