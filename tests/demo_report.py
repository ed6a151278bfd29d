"""The page about a run, and the map of images, in a real browser: python -m pytest tests/demo_report.py

These tests need Chromium. They save screenshots in runs/report_screenshots.
"""

import json
import shutil

from conftest import ROOT
from mains import call
from playwright.sync_api import sync_playwright

import main_finetune
from mae.inference import export, get_model, image_map, report

SCREENSHOTS = ROOT / "runs" / "report_screenshots"


def test_the_page_of_a_fine_tuned_run_fits_narrow_and_wide_windows(classify):
    out = classify(main_finetune, epochs=3, warmup_epochs=0, lr=5e-5)
    address = call(report, out, device="cpu", num_workers=0).as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        for width in (400, 1400):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address)
            page.screenshot(path=SCREENSHOTS / f"tuned_{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            widths = page.evaluate("Array.from(document.images, image => image.naturalWidth * image.width)")
            assert len(widths) > 4 and all(widths)
        browser.close()


def test_the_page_fits_narrow_and_wide_windows(pretrain, labelled):
    """Nothing is wider than the window, every picture is decoded, and nothing is requested from elsewhere."""
    out = pretrain(data_path=labelled, epochs=3, probe_every=1)
    address = call(report, out, device="cpu", num_workers=0).as_uri()
    chromium, requests = shutil.which("chromium"), []
    assert chromium, "there is no chromium here: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        for width, beside in ((400, False), (1400, True)):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address)
            page.screenshot(path=SCREENSHOTS / f"{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            widths = page.evaluate("Array.from(document.images, image => image.naturalWidth * image.width)")
            assert len(widths) == 9 and all(widths)
            lefts = page.evaluate("Array.from(document.querySelectorAll('.pair > div'), part => part.offsetLeft)")
            assert (lefts[0] < lefts[1] and lefts[2] < lefts[3]) == beside
        browser.close()
    assert [url for url in requests if url != address and not url.startswith("data:")] == []


def test_the_map_is_zoomed_panned_and_shows_the_neighbors_of_an_image(labelled, tmp_path):
    """A click, the keyboard and the pictures of the lists select an image. The name of a class is text."""
    script = "</script><script>alert(1)</script>"
    files = sorted(labelled.glob("*/*/*.png"))
    lines = [f"{file},{script if number % 2 else 'even'}" for number, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    encoder = tmp_path / "encoder.safetensors"
    export.export(export.encoder_of(get_model("mae_vit_mini_patch4")), "safetensors", encoder)
    out = tmp_path / "map.html"
    call(image_map, tmp_path / "list.csv", model=encoder, out=out, num_workers=0, device="cpu")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        for width in (400, 1400):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(out.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert script in page.locator(".legend").inner_text()
            use_map(page, len(files))
            page.screenshot(path=SCREENSHOTS / f"map_{width}.png", full_page=True)
        browser.close()
    assert problems == []


def use_map(page, count):
    """Zooms, pans and selects images of a map."""
    canvas = page.locator("#map")

    def shown():
        page.wait_for_timeout(100)  # it is drawn in the next frame
        return canvas.evaluate("canvas => canvas.toDataURL()")

    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    states = [shown()]
    page.get_by_label("zoom in").click()
    states.append(shown())
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 40, steps=4)
    page.mouse.up()
    states.append(shown())
    assert page.locator(".path").count() == 0  # a drag selects nothing
    canvas.focus()
    page.mouse.wheel(0, -200)
    states.append(shown())
    assert len({*states}) == 4
    page.get_by_label("show the whole map").click()
    assert shown() == states[0]
    data = json.loads(page.locator("#map-data").text_content())
    assert len(data["names"]) == count
    points = [(x, y) for y in range(20, int(box["height"]), 40) for x in range(20, int(box["width"]), 40)]
    assert any(hits(page, canvas, x, y) for x, y in points)
    clicked = page.locator(".path").inner_text()
    near = [data["names"][index] for index in data["neighbors"][data["names"].index(clicked)]]
    assert page.locator(".near button").evaluate_all("buttons => buttons.map(button => button.title)") == near
    canvas.press("Enter")
    assert "neighbor 1" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    assert page.locator(".path").inner_text() == near[0]
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".path").inner_text() != near[0]
    page.locator(".pick").last.click()
    assert page.locator(".path").inner_text() == page.locator(".pick img").last.get_attribute("alt")


def hits(page, canvas, x, y):
    """Clicks a point of the map. Returns whether an image is there."""
    canvas.click(position={"x": x, "y": y})
    return page.locator(".path").count() == 1
