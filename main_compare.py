"""Comparison of encoders: which one is worth most on this data, and how many labels does it need?

Under ten minutes on two CPU cores:

    python demo/unpack_data.py
    python main_compare.py --data_path demo/data/fashion_mnist --input_size 28 --in_chans 1 \\
        --encoders scratch pixels mine=demo/output/pretrained.pth --labels 100 1000 --draws 2 \\
        --recipes finetune=recipes/finetune_fashion_mnist.yaml --budget 30 --output_dir runs/compare

Released weights on your own images, on one GPU:

    python main_compare.py --data_path IMAGES --encoders scratch mae_pretrain_vit_base timm:vit_small_patch16_dinov3 \\
        --labels 500 5000 all --draws 3 --budget 50 --output_dir runs/compare

k-NN and linear probes are fitted on the features of a frozen encoder, and baselines on pixels, for each draw of the
labels: its labels choose the hyperparameters by cross-validation, and the default stands unless another value is better
by more than the standard error. Trainings are runs of main_linprobe.py or main_finetune.py, in this process; a held-out
fifth of a draw chooses among several rates.

The same command resumes an interrupted comparison and skips the runs that are complete. Started several times at once,
with the same --output_dir, it shares the runs: one command for each GPU, or for each CPU core with OMP_NUM_THREADS=1.
"""

from argparse import ArgumentParser, Namespace

import main_finetune
import main_knn
import main_linprobe
import models_vit
from mae import session
from mae.cli import entry_point, options
from mae.cli.script import Script
from mae.compare.comparison import compare
from mae.data.source import OpenDataset
from mae.settings import Run
from mae.settings.types import positive_int
from mae.user_code import DATASET

SCRIPTS = {
    "knn": Script(main_knn, "encode"), "linear": Script(main_knn, "encode"), "attentive": Script(main_linprobe),
    "lora": Script(main_finetune), "finetune": Script(main_finetune),
}  # fmt: skip


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Compares encoders on a dataset: protocols x numbers of labels x random subsets.")
    options.add_data_options(parser, labels=True)
    options.add(parser, "val_list", "crop_pct")
    rank = "rank of the low-rank updates of the protocol lora (default: that of its recipe, else 8)"
    options.add_model_options(parser, models_vit.MODELS, default="vit_base_patch16", type=positive_int, help=rank)
    options.add_comparison_options(parser, SCRIPTS)
    options.add_metric_options(parser, selects="the rates of trainings, and is compared")
    parser.set_defaults(protocols=["knn", "linear", "finetune"])
    return parser


def main(args: Namespace | Run, source: OpenDataset | None = None) -> str:
    """Runs the scripts that have no result yet. Prints, writes and returns the table and the conclusion.

    Args:
        source: function(split, data_path) that returns a dataset. The scripts import it by its name.

    Raises:
        ValueError: the function has no name by which the scripts can import it.
    """
    run = session.settings_of(get_args_parser(), args, source)
    name = run.data.dataset or ""
    if source and ("<" in name or name.startswith(f"{DATASET}__main__:")):
        raise ValueError(f"source= ({name}): the scripts of a comparison import it: define it in a module")
    return compare(run, SCRIPTS)


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
