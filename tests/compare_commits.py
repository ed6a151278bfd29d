"""What changes between a commit and the working tree: losses, results, recorded settings, and --help.

    python tests/compare_commits.py HEAD~1            # 10 minutes on 2 cores

In both trees, every script runs at fixed seeds on the same small images, training ones for ten updates; the losses in
log.txt, the predictions of evaluations, the weights and the settings in the checkpoints must be equal. So must the
settings that a run records when it starts with a recipe, and the help of each flag. Only commands and files of the
trees are read, so that a commit may move their code. tests/intended_differences.toml lists the differences that a
change intends, each with its reason.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
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
from safetensors import safe_open
from segments import make_scenes

ROOT = Path(__file__).parents[1]
INTENDED = Path(__file__).with_name("intended_differences.toml")
NOT_COMPARED = ("seconds", "images_per_s", "data_wait", "tflops", "output_dir", "log_dir", "data_path", "train_list",
                "finetune", "config")  # fmt: skip
# Flags in place of those of a recipe, so that a run takes seconds.
SMALL = ["--input_size", 16, "--patch_size", 4, "--batch_size", 4, "--num_workers", 1, "--device", "cpu",
         "--amp", "off", "--epochs", 2, "--warmup_epochs", 1]  # fmt: skip


def make_data(folder: Path) -> None:
    """Writes 20 labeled images for training and for validation, a list of them, and images with masks."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(20):
            file = folder / "images" / split / f"kind{number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in sorted(folder.glob("images/train/*/*.png"))]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    make_scenes(folder / "scenes", train=20)


def commands(tree: Path, data: Path, out: Path) -> Iterator[tuple[str, list[object]]]:
    """Yields the name and the command of each run. Later commands read files of earlier ones."""
    images, encoder = ["--data_path", data / "images"], out / "pretrain/checkpoint-1.pth"
    inference = "mae.inference" if (tree / "mae/inference").exists() else "inference"
    model = ["--model", "mae_vit_mini_patch4"]
    tuned = ["--model", "vit_mini_patch4", "--finetune", encoder]
    evaluated = [*tuned, *SMALL[: SMALL.index("--epochs")]]
    probed = ["main_linprobe.py", *images, *tuned, *SMALL, "--nb_classes", 2]
    pretrain = ["main_pretrain.py", *images, *model, *SMALL, "--output_dir"]
    yield "pretrain", pretrain
    yield "two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *pretrain]
    yield "finetune", ["main_finetune.py", *images, *tuned, *SMALL, "--nb_classes", 2, "--output_dir"]
    listed = ["--data_path", data, "--train_list", data / "list.csv"]
    yield "list", ["main_finetune.py", *listed, *tuned, *SMALL, "--val_fraction", 0.2, "--output_dir"]
    yield "linear", [*probed, "--output_dir"]
    yield "attentive", [*probed, "--probe", "attentive", "--output_dir"]
    scenes = ["--data_path", data / "scenes", "--nb_classes", 3]
    yield "segment", ["main_segment.py", *scenes, *tuned, *SMALL, "--output_dir"]
    yield "knn", ["main_knn.py", *images, *evaluated, "--k", 5]
    bare = out / "bare.pth"  # as the published files: weights without settings
    if encoder.exists():
        torch.save({"model": torch.load(encoder, weights_only=False)["model"]}, bare)
    yield "knn_bare", ["main_knn.py", *images, *evaluated, "--finetune", bare, "--k", 5]
    classifier = out / "finetune/checkpoint-1.pth"
    evaluated = SMALL[: SMALL.index("--epochs")]
    yield "eval", ["main_finetune.py", *images, *evaluated, "--nb_classes", 2, "--eval", "--resume", classifier]
    files = sorted((data / "images/val/kind0").iterdir())[:3]
    yield "predict", ["-m", f"{inference}.predict", "--model", classifier, *files]
    yield "features", ["-m", f"{inference}.features", "--model", encoder, "--device", "cpu", "--out",
                       out / "features.npz", data / "images"]  # fmt: skip
    yield "export", ["-m", f"{inference}.export", "--model", classifier, "--to", "timm", "--out",
                     out / "export.safetensors"]  # fmt: skip
    for recipe in sorted((tree / "recipes").glob("*.yaml")):
        script = recipe.stem.partition("_")[0]
        masks = scenes[:2] if "palette:" in recipe.read_text() else scenes  # a palette has the number of classes
        inputs = {"pretrain": [*images, *model], "segment": [*masks, *tuned]}.get(script, [*images, *tuned])
        side = ["--input_size", 32] if script == "pretrain" else []  # recipes mask blocks of patches
        one = ["--updates_per_epoch", 1] if script == "pretrain" else ["--adapt_input", "mean"]  # or gray
        small = [*SMALL, *side, *one, "--accum_iter", 1]
        start = [f"main_{script}.py", "--config", recipe.relative_to(tree), *inputs, *small]
        yield f"recipe_{recipe.stem}", [*start, "--epochs", 1, "--warmup_epochs", 0, "--output_dir"]


def observe(tree: Path, data: Path, out: Path) -> dict[str, Any]:
    """Runs the commands in a tree; returns values by name: kind of observation, run or script, and entry."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}

    def run(*command: object) -> str:
        argv = [sys.executable, *map(str, command)]
        process = subprocess.run(argv, cwd=tree, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{tree}: {' '.join(map(str, command))} failed: {process.stderr[-1000:]}")
        return process.stdout

    seen: dict[str, Any] = {}
    for script in sorted(tree.glob("main_*.py")):
        entries = re.split(r"\n  (?=-)", run(script.name, "--help"))
        seen |= {f"help/{script.stem}/{flag}": text for flag, text in map(flag_and_help, entries[1:])}
    for name, command in commands(tree, data, out):
        folder = out / name
        try:
            text = run(*command, *[folder] * (command[-1] == "--output_dir"))
        except SystemExit as error:
            if not name.startswith("recipe_"):  # a recipe may need data of its own
                raise
            text = str(error).splitlines()[-1]
        print(f"{tree.name}: {name}", flush=True)
        seen |= results_of(name, folder, text.replace(str(out), "").replace(str(tree), ""))
    features = np.load(out / "features.npz")
    seen |= {f"features/{name}": digest(features[name].tobytes()) for name in sorted(features)}
    with safe_open(out / "export.safetensors", "pt") as export:  # the order of its metadata is random
        seen |= {f"export/{name}": repr(value) for name, value in export.metadata().items()}
        seen |= {f"export/{name}": digest(export.get_tensor(name).numpy().tobytes()) for name in export.keys()}  # noqa: SIM118
    return seen


def flag_and_help(entry: str) -> tuple[str, str]:
    """The last name of a flag and its help, of an entry of --help."""
    entry = entry.partition("\n\n")[0]  # the title of the next group follows
    return re.findall(r"--\w+", entry.splitlines()[0])[0], " ".join(entry.split())


def results_of(name: str, folder: Path, output: str) -> dict[str, Any]:
    """The losses, recorded settings and weights of a run, or its output if it has no run directory."""
    found: dict[str, Any] = {}
    log, start = folder / "log.txt", folder / "environment.jsonl"
    for number, line in enumerate(log.read_text().splitlines() if log.exists() else [output]):
        values = json.loads(line) if log.exists() else {"output": line}
        found |= {f"log/{name}/{number}/{key}": value for key, value in values.items() if key not in NOT_COMPARED}
    if start.exists():
        settings = json.loads(start.read_text().splitlines()[0])["settings"]
        found |= {f"start/{name}/{key}": repr(settings[key]) for key in settings.keys() - set(NOT_COMPARED)}
    for file in sorted(folder.glob("checkpoint*.pth")):
        state = torch.load(file, weights_only=False)
        args = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
        found |= {f"settings/{name}/{key}": repr(args[key]) for key in args.keys() - set(NOT_COMPARED)}
        found[f"weights/{name}/{file.stem}"] = digest(b"".join(x.numpy().tobytes() for x in state["model"].values()))
    return found


def digest(content: bytes) -> str:
    """The start of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


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
