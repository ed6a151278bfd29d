"""Outputs of the web page `app.py`: pictures and texts, computed from a model and an uploaded file.

`check` reports an unusable upload. For such a file, all other functions return empty outputs.
"""

import base64
import html
import io
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from mae.data.decode import Picture, size_of
from mae.data.item import Item
from mae.data.transforms import scaled_transform
from mae.evaluate import pictures
from mae.inference import maps
from mae.inference.model import Autoencoder, Model, Segmenter
from mae.inference.reconstruct import psnr, reconstruct, uncropped_input
from mae.inference.segment import class_name, class_shares
from models_mae import Reconstruction

MAX_PIXELS = 25_000_000  # of an upload; decoding takes a few times 4 bytes for each
MAX_ASPECT = 4  # long side divided by short side; the memory of the model grows with its square
MAX_SEED = 2**32 - 1
MAX_SIDE = 512  # maximum short side of an image that is segmented at its own size, in pixels
MIN_SIDE = 320  # minimum short side of a displayed picture in pixels; smaller ones are enlarged
THUMBNAIL = (128, 128)  # pixels of an example's picture
MAX_CLASSES = 12  # class names in the description of a classifier
CHANNELS = {1: "gray", 3: "RGB"}
# The panels of a reconstruction, in the order of `Reconstruction`.
PANELS = ("original", "visible patches", "reconstruction", "reconstruction + visible")


def describe(model: Model) -> str:
    """Returns the name, input, patches and classes of a model as HTML."""
    settings, (height, width) = model.settings, model.patch_embed.img_size
    p, q = model.patch_embed.patch_size
    channels = CHANNELS.get(model.in_chans, f"{model.in_chans} channels")
    text = (
        f"<b>{html.escape(settings['model'])}</b>: input {width} × {height} pixels, {channels}; "
        f"{model.patch_embed.num_patches} patches of {q} × {p} pixels"
    )
    if settings["nb_classes"]:
        names = model.classes or [f"class {label}" for label in range(settings["nb_classes"])]
        rest = ", …" if len(names) > MAX_CLASSES else ""
        text += f"; {len(names)} classes: {html.escape(', '.join(names[:MAX_CLASSES]))}{rest}"
    return text


def check(model: Model, photo: str | None) -> str:
    """Returns the error message of an unusable file as HTML, without its folder, or an empty text."""
    try:
        if photo is not None:
            _open(model, photo)
        return ""
    except (ValueError, OSError) as error:
        return _alert(str(error).replace(str(photo), Path(str(photo)).name))


def draw_mask(model: Autoencoder, photo: str | None, ratio: float, seed: int | None) -> list[Any]:
    """Masks random patches of an image.

    Args:
        seed: random seed of the mask; None, the value of an empty field, is 0.

    Returns:
        The values of the mask editor, by name; the pictures of PANELS; their caption as HTML.
    """
    picture = open_usable(model, photo)
    if picture is None:
        return [{"value": "", "picture": ""}, *[None] * len(PANELS), _without_image(photo)]
    return _random_mask(model, reconstruct(model, picture, ratio, seed or 0), seed or 0)


def another_mask(model: Autoencoder, photo: str | None, ratio: float, seed: int | None, masked: str) -> list[Any]:
    """Returns the next seed whose random mask is not `masked`, and the results of `draw_mask` for this seed."""
    picture, seed = open_usable(model, photo), seed or 0
    if picture is None:
        return [seed, *draw_mask(model, photo, ratio, seed)]
    while True:  # an image with few patches has few masks, which repeat
        seed = (seed + 1) % (MAX_SEED + 1)
        result = reconstruct(model, picture, ratio, seed)
        if _indices(result) != _parse(masked):
            return [seed, *_random_mask(model, result, seed)]


def apply_mask(model: Autoencoder, photo: str | None, masked: str) -> list[Any]:
    """Masks given patches of an image.

    Args:
        masked: indices of the masked patches in row-major order, separated by spaces.

    Returns:
        The pictures of PANELS; their caption or an error message as HTML.
    """
    picture = open_usable(model, photo)
    if picture is None:
        return [*[None] * len(PANELS), _without_image(photo)]
    imgs = uncropped_input(model, picture)
    rows, columns = model.patch_embed.grid_of(*imgs.shape[2:])
    try:
        indices = _parse(masked)
        if not indices <= set(range(rows * columns)):
            raise ValueError("the mask does not belong to this image; unmask all patches")
        if len(indices) == rows * columns:
            raise ValueError("all patches are masked, and the encoder needs one: unmask a patch")
    except ValueError as error:
        return [*[None] * len(PANELS), _alert(str(error))]
    mask = torch.zeros(1, rows * columns)
    mask[0, list(indices)] = 1
    return _reconstruction(model, model.reconstruct(imgs, mask=mask), "by you")


class AttentionMap(NamedTuple):
    """An attention map that the page offers."""

    name: str
    model: Model
    weights: Callable[[Model, torch.Tensor], torch.Tensor]  # of all heads or queries (B, heads or Q, rows, columns)
    number: int | None  # of the head or query; None: the mean of all


def attention_maps(model: Model, classifier: Model | None) -> list[AttentionMap]:
    """Returns the maps of a model's class token and of the queries of an attentive probe."""
    block: Any = model.blocks[-1]
    heads = range(block.attn.num_heads)
    offered = [AttentionMap("mean of all heads", model, maps.attention, None)]
    offered += [AttentionMap(f"head {index + 1}", model, maps.attention, index) for index in heads]
    if classifier is not None and classifier.head_pools:
        head: Any = classifier.head
        offered.append(AttentionMap("mean of all queries", classifier, maps.query_attention, None))
        for index in range(len(head.pool.queries)):
            offered.append(AttentionMap(f"query {index + 1}", classifier, maps.query_attention, index))
    return offered


def look_inside(model: Model, photo: str | None, attention: AttentionMap) -> list[Any]:
    """Computes maps of an image.

    Returns:
        The image; its attention map; the principal components; the legend of the attention as HTML.
    """
    picture, attended_picture = open_usable(model, photo), open_usable(attention.model, photo)
    if picture is None or attended_picture is None:
        return [None, None, None, ""]
    imgs, attended = uncropped_input(model, picture), uncropped_input(attention.model, attended_picture)
    of_all = attention.weights(attention.model, attended)[0]
    weights = of_all.mean(dim=0) if attention.number is None else of_all[attention.number]
    image, bright = maps.overlay(model, imgs[0]), maps.overlay(attention.model, attended[0], weights)
    colors = Image.fromarray((maps.components(model, imgs)[0] * 255).byte().numpy())
    images = (image, bright, colors.resize(image.size, Image.Resampling.NEAREST))
    legend = (
        f'<p class="scale">0 %<i></i>{100 * float(weights.max()):.1f} %</p>'
        f"<p>Share of the attention that a patch gets: bright patches get most.</p>"
    )
    return [*(enlarge(image) for image in images), legend]


def classify(classifier: Model, photo: str | None) -> dict[str, float] | None:
    """Returns the five most likely classes with their scores. Of classes with one name, the most likely is returned."""
    picture = open_usable(classifier, photo)
    if picture is None:
        return None
    pixels = classifier.transform(picture)[None].to(classifier.cls_token.device)
    (prediction,) = classifier.predict(classifier.normalize(pixels))
    return dict(reversed(prediction["top"]))  # two classes of ImageNet-1K are named crane


def segment(model: Segmenter, photo: str | None, opacity: float) -> list[Any]:
    """Predicts the class of each pixel.

    Args:
        opacity: of the classes over the image, from 0 to 1.

    Returns:
        The image with the colors of the classes; the classes with their colors and shares as HTML.
    """
    picture = open_usable(model, photo)
    if picture is None:
        return [None, ""]
    short_side = model.short_side or min(*size_of(picture), MAX_SIDE)
    pixels = model.normalize(scaled_transform(short_side)(Item(picture)).image.to(model.cls_token.device))
    classes = model.segment(pixels)
    image = to_image(model, pixels[None]).convert("RGB")
    colors = Image.fromarray(model.colors[classes]).resize(image.size, Image.Resampling.NEAREST)
    covered = Image.fromarray(model.colors[classes].any(axis=2)).resize(image.size, Image.Resampling.NEAREST)
    # Black is transparent, as in `mae.inference.segment.overlay`.
    swatches = [f"rgb{tuple(map(int, color))}" if color.any() else "none" for color in model.colors]
    rows = "".join(
        f'<li><i style="background: {swatches[label]}"></i>'
        f"{html.escape(class_name(model, label))}: {100 * share:.1f} %</li>"
        for label, share in class_shares(classes)
    )
    blended = Image.composite(Image.blend(image, colors, opacity), image, covered)
    return [_unique(blended), f'<ul class="legend">{rows}</ul>']


def open_usable(model: Model, photo: str | None) -> Picture | None:
    """Opens an image; returns None for None and for a file that `check` reports."""
    try:
        return None if photo is None else _open(model, photo)
    except (ValueError, OSError):
        return None


def thumbnail(model: Model, picture: Picture) -> str:
    """Returns an image, as the model gets it, as a URL that contains its pixels."""
    return _data_url(ImageOps.fit(to_image(model, uncropped_input(model, picture)), THUMBNAIL))


def to_image(model: Model, batch: torch.Tensor) -> Image.Image:
    """Converts the input of a model (1, c, H, W) to a picture with a short side of at least MIN_SIDE."""
    pixels = pictures.tile([batch], model.normalize.inverse)
    return enlarge(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _open(model: Model, photo: str) -> Picture:
    """Opens an image; raises ValueError or OSError if it can't be read, is too large or too narrow."""
    picture = model.open(photo, MAX_PIXELS)
    height, width = size_of(picture)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{photo}: the aspect ratio of {width} x {height} pixels exceeds {MAX_ASPECT} to 1; crop the image"
        )
    return picture


def _without_image(photo: str | None) -> str:
    """Returns the caption of empty panels: `check` has not reported a file that was deleted later."""
    is_deleted = photo is not None and not Path(photo).exists()
    return _alert("the upload was deleted, as all are after an hour; upload it again") if is_deleted else ""


def _alert(text: str) -> str:
    return f'<p class="alert" role="alert">{html.escape(text)}</p>'


def _parse(masked: str) -> set[int]:
    return {int(index) for index in masked.split()}


def _indices(result: Reconstruction) -> set[int]:
    return set(result.mask[0].nonzero()[:, 0].tolist())


def _random_mask(model: Autoencoder, result: Reconstruction, seed: int) -> list[Any]:
    """Returns the results of `draw_mask`."""
    rows, columns = model.patch_embed.grid_of(*result.original.shape[2:])
    picture = _data_url(to_image(model, result.original))
    masked = " ".join(map(str, sorted(_indices(result))))
    editor = {"value": masked, "picture": picture, "rows": rows, "columns": columns}
    return [editor, *_reconstruction(model, result, f"at random with seed {seed}")]


def _reconstruction(model: Autoencoder, result: Reconstruction, origin: str) -> list[Any]:
    """Returns the pictures of PANELS and their caption."""
    count = int(result.mask.sum())
    text = f"<p><b>{count} of {result.mask.numel()} patches are masked</b>, {origin}.</p>"
    if count:
        with torch.inference_mode():
            loss = model(result.original, mask=result.mask)[0]
        text += (
            f"<p>Masked patches: loss <b>{loss:.4f}</b> (mean squared error, lower is better), "
            f"PSNR <b>{psnr(model, result):.2f} dB</b> (higher is better). {pictures.NOTE}</p>"
        )
    if count and model.norm_pix_loss:
        text += (
            "<p>This model predicts normalized patches. They have the mean and std of the original patches here.</p>"
        )
    return [*(to_image(model, part) for part in result[: len(PANELS)]), text]


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def enlarge(image: Image.Image) -> Image.Image:
    scale = math.ceil(MIN_SIDE / min(image.size))
    return _unique(image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST))


def _unique(image: Image.Image) -> Image.Image:
    """Makes the file of a picture unique: gradio names it by its contents, and rewrites it while others load it."""
    image.info["id"] = uuid.uuid4().hex
    return image
