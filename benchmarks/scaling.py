"""Expected efficiency of pre-training on many GPUs, computed from the update of one GPU and the bytes of gradients.

    python benchmarks/scaling.py        # prints the tables of benchmarks/SCALING.md, draws benchmarks/scaling.png

No run on several GPUs was timed. SCALING.md explains the formulas and their sources.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_mae
from benchmarks import machine, targets, train_step

PLOT = Path(__file__).parent / "scaling.png"
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
FIXED = 256  # batch size per GPU
IMAGES, VALIDATION = 1_281_167, 50_000  # ImageNet
ENTRY = 46  # bytes of the name and label of an image in the list that rank 0 sends
WORKERS = 10  # processes that decode images for each GPU: the default of --num_workers
SOCKET = 1e9  # bytes/s of a message between processes: assumed
DISK = 1e9  # bytes/s that one process writes: assumed
STORAGE = 10e9  # bytes/s that the file system writes: assumed
PUBLISHED = 4096  # effective batch size: He et al. 2021, appendix A.1


def gradient_bytes(size: str) -> int:
    """Bytes of a model's gradients in fp32; computed on the meta device, without weights."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}")()
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def speed(size: str, folder: Path) -> tuple[float, str]:
    """Images/s of one GPU, and the source of the number.

    Args:
        folder: contains the files of train_step.py, in a folder per machine.
    """
    results = machine.find(f"pretrain_{size}_bf16_cuda", folder)
    if results:
        source = f"measured: {results['machine']['gpu']}, {results['settings']['batch_size']} images"
        return results["images_per_second"]["ours compiled"], source
    share = targets.GPU[size]
    return share * PEAK / train_step.training_flops(size), "assumed, not measured"


def all_reduce(size: float, gpus: int, link: float) -> float:
    """Seconds of an all-reduce of the gradients.

    Args:
        size: bytes of one GPU's gradients.
        gpus: number of GPUs: up to 8 in one node, or a multiple of 8 in nodes of 8.
        link: bytes/s of a node's network in one direction.
    """
    assert gpus <= NODE or gpus % NODE == 0, gpus
    inside, nodes = min(gpus, NODE), math.ceil(gpus / NODE)
    messages = 2 * (inside - 1) + 2 * math.ceil(math.log2(nodes))
    return (
        2 * (inside - 1) / inside * size / NVLINK
        + 2 * (nodes - 1) / nodes * size / link
        + math.ceil(size / BUCKET) * messages * LATENCY
    )


def efficiency(update: float, size: float, gpus: int, link: float) -> float:
    """Time of an update on one GPU divided by the expected time on many: 1 if the all-reduce takes no time.

    Args:
        update: seconds of an update on one GPU.
        size: bytes of its gradients.
        gpus: as in `all_reduce`.
        link: as in `all_reduce`.
    """
    last = min(size, BUCKET)
    exposed = max(0.0, all_reduce(size - last, gpus, link) - 2 / 3 * update) + all_reduce(last, gpus, link)
    return update / (update + exposed)


def table_of_models(folder: Path) -> str:
    """The table of models in Markdown, from which the other tables are computed."""
    lines = [
        "| | trained parameters | gradients | GFLOP per image | images/s of one GPU | share of 989 TFLOP/s | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, name in NAMES.items():
        (rate, source), flops, gradients = speed(size, folder), train_step.training_flops(size), gradient_bytes(size)
        lines.append(
            f"| {name} | {gradients / 4e6:.2f} M | {gradients / 1e9:.3f} GB | {flops / 1e9:.2f} | {rate:,.0f} "
            f"| {rate * flops / PEAK:.0%} | {source} |"
        )
    return "\n".join(lines)


def table_of_efficiency(folder: Path, images: dict[int, int]) -> str:
    """The table of efficiencies in Markdown.

    Args:
        folder: as in `speed`.
        images: number of GPUs -> batch size per GPU.
    """
    links = " | ".join(f"{link} GB/s" for link in LINKS)
    lines = [
        f"| | GPUs | images per GPU | update on one GPU, ms | all-reduce, ms, at {' · '.join(map(str, LINKS))} GB/s "
        f"| {links} | source of the time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, name in NAMES.items():
        (rate, source), gradients = speed(size, folder), gradient_bytes(size)
        for gpus, count in images.items():
            update = count / rate
            times = " · ".join(f"{1000 * all_reduce(gradients, gpus, 1e9 * link):.1f}" for link in LINKS)
            shares = " | ".join(f"{efficiency(update, gradients, gpus, 1e9 * link):.0%}" for link in LINKS)
            lines.append(
                f"| {name} | {gpus} | {count} | {1000 * update:.1f} | {times} | {shares} | {source.partition(':')[0]} |"
            )
    return "\n".join(lines)


def opening(processes: int, listing: float) -> float:
    """Seconds until all processes have the list of ImageNet's training images, at `listing` seconds per image."""
    return IMAGES * (listing + 2 * math.ceil(math.log2(processes)) * ENTRY / SOCKET)


def evaluation(rate: float, processes: int) -> float:
    """Seconds of an evaluation of ImageNet's validation set, at `rate` images/s of a process."""
    return math.ceil(VALIDATION / processes) / rate


def checkpoint(size: float, processes: int) -> float:
    """Seconds to write a checkpoint of `size` bytes; with several processes, each writes a shard."""
    return size / min(processes * DISK, STORAGE)


def table_of_other_times(folder: Path) -> str:
    """The table of opening, evaluation and checkpoints in Markdown."""
    lines = [
        "| | processes | opening ImageNet, s | evaluation of 50,000 images, s | checkpoint | one process writes it, s "
        "| in shards, s | source of the speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pipeline, opened = machine.find("input_pipeline"), machine.find("listing")
    assert pipeline
    assert opened
    decoded = pipeline["one process"]["images_per_second"]["ours, --fast_jpeg"]
    listing = opened["results"]["folder"]["seconds"] / opened["settings"]["images"]
    for size, name in NAMES.items():
        (rate, source), state = speed(size, folder), 3 * gradient_bytes(size)
        forward = rate * train_step.training_flops(size) / train_step.classifier_flops(size)
        forward = min(forward, WORKERS * decoded)
        for count in (64, 512):
            times = opening(count, listing), evaluation(forward, count), checkpoint(state, 1), checkpoint(state, count)
            lines.append(
                f"| {name} | {count} | {times[0]:.1f} | {times[1]:.2f} | {state / 1e9:.2f} GB | {times[2]:.1f} "
                f"| {times[3]:.1f} | {source.partition(':')[0]} |"
            )
    return "\n".join(lines)


def tables(folder: Path) -> str:
    """All tables of SCALING.md."""
    return "\n\n".join(
        [
            "One GPU:",
            table_of_models(folder),
            f"Expected efficiency with {FIXED} images per GPU, so that the effective batch size grows with the GPUs:",
            table_of_efficiency(folder, dict.fromkeys(GPUS, FIXED)),
            f"Expected efficiency with the published effective batch size of {PUBLISHED}, divided among the GPUs:",
            table_of_efficiency(folder, {gpus: PUBLISHED // gpus for gpus in GPUS}),
            "Opening the dataset, evaluation (with decoding) and checkpoints:",
            table_of_other_times(folder),
        ]
    )


def draw(folder: Path, file: Path) -> None:
    """Draws the efficiency over the number of GPUs: a panel per model, a color per link, a line style per batch size.

    Args:
        folder: as in `speed`.
        file: the PNG to write.
    """
    counts = [NODE * 2**power for power in range(7)]
    rules = {
        f"{FIXED} images per GPU": ("-", [FIXED] * len(counts)),
        f"effective batch size {PUBLISHED}": ("--", [PUBLISHED // gpus for gpus in counts]),
    }
    figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (size, name) in zip(panels, NAMES.items(), strict=True):
        (rate, source), gradients = speed(size, folder), gradient_bytes(size)
        for link, color, width in zip(LINKS, ("tab:red", "tab:orange", "tab:blue"), (2.6, 2.6, 1.2), strict=True):
            for rule, (style, images) in rules.items():
                shares = [
                    100 * efficiency(count / rate, gradients, gpus, 1e9 * link)
                    for gpus, count in zip(counts, images, strict=True)
                ]
                label = f"{link} GB/s, {rule}"
                panel.plot(counts, shares, style, color=color, lw=width, marker="o", ms=width + 2, label=label)
        panel.set(xscale="log", xlabel="GPUs (8 per node)", ylim=(0, 105))
        panel.set_xticks(counts, map(str, counts), minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_title(f"{name}, one GPU: {rate:,.0f} images/s\n({source})", fontsize="medium")
    panels[0].set_ylabel("expected efficiency (% of the ideal speed)")
    lines, labels = panels[0].get_legend_handles_labels()
    title = "link of a node in each direction, and batch size"
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, title=title)
    figure.suptitle("Expected efficiency of pre-training on many GPUs (computed; no run on several GPUs was timed)")
    figure.savefig(file)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    get_args_parser().parse_args()
    print(tables(machine.RESULTS))
    draw(machine.RESULTS, PLOT)
