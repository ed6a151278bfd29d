"""From a folder of images to a page about an encoder of them, in one command.

    mae start IMAGES --minutes 30 --output_dir runs/mine

It checks the images and writes a recipe (runs/mine.yaml), pre-trains with it (runs/mine), and writes the page
(runs/mine/report.html), which compares the encoder with classifiers of pixels if the images have labels, and with the
encoders of --against. The minutes are those of the pre-training. The same command resumes what was interrupted. If all
parts have succeeded, it names the page. The flags are those of `mae recipe`. Processes are started for all GPUs or
cores.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import main_pretrain
from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.cli.script import Script
from mae.compare import answer
from mae.data.fingerprint import fingerprint
from mae.data.kinds.listing import folder_of
from mae.data.open import open_source
from mae.data.run_data import RunData
from mae.data.source import first_few
from mae.files import atomic
from mae.files.untrusted import printable
from mae.inference import report
from mae.interrupts import command, raised
from mae.plurals import counted
from mae.recommend import recipe, rules, start_flags, trial
from mae.recommend.facts import Machine
from mae.settings import DataSpec, ImageSpec, OptimSpec
from mae.settings.arguments import arguments, in_words
from mae.settings.values import PROCESSES, read_recipe
from mae.training import environment, log, lr_sched
from mae.user_code import runs_code

logger = logging.getLogger(__name__)

SPEED = re.compile(r"training    ([\d,]+) images/s")  # in the output of `mae recipe`
COUNT = re.compile(r"images      ([\d,]+)")
UNLABELLED = re.compile("^classes     none", re.MULTILINE)
PASSES = 3  # over the images, that the page takes, about: the features of the encoder and of random weights, neighbors
FITTING = 60  # seconds of the classifiers, about
NAMES = ("data_path", "train_list", "dataset")  # settings that name images
COMPLETE = "complete"  # in the run directory: all parts have succeeded. It has `digests`; until d42b7c83, nothing


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return start_flags.get_args_parser()


@raised()
def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the path of the page.

    Raises:
        Interrupted: a signal stopped the part that runs.
        ValueError: several processes were launched, or as in `start_flags.given_of`.
        SystemExit: a part has failed; the exit status is that of the part.
    """
    log.start_logging()
    given = start_flags.given_of(args)
    if parallel.launched_processes() > 1:
        raise ValueError("it starts the processes itself: run it without torchrun or srun, or run the recipe with them")
    out = start_flags.output_dir(args)
    file = out.with_name(f"{out.name}.yaml")
    require_same_images(given, out, file)
    code = dataset if runs_code(dataset := str(given.get("dataset", ""))) else None  # a recipe can't name it
    page = out / "report.html"
    missing = [name for name in args.against if name not in answer.read(out / answer.FILE).get("rows", {})]
    if page.exists() and not missing and is_complete(out, file, code):
        logger.info(f"{out} is complete, with the settings of {out}.yaml; for others, give another `output_dir`")
        print(f"page: {page}")
        return
    if file.exists() or is_run(out):
        settings = file if file.exists() else f"the run in {out}"
        logger.info(f"the settings are those of {settings}; for others, give another `output_dir`")
    for name in missing:  # what can't be opened, or downloaded, is refused before the training
        answer.open_encoder(name)
    if not (file.exists() or is_run(out)):
        write_recipe(given, file)
    train(out, file, code)
    further = arguments({"dataset": code, "against": args.against or None})
    call([sys.executable, "-m", "mae.inference.report", str(out), *further])  # it prints the path
    atomic.write_text(out / COMPLETE, json.dumps(digests(out, file, code)))


def is_complete(out: Path, file: Path, code: str | None) -> bool:
    """Whether all parts have succeeded, and neither recipe nor images have changed since, nor has the run resumed.

    Args:
        file: the recipe. If it is gone, it has not changed.
        code: the dataset, if it is the user's code.
    """
    stamp = out / COMPLETE
    if not stamp.exists():
        return False
    recorded = stamp.read_text(encoding="utf-8")
    if not recorded:
        parts = [*run_directory.checkpoints(out), *([file] if file.exists() else [])]
        return all(stamp.stat().st_mtime >= part.stat().st_mtime for part in parts)
    before = json.loads(recorded)
    changed = [name for name, digest in digests(out, file, code).items() if before.get(name) != digest]
    if changed:
        logger.info(f"{out} was complete; changed since then: {', '.join(changed)}")
    return not changed


def digests(out: Path, file: Path, code: str | None) -> dict[str, str]:
    """Returns digests of what the results of a run depend on. Arguments as in `is_complete`."""
    data = data_of(settings_of(out, file), code)
    try:
        val = open_source(data, "val", task=None)
    except ValueError:  # there are none
        val = None
    parts = {"recipe": file, "run": out / environment.FILE}
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in parts.items() if path.exists()}
    images = fingerprint(report.open_images(data), with_labels=False, val=val)
    return {**files, "images": " ".join(images.values())}


def require_same_images(given: Mapping[str, Any], out: Path, file: Path) -> None:
    """Raises ValueError if a recipe, or without one the run in `out`, is of other images: folders may have one name.

    Args:
        given: the arguments of the command; of them, `path` may be of any kind.
    """
    if file.exists():
        settings = entries_of(file)
    elif (out / environment.FILE).is_file():
        settings = environment.read_last(out)["settings"]
    else:
        return
    recorded = {name: str(settings[name]) for name in NAMES if settings.get(name)}
    named = {name: str(given[name]) for name in NAMES if name in given}
    if path := str(given.get("path", "")):
        named[next((name for name, value in recorded.items() if is_same(path, value)), "data_path")] = path
    if recorded and any(name not in recorded or not is_same(value, recorded[name]) for name, value in named.items()):
        remedy = f"; if the images have moved, change {file}" if file.exists() else ""
        raise ValueError(
            f"{out} has a run of {in_words(recorded)}: for {in_words(named)}, give another `output_dir`{remedy}"
        )


def is_same(first: str, second: str) -> bool:
    """Whether two values name the same images: texts that are equal, or paths of one file or folder."""
    return first == second or Path(first).resolve() == Path(second).resolve()


def write_recipe(given: dict[str, Any], file: Path) -> None:
    """Checks the images and writes the recipe. It prints what the parts after the pre-training add."""
    settings = {name: value for name, value in given.items() if name != "path"}
    path = [str(given["path"])] if "path" in given else []
    file.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    words = [sys.executable, "-m", "mae.data", *path, *arguments({**settings, "recipe": file})]
    output = call(words, is_read=True)
    numbers = [found[1].replace(",", "") for pattern in (COUNT, SPEED) if (found := pattern.search(output))]
    if len(numbers) == 2:
        count, speed = map(int, numbers)
        parts = "the comparison with pixels and the page add"
        seconds = FITTING + PASSES * count / speed
        if UNLABELLED.search(output):
            parts = "the page adds"
            seconds -= FITTING
        logger.info(
            f"the check took {log.duration(time.perf_counter() - begin)}; after the pre-training, {parts} about "
            f"{log.duration(seconds)}"
        )


def train(out: Path, file: Path, code: str | None) -> None:
    """Runs the pre-training. A run that has lost its recipe has the settings of its checkpoint.

    Of a recipe, the command has its path and its number of processes. Arguments as in `is_complete`.
    """
    require_images_of_epoch(out, file, code)
    machine = recipe.this_machine(can_cache=False)
    processes = processes_of(out, file, machine, code)
    settings = {"config": file if file.exists() else None, "output_dir": out, "resume": "auto", "dataset": code}
    call(
        trial.torchrun(processes, "main_pretrain", settings),
        threads=None if machine.gpus else machine.threads(processes),
    )


def is_run(out: Path) -> bool:
    """Whether a directory has a run with a state."""
    return bool(run_directory.checkpoints(out)) and (out / environment.FILE).is_file()


def require_images_of_epoch(out: Path, file: Path, code: str | None) -> None:
    """Raises ValueError if the run was interrupted within an epoch, and its images have changed since.

    Arguments as in `is_complete`.
    """
    newest = next(iter(run_directory.newest_first(out)), None)
    progress = checkpoint.read(newest, verify=False).get("progress", {}) if newest else {}
    if not progress.get("images_done"):
        return
    settings = settings_of(out, file)
    names = run_directory.interrupted_images(out, "auto")
    images = RunData(ImageSpec.of(settings), data_of(settings, code), torch.device("cpu"), None, lambda: names)
    source = images.open_split("train", reads_labels=False)
    now = fingerprint(source, with_labels=False)
    if all(progress["images"].get(kind, digest) == digest for kind, digest in now.items()):
        return
    folder = folder_of(source)
    added = sorted(set(folder.names).difference(names)) if folder and names else []
    listed = f", such as {first_few([printable(name) for name in added])}" if added else ""
    raise ValueError(
        f"{out} was interrupted within an epoch, and images were added{listed}, or removed: restore the images as they "
        f"were until the epoch is complete, or give another `output_dir`"
    )


def processes_of(out: Path, file: Path, machine: Machine, code: str | None) -> int:
    """Returns the number of processes: that of the run, if it exists, else that of the recipe, else that of the rules.

    Raises:
        ValueError: the machine has fewer GPUs or cores.
    """
    wanted = entries_of(file).get(PROCESSES) if file.exists() else None
    of_run = None
    if is_run(out):
        of_run = environment.read_last(out)["processes"]
        if wanted not in (None, of_run):
            logger.info(f"processes={wanted} of {file} has no effect on the run in {out}, which keeps {of_run}")
    processes = of_run or wanted
    if processes is None:
        settings = settings_of(out, file)
        optim = OptimSpec.of(settings)
        processes = rules.processes_of(machine, len(report.open_images(data_of(settings, code))))
        logger.info(f"{file} has no line `processes`: {counted(processes, 'process')} here")
        lr_sched.scaled_lr(optim.lr, optim.blr, processes * optim.batch_size * optim.accum_iter)  # it logs both
    most = machine.gpus or machine.cores
    if not (type(processes) is int and 1 <= processes <= most):
        unit = "GPUs" if machine.gpus else "CPU cores"
        of = f"the run in {out}" if of_run else file
        remedy = "give another `output_dir`" if of_run else "give fewer `processes` and more `accum_iter` in it"
        raise ValueError(
            f"{of} has {processes} processes, and this machine has {most} {unit}; `batch_size` counts the images of "
            f"one process: use another machine, or {remedy}"
        )
    return processes


def entries_of(file: Path) -> dict[str, Any]:
    """Returns the entries of a recipe, as `read_recipe`. An error names the file."""
    try:
        return read_recipe(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is no recipe: {error}") from error


def settings_of(out: Path, file: Path) -> Mapping[str, Any]:
    """Returns the settings of a recipe; without it, those of the run."""
    if file.exists():
        return Script(main_pretrain).settings({"config": file}).record()
    return environment.read_last(out)["settings"]


def data_of(settings: Mapping[str, Any], code: str | None) -> DataSpec:
    """Returns the dataset of a run, which is `code` if the user gives it."""
    return report.data_of(settings, argparse.Namespace(data_path=None, dataset=code))


def call(words: Sequence[str], is_read: bool = False, threads: int | None = None) -> str:
    """Prints and runs a command.

    Args:
        is_read: return what it prints; it is printed, too.
        threads: number of threads of PyTorch. Default: that of the launcher.

    Raises:
        SystemExit: it failed; with its exit status.
    """
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    shown = [f"{name}={value}" for name, value in variables.items()]
    shown += ["python" if word == sys.executable else word for word in words]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    output = []
    with command(words, env=os.environ | variables, stdout=subprocess.PIPE if is_read else None) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    status = process.returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)
    return "".join(output)
