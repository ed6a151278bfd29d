"""What changes between a commit and the working tree: losses, recorded settings, recipes, and --help.

    python tests/compare_commits.py HEAD~1            # 5 minutes on 2 cores

In both trees, every script runs at fixed seeds on the same small images, training ones for ten updates; the losses in
log.txt, the predictions of evaluations, the weights and the settings in the checkpoints must be equal. So must the
settings that each recipe sets, and the help of each flag. tests/intended_differences.toml lists the differences that a
change intends, each with its reason.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from segments import make_scenes

ROOT = Path(__file__).parents[1]
INTENDED = Path(__file__).with_name("intended_differences.toml")
NOT_COMPARED = ("seconds", "images_per_s", "data_wait", "tflops", "output_dir", "log_dir", "data_path", "finetune",
                "model")  # fmt: skip
# Runs in a tree: the settings of the recipes and the flags of the scripts, as JSON.
SETTINGS = """
import importlib, json, sys
from pathlib import Path
from util.cli import entry_point
found = {}
for script in sorted(Path().glob("main_*.py")):
    parser = importlib.import_module(script.stem).get_args_parser()
    for action in parser._actions:
        for flag in action.option_strings[-1:]:
            found[f"help/{script.stem}/{flag}"] = [action.help, repr(action.default), [*map(str, action.choices or [])]]
for recipe in sorted(Path("recipes").glob("*.yaml")):
    parser = importlib.import_module(f"main_{recipe.stem.partition('_')[0]}").get_args_parser()
    for action in parser._actions:
        action.required = False
    for name, value in vars(entry_point.parse(parser, ["--config", str(recipe)])).items():
        found[f"recipe/{recipe.stem}/{name}"] = repr(value)
json.dump(found, sys.stdout)
"""


def make_data(folder: Path) -> None:
    """Writes 20 labeled images for training and for validation, and images with masks."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(20):
            file = folder / "images" / split / f"kind{number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    make_scenes(folder / "scenes", train=20)


def commands(data: Path, out: Path) -> Iterator[tuple[str, list[object]]]:
    """Yields the name and the command of each run. Later commands read files of earlier ones."""
    images, encoder = ["--data_path", data / "images"], out / "pretrain/checkpoint-1.pth"
    small = ["--input_size", 16, "--batch_size", 4, "--num_workers", 1, "--device", "cpu", "--amp", "off"]
    trained = [*small, "--epochs", 2, "--warmup_epochs", 1]
    tuned = ["--model", "vit_mini_patch4", "--finetune", encoder]
    probed = ["main_linprobe.py", *images, *tuned, *trained, "--nb_classes", 2]
    yield "pretrain", ["main_pretrain.py", *images, "--model", "mae_vit_mini_patch4", *trained, "--output_dir"]
    yield "finetune", ["main_finetune.py", *images, *tuned, *trained, "--nb_classes", 2, "--output_dir"]
    yield "linear", [*probed, "--output_dir"]
    yield "attentive", [*probed, "--probe", "attentive", "--output_dir"]
    scenes = ["--data_path", data / "scenes", "--nb_classes", 3]
    yield "segment", ["main_segment.py", *scenes, *tuned, *trained, "--output_dir"]
    yield "knn", ["main_knn.py", *images, *tuned, *small, "--k", 5]
    yield "eval", ["main_finetune.py", *images, *small, "--nb_classes", 2, "--eval", "--resume",
                   out / "finetune/checkpoint-1.pth"]  # fmt: skip
    yield "predict", ["-m", "inference.predict", "--model", out / "finetune/checkpoint-1.pth",
                      *sorted((data / "images/val/kind0").iterdir())[:3]]  # fmt: skip


def observe(tree: Path, data: Path, out: Path) -> dict[str, Any]:
    """Runs the commands in a tree; returns values by name: kind of observation, run or script, and entry."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command: object) -> str:
        argv = [sys.executable, *map(str, command)]
        process = subprocess.run(argv, cwd=tree, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{tree}: {' '.join(map(str, command[:1]))} failed: {process.stderr[-1000:]}")
        return process.stdout

    seen: dict[str, Any] = json.loads(run("-c", SETTINGS))
    for name, command in commands(data, out):
        folder = out / name
        text = run(*command, *[folder] * (command[-1] == "--output_dir"))
        print(f"{tree.name}: {name}", flush=True)
        log = folder / "log.txt"
        for number, line in enumerate(log.read_text().splitlines() if log.exists() else [text]):
            values = json.loads(line) if log.exists() else {"output": line.replace(str(out), "")}
            seen |= {f"log/{name}/{number}/{key}": value for key, value in values.items() if key not in NOT_COMPARED}
        for file in sorted(folder.glob("checkpoint*.pth")):
            state = torch.load(file, weights_only=False)
            args = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
            seen |= {f"settings/{name}/{key}": repr(args[key]) for key in args.keys() - set(NOT_COMPARED)}
            weights = b"".join(tensor.numpy().tobytes() for tensor in state["model"].values())
            seen[f"weights/{name}/{file.stem}"] = hashlib.sha256(weights).hexdigest()[:16]
    return seen


def main() -> None:
    """Prints the differences; exits with code 1 if one is not intended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    commit = parser.parse_args().commit
    known = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        parser.error(f"there is no commit {commit}: `git log --oneline` lists them")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder)
        before = folder / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, commit], cwd=ROOT, check=True)
        try:
            with ThreadPoolExecutor(2) as pool:
                pairs = [(before, folder / "out_before"), (ROOT, folder / "out_after")]
                old, new = pool.map(lambda pair: observe(pair[0], folder, pair[1]), pairs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    intended = tomllib.loads(INTENDED.read_text())
    unexpected = 0
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            reasons = [why for pattern, why in intended.items() if fnmatch.fnmatch(name, pattern)]
            unexpected += not reasons
            print(f"{name}: {old.get(name)} -> {new.get(name)}  [{reasons[0] if reasons else 'NOT INTENDED'}]")
    print(f"{len(new)} values compared; {unexpected} differences are not intended")
    sys.exit(unexpected > 0)


if __name__ == "__main__":
    main()
