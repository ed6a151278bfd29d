"""Writes a recipe: the settings of the rules, with a trial run for the number of epochs."""

import itertools
import logging
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mae import parallel
from mae.data import image_cache
from mae.files import atomic
from mae.recommend import board, continued, rules, trial
from mae.recommend.facts import Images, Machine, warnings_of
from mae.recommend.rules import Line
from mae.settings.arguments import arguments
from mae.settings.choices import NO_CROP
from mae.settings.values import PROCESSES, as_yaml
from mae.sizes import Size
from mae.training import measured_runs
from mae.user_code import runs_code

logger = logging.getLogger(__name__)

MAX_SHARE = 0.1  # of the time of a run, which a trial may take: a large encoder has a short one
LONG = 5  # seconds of decoding, above which a trial run before the others caches the images


def this_machine(can_cache: bool) -> Machine:
    """Returns the machine of this process. Decoded images may take half of the memory and of the free disk."""
    device = parallel.choose_device("auto")
    gpus = {"cpu": 0, "cuda": torch.cuda.device_count()}.get(device.type, 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = image_cache.folder()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    free = min(memory, shutil.disk_usage(existing).free) / 2
    return Machine(gpus, parallel.cores_of_process(), free if can_cache else 0)


def write(
    path: Path, images: Images, machine: Machine, given: Mapping[str, Any], minutes: float | None, decoding: float,
    encoder: continued.Start | None = None, is_labelled: bool = False,
) -> list[str]:  # fmt: skip
    """Writes a recipe that pre-trains for a time.

    Args:
        path: the file.
        given: settings of the dataset, by name.
        minutes: time of the run, with its start; None: that of `images_needed`, at most `rules.MAX_SECONDS`.
        decoding: images/s that are read and decoded.
        encoder: what the recipe continues. Default: it pre-trains from scratch.
        is_labelled: the run can classify the images, and so measure the encoder at the start and later.

    Returns:
        The lines that the command prints: what is wrong with the images, and the command that runs the recipe.

    Raises:
        ValueError: the images are too small, or the trial run failed.
    """
    start, flags = split_given(given)
    inputs = list(_inputs(images, given, encoder and encoder.patch_size))
    loading = [line for line in rules.loading_lines(images, machine) if line.name not in given]
    settings = {line.name: line.value for line in [*start, *inputs, *loading]}
    patches = math.prod(rules.grid_of(settings["input_size"], settings["patch_size"]))
    processes = rules.processes_of(machine, images.count)
    threads = machine.threads(processes)

    def lines_of(model: str) -> list[Line]:
        lines = [*inputs, *rules.optimization_lines(images, machine, model, given.get("repeated_sampling", 1))]
        of_model = continued.lines(lines, encoder) if encoder else [rules.model_line(images, patches, model), *lines]
        of_start = Line(PROCESSES, processes, "of `mae start`, which keeps them in a run that resumes")
        return [*start, *of_model, of_start, *loading]

    def measure(model: str, updates: int = trial.UPDATES) -> trial.Trial:
        settings = {"updates_per_epoch": updates, "vis_every": 0}
        return tried(lines_of(model), processes, threads, flags, "main_pretrain", settings, updates)

    if encoder:
        most = 60 * (minutes or continued.MINUTES)
        model = encoder.size
        measured = _trial_of_encoder(rules.images_per_update(lines_of(model), processes), most, partial(measure, model))
    else:
        if images.count / decoding > LONG and settings["cache_images"]:
            logger.info("decoding    the images, for `cache_images`")
            measure(rules.MODELS[0], updates=1)
        most = 60 * minutes if minutes else rules.MAX_SECONDS
        model, measured = _largest(rules.models_for(images, patches), images, machine, most, measure)
    lines = lines_of(model)
    effective = rules.images_per_update(lines, processes)
    in_epoch = images.total * given.get("repeated_sampling", 1) // effective * effective
    measured_runs: list[str] = []
    if encoder:
        length = continued.length_lines(in_epoch, *measured, most, is_labelled)
    else:
        needed = rules.seconds_needed(images.count, in_epoch, *measured)
        length_lines = rules.probed_length_lines if is_labelled else rules.length_lines
        length = length_lines(in_epoch, *measured, most if minutes else min(most, needed))
        takes = _seconds(length, in_epoch, measured)
        measured_runs = _measured_lines(images, in_epoch * length[0].value, takes / 60, needed)
    command = launch(path, processes, 0 if machine.gpus else threads, flags)
    title = f"Continued pre-training of {encoder.name}" if encoder else "Pre-training"
    save(path, title, _seconds(length, in_epoch, measured, bool(encoder)) / 60, command, [*lines, *length])
    return [
        f"training    {measured.images_per_s:,.0f} images/s, after a start of {measured.startup:.0f} s",
        *measured_runs,
        *[f"warning     {text}" for text in warnings_of(images)],
        *[f"warning     {line.reason}" for line in length if line.is_warning],
        f"recipe      {path}\n",
        command,
    ]


def _seconds(length: Sequence[Line], in_epoch: int, measured: trial.Trial, measures_start: bool = False) -> float:
    """Returns the time of a run with its measurements of k-NN, each of which takes about as long as an epoch.

    Args:
        length: epochs, and `probe_every` if k-NN is measured.
        in_epoch: images of an epoch.
    """
    values = {line.name: line.value for line in length}
    epochs = values["epochs"]
    every = values.get("probe_every")
    measurements = math.ceil(epochs / every) + measures_start if every else 0
    return measured.startup + in_epoch * (epochs + measurements) / measured.images_per_s


def _measured_lines(images: Images, processed: int, minutes: float, needed: float) -> list[str]:
    """Returns the lines that compare a pre-training with measured ones.

    Args:
        processed: images of all its epochs.
        minutes: time of the run.
        needed: seconds that measured runs would take here.
    """
    return [
        f"time        {minutes_text(minutes)} process {measured_runs.share_text(processed, images.count)}: "
        f"{minutes_text(needed / 60)} here{board.beyond(images)}",
        *[f"measured    {text}" for text in board.nearest(images, minutes)],
    ]


def _inputs(images: Images, given: Mapping[str, Any], patch_size: Size | None) -> Iterator[Line]:
    """Yields the settings of images and augmentation that are not given. Arguments as in `rules.image_lines`."""
    unused = "crop_scale" if given.get("crop") == NO_CROP else ""
    for line in rules.image_lines(images, given.get("input_size"), patch_size):
        if line.name not in given and line.name != unused:
            yield line


def _trial_of_encoder(images_per_update: int, seconds: float, measure: Callable[..., trial.Trial]) -> trial.Trial:
    """Returns the trial of an encoder: a short one, if the usual one would take more than MAX_SHARE of the time."""
    short = measure(updates=1)
    needed = trial.EPOCHS * trial.UPDATES * images_per_update / short.images_per_s
    return measure() if needed < MAX_SHARE * seconds else short


def _largest(
    models: Sequence[str], images: Images, machine: Machine, seconds: float, measure: Callable[[str], trial.Trial]
) -> tuple[str, trial.Trial]:
    """Returns the largest model that processes enough images in a time, at least the first one, and its trial.

    On CPUs, the time of an update grows with the parameters, so that a model that is too slow needs no trial.
    """
    needed = measured_runs.images_needed(images.count)
    model = models[0]
    measured = measure(model)
    for larger in models[1:]:
        factor = 1 if machine.gpus else rules.parameters_of(model) / rules.parameters_of(larger)
        if needed > factor * measured.images_per_s * (seconds - measured.startup):
            break
        try:
            of_larger = measure(larger)
        except ValueError as error:  # for example, for lack of memory
            logger.warning(f"{larger} can't be trained here: {error}")
            break
        if needed > of_larger.images_per_s * (seconds - of_larger.startup):
            break
        model = larger
        measured = of_larger
    return model, measured


def minutes_text(minutes: float) -> str:
    """Returns a time in minutes; from ten hours on, in hours."""
    if minutes >= 600:
        return f"{minutes / 60:,.0f} hours"
    number = f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.2g}"
    return f"{number} {'minute' if number == '1' else 'minutes'}"


def split_given(given: Mapping[str, Any]) -> tuple[list[Line], list[str]]:
    """Returns the lines of settings that are given, and the arguments of those that a recipe must not set."""
    lines = [Line(name, value, "as given") for name, value in given.items() if not _is_refused(name, value)]
    return lines, arguments({name: value for name, value in given.items() if _is_refused(name, value)})


def tried(
    lines: list[Line], processes: int, threads: int, flags: list[str], script: str, settings: Mapping[str, Any],
    updates: int = trial.UPDATES,
) -> trial.Trial:  # fmt: skip
    """Measures settings without a file, as `trial.measure`."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "recipe.yaml")
        draft.write_text(text_of(lines))
        return trial.measure(draft, processes, threads, flags, script, settings, updates)


def save(path: Path, title: str, minutes: float, command: str, lines: list[Line]) -> None:
    """Writes the file of a recipe. Its header has the time and the command that runs it."""
    header = f"# {title} for {minutes_text(minutes)} on the machine that wrote this file.\n#\n#   {command}\n#\n"
    atomic.write_text(path, header + text_of(lines))


def launch(path: Path, processes: int, threads: int, flags: list[str], script: str = "main_pretrain") -> str:
    """Returns the command that runs a recipe. The run is in runs/, or beside a recipe that is in another folder.

    Args:
        threads: threads of each process; 0: the default.
        flags: arguments that a recipe must not set.
        script: name of the script.
    """
    words_of_script = [f"{script}.py"] if Path(f"{script}.py").is_file() else ["-m", script]
    folder = Path("runs") if path.parent.resolve() == Path.cwd() else path.parent
    out = folder / path.stem
    numbers = itertools.count(2)
    while out.exists():  # --resume would continue another run
        out = folder / f"{path.stem}-{next(numbers)}"
    settings = {"config": path, "output_dir": out, "resume": "auto"}
    words = ["torchrun", "--standalone", "--nproc_per_node", str(processes), *words_of_script, *arguments(settings)]
    words += flags
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(words)


def text_of(lines: list[Line]) -> str:
    """Returns settings as YAML, each with its reason in a comment."""
    return "".join(f"{line.name}: {as_yaml(line.value)}  # {line.reason}\n" for line in lines)


def _is_refused(name: str, value: Any) -> bool:
    """Whether a recipe must not have a setting, because it runs code."""
    return (name == "dataset" and runs_code(value)) or (name == "encoder" and ":" in value)
