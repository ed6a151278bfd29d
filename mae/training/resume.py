"""Resumes a run: the settings that its checkpoint records, and its state."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mae import encoders, parallel
from mae.checkpoints import checkpoint, run_directory, sharded_state
from mae.checkpoints.checkpoint import CheckpointError
from mae.checkpoints.run_state import FREE, Progress
from mae.data.fingerprint import VALIDATION
from mae.plurals import counted
from mae.settings import REBUILDS, RESUME, ModelSpec, differs, fits, names_of, taken_from
from mae.settings import fields as roles
from mae.settings.arguments import advice, in_words
from mae.settings.run import RESUME_PUBLISHED, names_resumed
from mae.settings.values import as_yaml
from mae.user_code import runs_code
from mae.weights.fitting import fit
from mae.weights.reading import Weights

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

logger = logging.getLogger(__name__)

# What a resumed run can't change: settings, and what the data determine
FIXED = [*names_resumed(roles.FIXED), "updates_per_epoch"]
OF_DATA = ("classes", "colors", "train_images", "held_out_images")

# Entries of a parameter group that depend on the schedule, the flags and the machine of this start
OF_THIS_START = {"lr", "lr_scale", "weight_decay", "fused", "foreign", "capturable"}

OF_PROGRAM = ("model_class", "loss")  # the user's code, which a program gives to `main`
STARTS = ("finetune", "init_from")  # the file of the weights from which a run starts
BATCH_FACTORS = ("batch_size", "accum_iter", "world_size")  # of the effective batch size, in published checkpoints

FIRST_VERSION = "df1688b4"  # the first commit whose runs resume; weights of all versions load
ELSEWHERE = "with resume=FILE and another `output_dir`"  # --output_dir contains later checkpoints
ANOTHER_FOLDER = "give another `output_dir`"


def resumed_settings(settings: Mapping[str, Any], explicit: frozenset[str], script: str) -> dict[str, Any]:
    """Returns the settings that a run which resumes takes from its checkpoint: those that are not explicit.

    The settings of a machine are not taken from a file. Of a file of the published code, only those of the model and
    the optimization are taken.

    Args:
        settings: the settings of the run, with `output_dir` and `resume`.
        explicit: the names of the explicit ones.
        script: name of the script, which checkpoints record.

    Raises:
        CheckpointError: the checkpoint is of another script, a setting in it is invalid, or updates or code differ.
    """
    recorded = parallel.from_rank_0(lambda: _recorded(Path(settings["output_dir"]), settings["resume"], script))
    if not recorded:
        return {}
    file, saved, is_ours = recorded
    explicit -= {name for name in STARTS if not settings.get(name)}
    _require_same_start(file, saved, settings, explicit)
    for name in OF_PROGRAM:
        if saved.get(name) and not settings.get(name):  # a file can't make a program import code
            raise CheckpointError(f"the resumed run has a {name} of its own: give {name}={saved[name]}")
    _require_same(["loss"], {"loss": None, **saved}, {"loss": None, **settings})
    if "lora" in explicit:  # before the model gets the recorded scale for other updates
        _require_same(["lora"], saved, settings)
    found = taken_from(saved, settings, explicit, RESUME if is_ours else RESUME_PUBLISHED)
    changed = {name: found[name] for name in sorted(found) if differs(name, found[name], settings[name])}
    for name, value in changed.items():
        _require_setting(file, name, value)
    if changed:
        logger.info(f"settings of {file}: {in_words(changed)}")
    # There are no flags for these. With --amp auto, the run uses the precision.
    facts = {"precision": str(saved.get("precision", ""))}
    if saved.get("layer_norm_eps"):
        _require_setting(file, "layer_norm_eps", saved["layer_norm_eps"])
        facts["layer_norm_eps"] = saved["layer_norm_eps"]
    return found | facts


def _require_same_start(
    file: str, saved: Mapping[str, Any], settings: Mapping[str, Any], explicit: frozenset[str]
) -> None:
    """Raises CheckpointError if a run that resumes is given another start than its own, which would have no effect.

    `preserve` reads its file again, which may have moved, and compares the content.
    """
    for name in explicit.intersection(STARTS):
        before = saved.get(name)
        now = settings[name]
        if before is None or (name == "init_from" and saved.get("preserve")):
            continue
        if str(before) != now and Path(str(before)).resolve() != Path(now).resolve():
            raise CheckpointError(
                f"{name}={now} has no effect on a run that resumes: that of {file} started from "
                f"{before or 'random weights'}: omit `{name}`, or give another `output_dir`"
            )


def _recorded(output_dir: Path, resume: str, script: str) -> tuple[str, dict[str, Any], bool] | None:
    """Returns the checkpoint from which a run resumes, its settings, and whether this library wrote it; None: none."""
    resumed = run_directory.chosen(output_dir, resume)
    file = run_directory.starting_checkpoint(output_dir, resume)
    if not file:
        return None
    run_directory.refuse(file)
    state = checkpoint.read(file, verify=False)
    _require_known_version(state, resumed, script)
    saved = encoders.renamed(state["args"])
    if saved.get("script", script) != script:
        remedy = _start_from(resumed, script)
        if resumed != "auto" and script == "main_pretrain":  # no classifier is the start of one
            remedy = f"give a checkpoint of {script}.py"
        raise CheckpointError(f"resume={resumed}: {file} is a checkpoint of {saved['script']}.py: {remedy}")
    return str(file), saved, "progress" in state


def _require_known_version(state: dict[str, Any], resumed: str, script: str) -> None:
    """Raises CheckpointError if a version before FIRST_VERSION wrote a checkpoint. Published ones have no `progress`.

    Earlier versions recorded the model before the script, or no script; and for a while, not what scaled the images.
    """
    args = state["args"]
    names = [name for name in args if name in ("script", "model")]
    scales_otherwise = args.get("fast_jpeg") and "fast_jpeg_resize" not in args
    if "progress" in state and (names != ["script", "model"] or scales_otherwise):
        raise CheckpointError(
            f"resume={resumed}: a version before the commit {FIRST_VERSION} wrote the checkpoint: check out "
            f"{FIRST_VERSION}, which resumes it, or {_start_from(resumed, script)}"
        )


def _require_setting(file: str, name: str, value: Any) -> None:
    """Raises CheckpointError if a recorded setting can't be the value of a flag, or would run a command."""
    if value is not None and not fits(name, value):
        raise CheckpointError(f"{file}: its recorded {name}, {str(value)[:80]}, is invalid")
    if name == "dataset" and runs_code(str(value)):
        raise CheckpointError(f"{file} records a `dataset` that runs code: give {in_words({'dataset': value})}")


def restore_run(
    resumed: str,
    output_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: dict[str, Any],
    progress: Progress,
    callbacks: Sequence["Stateful"] = (),
) -> None:
    """Restores model, optimizer, scaler, random number generators, callbacks and position from a checkpoint.

    Args:
        resumed: the path of a checkpoint, or "auto" for the newest checkpoint in `output_dir`, if any.
        settings: settings of this run. A warning names those that differ from the settings in the checkpoint.

    Raises:
        CheckpointError: the file can't be read, contains weights only, or has another architecture, effective batch
            size, or a setting that can't change within a run.
    """
    resumed = parallel.from_rank_0(lambda: run_directory.chosen(output_dir, resumed))
    state = read_newest(output_dir) if resumed == "auto" else sharded_state.read(resumed)
    if state is not None:
        _require_known_version(state, resumed, settings.get("script", ""))
        saved = encoders.renamed(state["args"])
        missing = {"optimizer", "epoch", *(["model"] if "folder" not in state else [])} - state.keys()
        if missing:
            what = " and no ".join(sorted(missing))
            remedy = _start_from(resumed, settings.get("script", ""))
            raise CheckpointError(f"resume={resumed}: the file contains no {what}: {remedy}")
        if "folder" in state:
            state = sharded_state.fill(state, model, optimizer)
        else:
            remedy_text = f"resume from an earlier checkpoint {ELSEWHERE}"
            checkpoint.require_finite(state["model"], f"resume={resumed}", remedy_text)
        restore_model(model, state, settings, resumed)
        _require_same_meaning(saved, settings)
        require_same_optimizer(optimizer, state)
        restore_progress(progress, state)
        if settings.get("cache_features") and progress.first_iteration:
            _require_same_processes(state["progress"], saved)
        restore_optimizer(optimizer, state["optimizer"])
        if scaler.is_enabled() and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        _restore_callbacks(callbacks, state.get("callbacks", []))
        _restore_rng(state.get("rng", {}))
        _warn_of_changes(saved, settings)
    if len(set(parallel.gather((progress.epoch, progress.first_iteration)))) > 1:
        raise CheckpointError(
            f"resume={resumed}: the processes found different checkpoints; give all of them the same file"
        )
    if resumed != "auto" and parallel.is_main():  # after all processes have accepted the checkpoint
        run_directory.record_start(output_dir, Path(resumed))


def read_newest(output_dir: Path) -> dict[str, Any] | None:
    """Reads the newest undamaged checkpoint in a folder, the same one in all processes.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read.
        OSError: the system can't read a checkpoint.
    """
    paths, names = parallel.from_rank_0(  # an error of rank 0 reaches all processes
        lambda: (run_directory.newest_first(output_dir), [path.name for path in run_directory.checkpoints(output_dir)])
    )
    for path in paths:
        try:
            state = sharded_state.read(path)
        except CheckpointError as error:
            if parallel.is_main():  # the error is the same in all processes
                logger.warning(f"resume=auto skips {path.name}: {error}")
            continue
        logger.info(f"resuming from {path}")
        return state
    if names:
        raise CheckpointError(
            f"resume=auto: {output_dir} contains {', '.join(names[:3])}, and none of its checkpoints can be read"
        )
    logger.info(f"resume=auto: no checkpoint in {output_dir}, starting from the beginning")
    return None


def _start_from(file: str, script: str) -> str:
    """Returns the remedy for a checkpoint that can't be resumed."""
    if file == "auto":
        return ANOTHER_FOLDER
    name = "init_from" if script == "main_pretrain" else "finetune"
    return f"{name}={file} instead of `resume` starts from its weights"


def restore_model(
    model: torch.nn.Module, state: dict[str, Any], settings: dict[str, Any], resumed: str = "auto"
) -> None:
    """Loads all weights of a checkpoint.

    Args:
        settings: settings of this run. The error message names those that differ from the checkpoint.
        resumed: as in `restore_run`.

    Raises:
        CheckpointError: the checkpoint has another architecture.
    """
    saved = state["args"]
    fitted = fit(model, Weights(state["model"], saved, "", resumed), exact=True)
    differing = sorted(fitted.missing | fitted.unexpected)
    if differing:
        _require_same_data(saved, settings)
        of_model = [*(name for name in names_of(ModelSpec) if name in REBUILDS), *FIXED]
        of_model += ["blr"] if isinstance(saved.get("blr"), list) else []  # several heads
        differing_settings = _differing(of_model, saved, settings)
        is_known = differing_settings and ("script" in saved or "model" not in differing_settings)
        remedy = advice(differing_settings) if is_known else _start_from(resumed, settings.get("script", ""))
        raise CheckpointError(
            f"the checkpoint has another architecture than the model of this run: {len(differing)} tensors differ, "
            f"such as {', '.join(differing[:3])}: {remedy}"
        )


def _require_same_meaning(saved: dict[str, Any], settings: dict[str, Any]) -> None:
    saved = {"updates_per_epoch": None, **saved}  # None, in a checkpoint without it: one pass over the images
    _require_same(FIXED, saved, settings)
    digests = [values.get("start_digest") for values in (saved, settings)]
    if None not in digests and settings.get("preserve") and digests[0] != digests[1]:
        raise CheckpointError(
            f"init_from={settings['init_from']} is not the file from which the run started, and whose features "
            f"`preserve` keeps: give that file"
        )
    _require_same_data(saved, settings)


def _require_same(names: Iterable[str], saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if different := _differing(names, saved, settings):
        before, now = (
            in_words({name: values[name] for name in different if values[name] is not None}) or "the defaults"
            for values in (saved, settings)
        )
        raise CheckpointError(
            f"the run of the checkpoint had {before}, and this run has {now}, which can't change within a run: "
            f"{advice(different)}"
        )


def _require_same_data(saved: dict[str, Any], settings: dict[str, Any]) -> None:
    if different := _differing(OF_DATA, saved, settings):
        names = " and ".join(different).replace("_", " ")
        raise CheckpointError(f"the resumed run had other {names}: give the data of that run")


def _differing(names: Iterable[str], saved: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recorded values of settings that both have and that differ, in the order of the names."""
    both = [name for name in names if name in saved and name in settings]
    return {name: saved[name] for name in both if differs(name, saved[name], settings[name])}


def require_same_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises CheckpointError if an optimizer has other parameters than that of a checkpoint, or is another one.

    Checkpoints do not record its class. The settings of Adam and of SGD or LARS differ.
    """
    saved = state["optimizer"]["param_groups"]
    ours = optimizer.param_groups
    sizes, our_sizes = ([len(group["params"]) for group in groups] for groups in (saved, ours))
    if sizes != our_sizes:
        raise CheckpointError(
            f"the parameter groups of the optimizer have {our_sizes} tensors, and in the checkpoint {sizes}: train the "
            f"same blocks and positions (`unfreeze_blocks`, `learned_pos_embed`), and build the groups as before"
        )
    for name in ("betas", "momentum"):
        if (name in saved[0]) != (name in ours[0]):
            raise CheckpointError(
                f"the run of the checkpoint had another optimizer: its {name} "
                f"{'are' if name in saved[0] else 'are not'} set: {ANOTHER_FOLDER}"
            )


def _require_same_processes(position: dict[str, Any], saved: dict[str, Any]) -> None:
    """Within an epoch of `feature_files.FeatureBatches`, the remaining images depend on the number of processes."""
    before = position["effective_batch_size"] // (saved["batch_size"] * saved["accum_iter"])
    now = parallel.world_size()
    if before != now:
        raise CheckpointError(
            f"the checkpoint is in the middle of an epoch on stored features, of which each process has a part: start "
            f"{counted(before, 'process')}, and not {now}"
        )


def restore_progress(progress: Progress, state: dict[str, Any]) -> None:
    """Restores the position of a checkpoint. Files of the published code are at the end of their epoch.

    Raises:
        CheckpointError: the effective batch size differs; or within an epoch, the images differ.
    """
    saved = state.get("progress")
    factors: list[Any] = [state["args"].get(name) for name in BATCH_FACTORS]
    published = math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None
    batch = saved["effective_batch_size"] if saved else published
    if batch not in (None, progress.effective_batch_size):
        raise CheckpointError(
            f"the checkpoint was trained with an effective batch size of {batch} (`batch_size` x `accum_iter` x "
            f"processes), and this run has {progress.effective_batch_size}"
        )
    if saved is None:
        progress.epoch = state["epoch"] + 1
        return
    num_images = saved["num_images"]
    images_done = saved["images_done"]
    if images_done % progress.effective_batch_size:
        raise CheckpointError(
            f"the checkpoint is {images_done} images into its epoch, within an update of "
            f"{progress.effective_batch_size}: resume from the checkpoint of a complete epoch {ELSEWHERE}"
        )
    images = saved.get("images", {})  # those of FIRST_VERSION have none
    if None not in (num_images, progress.num_images) and num_images != progress.num_images:
        if images_done:
            raise CheckpointError(
                f"the checkpoint is in the middle of an epoch of {num_images} images, and now there are "
                f"{progress.num_images}: resume from the checkpoint of a complete epoch {ELSEWHERE}"
            )
        logger.warning(f"an epoch had {num_images} images, and has {progress.num_images} now")
    elif changed := [kind for kind in _changed(images, progress.images) if kind != VALIDATION]:
        what = " and ".join(changed)
        if images_done:
            raise CheckpointError(
                f"the checkpoint is in the middle of an epoch, and the {what} of its images have changed since: give "
                f"the same images and labels in the same order, or resume from the checkpoint of a complete epoch "
                f"{ELSEWHERE}"
            )
        logger.warning(f"the {what} of the training images have changed since the last epoch")
    progress.best_accuracy = saved["best_accuracy"]
    progress.selection = saved.get("selection", {})
    if VALIDATION in _changed(images, progress.images):
        logger.warning(
            "the validation images or their labels have changed: their scores can't be compared with earlier ones, and "
            "checkpoint-best.pth is selected anew, from the next evaluation on"
        )
        progress.forget_best()
    progress.epoch = saved["epoch"]
    progress.first_iteration = images_done // progress.global_batch_size
    progress.meters = saved["meters"]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the kinds of digests of a `fingerprint` that both have and that differ."""
    return [kind for kind, digest in before.items() if now.get(kind, digest) != digest]


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the state of an optimizer and the entries of its groups. OF_THIS_START keep the values of this start."""
    groups = [
        {**ours, **{name: value for name, value in group.items() if name not in OF_THIS_START}}
        for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def placed(value: Any, parameter: torch.Tensor) -> Any:
        is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return parallel.placed_as(value, parameter) if is_moment else value

    state = {
        number: {name: placed(value, parameters[number]) for name, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _restore_callbacks(callbacks: Sequence["Stateful"], states: list[dict[str, Any]]) -> None:
    if len(callbacks) != len(states):
        raise CheckpointError(
            f"the checkpoint contains the state of {len(states)} callbacks, and this run has {len(callbacks)}"
        )
    for callback, state in zip(callbacks, states, strict=True):
        callback.load_state_dict(state)


def _restore_rng(rng: dict[str, torch.Tensor]) -> None:
    if "cpu" in rng:
        torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _warn_of_changes(saved: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, before in _differing(sorted(saved.keys() - FREE), saved, settings).items():
        logger.warning(
            f"`{name}` was {as_yaml(before)} in the resumed run, and is {as_yaml(settings[name])} from now on"
        )
    unknown = sorted(saved.keys() - settings.keys() - FREE)
    if unknown:
        names = ", ".join(f"{name} ({str(saved[name])[:40]})" for name in unknown)
        logger.warning(f"the checkpoint has settings that this script does not know, and they have no effect: {names}")
