"""The map of images: what the page and the CSV files have, of folders, lists and archives, and on the page of a run."""

import base64
import csv
import io
import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from mains import call, fails
from PIL import Image

import main_finetune
from mae.inference import (
    curation,
    export,
    features,
    get_model,
    image_map,
    map_lists,
    nearest,
    neighbors,
    reconstruct,
    report,
)

EVIL = "</script><script>alert(1)</script>"


class Tags(HTMLParser):
    """The names of tags, and the addresses in a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def data_of(file):
    """The data of the map of a page."""
    text = file.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="map-data">(.*?)</script>', text, re.DOTALL)[1])


def table(file, name):
    """The rows of a CSV file beside a page, without the titles."""
    with file.with_name(f"{file.stem}_{name}.csv").open(newline="") as rows:
        return list(csv.reader(rows))[1:]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("models") / "encoder.safetensors"
    export.export(export.encoder_of(get_model("mae_vit_mini_patch4")), "safetensors", file)
    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 images of 20 to 40 pixels and two colors; 07 is 08 as another file, and 11 is 10, brighter. 00 has a wrong
    label, and 30 is noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(60):
        pixels = np.asarray(Image.fromarray(generator.integers(0, 200, (5, 5, 3), np.uint8)).resize((40, 20 + number)))
        pixels = pixels.copy()
        pixels[..., number % 2] = 200
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    with Image.open(folder / "08.png") as picture:
        picture.save(folder / "07.bmp")
    with Image.open(folder / "10.png") as picture:
        picture.point(lambda value: min(255, value + 5)).save(folder / "11.png")
    (folder / "07.png").unlink()
    Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "30.png")
    return folder


@pytest.fixture(scope="module")
def file_list(images):
    """A list with their labels, one of which is a script. `00` has a wrong one."""
    lines = ["path,label"]
    for file in sorted(images.glob("*.*")):
        if file.suffix != ".csv":
            odd = int(file.stem) % 2 if file.stem != "00" else 1
            lines.append(f"{file.name},{EVIL if odd else '=even'}")
    (images / "list.csv").write_text("\n".join(lines))
    return images / "list.csv"


@pytest.fixture(scope="module")
def mapped(encoder, file_list, tmp_path_factory):
    out = tmp_path_factory.mktemp("map") / "map.html"
    return call(image_map, file_list, model=encoder, out=out, num_workers=0, pool="avg")


def test_the_page_is_one_file_whose_names_are_text(mapped):
    parsed = Tags(mapped.read_text(encoding="utf-8"))
    assert parsed.tags.count("script") == 2
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert EVIL in data_of(mapped)["colorings"][0]["names"]
    assert any(EVIL in words for words in parsed.words)


def test_the_lists_have_what_is_planted(mapped):
    names = [row[1].rpartition("/")[2] for row in table(mapped, "duplicates")]
    assert names == ["07.bmp", "08.png"]
    ((first, second, distance, *_),) = [row for row in table(mapped, "near_duplicates") if "10.png" in row[0]]
    assert second.endswith("11.png") and first.endswith("10.png") and float(distance) < 0.5
    assert table(mapped, "outliers")[0][0].endswith("30.png") and len(table(mapped, "outliers")) == 59
    (wrong,) = [row for row in table(mapped, "labels") if row[0].endswith("00.png")]
    assert wrong[1:3] == [EVIL, "'=even"]  # no formula of a spreadsheet
    text = " ".join(Tags(mapped.read_text(encoding="utf-8")).words)
    for words in ("among 60 images: 1 equal an earlier one", "In 1 of the 1 groups, the labels differ", "among 59 diff",
                  "All 59 different images", "of 59 different labelled images"):  # fmt: skip
        assert words in text


def test_of_both_poolings_the_patches_tell_outliers(mapped, encoder, file_list, tmp_path):
    page = call(image_map, file_list, model=encoder, out=tmp_path / "map.html", num_workers=0, pool="both")
    outliers, of_patches = ({row[0]: float(row[1]) for row in table(each, "outliers")} for each in (page, mapped))
    assert outliers == pytest.approx(of_patches, rel=1e-4)
    assert table(page, "labels") != table(mapped, "labels")  # the other lists are of both


def test_the_map_has_the_images_and_their_neighbors(mapped, images, encoder):
    data = data_of(mapped)
    paths = [images / name for name in data["names"]]
    assert len(paths) == 60 and all(path.is_file() for path in paths)
    rows = get_model(encoder).extract_feat(paths, "avg")
    similarity = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-2)
    expected = similarity.topk(8, dim=1).values
    found = similarity.gather(1, torch.tensor(data["neighbors"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(data["cosines"]) / 1000, expected, rtol=0, atol=1e-3)
    assert {title["title"]: len(title["groups"]) for title in data["colorings"]} == {"class": 60, "cluster": 60}
    (sheet,) = data["sheets"]
    picture = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    assert picture.size == (8 * 64, 8 * 64) and (data["side"], data["columns"]) == (64, 8)
    number = data["names"].index("30.png")
    row, column = divmod(number, 8)
    drawn = np.asarray(picture.crop((64 * column, 64 * row, 64 * (column + 1), 64 * (row + 1))), float)
    assert drawn[:12].min() > 200 and drawn[12:52, 12:52].std() > 30  # in the middle of a white square


def test_images_whose_neighbors_have_no_label_do_not_agree_with_them():
    """Of two groups of 40 images, all of the first have a label, a quarter another one; one of the second has."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(8)[[0] * 40 + [1] * 40] + 0.1 * torch.randn(80, 8, generator=generator)
    labels = np.full(80, -1)
    labels[:40] = 0
    labels[:20] = np.arange(20) % 2
    labels[60] = 1
    known = map_lists.Images([str(n) for n in range(80)], labels, ["a", "b"], np.zeros(80, int), "80 images")
    listed = map_lists.other_labels(known, np.arange(80), nearest.find(rows, k=curation.NEIGHBORS))
    assert f"{len(listed.entries)} of 41 different labelled images" in listed.text
    assert "No neighbor of 1 labelled image has a label." in listed.text
    assert f"vote for the label of {1 - len(listed.entries) / 40:.1%} of the others" in listed.text


def test_archives_and_folders_without_labels(encoder, images, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(images.glob("*.png"))[:30]:
            archive.write(file, f"pictures/{file.name}")
    page = call(image_map, tmp_path / "images.zip", model=encoder, out=tmp_path / "map.html", num_workers=0)
    assert [each["title"] for each in data_of(page)["colorings"]] == ["cluster"]
    assert not page.with_name("map_labels.csv").exists()
    assert "Images whose neighbors" not in page.read_text()
    assert len(table(page, "outliers")) == 30


def test_of_many_images_evenly_spaced_ones_are_compared_and_the_page_says_so(encoder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(image_map, "IMAGES", 40)
    monkeypatch.setattr(image_map, "ON_MAP", 35)
    folder = tmp_path / "flat"
    shutil.copytree(images, folder, ignore=shutil.ignore_patterns("*.csv"))
    page = call(image_map, folder, model=encoder, out=tmp_path / "map.html", num_workers=0)
    text = " ".join(Tags(page.read_text()).words)
    assert "40 evenly spaced images of the 60" in text and "35 images of the 40 that are compared" in text
    data = data_of(page)
    assert len(data["names"]) == 35
    listed = {row[0].rpartition("/")[2] for row in table(page, "outliers")[:20]}
    assert listed <= {*data["names"]}


def test_thumbnails_are_smaller_if_all_would_take_too_many_bytes(monkeypatch):
    thumbnails = list(np.random.default_rng(0).integers(0, 255, (100, 60, 60, 3), np.uint8))
    side, columns, files = image_map.sheets_of(thumbnails)
    assert (side, columns, len(files)) == (64, 10, 1)
    monkeypatch.setattr(image_map, "SHEETS", 100_000)
    assert image_map.sheets_of(thumbnails)[0] == 32
    monkeypatch.setattr(image_map, "SHEET", 128)
    side, columns, files = image_map.sheets_of(thumbnails)
    assert (side, columns, len(files)) == (32, 4, 7)
    assert Image.open(io.BytesIO(files[-1])).size == (128, 32)
    assert image_map.sheets_of([thumbnail[:28, :28] for thumbnail in thumbnails])[0] == 32


def test_pictures_of_12_bits_and_of_many_channels_are_shown(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**12, (24, 8, 8, 5), np.uint16)
    for number, array in enumerate(pixels):
        np.save(tmp_path / f"{number:02}.npy", array)
    model = get_model("vit_mini_patch4", in_chans=5, channels_last=True, mean=[0.5] * 5, std=[0.3] * 5, input_size=8)
    source = features.open_labelled(features.DataSpec(data_path=str(tmp_path)), "train")
    looks = image_map.look_at(image_map.Pictures(model, source), len(source), 0)
    low, high = np.quantile(pixels[..., :3], (0.005, 0.995))
    expected = np.clip((pixels[3, ..., :3] - low) / (high - low), 0, 1) * 255
    assert np.abs(looks.thumbnails[3].astype(float) - expected).max() <= 1
    assert len({*looks.digests}) == 24 and looks.grays.shape == (24, map_lists.GRAY, map_lists.GRAY)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """41 gray PNG files of 16 bits with values up to 100. The last is the one before, 3 % brighter."""
    folder = tmp_path_factory.mktemp("deep")
    generator = np.random.default_rng(0)
    for number in range(40):
        coarse = Image.fromarray(generator.integers(0, 248, (5, 5), np.uint8)).resize((32, 32))
        values = np.asarray(coarse) * (100 / 255)
        Image.fromarray(values.round().astype(np.uint16)).save(folder / f"{number}.png")
    Image.fromarray((1.03 * values).round().astype(np.uint16)).save(folder / "brighter.png")
    return folder


def is_bright(file):
    pixels = np.asarray(Image.open(file).convert("L"))
    return np.mean(pixels[pixels < 255] < 8) < 0.3


def test_pictures_of_few_of_16_bits_are_not_dark(deep, pretrain, tmp_path):
    out = pretrain(data_path=deep, in_chans=1, mean=0.001, std=0.001, epochs=1)
    flags = {"model": out / "checkpoint-0.pth", "device": "cpu"}
    call(neighbors, deep, out=tmp_path / "neighbors.png", num_workers=0, **flags)
    call(reconstruct, deep / "0.png", deep / "1.png", out=tmp_path / "reconstructions.png", **flags)
    for file in ("neighbors.png", "reconstructions.png"):
        assert is_bright(tmp_path / file), file
    text = call(report, out, device="cpu", num_workers=0).read_text(encoding="utf-8")
    drawn = re.findall(r"data:image/png;base64,([^\"]*)", text)
    assert drawn and all(is_bright(io.BytesIO(base64.b64decode(picture))) for picture in drawn)
    assert "Pictures show values from" in text


def test_near_duplicates_among_few_of_16_bits_are_found(deep, tmp_path):
    model = get_model("vit_mini_patch4", in_chans=1, mean=[0.001], std=[0.001])
    source = features.open_labelled(features.DataSpec(data_path=str(deep)), "train")
    rows = model.extract_feat([source.name(number) for number in range(len(source))])
    survey = image_map.take(model, source, rows, len(source), 0, "")
    names = [{Path(name).name for name in row[:2]} for row in survey.tables["near_duplicates"][1:]]
    assert {"39.png", "brighter.png"} in names


def test_too_few_images_are_one_line(encoder, images, tmp_path, capsys, monkeypatch):
    (tmp_path / "few").mkdir()
    for file in sorted(images.glob("*.png"))[:5]:
        shutil.copy(file, tmp_path / "few")
    line = fails(capsys, monkeypatch, image_map, tmp_path / "few", "--model", encoder, "--out", tmp_path / "m.html")
    assert "5 different images" in line
    assert not [*tmp_path.glob("m*")]


def test_the_page_of_a_run_has_a_map_in_place_of_neighbors(pretrain, labelled):
    out = pretrain(data_path=labelled, epochs=1)
    page = call(report, out, "--map", device="cpu", num_workers=0)
    text = page.read_text(encoding="utf-8")
    assert "<h2>Map</h2>" in text and "<h2>Nearest neighbors</h2>" not in text and "<h2>Reconstructions</h2>" in text
    assert len(data_of(page)["names"]) == 48
    assert {file.name for file in out.glob("report_*.csv")} == {
        f"report_{name}.csv" for name in ("duplicates", "near_duplicates", "outliers", "labels")
    }


def test_the_page_of_a_fine_tuned_run_has_a_map_of_its_training_images(classify, labelled):
    out = classify(main_finetune, epochs=1, warmup_epochs=0)
    page = call(report, out, "--map", device="cpu", num_workers=0)
    data = data_of(page)
    assert len(data["names"]) == 48 and data["colorings"][0]["names"] == [f"kind{number}" for number in range(6)]
    assert "<h2>Images that are wrong</h2>" in page.read_text(encoding="utf-8")
    assert (labelled / "train" / data["names"][0]).is_file()
