"""The web page in a real browser: python -m pytest tests/demo_app.py

These tests need Chromium. With APP_SCREENSHOTS=FOLDER, they save screenshots there.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from demo import app
from inference import export, get_model, maps
from inference.reconstruct import TITLES, psnr, reconstruct
from util.cli import entry_point

PHOTOS = sorted((ROOT / "demo" / "photos").glob("*.jpg"))
CAT = ROOT / "demo" / "photos" / "chelsea.jpg"  # 3 to 2: 32 x 48 pixels, 8 x 12 patches
ROWS, COLUMNS, SIDE = 8, 12, 40  # of its panels: patches, and pixels of one
VISITORS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An autoencoder, a classifier, and an encoder alone."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    mae = get_model("mae_vit_mini_patch4")
    classifier = get_model("vit_mini_patch4", nb_classes=6, classes=["apple", "bear", "cat", "dog", "elk", "fox"])
    for name, model in (("mae", mae), ("classifier", classifier), ("encoder", export.encoder_of(mae))):
        export.export(model, "safetensors", folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(files):
    return get_model(files / "mae.safetensors")


@pytest.fixture(scope="module")
def address(files, tmp_path_factory):
    """The address of the served page. At the end, its log must contain no traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "demo/app.py", "--model", str(files / "mae.safetensors"), "--port", str(port),
               "--classifier", str(files / "classifier.safetensors")]  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads")}
        )
    try:
        for _ in range(600):
            if server.poll() is not None or "Running on" in log.read_text():
                break
            time.sleep(0.1)
        assert "Running on" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium here: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page for another visitor. It must send no requests to other hosts, and its scripts must not fail."""
    asked, failed = [], []

    def opened() -> Page:
        page = browser.new_context(viewport={"width": 1280, "height": 960}).new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(address)
        page.locator(".panel").first.wait_for()
        return page

    yield opened
    for context in browser.contexts:
        context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert failed == []


def upload(page: Page, file: Path) -> None:
    clear = page.get_by_label("Clear", exact=True)
    if not page.locator("input[type=file]").count():
        clear.first.click()
    page.locator("input[type=file]").set_input_files(file)


def image(page: Page, title: str):
    return page.locator(".panel", has_text=title).locator("img")


def pixels(page: Page, title: str) -> np.ndarray:
    """The pixels of a panel (H, W, 3), after the browser has loaded it."""
    shown = image(page, title)
    shown.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=shown.element_handle())
    with Image.open(io.BytesIO(page.request.get(shown.get_attribute("src")).body())) as picture:
        assert picture.size == tuple(shown.evaluate("image => [image.naturalWidth, image.naturalHeight]"))
        return np.asarray(picture.convert("RGB"))


def settled(page: Page, said: str) -> None:
    expect(page.get_by_text(said)).to_be_visible()
    expect(page.locator(".panel .generating, .panel .progress-text")).to_have_count(0)


def masked_patches(page: Page) -> set[int]:
    """The patches that differ between the panels of the original and of the masked image."""
    differs = (pixels(page, "original") != pixels(page, "masked")).any(axis=2)
    patches = differs.reshape(ROWS, SIDE, COLUMNS, SIDE).any(axis=(1, 3))
    return set(patches.flatten().nonzero()[0].tolist())


def drag(page: Page, *places: tuple[float, float]) -> None:
    """Draws from position to position (row, column), in patches."""
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    points = [(box["x"] + box["width"] * x / COLUMNS, box["y"] + box["height"] * y / ROWS) for y, x in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point)
    page.mouse.up()


def wanted(model, painted) -> list[np.ndarray]:
    """The four panels (H, W, 3) of a reconstruction."""
    shown = [model.normalize.inverse(part)[0].permute(1, 2, 0).numpy() for part in painted[: len(TITLES)]]
    return [np.kron((255 * part).round().astype(np.uint8), np.ones((10, 10, 1), np.uint8)) for part in shown]


def assert_close(shown: np.ndarray, expected: np.ndarray) -> None:
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 1  # threads may round otherwise


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("APP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.mouse.move(0, 0)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_an_uploaded_image_is_masked_and_reconstructed(visit, model):
    page = visit()
    upload(page, CAT)
    settled(page, "72 of 96 patches are masked")
    painted = reconstruct(model, CAT, 0.75, seed=0)
    shown = [pixels(page, title) for title in TITLES]
    for panel, expected in zip(shown, wanted(model, painted), strict=True):
        assert panel.shape == (320, 480, 3)
        assert_close(panel, expected)
    assert len({panel.tobytes() for panel in shown}) == 4
    with torch.no_grad():
        loss = float(model(painted.original, mask=painted.mask)[0])
    said = page.get_by_text("Loss of the masked patches").inner_text()
    assert f"{loss:.4f}" in said and f"PSNR: {psnr(model, painted):.2f} dB" in said
    screenshot(page, "reconstruct")


def test_ratio_and_seed(visit):
    page = visit()
    page.locator(".gallery-item").nth(PHOTOS.index(CAT)).click()
    settled(page, "72 of 96 patches are masked")
    many = masked_patches(page)
    assert len(many) == 72
    slider = page.get_by_role("slider", name="Mask ratio")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowLeft")
    settled(page, "48 of 96 patches are masked")
    fewer = masked_patches(page)
    assert len(fewer) == 48 and fewer < many  # of the same draw
    page.get_by_role("button", name="Another mask").click()
    expect(page.get_by_text("chosen by seed 0")).to_have_count(0)
    settled(page, "48 of 96 patches are masked")
    assert masked_patches(page) != fewer and len(masked_patches(page)) == 48
    page.get_by_label("Seed of the random mask").fill("")
    settled(page, "48 of 96 patches are masked, chosen by seed 0")
    assert masked_patches(page) == fewer
    page.get_by_label("Clear", exact=True).first.click()
    page.get_by_role("button", name="Clear the mask").click()
    expect(page.get_by_text("Upload an image above")).to_be_visible()
    expect(page.locator("canvas")).to_have_attribute("width", "0")


def test_the_brush_masks_patches(visit):
    page, other = visit(), visit()
    for visitor in (page, other):
        upload(visitor, CAT)
        settled(visitor, "72 of 96 patches are masked")
    before = masked_patches(other)
    drag(page, (2.5, 3.5), (2.5, 6.5), (5.2, 6.5))  # along a row, down a column
    settled(page, "7 of 96 patches are masked, chosen with the brush")
    painted = {2 * COLUMNS + column for column in (3, 4, 5, 6)} | {row * COLUMNS + 6 for row in (3, 4, 5)}
    assert masked_patches(page) == painted
    screenshot(page, "painted")
    page.get_by_role("button", name="Another mask").click()  # which has no effect, as the page says
    drag(page, (2.5, 4.5), (2.5, 3.5))  # uncovers two of them
    settled(page, "5 of 96 patches are masked, chosen with the brush")
    assert masked_patches(page) == painted - {2 * COLUMNS + 3, 2 * COLUMNS + 4}
    other.get_by_role("slider", name="Mask ratio").press("ArrowRight")
    settled(other, "77 of 96 patches are masked, chosen by seed 0")  # another visitor is not concerned
    assert masked_patches(other) > before
    drag(page, *[(row + 0.5, column) for row in range(ROWS) for column in ((0.5, 11.5), (11.5, 0.5))[row % 2]])
    expect(page.get_by_text("a mask must leave at least one patch visible")).to_be_visible()
    page.get_by_role("button", name="Clear the mask").click()
    settled(page, "72 of 96 patches are masked, chosen by seed")
    upload(page, PHOTOS[0])
    settled(page, "48 of 64 patches are masked")
    assert page.locator("canvas").evaluate("canvas => canvas.width / canvas.height") == 1


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.jpg").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / "heavy.jpg").write_bytes(os.urandom(11_000_000))
    (folder / "cut.jpg").write_bytes(CAT.read_bytes()[:9000])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("L", (10, 90_000)).save(folder / "strip.png")
    return folder


def test_unusable_files_show_an_error_message(visit, wrong):
    page = visit()
    for name, said in (
        ("text.jpg", "text.jpg: the file is not an image of a known format"),
        ("bomb.png", "bomb.png: too large to decode: Image size (400000000 pixels) exceeds"),
        ("strip.png", "strip.png: the aspect ratio of 10 x 90000 pixels exceeds 4 to 1"),
        ("cut.jpg", "cut.jpg: can't be read as an image"),
        ("heavy.jpg", "exceed the maximum allowed size of 10"),
        ("notes.txt", "Invalid file type"),
    ):
        upload(page, wrong / name)
        toast = page.get_by_test_id("toast-body").filter(has_text=said)
        expect(toast).to_be_visible()
        assert "Traceback" not in page.content()
        assert "/" not in toast.inner_text().removeprefix("Error")
        toast.locator(".toast-close").click()
        expect(page.get_by_test_id("toast-body")).to_have_count(0)
    upload(page, CAT)
    settled(page, "72 of 96 patches are masked")


def test_look_inside(visit, files, model):
    page = visit()
    upload(page, CAT)
    page.get_by_role("tab", name="Look inside").click()
    best = get_model(files / "classifier.safetensors").predict(CAT)["top"]
    label = page.get_by_test_id("label-output-value")
    expect(label).to_have_text(best[0][0])
    confidences = page.locator("[data-testid$='-confidence-set']")
    expect(confidences).to_have_count(5)
    for place, (name, score) in zip(confidences.all(), best, strict=True):
        assert name in place.inner_text() and f"{round(100 * score)}%" in place.inner_text()
    imgs = reconstruct(model, CAT).original
    attention, shown = maps.attention(model, imgs)[0], []
    for number in (None, 2):
        weights = attention.mean(dim=0) if number is None else attention[number - 1]
        if number:
            before = image(page, "attention").get_attribute("src")
            page.get_by_label("Attention of the class token in the last block").click()
            page.get_by_role("option", name=f"head {number}").click()
            expect(image(page, "attention")).not_to_have_attribute("src", before)
        overlay = np.asarray(maps.overlay(model, imgs[0], weights))
        shown.append(pixels(page, "attention"))
        assert_close(shown[-1], np.kron(overlay, np.ones((10, 10, 1), np.uint8)))
    assert (shown[0] != shown[1]).any()
    colours = pixels(page, "principal components").reshape(ROWS, SIDE, COLUMNS, SIDE, 3)
    assert (colours == colours[:, :1, :, :1]).all()
    assert len(np.unique(colours[:, 0, :, 0].reshape(-1, 3), axis=0)) > 48
    screenshot(page, "inside")


def test_twenty_visitors_at_once(address, model, tmp_path):
    """Each visitor has another image and another seed, and gets the results that belong to them."""

    ready = threading.Barrier(VISITORS)

    def visitor(number: int):
        file = tmp_path / "mine" / str(number) / "picture.png"  # all of one name
        file.parent.mkdir(parents=True)
        colours = np.random.default_rng(number).integers(0, 256, (4, 4 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((32 * colours.shape[1], 128)).save(file)
        client = Client(
            address, verbose=False, download_files=tmp_path / "theirs" / str(number), analytics_enabled=False
        )
        ratio, painted = (0.5, f"{number} 33") if number % 4 == 0 else (0.25 + 0.05 * (number % 10), "")
        ready.wait()
        return file, ratio, painted, client.predict(handle_file(file), ratio, number, painted, api_name="/paint")

    with ThreadPoolExecutor(VISITORS) as pool:
        answers = list(pool.map(visitor, range(VISITORS)))
    for number, (file, ratio, painted, (*panels, said)) in enumerate(answers):
        columns = 8 + 2 * (number % 3)
        boxes = [(n % columns * 4, n // columns * 4, 4, 4) for n in map(int, painted.split())]
        picture = Image.open(file).convert("RGB").resize((4 * columns, 32), Image.Resampling.BICUBIC)
        expected = reconstruct(model, picture, ratio, number, boxes)
        assert ("with the brush" if painted else f"by seed {number}") in said
        for panel, part in zip(panels, wanted(model, expected), strict=True):
            assert_close(np.asarray(Image.open(panel).convert("RGB")), part)


def test_the_page_is_served_to_this_computer_only(address):
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # an address of this computer too, which a server for all answers at
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_no_file_of_the_computer_is_served(address, files):
    def status(path: Path) -> int:
        try:
            return urllib.request.urlopen(f"{address}/gradio_api/file={path}").status
        except urllib.error.HTTPError as error:
            return error.code

    assert status(CAT) == 200
    assert {status(path) for path in (ROOT / "README.md", CAT.parent / "README.md", files / "mae.safetensors")} == {403}


def test_tabs_depend_on_the_model(files):
    def tabs(*models) -> list[str]:
        components = app.build(*(get_model(files / f"{name}.safetensors") for name in models)).config["components"]
        labels = [part["props"].get("label") for part in components if part["type"] in ("tabitem", "label")]
        return [str(label) for label in labels]

    assert tabs("mae") == ["Reconstruct", "Look inside"]
    assert tabs("encoder") == ["Look inside"]
    assert tabs("classifier") == ["Look inside", "classes"]
    assert tabs("encoder", "classifier") == ["Look inside", "classes"]
    with pytest.raises(ValueError, match="--classifier: vit_mini_patch4 has no classification head"):
        tabs("mae", "encoder")


def test_every_image_format_is_reconstructed(model, tmp_path):
    grey, oblong = (get_model("mae_vit_mini_patch4", **kind) for kind in ({"in_chans": 1}, {"input_size": [32, 64]}))
    values = np.random.default_rng(0).integers(0, 2**16, (40, 70, 3), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", values)
    Image.fromarray(values[:, :, 0]).save(tmp_path / "deep.png")
    Image.new("RGBA", (70, 40), (9, 9, 9, 99)).save(tmp_path / "glass.png")
    Image.new("CMYK", (70, 40)).save(tmp_path / "print.tif")
    Image.new("1", (1, 1)).save(tmp_path / "dot.gif")
    Image.new("L", (40, 10)).save(tmp_path / "strip.bmp")
    for file in sorted(tmp_path.iterdir()):
        height, width = {"dot.gif": (320, 320), "strip.bmp": (320, 1280)}.get(file.name, (320, 560))
        for sees in (model, grey, oblong):
            painting, *panels, said = app.open_photo(sees, str(file), 0.5, 0)
            assert {panel.size for panel in panels} == {(width, height)}
            assert (painting.props["rows"], painting.props["columns"]) == (height // SIDE, width // SIDE)
            assert f"{height * width // SIDE**2 // 2} of {height * width // SIDE**2} patches" in said
            assert {shown.size for shown in app.look_inside(sees, str(file), 0)} == {(width, height)}


def test_invalid_flags_are_errors(files, tmp_path):
    def start(*flags) -> None:
        app.main(
            entry_point.parse(app.get_args_parser(), ["--model", str(files / "mae.safetensors"), *map(str, flags)])
        )

    with pytest.raises(ValueError, match="--samples: there is no folder"):
        start("--samples", tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"can't serve at --host 127.0.0.1 --port {port}"):
            start("--port", port)
