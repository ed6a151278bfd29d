"""`python -m mae.data --recipe`: the recipe fits the images, the machine and the time, or a line says what is wrong."""

import io
import math
import re
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from conftest import ROOT
from mains import argv_of, call, lines, parse
from PIL import Image

import main_pretrain
from benchmarks import leaderboard
from demo import unpack_data
from mae.data.pixels import BadImage
from mae.recommend import board, check, recipe, rules, trial
from mae.recommend.facts import Images, Machine, warnings_of

PHOTOS = Images(
    count=100_000, distinct=100_000, bad=0, height=375, width=500, shorter=375, spread=(200, 900), has_one_shape=False,
    in_chans=3, mean=[0.5] * 3, std=[0.2] * 3, value_range=None, is_deep=False, num_bytes=5e10,
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_images(folder: Path, count: int, *shape: int) -> None:
    for number in range(count):
        Image.fromarray(noise(*shape, seed=number)).save(folder / f"{number}.png")


def statistics_of_recipe(folder, channels, capsys):
    call(check, folder, in_chans=channels, num_workers=0, recipe=folder.with_suffix(".yaml"), minutes=1)
    capsys.readouterr()
    settings = yaml.safe_load(folder.with_suffix(".yaml").read_text())
    low, high = settings.get("value_range") or (0, 1)
    return np.array(settings["mean"]) * (high - low) + low, np.array(settings["std"]) * (high - low), settings


def test_statistics_of_channels_of_other_units(tmp_path, capsys):
    """Kelvin, kg/kg, m/s and Pa: a mean is precise to .01 std, and no channel loses its values to a common range."""
    folder, draw = tmp_path / "weather", np.random.default_rng(0)
    folder.mkdir()
    images = draw.normal(size=(48, 4, 16, 16)) * [[[8]], [[0.002]], [[10]], [[30]]] + [
        [[288]], [[0.008]], [[0]], [[101325]],
    ]  # fmt: skip
    for number, image in enumerate(images.astype(np.float32)):
        np.save(folder / f"{number}.npy", image)
    mean, std, settings = statistics_of_recipe(folder, 4, capsys)
    assert "value_range" not in settings
    assert (np.abs(mean - images.mean(axis=(0, 2, 3))) < 0.01 * std).all()


def test_a_narrow_range_far_from_zero(tmp_path, capsys):
    folder, draw = tmp_path / "pressure", np.random.default_rng(0)
    folder.mkdir()
    images = 101325 + draw.normal(size=(48, 16, 16))
    for number, image in enumerate(images.astype(np.float32)):
        np.save(folder / f"{number}.npy", image)
    mean, std, settings = statistics_of_recipe(folder, 1, capsys)
    low, high = settings["value_range"]
    assert (low, high) == pytest.approx((images.min(), images.max()), abs=0.02)
    assert (mean, std) == (pytest.approx(images.mean(), abs=0.02), pytest.approx(images.std(), rel=0.01))


def test_statistics_are_those_of_images_of_one_size(tmp_path, capsys):
    """Training scales nine dark images of 32 pixels and a bright one of 320 to one size."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    draw = np.random.default_rng(0)
    images = [*draw.integers(0, 60, (9, 32, 32)), draw.integers(180, 256, (320, 320))]
    for number, image in enumerate(images):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    call(check, folder, "--num_workers", 0, "--in_chans", 1)
    mean, std = map(float, re.search(r"--mean +(\S+)\s+--std +(\S+)", capsys.readouterr().out).groups())
    of_one_size = np.stack([*images[:9], images[9][::10, ::10]]) / 255
    assert (mean, std) == (pytest.approx(of_one_size.mean(), rel=0.02), pytest.approx(of_one_size.std(), rel=0.02))


def test_the_copies_of_a_sample_are_not_extrapolated(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, 30, 28, 28)
    call(check, tmp_path, "--num_workers", 0, "--limit", 20)
    output = capsys.readouterr().out
    assert re.search(r"classes     2, of .*images? that were read: ", output)
    assert re.search(r"duplicates  \d+ images? among the 20 that were read\n", output)


def test_a_constant_channel_has_a_standard_deviation_of_1(tmp_path, capsys):
    """Its variance is a rounding error."""
    folder = tmp_path / "bands"
    folder.mkdir()
    for number in range(48):
        pixels = np.stack([noise(31, 33, seed=number), *(np.full((31, 33), value) for value in (37, 201, 97))])
        tifffile.imwrite(folder / f"{number}.tif", pixels.astype(np.uint8), photometric="minisblack")
    _, std, _ = statistics_of_recipe(folder, 4, capsys)
    assert std[1:].tolist() == [1, 1, 1]
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(48):
        Image.fromarray(np.full((31, 33), 37, np.uint8)).save(flat / f"{number}.png")
    with pytest.raises(ValueError, match="nothing to learn"):
        statistics_of_recipe(flat, 1, capsys)


def gray(folder):
    write_images(folder, 48, 28, 28)


def gray_as_color(folder):
    for number in range(48):
        Image.fromarray(noise(28, 28, seed=number)).convert("RGB").save(folder / f"{number}.png")


def transparent(folder):
    write_images(folder, 48, 32, 32, 4)


def deep(folder):
    for number in range(48):
        Image.fromarray(noise(28, 28, seed=number).astype(np.uint16) * 16).save(folder / f"{number}.png")


def five_channels(folder):
    for number in range(48):
        pixels = noise(32, 32, 5, seed=number).astype(np.uint16) * 200
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig")


def floats(folder):
    for number in range(48):
        values = np.random.default_rng(number).normal(-500, 100, (32, 32)).astype(np.float32)
        np.save(folder / f"{number}.npy", values)


def cmyk(folder):
    for number in range(48):
        Image.frombytes("CMYK", (32, 32), noise(32, 32, 4, seed=number).tobytes()).save(folder / f"{number}.jpg")


def mixed(folder):
    for number in range(48):
        Image.fromarray(noise(20 + number, 67 - number, seed=number)).save(folder / f"{number}.png")


def one_long(folder):
    gray(folder)
    Image.fromarray(noise(20, 20_000)).save(folder / "long.png")


def broken(folder):
    gray(folder)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"\x89PNG broken")


def forty(folder):
    write_images(folder, 40, 28, 28)


def two_sizes(folder):
    for number in range(48):
        side = 28 if number % 2 else 56
        Image.fromarray(noise(side, side, seed=number)).save(folder / f"{number}.png")


def duplicates(folder):
    for number in range(48):
        Image.fromarray(noise(28, 28, seed=number % 4)).save(folder / f"{number}.png")


SMALL_GRAY = {"input_size": 28, "patch_size": 7, "in_chans": 1, "crop": "none", "model": "mae_vit_mini_patch4"}
FORMATS = {  # settings, and what a line says
    gray: (SMALL_GRAY | {"cache_images": True}, "channels    1: 48 images\n"),
    gray_as_color: (SMALL_GRAY, "channels    3: 48 images of equal channels; the model gets 1 (gray)\n"),
    transparent: ({"in_chans": 3, "patch_size": 8, "crop": "none"}, "channels    4: 48 images; the model gets 3\n"),
    deep: (SMALL_GRAY | {"cache_images": False}, "depth       48 images"),
    five_channels: ({"in_chans": 5, "input_size": 32, "patch_size": 8}, "channels    5: 48 images"),
    floats: ({"in_chans": 1, "input_size": 32, "cache_images": False}, "values      -"),
    cmyk: ({"in_chans": 3, "input_size": 32}, "channels    4: 48 images"),
    mixed: ({"crop": "random", "crop_scale": [0.6, 1.0]}, "20 to 67 x 20 to 67"),
    one_long: (SMALL_GRAY, "20 to 28 x 28 to 20000"),
    broken: (SMALL_GRAY | {"on_bad_image": "skip"}, "unreadable  3"),
    forty: (SMALL_GRAY, "warning     40 different images are few"),
    two_sizes: (SMALL_GRAY, "28 to 56 x 28 to 56"),
    duplicates: (SMALL_GRAY, "warning     44 images equal another one"),
}


def recipe_of(folder: Path, out: Path, *flags) -> dict:
    call(check, folder, "--recipe", out, "--num_workers", 0, *flags)
    return yaml.safe_load(out.read_text())


@pytest.fixture
def fast_machine(monkeypatch):
    """A machine of two cores, without a trial run."""
    monkeypatch.setattr(trial, "measure", lambda *arguments: trial.Trial(4000, 10))
    monkeypatch.setattr("mae.parallel.cores_of_process", lambda: 2)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_recipe_fits_the_format_of_the_images(fast_machine, write, tmp_path, capsys):
    """It trains, too."""
    folder, out = tmp_path / "images", tmp_path / "mine.yaml"
    folder.mkdir()
    write(folder)
    found = recipe_of(folder, out)
    settings, line = FORMATS[write]
    assert {name: found.get(name) for name in settings} == settings
    assert line in capsys.readouterr().out
    assert len(found["mean"]) == len(found["std"]) == found["in_chans"]
    assert all(0 < value < 1 for value in found["mean"])
    assert all(re.search(r"  # \w", text) for text in out.read_text().splitlines() if text[0] != "#")
    assert found["processes"] == 2 and found["batch_size"] * 2 <= 48
    call(
        main_pretrain, config=out, output_dir=tmp_path / "run", epochs=1, warmup_epochs=0, updates_per_epoch=2,
        vis_every=0, device="cpu", amp="off",
    )  # fmt: skip
    (entry,) = lines(tmp_path / "run")
    assert 0.5 < entry["train_loss"] < 3  # targets have a variance of 1


def test_float_images_have_the_range_of_their_values(fast_machine, tmp_path):
    floats(tmp_path)
    found = recipe_of(tmp_path, tmp_path / "mine.yaml")
    low, high = found["value_range"]
    values = np.stack([np.load(file) for file in tmp_path.glob("*.npy")])
    assert [low, high] == pytest.approx([values.min(), values.max()], rel=1e-3)
    assert found["mean"] == pytest.approx([(values.mean() - low) / (high - low)], rel=1e-2)
    assert found["std"] == pytest.approx([values.std() / (high - low)], rel=1e-2)
    given = recipe_of(tmp_path, tmp_path / "given.yaml", "--value_range", -1000, 0)
    assert given["value_range"] == [-1000, 0]
    assert given["mean"] == pytest.approx([(values.mean() + 1000) / 1000], rel=1e-2)


@pytest.mark.parametrize(("pixels", "reason"), [
    (np.zeros((28, 28), np.uint8), "every pixel has the value 0"), (noise(3, 28), "3 x 28 pixels are too small"),
])  # fmt: skip
def test_images_without_a_recipe_are_refused(fast_machine, tmp_path, pixels, reason):
    for number in range(8):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=reason):
        recipe_of(tmp_path, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_dataset_of_mostly_broken_files_has_no_recipe(fast_machine, tmp_path):
    gray(tmp_path)
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(BadImage, match="10 of 48 "):
        recipe_of(tmp_path, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_minutes_without_a_recipe_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="recipe=FILE"):
        call(check, tmp_path, "--minutes", 3)


FAILED = """[rank1]: Traceback (most recent call last):
[rank0]: Traceback (most recent call last):
[rank1]:   File "main_pretrain.py", line 98, in main
[rank0]:   File "main_pretrain.py", line 98, in main
[rank1]: KeyError: 'a cause'
[rank0]: RuntimeError: the other rank
[rank1]: During handling of the above exception, another exception occurred:
[rank1]: Traceback (most recent call last):
[rank1]:   File "loop.py", line 3, in update
[rank1]: RuntimeError: CUDA error: device-side assert
[rank1]: Search for it in a manual.
E1201 09:56:34.280000 11334 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)
Traceback (most recent call last):
  File "torch/distributed/run.py", line 1142, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
KILLED = """E1201 09:56:34.280000 11334 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)
  traceback : Signal 9 (SIGKILL) received by PID 11354
============================================================
"""


@pytest.mark.parametrize(("output", "reason"), [
    (FAILED, "RuntimeError: CUDA error: device-side assert"), (KILLED, "Signal 9 (SIGKILL) received by PID 11354"),
])  # fmt: skip
def test_a_failed_trial_has_the_last_line_of_its_error_and_a_file(tmp_path, monkeypatch, output, reason):
    """In place of torchrun is a program that prints what torchrun did."""
    package = tmp_path / "torch/distributed"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "run.py").write_text(f"import sys; print({output!r}); sys.exit(1)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        trial.measure(tmp_path / "recipe.yaml", 2, 1, [], "main_pretrain", {})
    message, file = re.fullmatch(r"a trial run .* failed: (.*) \(.* (/.*)\)", str(raised.value)).groups()
    assert (message, Path(file).read_text().strip()) == (reason, output.strip())


@pytest.mark.slow
def test_a_trial_that_fails_says_why(tmp_path, monkeypatch):
    gray(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"trial run .*file"):
        recipe_of(tmp_path, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.slow
def test_the_rules_give_the_recipe_of_the_demo(fast_machine, tmp_path, capsys):
    """Model, patches, crops and rate of the 10,000 images follow from rules that know no dataset.

    tests/demo_readme.py trains with such a recipe, after a real trial run.
    """
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number, pixels in enumerate(np.load(unpack_data.ARCHIVE)["train_images"]):
            Image.fromarray(pixels).save(file := io.BytesIO(), "png")
            archive.writestr(f"{number}.png", file.getvalue())
    mine = recipe_of(tmp_path / "images.zip", tmp_path / "mine.yaml", "--minutes", 2)
    printed = capsys.readouterr().out
    assert "measured    10,000 images of Fashion-MNIST, 28 pixels, 5 minutes on two cores: " in printed
    demo = yaml.safe_load((ROOT / "recipes/pretrain_fashion_mnist.yaml").read_text())
    same = ("model", "patch_size", "input_size", "in_chans", "crop", "cache_images", "num_workers")
    assert {name: mine[name] for name in same} == {name: demo[name] for name in same}
    assert mine["lr"] == pytest.approx(demo["blr"] * 2 * demo["batch_size"] / 256)
    assert mine["mean"] + mine["std"] == pytest.approx(demo["mean"] + demo["std"], abs=2e-3)
    assert mine["epochs"] == (120 - 10) * 4000 // (10_000 // 128 * 128)
    command = shlex.split(printed.splitlines()[-1])
    assert command[:5] == ["OMP_NUM_THREADS=1", "torchrun", "--standalone", "--nproc_per_node", "2"]
    assert command[command.index("--config") + 1] == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("count", "side", "channels", "kind"), [
    (10_000, 28, 1, "fashion_mnist"), (10_922, 28, 1, "letters"), (960, 96, 3, "photographs"),
])  # fmt: skip
def test_the_rules_give_the_settings_of_an_entry_of_the_board(count, side, channels, kind):
    """So its rows say what a recipe reaches."""
    images = replace(PHOTOS, count=count, distinct=count, height=side, width=side, shorter=side, spread=(side, side),
                     has_one_shape=True, in_chans=channels)  # fmt: skip
    machine = Machine(gpus=0, cores=2, cache_bytes=1e12)
    flags = {**leaderboard.BASE, **leaderboard.ENTRIES[leaderboard.RECIPE], **leaderboard.KINDS[kind][1]}
    found = [*rules.image_lines(images), *rules.optimization_lines(images, machine, "mini_patch4")]
    settings = {line.name: line.value for line in found}
    same = (
        "input_size",
        "in_chans",
        "patch_size",
        "crop",
        "batch_size",
        "lr",
        "norm_pix_loss",
        "uniformity",
        "optimizer",
    )
    assert {name: settings[name] for name in same} == {name: flags[name] for name in same}
    is_named = leaderboard.described(leaderboard.KINDS[kind][0]).endswith("with --hflip 0")
    assert flags.get("hflip", 0.5) == (0 if is_named else settings["hflip"])


@pytest.mark.parametrize(("count", "side", "channels", "first"), [
    (9_000, 30, 1, "10,000 images of Fashion-MNIST, 28 pixels, 5 minutes"),
    (50_000, 48, 1, "60,000 images of Fashion-MNIST, 28 pixels, 75 minutes"),
    (500, 128, 3, "960 squares of photographs, 96 pixels, 5 minutes"),
    (500, 128, 1, "no run with 1 channel"), (10_000, 28, 3, "no run with 3 channel"),
    (10_000, 28, 5, "no run with 5 channel"), (1_000_000, 28, 1, "no run with 1 channel"),
])  # fmt: skip
def test_the_nearest_measured_runs_are_those_of_such_images(count, side, channels, first):
    images = replace(PHOTOS, count=count, shorter=side, in_chans=channels)
    found = board.nearest(images, minutes=5 if count < 50_000 else 100)
    assert found[0].startswith(first)
    assert all(re.search(r"[\d.]+ %, raw pixels [\d.]+ %", text) for text in found) or first.startswith("no run")
    assert ("by a recipe" in found[0]) == first.endswith(", 5 minutes")  # the other was run with other settings


@pytest.mark.parametrize(("count", "side", "is_said"), [(60_000, 96, False), (60_001, 28, True), (900, 97, True)])
def test_a_line_says_that_larger_images_were_not_measured(count, side, is_said):
    text = board.beyond(replace(PHOTOS, count=count, shorter=side))
    assert ("96 x 96 pixels and 60,000 images" in text) == is_said == bool(text)


@pytest.mark.parametrize(("count", "rate", "minutes"), [
    (10_000, 4000, 800_000 / 4000 / 60), (100_000, 4000, 8_000_000 / 4000 / 60), (100_000, 100, 480),
])  # fmt: skip
def test_without_a_time_measured_runs_determine_it(count, rate, minutes, tmp_path, monkeypatch):
    """800,000 images or 80 epochs, whichever is more, at most eight hours."""
    monkeypatch.setattr(trial, "measure", lambda *arguments: trial.Trial(rate, 0))
    images = replace(PHOTOS, count=count, distinct=1000, shorter=64, height=64, width=64)
    *_, said = recipe.write(
        tmp_path / "mine.yaml", images, Machine(gpus=0, cores=2, cache_bytes=0), {}, None, decoding=1e6
    )[1:2]
    settings = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    processed = settings["epochs"] * (count // 128 * 128)
    assert processed / rate / 60 == pytest.approx(minutes, rel=0.05)
    assert ("that measured runs needed" in said) and ("100.0% of" in said or "1 times" in said) == (minutes < 480)


@pytest.mark.parametrize(("minutes", "share"), [(0.05, "1.2% of"), (1, "24.8% of"), (10, "2.5 times")])
def test_a_line_says_what_share_of_the_time_is_given(minutes, share, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "measure", lambda *arguments: trial.Trial(4000, 0))
    images = replace(PHOTOS, count=12_000, distinct=1000, shorter=64, height=64, width=64)
    machine = Machine(gpus=0, cores=2, cache_bytes=0)
    said = recipe.write(tmp_path / "mine.yaml", images, machine, {}, minutes, decoding=1e6)[1]
    needed = 80 * 12_000
    assert f"{share} the {needed:,} that measured runs needed: 4 minutes here" in said


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (28, 7), (32, 8), (64, 8), (96, 12), (128, 16), (224, 16)])
def test_patches_are_those_of_the_measured_and_published_runs(side, patch):
    assert rules.patch_of(side, side) == patch


@pytest.mark.parametrize("width", [4, 13, 28, 97, 224])
def test_the_input_is_a_multiple_of_the_patch(width):
    for height in range(4, 225, 5):
        images = replace(PHOTOS, height=height, width=width, shorter=min(height, width), has_one_shape=True)
        settings = {line.name: line.value for line in rules.image_lines(images)}
        size, patch = settings["input_size"], settings["patch_size"]
        sides = size if isinstance(size, list) else [size, size]
        assert all(side % patch == 0 and side >= 4 * patch for side in sides), height


def test_photographs_have_the_published_input_and_crops():
    settings = {line.name: line.value for line in rules.image_lines(PHOTOS)}
    assert settings | {"input_size": 224, "patch_size": 16, "crop": "random", "crop_scale": [0.2, 1.0]} == settings


@pytest.mark.parametrize(("count", "minutes", "gpus", "rates", "model", "trials"), [
    (100_000, 1, 0, {"mini": 4000}, "mini", ["mini"]),  # no time for a larger model
    (1000, 10_000, 0, {"mini": 4000}, "mini", ["mini"]),  # no patches for one
    (100_000, 300, 0, {"mini": 4000, "tiny": 600}, "tiny", ["mini", "tiny"]),
    # Decoding limits all models of a GPU alike.
    (1_000_000, 480, 1, {"mini": 6000, "tiny": 6000, "small": 6000, "base": 3500, "large": 200}, "base",
     ["mini", "tiny", "small", "base", "large"]),
])  # fmt: skip
def test_the_largest_model_that_fits_images_and_time_is_chosen(
    count, minutes, gpus, rates, model, trials, tmp_path, monkeypatch
):
    measured = []

    def run(draft, *_):
        measured.append(yaml.safe_load(draft.read_text())["model"].split("_")[2])
        return trial.Trial(rates[measured[-1]], 10)

    monkeypatch.setattr(trial, "measure", run)
    images, machine = replace(PHOTOS, count=count, distinct=count), Machine(gpus=gpus, cores=2, cache_bytes=0)
    recipe.write(tmp_path / "mine.yaml", images, machine, {}, minutes, decoding=1000)
    chosen = yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"]
    assert (chosen.split("_")[2], measured) == (model, trials)


def test_a_larger_model_that_fails_leaves_the_smaller_one(tmp_path, monkeypatch):
    def run(draft, *_):
        if "tiny" in draft.read_text():
            raise ValueError("out of memory")
        return trial.Trial(4000, 10)

    monkeypatch.setattr(trial, "measure", run)
    recipe.write(tmp_path / "mine.yaml", PHOTOS, Machine(gpus=0, cores=2, cache_bytes=0), {}, 300, decoding=1000)
    assert "mini" in yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"]


def test_images_that_take_long_to_decode_are_cached_before_the_trial(tmp_path, monkeypatch):
    """So the start of the trial is that of the run."""
    updates = []
    monkeypatch.setattr(trial, "measure", lambda *arguments: updates.append(arguments[-1]) or trial.Trial(4000, 10))
    images, machine = replace(PHOTOS, count=1000, distinct=1000), Machine(gpus=0, cores=2, cache_bytes=1e12)
    for decoding in (1000, 100):
        recipe.write(tmp_path / "mine.yaml", images, machine, {}, 5, decoding)
    assert updates == [trial.UPDATES, 1, trial.UPDATES]


def test_a_time_that_is_too_short_has_a_warning(fast_machine, tmp_path, capsys):
    gray(tmp_path)
    recipe_of(tmp_path, tmp_path / "mine.yaml", "--minutes", 0.1)
    assert "warning     one epoch exceeds the time: the run takes 0.2 minutes" in capsys.readouterr().out


def test_the_printed_command_does_not_continue_an_earlier_run(fast_machine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gray(tmp_path)
    for expected in ("runs/mine", "runs/mine-2", "runs/mine-3"):
        recipe_of(tmp_path, tmp_path / "mine.yaml")
        assert f"--output_dir {expected} " in capsys.readouterr().out
        Path(expected).mkdir(parents=True)


def test_the_run_of_a_recipe_in_another_folder_is_beside_it(fast_machine, tmp_path, capsys, monkeypatch):
    """So `mae start --output_dir elsewhere/mine`, whose recipe is elsewhere/mine.yaml, prints where the run is."""
    monkeypatch.chdir(tmp_path)
    gray(tmp_path)
    Path("elsewhere").mkdir()
    recipe_of(tmp_path, Path("elsewhere/mine.yaml"))
    assert "--output_dir elsewhere/mine " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--split", "val"), ("--extras", "age")])
def test_a_recipe_is_for_the_training_images_of_the_standard_model(flags, tmp_path):
    gray(tmp_path)
    with pytest.raises(ValueError, match=flags[0].removeprefix("--")):
        recipe_of(tmp_path, tmp_path / "mine.yaml", *flags)


def test_the_rate_is_near_the_published_one():
    """ViT-B with 4,096 images per update has 1.5e-4 x 4096 / 256."""
    million = replace(PHOTOS, count=1_281_167, distinct=1_281_167)
    machine = Machine(gpus=8, cores=64, cache_bytes=0)
    lines_of = rules.optimization_lines(million, machine, "base_patch16")
    settings = {line.name: line.value for line in lines_of}
    assert 8 * settings["batch_size"] * settings["accum_iter"] == 4096
    assert settings["lr"] == pytest.approx(2.4e-3, rel=0.25)


@pytest.mark.parametrize("rate", [100, 4000, 1e6])
def test_the_epochs_fit_the_time(rate):
    settings = {line.name: line.value for line in rules.length_lines(99_968, rate, 10, 1810)}
    assert settings["epochs"] == min(1600, max(1, math.floor(1800 * rate / 99_968)))
    assert settings["warmup_epochs"] == settings["epochs"] / 20


def test_without_time_for_an_epoch_there_is_one_epoch_and_no_probe():
    """The start exceeds the time. The warning names the time of the run."""
    epochs, *others = rules.probed_length_lines(128, 64, 70, 18)
    assert (epochs.value, [line.name for line in others]) == (1, ["warmup_epochs", "save_every"])
    assert epochs.is_warning and epochs.reason.endswith(" 1.2 minutes")


def test_one_is_no_plural(tmp_path, capsys):
    (line,) = rules.batch_lines(200, 128, processes=1)
    assert line.reason == "128 images per update in 1 process; an epoch has 1 update"
    assert [recipe.minutes_text(minutes) for minutes in (1, 1.5, 60)] == ["1 minute", "1.5 minutes", "60 minutes"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, 1, 28, 28)
    call(check, tmp_path, "--num_workers", 0)
    output = capsys.readouterr().out
    assert "classes     2, of 1 image: " in output and re.search(r"duplicates  1 image\b", output)
    call(check, tmp_path / "a", "--num_workers", 0)
    output = capsys.readouterr().out
    assert f"1 image under {tmp_path / 'a'}" in output and "channels    1: 1 image\n" in output


def test_bad_images_are_treated_alike_with_and_without_a_recipe(fast_machine, tmp_path, capsys):
    """They are counted and named. The recipe leaves them out, unless they should be an error."""
    (tmp_path / "images").mkdir()
    broken(tmp_path / "images")
    file = tmp_path / "broken.yaml"
    with pytest.raises(BadImage, match="3 of 48"):
        call(check, tmp_path / "images", "--num_workers", 0)
    with pytest.raises(BadImage, match="3 of 48"):
        recipe_of(tmp_path / "images", file, "--on_bad_image", "error")
    for flags in ((), ("--on_bad_image", "skip")):
        capsys.readouterr()
        assert recipe_of(tmp_path / "images", file, *flags)["on_bad_image"] == "skip"
        assert "3 of 48 images can't be read: on_bad_image=skip" in capsys.readouterr().out
    call(check, tmp_path / "images", "--num_workers", 0, "--on_bad_image", "skip")
    assert "3 of 48 images can't be read: on_bad_image=skip" in capsys.readouterr().out


def test_an_epoch_of_a_recipe_has_the_images_that_can_not_be_read(fast_machine, tmp_path):
    """Others take their place: an epoch of 33 images, of which 3 are broken, has two updates of 16."""
    (tmp_path / "images").mkdir()
    broken(tmp_path / "images")
    for number in range(3, 18):
        (tmp_path / f"images/{number}.png").unlink()
    recipe_of(tmp_path / "images", tmp_path / "broken.yaml")
    assert "16 images per update in 1 process; an epoch has 2 updates" in (tmp_path / "broken.yaml").read_text()


def test_the_check_turns_images_as_the_training_does(fast_machine, tmp_path, capsys):
    """Half of these images have an orientation. Upright, they have two shapes, and so crops."""
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "images").mkdir()
    for number in range(48):
        image = Image.fromarray(noise(40, 60, seed=number))
        image.save(tmp_path / f"images/{number}.jpg", **({"exif": turned} if number % 2 else {}))
    assert recipe_of(tmp_path / "images", tmp_path / "stored.yaml")["crop"] == "none"
    assert "rotated     24 images by EXIF data, which is ignored in training" in capsys.readouterr().out
    assert recipe_of(tmp_path / "images", tmp_path / "upright.yaml", "--exif")["crop"] == "random"
    printed = capsys.readouterr().out
    assert "24 images; 40 to 60 x 40 to 60" in printed
    assert "24 images by EXIF data, which is applied" in printed


def test_a_recipe_has_the_settings_of_the_data_that_are_given(fast_machine, tmp_path):
    """Each once: the text is read by a loader that refuses two values of a name. It trains."""
    (tmp_path / "images").mkdir()
    two_sizes(tmp_path / "images")
    given = {"input_size": 32, "crop": "none", "mean": 0.25, "std": 0.125, "cache_images": True, "min_valid": 0.25}
    file = tmp_path / "given.yaml"
    found = recipe_of(tmp_path / "images", file, *argv_of(given))
    assert {name: found[name] for name in given} == given | {"mean": [0.25], "std": [0.125]}
    assert found["input_size"] % found["patch_size"] == 0
    names = re.findall(r"^(\w+):", file.read_text(), re.MULTILINE)
    assert len(names) == len(set(names))
    assert "crop_scale" not in names
    call(main_pretrain, config=file, output_dir=tmp_path / "run", epochs=1, warmup_epochs=0, device="cpu", vis_every=0)
    with pytest.raises(ValueError, match="input_size="):
        recipe_of(tmp_path / "images", file, "--input_size", 31, 32)


def test_a_recipe_that_caches_does_not_fit_a_dataset_that_augments(tmp_path):
    """The message says what to give, because the user gave no flag."""
    (tmp_path / "cached.yaml").write_text("cache_images: true\ninput_size: 16\n")
    augmented = lambda split, path: Augmented()  # noqa: E731
    args = parse(main_pretrain, config=tmp_path / "cached.yaml", output_dir=tmp_path / "run", num_workers=0,
                 batch_size=4, model="mae_vit_mini_patch4", device="cpu")  # fmt: skip
    with pytest.raises(ValueError, match="cache_images=false"):
        main_pretrain.main(args, source=augmented)


class Augmented:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.random.randint(0, 255, (16, 16, 3), dtype=np.uint8), None


def test_repeated_images_allow_no_larger_model():
    images = replace(PHOTOS, count=1_000_000, distinct=1_000_000)
    assert len(rules.models_for(images, 196)) > 1
    assert rules.models_for(replace(images, distinct=1000), 196) == ["mini_patch4"]


def test_long_images_are_scaled_as_a_whole():
    """Crops would show a fifth of a panorama. The input has as many pixels as a published one."""
    images = replace(PHOTOS, height=200, width=1400, shorter=200, has_one_shape=True)
    settings = {line.name: line.value for line in rules.image_lines(images)}
    height, width = settings["input_size"]
    assert settings["crop"] == "none" and "crop_scale" not in settings
    assert width / height == pytest.approx(7, rel=0.1) and 0.7 < height * width / 224**2 < 1.2
    assert not any("crop" in text for text in warnings_of(images))
    (warning,) = (text for text in warnings_of(replace(images, has_one_shape=False)) if "a crop shows" in text)
    assert "at most 19%" in warning


@pytest.mark.parametrize("gpus", range(1, 9))
def test_batches_fit_the_memory_of_any_number_of_gpus(gpus):
    """Mixup needs an even number."""
    settings = {line.name: line.value for line in rules.batch_lines(1_281_167, 4096, gpus)}
    assert settings["batch_size"] <= 256 and settings["batch_size"] % 2 == 0
    effective = settings["batch_size"] * settings.get("accum_iter", 1) * gpus
    assert effective == pytest.approx(4096, rel=0.02)


def test_repeated_sampling_counts_in_the_time(fast_machine, tmp_path):
    """An epoch has each image four times. The batch of a process has whole groups of them."""
    found = {}
    for repeats in (1, 3):
        folder = tmp_path / f"{repeats}"
        folder.mkdir()
        write_images(folder, 48, 16, 16, 3)
        found[repeats] = recipe_of(
            folder, tmp_path / f"{repeats}.yaml", "--repeated_sampling", repeats, "--minutes", 0.25
        )
    processed = []
    for repeats, settings in found.items():
        effective = 2 * settings["batch_size"]
        processed.append(settings["epochs"] * (48 * repeats // effective * effective))
    assert processed[0] == pytest.approx(processed[1], rel=0.05)
    assert found[3]["batch_size"] % 3 == 0


def test_statistics_that_are_given_are_in_the_units_of_the_files(fast_machine, tmp_path):
    floats(tmp_path)
    assert "value_range" not in recipe_of(tmp_path, tmp_path / "given.yaml", "--mean", 0.5, "--std", 2)


def test_a_usual_mark_of_missing_pixels_has_a_warning(fast_machine, tmp_path, capsys):
    for number in range(16):
        pixels = np.random.default_rng(number).random((16, 16)).astype(np.float32)
        pixels[:2] = -9999
        np.save(tmp_path / f"{number}.npy", pixels)
    recipe_of(tmp_path, tmp_path / "mine.yaml")
    assert "give nodata=-9999" in capsys.readouterr().out
    recipe_of(tmp_path, tmp_path / "given.yaml", "--nodata", -9999)
    assert "give nodata" not in capsys.readouterr().out


def test_the_header_has_the_time_that_the_run_takes(fast_machine, tmp_path):
    """A tenth of a second of images has no ten hours."""
    write_images(tmp_path, 48, 16, 16, 3)
    recipe_of(tmp_path, tmp_path / "mine.yaml", "--minutes", 600, "--repeated_sampling", 1)
    said = re.search(r"for ([\d.]+) (\w+)", (tmp_path / "mine.yaml").read_text())
    settings = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    hours = (10 + settings["epochs"] * 32 / 4000) / 3600
    assert float(said[1]) / {"hours": 1, "minutes": 60}[said[2]] == pytest.approx(hours, rel=0.1)
