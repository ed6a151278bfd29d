"""The rules of a recipe that continues an encoder: what differs from pre-training from scratch.

Khanna et al. 2025 (ExPLoRA, arXiv 2406.10973) continue ViT-B and ViT-L on images of another kind, with the loss of
their own pre-training: the last block is trained, and low-rank updates of queries and values. Rates and lengths are not
published.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mae.encoders import user_code_of
from mae.recommend import rules
from mae.recommend.rules import Line
from mae.weights import model_settings, reading, shapes, timm_models
from mae.weights.model_zoo import FULL, row_settings
from models_mae import DECODERS, size_of

RANK = 64  # as published
MIN_WIDTH = 384  # channels of the smallest released encoders; rank 64 is not low in a narrower one
OF_FILE = ("mean", "std")  # the run takes them from the file
OF_RECORD = ("value_range", "hflip")  # the run takes them from a file that records them
RATE = "of four rates, twice that from scratch was best on letters, in 128 channels (docs/start_from.md)"
MINUTES = 30  # of a recipe if no time is given: what continuing needs was not measured
MEASUREMENTS = 5  # of the start and of later states
EPOCHS = 5  # that fit the time, for each measurement: it takes about as long as one of them


class Start(NamedTuple):
    """What the rules know about the file of an encoder."""

    name: str  # as it is given
    size: str  # a key of `models_vit.SIZES`, which determines the decoder
    width: int  # channels of a token
    patch_size: tuple[int, int]
    in_chans: int
    decoder_depth: int | None  # of the decoder in the file
    trained_by: str  # as `reading.Weights.trained_by`
    settings: Mapping[str, Any]  # those of its training that are known

    @property
    def rank(self) -> int | None:
        """Returns the rank of the updates: that of the file, if it has any. None: all weights are trained."""
        return self.settings.get("lora") or (RANK if self.width >= MIN_WIDTH else None)


def read(name: str) -> Start:
    """Reads what a recipe takes from weights: a file, a folder or a name.

    Raises:
        CheckpointError: they can't be read.
        ValueError: there are no such weights, or a recipe can't name their encoder.
    """
    file = reading.read(name)
    timm_models.require_other(str(file.settings.get("model")))
    if encoder := user_code_of(file.settings).get("encoder"):
        raise ValueError(f"init_from={name}: it has an encoder of your own, and a recipe can't name encoder={encoder}")
    settings = model_settings.file_settings(file)
    sizes = {key: tensor.shape for key, tensor in file.tensors.items()}
    width, _ = shapes.width_and_depth(sizes)
    _, in_chans, rows, columns = sizes[shapes.PATCHES]
    return Start(
        name=name,
        size=size_of(settings["model"]),
        width=width,
        patch_size=(rows, columns),
        in_chans=in_chans,
        decoder_depth=settings.get("decoder_depth") if file.kind == FULL else None,
        trained_by=file.trained_by,
        settings={**row_settings(name), **file.settings},
    )


def lines(scratch: list[Line], start: Start) -> list[Line]:
    """Returns the settings of model, images, loss and optimization.

    Args:
        scratch: those of images, loss and optimization from scratch.
    """
    left_out = {*OF_FILE, *(name for name in OF_RECORD if start.settings.get(name) is not None)}
    changed = {line.name: line for line in _loss_lines(start)}
    kept = [changed.get(line.name, line) for line in scratch if line.name not in left_out]
    return [*_model_lines(start), *(_published(line, RATE) if line.name == "lr" else line for line in kept)]


def _model_lines(start: Start) -> list[Line]:
    """Returns the settings of the model: what is trained, and the decoder."""
    of_file = "the encoder, its patches, channels, mean and std are those of the file"
    if start.rank:
        trained = [
            Line("init_from", start.name, of_file),
            Line("lora", start.rank, "the rank of the file" if start.settings.get("lora") else "as in ExPLoRA"),
            Line(
                "unfreeze_blocks", 1, "as in ExPLoRA; final norm and decoder are trained, too, and the rest is frozen"
            ),
        ]
    else:
        reason = (
            f"all weights are trained: updates of rank {RANK} are not low in {start.width} channels, and of rank 16, "
            f"they had 2 to 3 points less k-NN in 128 channels (docs/start_from.md)"
        )
        trained = [Line("init_from", start.name, f"{of_file}; {reason}")]
    depth = start.decoder_depth
    if depth:
        return [*trained, Line("decoder_depth", depth, "the decoder of the file")]
    depth = DECODERS[start.size]["decoder_depth"]
    return [*trained, Line("decoder_depth", depth, "a new decoder, as from scratch: the file has none")]


def _loss_lines(start: Start) -> list[Line]:
    """Returns the settings of the loss, which are those of the training of the file, and the optimizer."""
    as_before = "as in the training of the file"
    lines = []
    if (is_normalized := start.settings.get("norm_pix_loss")) is not None:
        lines.append(Line("norm_pix_loss", is_normalized, as_before))
    weight = start.settings.get("uniformity") or 0.0
    reason = as_before if weight else f"{as_before}; it was measured from random weights only"
    if start.trained_by:
        reason = f"{start.trained_by}'s loss has trained and spread the class token; measured from random weights only"
    lines.append(Line("uniformity", weight, reason))
    if start.rank:
        return [*lines, Line("optimizer", "adamw", "Muon is for matrices, and was measured from random weights only")]
    is_muon = start.settings.get("optimizer") == "muon"
    return [*lines, Line("optimizer", "muon" if is_muon else "adamw", as_before)]


def length_lines(
    images_per_epoch: int, images_per_s: float, startup: float, seconds: float, is_labelled: bool
) -> list[Line]:
    """Returns the settings of `rules.length_lines`, and whether the start and later states are measured.

    Args:
        is_labelled: the images have classes, as k-NN needs them.
    """
    epoch = images_per_epoch / images_per_s
    count = min(MEASUREMENTS, int((seconds - startup) / (EPOCHS * epoch))) if is_labelled else 0
    if count < 2:
        count = 0
    epochs, *others = rules.length_lines(images_per_epoch, images_per_s, startup + count * epoch, seconds)
    if count:
        reason = (
            "k-NN of the start and of later states: checkpoint-best.pth is the best, and never worse than the start"
        )
        measured = Line("probe_every", math.ceil(epochs.value / (count - 1)), reason)
    else:
        why = "there is no time for it" if is_labelled else "the images have no classes"
        remedy = "with `probe_path`, few labelled images, checkpoint-best.pth is never worse than the start"
        measured = Line("probe_every", 0, f"k-NN does not measure the start, because {why}; {remedy}")
    return [_published(epochs, "it is chosen, and not measured"), *others, measured]


def _published(line: Line, text: str) -> Line:
    return line._replace(reason=f"{line.reason}. ExPLoRA publishes none: {text}")
