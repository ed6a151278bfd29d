"""Computes the features of all images in a folder, for use elsewhere.

    python -m inference.features demo/data/fashion_mnist --model runs/mine/checkpoint-last.pth --out features.npz

The file holds `features` (n, D), `names` (n,), and, where folders are classes, `labels` (n,) and `classes`. A command
that was stopped goes on where it was when it is given again.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from inference.model import Model, get_model
from util import cli, datasets, dist, flags, loader, options
from util.labels import Part, require
from util.precision import Precision
from util.runlog import start_logging
from util.samples import Samples
from util.sources import Source

logger = logging.getLogger(__name__)

SAVE_EVERY = 20  # batches between notes of how far it is


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = cli.parser("Computes the features of all images in a folder; goes on where it was stopped.")
    parser.add_argument("data_path", metavar="FOLDER", help="images, flat or nested, or a tar or zip file of them")
    options.add_inference_options(parser, images=False)
    parser.add_argument(
        "--out", type=flags.new_file(".npz", ".safetensors"), required=True, metavar="FILE", help=".npz or .safetensors"
    )
    parser.add_argument("--split", default="train", help="which sub-folder to take, where there are train/ and val/")
    parser.add_argument(
        "--pool", choices=("cls", "avg", "tokens"),
        help="class token, mean of the patch tokens, or all tokens; None is what the model's head is for",
    )  # fmt: skip
    options.add_extraction_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes the file."""
    start_logging()
    device = dist.choose_device(args.device)
    model = get_model(args.model, pretrained=True, device=device)
    source = require(datasets.open_source(args.split, args.data_path), args.split)
    told = {"model": str(args.model), "pool": args.pool, "images": len(source), "folder": args.data_path}
    rows = extract(
        model, source, args.out.with_name(f"{args.out.name}.partial"), told, args.pool, args.batch_size,
        args.num_workers, Precision(args.amp, device),
    )  # fmt: skip
    content: dict[str, Any] = {"features": rows}
    names = np.array([source.name(index) for index in range(len(source))])
    unfinished = args.out.with_name(f".{args.out.name}")
    if args.out.suffix == ".npz":
        labelled = {"labels": source.labels, "classes": np.array(source.classes)} if source.classes else {}
        np.savez(unfinished, **content, names=names, **labelled)  # type: ignore[arg-type]
    else:
        content |= {"labels": np.ascontiguousarray(source.labels)} if source.classes else {}
        texts = {"names": json.dumps(names.tolist()), "classes": json.dumps(source.classes)}
        save_file(content, unfinished, metadata=texts)
    unfinished.replace(args.out)
    shutil.rmtree(args.out.with_name(f"{args.out.name}.partial"))
    logger.info(f"{args.out}: features {rows.shape} of {args.data_path}")


def extract(
    model: Model,
    source: Source,
    folder: Path,
    told: dict[str, Any],
    pool: str | None,
    batch_size: int,
    num_workers: int,
    precision: Precision,
) -> np.ndarray:
    """Features (n, D), or (n, N + 1, D) of tokens, fp32, in a file that is mapped into memory.

    Args:
        folder: holds them, and how far they are; if it is there for the same `told`, they are continued.
    """
    done, rows = _continued(folder, told)
    if done:
        logger.info(f"going on after {done:,} of {len(source):,} images")
    rest = Part(source, np.arange(done, len(source)))
    samples = Samples(rest, model.transform, in_chans=model.in_chans, seed=0)
    batches = loader.eval_loader(samples, batch_size, num_workers, pin_memory=precision.device.type == "cuda")
    with tqdm(total=len(source), initial=done, unit="image", disable=None) as bar, torch.inference_mode():
        for number, (images, *_) in enumerate(batches, start=1):
            with precision.autocast():
                found = model.extract_feat(model.normalize(images.to(precision.device)), pool).float().cpu().numpy()
            if rows is None:
                folder.mkdir(parents=True, exist_ok=True)
                shape = (len(source), *found.shape[1:])
                rows = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float32, shape=shape)
            rows[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
            if number % SAVE_EVERY == 0 or done == len(source):
                rows.flush()
                (folder / "done.tmp").write_text(json.dumps({**told, "done": done}))
                (folder / "done.tmp").replace(folder / "done.json")
    assert rows is not None
    return rows


def _continued(folder: Path, told: dict[str, Any]) -> tuple[int, np.memmap | None]:
    """How many images are done, and their features."""
    if not (folder / "done.json").exists():
        return 0, None
    state = json.loads((folder / "done.json").read_text())
    done = state.pop("done")
    if state != told:
        raise ValueError(f"{folder} was begun with other settings ({state}); delete it, or give another --out")
    return done, np.load(folder / "features.npy", mmap_mode="r+")


if __name__ == "__main__":
    cli.run(main, get_args_parser())
