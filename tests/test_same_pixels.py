"""Flags of data loading that change no pixel of small pictures: runs with and without them are bit-equal, with worker
processes.
"""

import multiprocessing

import numpy as np
import pytest
from mains import assert_equal, call, weights
from PIL import Image
from test_jpeg import photographs

import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint
from mae.data import jpeg
from mae.inference import features, get_model
from mae.inference.export import export

FAST = {"fast_jpeg": True}
WAYS = {"plain": {}, "fast": FAST}
CACHED = {**WAYS, "cached": {**FAST, "cache_images": True}}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """train/ and val/ with 32 and 12 photographs of three classes; most are color JPEG files."""
    root, sources = tmp_path_factory.mktemp("photos"), photographs()
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 12)):
        for number in range(count):
            width, height = generator.integers(40, 65, size=2).tolist()
            left, top = generator.integers(0, 280, size=2).tolist()
            picture = sources[number % len(sources)].crop((left, top, left + width, top + height))
            picture = picture.convert("L") if number % 8 == 5 else picture
            folder = root / split / f"kind{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:02}.{'png' if number % 8 == 2 else 'jpg'}", quality=90)
    return root


@pytest.fixture
def decoded(monkeypatch):
    """Counts the files that --fast_jpeg decodes without Pillow, in all processes."""
    number, decode_rgb = multiprocessing.get_context("fork").Value("i", 0), jpeg.decode_rgb

    def count(*args):
        picture = decode_rgb(*args)
        with number.get_lock():
            number.value += picture is not None
        return picture

    monkeypatch.setattr(jpeg, "decode_rgb", count)
    return number


@pytest.fixture
def model_file(tmp_path):
    export(get_model("vit_mini_patch4", nb_classes=1000), "safetensors", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def color_files(folder) -> int:
    return sum(Image.open(file).mode == "RGB" for file in folder.rglob("*.jpg"))


def test_fine_tuning(classify, photos, decoded):
    """With RandAugment, and with the evaluation after the epoch."""
    flags = {"data_path": photos, "input_size": 32, "num_workers": 1, "epochs": 1}
    runs = [classify(main_finetune, name, **flags, **way) / "checkpoint-0.pth" for name, way in CACHED.items()]
    for run in runs[1:]:
        assert_equal(*(checkpoint.read(file)["model"] for file in (runs[0], run)))
    assert decoded.value == 2 * color_files(photos)
    before = decoded.value
    plain, fast = (classify(main_finetune, data_path=photos, eval=True, finetune=runs[0], **way)
                   for way in WAYS.values())  # fmt: skip
    assert plain.loss == fast.loss
    assert decoded.value == before + color_files(photos / "val")


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_probes(classify, photos, decoded, cached, capsys):
    flags = {"data_path": photos, "input_size": 32, "num_workers": 1} | ({"cache_features": True} if cached else {})
    runs = [classify(main_linprobe, name, **flags, **way) for name, way in CACHED.items()]
    for run in runs[1:]:
        assert_equal(weights(runs[0]), weights(run))
    train, val = (color_files(photos / split) for split in ("train", "val"))
    assert decoded.value == 2 * (val + train) if cached else (val + 2 * train) + (val + train)
    warning = "`cache_images` has no effect with `cache_features`"
    assert capsys.readouterr().out.count(warning) == cached


def test_neighbors(classify, photos, decoded):
    flags = {"data_path": photos, "input_size": 32, "num_workers": 1, "k": 8, "metric": "auroc"}
    plain, fast = (classify(main_knn, **flags, **way) for way in WAYS.values())
    assert plain == fast
    assert decoded.value == color_files(photos)


def test_features(photos, decoded, model_file, tmp_path):
    results = []
    for flags in ([], ["--fast_jpeg"]):
        out = tmp_path / f"{len(flags)}.npz"
        call(features, photos, "--model", model_file, "--out", out, "--num_workers", 1, *flags)
        results.append(np.load(out)["features"])
    assert np.array_equal(*results)
    assert decoded.value == color_files(photos / "train")
