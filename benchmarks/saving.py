"""The cost of saving a checkpoint: how long the training loop blocks, and how much slower updates are during the write.

    python benchmarks/saving.py                         # ViT-B, five minutes on two CPU cores
    python benchmarks/saving.py --model mae_vit_mini_patch4

A checkpoint has the weights and both moments of AdamW. Updates are timed without a write and during one.
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
from mae.checkpoints import run_state
from mae.evaluate.tables import markdown
from mae.interrupts import Interrupts
from mae.training.saver import Saver

STEPS = 15  # updates that are timed without a write


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
        during = []
        while saver.writing and not saver.writing.done():
            during.append(step())
        written = time.perf_counter() - started
        saver.close()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    extra = pause + sum(during) - plain * len(during)
    rows = [
        (f"checkpoint of {args.model}", f"{size / 1e9:.2f} GB"),
        ("the training loop blocks for", f"{pause:.2f} s"),
        ("the file is complete after", f"{written:.1f} s"),
        ("an update, median", f"{plain:.2f} s"),
        ("an update during the write, median", f"{statistics.median(during or [plain]):.2f} s"),
        ("an update during the write, maximum", f"{max(during or [plain]):.2f} s"),
        (f"share of the run, one save every {args.save_minutes:g} minutes", f"{extra / 60 / args.save_minutes:.2%}"),
    ]
    print(markdown(["", ""], rows))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_vit_base_patch16", metavar="NAME", help="a model of models_mae")
    parser.add_argument("--batch_size", default=2, type=int, metavar="N", help="effective batch size")
    parser.add_argument("--save_minutes", default=15.0, type=float, metavar="M", help="minutes between saves")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder of the file (default: a temporary one)")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
