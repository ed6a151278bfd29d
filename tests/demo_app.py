"""The web page in a real browser: python -m pytest tests/demo_app.py

These tests need Chromium, and npm for the check of accessibility. They save screenshots in runs/app_screenshots.
"""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from gradio_client import Client, handle_file
from mains import call, wait_until
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from demo import app, outputs
from demo.outputs import PANELS
from mae.inference import export, get_model, maps
from mae.inference.reconstruct import psnr, reconstruct

CAT = ROOT / "demo" / "photos" / "chelsea.jpg"  # 3 to 2: 32 x 48 pixels, 8 x 12 patches
ROWS, COLUMNS, SIDE = 8, 12, 40  # of its panels: patches, and pixels of one
VISITORS = 20
SCREENSHOTS = ROOT / "runs" / "app_screenshots"


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


@contextlib.contextmanager
def served(folder: Path, model: Path, classifier: Path):
    """The address of a served page. At the end, its log must contain no traceback and no link to share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "demo/app.py", "--port", port, "--model", model, "--classifier", classifier]
    log = folder / "log"
    with log.open("w") as out:
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads")}
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)
    try:
        wait_until(lambda: server.poll() is not None or "Running on" in log.read_text(), seconds=60)
        assert "Running on" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
    assert "Traceback" not in log.read_text()
    assert "share" not in log.read_text()  # gradio's offer of a public link


@pytest.fixture(scope="module")
def address(files, tmp_path_factory):
    models = (files / "mae.safetensors", files / "classifier.safetensors")
    with served(tmp_path_factory.mktemp("server"), *models) as address:
        yield address


@pytest.fixture(scope="module")
def clothes_address(files, tmp_path_factory):
    """The page of the models of ./run demo, before training."""
    settings = {"input_size": 28, "patch_size": 7, "in_chans": 1, "mean": [0.286], "std": [0.353]}
    classes = sorted(path.stem for path in (ROOT / "demo" / "clothes").glob("*.png"))
    models = (files / "clothes_mae.safetensors", files / "clothes.safetensors")
    export.export(get_model("mae_vit_mini_patch4", **settings), "safetensors", models[0])
    classifier = get_model("vit_mini_patch4", nb_classes=10, classes=classes, **settings)
    export.export(classifier, "safetensors", models[1])
    with served(tmp_path_factory.mktemp("clothes"), *models) as address:
        yield address


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
    requests, failures = [], []

    def open_page(url: str = address, file: Path | None = None, width: int = 1280, **options) -> Page:
        size = {"width": width, "height": 960 if width > 640 else 844}
        page = browser.new_context(viewport=size, **options).new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(url)
        settled(page, "at random with seed 0")  # the first example is loaded at the start
        if file:  # of 96 patches
            upload(page, file)
            settled(page, "72 of 96 patches are masked")
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert failures == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The script of axe-core, which npm downloads."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm here: apt-get install npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.11.0"]
    subprocess.run(command, check=True, timeout=120)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def upload(page: Page, file: Path) -> None:
    page.locator(".upload input[type=file]").set_input_files(file)


def image(page: Page, title: str):
    return page.locator(".panel:visible", has=page.get_by_text(title, exact=True)).locator("img")


def pixels(page: Page, title: str) -> np.ndarray:
    """The pixels of a panel (H, W, 3), after the browser has loaded it."""
    panel = image(page, title)
    panel.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=panel.element_handle())
    with Image.open(io.BytesIO(page.request.get(panel.get_attribute("src")).body())) as picture:
        assert picture.size == tuple(panel.evaluate("image => [image.naturalWidth, image.naturalHeight]"))
        return np.asarray(picture.convert("RGB"))


def settled(page: Page, said: str) -> None:
    expect(page.get_by_text(said)).to_be_visible()
    expect(page.locator(".panel .generating, .panel .progress-text")).to_have_count(0)


def masked_patches(page: Page) -> set[int]:
    """The patches that differ between the panels of the original and of the masked image."""
    differs = (pixels(page, PANELS[0]) != pixels(page, PANELS[1])).any(axis=2)
    patches = differs.reshape(ROWS, SIDE, COLUMNS, SIDE).any(axis=(1, 3))
    return set(patches.flatten().nonzero()[0].tolist())


def blue_patches(page: Page) -> set[int]:
    """The masked patches of the mask editor."""
    found = page.locator("canvas").evaluate(
        """(canvas, [rows, columns]) => [...Array(rows * columns).keys()].filter(n => {
            const side = canvas.width / columns, middle = at => (at + .5) * side;
            const [red, green, blue] = canvas.getContext("2d").getImageData(
                middle(n % columns), middle(Math.floor(n / columns)), 1, 1).data;
            return Math.abs(red - 79) <= 52 && Math.abs(green - 70) <= 52 && blue >= 180;
        })""",
        [ROWS, COLUMNS],
    )
    return set(found)


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


def wanted(model, result) -> list[np.ndarray]:
    """The four panels (H, W, 3) of a reconstruction."""
    parts = [model.normalize.inverse(part)[0].permute(1, 2, 0).numpy() for part in result[: len(PANELS)]]
    return [np.kron((255 * part).round().astype(np.uint8), np.ones((10, 10, 1), np.uint8)) for part in parts]


def assert_close(panel: np.ndarray, expected: np.ndarray) -> None:
    assert panel.shape == expected.shape
    assert np.abs(panel.astype(int) - expected).max() <= 1  # threads may round otherwise


def screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)
    for picture in page.locator("img:visible").all():  # those below the screen are loaded when they are scrolled to
        picture.scroll_into_view_if_needed()
    page.evaluate("scroll(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_an_uploaded_image_is_masked_and_reconstructed(visit, model):
    page = visit(file=CAT)
    result = reconstruct(model, CAT, 0.75, seed=0)
    panels = [pixels(page, title) for title in PANELS]
    for panel, expected in zip(panels, wanted(model, result), strict=True):
        assert_close(panel, expected)
    assert len({panel.tobytes() for panel in panels}) == 4
    with torch.no_grad():
        loss = float(model(result.original, mask=result.mask)[0])
    said = page.get_by_text("Masked patches: loss").inner_text()
    assert f"{loss:.4f}" in said and f"PSNR {psnr(model, result):.2f} dB" in said


def test_a_rotated_photograph_is_upright_in_both_tabs(visit, tmp_path):
    """test_decode.py has all orientations."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    with Image.open(CAT) as photo:
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        upright = np.asarray(photo.convert("RGB").resize((COLUMNS * SIDE, ROWS * SIDE)), float)
    page = visit(file=tmp_path / "turned.png")
    for tab in ("Reconstruct", "Attention and features"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(1000)
        shown = pixels(page, "original")
        assert shown.shape == (ROWS * SIDE, COLUMNS * SIDE, 3)
        assert np.abs(shown.astype(float) - upright).mean() < 15
        screenshot(page, f"exif_{tab.split()[0].lower()}")


def test_ratio_and_seed(visit):
    page = visit()
    page.get_by_role("button", name="chelsea").click()
    settled(page, "72 of 96 patches are masked")
    many = masked_patches(page)
    assert len(many) == 72 and blue_patches(page) == many  # the mask editor has the random mask
    slider = page.get_by_role("slider", name="Mask ratio")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowLeft")
    settled(page, "48 of 96 patches are masked")
    fewer = masked_patches(page)
    assert len(fewer) == 48 and fewer < many and blue_patches(page) == fewer  # the same noise
    page.get_by_role("button", name="Another mask").click()
    settled(page, "48 of 96 patches are masked, at random with seed 1")
    assert masked_patches(page) != fewer and len(masked_patches(page)) == 48
    page.get_by_label("Random seed").fill("")
    settled(page, "48 of 96 patches are masked, at random with seed 0")
    assert masked_patches(page) == fewer


def test_painting_edits_the_random_mask(visit):
    page, other = visit(file=CAT), visit(file=CAT)
    before = masked_patches(page)
    start = next(n for n in sorted(set(range(96)) - before) if n // COLUMNS == 2)
    row = set(range(24, 36))
    drag(page, (2.5, start % COLUMNS + 0.5), (2.5, 0.5), (2.5, 11.5))  # starts on a visible patch, so it masks
    settled(page, f"{len(before | row)} of 96 patches are masked, by you")
    assert masked_patches(page) == before | row == blue_patches(page)
    drag(page, (2.5, 4.5), (2.5, 3.5), (2.5, 4.5))  # starts on a masked patch, so it unmasks
    settled(page, f"{len(before | row) - 2} of 96 patches are masked, by you")
    assert masked_patches(page) == (before | row) - {27, 28}
    page.get_by_role("button", name="Another mask").click()
    settled(page, "72 of 96 patches are masked, at random with seed 1")
    page.get_by_role("button", name="Unmask all patches").click()
    settled(page, "0 of 96 patches are masked, by you")
    assert masked_patches(page) == set() == blue_patches(page)
    drag(page, (2.5, 3.5), (2.5, 6.5), (5.2, 6.5))  # along a row, down a column, faster than the browser's events
    settled(page, "7 of 96 patches are masked, by you")
    corner = {2 * COLUMNS + column for column in (3, 4, 5, 6)} | {row * COLUMNS + 6 for row in (3, 4, 5)}
    assert masked_patches(page) == corner
    other.get_by_role("slider", name="Mask ratio").press("ArrowRight")
    settled(other, "77 of 96 patches are masked, at random with seed 0")  # other visitors are not concerned
    assert masked_patches(other) > before
    upload(page, CAT.with_name("astronaut.jpg"))
    settled(page, "48 of 64 patches are masked")
    assert page.locator("canvas").evaluate("canvas => canvas.width / canvas.height") == 1


def test_the_keyboard_masks_patches(visit):
    page = visit(file=CAT)
    page.get_by_role("button", name="Unmask all patches").press("Enter")
    settled(page, "0 of 96 patches are masked, by you")
    page.get_by_role("button", name="Unmask all patches").press("Shift+Tab")
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect(page.locator("p[role=status]")).to_have_text("row 3, column 2: masked")
    settled(page, "1 of 96 patches are masked, by you")
    assert masked_patches(page) == {2 * COLUMNS + 1}
    page.keyboard.press("Space")
    settled(page, "0 of 96 patches are masked, by you")
    page.get_by_role("button", name="coffee").press("Enter")
    settled(page, "72 of 96 patches are masked, at random with seed 0")


def assert_one_error(page: Page, *said: str) -> None:
    """An error is a text, without pictures of an earlier image."""
    alert = page.get_by_role("alert").filter(has_text=re.compile(".*".join(said)))
    expect(alert).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text=re.compile(r"\S"))).to_have_count(1)
    expect(page.locator(".panel img")).to_have_count(0)
    expect(page.get_by_text("Error", exact=True).filter(visible=True)).to_have_count(0)
    assert "Traceback" not in page.content()
    assert "/" not in alert.inner_text()


def test_unusable_files_show_an_error_message(visit, tmp_path):
    for name in ("text.jpg", "notes.txt"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "heavy.jpg").write_bytes(os.urandom(11_000_000))
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:9000])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    page = visit()
    for name, said in (("text.jpg", "known format"), ("bomb.png", "DecompressionBomb"), ("cut.jpg", "can't be read")):
        upload(page, tmp_path / name)
        assert_one_error(page, f"{name}: ", said)
    screenshot(page, "error")
    upload(page, CAT)
    settled(page, "72 of 96 patches are masked")
    expect(page.get_by_role("alert").filter(has_text=re.compile(r"\S"))).to_have_count(0)
    for name, said in (("heavy.jpg", "exceed the maximum allowed size of 10"), ("notes.txt", "Invalid file type")):
        upload(page, tmp_path / name)  # the browser does not send it, and the page does not change
        toast = page.get_by_test_id("toast-body").filter(has_text=said)
        expect(toast).to_have_count(1)
        expect(page.get_by_text("Error", exact=True).filter(visible=True)).to_have_count(0)
        toast.locator(".toast-close").click()
        expect(page.get_by_test_id("toast-body")).to_have_count(0)
    page.get_by_role("button", name="Unmask all patches").click()
    settled(page, "0 of 96 patches are masked, by you")
    drag(page, *[(row + 0.5, column) for row in range(ROWS) for column in ((0.5, 11.5), (11.5, 0.5))[row % 2]])
    assert_one_error(page, "all patches are masked, and the encoder needs one: unmask a patch")
    drag(page, (2.5, 3.5), (2.5, 3.4))
    settled(page, "95 of 96 patches are masked, by you")
    expect(page.get_by_role("alert").filter(has_text=re.compile(r"\S"))).to_have_count(0)


def test_look_inside(visit, files, model):
    page = visit(file=CAT)
    page.get_by_role("tab", name="Attention and features").click()
    best = get_model(files / "classifier.safetensors").predict(CAT)["top"]
    label = page.get_by_test_id("label-output-value")
    expect(label).to_have_text(best[0][0])
    confidences = page.locator("[data-testid$='-confidence-set']")
    expect(confidences).to_have_count(5)
    for place, (name, score) in zip(confidences.all(), best, strict=True):
        assert name in place.inner_text() and f"{round(100 * score)}%" in place.inner_text()
    imgs = reconstruct(model, CAT).original
    assert_close(pixels(page, "original"), wanted(model, [imgs])[0])
    attention, found = maps.attention(model, imgs)[0], []
    for number in (None, 2):
        weights = attention.mean(dim=0) if number is None else attention[number - 1]
        if number:
            before = image(page, "attention").get_attribute("src")
            page.get_by_label("Attention of the class token in the last block").click()
            page.get_by_role("option", name=f"head {number}").click()
            expect(image(page, "attention")).not_to_have_attribute("src", before)
        expect(page.locator(".scale")).to_have_text(f"0 %{100 * weights.max():.1f} %")
        overlay = np.asarray(maps.overlay(model, imgs[0], weights))
        found.append(pixels(page, "attention"))
        assert_close(found[-1], np.kron(overlay, np.ones((10, 10, 1), np.uint8)))
    assert (found[0] != found[1]).any()
    colors = pixels(page, "principal components").reshape(ROWS, SIDE, COLUMNS, SIDE, 3)
    assert (colors == colors[:, :1, :, :1]).all()
    assert len(np.unique(colors[:, 0, :, 0].reshape(-1, 3), axis=0)) > 48


def test_the_page_describes_its_models_and_has_their_kind_of_examples(visit, clothes_address):
    page = visit(clothes_address)
    model = "Model mae_vit_mini_patch4: input 28 × 28 pixels, gray; 16 patches of 7 × 7 pixels."
    expect(page.get_by_text(model)).to_be_visible()
    expect(page.get_by_text("10 classes: ankle_boot, bag, coat, dress")).to_be_visible()
    settled(page, "12 of 16 patches are masked, at random with seed 0")
    names = {button.locator("img").get_attribute("alt") for button in page.locator(".examples button").all()}
    assert names >= {"ankle_boot", "bag", "trouser"} and len(names) == 10
    before = image(page, "original").get_attribute("src")
    page.get_by_role("button", name="trouser").click()
    expect(image(page, "original")).not_to_have_attribute("src", before)
    trouser = np.asarray(Image.open(ROOT / "demo" / "clothes" / "trouser.png"))
    assert_close(pixels(page, "original")[::12, ::12, 0], trouser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_accessible(visit, axe, clothes_address, scheme, width):
    for kind, url in (("photographs", None), ("clothes", clothes_address)):
        page = visit(*filter(None, [url]), width=width, color_scheme=scheme)
        if url is None:
            page.get_by_role("button", name="chelsea").click()
            settled(page, "72 of 96 patches are masked")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = [page.locator("canvas"), image(page, PANELS[-1])]  # laid out after the text
        wait_until(
            lambda shown=shown: all((one.bounding_box() or {"width": 0})["width"] > 150 for one in shown), seconds=20
        )
        boxes = [one.bounding_box() for one in shown]
        top, bottom = min(box["y"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
        assert bottom - top < page.viewport_size["height"]  # the mask and the result are on one screen
        for tab in ("Reconstruct", "Attention and features"):
            page.get_by_role("tab", name=tab).click()
            image(page, "original").wait_for()
            page.wait_for_timeout(300)  # transitions of colors
            screenshot(page, f"{kind}_{tab.lower().replace(' ', '_')}_{width}_{scheme}")
            page.evaluate(axe)
            for violation in page.evaluate("axe.run()")["violations"]:
                places = [node["html"][:200] for node in violation["nodes"]]
                assert violation["impact"] not in ("serious", "critical"), (violation["id"], places)


def test_twenty_visitors_at_once(address, model, tmp_path):
    """Each visitor has another image and another seed, and gets the results that belong to them."""
    ready = threading.Barrier(VISITORS)

    def visitor(number: int):
        file = tmp_path / "mine" / str(number) / "picture.png"  # all of one name
        file.parent.mkdir(parents=True)
        colors = np.random.default_rng(number).integers(0, 256, (4, 4 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(colors).resize((32 * colors.shape[1], 128)).save(file)
        place = tmp_path / "theirs" / str(number)
        client = Client(address, verbose=False, download_files=place, analytics_enabled=False)
        ratio, painted = (0.5, f"{number} 33") if number % 4 == 0 else (0.25 + 0.05 * (number % 10), "")
        ready.wait()
        if painted:
            return file, ratio, painted, client.predict(handle_file(file), painted, api_name="/apply_mask")
        return file, ratio, painted, client.predict(handle_file(file), ratio, number, api_name="/mask")[1:]

    with ThreadPoolExecutor(VISITORS) as pool:
        answers = list(pool.map(visitor, range(VISITORS)))
    for number, (file, ratio, painted, (*panels, said)) in enumerate(answers):
        columns = 8 + 2 * (number % 3)
        boxes = [(n % columns * 4, n // columns * 4, 4, 4) for n in map(int, painted.split())]
        picture = Image.open(file).convert("RGB").resize((4 * columns, 32), Image.Resampling.BICUBIC)
        expected = reconstruct(model, picture, ratio, number, boxes)
        assert ("by you" if painted else f"at random with seed {number}.") in said
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

    assert tabs("mae") == ["Reconstruct", "Attention and features"]
    assert tabs("encoder") == ["Attention and features"]
    assert tabs("classifier") == ["Attention and features", "classes"]
    assert tabs("encoder", "classifier") == ["Attention and features", "classes"]
    with pytest.raises(ValueError, match="--classifier: vit_mini_patch4"):
        tabs("mae", "encoder")


def test_every_image_format_is_reconstructed(model, tmp_path):
    gray, oblong = (get_model("mae_vit_mini_patch4", **kind) for kind in ({"in_chans": 1}, {"input_size": [32, 64]}))
    values = np.random.default_rng(0).integers(0, 2**16, (40, 70, 3), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", values)
    Image.fromarray(values[:, :, 0]).save(tmp_path / "deep.png")
    Image.new("RGBA", (70, 40), (9, 9, 9, 99)).save(tmp_path / "glass.png")
    Image.new("CMYK", (70, 40)).save(tmp_path / "print.tif")
    Image.new("1", (1, 1)).save(tmp_path / "dot.gif")
    Image.new("L", (40, 10)).save(tmp_path / "strip.bmp")
    for file in sorted(tmp_path.iterdir()):
        height, width = {"dot.gif": (320, 320), "strip.bmp": (320, 1280)}.get(file.name, (320, 560))
        for sees in (model, gray, oblong):
            editor, *panels, said = outputs.draw_mask(sees, str(file), 0.5, 0)
            assert {panel.size for panel in panels} == {(width, height)}
            assert (editor["rows"], editor["columns"]) == (height // SIDE, width // SIDE)
            assert f"{height * width // SIDE**2 // 2} of {height * width // SIDE**2} patches" in said
            maps_of = outputs.look_inside(sees, str(file), outputs.attention_maps(sees, None)[0])[:3]
            assert {panel.size for panel in maps_of} == {(width, height)}


def test_invalid_flags_are_errors(files, tmp_path):
    model = files / "mae.safetensors"
    with pytest.raises(ValueError, match="--samples"):
        call(app, model=model, samples=tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}"):
            call(app, model=model, port=port)
