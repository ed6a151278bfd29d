"""The command neighbors and its functions: which images are nearest, the picture, and the share of equal labels."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import call, fails
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from mae.evaluate import pictures
from mae.inference import anomalies, export, features, get_model, image_map, neighbors, reconstruct

STEP = 32 * 4 + pictures.GAP  # from an image of 32 pixels to the next in a picture, which enlarges it


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("models") / "encoder.safetensors"
    export.export(export.encoder_of(get_model("mae_vit_mini_patch4")), "safetensors", file)
    return file


def assert_nearest(bank, indices, queries=None):
    """The rows have the other rows with the highest cosine similarity, nearest first; equal ones in any order."""
    similarity = torch.from_numpy(cosine_similarity(bank.double().numpy())).fill_diagonal_(-2)
    if queries is not None:
        similarity = similarity[queries]
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    expected = similarity.topk(indices.shape[1], dim=1).values
    torch.testing.assert_close(similarity.gather(1, indices), expected, rtol=0, atol=1e-5)


def drawn(file):
    """The images of a picture without labels, gray (rows, columns, 32, 32)."""
    pixels = np.asarray(Image.open(file).convert("L"))[pictures.HEADER :]
    pixels = np.pad(pixels[:, -(7 * STEP - pictures.GAP) :], ((0, pictures.GAP), (0, pictures.GAP)))
    rows = pixels.reshape(len(pixels) // STEP, STEP, 7, STEP).swapaxes(1, 2)
    return rows[:, :, : -pictures.GAP : 4, : -pictures.GAP : 4]


def test_the_nearest_have_the_highest_cosine_similarity():
    rows = torch.randn(200, 16) * torch.rand(200, 1)
    given = rows.clone()
    found = neighbors.find(rows, k=7)
    assert torch.equal(rows, given) and torch.equal(found.features, given)
    assert found.indices.shape == (200, 7)
    assert_nearest(rows, found.indices)
    expected = torch.cosine_similarity(rows[:, None], rows[found.indices], dim=2)
    torch.testing.assert_close(found.similarities, expected)
    chosen = [3, 50, 120]
    assert torch.equal(neighbors.find(rows, rows[chosen], chosen, k=7).indices, found.indices[chosen])


def test_an_image_is_no_neighbor_of_itself_among_equal_images():
    rows = torch.ones(20, 4)
    indices = neighbors.find(rows, k=19).indices
    assert [sorted([*row, number]) for number, row in enumerate(indices.tolist())] == [list(range(20))] * 20


def test_another_image_may_have_any_neighbor():
    rows = torch.eye(4)
    assert neighbors.find(rows, 3 * rows[[2, 1]], k=1).indices.tolist() == [[2], [1]]
    near = neighbors.find(rows, rows[[2, 1]] + 0.1 * rows[[3, 3]], [-1, 1], k=1)
    assert near.indices.tolist() == [[2], [3]]
    assert neighbors.find(rows, k=10).indices.shape == (4, 3)
    assert neighbors.find(rows, rows[:1], k=10).indices.shape == (1, 4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_of_features_has_the_neighbors_of_its_images(encoder, labelled, tmp_path, suffix):
    file = tmp_path / f"features{suffix}"
    call(features, labelled, model=encoder, out=file, split="val", pool="avg", num_workers=0)
    found = neighbors.find(file)
    names = sorted((labelled / "val").glob("*/*.png"))
    expected = get_model(encoder).extract_feat(names, "avg")
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.indices.shape == (23, 6)
    assert_nearest(found.features, found.indices)


def test_features_that_are_not_finite_are_refused_by_their_rows():
    rows = torch.randn(20, 4)
    bad = rows.clone()
    bad[3, 1], bad[7, 0] = torch.nan, torch.inf
    for given in ((bad,), (rows, bad)):
        with pytest.raises(ValueError, match=r"rows 3, 7\b"):
            neighbors.find(*given)


@pytest.mark.parametrize(
    ("script", "output"), [(neighbors, "n.png"), (image_map, "m.html"), (anomalies, "defects"), (reconstruct, "0.png")]
)
def test_an_output_among_the_images_is_refused(labelled, tmp_path, capsys, monkeypatch, script, output):
    """The next command would read it as an image, or it would replace one."""
    folder = tmp_path / "images"
    shutil.copytree(labelled / "train" / "kind0", folder)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    before = sorted(folder.iterdir())
    images = {anomalies: [labelled, folder], reconstruct: [folder / "0.png"]}.get(script, [folder])
    line = fails(capsys, monkeypatch, script, *images, "--model", "no.pth", "--out", folder / ".." / "images" / output)
    assert "out=" in line and str(images[-1]) in line
    assert sorted(folder.iterdir()) == before


def test_features_of_all_tokens_have_no_neighbors(encoder, labelled, tmp_path):
    call(features, labelled, model=encoder, out=tmp_path / "f.npz", pool="tokens", num_workers=0)
    with pytest.raises(ValueError, match=r"\(48, 65, 128\).*pool"):
        neighbors.find(tmp_path / "f.npz")


def test_the_command_draws_twelve_images_and_their_neighbors(encoder, labelled, tmp_path, capsys):
    found = call(neighbors, labelled, model=encoder, out=tmp_path / "n.png", num_workers=0)
    *_, agreement, file = capsys.readouterr().out.splitlines()
    names = sorted((labelled / "train").glob("*/*.png"))
    rows = get_model(encoder).extract_feat(names)
    chosen = np.linspace(0, 47, 12).astype(int).tolist()
    assert_nearest(rows, found.indices, chosen)
    shown = drawn(tmp_path / "n.png")
    model = get_model(encoder)
    for row, query, near in zip(shown, chosen, found.indices.tolist(), strict=True):
        for image, number in zip(row, [query, *near], strict=True):
            expected = Image.fromarray(model.transform(model.open(names[number])).permute(1, 2, 0).numpy())
            assert np.abs(image.astype(int) - np.asarray(expected.convert("L"))).max() <= 1
    labels = np.array([name.parent.name for name in names])
    share = np.mean(labels[neighbors.find(rows).indices] == labels[:, None])
    printed, chance = re.findall(r"(\d+\.\d)%", agreement)
    assert float(printed) == pytest.approx(100 * share, abs=1) and chance == "14.9"
    assert str(tmp_path / "n.png") in file


def test_queries_of_ones_own(encoder, labelled, tmp_path):
    """A file of the folder is no neighbor of itself, also by another path; a copy elsewhere has it as its nearest."""
    names = sorted((labelled / "train").glob("*/*.png"))
    (tmp_path / "link").symlink_to(labelled)
    inside = tmp_path / "link" / "train" / "kind0" / ".." / "kind0" / names[2].name
    outside = shutil.copy(names[2], tmp_path / "copy.png")
    flags = {"model": encoder, "out": tmp_path / "n.png", "num_workers": 0}
    found = call(neighbors, labelled, "--query", inside, outside, **flags)
    assert_nearest(get_model(encoder).extract_feat(names), found.indices[:1], [2])
    assert found.indices[1].tolist() == [2, *found.indices[0, :5].tolist()]
    shown = drawn(tmp_path / "n.png")
    assert len(shown) == 2
    assert np.array_equal(shown[0, 0], shown[1, 0]) and np.array_equal(shown[1, 0], shown[1, 1])


def test_queries_are_read_as_the_images_are(encoder, tmp_path):
    """A photograph with an orientation in its EXIF data has its own copy as the nearest, with the cosine 1."""
    exif = Image.Exif()
    exif[274] = 6
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(8):
        pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png", exif=exif)
    query = shutil.copy(tmp_path / "images/3.png", tmp_path / "query.png")
    flags = {"model": encoder, "out": tmp_path / "n.png", "num_workers": 0}
    found = call(neighbors, tmp_path / "images", "--query", query, **flags)
    assert found.indices[0, 0] == 3 and found.similarities[0, 0] == pytest.approx(1, abs=1e-6)


def test_a_few_images_without_classes(encoder, labelled, tmp_path, capsys):
    for number, file in enumerate(sorted(labelled.glob("train/*/*.png"))[::12]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    found = call(neighbors, tmp_path / "flat", model=encoder, out=tmp_path / "n.png", num_workers=0)
    assert found.indices.shape == (4, 3)
    assert "label" not in capsys.readouterr().out
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.height == pictures.HEADER + 4 * STEP - pictures.GAP


def test_a_missing_query_ends_the_command_before_the_model_is_loaded(labelled, tmp_path, capsys, monkeypatch):
    argv = [labelled, "--model", tmp_path / "none.pth", "--query", tmp_path / "no.png", "--out", tmp_path / "n.png"]
    assert "no.png" in fails(capsys, monkeypatch, neighbors, *argv)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(encoder, labelled, tmp_path):
    command = [sys.executable, "-m", "mae.inference.neighbors", labelled, "--model", encoder, "--out",
               tmp_path / "n.png", "--device", "cpu", "--num_workers", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(drawn(tmp_path / "n.png")) == 12
