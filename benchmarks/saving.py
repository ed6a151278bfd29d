"""What saving costs a run: how long the loop stands still, and how much slower it is while the file is written.

    python benchmarks/saving.py                         # ViT-B, five minutes on two CPU cores
    python benchmarks/saving.py --model mae_vit_mini_patch4

Takes training steps, some of them while a state (weights and both moments of AdamW) is on its way to the disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_mae
from util.checkpoints import run_state
from util.interrupts import Interrupts
from util.training.saver import Saver

STEPS = 15  # without saving; as many and more with it


def main(args: argparse.Namespace) -> None:
    """Prints the table."""
    torch.manual_seed(0)
    model = getattr(models_mae, args.model)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(args.batch_size, 3, *model.patch_embed.img_size)

    def step() -> float:
        started = time.perf_counter()
        model(images)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    plain = statistics.median([step() for _ in range(STEPS)][2:])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scaler = torch.amp.GradScaler(enabled=False)
        saver = Saver(
            Interrupts(), Path(folder), lambda: run_state.collect(model, optimizer, scaler, {}),
            run_state.Progress(args.batch_size, args.batch_size),
            epochs=1, save_every=1, save_minutes=args.save_minutes,
        )  # fmt: skip
        started = time.perf_counter()
        saver.save(0, 1, {})
        pause = time.perf_counter() - started
        beside = []
        while saver.writing and not saver.writing.done():
            beside.append(step())
        written = time.perf_counter() - started
        saver.close()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    extra = pause + sum(beside) - plain * len(beside)
    print("| | |\n|---|---|")
    print(f"| state of {args.model} | {size / 1e9:.2f} GB |")
    print(f"| the loop stands still | {pause:.2f} s |")
    print(f"| until the file is on the disk | {written:.1f} s |")
    print(f"| a step, median | {plain:.2f} s |")
    print(f"| a step while the file is written, median | {statistics.median(beside or [plain]):.2f} s |")
    print(f"| longest such step | {max(beside or [plain]):.2f} s |")
    print(f"| of the run's time, saving every {args.save_minutes:g} minutes | {extra / 60 / args.save_minutes:.2%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_vit_base_patch16", metavar="NAME", help="a model of models_mae")
    parser.add_argument("--batch_size", default=2, type=int, metavar="N", help="effective batch size")
    parser.add_argument("--save_minutes", default=15.0, type=float, metavar="M", help="minutes between saves")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder of the file (default: a temporary one)")
    main(parser.parse_args())
