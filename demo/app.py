"""A web page that masks patches of a picture and reconstructs them with a masked autoencoder.

    python demo/app.py --model mae_visualize_vit_large
    python demo/app.py --model demo/output/pretrained.pth --samples my/pictures

The page is served at http://127.0.0.1:7860, to this computer only. SPACE.md describes public hosting.
"""

import argparse
import contextlib
import html
import math
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import; the page needs no network
sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

try:
    import gradio as gr
except ImportError:
    sys.exit('the web page requires the package gradio: pip install ".[app]"')

import torch
from PIL import Image

from mae import parallel
from mae.cli import entry_point, options
from mae.data.decode import SUFFIXES
from mae.data.pixels import Picture, size_of
from mae.evaluate import pictures
from mae.inference.model import Autoencoder, Model, get_model
from mae.inference.reconstruct import error_text, reconstruct, uncropped_input
from mae.reconstruction import Reconstruction
from mae.settings import types

SAMPLES = {
    1: Path(__file__).with_name("clothes"),
    3: Path(__file__).with_name("photos"),
}  # examples for models with this number of channels
MAX_SAMPLES = 10
MAX_BYTES = 10 * 2**20  # of an upload
MAX_PIXELS = 25_000_000  # of an upload; decoding takes a few times 4 bytes for each
MAX_ASPECT = 4  # long side divided by short side; the memory of the model grows with its square
CACHE_SECONDS = 3600  # seconds until uploads are deleted
MIN_SIDE = 320  # minimum short side of a displayed picture in pixels; smaller ones are enlarged
# Titles of the panels, and the parts of a `Reconstruction` that they show. A click on the first toggles a patch.
PANELS = {"visible patches: click to mask or unmask": 1, "reconstruction + visible": 3, "original": 0}
# Some of the theme's colors have a contrast below 4.5 to 1 (WCAG 2.1, AA). Its fonts would be downloaded.
THEME = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("monospace",)).set(
    background_fill_primary="*neutral_50",  # Soft's own, which `set` would reset
    block_label_text_color="*primary_700", block_title_text_color="*primary_700", link_text_color="*primary_700",
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
)  # fmt: skip
# Labels stand above their pictures instead of covering patches; examples are small.
CSS = """
[data-testid=block-label] {position: static !important; width: max-content; max-width: 100%; margin-bottom: 4px}
.examples .grid-container {grid-template-columns: repeat(auto-fill, 80px) !important; overflow: visible}
.examples .grid-wrap {min-height: 0}
"""
INTRODUCTION = """# Masked autoencoder
The encoder of a masked autoencoder processes only the visible patches of an image, and the decoder predicts the others.
Choose an image, mask parts of it, and compare the prediction with the original.

"""


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Serves a web page that masks pictures and reconstructs them.")
    options.add_inference_options(parser, images=False, example="mae_visualize_vit_large")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="network address; 0.0.0.0 accepts all hosts"
    )
    parser.add_argument("--port", default=7860, type=types.positive_int, metavar="N", help="network port")
    parser.add_argument(
        "--samples", type=Path, metavar="FOLDER",
        help="folder of example images, with its subfolders (default: clothes for a model with one channel, photographs"
        " for three)",
    )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    if args.samples and not args.samples.is_dir():
        raise ValueError(f"--samples: there is no folder {args.samples}")
    device = parallel.choose_device(args.device)
    model = get_model(args.model, pretrained=True, device=device, **options.chosen_settings(args))
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"--model {args.model} has no decoder of pixels and can't reconstruct: give a checkpoint of "
            f"main_pretrain.py, or a published file with a decoder, such as mae_visualize_vit_large"
        )
    page = build(model, args.samples)
    try:
        serve(page, args.host, args.port)
    except OSError as error:
        raise ValueError(f"can't serve at --host {args.host} --port {args.port} ({error}); give another") from error


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serves a page until it is interrupted. By default, gradio's environment variables set host and port."""
    # Its own messages offer a public link.
    _, address, _ = page.launch(
        server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=THEME, css=CSS, footer_links=[],
        ssr_mode=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"Running on {address} (Ctrl-C stops the page)", flush=True)
    page.block_thread()


def build(model: Autoencoder, samples: Path | None = None) -> gr.Blocks:
    """Builds the page for `serve`.

    Args:
        samples: folder of example images (default: images of the kind that the model's channels suggest).
    """
    examples = find_examples(model, samples)
    files = list(examples)

    def random_mask(photo: str | None, ratio: float, seed: int) -> list[Any]:
        origin = f"at random with seed {seed}"
        return answer(model, photo, origin, lambda picture: reconstruct(model, picture, ratio, seed))

    def toggle_patch(photo: str | None, mask: torch.Tensor, event: gr.SelectData) -> list[Any]:
        # After an error, the page stays as it is.
        return answer(model, photo, "by you", lambda picture: toggle(model, picture, mask, *event.index), gr.skip())

    def choose(event: gr.SelectData) -> str:
        return files[event.index]

    with gr.Blocks(title="Masked autoencoder", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        photo = gr.State(files[0] if files else None)
        seed = gr.State(0)
        mask = gr.State()
        gr.Markdown(INTRODUCTION + describe(model))
        gallery = gr.Gallery(
            [(picture, Path(file).stem) for file, picture in examples.items()], label="Examples", columns=MAX_SAMPLES,
            height="auto", allow_preview=False, buttons=[], interactive=False, visible=bool(examples),
            elem_classes="examples",
        )  # fmt: skip
        with gr.Row():
            upload = gr.UploadButton("Upload an image", file_types=list(SUFFIXES), min_width=160)
            another = gr.Button("Another random mask", min_width=160)
        ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Mask ratio")
        caption = gr.HTML()
        with gr.Row():
            panels = [
                gr.Image(label=title, alt_text=title, format="png", buttons=[], interactive=False,
                         min_width=240)
                for title in PANELS
            ]  # fmt: skip
        choice = [photo, ratio, seed]
        drawn = [mask, caption, *panels]
        # One request at a time: a click changes the mask that the click before it has left.
        event: dict[str, Any] = {
            "concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden",
        }  # fmt: skip
        page.load(random_mask, choice, drawn, **event)
        upload.upload(lambda file: file, upload, photo, **event).then(random_mask, choice, drawn, **event)
        gallery.select(choose, None, photo, **event).then(random_mask, choice, drawn, **event)
        ratio.input(random_mask, choice, drawn, trigger_mode="always_last", **event)
        another.click(lambda seed: seed + 1, seed, seed, **event).then(random_mask, choice, drawn, **event)
        panels[0].select(toggle_patch, [photo, mask], drawn, trigger_mode="multiple", **event)
    return page.queue(max_size=100)


def find_examples(model: Autoencoder, samples: Path | None) -> dict[str, Image.Image]:
    """Returns the pictures of examples by their files."""
    folder = samples or SAMPLES.get(model.in_chans)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES) if folder else []
    found = {}
    for file in files[:: max(1, len(files) // MAX_SAMPLES)][:MAX_SAMPLES]:  # of all subfolders
        with contextlib.suppress(ValueError, OSError):
            found[str(file)] = to_picture(model, uncropped_input(model, open_photo(model, str(file))))
    return found


def describe(model: Model) -> str:
    """Returns the name, the input and the patches of a model as Markdown."""
    height, width = model.patch_embed.img_size
    p, q = model.patch_embed.patch_size
    text = (
        f"`{model.settings['model']}`: input {width} × {height} pixels, {model.in_chans} channel(s); "
        f"{model.patch_embed.num_patches} patches of {q} × {p} pixels."
    )
    if model.norm_pix_loss:
        text += " It predicts normalized patches, which have the mean and std of the original patches here."
    return text


def answer(
    model: Autoencoder, photo: str | None, origin: str, compute: Callable[[Picture], Reconstruction],
    on_error: Any = None,
) -> list[Any]:  # fmt: skip
    """Reconstructs a photo.

    Args:
        photo: its file; None before one is chosen.
        origin: origin of the mask, for the caption.
        on_error: mask and pictures after an error.

    Returns:
        The mask, the caption or an error message of one line as HTML, and the pictures of PANELS.
    """
    if photo is None:
        return [None, "", *[None] * len(PANELS)]
    try:
        result = compute(open_photo(model, photo))
    except (ValueError, OSError) as error:
        alert = f'<b role="alert">{html.escape(str(error).replace(photo, Path(photo).name))}</b>'
        return [on_error, alert, *[on_error] * len(PANELS)]
    count = int(result.mask.sum())
    text = f"<b>{count} of {result.mask.numel()} patches are masked</b>, {origin}."
    if count:
        text += f" Error of the masked patches: <b>{error_text(model, result)}</b>."
    return [result.mask, text, *(to_picture(model, result[part]) for part in PANELS.values())]


def open_photo(model: Model, photo: str) -> Picture:
    """Opens an image; raises ValueError or OSError if it can't be read, is too large or too narrow."""
    picture = model.open(photo, MAX_PIXELS)
    height, width = size_of(picture)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{photo}: the aspect ratio of {width} x {height} pixels exceeds {MAX_ASPECT} to 1; crop the image"
        )
    return picture


def toggle(model: Autoencoder, picture: Picture, mask: torch.Tensor, x: int, y: int) -> Reconstruction:
    """Masks the patch at a pixel of the displayed picture, or unmasks it.

    Args:
        mask: (1, N), 1 is masked.
    """
    imgs = uncropped_input(model, picture)
    rows, columns = model.patch_embed.grid_of(*imgs.shape[2:])
    p, q = model.patch_embed.patch_size
    row = min(y // (scale_of(imgs) * p), rows - 1)
    column = min(x // (scale_of(imgs) * q), columns - 1)
    mask = mask.clone()
    mask[0, row * columns + column] = 1 - mask[0, row * columns + column]
    if mask.all():
        raise ValueError("the encoder needs a visible patch: this one stays visible")
    return model.reconstruct(imgs, mask=mask)


def to_picture(model: Model, batch: torch.Tensor) -> Image.Image:
    """Converts the input of a model (1, c, H, W) to a picture with a short side of at least MIN_SIDE."""
    pixels = pictures.tile([batch], model.normalize.inverse, scale_of(batch))
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    # gradio names a file by its contents, and rewrites it while others load it.
    picture.info["id"] = uuid.uuid4().hex
    return picture


def scale_of(batch: torch.Tensor) -> int:
    """Side in pixels of the square that displays a pixel of a batch (1, c, H, W)."""
    return math.ceil(MIN_SIDE / min(batch.shape[2:]))


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
