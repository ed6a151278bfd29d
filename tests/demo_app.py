"""The web page in a real browser: python -m pytest tests/demo_app.py

These tests need Chromium. They save screenshots in runs/app_screenshots.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import wait_until
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from demo.app import PANELS, to_picture
from mae.inference import export, get_model
from mae.inference.reconstruct import reconstruct

pytestmark = pytest.mark.xdist_group("app")
CAT = ROOT / "demo" / "photos" / "chelsea.jpg"  # 3 to 2: 32 x 48 pixels, 8 x 12 patches
ROWS, COLUMNS = 8, 12
MASKED, PASTED, ORIGINAL = PANELS
SCREENSHOTS = ROOT / "runs" / "app_screenshots"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An autoencoder."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("models") / "mae.safetensors"
    export.export(get_model("mae_vit_mini_patch4"), "safetensors", file)
    return file


@pytest.fixture(scope="module")
def address(file, tmp_path_factory):
    """The address of the served page. At the end, its log must contain no traceback and no link to share."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with log.open("w") as out:
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads")}
        command = [sys.executable, "demo/app.py", "--port", port, "--model", file]
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)
    try:
        wait_until(lambda: server.poll() is not None or "Running on" in log.read_text(), seconds=120)
        assert "Running on" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
    assert "Traceback" not in log.read_text()
    assert "share" not in log.read_text()  # gradio's offer of a public link


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium here: apt-get install chromium"
    expect.set_options(timeout=30_000)  # other tests use the cores, too
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page for another visitor. It must send no requests to other hosts, and its scripts must not fail."""
    requests, failures = [], []

    def open_page(width: int = 1400, **options) -> Page:
        page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: message.type == "error" and failures.append(message.text))
        page.goto(address)
        expect(page.get_by_text("48 of 64 patches are masked, at random with seed 0")).to_be_visible()  # an example
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert failures == []


def choose_cat(page: Page) -> None:
    page.locator(".examples button").nth(1).click()
    expect(page.get_by_text("72 of 96 patches are masked, at random")).to_be_visible()
    wait_until(lambda: all(is_of_cat(pixels(page, title)) for title in PANELS))  # the browser shows the text before


def is_of_cat(pixels: np.ndarray) -> bool:
    height, width, _ = pixels.shape
    return height * COLUMNS == width * ROWS


def pixels(page: Page, title: str) -> np.ndarray:
    """The pixels of a panel (H, W, 3), after the browser has loaded it."""
    image = page.get_by_alt_text(title)
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    with Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())) as picture:
        return np.asarray(picture.convert("RGB"))


def masked_patches(page: Page) -> set[int]:
    """The patches that differ between the panels of the original and of the masked image."""
    differs = (pixels(page, ORIGINAL) != pixels(page, MASKED)).any(axis=2)
    patches = differs.reshape(ROWS, differs.shape[0] // ROWS, COLUMNS, -1).any(axis=(1, 3))
    return set(patches.flatten().nonzero()[0].tolist())


def click_patches(page: Page, *numbers: int) -> None:
    """Clicks at once, without waiting for a result: a new picture may move what is below it."""
    image = page.get_by_alt_text(MASKED)
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    for row, column in (divmod(number, COLUMNS) for number in numbers):
        x, y = (column + 0.5) / COLUMNS, (row + 0.5) / ROWS
        page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)


def test_a_picture_is_masked_at_random_and_reconstructed(visit, file):
    page, other = visit(), visit()
    choose_cat(page)
    model = get_model(file)
    result = reconstruct(model, CAT, 0.75, seed=0)
    for title, part in PANELS.items():
        found, expected = pixels(page, title), np.asarray(to_picture(model, result[part]))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1  # threads may round otherwise
    many = masked_patches(page)
    slider = page.get_by_role("slider", name="Mask ratio")
    for _ in range(5):
        slider.press("ArrowLeft")
    expect(page.get_by_text("48 of 96 patches are masked, at random with seed 0")).to_be_visible()
    wait_until(lambda: len(masked_patches(page)) == 48)  # the browser shows the text before the picture
    fewer = masked_patches(page)
    assert len(many) == 72 and fewer < many  # the same noise
    page.get_by_role("button", name="Another random mask").click()
    expect(page.get_by_text("48 of 96 patches are masked, at random with seed 1")).to_be_visible()
    wait_until(lambda: masked_patches(page) != fewer)
    expect(other.get_by_text("48 of 64 patches are masked, at random with seed 0")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_a_click_toggles_a_patch(visit, width, scheme):
    page = visit(width, color_scheme=scheme)
    choose_cat(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{width}_{scheme}.png", full_page=True)
    before, pasted = masked_patches(page), pixels(page, PASTED)
    visible = sorted(set(range(ROWS * COLUMNS)) - before)
    click_patches(page, visible[0], visible[-1])
    expect(page.get_by_text("74 of 96 patches are masked, by you")).to_be_visible()
    wait_until(lambda: masked_patches(page) == before | {visible[0], visible[-1]})
    wait_until(lambda: (pixels(page, PASTED) != pasted).any())
    click_patches(page, visible[0])
    expect(page.get_by_text("73 of 96 patches are masked, by you")).to_be_visible()
    wait_until(lambda: masked_patches(page) == before | {visible[-1]})


def test_uploads_are_reconstructed_or_refused_in_one_line(visit, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:9000])
    (tmp_path / "heavy.jpg").write_bytes(os.urandom(11_000_000))
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    page = visit()
    upload = page.locator("input[type=file]")
    for name, said in (("bomb.png", "more than the limit"), ("cut.jpg", "can't be read")):
        upload.set_input_files(tmp_path / name)
        alert = page.get_by_role("alert").filter(has_text=f"{name}: ")
        expect(alert).to_contain_text(said)
        assert str(tmp_path) not in alert.inner_text() and "\n" not in alert.inner_text()
        expect(page.get_by_alt_text(MASKED)).to_have_count(0)  # no picture of an earlier image
    upload.set_input_files(CAT)
    expect(page.get_by_text("72 of 96 patches are masked, at random with seed 0")).to_be_visible()
    upload.set_input_files(tmp_path / "heavy.jpg")  # the browser does not send it, and the page does not change
    expect(page.get_by_test_id("toast-body")).to_contain_text("exceed the maximum allowed size of 10")
    expect(page.get_by_text("72 of 96 patches are masked, at random with seed 0")).to_be_visible()


def test_the_page_is_served_to_this_computer_and_serves_no_other_file(address, file):
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # an address of this computer too, which a server for all answers at
        socket.create_connection(("127.0.0.2", port), timeout=5)
    for path in (ROOT / "README.md", file):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
