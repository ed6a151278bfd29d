"""main_pretrain.py with its data: the throughput, and the loss in bf16 compared with the loss in fp32.

    python benchmarks/whole_run.py --device cuda --batch_size 256                                       # ViT-B
    python benchmarks/whole_run.py --device cuda --batch_size 128 --size huge_patch14
    python benchmarks/whole_run.py --size mini_patch4 --batch_size 8 --images 320 --updates 40          # on a CPU

The dataset has JPEG files of 500 x 375 pixels, crops of photographs, in the page cache. The throughput includes
decoding, augmentation, the copy to the device and the update. benchmarks/train_step.py measures the throughput without
data loading, at the same batch size. The losses are those of two runs with the same weights, images and masks; each
point is the mean of four updates.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, peers, scripts
from benchmarks.input_pipeline import PHOTOGRAPHS, write_photographs
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.parallel import choose_device

FILES = 1280  # different files; the others are links to them
UPDATES_PER_POINT = 4


def write_files(folder: Path, count: int, names: Sequence[str] = PHOTOGRAPHS) -> None:
    """Writes `count` JPEG files to a class folder, crops of the photographs of these names."""
    write_photographs(folder, min(count, FILES), names)
    files = sorted((folder / "train" / "photograph").iterdir())
    for number in range(len(files), count):
        (files[0].parent / f"link{number:07}.jpg").symlink_to(files[number % len(files)])


def speed(args: argparse.Namespace, folder: Path, flags: list[object]) -> dict[str, float]:
    """Images/s of the second epoch of a run, and of updates without data loading."""
    epochs = scripts.pretrain(folder, folder / "speed", *flags, "--amp", args.amp, "--compile", "--epochs", 2)
    scripts.run(
        "benchmarks/train_step.py", "--size", args.size, "--batch_size", args.batch_size, "--device", args.device,
        "--amp", args.amp, "--only", "ours compiled", "--out", folder, "--name", "step",
    )  # fmt: skip
    step = machine.read("step", folder)
    assert step is not None
    alone = step["images_per_second"]["ours compiled"]
    rate = epochs[1]["images_per_s"]
    return {"with_data": rate, "without_data": alone, "share": rate / alone, "data_wait": epochs[1]["data_wait"]}


def losses(args: argparse.Namespace, folder: Path, flags: list[object]) -> dict[str, list[float]]:
    """Mean losses over UPDATES_PER_POINT updates each, in both precisions."""
    few = folder / "few"
    write_files(few, UPDATES_PER_POINT * args.batch_size)
    epochs = math.ceil(args.updates / UPDATES_PER_POINT)
    return {
        amp: [
            line["train_loss"]
            for line in scripts.pretrain(
                few, folder / amp, *flags, "--amp", amp, "--epochs", epochs, "--save_every", epochs
            )
        ]
        for amp in ("off", args.amp)
    }


def main(args: argparse.Namespace) -> None:
    """Prints throughput and losses, and writes them as JSON."""
    if args.images < 2 * args.batch_size:
        raise ValueError(
            f"--images {args.images} is less than two batches of --batch_size {args.batch_size}; "
            f"give {2 * args.batch_size} or more"
        )
    side = peers.image_side(args.size)
    flags = [
        "--model", f"mae_vit_{args.size}", "--input_size", side, "--batch_size", args.batch_size, "--device",
        args.device, "--warmup_epochs", 1,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_files(folder, args.images)
        results: dict[str, Any] = {"speed": speed(args, folder, flags)}
        if args.updates:
            results["losses"] = losses(args, folder, flags)
    rates, curves = results["speed"], results.get("losses", {})
    throughput = [
        ("updates without data loading", f"{rates['without_data']:,.0f}"),
        ("main_pretrain.py", f"{rates['with_data']:,.0f}"),
    ]
    points = [
        (f"{number * UPDATES_PER_POINT} to {(number + 1) * UPDATES_PER_POINT - 1}", *(f"{loss:.4f}" for loss in pair))
        for number, pair in enumerate(zip(*curves.values(), strict=True))
    ]
    print(f"\n{markdown(['', 'images/s'], throughput)}")
    print(f"\nratio {rates['share']:.2f}, data loading {rates['data_wait']:.1%} of the time")
    if points:
        print(f"\n{markdown(['updates', 'loss in fp32', f'loss in {args.amp}'], points)}")
    device = choose_device(args.device)
    machine.write(f"whole_run_{args.size}_{args.amp}_{device.type}", device, vars(args), results, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = machine.model_parser(
        "Throughput of main_pretrain.py with its data, and its losses in two precisions.", amp=("bf16", "fp16")
    )
    parser.add_argument(
        "--images", default=51200, type=int, metavar="N", help="number of image files, for the throughput"
    )
    parser.add_argument(
        "--updates", default=200, type=int, metavar="N", help="number of updates, for the losses; 0: throughput only"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
