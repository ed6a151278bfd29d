"""A web page for trained models: reconstruction of uploaded images, attention maps, features and classes.

    python demo/app.py --model mae_visualize_vit_large --classifier mae_finetuned_vit_base
    python demo/app.py --model demo/output/pretrain/checkpoint-0.pth --samples my/pictures

The page is served at http://127.0.0.1:7860, to this computer only. SPACE.md describes public hosting.
"""

import argparse
import html
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import; the page needs no network
sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

try:
    import gradio as gr
except ImportError:
    sys.exit('the web page requires the package gradio: pip install ".[app]"')

from demo import outputs
from mae import parallel
from mae.cli import entry_point, options
from mae.data.decode import SUFFIXES
from mae.inference.model import Autoencoder, Classifier, Model, Segmenter, get_model
from mae.masking import num_visible
from mae.settings import types
from mae.settings.choices import REGRESSION

FOLDER = Path(__file__).parent
SAMPLES = {1: FOLDER / "clothes", 3: FOLDER / "photos"}  # examples for models with this number of channels
MAX_SAMPLES = 10
MAX_BYTES = 10 * 2**20  # of an upload
CONCURRENCY, MAX_QUEUE = 2, 100  # requests that run at once, and requests that wait
CACHE_SECONDS = 3600  # seconds until uploads are deleted
RATIOS = [step / 20 for step in range(1, 20)]
# Some of the theme's colors have a contrast below 4.5 to 1 (WCAG 2.1, AA); app.css has one more.
THEME = gr.themes.Soft(font=("system-ui", "sans-serif")).set(
    background_fill_primary="*neutral_50",  # Soft's own, which `set` would reset
    block_label_text_color="*primary_700", block_title_text_color="*primary_700", link_text_color="*primary_700",
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
)  # fmt: skip
INTRODUCTIONS: dict[Any, str] = {
    Autoencoder: """<h1>Masked autoencoder</h1>
<p>The encoder of a masked autoencoder processes only the visible patches of an image, and the decoder predicts the
others. Choose an image, mask parts of it, and compare the prediction with the original.</p>""",
    Segmenter: """<h1>Segmentation</h1>
<p>Choose an image. The model predicts the class of each of its pixels.</p>""",
}
WITHOUT_DECODER = """<h1>Vision transformer</h1>
<p>Choose an image, and look at the attention and the features of the model. Without a decoder, it can't reconstruct
masked patches.</p>"""
HEADS = "Attention of the class token in the last block"
QUERIES = "Attention of the class token in the last block (heads) or of the probe (queries)"
COMPONENTS = """<p>The first three components of the features, as red, green and blue. Patches of a similar
color have similar features; the colors have no other meaning.</p>"""
# The values of the mask editor are described in its script.
EDITOR: dict[str, Any] = {
    "html_template": """<h3>The mask</h3>
        <p>Blue patches are masked. Draw to mask patches; start on a masked patch to unmask. Or press arrow keys and
        space.</p>
        <canvas width="0" height="0" tabindex="0" role="application" aria-label="mask editor"></canvas>
        <p role="status"></p><button>Unmask all patches</button>""",
    "css_template": """
        canvas {touch-action: none; cursor: crosshair}
        [role=status] {height: 0; overflow: hidden}
        button {width: 100%; padding: 6px; border-radius: 6px; cursor: pointer;
                background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color)}""",
    "js_on_load": (FOLDER / "mask_editor.js").read_text(encoding="utf-8"),
}
CHOICE = """element.onclick = event => {
    const button = event.target.closest("button");
    if (button) trigger("click", {index: Number(button.value)});
};"""


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser(
        "Serves a web page for a trained model: reconstructions, attention maps, features and classes."
    )
    options.add_inference_options(parser, images=False, example="mae_visualize_vit_large")
    parser.add_argument("--classifier", metavar="FILE", help="classifier for the classes, given like --model")
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
    chosen = {"pretrained": True, "device": device, **options.chosen_settings(args)}
    model = get_model(args.model, **chosen)
    classifier = get_model(args.classifier, **chosen) if args.classifier else None
    page = build(model, classifier, args.samples)
    try:
        serve(page, args.host, args.port)
    except OSError as error:
        raise ValueError(f"can't serve at --host {args.host} --port {args.port} ({error}); give another") from error


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serves a page until it is interrupted. By default, gradio's environment variables set host and port."""
    # Its own messages offer a public link.
    _, address, _ = page.launch(
        server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=THEME, css_paths=FOLDER / "app.css",
        footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"Running on {address} (Ctrl-C stops the page)", flush=True)
    page.block_thread()


def build(model: Model, classifier: Model | None = None, samples: Path | None = None) -> gr.Blocks:
    """Builds the page for `serve`.

    Args:
        model: an autoencoder, an encoder or a classifier; only an autoencoder has the tab for reconstruction.
        classifier: model for the classes (default: `model`, if it is a classifier).
        samples: folder of example images (default: images of the kind that the model's channels suggest).

    Raises:
        ValueError: the classifier has no classification head.
    """

    def has_classes(one: Model) -> bool:
        return isinstance(one, Classifier) and one.settings["nb_classes"] and one.settings.get("task") != REGRESSION

    if classifier is None and has_classes(model):
        classifier = model
    if classifier is not None and not has_classes(classifier):
        raise ValueError(
            f"--classifier: {classifier.settings['model']} has no classification head; give a fine-tuned file"
        )
    with gr.Blocks(title="Masked autoencoder", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        models = {"Model": model} if classifier in (None, model) else {"Model": model, "Classifier": classifier}
        descriptions = "".join(f"<p>{name} {outputs.describe(one)}.</p>" for name, one in models.items())
        gr.HTML(INTRODUCTIONS.get(type(model), WITHOUT_DECODER) + descriptions)
        with gr.Row():
            upload = gr.File(label="Upload an image", file_types=list(SUFFIXES), height=140, min_width=320,
                             elem_classes="upload")  # fmt: skip
            photo = gr.File(visible="hidden")  # the chosen image; the upload is emptied, so that it takes another one
            files = _examples(model, photo, samples)
        upload.upload(lambda file: (None, file), upload, [upload, photo], api_visibility="private")
        message = gr.HTML(elem_classes="message")
        opened = photo.change(partial(outputs.check, model), photo, message, api_visibility="private")
        if isinstance(model, Autoencoder):
            with gr.Tab("Reconstruct"):
                opened = _reconstruct_tab(model, photo, opened)
        if isinstance(model, Segmenter):
            with gr.Tab("Segment"):
                _segment_tab(model, photo, opened)
        with gr.Tab("Attention and features"):
            _inside_tab(model, classifier, photo, opened)
        if files:
            page.load(lambda: files[0], None, photo, api_visibility="private")
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=CONCURRENCY)


def _examples(model: Model, photo: gr.File, samples: Path | None) -> list[str]:
    """Adds buttons that choose an example; returns its files."""
    folder = samples or SAMPLES.get(model.in_chans)
    images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES) if folder else []
    chosen = images[:: max(1, len(images) // MAX_SAMPLES)][:MAX_SAMPLES]  # of all subfolders
    thumbnails = {
        str(file): outputs.thumbnail(model, picture)
        for file in chosen
        if (picture := outputs.open_usable(model, str(file))) is not None
    }
    files = list(thumbnails)
    gr.set_static_paths(files)  # gradio rejects other files outside of the working directory
    buttons = []
    for number, file in enumerate(files):
        name = html.escape(Path(file).stem)
        image = f'<img src="{thumbnails[file]}" alt="{name}" title="{name}">'
        buttons.append(f'<button value="{number}">{image}</button>')
    if files:
        row = gr.HTML("<h2>Or choose an example</h2>" + "".join(buttons), js_on_load=CHOICE, elem_classes="examples")

        def choose(event: gr.EventData) -> str:
            return files[event.index]

        row.click(choose, None, photo, api_visibility="private")
    return files


def _reconstruct_tab(model: Autoencoder, photo: gr.File, opened: Any) -> Any:
    """Adds the tab; returns the event that follows when its panels are drawn."""
    side, block = min(model.patch_embed.img_size), model.settings.get("mask_block") or 1
    num_blocks = math.prod(math.ceil(max(1, side // p) / block) for p in model.patch_embed.patch_size)  # of a square
    # A patch, or a block of `--mask_block`, of every image stays visible.
    largest = max((ratio for ratio in RATIOS if num_visible(num_blocks, ratio)), default=RATIOS[0])
    with gr.Row():
        with gr.Column(min_width=300):
            editor: Any = gr.HTML("", picture="", rows=1, columns=1, container=True, padding=True, **EDITOR)
        with gr.Column(min_width=300):
            pasted = image_panel(outputs.PANELS[-1])
            caption = gr.HTML()
            with gr.Row():
                ratio = gr.Slider(RATIOS[0], largest, min(0.75, largest), step=RATIOS[0], label="Mask ratio")
                seed = gr.Number(0, label="Random seed", precision=0, minimum=0, maximum=outputs.MAX_SEED)
            another = gr.Button("Another mask")
    with gr.Row():
        panels = [*(image_panel(title) for title in outputs.PANELS[:-1]), pasted]
    settings: dict[str, Any] = {"concurrency_id": "models", "show_progress": "minimal", "show_progress_on": panels}

    def draw(*values: Any) -> list[Any]:
        state, *rest = outputs.draw_mask(model, *values)
        return [gr.HTML(**state), *rest]

    def draw_another(*values: Any) -> list[Any]:
        following, state, *rest = outputs.another_mask(model, *values)
        return [following, gr.HTML(**state), *rest]

    choice, answer = [photo, ratio, seed], [*panels, caption]
    gr.on([ratio.input, seed.input], draw, choice, [editor, *answer], api_name="mask", trigger_mode="always_last",
          **settings)  # fmt: skip
    another.click(draw_another, [*choice, editor], [seed, editor, *answer], api_visibility="private", **settings)
    editor.input(partial(outputs.apply_mask, model), [photo, editor], answer, api_name="apply_mask",
                 trigger_mode="always_last", **settings)  # fmt: skip
    return opened.then(draw, choice, [editor, *answer], api_visibility="private", **settings)


def _segment_tab(model: Segmenter, photo: gr.File, opened: Any) -> None:
    """Adds the tab."""
    with gr.Row():
        panel = image_panel("classes of the pixels")
        with gr.Column(min_width=200):
            legend = gr.HTML()
            opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity")
    draw = partial(outputs.segment, model)
    opacity.input(draw, [photo, opacity], [panel, legend], api_name="segment", trigger_mode="always_last",
                  concurrency_id="models")  # fmt: skip
    opened.then(draw, [photo, opacity], [panel, legend], api_visibility="private", concurrency_id="models")


def _inside_tab(model: Model, classifier: Model | None, photo: gr.File, opened: Any) -> None:
    """Adds the tab."""
    choices = outputs.attention_maps(model, classifier)
    names = [choice.name for choice in choices]
    chosen = gr.Dropdown(names, type="index", label=QUERIES if "query 1" in names else HEADS)
    with gr.Row():
        original = image_panel("original")
        with gr.Column(min_width=200):
            attention, legend = image_panel("attention"), gr.HTML()
        with gr.Column(min_width=200):
            components, _ = image_panel("principal components"), gr.HTML(COMPONENTS)
        if classifier is not None:
            classes = gr.Label(label="classes")
            opened.then(partial(outputs.classify, classifier), photo, classes, api_name="classify",
                        concurrency_id="models")  # fmt: skip

    def view(file: str | None, index: int) -> list[Any]:
        return outputs.look_inside(model, file, choices[index])

    answer = [original, attention, components, legend]
    chosen.change(view, [photo, chosen], answer, api_name="look_inside", trigger_mode="always_last",
                  concurrency_id="models")  # fmt: skip
    opened.then(view, [photo, chosen], answer, api_visibility="private", concurrency_id="models")


def image_panel(title: str) -> gr.Image:
    return gr.Image(
        label=title, alt_text=title, format="png", buttons=["download"], min_width=200, elem_classes="panel"
    )


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
