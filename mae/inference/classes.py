"""Models with their preprocessing and class names."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor

import mae.build
import mae.probes
import models_mae
import models_segment
import models_vit
from mae.data import extra_inputs, transforms
from mae.data.batches import to_device
from mae.data.decode import decode_item
from mae.data.item import Item
from mae.data.loader import collate
from mae.data.pixels import MAX_PIXELS, BadImage, PixelValues, size_of, to_tensor
from mae.data.segmentation_masks import default_colors
from mae.evaluate.imagenet import imagenet_classes
from mae.evaluate.segmentation import predict_classes
from mae.files.untrusted import read_file
from mae.pooling import OF_PROBE, OF_TIMM, Pooling, pooled, pooling_of
from mae.reconstruction import Reconstruction
from mae.settings import specs
from mae.settings.choices import BOTH, CLASS_TOKEN, CLASSIFICATION, MULTILABEL, PATCHES, POOL_CHOICES
from mae.sizes import to_pair
from mae.training.precision import Precision
from mae.weights.candidates import some
from mae.weights.shapes import require_settings
from models_timm import TimmEncoder

logger = logging.getLogger(__name__)

NOT_IN_FEATURES = ("head.", "decoder_", "mask_token")  # weights that the features of an encoder do not depend on
ImageLike = str | Path | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]


class ModelMixin(PyTorchModelHubMixin):
    """Adds transform, normalization, class names and predictions to a model.

    Attributes:
        preprocess: a decoded item -> an item of tensors, scaled and cropped as in evaluation.
        normalize: a batch of such tensors -> the input of the model.
        classes: class names of a classifier, by label; those of ImageNet for 1000 classes without names.
        settings: the settings that the model is built from.
        pooling: how features are pooled by default.
        encoder: the mix-in of `with_encoder`.
        network: the class of the model without its preprocessing.
        values: the meaning of the values in image files.
        initial: some values of each weight as the constructor has set them, by name.
    """

    in_chans: int
    pooling: Pooling
    classes: list[str] | None
    head_pools = False  # as in `VisionTransformer`
    encoder: ClassVar[type[models_vit.Encoder] | None] = None
    network: ClassVar[type[models_vit.Encoder]]

    def _set_up(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        mae.build.add_updates(self, specs(settings)[0])  # type: ignore[arg-type]
        self.pooling = pooling_of(settings)
        self.in_chans = settings["in_chans"]
        self.values = PixelValues(settings.get("nodata"), settings.get("value_range"), settings.get("channels_last"))
        self.preprocess = transforms.eval_transform(
            settings["input_size"], settings.get("crop_pct"), settings.get("crop"), settings.get("interpolation")
        )
        statistics = transforms.channel_statistics(self.in_chans, settings.get("mean"), settings.get("std"))
        self.normalize = transforms.Normalize(*statistics)
        self.classes = settings.get("classes") or settings.get("label_names")
        self.initial = {
            name: _some_values(weight)
            for name, weight in self.named_parameters()  # type: ignore[attr-defined]
            if weight.requires_grad and not weight.is_meta
        }
        self.eval()  # type: ignore[attr-defined]

    @contextmanager
    def evaluating(self, *unused: str) -> Iterator[None]:
        """Sets the evaluation mode for a result of the model. Random weights that it depends on have one warning.

        Args:
            unused: as in `_warn_of_random_weights`.
        """
        self._warn_of_random_weights(unused)
        with models_vit.evaluation_mode(self):  # type: ignore[arg-type]
            yield

    def autocast(self, amp: str | None) -> AbstractContextManager[None]:
        """The context of a forward pass in a precision.

        Args:
            amp: as --amp: bf16, fp16, tf32, off (fp32), or auto (bf16 on CUDA, fp16 on older GPUs). None, and auto on
                other devices, in an autocast context and for weights of another type than fp32: the precision of the
                caller.

        Raises:
            ValueError: `amp` is unknown, or the device does not support it.
        """
        weight = next(self.parameters())  # type: ignore[attr-defined]
        is_open = weight.is_cuda and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
        if amp is None or (amp == "auto" and not is_open):
            return nullcontext()
        return Precision(amp, weight.device).autocast()

    def _warn_of_random_weights(self, unused: tuple[str, ...]) -> None:
        """Logs one warning if weights still have the random values of the constructor: nothing was loaded or trained.

        Args:
            unused: beginnings of the names of weights that the result does not depend on.
        """
        random = self.random_weights(*unused)
        self.initial = {} if random else {name: self.initial[name] for name in self.initial if name.startswith(unused)}
        if random:
            logger.warning(
                f"{self.settings['model']} has random weights ({some(random)}), on which the result depends: load them "
                f"(get_model(..., pretrained=True), or a file that has them) or train them"
            )

    def random_weights(self, *unused: str) -> list[str]:
        """Returns the names of weights that still have the random values of the constructor, until a warning says so.

        Args:
            unused: as in `_warn_of_random_weights`.
        """
        weights = dict(self.named_parameters())  # type: ignore[attr-defined]
        used = [name for name in self.initial if not name.startswith(unused) and name in weights]
        return [name for name in used if _are_random(self.initial[name], weights[name])]

    @classmethod
    def _from_pretrained(cls, **arguments: Any) -> Any:
        """Loads all weights. By default, huggingface_hub ignores missing and unexpected ones."""
        return super()._from_pretrained(**{"strict": True, **arguments})

    def prepare(self, images: Images, channels_last: bool | None = None) -> Tensor:
        """Images of any kind -> the input of the model (B, c, H, W), on its device.

        Args:
            images: an image or a list of images: paths and images of Image.open (the orientation in EXIF data is
                applied); other Pillow images, such as rotated or converted ones (their pixels are unchanged); arrays
                (H, W), (H, W, c) or (c, H, W); tensors (c, H, W) or (B, c, H, W). uint8 tensors are pixels, like
                arrays. Float tensors are the input of the model, and normalized already. The result has the type of
                the weights.
            channels_last: whether arrays are (H, W, c) or (c, H, W). Default: as in the run of the model, else the axis
                of the channels is the one with their number.

        Raises:
            ValueError: the list is empty, or mixes float tensors with other images.
            BadImage: an image can't be decoded, has another number of channels than the model, or is an array of which
                two axes may be the channels.
            OSError: a file can't be read.
        """
        return self.inputs(images, {}, channels_last)[0]

    def inputs(
        self, images: Images, inputs: dict[str, Any], channels_last: bool | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and their extra inputs -> the input of the model (B, c, H, W) and tensors by name, on its device.

        An extra input of the size of its picture (H, W) is a map, to which the transform of the picture is applied.

        Raises:
            ValueError, BadImage, OSError: as in `prepare`, or an extra input does not have a value for each image.
        """
        weight = next(self.parameters())  # type: ignore[attr-defined]
        device = weight.device
        several: Any = images if _are_several(images) else [images]
        if not len(several):
            raise ValueError("the list of images is empty; give at least one image")
        are_inputs = {isinstance(image, Tensor) and image.is_floating_point() for image in several}
        if are_inputs == {True, False}:
            raise ValueError(
                "the list mixes float tensors, which are the input of the model, with other images, which are "
                "normalized; give float tensors only, or none"
            )
        values = extra_inputs.by_name(inputs, len(several), _are_several(images))
        if are_inputs == {True}:
            x = torch.stack(list(several))
            self.normalize.check_input(x)
            x = x.to(device)
        else:
            items = [self.decode(image, channels_last=channels_last, reduces=not values) for image in several]
            for item in items:
                if not (isinstance(item.image, Tensor) and item.image.is_floating_point()):
                    self.normalize.require_fit_to_bytes()  # another image may turn the bytes into floats
            batch = collate([self.preprocess(_with_inputs(item, values, index)) for index, item in enumerate(items)])
            batch = to_device(batch, device)
            x = batch.normalized(self.normalize)
            values = dict(batch.inputs)
        return x.to(weight.dtype), {name: value.to(device) for name, value in values.items()}

    def transform(self, picture: Any) -> Tensor:
        """Returns a decoded picture as in an evaluation: scaled and cropped, uint8 or float (c, H, W)."""
        return self.preprocess(self.decode(picture)).image

    def open(self, image: ImageLike, max_pixels: int = MAX_PIXELS, channels_last: bool | None = None) -> Any:
        """Decodes an image to a picture with the channels of the model, as `decode`.

        Invalid pixels are NaN in a float tensor, from 0 to 1.
        """
        item = self.decode(image, max_pixels, channels_last)
        if item.valid is None:
            return item.image
        return transforms.to_unit_range(to_tensor(item.image)).masked_fill(~item.valid, torch.nan)

    def decode(
        self, image: ImageLike, max_pixels: int = MAX_PIXELS, channels_last: bool | None = None, reduces: bool = False
    ) -> Item:
        """Decodes an image to a picture with the channels of the model, and its valid pixels.

        The orientation in its EXIF data is applied, unless the model was trained with --no_exif.

        Args:
            image: an image as in `prepare`. Float tensors are pictures of this method: from 0 to 1, NaN is invalid.
            max_pixels: limit of the pixels of a file, which is checked before they are decoded.
            channels_last: as in `prepare`.
            reduces: read large pictures at a reduced size, as in training.

        Raises:
            BadImage, OSError: as in `prepare`.
        """
        values = self.values if channels_last is None else self.values._replace(channels_last=channels_last)
        upright = self.settings.get("exif") is not False
        options: dict[str, Any] = {"upright": upright, "max_pixels": max_pixels, "reduces": reduces}
        if isinstance(image, str | Path):
            try:
                return decode_item(Item(read_file(image)), self.in_chans, values=values, **options)
            except BadImage as error:
                raise BadImage(f"{image}: {error}") from error
        if isinstance(image, Tensor) and image.is_floating_point():
            values = PixelValues(None if values.nodata is None else "nan")
        return decode_item(Item(image), self.in_chans, values=values, **options)

    @torch.inference_mode()
    def predict(
        self, images: Images, topk: int = 5, *, channels_last: bool | None = None, amp: str | None = None, **inputs: Any
    ) -> Any:
        """Predicts the classes of images, or their numbers.

        Args:
            images: as in `prepare`.
            topk: number of classes in `top`.
            channels_last: as in `prepare`.
            amp: as in `autocast`. The results are fp32.
            inputs: extra inputs of the model by name: for a list of images, a value for each image (B, ...). Maps of a
                picture have its size (H, W), and follow its scaling and crop.

        Returns:
            For an image, a dict. Of a classifier: pred_label (the most likely label), pred_class (its name), pred_score
            (its probability), pred_scores (the probabilities of all classes, an array), classes (their names, in the
            same order), and top (the `topk` most likely classes as (name, probability)). With --task multilabel:
            pred_labels and pred_classes (the labels with a probability of at least 0.5, and their names), pred_scores,
            classes and top. With --task regression: pred_values (an array, in units) and values (by name). For a list
            of images, a list of such dicts.

        Raises:
            ValueError: the model has no classification head, or as in `autocast`.
            BadImage, OSError: as in `prepare`.
        """
        if not (isinstance(self, Classifier) and self.settings["nb_classes"]):
            raise ValueError(f"{self.settings['model']} has no classification head here: give a fine-tuned file")
        x, inputs = self.inputs(images, inputs, channels_last)
        with self.evaluating(), self.autocast(amp):
            outputs = self(x, **inputs).float().cpu()  # type: ignore[operator]
        task = self.settings.get("task", CLASSIFICATION)
        if task == CLASSIFICATION:
            predictions = self._likely_classes(outputs.softmax(dim=1), topk)
        elif task == MULTILABEL:
            predictions = self._likely_classes(outputs.sigmoid(), topk)
            for one in predictions:
                one |= {"pred_labels": [label for label, score in enumerate(one["pred_scores"]) if score >= 0.5]}
                one |= {"pred_classes": [self._class_name(label) for label in one["pred_labels"]]}
                del one["pred_label"], one["pred_class"], one["pred_score"]
        else:
            units = ("target_mean", "target_std")
            require_settings(self.settings, units, "the file of the model", "it predicts numbers; train a head")
            values = outputs.double().numpy() * self.settings["target_std"] + self.settings["target_mean"]
            names = [self._class_name(number) for number in range(values.shape[1])]
            predictions = [
                {"pred_values": row, "values": dict(zip(names, row.tolist(), strict=True))} for row in values
            ]
        return predictions if _are_several(images) else predictions[0]

    def _class_name(self, label: int) -> str:
        return self.classes[label] if self.classes else f"class {label}"

    def _likely_classes(self, scores: Tensor, topk: int) -> list[dict[str, Any]]:
        best = scores.topk(min(topk, scores.shape[1]))
        classes = [self._class_name(label) for label in range(scores.shape[1])]  # two of ImageNet-1K are named crane
        predictions = []
        for row, labels, shares in zip(scores, best.indices.tolist(), best.values.tolist(), strict=True):
            names = [classes[label] for label in labels]
            predictions.append({
                "pred_label": labels[0], "pred_class": names[0], "pred_score": shares[0], "pred_scores": row.numpy(),
                "classes": classes, "top": list(zip(names, shares, strict=True)),
            })  # fmt: skip
        return predictions

    def extract_feat(
        self, images: Images, pool: str | None = None, *, channels_last: bool | None = None,
        requires_grad: bool = False, amp: str | None = None, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Computes features of images in evaluation mode. No patch is masked.

        Args:
            images: as in `prepare`.
            pool: "cls": the class token, or the mean of several; "avg": the mean of the patch tokens; "both": the two,
                each of unit length; "tokens": all tokens, class tokens first. Default: `pooling`, the rule of
                `mae.pooling.pooling_of`.
            channels_last: as in `prepare`.
            requires_grad: compute gradients of the weights, and of images that require them. To train the encoder, call
                `compute_features`, which also has the mode of the model.
            amp: as in `autocast`. The features have the type of the weights.
            inputs: as in `predict`.

        Returns:
            (B, D); (B, 2 D) for "both"; or (B, T + N, D) for "tokens", with T class tokens.

        Raises:
            ValueError: `pool` is unknown, or a classifier with `global_pool` has no norm for it; or as in `autocast`.
            BadImage, OSError: as in `prepare`.
        """
        with self.evaluating(*NOT_IN_FEATURES), torch.set_grad_enabled(requires_grad):
            x, inputs = self.inputs(images, inputs, channels_last)
            with self.autocast(amp):
                features = self.compute_features(x, pool, **inputs)
            return features if amp is None else features.to(x.dtype)

    def compute_features(self, x: Tensor, pool: str | None = None, **inputs: Tensor) -> Tensor:
        """The features of normalized images (B, c, H, W) and their extra inputs (B, ...), with gradients, in the mode
        of the model; otherwise as `extract_feat`.
        """
        if pool not in (None, *POOL_CHOICES, "tokens"):
            raise ValueError(f"pool={pool!r}: give {', '.join(POOL_CHOICES)} or tokens")
        name = pool or self.pooling.name
        if name in (CLASS_TOKEN, BOTH) and self.settings.get("global_pool"):
            raise ValueError(f"pool={name}: a classifier with `global_pool` has no norm of this token; omit `pool`")
        if name == OF_PROBE:
            return self.head.pool(self.forward_features(x, **inputs))  # type: ignore[attr-defined]
        if name == OF_TIMM or (name == PATCHES and self.settings.get("global_pool")):  # normalized after pooling
            return self.forward_features(x, **inputs)  # type: ignore[attr-defined]
        tokens = self.get_intermediate_layers(x, **inputs)[0]  # type: ignore[attr-defined]
        return tokens if name == "tokens" else pooled(self, tokens, name)


class Autoencoder(ModelMixin, models_mae.MaskedAutoencoderViT):
    """A masked autoencoder with its preprocessing."""

    network = models_mae.MaskedAutoencoderViT

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**mae.build.autoencoder_arguments(*specs(settings), self.encoder))
        self._set_up({**settings, "nb_classes": 0, "global_pool": False})

    def reconstruct(self, *args: Any, amp: str | None = None, **options: Any) -> Reconstruction:
        """As `MaskedAutoencoderViT.reconstruct`, in the precision `amp`, as in `autocast`. The results have the type of
        the images.
        """
        with self.evaluating(), self.autocast(amp):
            return super().reconstruct(*args, **options)


class Classifier(ModelMixin, models_vit.VisionTransformer):
    """A classifier with its preprocessing; with 0 classes, an encoder."""

    network: ClassVar[type[models_vit.Encoder]] = models_vit.VisionTransformer
    arguments = staticmethod(mae.build.classifier_arguments)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**self.arguments(*specs(settings), self.encoder))
        if settings.get("probe") and settings["nb_classes"]:
            mae.probes.set_probe_head(self, specs(settings)[0])
        elif not settings["nb_classes"]:
            self.pools_both = settings.get("pool") == BOTH
        self._set_up(settings)
        if not self.classes and self.num_classes == 1000:
            self.classes = imagenet_classes()


class TimmClassifier(Classifier, TimmEncoder):
    """A model of timm with its preprocessing, and perhaps the head of a probe."""

    network = TimmEncoder
    arguments = staticmethod(mae.build.timm_arguments)


class Segmenter(ModelMixin, models_segment.Segmenter):
    """A segmentation model with its preprocessing.

    Attributes:
        colors: colors of the classes in pictures, uint8 (classes, 3): the palette of the run, or VOC's.
    """

    colors: np.ndarray
    network = models_segment.Segmenter

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**mae.build.segmenter_arguments(*specs(settings), self.encoder))
        self._set_up(settings)
        self.window = to_pair(settings["input_size"])
        recorded = settings.get("short_side")
        self.short_side = min(self.window) if recorded is None else recorded
        colors = settings.get("colors") or default_colors(self.num_classes)
        self.colors = np.array(colors, dtype=np.uint8).reshape(-1, 3)

    @torch.inference_mode()
    def segment(
        self, images: Images, batch_size: int = 8, *, channels_last: bool | None = None, amp: str | None = "auto",
        **inputs: Any,
    ) -> Any:  # fmt: skip
        """Predicts the class of each pixel, by windows over the scaled image, as in evaluation.

        Args:
            images: as in `prepare`, of any sizes.
            batch_size: number of windows in a batch.
            channels_last: as in `prepare`.
            amp: as in `autocast`.
            inputs: as in `predict`.

        Returns:
            For an image, the classes of its pixels, uint8 (H, W) in the size of the image. For a list of images, a list
            of such arrays.

        Raises:
            ValueError: as in `autocast`.
            BadImage, OSError: as in `prepare`.
        """
        several: Any = images if _are_several(images) else [images]
        inputs = extra_inputs.by_name(inputs, len(several), _are_several(images))
        results = []
        with self.evaluating():
            for index, image in enumerate(several):
                of_image = {name: value[index : index + 1] for name, value in inputs.items()}
                results.append(self._segment_one(image, batch_size, of_image, channels_last, amp))
        return results if _are_several(images) else results[0]

    def _segment_one(
        self, image: ImageLike, batch_size: int, inputs: dict[str, Tensor], channels_last: bool | None, amp: str | None
    ) -> np.ndarray:
        def predict(windows: Tensor, **inputs: Tensor) -> Tensor:
            with self.autocast(amp):
                return self(windows, **inputs).float()

        device = self.pos_embed.device
        if isinstance(image, Tensor) and image.is_floating_point():
            if image.ndim != 3 or len(image) != self.in_chans:
                raise BadImage(
                    f"a float tensor {tuple(image.shape)} is not the input of the model, ({self.in_chans}, H, W); "
                    f"uint8 tensors are pixels"
                )
            self.normalize.check_input(image)
            pixels = image.to(device)
            size = (image.shape[1], image.shape[2])
        else:
            item = self.decode(image, channels_last=channels_last)
            size = size_of(item.image)
            batch = to_device(collate([transforms.scaled_transform(self.short_side)(item)]), device)
            pixels = batch.normalized(self.normalize)[0]
        pixels = pixels.to(self.pos_embed.dtype)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return predict_classes(predict, pixels, size, self.window, batch_size, inputs).to(torch.uint8).cpu().numpy()


Model = Autoencoder | Classifier | Segmenter


def _some_values(weight: Tensor) -> Tensor:
    values = weight.detach().flatten()
    return values[:: 1 + len(values) // 64].float().cpu().clone()


def _are_random(initial: Tensor, weight: Tensor) -> bool:
    """Whether a weight has its initial values, up to a conversion to half precision, and they are no constant."""
    values = _some_values(weight)
    is_same = values.shape == initial.shape and torch.allclose(values, initial, rtol=0.01, atol=1e-6)
    return is_same and bool(initial.min() < initial.max())


def _with_inputs(item: Item, values: dict[str, Tensor], index: int) -> Item:
    """Returns an item with its inputs of a batch. Those of the size of its picture are maps."""
    if not values:
        return item._replace(inputs={})
    from torchvision import tv_tensors  # takes more than a second

    inputs = {name: value[index] for name, value in values.items()}
    size = size_of(item.image)
    return item._replace(inputs={
        name: tv_tensors.Image(value) if value.shape == size else value for name, value in inputs.items()
    })  # fmt: skip


def _are_several(images: Any) -> bool:
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
