"""Pixio's changes to masked autoencoders at a small scale: mask blocks, class tokens, decoder depth; two CPU cores.

    python demo/unpack_data.py
    python benchmarks/mask_blocks/study.py               # all; about three hours
    python benchmarks/mask_blocks/study.py block-1-tokens-1-depth-1-seed-0 block-4-tokens-1-depth-1-seed-0

Encoders are pre-trained on 10,000 images of 32 x 32 pixels with patches of 4 pixels (--mask_block 4 masks quarters of
an image), two encoders at a time, with two seeds. They are evaluated with a linear and an attentive probe with 500
labels (three random subsets each), and with a linear head for the segmentation of garments. table.md and results.json
are written beside this file; an encoder that has a result there is left out. The same command resumes an interrupted
study. The encoders are in runs/mask_blocks.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.ablation import DATA, PRETRAIN, ROOT, Ablation, Run
from demo.segmentation import RECIPE, write_pictures

WORK = Path("runs/mask_blocks")
PICTURES = WORK / "pictures"
SIZE = {"input_size": 32, "patch_size": 4}
BASE = {**PRETRAIN, **SIZE, "amp": "bf16", "num_workers": 1}
EVALUATION = {
    "data_path": DATA, "input_size": 32, "in_chans": 1, "crop_pct": 1, "num_workers": 1,
    "protocols": ["linear", "attentive"], "labels": [500], "draws": [3], "jobs": 2,
}  # fmt: skip
SEGMENTATION = {"config": RECIPE.relative_to(ROOT), **SIZE, "data_path": PICTURES, "palette": PICTURES / "palette.txt"}
STUDY = Ablation(
    Path(__file__).parent,
    WORK,
    {
        f"block-{block}-tokens-{tokens}-depth-{depth}-seed-{seed}": Run(
            f"mask block {block}, {tokens} class token{'s' * (tokens > 1)}, decoder depth {depth}", 10_000, 20,
            {"mask_block": block, "num_cls_tokens": tokens, "decoder_depth": depth, "seed": seed},
        )
        for seed, block, tokens, depth in product((0, 1), (1, 2, 4), (1, 4), (1, 4))
    },
    BASE,
    EVALUATION,
    SEGMENTATION,
)  # fmt: skip


get_args_parser = partial(STUDY.get_args_parser, __doc__)

if __name__ == "__main__":
    args = get_args_parser().parse_args()
    write_pictures(ROOT / PICTURES, 2_000)
    STUDY.main(args)
