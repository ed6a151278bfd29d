"""Training and evaluation on fake CUDA tensors: their kernels, and what slows a GPU down.

    python tests/cuda_cases.py --sizes base_patch16    # a table of the kernels, and what is wrong
    python tests/cuda_cases.py --write                 # records the kernels of vit_mini for this version of PyTorch

A case builds a model and two batches, and returns the function that trains or evaluates it on them.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from fake_cuda import DEVICE, PRODUCTS, Record, fake_cuda, on_gpu
from test_cuda import Batches
from test_loop import train_epoch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import engine_finetune
import engine_linprobe
import engine_pretrain
import engine_segment
import mae.build
import mae.probes
import models_mae
import models_vit
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.interrupts import Interrupts
from mae.training import optimizers
from mae.training.optimizers import param_groups_lrd, param_groups_weight_decay
from mae.training.precision import Precision
from mae.training.saver import NullSaver
from models_segment import Segmenter

RECORDED = Path(__file__).with_name("cuda_kernels.json")  # version of PyTorch -> run -> kernels
RECORDED_SIZE = "mini_patch4"
CLASSES, BATCH = 10, 8
Run = Callable[[], Any]


def normalize() -> nn.Module:
    return Normalize([0.5] * 3, [0.25] * 3).to(DEVICE)


def batches(size: str, count: int = 2, dtype: torch.dtype = torch.uint8, valid: bool = False) -> Batches:
    entry = models_vit.SIZES[size]
    side = entry.get("img_size", 224)
    images = torch.empty(BATCH, side, side, 3, dtype=dtype).permute(0, 3, 1, 2)
    pixels = torch.empty(BATCH, side, side, dtype=torch.bool) if valid else None
    noise = torch.empty(BATCH, (side // entry["patch_size"]) ** 2)
    labels = torch.empty(BATCH, dtype=torch.int64)
    return Batches(Batch(images, labels, pixels, noise=noise) for _ in range(count))


class Saver(NullSaver):
    """Every number that is read is 1, also the requests to stop."""

    def stop(self) -> None:
        pass


def pretrain(
    size: str, precision: Precision, *, checkpointing: bool = False, valid: bool = False, accum_iter: int = 1
) -> Run:
    model = on_gpu(partial(getattr(models_mae, f"mae_vit_{size}"), norm_pix_loss=True))
    if checkpointing:
        mae.build.set_grad_checkpointing(model)
    groups = param_groups_weight_decay(model, 0.05)
    data = batches(size, dtype=torch.float32 if valid else torch.uint8, valid=valid)
    return partial(
        train_epoch, partial(engine_pretrain.loss, mask_ratio=0.75, normalize=normalize()), model, data,
        optimizers.build(None, None, model, groups, betas=(0.9, 0.95)), precision=precision, accum_iter=accum_iter,
        saver=Saver(Interrupts()),
    )  # fmt: skip


def supervised(
    model: Any, data: Batches, optimizer: Any, precision: Precision, criterion: Any, erase: Any = None,
    mixup: Any = None, **changed: Any,
) -> Run:  # fmt: skip
    loss = partial(engine_finetune.loss, criterion=criterion, normalize=normalize(), erase=erase, mixup=mixup)
    return partial(train_epoch, loss, model, data, optimizer, precision=precision, saver=Saver(Interrupts()), **changed)


def adamw(model: Any) -> torch.optim.Optimizer:
    return optimizers.build(None, None, model, param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.65))


def classifier(size: str) -> Any:
    return on_gpu(
        partial(getattr(models_vit, f"vit_{size}"), num_classes=CLASSES, global_pool=True, drop_path_rate=0.1)
    )


def finetune(size: str, precision: Precision) -> Run:
    model = classifier(size)
    return supervised(
        model, batches(size), adamw(model), precision, SoftTargetCrossEntropy(), clip_grad=1.0,
        mixup=Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES),
        erase=RandomErasing(0.25, mode="pixel", device=str(DEVICE)),
    )  # fmt: skip


def probe(size: str, precision: Precision, *, blrs: tuple[float, ...] = (0.1,), attentive: bool = False) -> Run:
    def build() -> nn.Module:
        model = getattr(models_vit, f"vit_{size}")(num_classes=0)
        head = partial(mae.probes.attentive_head, num_queries=32) if attentive else mae.probes.probe_head
        model.head, model.head_pools = head(model.embed_dim, CLASSES), attentive
        return model

    model: Any = on_gpu(build)
    model.freeze()
    heads, optimizer = engine_linprobe.make_heads(model, blrs, 0.0)
    criterion = engine_linprobe.HeadLosses()
    if len(heads) == 1:
        return supervised(model, batches(size), optimizer, precision, criterion)
    model.head = mae.probes.ParallelHeads(heads)
    return supervised(model, batches(size), optimizer, precision, criterion, callbacks=[criterion])


def segmenter(size: str, head: str) -> Any:
    return on_gpu(partial(Segmenter, CLASSES, head, **models_vit.SIZES[size]))


def segment(size: str, precision: Precision, *, head: str) -> Run:
    model, data = segmenter(size, head), batches(size)
    side = data[0].images.shape[-1]
    data = Batches(batch._replace(labels=torch.empty(BATCH, side, side, dtype=torch.uint8)) for batch in data)
    return supervised(model, data, adamw(model), precision, engine_segment.pixel_loss)


def evaluate(size: str, precision: Precision) -> Run:
    return partial(
        engine_finetune.evaluate_model, classifier(size), batches(size), normalize=normalize(), precision=precision
    )


def evaluate_segmentation(size: str, precision: Precision) -> Run:
    model = segmenter(size, "linear")
    side = batches(size)[0].images.shape[-1]
    image = torch.empty(1, 3, side + 20, side, dtype=torch.uint8)
    mask = torch.empty(1, side + 60, side + 40, dtype=torch.uint8)
    return partial(
        engine_segment.evaluate, model, [Batch(image, mask)] * 2, normalize=normalize(),
        precision=precision, num_classes=CLASSES, window=(side, side), batch_size=BATCH,
    )  # fmt: skip


CASES: dict[str, Callable[[str, Precision], Run]] = {
    "pre-training": pretrain,
    "pre-training, checkpointing": partial(pretrain, checkpointing=True),
    "pre-training, accumulation": partial(pretrain, accum_iter=2),
    "pre-training, valid pixels": partial(pretrain, valid=True),
    "fine-tuning, mixup, erasing, clipping": finetune,
    "linear probe": probe,
    "linear probe, three rates": partial(probe, blrs=(0.1, 0.2, 0.3)),
    "attentive probe": partial(probe, attentive=True),
    "segmentation, linear": partial(segment, head="linear"),
    "segmentation, DPT": partial(segment, head="dpt"),
    "evaluation": evaluate,
    "evaluation of segmentation": evaluate_segmentation,
}


RUNS = [(name, "bf16") for name in CASES]
# The loss scaler with each optimizer: with clipping, fused, and LARS.
RUNS += [(name, "fp16") for name in ("pre-training", "fine-tuning, mixup, erasing, clipping", "linear probe")]
# How often the host may wait for the GPU, for any number of batches.
WAITS = {
    "pre-training, valid pixels": 2,  # as others, and for the range of the first batch of float images
    "evaluation": 4,  # the predictions are copied after the last batch, in four parts
    "evaluation of segmentation": 1,  # the confusion matrix is copied after the last image
}
WAITS_OF_TRAINING = 1  # at the end of an epoch, for its last update


def record(name: str, amp: str, size: str = RECORDED_SIZE) -> Record:
    """Runs a case."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # of mixup and erasing
        seed(0)
    with fake_cuda() as found:
        run = CASES[name](size, Precision(amp, DEVICE))
        with found:
            run()
    return found


def problems(name: str, found: Record) -> list[str]:
    """Returns the findings in a case, [] if the host waits as often as it may, and there is nothing else."""
    kinds = Counter(finding.kind for finding in found.findings.elements())
    if not kinds - Counter({"wait": WAITS.get(name, WAITS_OF_TRAINING)}):
        return []
    return [f"{count} x {finding}" for finding, count in found.findings.items()]


def version() -> str:
    """Returns the version of PyTorch, such as "2.11"."""
    return ".".join(torch.__version__.split(".")[:2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[RECORDED_SIZE], choices=models_vit.SIZES)
    parser.add_argument("--write", action="store_true", help="of vit_mini_patch4 only")
    args = parser.parse_args()
    counts, has_problems = dict[str, int](), False
    for size in args.sizes:
        print(f"\n{f'vit_{size}, two batches':<44} kernels  products  casts and copies")
        for name, amp in RUNS:
            found, title = record(name, amp, size), f"{name}, {amp}"
            kernels, wrong = found.kernels, problems(name, found)
            products = sum(kernels[product] for product in PRODUCTS)
            copies = kernels["_to_copy"] + kernels["copy_"]
            print(f"{title:<44} {kernels.total():>7} {products:>9} {copies:>17}", flush=True)
            print("".join(f"    {line}\n" for line in wrong), end="")
            has_problems |= bool(wrong)
            if size == RECORDED_SIZE:
                counts[title] = kernels.total()
    if args.write:
        recorded = json.loads(RECORDED.read_text()) | {version(): counts}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        print(f"wrote {RECORDED.relative_to(ROOT)}")
    return int(has_problems)


if __name__ == "__main__":
    sys.exit(main())
