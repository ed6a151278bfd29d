"""The page about a run in a real browser: python -m pytest tests/demo_report.py

These tests need Chromium. They save screenshots in runs/report_screenshots.
"""

import shutil

from conftest import ROOT
from mains import call
from playwright.sync_api import sync_playwright

import main_finetune
from mae.inference import report

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
