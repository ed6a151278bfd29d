"""The command anomalies and its functions: distances to the patches of normal images, by the formula in NumPy."""

import csv
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from mains import call, fails, open_source, randomized
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from mae.data.source import evenly_spaced
from mae.inference import anomalies, export, get_model
from models_dino import DINOv2, DINOv3

DINO = {"encoder_args": ["embed_dim=32", "depth=4", "num_heads=4"], "input_size": 32, "patch_size": 8, "nb_classes": 0}
MODELS = {
    "gray": ("mae_vit_mini_patch4", {"in_chans": 1}),
    "five channels": ("vit_mini_patch4", {"in_chans": 5, "nb_classes": 0, "input_size": [32, 24]}),
    "DINOv2": ("vit_mini_patch4", {**DINO, "encoder": DINOv2, "num_cls_tokens": 3}),
    "DINOv3": ("vit_mini_patch4", {**DINO, "encoder": DINOv3, "num_cls_tokens": 5}),
    "timm, tokens": ("test_vit", {}),
    "timm, stages": ("test_resnet", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    name, settings = MODELS[request.param]
    torch.manual_seed(0)
    if request.param.startswith("timm"):
        file = tmp_path_factory.mktemp("timm") / "weights.pth"
        torch.save(timm.create_model(name).state_dict(), file)
        return get_model(f"{file}#timm:{name}")
    return randomized(get_model(name, **settings), 0.1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("models") / "encoder.safetensors"
    export.export(export.encoder_of(randomized(get_model("mae_vit_mini_patch4", in_chans=1), 0.1)), "safetensors", file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """normal/ with 10 textures of other sizes; test/good with 6, and test/hole with 5 that have a bright square."""
    root = tmp_path_factory.mktemp("textures")
    generator = np.random.default_rng(0)
    for folder, count in (("normal", 10), ("test/good", 6), ("test/hole", 5)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = 100 + 10 * np.sin(np.arange(40) + number)[:, None] + generator.normal(0, 5, (40, 48))
            if folder == "test/hole":
                pixels[:8, 40:] = 250  # in a corner
            name = f"={number}.png" if number == 1 else f"{number}.png"  # a formula in a spreadsheet
            Image.fromarray(pixels.round().astype(np.uint8)).save(root / folder / name)
    return root


def averaged(maps, side):
    """The mean over the patches that exist of a square around each patch: (D, h, w) -> (D, h, w)."""
    result = np.empty_like(maps)
    for row, column in np.ndindex(maps.shape[1:]):
        rows, columns = (slice(max(0, center - side // 2), center + side // 2 + 1) for center in (row, column))
        result[:, row, column] = maps[:, rows, columns].mean(axis=(1, 2))
    return result


def scaled(maps, height, width):
    """Bilinear interpolation between the centers of patches: (D, h, w) -> (D, height, width)."""
    for axis, size in ((1, height), (2, width)):
        old = maps.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), max(0, old - 2))
        share = (at - low).reshape([-1 if number == axis else 1 for number in range(3)])
        upper = maps.take(np.minimum(low + 1, old - 1), axis)
        maps = maps.take(low, axis) * (1 - share) + upper * share
    return maps


def blurred(image, sigmas):
    """A Gaussian up to four sigmas, of an image that is mirrored at its borders."""
    for axis, sigma in enumerate(sigmas):
        radius = int(4 * sigma + 0.5)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        padding = [(radius, radius) if number == axis else (0, 0) for number in range(2)]
        padded = np.pad(image, padding, mode="symmetric")
        lines = [np.convolve(line, weights / weights.sum(), "valid") for line in np.moveaxis(padded, axis, 1)]
        image = np.moveaxis(np.stack(lines), 1, axis)
    return image


def features_of(model, images, blocks, side):
    """Features (B, h, w, D) of patches, from the tokens of the model."""
    x = model.prepare(images)
    with torch.no_grad():
        if hasattr(model, "net"):
            maps = model.net.forward_intermediates(x, blocks, intermediates_only=True)
        else:
            tokens = model.get_intermediate_layers(x, blocks, norm=False)
            grid = [s // p for s, p in zip(x.shape[2:], model.patch_embed.patch_size, strict=True)]
            maps = [one[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for one in tokens]
    grid = max(tuple(one.shape[2:]) for one in maps)
    rows = [[scaled(averaged(image.double().numpy(), side), *grid) for image in one] for one in maps]
    return np.concatenate([np.stack(one) for one in rows], axis=1).transpose(0, 2, 3, 1)


def test_scores_and_maps_are_those_of_the_formula(model):
    """With any encoder: the distance of each patch to the nearest patch of a normal image, its maximum, and its map."""
    sides = model.prepare(np.zeros((8, 8, model.in_chans), np.uint8)).shape[2:]
    normal, tested = torch.randint(0, 256, (2, 3, model.in_chans, *sides), dtype=torch.uint8)
    memory = anomalies.fit(model, normal, batch_size=2)
    scores, maps = memory(list(tested), batch_size=2)
    stages = getattr(model, "name", "") == "test_resnet"
    blocks = {4: [1, 2], 6: [2, 3], 5: [2, 3]}[len(model.reductions) if hasattr(model, "net") else len(model.blocks)]
    rows, others = (features_of(memory.model, list(images), blocks, 3 if stages else 1) for images in (normal, tested))
    assert memory.rows.shape == (rows[..., 0].size, rows.shape[3])
    assert (rows.shape[1:3] == (20, 20)) == stages
    distances = cdist(others.reshape(-1, rows.shape[3]), rows.reshape(-1, rows.shape[3])).min(axis=1)
    distances = distances.reshape(others.shape[:3])
    np.testing.assert_allclose(scores, distances.max(axis=(1, 2)), rtol=1e-4)
    assert maps.shape == (3, *sides)
    sigmas = [side / count / 2 for side, count in zip(sides, rows.shape[1:3], strict=True)]
    expected = [blurred(scaled(one[None], *sides)[0], sigmas) for one in distances]
    np.testing.assert_allclose(maps, expected, rtol=1e-3)
    assert memory(normal)[0].max() == 0


def test_averages_and_blocks_of_ones_own():
    model = randomized(get_model("vit_mini_patch4", in_chans=1, nb_classes=0, input_size=16), 0.1)
    images = list(torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8))
    memory = anomalies.fit(model, images, blocks=[0, -1], average=3)
    np.testing.assert_allclose(
        memory.rows, features_of(model, images, [0, 3], 3).reshape(32, -1), rtol=1e-4, atol=1e-5
    )  # fmt: skip
    with pytest.raises(ValueError, match="average=2"):
        anomalies.fit(model, images, average=2)
    with pytest.raises(ValueError, match="block 4"):
        anomalies.fit(model, images, blocks=[4])


def test_an_export_to_timm_has_the_features_of_the_encoder(tmp_path):
    """anomalib makes its encoder by this call, and takes the outputs of blocks with the final norm."""
    model = randomized(get_model("vit_mini_patch4", nb_classes=0, global_pool=False), 0.1)
    file = tmp_path / "encoder.safetensors"
    export.export(model, "safetensors", file)
    call(export, model=file, to="timm", out=tmp_path / "vit_mine")
    name = f"local-dir:{tmp_path / 'vit_mine'}"
    net = timm.create_model(name, pretrained=True, pretrained_cfg=None, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = net.forward_intermediates(images, indices=[1, 2], norm=True, intermediates_only=True)
        tokens = model.get_intermediate_layers(images, [1, 2])
    for found, expected in zip(maps, tokens, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_images_of_another_size_than_those_of_the_memory(encoder, folders):
    """Files are scaled as a whole, without a crop; the input of the model may have another size."""
    model = get_model(encoder)
    normal = sorted(folders.glob("normal/*.png"))
    memory = anomalies.fit(model, normal)
    large = [np.asarray(Image.open(name).resize((200, 100))) for name in normal[:2]]
    assert memory(large)[1].shape == (2, 32, 32)
    assert memory(torch.zeros(1, 1, 64, 48))[1].shape == (1, 64, 48)
    scores, maps = memory(sorted(folders.glob("test/*/*.png")))
    assert scores[6:].min() > 2 * scores[:6].max()
    rows, columns = np.unravel_index(maps[6:].flatten(1).argmax(dim=1).numpy(), (32, 32))
    assert rows.max() < 7 and columns.min() > 25
    assert model.preprocess is not memory.model.preprocess


def test_distances_are_exact_and_those_of_equal_rows_zero():
    memory = 1000 + torch.randn(300, 24)
    rows = torch.cat([memory[:5], 1000 + torch.randn(50, 24)])
    expected = cdist(rows.double(), memory.double())
    np.testing.assert_allclose(anomalies.nearest(rows, memory), expected.min(axis=1), rtol=1e-4)
    assert not anomalies.nearest(rows, memory)[:5].any()
    ignored = torch.arange(300) < 5
    np.testing.assert_allclose(anomalies.nearest(rows, memory, ignored), expected[:, 5:].min(axis=1), rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(anomalies.nearest(rows, memory), expected.min(axis=1), rtol=1e-4)


def test_the_coreset_takes_the_farthest_row_each_time():
    rows = torch.randn(200, 16)
    chosen = anomalies.coreset(rows, 20, seed=3).tolist()
    distances = cdist(rows, rows)
    for count in range(1, 20):
        assert chosen[count] == distances[chosen[:count]].min(axis=0).argmax()
    assert anomalies.coreset(rows, 20, seed=3).tolist() == chosen != anomalies.coreset(rows, 20).tolist()


def test_the_coreset_of_many_dimensions_covers_all_rows():
    """A random projection changes distances little: 20 rows of each of 20 groups have one chosen row of each group."""
    rows = torch.randn(20, 1, 600) + 0.1 * torch.randn(20, 20, 600)
    chosen = anomalies.coreset(rows.flatten(0, 1), 20)
    assert sorted((chosen // 20).tolist()) == [*range(20)]


def test_no_row_is_chosen_twice():
    assert sorted(anomalies.coreset(torch.ones(30, 4), 30).tolist()) == [*range(30)]


def test_a_large_memory_is_the_coreset_of_random_patches(encoder, folders, monkeypatch):
    monkeypatch.setattr(anomalies, "CANDIDATES", 205)
    model, normal = get_model(encoder), sorted(folders.glob("normal/*.png"))
    memory = anomalies.fit(model, normal, size=10**6)
    assert memory.images.bincount().tolist() == [20] * 10
    every = features_of(memory.model, normal, [1, 2], 1).reshape(640, -1)
    near = cdist(memory.rows.double(), every)
    assert near.min(axis=1).max() < 1e-3 and len({*near.argmin(axis=1)}) == 200
    assert (near.argmin(axis=1) // 64 == memory.images.numpy()).all()
    small = anomalies.fit(model, normal, size=30)
    assert small.rows.shape == (30, 256) and len(small.images) == 30


def run(folders, encoder, out, *flags, images="test", capsys=None):
    scores = call(anomalies, folders / "normal", folders / images, *flags, model=encoder, out=out, num_workers=0)
    rows = [*csv.DictReader((out / "scores.csv").open())]
    return scores, rows, capsys and capsys.readouterr().out


def test_the_command_writes_scores_and_a_picture(encoder, folders, tmp_path, capsys):
    _, rows, output = run(folders, encoder, tmp_path / "out", capsys=capsys)
    names = sorted(map(str, folders.glob("test/*/*.png")))
    memory = anomalies.fit(get_model(encoder), sorted(folders.glob("normal/*.png")))
    expected = dict(zip(names, memory(names)[0].tolist(), strict=True))
    found = {row["image"].removeprefix("'"): float(row["score"]) for row in rows}
    assert found == pytest.approx(expected, rel=1e-4)
    assert [*found.values()] == sorted(found.values(), reverse=True)
    area = roc_auc_score(["hole" in name for name in found], [*found.values()])
    assert f"{area:.3f}: 6 images of good against 5 of hole" in output and area == 1
    with Image.open(tmp_path / "out" / "worst.png") as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("RGB")).std() > 10


def test_normal_images_are_scored_without_their_own_patches(encoder, folders, tmp_path, capsys):
    _, rows, output = run(folders, encoder, tmp_path / "out", capsys=capsys)
    normal = sorted(folders.glob("normal/*.png"))
    scores = [
        float(anomalies.fit(get_model(encoder), [*normal[:number], *normal[number + 1 :]])(name)[0])
        for number, name in enumerate(normal)
    ]
    assert f"10 normal images, each without its own patches: median score {np.sort(scores)[4]:.4g}" in output
    above = sum(float(row["score"]) > max(scores) for row in rows)
    assert f"highest {max(scores):.4g}; images with a higher score: {above} of 11" in output
    assert "10 normal images, which are few" in output
    for row in rows:
        assert float(row["normal_below"]) == np.mean(np.array(scores) < float(row["score"]))


def test_images_above_all_normal_ones_have_red_and_others_have_none(encoder, folders, tmp_path, monkeypatch):
    """Also if a Gaussian makes the maximum of a heat map much smaller than the score."""
    levels = []
    monkeypatch.setattr(anomalies, "overlay", lambda picture, level: levels.append(level.max()) or picture)
    model = get_model(encoder)
    source = open_source("train", str(folders / "test"))
    distances = torch.ones(3, 8, 8)
    distances[0, 3, 3] = 9
    distances[1, 5, 5] = 5
    normal = torch.linspace(1, 6, 640).view(10, 8, 8)
    anomalies.draw(model, source, [0, 1, 2], distances, normal, tmp_path / "picture.png")
    low = np.quantile(normal, 0.95)
    assert levels == pytest.approx([1, max(0, (5 - low) / (6 - low)), 0], abs=1e-6)


def test_lists_archives_and_images_without_classes(encoder, folders, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in folders.glob("test/*/*.png"):
            archive.write(name, name.name.replace(".png", f"{name.parent.name}.png"))
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(map(str, sorted(folders.glob("normal/*.png")))))
    flags = {"model": encoder, "num_workers": 0}
    scores = call(anomalies, tmp_path / "list.csv", tmp_path / "images.zip", out=tmp_path / "a", **flags)
    assert "AUROC" not in capsys.readouterr().out
    torch.testing.assert_close(scores.sort().values, run(folders, encoder, tmp_path / "b")[0].sort().values)


def test_one_normal_image_has_nothing_to_compare_with(encoder, folders, tmp_path, capsys):
    """Its copy has a warning."""
    for folder in ("one", "copy"):
        (tmp_path / folder).mkdir()
        Image.open(folders / "normal" / "0.png").save(tmp_path / folder / "0.png")
    call(anomalies, tmp_path / "one", tmp_path / "copy", model=encoder, out=tmp_path / "out", num_workers=0)
    output = capsys.readouterr().out
    assert "of one image" in output and "1 of the images are copies" in output
    assert "normal_below\n" in (tmp_path / "out" / "scores.csv").read_text().replace("\r", "")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("{f}/normal", "{f}/../{f.name}/normal", "--model", "none.pth"), "10 of the 10 images"),
        (("{f}", "{f}/test/hole", "--model", "none.pth"), "5 of the 5 images"),
        (("{f}/normal", "{t}", "--model", "none.pth"), "no images"),
        (("{f}/normal", "{t}/absent", "--model", "none.pth"), "there is no such folder"),
        (("{f}/normal", "{f}/test", "--model", "{e}", "--blocks", "9"), "there is no block 9"),
        (("{f}/normal", "{f}/test", "--model", "{e}", "--average", "4"), "average=4"),
        (("{f}/normal", "{f}/test", "--model", "{five}"), "in_chans=5"),
        (("{f}/normal", "{f}/test", "--model", "{e}", "--memory", "0"), "memory"),
    ],
)
def test_mistakes_have_one_line(words, text, encoder, folders, tmp_path, capsys, monkeypatch):
    five = tmp_path / "five.safetensors"
    if "{five}" in words:
        export.export(get_model("vit_mini_patch4", in_chans=5, nb_classes=0), "safetensors", five)
    (tmp_path / "empty").mkdir()
    argv = [word.format(f=folders, t=tmp_path / "empty", e=encoder, five=five) for word in words]
    assert text in fails(capsys, monkeypatch, anomalies, *argv, "--out", tmp_path / "out", "--num_workers", 0)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(encoder, folders, tmp_path):
    command = [sys.executable, "-m", "mae", "anomalies", folders / "normal", folders / "test", "--model", encoder,
               "--out", tmp_path / "out", "--device", "cpu", "--num_workers", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout and {path.name for path in (tmp_path / "out").iterdir()} == {
        "scores.csv",
        "worst.png",
    }


def test_some_of_the_normal_images_are_scored_without_their_own_patches(
    encoder, folders, tmp_path, capsys, monkeypatch
):
    """If there are more than COMPARED, evenly spaced ones are scored."""
    monkeypatch.setattr(anomalies, "COMPARED", 4)
    output = run(folders, encoder, tmp_path / "out", capsys=capsys)[2]
    normal = sorted(folders.glob("normal/*.png"))
    scores = sorted(
        float(anomalies.fit(get_model(encoder), [*normal[:number], *normal[number + 1 :]])(normal[number])[0])
        for number in evenly_spaced(10, 4)
    )
    expected = f"median score {scores[1]:.4g}, highest {scores[3]:.4g};"
    assert f"4 normal images, each without its own patches: {expected}" in output
