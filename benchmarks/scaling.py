"""Expected efficiency of pre-training on many GPUs, computed from the update of one GPU and the bytes of gradients.

    python benchmarks/scaling.py        # prints the tables of benchmarks/SCALING.md

No run on several GPUs was timed. SCALING.md explains the formulas and their sources.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_mae
from benchmarks import machine, model_table
from mae.evaluate.tables import markdown

NAMES = {"base_patch16": "ViT-B", "large_patch16": "ViT-L", "huge_patch14": "ViT-H"}
GPUS = (8, 64, 512)
LINKS = (25, 100, 400)  # GB/s of a node, in each direction: 200, 800 and 3,200 Gbit/s
NODE = 8  # GPUs
# NVIDIA's data sheets of H100 and H200 SXM: 1,979 TFLOP/s in bf16 with sparsity, half of it without; 900 GB/s of NVLink
# in both directions together.
PEAK = 989e12  # FLOP/s
NVLINK = 450e9  # bytes/s of a GPU in one direction
LATENCY = 5e-6  # seconds of a message: assumed
BUCKET = 25 * 2**20  # bytes: the default of DistributedDataParallel's bucket_cap_mb
# Batch size per GPU: the same, or the published effective batch size (He et al. 2021, A.1) divided by the GPUs.
RULES = {"256 images per GPU": dict.fromkeys(GPUS, 256), "effective batch size 4096": {n: 4096 // n for n in GPUS}}


def gradient_bytes(size: str) -> int:
    """Bytes of a model's gradients in fp32; computed on the meta device, without weights."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}")()
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def all_reduce(size: float, gpus: int, link: float) -> float:
    """Seconds of an all-reduce of `size` bytes on up to 8 GPUs, or on nodes of 8 with links of `link` bytes/s."""
    assert gpus <= NODE or gpus % NODE == 0, gpus
    inside, nodes = min(gpus, NODE), math.ceil(gpus / NODE)
    messages = 2 * (inside - 1) + 2 * math.ceil(math.log2(nodes))
    return (
        2 * (inside - 1) / inside * size / NVLINK
        + 2 * (nodes - 1) / nodes * size / link
        + math.ceil(size / BUCKET) * messages * LATENCY
    )


def efficiency(update: float, size: float, gpus: int, link: float) -> float:
    """Time of an update on one GPU divided by the expected time on many: 1 if the all-reduce takes no time."""
    last = min(size, BUCKET)
    exposed = max(0.0, all_reduce(size - last, gpus, link) - 2 / 3 * update) + all_reduce(last, gpus, link)
    return update / (update + exposed)


def tables(folder: Path) -> str:
    """The tables of SCALING.md in Markdown, for the models that were measured on a GPU.

    Args:
        folder: contains the files of train_step.py, in a folder per machine.
    """
    titles = ["", "trained parameters", "gradients", "GFLOP per image", "images/s of one GPU", "share of 989 TFLOP/s",
              "measured"]  # fmt: skip
    links = " · ".join(map(str, LINKS))
    header = ["", "GPUs", "images per GPU", "update on one GPU, ms", f"all-reduce, ms, at {links} GB/s",
              *(f"{link} GB/s" for link in LINKS)]  # fmt: skip
    models, expected = list[list[str]](), {rule: list[list[str]]() for rule in RULES}
    for size, name in NAMES.items():
        measured = machine.find(f"pretrain_{size}_bf16_cuda", folder)
        if not measured:
            continue
        rate, gradients = measured["images_per_second"]["ours compiled"], gradient_bytes(size)
        flops, batch = model_table.training_flops(size), measured["settings"]["batch_size"]
        models.append([
            name, f"{gradients / 4e6:.2f} M", f"{gradients / 1e9:.3f} GB", f"{flops / 1e9:.2f}", f"{rate:,.0f}",
            f"{rate * flops / PEAK:.0%}", f"{machine.title(measured)}, {batch} images",
        ])  # fmt: skip
        for rule, images in RULES.items():
            for gpus, count in images.items():
                times = " · ".join(f"{1000 * all_reduce(gradients, gpus, 1e9 * link):.1f}" for link in LINKS)
                shares = [f"{efficiency(count / rate, gradients, gpus, 1e9 * link):.0%}" for link in LINKS]
                expected[rule].append([name, str(gpus), str(count), f"{1000 * count / rate:.1f}", times, *shares])
    parts = ["One GPU:", markdown(titles, models)]
    for rule, rows in expected.items():
        parts += [f"Expected efficiency, {rule}:", markdown(header, rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(tables(machine.RESULTS))
