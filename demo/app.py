"""A web page for trained models: masks and reconstructs a visitor's picture; attention and features; classes.

    python demo/app.py --model mae_visualize_vit_large --classifier mae_finetuned_vit_base
    python demo/app.py --model demo/output/pretrain/checkpoint-0.pth --samples my/pictures

It opens at http://127.0.0.1:7860, for this computer alone; SPACE.md describes public hosting.
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

import util  # noqa: F401  # first, as it names the packages that are missing

# isort: split
try:
    import gradio as gr
except ImportError:
    sys.exit('the web page needs the package gradio, which is not installed: pip install ".[app]"')
import torch
from PIL import Image
from torch import Tensor

from inference import maps
from inference.model import Autoencoder, Classifier, Model, get_model, open_image
from inference.reconstruct import TITLES, psnr, reconstruct, whole_input
from models_mae import Reconstruction
from util import dist
from util.cli import entry_point, flags, options
from util.data.decode import SUFFIXES, Picture, size_of
from util.evaluation import pictures
from util.masking import num_visible

SAMPLES = Path(__file__).parent / "photos"
MAX_BYTES = 10 * 2**20  # of an upload
MAX_ASPECT = 4  # long side by short side; the model's memory grows with its square
AT_WORK, WAITING = 2, 100  # requests that are worked on at once, and that queue for it
CACHE_SECONDS = 3600  # seconds until a visitor's pictures are deleted
MIN_SIDE = 320  # pixels that a picture's short side has at least; those of small models are enlarged
RATIOS = [step / 20 for step in range(1, 20)]
MAX_SEED = 2**32 - 1
FONT = ("system-ui", "sans-serif")
HINT = "Drop a picture above, or choose one."
STYLE = ".panel [data-testid=block-label] {position: static; width: max-content; margin-bottom: 4px}"

# The picture to paint on. Its value is the numbers of the hidden patches, row by row: what is painted is exactly what
# is hidden, and a visitor sends no drawing that would have to be decoded.
PAINTING: dict[str, Any] = {
    "html_template": """<p>Paint here to hide patches; a stroke that begins on a hidden one uncovers.</p>
        <canvas width="0" height="0"></canvas><button>Clear the paint</button>""",
    "css_template": """
        canvas {display: block; max-width: 100%; max-height: 400px; margin: 8px auto; touch-action: none;
                cursor: crosshair}
        button {width: 100%; padding: 6px; border-radius: 6px; cursor: pointer;
                background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color)}""",
    "js_on_load": """
        const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d"), photo = new Image();
        let hidden = new Set(), covers = null, last = null;
        function draw() {
            const {picture, rows, columns} = props, side = picture ? Math.ceil(480 / Math.max(rows, columns)) : 0;
            [canvas.width, canvas.height] = [columns * side, rows * side];
            if (!picture) return;
            pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
            pen.fillStyle = "rgb(79 70 229 / 80%)";
            hidden.forEach(n => pen.fillRect(n % columns * side, Math.floor(n / columns) * side, side, side));
        }
        function stroke(event) {  // from where the pointer was last, as a quick one leaps over patches
            const {rows, columns} = props, box = canvas.getBoundingClientRect();
            const here = [(event.clientX - box.x) / box.width * columns, (event.clientY - box.y) / box.height * rows];
            const from = last ?? here, steps = Math.ceil(8 * Math.hypot(here[0] - from[0], here[1] - from[1])) || 1;
            for (let step = 0; step <= steps; step++) {
                const [x, y] = from.map((start, axis) => Math.floor(start + (here[axis] - start) * step / steps));
                if (x < 0 || y < 0 || x >= columns || y >= rows) continue;
                covers ??= !hidden.has(y * columns + x);
                covers ? hidden.add(y * columns + x) : hidden.delete(y * columns + x);
            }
            last = here;
            draw();
        }
        function finish() {
            covers = last = null;
            props.value = [...hidden].join(" ");
            trigger("input");
        }
        canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); stroke(event); };
        canvas.onpointermove = event => last && stroke(event);
        canvas.onpointerup = canvas.onpointercancel = finish;
        element.querySelector("button").onclick = () => { hidden.clear(); draw(); finish(); };
        photo.onload = draw;
        watch(["value", "picture"], () => {
            hidden = new Set(props.value.split(" ").filter(Boolean).map(Number));
            photo.src = props.picture;
            if (!props.picture) draw();
        });""",
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = entry_point.parser(
        "Serves a web page for a trained model: reconstructions, attention maps, features and classes."
    )
    options.add_inference_options(parser, images=False)
    parser.add_argument("--classifier", metavar="FILE", help="a second model, for the classes; as --model")
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
        raise ValueError(f"can't serve at --host {args.host} --port {args.port}: take another ({error})") from error


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serves a page until it is interrupted; host and port are by default those of gradio's environment variables."""
    page.launch(server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=gr.themes.Soft(font=FONT), css=STYLE,
                footer_links=[], ssr_mode=False)  # fmt: skip


def build(model: Model, classifier: Model | None = None, samples: Sequence[Path] = ()) -> gr.Blocks:
    """The page, which `serve` serves.

    Args:
        model: without a decoder it reconstructs nothing, and the page lacks this part.
        classifier: for the classes; by default the model, if it is a classifier.
        samples: pictures to choose from; files that are none are left out.

    Raises:
        ValueError: the classifier has no classes.
    """
    if classifier is None and model.settings["nb_classes"]:
        classifier = model
    if classifier is not None and not classifier.settings["nb_classes"]:
        raise ValueError(
            f"--classifier: {classifier.settings['model']} has no classification head; take a fine-tuned file"
        )
    chosen = [str(file) for file in samples if file.suffix.lower() in SUFFIXES]
    gr.set_static_paths(chosen)  # otherwise files outside of the working directory are refused
    with gr.Blocks(title="Masked autoencoder", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown("# Masked autoencoder\nMask parts of a picture, reconstruct them, and look inside the model.")
        with gr.Row():
            photo = gr.File(label="Your picture", file_types=list(SUFFIXES), height=150, min_width=320)
            sample = gr.Dataset(
                label="or one of these", components=[gr.Image(render=False)], samples=[[file] for file in chosen]
            )
        sample.click(lambda values: values[0], sample, photo, api_visibility="private")
        opened: Callable[..., Any] = photo.change
        if isinstance(model, Autoencoder):
            with gr.Tab("Reconstruct"):
                opened = _reconstruct_tab(model, photo)
        with gr.Tab("Look inside"):
            _inside_tab(model, classifier, photo, opened)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_WORK)


def _reconstruct_tab(model: Autoencoder, photo: gr.File) -> Callable[..., Any]:
    """Returns what takes the events that follow once a picture could be opened."""
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
    heads = ["mean of all", *(f"head {number + 1}" for number in range(block.attn.num_heads))]
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


def in_sentences(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Tells a visitor what is wrong with the picture, without the path that it has here."""

    @wraps(answer)
    def wrapper(model: Model, photo: str | None, *settings: Any) -> Any:
        try:
            return answer(model, photo, *settings)
        except (ValueError, OSError) as error:
            text = str(error).replace(str(photo), Path(photo or "").name)
            raise gr.Error(html.escape(text), print_exception=False) from None

    return wrapper


@in_sentences
def open_photo(model: Autoencoder, photo: str | None, ratio: float, seed: int | None) -> list[Any]:
    """A new picture to paint on, and what `paint` makes of it."""
    if photo is None:
        return [gr.HTML("", picture=""), *[None] * len(TITLES), HINT]
    result = _reconstruct(model, photo, ratio, seed)
    rows, columns = model.patch_embed.grid_of(*result.original.shape[2:])
    stream = io.BytesIO()
    _image(model, result.original).save(stream, "JPEG", quality=92)
    picture = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return [gr.HTML("", picture=picture, rows=rows, columns=columns), *_answer(model, result, f"by seed {seed or 0}")]


@in_sentences
def paint(model: Autoencoder, photo: str | None, ratio: float, seed: int | None, hidden: str) -> list[Any]:
    """A reconstruction's four pictures, and how good it is.

    Args:
        seed: of a random mask; None, which an empty field gives, is 0.
        hidden: numbers of patches. If there are any, ratio and seed have no effect.
    """
    if photo is None:
        return [*[None] * len(TITLES), HINT]
    how = "by your paint; ratio and seed count again when it is cleared" if hidden else f"by seed {seed or 0}"
    return _answer(model, _reconstruct(model, photo, ratio, seed, hidden), how)


@in_sentences
def look_inside(model: Model, photo: str | None, head: int) -> list[Image.Image | None]:
    """The class token's attention, of one head or (0) of all in the mean, and the features' components as colours."""
    if photo is None:
        return [None, None]
    imgs = whole_input(model, _open(model, photo))
    attention = maps.attention(model, imgs)[0]
    bright = maps.overlay(model, imgs[0], attention[head - 1] if head else attention.mean(dim=0))
    colours = Image.fromarray((maps.components(model, imgs)[0] * 255).byte().numpy())
    return [_enlarge(bright), _enlarge(colours.resize(bright.size, Image.Resampling.NEAREST))]


@in_sentences
def classify(classifier: Classifier, photo: str | None) -> dict[str, float] | None:
    """The five likeliest classes with their scores."""
    return None if photo is None else dict(classifier.predict(photo)["top"])


def _open(model: Model, photo: str) -> Picture:
    """The picture, unless it is a strip."""
    picture = open_image(photo, model.in_chans)
    height, width = size_of(picture)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{photo}: {width} x {height} pixels are too long a strip; the most is {MAX_ASPECT} to 1")
    return picture


def _reconstruct(model: Autoencoder, photo: str, ratio: float, seed: int | None, hidden: str = "") -> Reconstruction:
    picture = _open(model, photo)
    if not hidden:
        return reconstruct(model, picture, ratio, seed or 0)
    imgs = whole_input(model, picture)
    rows, columns = model.patch_embed.grid_of(*imgs.shape[2:])
    numbers = {int(number) for number in hidden.split()}
    if not numbers <= set(range(rows * columns)):
        raise ValueError("the paint does not belong to this picture: clear it")
    mask = torch.zeros(1, rows * columns)
    mask[0, list(numbers)] = 1
    return model.reconstruct(imgs, mask=mask)


def _answer(model: Autoencoder, result: Reconstruction, how: str) -> list[Any]:
    with torch.inference_mode():
        loss = model(result.original, mask=result.mask)[0]
    text = (
        f"**{int(result.mask.sum())} of {result.mask.numel()} patches are masked**, chosen {how}.\n\n"
        f"Their loss, as in training: **{loss:.4f}** · PSNR: **{psnr(model, result):.2f} dB**"
    )
    if model.norm_pix_loss:
        text += "\n\nThis model predicts normalized patches; mean and contrast are those of the original patches."
    return [*(_image(model, part) for part in result[: len(TITLES)]), text]


def _image(model: Autoencoder, batch: Tensor) -> Image.Image:
    """The picture in a batch (1, c, H, W)."""
    pixels = pictures.tile([batch], model.normalize.inverse)
    return _enlarge(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _enlarge(image: Image.Image) -> Image.Image:
    scale = math.ceil(MIN_SIDE / min(image.size))
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
