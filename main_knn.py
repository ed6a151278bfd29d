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

import models_build
import models_vit
from engine_finetune import Setup, load_frozen, with_recorded_settings
from util.cli import entry_point, options
from util.evaluation.knn import classify
from util.evaluation.tables import markdown
from util.training import trainer
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


def main(args: Namespace) -> dict[tuple[int, float], float]:
    """Logs and returns the accuracy in percent for every pair of k and temperature."""
    precision = trainer.start(args)
    device = precision.device
    file = loading.read(args.finetune) if args.finetune else None
    if file:
        args = with_recorded_settings(args, file, models_build.classifier_settings(file))
    setup = Setup(args, device, file)
    train, val = setup.open_pair()
    model = models_build.classifier({**vars(args), "nb_classes": 0})
    load_frozen(model, file, args.adapt_input)
    model.to(device)
    features_of = partial(setup.features_of, batch_size=args.batch_size, precision=precision)
    bank, queries = features_of(train, model), features_of(val, model)
    del model  # to free its memory
    correct = classify(
        *bank, *queries, ks=args.k, temperatures=args.temperature, num_classes=len(train.classes), device=device
    )
    accuracies = {pair: 100 * hits / len(val) for pair, hits in correct.items()}
    report(accuracies)
    return accuracies


def report(accuracies: Mapping[tuple[int, float], float]) -> None:
    """Logs accuracies by (k, temperature): a line for each k; for several temperatures, a table and its best entry."""
    ks, temperatures = (list(dict.fromkeys(values)) for values in zip(*accuracies, strict=True))
    if len(temperatures) == 1:
        for (k, _), accuracy in accuracies.items():
            logger.info(f"* {k}-NN Acc@1 {accuracy:.3f}")
        logger.info(json.dumps({f"knn_acc1_k{k}": accuracy for (k, _), accuracy in accuracies.items()}))
        return
    best = max(accuracies, key=lambda pair: accuracies[pair])
    cells = {
        pair: f"**{accuracy:.3f}**" if pair == best else f"{accuracy:.3f}" for pair, accuracy in accuracies.items()
    }
    titles = ["k", *(f"temperature {temperature:g}" for temperature in temperatures)]
    rows = [[str(k), *(cells[k, temperature] for temperature in temperatures)] for k in ks]
    logger.info("\n" + markdown(titles, rows))
    logger.info(
        f"* {best[0]}-NN Acc@1 {accuracies[best]:.3f} with temperature {best[1]:g}, the best of {len(accuracies)}; it "
        f"is optimistic, because the validation set selected it"
    )
    logger.info(json.dumps({f"knn_acc1_k{k}_t{t:g}": accuracy for (k, t), accuracy in accuracies.items()}))


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
