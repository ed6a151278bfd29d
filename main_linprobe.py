"""Linear probing: a frozen encoder, and a linear classifier on its features.

Under a minute on a CPU (without --finetune the encoder is an untrained one):

    python demo/unpack_data.py
    python main_linprobe.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 --cache_features \\
        --data_path demo/data/fashion_mnist --blr 0.05 0.1 0.2 --epochs 20 --output_dir runs/probe

The published recipe on ImageNet, 8 GPUs of one machine (the effective batch is 16384):

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
    as_recorded,
    evaluate,
    extract_features,
    file_of,
    load_for_evaluation,
    load_frozen,
    tell,
    train_one_epoch,
)
from util import dist
from util.checkpoints import checkpoint, run_directory
from util.cli import options
from util.data import labels, loader, transforms
from util.data.sources import Source
from util.lars import LARS
from util.training import run_log, trainer
from util.training.precision import Precision

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """All flags, with the published defaults."""
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
    """Trains for `args.epochs` epochs, evaluating after each; or, with --eval, evaluates once."""
    precision = trainer.start(args)
    device = precision.device
    # A probe that is resumed finds its encoder in the checkpoint, but computes features before that is read.
    begun = args.finetune or (args.resume if args.resume != "auto" else "")
    file = file_of({**vars(args), "finetune": begun})
    if args.eval and file:
        args = as_recorded(args, file, models_build.classifier_settings(file.settings))
    setup = Setup(args, device, file)

    def features_of(source: Source, model: Any) -> tuple[Tensor, Tensor]:
        batches = setup.eval_batches(source, min(args.batch_size, 512))
        return extract_features(model, batches, normalize=setup.normalize, precision=precision)

    test = partial(evaluate_head, precision=precision)
    if args.eval and file:
        probe, val = load_for_evaluation(models_build.probe, vars(args), file, setup.open_val())
        tell(test(probe.get_submodule("head"), features_of(val, probe.to(device))), val.classes, args.report)
        return

    run_directory.prepare(Path(args.output_dir), args.resume)
    train, val = setup.open_pair()
    classes = train.classes
    several = len(args.blr) > 1
    if several and args.lr is not None:
        raise ValueError("--lr sets one rate; leave it out where --blr gives several")
    told = {"blr": args.blr if several else args.blr[0], "mean": setup.mean, "std": setup.std}
    settings = {**vars(args), **told, "nb_classes": len(classes), "classes": classes}
    model = models_build.probe(settings)
    load_frozen(model, file, args.adapt_input)
    model.to(device)
    heads, optimizer = make_heads(model, args.blr, args.weight_decay)
    held: tuple[Tensor, Tensor] | None = None
    if several:
        train, chooser = labels.hold_out(train, args.held_out, args.seed)
        held = features_of(chooser, model)
        model.head = models_build.ParallelHeads(heads)
    seen = features_of(val, model)

    if args.cache_features:
        batches: Any = loader.FeatureBatches(*features_of(train, model), args.batch_size, args.seed, args.accum_iter)
    else:
        batches = setup.train_batches(train, transforms.probe_transform(args.input_size))
    num_parameters, criterion = sum(p.numel() for p in heads[0].parameters()), HeadLosses(len(batches))

    def evaluate_epoch(epoch: int, log: run_log.NullLog) -> dict[str, Any]:
        """Of several heads, that which does best on the images held out is tested, and no other."""
        accuracies = [test(head, held).acc1 for head in heads] if held else [0.0]
        best = accuracies.index(max(accuracies))
        scores = test(heads[best], seen)
        chosen = report_chosen(args.blr, accuracies, criterion.means(), epoch + 1 == args.epochs) if held else {}
        tell(scores, classes, args.report)
        if held and dist.is_main():
            write_chosen(model, heads[best], {**settings, "blr": args.blr[best]}, epoch)
        return {**scores.stats(), **chosen, "n_parameters": num_parameters}

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
    """The model's head and, for more rates, copies of it; and the optimizer of them all, each at its rate."""
    head = model.get_submodule("head")
    heads = [head, *(copy.deepcopy(head) for _ in blrs[1:])]
    groups = [
        {"params": list(own.parameters()), "lr_scale": blr / max(blrs)} for own, blr in zip(heads, blrs, strict=True)
    ]
    return heads, LARS(groups, weight_decay=weight_decay)


def evaluate_head(head: nn.Module, features: tuple[Tensor, Tensor], precision: Precision) -> Evaluation:
    """Evaluates a head on this process's features (n, D) and labels (n,), and puts those of all processes together."""
    batches = [[*part, part[1]] for part in zip(*(column.split(4096) for column in features), strict=True)]
    return evaluate(head, batches, normalize=nn.Identity(), precision=precision)


def report_chosen(
    blrs: Sequence[float], accuracies: Sequence[float], losses: Sequence[float], is_last: bool
) -> dict[str, float]:
    """Logs the rate whose head does best on the held-out images; at the end warns if there may be better ones beyond.

    Returns:
        The entries of log.txt: the rate, and its head's own training loss.
    """
    best = accuracies.index(max(accuracies))
    loss = f", training loss {losses[best]:.4f}" if losses else ""
    logger.info(f"chosen of {len(blrs)} rates: --blr {blrs[best]:g}, held-out Acc@1 {accuracies[best]:.3f}{loss}")
    for end, which, others in ((max(blrs), "largest", "larger"), (min(blrs), "smallest", "smaller")):
        if is_last and blrs[best] == end:
            logger.warning(f"--blr {end:g}, the {which} of those given, was chosen: give {others} ones too")
    return {"chosen_blr": blrs[best], **({"train_loss": losses[best]} if losses else {})}


def write_chosen(model: nn.Module, head: nn.Module, settings: dict[str, Any], epoch: int) -> None:
    """Writes probe.pth: the model with one of its heads, under the published names."""
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    state = checkpoint.snapshot({"model": tensors, "epoch": epoch, "args": settings})
    checkpoint.write(state, Path(settings["output_dir"]) / "probe.pth")


class HeadLosses:
    """The criterion: cross-entropy of (B, classes), or of several heads (heads, B, classes).

    The gradient of several is that of their sum, so that no head's depends on the others; the value, which is logged,
    is their mean. Each head's own loss is kept for the end of the epoch.
    """

    def __init__(self, batches: int) -> None:
        self.kept = deque[Tensor](maxlen=batches)  # (heads,), of each batch of an epoch

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == 2:
            return F.cross_entropy(logits, targets)
        losses = torch.stack([F.cross_entropy(own, targets) for own in logits])
        self.kept.append(losses.detach())
        total = losses.sum()
        return total - total.detach() + losses.detach().mean()

    def means(self) -> list[float]:
        """Of each head, over the epoch's finite batches of all processes; nothing, if there were none.

        Of an epoch that was resumed in its middle, they are those of its rest.
        """
        if not self.kept:
            return []
        losses = torch.stack(list(self.kept))
        self.kept.clear()
        finite = losses.isfinite().all(dim=1)
        sums = torch.cat([losses[finite].sum(dim=0), finite.sum()[None].to(losses.dtype)])
        sums = dist.mean_over_processes(sums)
        return (sums[:-1] / sums[-1]).tolist()


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
