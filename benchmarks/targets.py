"""What is to be reached, beside what the files in benchmarks/results hold.

    python benchmarks/targets.py
    python benchmarks/targets.py --results runs/bench         # what ./run bench has measured here

Each figure was written by train_step.py, input_pipeline.py or whole_run.py, with the machine that it was measured on.
On a GPU: train_step.py --size base_patch16 --batch_size 1024 --device cuda, whole_run.py with the same, and so on.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

Results = dict[str, Any]
BF16, FP32, FILES = "pretrain_base_patch16_bf16_cpu", "pretrain_base_patch16_fp32_cpu", "input_pipeline"


def ratio(ours: str, *theirs: str) -> Callable[[Results], float]:
    """Our images/s to the fastest of theirs."""

    def of(results: Results) -> float:
        rates = results["images_per_second"]
        return rates[ours] / max(rates[name] for name in theirs)

    return of


def share_of_peak(results: Results) -> float:
    """Of the floating-point operations that a matrix product does in the same time."""
    return results["images_per_second"]["ours compiled"] * results["flops_per_image"] / results["peak_flops"]


GPU = {"base_patch16": 0.42, "large_patch16": 0.48, "huge_patch14": 0.52}
WITH_DATA = {"base_patch16": 0.85, "large_patch16": 0.95, "huge_patch14": 0.95}

# What, from which file, at least (or at most) how much, and how it is written. A file's name with _kept at its end is
# that of the same measurement where glibc keeps large blocks of memory.
ROWS: list[tuple[str, str, Callable[[Results], float], float, str]] = [
    ("bf16 compiled, to transformers eager", BF16, ratio("ours compiled", "transformers eager"), 1.40, "{:.2f}"),
    ("bf16 compiled, to the fastest of the others", BF16,
     ratio("ours compiled", "transformers eager", "transformers compiled", "plain eager", "plain compiled"), 1.12,
     "{:.2f}"),
    ("bf16 eager, to transformers eager", BF16, ratio("ours eager", "transformers eager"), 1.25, "{:.2f}"),
    ("fp32 compiled, to transformers eager", FP32, ratio("ours compiled", "transformers eager"), 1.10, "{:.2f}"),
    ("share of the bf16 matrix product's peak, compiled", BF16, share_of_peak, 0.75, "{:.0%}"),
    ("kept for the backward pass with the fused attention kernel, less than transformers by", BF16,
     lambda results: 1 - results["saved_bytes"]["ours"] / results["saved_bytes"]["transformers"], 0.12, "{:.1%}"),
    ("JPEG files to batches in a process, --fast_jpeg, to the classic pipeline", FILES,
     lambda results: results["one process"]["to_classic"]["ours, --fast_jpeg"], 2.1, "{:.2f}"),
    ("the same from a resized copy, to the classic pipeline on the originals", FILES,
     lambda results: results["one process"]["to_classic"]["ours, resized copy, --fast_jpeg"], 4.0, "{:.2f}"),
    ("values of random crops that differ from Pillow's with --fast_jpeg, at most", FILES,
     lambda results: 1 - results["differences"]["0"], -0.0, "{:.1%}"),
    ("the loop's wait for data, at most", FILES, lambda results: results["data_wait"], -0.02, "{:.1%}"),
    *((f"{size}, one GPU, compiled: share of 989 TFLOP/s", f"pretrain_{size}_bf16_cuda",
       lambda r: r["images_per_second"]["ours compiled"] * r["flops_per_image"] / 989e12, least, "{:.0%}")
      for size, least in GPU.items()),
    *((f"{size}, one GPU, bf16 compiled, to transformers eager", f"pretrain_{size}_bf16_cuda",
       ratio("ours compiled", "transformers eager"), 2.0, "{:.2f}") for size in GPU),
    *((f"{size}, one GPU, images/s of main_pretrain.py with its data, of the step's", f"whole_run_{size}_bf16_cuda",
       lambda results: results["speed"]["share"], least, "{:.2f}") for size, least in WITH_DATA.items()),
    ("base_patch16, one GPU, 200 steps: loss in bf16 off fp32's, at most", "whole_run_base_patch16_bf16_cuda",
     lambda results: max(abs(b / a - 1) for a, b in zip(*results["losses"].values(), strict=True)), -0.01, "{:.2%}"),
]  # fmt: skip


def table(folder: Path) -> str:
    """In Markdown, from the files in a folder."""
    lines = ["| | to reach | reached | large blocks kept |", "|---|---|---|---|"]
    for title, name, figure, target, form in ROWS:
        cells = [form.format(abs(target))]
        for file, otherwise in ((name, "not measured"), (f"{name}_kept", "")):
            results = machine.read(file, folder)
            try:
                cells.append(form.format(figure(results)) if results else otherwise)
            except KeyError:  # not all of it was asked for
                cells.append(otherwise)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=machine.RESULTS, type=Path, metavar="DIR", help="folder of the results")
    print(table(parser.parse_args().results))
