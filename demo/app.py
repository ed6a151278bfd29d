"""A web page for trained models: reconstruction of uploaded images, attention maps, features and classes.

    python demo/app.py --model mae_visualize_vit_large --classifier mae_finetuned_vit_base
    python demo/app.py --model demo/output/pretrain/checkpoint-0.pth --samples my/pictures

The page is served at http://127.0.0.1:7860, to this computer only. SPACE.md describes public hosting.
"""

import argparse
import base64
import html
import io
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import; the page needs no network
sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import util  # noqa: F401  # first: it names missing packages

# isort: split
try:
    import gradio as gr
except ImportError:
    sys.exit('the web page requires the package gradio: pip install ".[app]"')
import torch
from PIL import Image

from inference import maps
from inference.model import Autoencoder, Classifier, Model, get_model, open_image
from inference.reconstruct import TITLES, psnr, reconstruct, uncropped_input
from models_mae import Reconstruction
from util import dist
from util.cli import entry_point, flags, options
from util.data.decode import SUFFIXES, Picture, size_of
from util.evaluation import pictures
from util.masking import num_visible

SAMPLES = Path(__file__).parent / "photos"
MAX_BYTES = 10 * 2**20  # of an upload
MAX_ASPECT = 4  # long side divided by short side; the memory of the model grows with its square
CONCURRENCY, MAX_QUEUE = 2, 100  # requests that run at once, and requests that wait
CACHE_SECONDS = 3600  # seconds until uploads are deleted
MIN_SIDE = 320  # minimum short side of a displayed picture in pixels; smaller ones are enlarged
RATIOS = [step / 20 for step in range(1, 20)]
MAX_SEED = 2**32 - 1
FONT = ("system-ui", "sans-serif")
HINT = "Upload an image above, or choose an example."
STYLE = ".panel [data-testid=block-label] {position: static; width: max-content; margin-bottom: 4px}"

# The picture on which a user marks patches with a brush. Its value is the indices of the masked patches in row-major
# order. The browser sends indices, not a drawing, so there is no image to decode.
PAINTING: dict[str, Any] = {
    "html_template": """<p>Draw here to mask patches. A stroke that starts on a masked patch unmasks patches.</p>
        <canvas width="0" height="0"></canvas><button>Clear the mask</button>""",
    "css_template": """
        canvas {display: block; max-width: 100%; max-height: 400px; margin: 8px auto; touch-action: none;
                cursor: crosshair}
        button {width: 100%; padding: 6px; border-radius: 6px; cursor: pointer;
                background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color)}""",
    "js_on_load": """
        const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d"), photo = new Image();
        let masked = new Set(), masking = null, last = null;
        function draw() {
            const {picture, rows, columns} = props, side = picture ? Math.ceil(480 / Math.max(rows, columns)) : 0;
            [canvas.width, canvas.height] = [columns * side, rows * side];
            if (!picture) return;
            pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
            pen.fillStyle = "rgb(79 70 229 / 80%)";
            masked.forEach(n => pen.fillRect(n % columns * side, Math.floor(n / columns) * side, side, side));
        }
        function stroke(event) {  // starts at the last position, because a fast pointer skips patches
            const {rows, columns} = props, box = canvas.getBoundingClientRect();
            const here = [(event.clientX - box.x) / box.width * columns, (event.clientY - box.y) / box.height * rows];
            const from = last ?? here, steps = Math.ceil(8 * Math.hypot(here[0] - from[0], here[1] - from[1])) || 1;
            for (let step = 0; step <= steps; step++) {
                const [x, y] = from.map((start, axis) => Math.floor(start + (here[axis] - start) * step / steps));
                if (x < 0 || y < 0 || x >= columns || y >= rows) continue;
                masking ??= !masked.has(y * columns + x);
                masking ? masked.add(y * columns + x) : masked.delete(y * columns + x);
            }
            last = here;
            draw();
        }
        function finish() {
            masking = last = null;
            props.value = [...masked].join(" ");
            trigger("input");
        }
        canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); stroke(event); };
        canvas.onpointermove = event => last && stroke(event);
        canvas.onpointerup = canvas.onpointercancel = finish;
        element.querySelector("button").onclick = () => { masked.clear(); draw(); finish(); };
        photo.onload = draw;
        watch(["value", "picture"], () => {
            masked = new Set(props.value.split(" ").filter(Boolean).map(Number));
            photo.src = props.picture;
            if (!props.picture) draw();
        });""",
}


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser(
        "Serves a web page for a trained model: reconstructions, attention maps, features and classes."
    )
    options.add_inference_options(parser, images=False)
    parser.add_argument("--classifier", metavar="FILE", help="classifier for the classes, given like --model")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="network address; 0.0.0.0 accepts all hosts"
    )
    parser.add_argument("--port", default=7860, type=flags.positive_int, metavar="N", help="network port")
    parser.add_argument("--samples", default=SAMPLES, type=Path, metavar="FOLDER", help="folder of example images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    if not args.samples.is_dir():
        raise ValueError(f"--samples: there is no folder {args.samples}")
    device = dist.choose_device(args.device)
    model = get_model(args.model, pretrained=True, device=device)
    classifier = get_model(args.classifier, pretrained=True, device=device) if args.classifier else None
    page = build(model, classifier, sorted(args.samples.iterdir()))
    try:
        serve(page, args.host, args.port)
    except OSError as error:
        raise ValueError(f"can't serve at --host {args.host} --port {args.port} ({error}); give another") from error


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serves a page until it is interrupted. By default, gradio's environment variables set host and port."""
    page.launch(server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=gr.themes.Soft(font=FONT), css=STYLE,
                footer_links=[], ssr_mode=False)  # fmt: skip


def build(model: Model, classifier: Model | None = None, samples: Sequence[Path] = ()) -> gr.Blocks:
    """Builds the page for `serve`.

    Args:
        model: an autoencoder, an encoder or a classifier; only an autoencoder has the tab for reconstruction.
        classifier: model for the classes (default: `model`, if it is a classifier).
        samples: example images; other files are ignored.

    Raises:
        ValueError: the classifier has no classification head.
    """
    if classifier is None and model.settings["nb_classes"]:
        classifier = model
    if classifier is not None and not classifier.settings["nb_classes"]:
        raise ValueError(
            f"--classifier: {classifier.settings['model']} has no classification head; give a fine-tuned file"
        )
    chosen = [str(file) for file in samples if file.suffix.lower() in SUFFIXES]
    gr.set_static_paths(chosen)  # gradio rejects other files outside of the working directory
    with gr.Blocks(title="Masked autoencoder", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown("# Masked autoencoder\nMask parts of an image, reconstruct them, and inspect the model.")
        with gr.Row():
            photo = gr.File(label="Your image", file_types=list(SUFFIXES), height=150, min_width=320)
            sample = gr.Dataset(
                label="Examples", components=[gr.Image(render=False)], samples=[[file] for file in chosen]
            )
        sample.click(lambda values: values[0], sample, photo, api_visibility="private")
        opened: Callable[..., Any] = photo.change
        if isinstance(model, Autoencoder):
            with gr.Tab("Reconstruct"):
                opened = _reconstruct_tab(model, photo)
        with gr.Tab("Look inside"):
            _inside_tab(model, classifier, photo, opened)
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=CONCURRENCY)


def _reconstruct_tab(model: Autoencoder, photo: gr.File) -> Callable[..., Any]:
    """Adds the tab; returns the event listener that runs after an image was opened."""
    largest = max(ratio for ratio in RATIOS if num_visible(model.num_patches, ratio))
    with gr.Row():
        painting: Any = gr.HTML("", picture="", rows=1, columns=1, container=True, padding=True, **PAINTING)
        with gr.Column():
            ratio = gr.Slider(RATIOS[0], largest, min(0.75, largest), step=RATIOS[0], label="Mask ratio")
            seed = gr.Number(0, label="Seed of the random mask", precision=0, minimum=0, maximum=MAX_SEED)
            again = gr.Button("Another mask")
            caption = gr.Markdown(HINT)
    with gr.Row():
        panels = [_panel(title) for title in TITLES]
    inputs, answer = [photo, ratio, seed], [*panels, caption]
    again.click(lambda: random.randint(1, 9999), None, seed, api_visibility="private")
    gr.on([ratio.change, seed.change, painting.input], partial(paint, model), [*inputs, painting], answer,
          api_name="paint", trigger_mode="always_last", concurrency_id="models", show_progress="minimal",
          show_progress_on=panels)  # fmt: skip
    return photo.change(partial(open_photo, model), inputs, [painting, *answer], api_visibility="private",
                        concurrency_id="models", show_progress_on=panels).success  # fmt: skip


def _inside_tab(model: Model, classifier: Model | None, photo: gr.File, opened: Callable[..., Any]) -> None:
    block: Any = model.blocks[-1]
    heads = ["mean of all heads", *(f"head {number + 1}" for number in range(block.attn.num_heads))]
    head = gr.Dropdown(heads, type="index", label="Attention of the class token in the last block")
    with gr.Row():
        panels = [_panel(title) for title in ("attention", "principal components of the features")]
        inputs, view = [photo, head], partial(look_inside, model)
        head.change(view, inputs, panels, api_name="look_inside", trigger_mode="always_last", concurrency_id="models")
        opened(view, inputs, panels, api_visibility="private", concurrency_id="models")
        if classifier is not None:
            classes = gr.Label(label="classes")
            opened(partial(classify, classifier), photo, classes, api_name="classify", concurrency_id="models")


def _panel(title: str) -> gr.Image:
    return gr.Image(label=title, format="png", buttons=["download"], min_width=200, elem_classes="panel")


def report_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the error message of an unusable image in the page, without the folder of the upload."""

    @wraps(function)
    def wrapper(model: Model, photo: str | None, *settings: Any) -> Any:
        try:
            return function(model, photo, *settings)
        except (ValueError, OSError) as error:
            text = str(error).replace(str(photo), Path(photo or "").name)
            raise gr.Error(html.escape(text), print_exception=False) from None

    return wrapper


@report_errors
def open_photo(model: Autoencoder, photo: str | None, ratio: float, seed: int | None) -> list[Any]:
    """Opens a new image: returns the picture for the brush, and the results of `paint`."""
    if photo is None:
        return [gr.HTML("", picture=""), *[None] * len(TITLES), HINT]
    result = _reconstruct(model, photo, ratio, seed)
    rows, columns = model.patch_embed.grid_of(*result.original.shape[2:])
    stream = io.BytesIO()
    _image(model, result.original).save(stream, "JPEG", quality=92)
    picture = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return [gr.HTML("", picture=picture, rows=rows, columns=columns), *_outputs(model, result, f"by seed {seed or 0}")]


@report_errors
def paint(model: Autoencoder, photo: str | None, ratio: float, seed: int | None, masked: str) -> list[Any]:
    """Reconstructs an image: returns the four pictures and a caption with loss and PSNR.

    Args:
        seed: seed of the random mask; None, the value of an empty field, is 0.
        masked: indices of the masked patches. If there are any, ratio and seed have no effect.
    """
    if photo is None:
        return [*[None] * len(TITLES), HINT]
    origin = "with the brush; clear the mask to use ratio and seed" if masked else f"by seed {seed or 0}"
    return _outputs(model, _reconstruct(model, photo, ratio, seed, masked), origin)


@report_errors
def look_inside(model: Model, photo: str | None, head: int) -> list[Image.Image | None]:
    """The attention of the class token (0: mean of all heads), and the principal components of the features."""
    if photo is None:
        return [None, None]
    imgs = uncropped_input(model, _open(model, photo))
    attention = maps.attention(model, imgs)[0]
    bright = maps.overlay(model, imgs[0], attention[head - 1] if head else attention.mean(dim=0))
    colours = Image.fromarray((maps.components(model, imgs)[0] * 255).byte().numpy())
    return [_enlarge(bright), _enlarge(colours.resize(bright.size, Image.Resampling.NEAREST))]


@report_errors
def classify(classifier: Classifier, photo: str | None) -> dict[str, float] | None:
    """The five most likely classes with their scores."""
    return None if photo is None else dict(classifier.predict(photo)["top"])


def _open(model: Model, photo: str) -> Picture:
    """Opens an image; raises ValueError if its aspect ratio is too large."""
    picture = open_image(photo, model.in_chans)
    height, width = size_of(picture)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{photo}: the aspect ratio of {width} x {height} pixels exceeds {MAX_ASPECT} to 1; crop the image"
        )
    return picture


def _reconstruct(model: Autoencoder, photo: str, ratio: float, seed: int | None, masked: str = "") -> Reconstruction:
    picture = _open(model, photo)
    if not masked:
        return reconstruct(model, picture, ratio, seed or 0)
    imgs = uncropped_input(model, picture)
    rows, columns = model.patch_embed.grid_of(*imgs.shape[2:])
    numbers = {int(number) for number in masked.split()}
    if not numbers <= set(range(rows * columns)):
        raise ValueError("the mask does not belong to this image; clear it")
    mask = torch.zeros(1, rows * columns)
    mask[0, list(numbers)] = 1
    return model.reconstruct(imgs, mask=mask)


def _outputs(model: Autoencoder, result: Reconstruction, origin: str) -> list[Any]:
    with torch.inference_mode():
        loss = model(result.original, mask=result.mask)[0]
    text = (
        f"**{int(result.mask.sum())} of {result.mask.numel()} patches are masked**, chosen {origin}.\n\n"
        f"Loss of the masked patches: **{loss:.4f}** · PSNR: **{psnr(model, result):.2f} dB**"
    )
    if model.norm_pix_loss:
        text += (
            "\n\nThis model predicts normalized patches; they are shown with the mean and std of the original patches."
        )
    return [*(_image(model, part) for part in result[: len(TITLES)]), text]


def _image(model: Autoencoder, batch: torch.Tensor) -> Image.Image:
    """Batch (1, c, H, W) to a Pillow image."""
    pixels = pictures.tile([batch], model.normalize.inverse)
    return _enlarge(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _enlarge(image: Image.Image) -> Image.Image:
    scale = math.ceil(MIN_SIDE / min(image.size))
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
