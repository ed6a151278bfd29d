"""A comparison that is killed at a random moment and started again, next to an undisturbed one: ./run test-compare.

    python tests/compare.py demo/output/pretrain --draws 2       # 2 minutes on two cores

The encoders are two checkpoints of ./run demo (after the first and the last epoch), random weights, and raw pixels.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def command(encoders: Path, out: Path, draws: int) -> list[str]:
    last = max(encoders.glob("checkpoint-*.pth"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [
        sys.executable, "main_compare.py", "--data_path", "demo/data/fashion_mnist", "--input_size", "28",
        "--in_chans", "1", "--crop_pct", "1", "--num_workers", "0", "--encoders", "scratch", "pixels",
        f"first={encoders / 'checkpoint-0.pth'}", f"last={last}", "--protocols", "knn", "linear", "finetune",
        "--labels", "100", "--draws", str(draws),
        "--recipes", "finetune=recipes/finetune_fashion_mnist.yaml", "--budget", "40",
        "--output_dir", str(out),
    ]  # fmt: skip


def results(out: Path) -> dict[str, Any]:
    """Returns the scores of the complete runs by folder."""
    records = {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("run.json")}
    return {name: record["scores"] for name, record in records.items() if "scores" in record}


def without_seconds(text: str) -> str:
    """Returns a table and its conclusion without the column of the seconds, the last one on a CPU."""
    lines = text.splitlines()
    assert lines[0].endswith(" seconds |")
    return "\n".join(line.rpartition(" | ")[0] if line.startswith("| ") else line for line in lines)


def main() -> None:
    """Exits with code 1 if the two tables differ or a complete run was repeated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", type=Path, help="run directory of pre-training")
    parser.add_argument("--draws", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        begin = time.perf_counter()
        subprocess.run(command(args.encoders, whole, args.draws), cwd=ROOT, check=True)
        seconds = time.perf_counter() - begin
        process = subprocess.Popen(command(args.encoders, parts, args.draws), cwd=ROOT)
        time.sleep(random.uniform(0.1, 0.9) * seconds / 2)
        process.kill()
        process.wait()
        before = results(parts)
        print(f"killed after {len(before)} runs", flush=True)
        subprocess.run(command(args.encoders, parts, args.draws), cwd=ROOT, check=True)
        repeated = [name for name, result in before.items() if results(parts)[name] != result]  # their seconds differ
        tables = [without_seconds((out / "table.md").read_text()) for out in (whole, parts)]
        if tables[0] != tables[1] or repeated:
            sys.exit(f"the tables differ, or runs were repeated: {repeated}\n" + "\n".join(tables))
        shutil.copytree(whole, ROOT / "runs/compare", dirs_exist_ok=True)
    print(f"{seconds:.0f} s; the killed and the undisturbed comparison have the same table. It is in runs/compare")


if __name__ == "__main__":
    main()
