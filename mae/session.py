"""The start of a run: its settings, the user's code, the file that it starts from, its precision and its directory.

The scripts make their runs here, and nothing changes the settings of a run after it.
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mae.build
from mae import encoders, parallel, user_code
from mae.checkpoints import checkpoint, run_directory
from mae.cli import entry_point
from mae.data.run_data import RunData
from mae.data.source import OpenDataset
from mae.evaluate import metrics
from mae.probes import pools_tokens
from mae.settings import EVALUATE, TRAIN, DataSpec, ImageSpec, MachineSpec, ModelSpec, Run, names_with
from mae.settings.fields import LABELS
from mae.training.log import start_logging
from mae.training.lr_sched import Schedule
from mae.training.optimizers import MakeOptimizer
from mae.training.precision import Precision
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder, VisionTransformer

if TYPE_CHECKING:
    from mae.weights.reading import Weights

logger = logging.getLogger(__name__)

Start = tuple["Weights | None", dict[str, Any]]  # a file, and the settings that a run takes from it


@dataclass(frozen=True)
class Code:
    """Classes and functions of the user's code: arguments of `main`, or named by settings of the command."""

    source: OpenDataset | None = None
    model_class: Callable[..., Any] = MaskedAutoencoderViT  # or a classifier
    encoder: type[Encoder] | None = None
    optimizer: MakeOptimizer | None = None
    lr_schedule: Schedule | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def has_published_model(self, spec: ModelSpec) -> bool:
        """Whether the model is that of the paper."""
        has_own_encoder = self.encoder or spec.encoder or spec.lora
        return self.model_class is MaskedAutoencoderViT and not has_own_encoder


@dataclass
class Session:
    """A run before its data and its model are built.

    Args:
        run: the settings. They are final.
        code: the user's code.
        file: the weights to start from or to evaluate. A script may set it to None, which frees its memory.
        precision: precision and device.
        explicit: names of the settings that the command or the program has given, and that are not None.
    """

    run: Run
    code: Code
    file: "Weights | None"
    precision: Precision
    explicit: frozenset[str]

    def open_data(self, images: ImageSpec | None = None, spares_stand_in: bool = False) -> RunData:
        """Returns the data of the run. A run that resumes within an epoch has the images of its first start.

        Args:
            images: in place of those of the run.
            spares_stand_in: as in `RunData`.
        """
        machine = self.run.machine
        interrupted = partial(run_directory.interrupted_images, Path(machine.output_dir), machine.resume)
        return RunData(
            images or self.run.images, self.run.data, self.precision.device, self.code.source, interrupted,
            spares_stand_in,
        )  # fmt: skip

    def record(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what checkpoints record: the settings, and the facts, which data and model determine."""
        return self.run.changed(facts).record()


@dataclass(frozen=True)
class Use:
    """What a script does with a file of weights.

    Args:
        read: returns the file of a run, and the settings that the run takes from it.
        trains: what the script trains: "encoder", "head" of a frozen encoder, or "", nothing.
    """

    read: Callable[[Run], Start]
    trains: str = "encoder"


def settings_of(parser: ArgumentParser, args: Namespace | Run, source: OpenDataset | None = None) -> Run:
    """Returns the settings of a command, with the name of `source` as the dataset. It imports its metrics.

    Raises:
        ValueError: they have a different dataset, or a metric can't be imported.
    """
    run = entry_point.settings_of(args, parser)
    for name in run.evaluation.metric or ():
        if ":" in name:
            metrics.register(name)
    return run.changed({"dataset": user_code.dataset_of(source, run.data.dataset)}) if source else run


def open_session(
    parser: ArgumentParser, args: Namespace | Run, script: str, *, uses: Use, source: OpenDataset | None = None,
    **objects: Any,
) -> Session:  # fmt: skip
    """Starts a run: joins the process group, starts logging, seeds PyTorch, and creates the run directory.

    The settings are, in this order: those of the command, names of the user's code, those of the checkpoint from which
    the run resumes, those of the file that it uses, and its precision.

    Args:
        script: name of the script, such as "main_pretrain".
        uses: what it does with a file.
        source: the dataset of the user's code.
        objects: the other fields of `Code` that the script has. None: the one that the setting of this name names.

    Raises:
        ValueError: a setting is invalid, or the run would overwrite another one.
        CheckpointError: a file can't be read, or does not fit.
    """
    run = settings_of(parser, args, source)
    code, names = _open_code(run, source, objects)
    run = replace(run.changed(names), script=script)
    explicit = frozenset(name for name in run.names & run.explicit if run[name] is not None)
    machine = run.machine
    device = parallel.init(
        machine.device, machine.dist_url, machine.dist_timeout, machine.dist_backend, needs_group=machine.fsdp
    )
    start_logging()
    trains = "" if run.evaluation.eval else uses.trains
    if trains and machine.resume:
        from mae.training import resume

        run = run.changed(resume.resumed_settings(run.record(), run.explicit, script))
    if trains:  # before a file is read, which may take minutes
        run_directory.prepare(Path(run.machine.output_dir), run.machine.resume)
    torch.manual_seed(run.data.seed)
    file, settings = uses.read(run)
    run = run.changed(settings)
    if run.model.lora and run.model.lora_alpha is None:  # files record it
        run = run.changed({"lora_alpha": float(run.model.lora)})
    precision = Precision(run.machine.amp, device, trains == "encoder", run.machine.precision)
    run = run.changed({"precision": precision.name})
    if run.data.fast_jpeg:
        run = run.changed({"fast_jpeg_resize": DataSpec.fast_jpeg_resize})
    return Session(run, code, file, precision, explicit)


def _open_code(run: Run, source: OpenDataset | None, objects: Mapping[str, Any]) -> tuple[Code, dict[str, str]]:
    """Returns the user's code, and the names of the objects that are given, as settings."""
    names: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, given in objects.items():
        if name == "model_class":
            found[name] = mae.build.model_class_of(run.model.model_class, given)
            if given not in (MaskedAutoencoderViT, VisionTransformer):
                names[name] = getattr(given, "func", given).__qualname__
        elif given is None:
            found[name] = user_code.named_object(name, run[name])
        else:
            found[name] = given
            names[name] = encoders.name_of(given) if name == "encoder" else user_code.name_of(given)
    return Code(source, **found), names


def _initial_weights(run: Run) -> Start:
    """Reads the weights of `init_from`. A run that resumes needs them for `preserve` only."""
    resumes = _resumes(run.machine)
    if not run.machine.init_from or (resumes and not run.model.preserve):
        return None, {}
    from mae.weights import model_settings, reading, recorded_settings, timm_models

    timm_models.require_other(run.machine.init_from)  # before it is downloaded
    file = reading.read(run.machine.init_from, _rank(run))
    if resumes:
        return file, {}
    recorded = model_settings.autoencoder_settings(file)
    return file, recorded_settings.settings_of_file(file, run.record(), run.explicit, recorded, TRAIN)


def _classifier(run: Run) -> Start:
    """Reads the weights of `finetune`; with `eval`, a classifier."""
    from mae.weights import model_zoo

    return _of_kind(run, model_zoo.CLASSIFIER)


def _of_kind(run: Run, kind: str) -> Start:
    """Reads weights, and the settings that a run takes from them. Arguments as in `_weights`."""
    from mae.weights.recorded_settings import classifier_settings

    file = _weights(run, kind)
    return file, classifier_settings(file, run.record(), run.explicit, _purpose(run))


def _segmenter(run: Run) -> Start:
    """Reads the weights of `finetune`; with `eval`, a segmentation model."""
    from mae.weights.model_zoo import SEGMENTER
    from mae.weights.recorded_settings import classifier_settings

    file = _with_token_norm(_weights(run, SEGMENTER))
    return file, classifier_settings(file, run.record(), run.explicit, _purpose(run))


def _purpose(run: Run) -> str:
    return EVALUATE if run.evaluation.eval else TRAIN


def _probe(run: Run) -> Start:
    """Reads the encoder: of the checkpoint from which the run resumes, else of `finetune`; with `eval`, a probe.

    The features of a resumed run are computed before its state is loaded.
    """
    from mae.weights import model_zoo, reading, recorded_settings

    if run.evaluation.eval:
        file, settings = _of_kind(run, model_zoo.PROBE)
        _require_pooling(run, file)
        return file, settings

    file = None
    folder = Path(run.machine.output_dir)
    resumed = parallel.from_rank_0(lambda: run_directory.chosen(folder, run.machine.resume))
    for path in run_directory.newest_first(folder) if resumed == "auto" else []:
        with suppress(checkpoint.CheckpointError):  # it is skipped by the run, too, with a warning
            file = reading.read(path, _rank(run))
            break
    name = run.machine.finetune if resumed == "auto" else resumed or run.machine.finetune
    if file is None and name:
        file = reading.read(name, _rank(run))
    _require_updates(run, file)
    if not pools_tokens(run.model.probe):
        return file, _pooled(run, file, TRAIN)
    return file, recorded_settings.classifier_settings(file, run.record(), run.explicit, TRAIN)


def _features(run: Run) -> Start:
    """Reads the encoder of `finetune`. The labels are those of the data."""
    from mae.weights import reading

    file = reading.read(run.machine.finetune, _rank(run)) if run.machine.finetune else None
    _require_updates(run, file)
    return file, _pooled(run, file, EVALUATE, names_with(LABELS))


def _pooled(run: Run, file: "Weights | None", purpose: str, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Returns the settings that a file gives a run on pooled features. Arguments as in `classifier_settings`."""
    from mae.weights.recorded_settings import classifier_settings, pooling_settings

    pooling = pooling_settings(file, run.record(), run.explicit)
    run = run.changed(pooling)
    return pooling | classifier_settings(file, run.record(), run.explicit, purpose, left_out)


def _require_pooling(run: Run, file: "Weights | None") -> None:
    """Raises ValueError if another pooling is given than that of a probe, which evaluates features of its own."""
    from mae.pooling import TITLES, pooling_of
    from mae.weights.model_settings import classifier_settings

    given = run.model.pool
    if given and file and given != (name := pooling_of(classifier_settings(file)).name):
        raise ValueError(f"pool={given}: {file.origin} is a probe of the {TITLES[name]}; omit `pool`")


def _require_updates(run: Run, file: "Weights | None") -> None:
    """Raises ValueError if low-rank updates of a frozen encoder are those of no file: they are zero, and stay zero."""
    if run.model.lora and not (file and file.settings.get("lora")):
        of_file = f"{file.origin} has none of this rank" if file else "there are no updates without `finetune`"
        raise ValueError(f"lora={run.model.lora} has no effect on a frozen encoder: {of_file}; omit `lora`")


def _weights(run: Run, kind: str) -> "Weights | None":
    """Reads the weights of `finetune`, unless the run resumes; with `eval`, the model of `resume` or `finetune`.

    Args:
        kind: the kind of a file to evaluate.

    Raises:
        ValueError: with `eval`, neither names a file, or the file is of another kind.
    """
    from mae.weights import loading

    machine = run.machine
    if not run.evaluation.eval:
        starts = machine.finetune and not _resumes(machine)
        return loading.read(machine.finetune, _rank(run)) if starts else None
    name: Path | str = machine.resume or machine.finetune
    if name == "auto" and (name := _source(machine) or machine.finetune):
        logger.info(f"resume=auto: evaluates {name}")
    elif machine.resume and machine.finetune:  # a recipe may have the latter
        logger.info(f"evaluates {name}, and not finetune={machine.finetune}")
    if not name:
        raise ValueError(f"`eval` needs `resume` or `finetune`: the file of a {kind}, or a published name")
    return loading.read_classifier(name, kind, _rank(run))


def _rank(run: Run) -> int | None:
    """Returns the rank of the low-rank updates, if it is explicit."""
    return run.model.lora if "lora" in run.explicit else None


def _source(machine: MachineSpec) -> Path | None:
    return run_directory.starting_checkpoint(Path(machine.output_dir), machine.resume)


def _resumes(machine: MachineSpec) -> bool:
    return parallel.from_rank_0(lambda: _source(machine) is not None)


def _with_token_norm(file: "Weights | None") -> "Weights | None":
    """Renames the norm of the pooled patch tokens of a classifier (`fc_norm`) to `norm`, the norm of all tokens."""
    if file is None or "fc_norm.weight" not in file.tensors:
        return file
    logger.info(f"{file.origin} pools patch tokens: its norm after pooling normalizes the tokens of the head")
    return file._replace(tensors={name.replace("fc_norm.", "norm."): value for name, value in file.tensors.items()})


INITIAL_WEIGHTS = Use(_initial_weights)
CLASSIFIER = Use(_classifier)
SEGMENTER = Use(_segmenter)
PROBE = Use(_probe, trains="head")
FEATURES = Use(_features, trains="")
