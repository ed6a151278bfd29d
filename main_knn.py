"""k-nearest-neighbor classification on the features of a frozen encoder, without training.

Under a minute on a CPU (without --finetune, the encoder is untrained):

    python demo/unpack_data.py
    python main_knn.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 \\
        --data_path demo/data/fashion_mnist

On ImageNet, 8 GPUs of one machine:

    torchrun --nproc_per_node 8 main_knn.py --model vit_base_patch16 --data_path IMAGENET --batch_size 256 \\
        --finetune mae_pretrain_vit_base
"""

import argparse
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from functools import partial

import numpy as np

import models_build
import models_vit
from engine_finetune import encode, load_frozen, with_recorded_settings
from models_vit import Encoder
from util.cli import entry_point, options
from util.cli.own_classes import with_encoder
from util.data.labels import balanced_accuracy
from util.data.run_data import RunData
from util.data.user_sets import OpenDataset, with_source
from util.evaluation.knn import classify
from util.evaluation.tables import markdown
from util.settings import DataSpec, ImageSpec, specs
from util.training import feature_files, trainer
from util.weights import loading

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Weighted k-nearest-neighbor classification on frozen features (Wu et al. 2018).")
    options.add_data_options(parser, labels=True)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_supervised_options(parser, global_pool=False)
    options.add_knn_options(parser)
    options.add_compute_options(parser)
    options.add_distributed_options(parser)
    return parser


def main(
    args: Namespace, source: OpenDataset | None = None, encoder: type[Encoder] | None = None
) -> dict[tuple[int, float], float]:
    """Logs and returns the accuracy in percent for every pair of k and temperature.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
    """
    args, encoder = with_encoder(with_source(args, source), encoder)
    args, precision = trainer.start(args)
    device = precision.device
    file = loading.read(args.finetune) if args.finetune else None
    args = with_recorded_settings(args, file, models_build.classifier_settings(file))
    data = RunData(ImageSpec.of(vars(args)), DataSpec.of(vars(args)), device, source)
    train, val = data.open_pair(args.nb_classes)
    model = models_build.classifier(*specs({**vars(args), "nb_classes": 0}), encoder)
    load_frozen(model, file, args.adapt_input)
    model.to(device)
    encode_set = partial(encode, data, model=model, batch_size=args.batch_size, precision=precision)
    bank, queries = feature_files.extract(encode_set, train), feature_files.extract(encode_set, val)
    del model, encode_set  # to free its memory
    classes = len(train.classes)
    right = classify(*bank, *queries, ks=args.k, temperatures=args.temperature, num_classes=classes, device=device)
    accuracies = {pair: 100 * sum(hits) / len(val) for pair, hits in right.items()}
    counts = np.bincount(val.labels, minlength=classes)
    report(accuracies, {pair: balanced_accuracy(np.array(hits), counts) for pair, hits in right.items()})
    return accuracies


def report(accuracies: Mapping[tuple[int, float], float], balanced: Mapping[tuple[int, float], float | None]) -> None:
    """Logs accuracies by (k, temperature): a line for each k; for several temperatures, a table and its best entry.

    Args:
        balanced: the balanced accuracies; None unless the classes are imbalanced.
    """
    ks, temperatures = (list(dict.fromkeys(values)) for values in zip(*accuracies, strict=True))
    means = {pair: value for pair, value in balanced.items() if value is not None}
    texts = {pair: f"{accuracy:.3f}" for pair, accuracy in accuracies.items()}
    texts |= {pair: f"{texts[pair]} balanced accuracy {value:.3f}" for pair, value in means.items()}
    names = {(k, t): f"k{k}" if len(temperatures) == 1 else f"k{k}_t{t:g}" for k, t in accuracies}
    if len(temperatures) == 1:
        for (k, _), text in texts.items():
            logger.info(f"* {k}-NN Acc@1 {text}")
    else:
        best = max(accuracies, key=lambda pair: accuracies[pair])
        cells = texts | {best: f"**{texts[best]}**"}
        titles = ["k", *(f"temperature {temperature:g}" for temperature in temperatures)]
        rows = [[str(k), *(cells[k, temperature] for temperature in temperatures)] for k in ks]
        logger.info("\n" + markdown(titles, rows))
        logger.info(
            f"* {best[0]}-NN Acc@1 {texts[best]} with temperature {best[1]:g}, the best of {len(accuracies)}; it "
            f"is optimistic, because the validation set selected it"
        )
    scores = {f"knn_acc1_{names[pair]}": accuracy for pair, accuracy in accuracies.items()}
    logger.info(json.dumps(scores | {f"knn_balanced_acc_{names[pair]}": value for pair, value in means.items()}))


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
