"""Computes the features of all images in a folder and writes them to a file.

    python -m mae.inference.features demo/data/fashion_mnist --model runs/mine/checkpoint-last.pth --out features.npz

The file contains `features` (n, D) and `names` (n,), and for class folders `labels` (n,) and `classes`. Labels of the
user's code that are numbers or vectors (`--dataset py:`) are `labels` (n, C), with their names in `classes`. The same
command resumes an interrupted run. With other weights, settings or images, it starts from the beginning; names, sizes
and modification times of the files are compared. An image that can't be read ends the command; with
`--on_bad_image skip`, the file has no row for such images.

The orientation in EXIF data is ignored, as in training and evaluation. `extract_feat` applies it to image files.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mae import parallel
from mae.checkpoints import checkpoint
from mae.cli import entry_point, flags, options
from mae.data import extra_inputs
from mae.data.image_facts import readable
from mae.data.labels import has_class_numbers
from mae.data.open import LISTS, open_source
from mae.data.pixels import BadImage
from mae.data.source import Source, Stream, is_stream, versions
from mae.files import atomic
from mae.inference import extraction
from mae.inference.model import Model, get_model
from mae.pooling import TITLES
from mae.settings import DataSpec
from mae.settings.choices import POOL_CHOICES, REGRESSION
from mae.training.compiling import compile_model
from mae.training.log import start_logging
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

POOLS = {name: TITLES[name] for name in POOL_CHOICES}  # the values of --pool that return a vector


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Computes the features of all images in a folder or a dataset. The same command resumes an interrupted run."
    )
    add_options(parser, {**POOLS, "tokens": "all tokens"})
    parser.add_argument(
        "--out",
        type=flags.new_file(".npz", ".safetensors"),
        required=True,
        metavar="FILE",
        help="output file: .npz or .safetensors",
    )
    return parser


def add_options(parser: argparse.ArgumentParser, pools: Mapping[str, str] = POOLS) -> None:
    """Adds the flags of a command that computes features: of the images, the model and the features.

    Args:
        pools: the values of --pool, and their meanings.
    """
    parser.add_argument(
        "data_path", nargs="?", metavar="FOLDER",
        help="folder of images, flat or nested; a tar or zip file of such a folder; or a list: a text, CSV or JSON "
        "file with a path for each image, relative to the list",
    )  # fmt: skip
    options.add_dataset_option(parser, folder="FOLDER")
    options.add_inference_options(
        parser, images=False, example="mae_pretrain_vit_base", also="; or timm:NAME, a model of timm"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="subfolder of FOLDER, or split of --dataset")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in pools.items())
    parser.add_argument("--pool", choices=(*pools,), help=f"{meanings} (default: what the file is for)")
    options.add_extraction_options(parser)
    options.add_to(parser, "nodata", "value_range", "channels_last")
    options.add_to(parser, "on_bad_image", default="error", help=options.EXCLUDES)


def main(args: argparse.Namespace) -> None:
    """Computes the features and writes the file."""
    start_logging()
    extractor, source, precision = open_extractor(args)
    names = [source.name(index) for index in range(len(source))]
    partial = args.out.with_name(atomic.temporary_name(args.out.name, "{}.partial"))
    try:
        rows = extraction.extract(
            extractor, source, partial, row_settings(extractor.model, source, args, precision), args.batch_size,
            args.num_workers, precision, args.fast_jpeg,
        )  # fmt: skip
    except BadImage:
        shutil.rmtree(partial)  # it is of these files: a run without the image, or with another file, starts anew
        raise
    content: dict[str, Any] = {"features": rows} | ({"labels": source.labels} if source.classes else {})
    with atomic.replacing(args.out) as written:
        if args.out.suffix.lower() == ".npz":
            content |= {"classes": np.array(source.classes)} if source.classes else {}
            with written.open("wb") as file:  # numpy would append .npz to .NPZ
                np.savez(file, names=np.array(names), **content)  # type: ignore[arg-type]
        else:
            texts = {"names": json.dumps(names), "classes": json.dumps(source.classes)}
            save_file({name: np.ascontiguousarray(value) for name, value in content.items()}, written, metadata=texts)
    shutil.rmtree(partial)
    logger.info(f"{args.out}: features {rows.shape} of {args.dataset or args.data_path}")


def data_in(path: str | None) -> DataSpec:
    """Returns the dataset of a folder, an archive, or a list of image files, which its suffix tells."""
    is_list = path is not None and Path(path).suffix.lower() in LISTS and not Path(path).is_dir()
    return DataSpec(train_list=path) if is_list else DataSpec(data_path=path)


def open_images(args: argparse.Namespace) -> Source:
    """Opens the images of a command with the flags of `add_options`.

    Raises:
        ValueError: the dataset can't be opened, or the images are streamed.
    """
    source = open_labelled(replace(data_in(args.data_path), dataset=args.dataset), args.split)
    if is_stream(source):
        raise ValueError(f"dataset={args.dataset}: the images of shards have no order; give the folder of their images")
    return source


def open_extractor(
    args: argparse.Namespace, source: Source | None = None
) -> tuple[extraction.Extractor, Source, Precision]:  # fmt: skip
    """Opens the model, the images and the precision of a command with the flags of `add_options`.

    Args:
        source: the images. Default: all that the flags name.

    Raises:
        ValueError: as in `open_images`, the model can't be opened, or the images lack extra inputs of the model.
        BadImage: --on_bad_image skip, and too many images can't be read.
    """
    device = parallel.choose_device(args.device)
    source = source or open_images(args)  # first, because a large model takes long
    model = get_model(args.model, pretrained=True, device=device, **options.chosen_settings(args))
    precision = Precision(args.amp, device)
    if args.on_bad_image == "skip":
        source = readable(source, model.in_chans, args.num_workers, model.values)
    extra_inputs.require_fitting(model, source)
    extractor = extraction.Extractor(model, args.pool)
    logger.info(f"features: {f'--pool {args.pool}' if args.pool else model.pooling}")
    if args.compile:
        compile_model(extractor, device, freeze_weights=True)
    return extractor, source, precision


def open_labelled(data: DataSpec, split: str) -> Source | Stream:
    """Opens a dataset. Labels of the user's code that are not class numbers are numbers (n, C), as in regression."""
    source = open_source(data, split)
    return source if has_class_numbers(source) else open_source(data, split, task=REGRESSION)


def row_settings(model: Model, source: Source, args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """Returns all settings that the features depend on, as plain values. Runs with other settings are not resumed."""
    of_labels = ("classes", "label_names")
    return json.loads(json.dumps({
        **{name: value for name, value in model.settings.items() if name not in of_labels},
        "weights": checkpoint.compute_digest(model.state_dict()), "pool": args.pool, "precision": precision.name,
        "folder": args.data_path, "dataset": args.dataset, "split": args.split,
        "fast_jpeg": args.fast_jpeg and DataSpec.fast_jpeg_resize,
        "images": checkpoint.compute_digest(versions(source)),
    }))  # fmt: skip


def read(path: str | Path) -> np.ndarray:
    """Returns the features (n, D) in a file that the command wrote, or (n, T + N, D) with --pool tokens.

    Raises:
        OSError, ValueError, KeyError: the file can't be read, or has no features.
    """
    if Path(path).suffix.lower() == ".npz":
        with np.load(path) as file:
            return file["features"]
    return load_file(path)["features"]


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
