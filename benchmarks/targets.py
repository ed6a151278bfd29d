"""Performance targets, compared with the measurements in benchmarks/results.

    python benchmarks/targets.py
    python benchmarks/targets.py --results runs/bench         # the measurements of ./run bench

The other scripts here write the measurements, with a description of the machine. The rows of a GPU are from the file of
gpu_check.py, if there is one.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from mae.evaluate.tables import markdown

Results = dict[str, Any]
EVAL, FEATURES = "eval_base_patch16_bf16_cpu_files", "features_base_patch16_bf16_cpu_files"
BF16, FP32, FILES = "pretrain_base_patch16_bf16_cpu", "pretrain_base_patch16_fp32_cpu", "input_pipeline"
SMALL = "small_models_cpu"


def ratio(ours: str, *others: str) -> Callable[[Results], float]:
    """Our images/s, relative to the fastest of the other implementations."""
    return lambda results: (
        results["images_per_second"][ours] / max(results["images_per_second"][name] for name in others)
    )


def share_of_peak(results: Results) -> float:
    """Our FLOP/s, as a share of the FLOP/s of a large matrix product."""
    return results["images_per_second"]["ours compiled"] * results["flops_per_image"] / results["peak_flops"]


GPU = {"base_patch16": 0.42, "large_patch16": 0.48, "huge_patch14": 0.52}
WITH_DATA = {"base_patch16": 0.85, "large_patch16": 0.95, "huge_patch14": 0.95}

# Title, file, function that computes the figure, target (negative: an upper limit), format. NAME_tunables.json is the
# same measurement with the GLIBC_TUNABLES of ./run bench.
ROWS: list[tuple[str, str, Callable[[Results], float], float, str]] = [
    ("bf16 compiled, relative to transformers eager", BF16, ratio("ours compiled", "transformers eager"), 1.25,
     "{:.2f}"),
    ("bf16 compiled, relative to the fastest other implementation", BF16,
     ratio("ours compiled", "transformers eager", "transformers compiled", "plain eager", "plain compiled"), 1.10,
     "{:.2f}"),
    ("bf16 eager, relative to transformers eager", BF16, ratio("ours eager", "transformers eager"), 1.05, "{:.2f}"),
    ("fp32 compiled, relative to transformers eager", FP32, ratio("ours compiled", "transformers eager"), 1.02,
     "{:.2f}"),
    ("bf16 compiled, share of the peak matmul throughput", BF16, share_of_peak, 0.65, "{:.0%}"),
    ("activation memory with the fused attention kernel, saving relative to transformers", BF16,
     lambda results: 1 - results["saved_bytes"]["ours"] / results["saved_bytes"]["transformers"], 0.09, "{:.1%}"),
    ("JPEG files to batches, one process, --fast_jpeg, relative to Pillow and torchvision", FILES,
     lambda results: results["one process"]["to_classic"]["ours, --fast_jpeg"], 2.1, "{:.2f}"),
    ("the same from a resized copy, relative to Pillow and torchvision on the originals", FILES,
     lambda results: results["one process"]["to_classic"]["ours, resized copy, --fast_jpeg"], 4.0, "{:.2f}"),
    ("values of random crops that differ by more than 1 between --fast_jpeg and Pillow, at most", FILES,
     lambda results: sum(share for level, share in results["differences"].items() if int(level) > 1), -1e-4, "{:.2%}"),
    ("opening a folder of images, time relative to torchvision's ImageFolder, at most", "listing",
     lambda results: results["results"]["folder"]["seconds"] / results["results"]["torchvision"]["seconds"], -1.0,
     "{:.2f}"),
    ("classification of JPEG files (--eval --fast_jpeg), bf16 compiled, relative to timm's fastest", EVAL,
     ratio("ours compiled, --fast_jpeg", "timm eager", "timm compiled"), 1.25, "{:.2f}"),
    ("the same in fp32, eager", EVAL.replace("bf16", "fp32"), ratio("ours eager, --fast_jpeg", "timm eager"), 1.0,
     "{:.2f}"),
    ("features of JPEG files (--fast_jpeg), bf16 compiled, relative to transformers' fastest", FEATURES,
     ratio("ours compiled, --fast_jpeg", "transformers eager", "transformers compiled"), 1.25, "{:.2f}"),
    ("the same in fp32, eager", FEATURES.replace("bf16", "fp32"),
     ratio("ours eager, --fast_jpeg", "transformers eager"), 1.0, "{:.2f}"),
    ("k-NN, share of the peak matmul throughput in fp32", "knn_cpu", lambda results: results["share"], 0.5, "{:.0%}"),
    *((f"demo, two cores, images/s of {way}", SMALL, lambda results, way=way: results["images_per_second"][way], least,
       "{:,.0f}") for way, least in (("pre-training", 3400), ("pre-training, compiled", 5500))),
    ("demo, one core, fine-tuning relative to fp32, images from files, mixup", SMALL,
     ratio("fine-tuning", "fine-tuning: fp32, images from files, mixup"), 2.5, "{:.1f}"),
    ("data-loading share of main_pretrain.py, at most", FILES, lambda results: results["data_wait"], -0.02, "{:.1%}"),
    *((f"{size}, one GPU, compiled: share of 989 TFLOP/s", f"pretrain_{size}_bf16_cuda",
       lambda r: r["images_per_second"]["ours compiled"] * r["flops_per_image"] / 989e12, least, "{:.0%}")
      for size, least in GPU.items()),
    *((f"{size}, one GPU, bf16 compiled, relative to transformers eager", f"pretrain_{size}_bf16_cuda",
       ratio("ours compiled", "transformers eager"), 2.0, "{:.2f}") for size in GPU),
    *((f"{size}, one GPU, images/s of main_pretrain.py, relative to updates without data loading",
       f"whole_run_{size}_bf16_cuda",
       lambda results: results["speed"]["share"], least, "{:.2f}") for size, least in WITH_DATA.items()),
    ("base_patch16, one GPU, 200 updates: relative difference of the losses in bf16 and fp32, at most",
     "whole_run_base_patch16_bf16_cuda",
     lambda results: max(abs(b / a - 1) for a, b in zip(*results["losses"].values(), strict=True)), -0.01, "{:.2%}"),
]  # fmt: skip


def table(folders: Sequence[Path]) -> str:
    """The table in Markdown, from the files in the folders: a column for each, and a row for each measured target.

    Raises:
        ValueError: a folder has no measurement.
    """
    rows = []
    for title, name, figure, target, form in ROWS:
        cells = []
        for folder in folders:
            default, tunables = (value_of(file, folder, figure, form) for file in (name, f"{name}_tunables"))
            cells.append(f"{default} ({tunables})" if tunables else default)
        if any(cells):
            rows.append([title, form.format(abs(target)), *cells])
    return markdown(["", "target", *map(title_of, folders)], rows)


def title_of(folder: Path) -> str:
    """The hardware of the measurements in a folder."""
    records = (machine.read(file.stem, folder) for file in sorted(folder.glob("*.json")))
    if not (record := next(records, None)):
        raise ValueError(f"--results {folder} has no measurements; `./run bench {folder}` writes them")
    return machine.title(record)


def value_of(name: str, folder: Path, figure: Callable[[Results], float], form: str) -> str:
    """The measured figure; empty without a measurement."""
    results = machine.read(name, folder)
    try:
        return form.format(figure(results)) if results else ""
    except KeyError:  # --only excluded a part of the measurement
        return ""


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", nargs="+", default=machine.folders(), type=Path, metavar="DIR",
        help="folders of results, a column each (default: the folders in benchmarks/results)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    parser = get_args_parser()
    try:
        print(table(parser.parse_args().results))
    except ValueError as error:
        parser.error(str(error))
