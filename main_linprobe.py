"""Linear probing: trains a linear classifier on the features of a frozen encoder.

Under a minute on a CPU (without --finetune, the encoder is untrained):

    python demo/unpack_data.py
    python main_linprobe.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 --cache_features \\
        --data_path demo/data/fashion_mnist --blr 0.05 0.1 0.2 --epochs 20 --output_dir runs/probe

The published recipe on ImageNet, 8 GPUs of one machine (effective batch size 16384):

    torchrun --nproc_per_node 8 main_linprobe.py --config recipes/linprobe_vit_base.yaml --data_path IMAGENET \\
        --batch_size 512 --accum_iter 4 --finetune mae_pretrain_vit_base --output_dir runs/base_probed
"""

import argparse
import copy
import logging
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from util.cli import entry_point  # first, as it names the packages that are missing

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models_build
import models_vit
from engine_finetune import (
    Evaluation,
    Setup,
    evaluate,
    load_for_evaluation,
    load_frozen,
    open_weights,
    report_scores,
    train_one_epoch,
    with_recorded_settings,
)
from util import dist
from util.checkpoints import checkpoint, run_directory
from util.cli import options
from util.data import labels, loader, transforms
from util.lars import LARS
from util.training import run_log, trainer
from util.training.precision import Precision

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the script, with the published defaults."""
    parser = entry_point.parser("Linear probing of a Vision Transformer (He et al. 2021, appendix A.1).")
    options.add_data_options(parser)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_supervised_options(parser, global_pool=False)
    options.add_optimizer_options(parser, several_blr=True)
    options.add_evaluation_options(parser)
    options.add_probe_options(parser)
    options.add_run_options(parser)
    options.add_distributed_options(parser)
    parser.set_defaults(batch_size=512, epochs=90, weight_decay=0.0, warmup_epochs=10, save_every=1)
    return parser


def main(args: Namespace) -> None:
    """Trains for `args.epochs` epochs and evaluates every `--eval_every` epochs. With --eval, it evaluates once."""
    precision = trainer.start(args)
    device = precision.device
    # A resumed probe loads its encoder from the checkpoint, but it computes features before that.
    encoder = args.finetune or (args.resume if args.resume != "auto" else "")
    file = open_weights({**vars(args), "finetune": encoder})
    if args.eval and file:
        args = with_recorded_settings(args, file, models_build.classifier_settings(file))
    setup = Setup(args, device, file)
    features_of = partial(setup.features_of, batch_size=min(args.batch_size, 512), precision=precision)
    test = partial(evaluate_head, precision=precision)
    if args.eval and file:
        probe, val = load_for_evaluation(models_build.probe, vars(args), file, setup.open_val())
        report_scores(test(probe.get_submodule("head"), features_of(val, probe.to(device))), val.classes, args.report)
        return

    run_directory.prepare(Path(args.output_dir), args.resume)
    train, val = setup.open_pair()
    classes = train.classes
    several = len(args.blr) > 1
    if several and args.lr is not None:
        raise ValueError(f"--lr {args.lr:g} sets a single rate, and --blr has {len(args.blr)} values; omit --lr")
    blr = args.blr if several else args.blr[0]
    statistics = {"mean": setup.mean, "std": setup.std}
    settings = {**vars(args), **statistics, "blr": blr, "nb_classes": len(classes), "classes": classes}
    model = models_build.probe(settings)
    load_frozen(model, file, args.adapt_input)
    model.to(device)
    heads, optimizer = make_heads(model, args.blr, args.weight_decay)
    held_out: tuple[Tensor, Tensor] | None = None
    if several:
        train, held_out_set = labels.hold_out(train, args.held_out, args.seed)
        held_out = features_of(held_out_set, model)
        model.head = models_build.ParallelHeads(heads)
    val_features = features_of(val, model)

    if args.cache_features:
        batches: Any = loader.FeatureBatches(*features_of(train, model), args.batch_size, args.seed, args.accum_iter)
    else:
        batches = setup.train_batches(train, transforms.probe_transform(args.input_size))
    num_parameters, criterion = sum(p.numel() for p in heads[0].parameters()), HeadLosses(len(batches))

    def evaluate_epoch(epoch: int, log: run_log.NullLog) -> dict[str, Any]:
        """Evaluates the head with the best accuracy on the held-out images."""
        accuracies = [test(head, held_out).acc1 for head in heads] if held_out else [0.0]
        best = accuracies.index(max(accuracies))
        scores = test(heads[best], val_features)
        is_last = epoch + 1 == args.epochs
        best_rate = report_best_rate(args.blr, accuracies, criterion.means(), is_last) if held_out else {}
        report_scores(scores, classes, args.report)
        if held_out and dist.is_main():
            write_probe(model, heads[best], {**settings, "blr": args.blr[best]}, epoch)
        return {**scores.stats(), **best_rate, "n_parameters": num_parameters}

    trainer.run(
        model,
        optimizer,
        batches,
        precision,
        settings,
        train_one_epoch=partial(
            train_one_epoch, criterion=criterion, normalize=nn.Identity() if args.cache_features else setup.normalize
        ),
        after_epoch=evaluate_epoch,
        loss_tag="loss",
        trained=model.head if args.cache_features else None,
    )


def make_heads(model: nn.Module, blrs: Sequence[float], weight_decay: float) -> tuple[list[nn.Module], LARS]:
    """Returns a copy of the head for each learning rate, and the optimizer of all heads."""
    head = model.get_submodule("head")
    heads = [head, *(copy.deepcopy(head) for _ in blrs[1:])]
    groups = [
        {"params": list(own.parameters()), "lr_scale": blr / max(blrs)} for own, blr in zip(heads, blrs, strict=True)
    ]
    return heads, LARS(groups, weight_decay=weight_decay)


def evaluate_head(head: nn.Module, features: tuple[Tensor, Tensor], precision: Precision) -> Evaluation:
    """Evaluates a head on features (n, D) and labels (n,) of this process, and gathers the predictions of all."""
    batches = [[*part, part[1]] for part in zip(*(column.split(4096) for column in features), strict=True)]
    return evaluate(head, batches, normalize=nn.Identity(), precision=precision)


def report_best_rate(
    blrs: Sequence[float], accuracies: Sequence[float], losses: Sequence[float], is_last: bool
) -> dict[str, float]:
    """Logs the rate with the best held-out accuracy, and in the last epoch a warning if it is the largest or smallest.

    Returns:
        The entries of log.txt: the rate, and the training loss of its head.
    """
    best = accuracies.index(max(accuracies))
    loss = f", training loss {losses[best]:.4f}" if losses else ""
    logger.info(f"best of {len(blrs)} rates: --blr {blrs[best]:g}, held-out Acc@1 {accuracies[best]:.3f}{loss}")
    for end, which, others in ((max(blrs), "largest", "larger"), (min(blrs), "smallest", "smaller")):
        if is_last and blrs[best] == end:
            logger.warning(f"--blr {end:g}, the {which} value, is the best; add {others} values")
    return {"chosen_blr": blrs[best], **({"train_loss": losses[best]} if losses else {})}


def write_probe(model: nn.Module, head: nn.Module, settings: dict[str, Any], epoch: int) -> None:
    """Writes probe.pth: the model with one of its heads, under the published names."""
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    state = checkpoint.snapshot({"model": tensors, "epoch": epoch, "args": settings})
    checkpoint.write(state, Path(settings["output_dir"]) / "probe.pth")


class HeadLosses:
    """The criterion: cross-entropy of (B, classes), or of several heads (heads, B, classes).

    The gradient of several heads is that of the sum of their losses, so that each head trains independently. The value
    is the mean. The loss of each head is stored until the end of the epoch.
    """

    def __init__(self, batches: int) -> None:
        self.losses = deque[Tensor](maxlen=batches)  # (heads,), of each batch of an epoch

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == 2:
            return F.cross_entropy(logits, targets)
        losses = torch.stack([F.cross_entropy(own, targets) for own in logits])
        self.losses.append(losses.detach())
        total = losses.sum()
        return total - total.detach() + losses.detach().mean()

    def means(self) -> list[float]:
        """Returns the mean loss of each head over the finite batches of all processes; [] without batches.

        After resuming within an epoch, the mean is over the rest of the epoch.
        """
        if not self.losses:
            return []
        losses = torch.stack(list(self.losses))
        self.losses.clear()
        finite = losses.isfinite().all(dim=1)
        sums = torch.cat([losses[finite].sum(dim=0), finite.sum()[None].to(losses.dtype)])
        sums = dist.mean_over_processes(sums)
        return (sums[:-1] / sums[-1]).tolist()


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
