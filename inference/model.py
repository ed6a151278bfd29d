"""From a name or a file to a model that is ready for use, with all that belongs to it.

>>> import torch
>>> from inference import get_model
>>> model = get_model("vit_mini_patch4", nb_classes=10)
>>> model.predict(torch.zeros(3, 40, 40, dtype=torch.uint8))["pred_scores"].shape
(10,)
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor

import models_build
import models_mae
import models_vit
from util.checkpoints.checkpoint import CheckpointError
from util.cli.advice import did_you_mean
from util.data import transforms
from util.data.decode import BadImage, decode
from util.files.untrusted import read_file
from util.weights import loading, model_zoo
from util.weights.loading import Weights
from util.weights.model_zoo import CLASSIFIER, FULL

ImageLike = str | Path | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]

ARCHITECTURES = {**models_mae.MODELS, **models_vit.MODELS}


class ModelMixin(PyTorchModelHubMixin):
    """Transform, normalization, class names and predictions, for models that are ready to use.

    Attributes:
        transform: a decoded picture -> uint8 (c, H, W), as in evaluation.
        normalize: a batch of those -> the model's input.
        classes: a classifier's, by label; ImageNet's for 1000 classes without names.
        settings: those that the model is built from.
    """

    in_chans: int
    classes: list[str] | None

    def _set_up(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.in_chans = settings["in_chans"]
        self.transform = transforms.eval_transform(settings["input_size"], settings.get("crop_pct"))
        statistics = transforms.channel_statistics(self.in_chans, settings.get("mean"), settings.get("std"))
        self.normalize = transforms.Normalize(*statistics)
        self.classes = settings.get("classes") or settings.get("label_names")
        self.eval()  # type: ignore[attr-defined]

    def prepare(self, images: Images) -> Tensor:
        """Images of any kind -> the model's input (B, c, H, W), on its device.

        Args:
            images: one, or a list. Paths, of photographs too that lie on their side; Pillow pictures; arrays (H, W),
                (H, W, c) or (c, H, W); tensors (c, H, W) or (B, c, H, W): uint8 ones are pixels as arrays are, float
                ones are taken for the model's input, as `model(images)` takes them.

        Raises:
            BadImage: one is no image, or has other channels than the model.
            OSError: a file can't be read.
        """
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        several: Any = images if _are_several(images) else [images]
        if len(several) and all(isinstance(image, Tensor) and image.is_floating_point() for image in several):
            return torch.stack(list(several)).to(device)
        pixels = [self.transform(open_image(image, self.in_chans)) for image in several]
        return self.normalize(torch.stack(pixels).to(device))

    @torch.inference_mode()
    def predict(self, images: Images, topk: int = 5) -> Any:
        """Classifies images, as `prepare` takes them.

        Returns:
            For an image, a dict: pred_label (the most likely class's number), pred_class (its name), pred_score,
            pred_scores (of all classes, an array), and top, the `topk` most likely as (name, score). For a list of
            images, a list of them.

        Raises:
            ValueError: the model has no head.
        """
        if not self.settings["nb_classes"]:
            raise ValueError(
                f"{self.settings['model']} is an encoder without a classification head: take a fine-tuned file, or "
                f"train a head with main_finetune.py or main_linprobe.py"
            )
        scores = self(self.prepare(images)).float().softmax(dim=1).cpu()  # type: ignore[operator]
        predictions = [self._prediction(row, topk) for row in scores]
        return predictions if _are_several(images) else predictions[0]

    def _prediction(self, scores: Tensor, topk: int) -> dict[str, Any]:
        best = scores.topk(min(topk, len(scores)))
        names = [self.classes[label] if self.classes else f"class {label}" for label in best.indices.tolist()]
        top = list(zip(names, best.values.tolist(), strict=True))
        label = int(best.indices[0])
        return {"pred_label": label, "pred_class": names[0], "pred_score": top[0][1], "pred_scores": scores.numpy(),
                "top": top}  # fmt: skip

    def extract_feat(self, images: Images, pool: str | None = None) -> Tensor:
        """Features of images, as `prepare` takes them; nothing is masked.

        Args:
            pool: "cls", the class token; "avg", the mean of the patch tokens; "tokens", all of them, class token first;
                by default what the model's own head is for, the class token where there is none.

        Returns:
            (B, D), or (B, N + 1, D) of tokens.
        """
        x = self.prepare(images)
        pooled = self.settings.get("global_pool", False)
        pool = pool or ("avg" if pooled else "cls")
        if pooled and pool == "avg":  # its mean is normalised after pooling
            return self.forward_features(x)  # type: ignore[attr-defined]
        if pool not in ("cls", "avg", "tokens"):
            raise ValueError(f"pool={pool!r}: give cls, avg or tokens")
        tokens = self.get_intermediate_layers(x)[0]  # type: ignore[attr-defined]
        return {"cls": tokens[:, 0], "avg": tokens[:, 1:].mean(dim=1), "tokens": tokens}[pool]


class Autoencoder(ModelMixin, models_mae.MaskedAutoencoderViT):
    """A masked autoencoder, ready for use."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**models_build.autoencoder_arguments(settings))
        self._set_up({**settings, "nb_classes": 0})


class Classifier(ModelMixin, models_vit.VisionTransformer):
    """A classifier, or of no classes an encoder, ready for use."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**models_build.classifier_arguments(settings))
        if settings.get("probe"):
            self.head = models_build.probe_head(self.embed_dim, settings["nb_classes"])
        self._set_up(settings)
        if not self.classes and self.num_classes == 1000:
            self.classes = imagenet_classes()


Model = Autoencoder | Classifier


@cache
def imagenet_classes() -> list[str]:
    """The names of ImageNet-1K's classes, by label."""
    from timm.data import ImageNetInfo  # takes more than a second

    info = ImageNetInfo()
    return [info.index_to_description(label) for label in range(1000)]


def open_image(image: ImageLike, in_chans: int) -> Any:
    """A decoded picture of `in_chans` channels, the right way up; raises as `ModelMixin.prepare` does."""
    if isinstance(image, str | Path):
        try:
            return decode(read_file(image), in_chans, upright=True)
        except BadImage as error:
            raise BadImage(f"{image}: {error}") from error
    return decode(image, in_chans, upright=True)  # type: ignore[arg-type]


def list_models(pattern: str = "*") -> list[str]:
    """The names that `get_model` accepts: architectures and published weights, also those that were only announced.

    Args:
        pattern: with * for anything, such as "vit-*_mae-*".
    """
    return [name for name in sorted({*ARCHITECTURES, *model_zoo.TABLE}) if fnmatchcase(name, pattern)]


def get_model(
    name: str | Path, pretrained: bool | str | Path = False, device: str | torch.device = "cpu", **settings: Any
) -> Autoencoder | Classifier:
    """A model in evaluation mode.

    Args:
        name: an architecture, a published name (`list_models` has both), a checkpoint file, or a folder of
            transformers. A file is always loaded, and determines the architecture.
        pretrained: for a name, whether to load its weights; of an architecture's published ones the fine-tuned for
            vit_*, those with decoder for mae_vit_*. Or whose weights: a published name or a file.
        settings: what of the model is to be different, by the flags' names: input_size, patch_size, in_chans,
            nb_classes, global_pool, norm_pix_loss, mean, std, classes.

    Raises:
        ValueError: an unknown name, one whose weights were never released or can't be downloaded, an unknown setting.
        CheckpointError: the file is damaged, or does not hold the requested model.
    """
    unknown = settings.keys() - set(models_build.MODEL_SETTINGS)
    if unknown:
        known = ", ".join(models_build.MODEL_SETTINGS[1:])
        raise ValueError(f"get_model has no setting {min(unknown)}; it has {known}")
    name = str(name)
    if name in ARCHITECTURES:
        name = ARCHITECTURES[name].__name__  # the published code has second names
    if Path(name).exists():
        return _load(loading.read(name), None, settings).to(device)
    if name not in ARCHITECTURES and name not in model_zoo.TABLE:
        near = did_you_mean(name, list_models(), model_zoo.SIMILAR)
        raise ValueError(f"there is no file, model or published weights {name}{near}")
    architecture = name if name in ARCHITECTURES else model_zoo.TABLE[name].model
    if pretrained is False:
        return _class_of(architecture)(_settings(architecture, {**_of_row(name), **settings})).to(device)
    source = _published_for(name) if pretrained is True else str(pretrained)
    return _load(loading.read(source), None if source == name else architecture, settings).to(device)


def inference_model(
    model: str | Path | Classifier, image: Images, device: str | torch.device = "cpu", topk: int = 5
) -> Any:
    """Classifies an image, or a list of them, with a model or its name; returns what `ModelMixin.predict` does."""
    if isinstance(model, str | Path):
        model = get_model(model, pretrained=True, device=device)  # type: ignore[assignment]
    return model.predict(image, topk)  # type: ignore[union-attr]


def _class_of(architecture: str) -> type[Autoencoder] | type[Classifier]:
    return Autoencoder if architecture.startswith("mae_") else Classifier


def _settings(architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    size = models_vit.SIZES[models_build.size_of(architecture)]
    usual = {"input_size": size.get("img_size", 224), "patch_size": None, "in_chans": 3, "norm_pix_loss": False,
             "global_pool": architecture.startswith("vit_"), "nb_classes": 1000, "mask_ratio": 0.75}  # fmt: skip
    known = {key: value for key, value in settings.items() if key in models_build.MODEL_SETTINGS}
    return {**usual, **known, "model": architecture}


def _of_row(name: str) -> dict[str, Any]:
    """The settings of a model in the table of published weights; {} if it is not there."""
    row = model_zoo.TABLE.get(name)
    if not row:
        return {}
    head = {"probe": True, "global_pool": False} if "-linear-" in name else {}
    return {"input_size": row.input_size, "norm_pix_loss": row.norm_pix_loss, **head}


def _published_for(name: str) -> str:
    """The published weights that belong to a name best."""
    if name in model_zoo.TABLE:
        return name
    size = models_build.size_of(name).partition("_")[0]
    best = f"mae_pretrain_vit_{size}_full" if name.startswith("mae_") else f"mae_finetuned_vit_{size}"
    if best not in model_zoo.TABLE:
        raise ValueError(f"no weights were published for {name}: give a file of them")
    return best


def _load(file: Weights, architecture: str | None, settings: dict[str, Any]) -> Autoencoder | Classifier:
    """A model with a file's weights: of the given architecture, or of the one that the file records."""
    recorded = models_build.file_settings(file, architecture)
    for name, value in _of_row(file.source).items():
        if name not in file.settings:
            recorded[name] = value
    architecture = recorded["model"]
    if file.kind == CLASSIFIER and "nb_classes" in settings and settings["nb_classes"] != recorded["nb_classes"]:
        recorded = {name: value for name, value in recorded.items() if name not in ("classes", "label_names")}
    merged = _settings(architecture, {**recorded, **settings})
    model = _class_of(architecture)(merged)
    if isinstance(model, Autoencoder):
        if file.kind != FULL:
            raise CheckpointError(
                f"{file.source} holds {file.kind}, no decoder, and can't reconstruct: take a file with decoder, such "
                f"as mae_visualize_vit_large, or a checkpoint of main_pretrain.py"
            )
        loading.init_mae(model, file)
    elif file.kind == CLASSIFIER and merged["nb_classes"] == recorded["nb_classes"]:
        loading.load_classifier(model, file)
    else:
        loading.load_encoder(model, file)
    return model


def _are_several(images: Any) -> bool:
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
