"""Fixtures: real image files, small models, and runs of the real scripts."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path

if "CUDA_TESTS" not in os.environ:  # ./run test-cuda
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-equal results are guaranteed on CPUs
os.environ["HF_HUB_OFFLINE"] = "1"  # a test downloads nothing, and test_hub.py has a server of its own

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # the models are small, and several tests may share the machine
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import forks  # noqa: E402
from mains import open_source, parse  # noqa: E402

import main_knn  # noqa: E402
import main_pretrain  # noqa: E402
from mae.data import transforms  # noqa: E402
from mae.data.samples import Samples  # noqa: E402
from models_mae import mae_vit_mini_patch4  # noqa: E402


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """The command that starts a script in several processes, on a free port and without using the host name."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    count = ["--nproc_per_node", str(processes), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *count, *rendezvous]


def make_samples(folder: Path, seed: int = 0, num_noise: int = 16, **options) -> Samples:
    """Crops of 16 pixels of a folder's images."""
    source = open_source("train", str(folder))
    transform = transforms.pretrain_transform(16)
    return Samples(source, transform, in_chans=3, seed=seed, draw_noise=partial(torch.rand, num_noise), **options)


SLOW = ("test_sharded", "test_compiling", "test_main_compare", "test_interrupts", "test_suites", "test_faults",
        "test_dist", "test_main_finetune", "test_submit", "test_export_accuracy",
        "test_main_linprobe", "test_timm_models", "test_tasks", "test_updates")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Gives a run of the tests its own temporary folder and compilation caches, which its processes share.

    A killed compilation damages a cache for good. PyTorch's precompiled headers are always in the temporary folder.
    """
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, which inherits the variables
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest keeps the files of the last runs
    folder = tempfile.mkdtemp(prefix="mae-tests-")
    # After multiprocessing has removed its own folder in it.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-200)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "compiled"))
    os.environ["MAE_CACHE"] = str(Path(folder, "cache"))
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "triton"))
    if compiler := shutil.which(os.environ.get("CXX", "g++")):
        fast = Path(folder, "g++")  # without optimization, graphs compile in less than two thirds of the time
        fast.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
        fast.chmod(0o755)
        os.environ["CXX"] = str(fast)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first, so that no process is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def _starter(tmp_path_factory):
    with forks.starter(tmp_path_factory.mktemp("starter")) as file:
        yield str(file)


@pytest.fixture(scope="module")
def forked(_starter):
    """The scripts that the tested code starts are forks of a process that has imported PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", _starter)
        yield


@pytest.fixture
def small_disk(tmp_path_factory):
    """A file system of 1 MB."""
    place = tmp_path_factory.mktemp("small")
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """24 small JPEG and PNG files in train/{cat,dog}/, of several sizes, some of them gray."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(24):
        height, width = generator.integers(20, 60, size=2)
        coarse = generator.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        picture = picture if number % 5 else picture.convert("L")
        folder = root / "train" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:02}.{'jpg' if number % 3 else 'PNG'}")
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """train/ and val/ with 48 and 23 small pictures of six classes: bars in six directions of color."""
    root = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(1)
    for split, count in (("train", 48), ("val", 23)):
        for number in range(count):
            label = number % 6
            pixels = generator.integers(0, 90, size=(20, 20, 3))
            pixels[:, :, label % 3] += 100
            pixels[slice(None) if label < 3 else slice(0, 20, 4)] += 60
            folder = root / split / f"kind{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    return root


@pytest.fixture
def imbalanced(labelled, tmp_path) -> Path:
    """`labelled` with one image of kind3 in each split, and 12 validation images of kind0."""
    data = shutil.copytree(labelled, tmp_path / "data")
    for split in ("train", "val"):
        for file in sorted((data / split / "kind3").iterdir())[1:]:
            file.unlink()
    for file in list((data / "val/kind0").iterdir()):
        for copy in range(2):
            shutil.copy(file, file.with_name(f"{file.stem}_{copy}.png"))
    return data


@pytest.fixture
def mini_mae():
    """The smallest MAE, for gray images of 16 pixels: 16 patches."""
    return mae_vit_mini_patch4(img_size=16, in_chans=1)


def classifying(labelled: Path, folder: Path):
    """Runs a script for classifiers in this process with small settings; returns the output directory."""

    def run(main, name: str = "run", of_main=None, **flags) -> Path:
        out = folder / name
        settings = {
            "data_path": labelled, "model": "vit_mini_patch4", "input_size": 16, "batch_size": 8, "num_workers": 0,
            "device": "cpu", "amp": "off",  # some CPUs train in bf16 by default
        } | flags  # fmt: skip
        if main is not main_knn:
            settings = {"output_dir": out, "log_dir": out, "epochs": 2, "warmup_epochs": 1} | settings
        found = main.main(parse(main, **settings), **(of_main or {}))
        return out if found is None else found

    return run


@pytest.fixture
def classify(labelled, tmp_path):
    return classifying(labelled, tmp_path)


@pytest.fixture(scope="module")
def classify_once(labelled, tmp_path_factory):
    """`classify` for runs that several tests of a file read."""
    return classifying(labelled, tmp_path_factory.mktemp("classified"))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's code, which Python finds; returns its folder."""

    def write(name: str, code: str) -> Path:
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield write
    for file in tmp_path.glob("modules/*.py"):
        sys.modules.pop(file.stem, None)


def pretraining(pictures: Path, folder: Path, main=main_pretrain.main):
    """Runs main_pretrain.py, or another main, in this process with small settings; returns the output directory."""

    def run(name: str = "run", callbacks=(), of_main=None, **flags) -> Path:
        out = folder / name
        settings = {
            "data_path": pictures, "output_dir": out, "log_dir": out, "model": "mae_vit_mini_patch4",
            "input_size": 16, "batch_size": 4, "epochs": 2, "warmup_epochs": 1, "blr": 0.01, "num_workers": 0,
            "device": "cpu", "amp": "off", "vis_every": 0,
        } | flags  # fmt: skip
        main(parse(main_pretrain, **settings), callbacks=callbacks, **(of_main or {}))
        return out

    return run


@pytest.fixture
def pretrain(pictures, tmp_path):
    return pretraining(pictures, tmp_path)


@pytest.fixture(scope="module")
def pretrain_once(pictures, tmp_path_factory):
    """`pretrain` for runs that several tests of a file read."""
    return pretraining(pictures, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def noisy(tmp_path):
    """Random pictures of three classes, which differ little in brightness."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 12)):
        for label, number in itertools.product(range(3), range(count)):
            (tmp_path / "noisy" / split / f"kind{label}").mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(10 * label, 200 + 10 * label, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "noisy" / split / f"kind{label}" / f"{number:02}.png")
    return tmp_path / "noisy"
