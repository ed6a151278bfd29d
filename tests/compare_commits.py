"""What changes between a commit and the working tree: losses, results, recorded settings, and --help.

    python tests/compare_commits.py HEAD~1            # 3 minutes on 2 cores

In both trees, every script runs at fixed seeds on the same small data, training ones for ten updates; the losses in
log.txt, the output of evaluations, the weights and the settings in the checkpoints must be equal. So must the settings
that a run records when it starts with a recipe, and the help of each flag. Only commands and files of the trees are
read, so that a commit may move their code. A run that fails in a tree is an error. tests/intended_differences.toml
lists the differences that a change intends, each with its reason. It also lists changes of rounding: they are made in
the tree of the commit, so that they hide no other change of a loss or weight.
"""

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from segments import COLORS, make_scenes

ROOT = Path(__file__).parents[1]
INTENDED = Path(__file__).with_name("intended_differences.toml")
NOT_COMPARED = ("seconds", "images_per_s", "data_wait", "tflops", "output_dir", "log_dir", "data_path", "train_list",
                "finetune", "init_from", "probe_path", "config")  # fmt: skip
# Flags in place of those of a recipe, so that a run takes seconds.
SMALL = ["--input_size", 16, "--patch_size", 4, "--batch_size", 4, "--num_workers", 1, "--device", "cpu",
         "--amp", "off", "--epochs", 2, "--warmup_epochs", 1]  # fmt: skip
EVALUATION = SMALL[: SMALL.index("--epochs")]
PROCESSES = {"two": 2, "sharded": 2}  # of these runs; one of any other
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
OBSERVE = "--observe"  # in place of a commit: a process of one tree
VALUES = "values.json"  # what it writes
ABSENT = "absent"
STOPPED = "stopped"  # this run ends by a signal, and the next one resumes it
STOP_AT = 7  # updates: within the second epoch
CODE = f'''
"""The user's code of some runs."""

import itertools
import os
import signal

import numpy as np
import torch
from torch import nn

from models_vit import Encoder


class Days(Encoder):
    """Adds an embedding of the day of the year to all tokens."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.day_embed = nn.Embedding(367, self.cls_token.shape[2])
        nn.init.normal_(self.day_embed.weight)

    def tokenize(self, imgs, day, **context):
        return super().tokenize(imgs, **context) + self.day_embed(day.long()).unsqueeze(1)


class Scenes:
    """Images with invalid pixels, and the coordinates of their pixels."""

    maps = ["east", "north"]

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        north, east = (1 + index) * np.mgrid[:20, :24].astype(np.float32)
        return {{"image": image, "label": index % 2, "valid": north > east - index, "east": east, "north": north}}


def open_scenes(split, data_path):
    return Scenes()


class Stopped(torch.optim.AdamW):
    """AdamW, and a signal to this process at an update."""

    updates = itertools.count(1)

    def step(self, closure=None):
        loss = super().step(closure)
        if "STOP" in os.environ and next(self.updates) == {STOP_AT}:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss


def stopped(model, groups):
    return Stopped(groups)
'''


def make_data(folder: Path) -> None:
    """Writes 20 labeled images for training and for validation, other forms of them, and data of other kinds."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(20):
            file = folder / "images" / split / f"kind{number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    files = sorted(folder.glob("images/train/*/*.png"))
    rows = [f"{file.relative_to(folder)},{file.parent.name},{12 * int(file.stem)}" for file in files]
    (folder / "list.csv").write_text("\n".join(["path,label,day", *rows]))
    shutil.make_archive(str(folder / "images"), "zip", folder / "images")
    (folder / "bands").mkdir()
    for number in range(20):
        bands = generator.integers(0, 3000, (20, 24, 4)).astype(np.int16)
        bands[number % 16 :][:9, : 2 + number] = -9999
        np.save(folder / f"bands/{number:02}.npy", bands)
    make_scenes(folder / "scenes", train=20)
    make_voc(folder / "voc")
    make_dino(folder / "dino")
    (folder / "compared.py").write_text(CODE)


def make_voc(folder: Path) -> None:
    """Writes scenes as `torchvision.datasets.VOCSegmentation` reads them."""
    scenes, voc = make_scenes(folder / "scenes", "splits", train=20), folder / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}_{file.stem}" for file in sorted((scenes / split / "images").iterdir())]
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            file = f"{name.partition('_')[2]}.png"
            Image.open(scenes / split / "images" / file).save(voc / f"JPEGImages/{name}.jpg")
            mask = Image.open(scenes / split / "masks" / file)
            mask.putpalette(np.array([(0, 0, 0), *COLORS], dtype=np.uint8).tobytes())
            mask.save(voc / f"SegmentationClass/{name}.png")


def make_dino(folder: Path) -> None:
    """Writes random weights as transformers saves a DINOv2."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def commands(tree: Path, data: Path, out: Path) -> Iterator[tuple[str, list[object]]]:
    """Yields the name and the command of each run. Later commands read files of earlier ones."""
    images, encoder = ["--data_path", data / "images"], out / "pretrain/checkpoint-1.pth"
    model = ["--model", "mae_vit_mini_patch4", *SMALL]
    tuned = ["--model", "vit_mini_patch4", "--finetune", encoder]
    probed = ["main_linprobe.py", *images, *tuned, *SMALL, "--nb_classes", 2]
    pretrain = ["main_pretrain.py", *images, *model]
    yield "pretrain", [*pretrain, "--output_dir"]
    yield "two", [*pretrain, "--output_dir"]
    yield "sharded", [*pretrain, "--fsdp", "--output_dir"]
    sharded = [out / "sharded/checkpoint-1", out / "merged/checkpoint-1.pth"]
    yield "merged", ["-m", "mae.checkpoints.sharded", *sharded]
    stopped = [*pretrain, "--optimizer", "compared:stopped", "--resume", "auto", "--output_dir", out / "resumed"]
    yield STOPPED, stopped
    yield "resumed", stopped
    yield "muon", [*pretrain, "--optimizer", "muon", "--output_dir"]
    yield "probe", [*pretrain, "--probe_every", 1, "--probe_path", data / "images", "--output_dir"]
    yield "bf16", [*pretrain, "--amp", "bf16", "--output_dir"]
    bands = ["--data_path", data / "bands", "--in_chans", 4, "--mean", *[0.5] * 4, "--std", *[0.3] * 4]
    bands += ["--nodata", -9999, "--value_range", 0, 3000]
    yield "nodata", ["main_pretrain.py", *bands, *model, "--norm_pix_loss", "--output_dir"]
    maps = ["--dataset", "py:compared:open_scenes", "--encoder", "examples.ground_positions:GroundPositions"]
    yield "maps", ["main_pretrain.py", *maps, *model, "--output_dir"]
    listed = ["--data_path", data, "--train_list", data / "list.csv"]
    days = ["--extras", "day", "--encoder", "compared:Days"]
    yield "extras", ["main_pretrain.py", *listed, *days, *model, "--output_dir"]
    dino = ["--encoder", "examples.dino:DINOv2"] if (tree / "examples/dino.py").exists() else []  # of df1688b4
    yield "dino", [*pretrain, *dino, "--init_from", data / "dino", "--output_dir"]
    yield "dino_finetune", ["main_finetune.py", *images, "--finetune", data / "dino", *dino, *SMALL, "--output_dir"]
    yield "finetune", ["main_finetune.py", *images, *tuned, *SMALL, "--nb_classes", 2, "--output_dir"]
    yield "list", ["main_finetune.py", *listed, *tuned, *SMALL, "--val_fraction", 0.2, "--output_dir"]
    yield "zip", ["main_pretrain.py", "--data_path", data / "images.zip", *model, "--output_dir"]
    yield "zip_finetune", ["main_finetune.py", "--data_path", data / "images.zip", *tuned, *SMALL, "--output_dir"]
    yield "linear", [*probed, "--output_dir"]
    yield "attentive", [*probed, "--probe", "attentive", "--output_dir"]
    scenes = ["--data_path", data / "scenes", "--nb_classes", 3]
    yield "segment", ["main_segment.py", *scenes, *tuned, *SMALL, "--output_dir"]
    yield "knn", ["main_knn.py", *images, *tuned, *EVALUATION, "--k", 5]
    bare = out / "bare.pth"  # as the published files: weights without settings
    torch.save({"model": torch.load(encoder, weights_only=False)["model"]}, bare)
    yield "knn_bare", ["main_knn.py", *images, *tuned, *EVALUATION, "--finetune", bare, "--k", 5]
    classifier = out / "finetune/checkpoint-1.pth"
    yield "eval", ["main_finetune.py", *images, *EVALUATION, "--nb_classes", 2, "--eval", "--resume", classifier]
    files = sorted((data / "images/val/kind0").iterdir())[:3]
    yield "predict", ["-m", "mae.inference.predict", "--model", classifier, *files]
    yield "features", ["-m", "mae.inference.features", "--model", encoder, "--device", "cpu", "--out",
                       out / "features.npz", data / "images"]  # fmt: skip
    yield "export", ["-m", "mae.inference.export", "--model", classifier, "--to", "timm", "--out",
                     out / "export.safetensors"]  # fmt: skip
    for recipe in sorted((tree / "recipes").glob("*.yaml")):
        script = recipe.stem.partition("_")[0]
        masks = scenes[:2] if "palette:" in recipe.read_text() else scenes  # a palette has the number of classes
        if "VOCSegmentation" in recipe.read_text():
            masks = ["--data_path", data / "voc"]
        inputs = {"pretrain": [*images, *model], "segment": [*masks, *tuned]}.get(script, [*images, *tuned])
        side = ["--input_size", 32] if script == "pretrain" else []  # recipes mask blocks of patches
        one = ["--updates_per_epoch", 1] if script == "pretrain" else ["--adapt_input", "mean"]  # or gray
        small = [*SMALL, *side, *one, "--accum_iter", 1]
        start = [f"main_{script}.py", "--config", recipe.relative_to(tree), *inputs, *small]
        yield f"recipe_{recipe.stem}", [*start, "--epochs", 1, "--warmup_epochs", 0, "--output_dir"]


def observe(tree: Path, data: Path, out: Path) -> dict[str, Any]:
    """Runs the commands in a tree; returns values by name: kind of observation, run or script, and entry.

    The processes are forks of one that has imported the modules of the tree, which PYTHONPATH names.
    """
    module = importlib.util.find_spec("main_pretrain")
    assert module and module.origin == str(tree / "main_pretrain.py"), f"{module} is not of {tree}"
    out.mkdir()
    (out / "merged").mkdir()
    (out / "module.py").write_text(
        "import runpy, sys\ndel sys.argv[0]\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )

    def run(name: str, *command: object) -> str:
        script, argv = (out / "module.py", command[1:]) if command[0] == "-m" else (command[0], command[1:])
        output, errors = (out / f"{name}.{kind}" for kind in ("output", "errors"))
        environment = {"STOP": "1"} if name == STOPPED else {}
        processes = forks.Forks(script, argv, output, PROCESSES.get(name, 1), environment, errors, tree)
        codes = processes.wait(300)
        if any(code != (143 if name == STOPPED else 0) for code in codes):
            processes.signal(signal.SIGKILL)
            said = "".join(file.read_text()[-2000:] for file in (output, errors) if file.exists())
            raise SystemExit(f"{tree}: {name} failed with codes {codes}: {' '.join(map(str, command))}\n{said}")
        return output.read_text()

    seen: dict[str, Any] = {}
    for script in sorted(tree.glob("main_*.py")):
        entries = re.split(r"\n  (?=-)", run(f"help_{script.stem}", script.name, "--help"))
        seen |= {f"help/{script.stem}/{flag}": text for flag, text in map(flag_and_help, entries[1:])}
    for name, command in commands(tree, data, out):
        folder = Path(str(command[-1])) if command[-2] == "--output_dir" else out / name
        text = run(name, *command, *[folder] * (command[-1] == "--output_dir"))
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
    for number, line in enumerate(log.read_text().splitlines() if log.exists() else []):
        values = json.loads(line)
        found |= {f"log/{name}/{number}/{key}": value for key, value in values.items() if key not in NOT_COMPARED}
    if start.exists():
        settings = json.loads(start.read_text().splitlines()[0])["settings"]
        found |= {f"start/{name}/{key}": repr(settings[key]) for key in settings.keys() - set(NOT_COMPARED)}
    for file in sorted(folder.glob("checkpoint*.pth")):
        state = torch.load(file, weights_only=False)
        args = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
        found |= {f"settings/{name}/{key}": repr(args[key]) for key in args.keys() - set(NOT_COMPARED)}
        found[f"weights/{name}/{file.stem}"] = digest(b"".join(x.numpy().tobytes() for x in state["model"].values()))
    return found or numbers_of(name, output)


def numbers_of(name: str, output: str) -> dict[str, Any]:
    """The numbers of each line of an output by its words, so that a message that changes hides no number of others."""
    found: dict[str, Any] = defaultdict(list)
    for line in output.splitlines():
        words = re.sub(r"\W+", " ", re.sub(NUMBER, "N", line)).strip()
        found[f"output/{name}/{words}"] += re.findall(NUMBER, line)
    return found


def digest(content: bytes) -> str:
    """The start of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def change_rounding(tree: Path) -> None:
    """Changes lines of a tree that round differently in this one."""
    for change in tomllib.loads(INTENDED.read_text()).get("rounding", []):
        file = tree / change["file"]
        if file.is_file() and change["before"] in file.read_text():
            file.write_text(file.read_text().replace(change["before"], change["after"]))
            print(f"{change['file']} of the commit is changed: {change['reason']}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Prints the differences; returns the number of those that are not intended."""
    intended = tomllib.loads(INTENDED.read_text()).get("differences", {})
    unexpected = 0
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, ABSENT), new.get(name, ABSENT)
        if before != after:
            reasons = [why for pattern, why in intended.items() if fnmatch.fnmatchcase(name, pattern)]
            unexpected += not reasons
            print(f"{name}: {before} -> {after}  [{reasons[0] if reasons else 'NOT INTENDED'}]")
    print(f"{len(old.keys() | new.keys())} values compared; {unexpected} differences are not intended")
    return unexpected


def main() -> None:
    """Prints the differences; exits with code 1 if one is not intended, or if a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    commit = parser.parse_args().commit
    known = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        parser.error(f"there is no commit {commit}: `git log --oneline` lists them")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, before = folder / "data", folder / "before"
        data.mkdir()
        make_data(data)
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, commit], cwd=ROOT, check=True)
        try:
            change_rounding(before)
            sides = [start(before, data, folder / "out_before"), start(ROOT, data, folder / "out_after")]
            codes = [side.wait() for side in sides]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
        if any(codes):
            sys.exit("a run failed: nothing is compared")
        old, new = (json.loads((folder / name / VALUES).read_text()) for name in ("out_before", "out_after"))
    sys.exit(compare(old, new) > 0)


def start(tree: Path, data: Path, out: Path) -> "subprocess.Popen[bytes]":
    """Starts a process that observes a tree, whose modules are the only ones of the project that it finds."""
    environment = {"PYTHONPATH": f"{tree}:{data}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    observer = [sys.executable, __file__, OBSERVE, *map(str, (tree, data, out))]
    return subprocess.Popen(observer, cwd=tree, env={**os.environ, **environment})


if __name__ == "__main__":
    if sys.argv[1:2] == [OBSERVE]:
        seen = observe(*map(Path, sys.argv[2:]))
        Path(sys.argv[-1], VALUES).write_text(json.dumps(seen))
    else:
        main()
