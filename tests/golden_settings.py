"""The default of every flag, the settings of every recipe and the published files equal those in tests/golden.

    python tests/golden_settings.py --write      # records the present ones; the diff shows what changed

The values under "published" are defaults of the published code. The command does not change them.
"""

import argparse
import functools
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT

from mae.cli import entry_point
from mae.inference import get_model
from mae.jobs import submit
from mae.weights import model_zoo

GOLDEN = Path(__file__).with_name("golden")
SCRIPTS = ["main_pretrain", "main_finetune", "main_linprobe", "main_segment", "main_knn",
           "main_compare", "submitit_pretrain", "submitit_finetune", "submitit_linprobe", "submitit_segment",
           "mae.inference.predict", "mae.inference.reconstruct", "mae.inference.features", "mae.inference.segment",
           "mae.inference.neighbors", "mae.inference.image_map", "mae.inference.anomalies", "mae.inference.report",
           "mae.inference.export",
           "mae.recommend.check", "mae.checkpoints.sharded"]  # fmt: skip
ZOO = "model_zoo"
SHAPE = {"input_size", "patch_size", "in_chans", "decoder_depth", "learned_pos_embed", "num_cls_tokens", "global_pool"}
FILES = {"config", "data_path", "train_list", "val_list", "finetune", "output_dir", "log_dir", "resume"}


def parser_of(script: str) -> argparse.ArgumentParser:
    if script.startswith("submitit"):
        return submit.get_args_parser(script.replace("submitit", "main"))[0]
    return importlib.import_module(script).get_args_parser()


def defaults(script: str) -> dict[str, Any]:
    """The default of each flag by name; of a job, those that its script has not."""
    parser = parser_of(script)
    values = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    values = json.loads(json.dumps(values, default=str))
    shared = defaults(script.replace("submitit", "main")) if script.startswith("submitit") else {}
    return {name: value for name, value in sorted(values.items()) if name not in shared or shared[name] != value}


def recipe_settings(script: str, recipe: Path) -> dict[str, Any]:
    """What the command in the header of a recipe sets, without files, and what follows from it."""
    text = recipe.read_text(encoding="utf-8").replace("\\\n#", "")
    command = re.search(rf"nproc_per_node (\d+) {script}\.py (.*)", text)
    processes, flags = (int(command[1]), shlex.split(command[2])) if command else (1, ["--config", str(recipe)])
    args, standard = vars(entry_point.parse_command(parser_of(script), flags)[0]), defaults(script)
    found = {name: value for name, value in sorted(args.items()) if value != standard[name] and name not in FILES}
    images = processes * args["batch_size"] * args["accum_iter"]
    blr = args.get("blr") if isinstance(args.get("blr", 0.0), float) else args["blr"][0]
    found |= {"effective_batch_size": images, "peak_lr": args["lr"] or round(blr * images / 256, 9)}
    given = {name: args[name] for name in sorted(SHAPE & args.keys()) if args[name] is not None}
    shape = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given.items())
    return found | ({"parameters": num_parameters(args["model"], shape)} if script != "main_segment" else {})


@functools.cache
def num_parameters(model: str, shape: tuple[tuple[str, Any], ...]) -> int:
    """The number of parameters of a model, of a classifier with 1000 classes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in get_model(model, device="meta", **dict(shape)).parameters())


def recorded(script: str) -> dict[str, dict[str, Any]]:
    file = GOLDEN / f"{script}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def present(script: str) -> dict[str, dict[str, Any]]:
    if script == ZOO:
        return {"files": {name: row._asdict() for name, row in model_zoo.TABLE.items()}}
    published, values = recorded(script).get("published", {}), defaults(script)
    recipes = sorted(ROOT.glob(f"recipes/{script.removeprefix('main_')}_*.yaml"))
    return {
        "published": {name: values.get(name, "no such flag") for name in published},
        "added": {name: value for name, value in values.items() if name not in published},
        "recipes": {recipe.stem: recipe_settings(script, recipe) for recipe in recipes},
    }


def write(script: str) -> None:
    """Records the present values, one default or recipe per line."""
    parts = present(script) | {"published": recorded(script).get("published", {})}
    blocks = [f' "{part}": {{\n' + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}"
              for name, value in values.items()) + "\n }" for part, values in parts.items() if values]  # fmt: skip
    (GOLDEN / f"{script}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    for script in (*SCRIPTS, ZOO):
        write(script)
