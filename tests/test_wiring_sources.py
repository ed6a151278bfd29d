"""The images that supervised scripts open, and how they are loaded: lists, datasets of libraries, pinned memory."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from capture import Reached, make_images, narrow, parse, recorder
from torch import nn

import main_finetune
import main_knn
import main_linprobe
from util import datasets, dist
from util.data import loader
from util.training import trainer

SCRIPTS = [main_finetune, main_linprobe, main_knn]
ids = [script.__name__ for script in SCRIPTS]
MINI = {"model": "vit_mini_patch4", "input_size": 16, "num_workers": 0, "batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return make_images(folder, train={"ant": 12, "bee": 10}, val={"ant": 5, "bee": 2})


def output(script, tmp_path):
    return {} if script is main_knn else {"output_dir": tmp_path / "run"}


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
@pytest.mark.parametrize("flags", [{"download": True}, {}], ids=["download", "no download"])
def test_a_data_set_of_a_library(monkeypatch, script, flags, tmp_path):
    signature, arguments = inspect.signature(datasets.open_source), {}

    def stop(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        arguments.update(bound.arguments)
        raise Reached

    monkeypatch.setattr(datasets, "open_source", stop)
    flags = {"dataset": "CIFAR10", "data_path": tmp_path, "device": "cpu", **output(script, tmp_path), **flags}
    with pytest.raises(Reached):
        script.main(parse(script, **flags))
    assert arguments == {"split": "train", "data_path": str(tmp_path), "file_list": None, "dataset": "CIFAR10",
                         "download": "download" in flags, "num_images": None}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_each_split_has_its_own_list(monkeypatch, script, data, tmp_path):
    lists = {}
    for split, count in (("train", 9), ("val", 4)):
        rows = [f"{split}/{name}/{number}.png {name}" for name in ("ant", "bee") for number in range(count)]
        rows = [row for row in rows if (data / row.split()[0]).exists()]
        lists[split] = tmp_path / f"{split}.txt"
        lists[split].write_text("\n".join(rows) + "\n")
    with monkeypatch.context() as patch:
        loaders = recorder(patch, loader, "eval_loader")
        runs = recorder(patch, trainer, "run", call=False)
        banks = []
        patch.setattr(main_knn, "classify", lambda bank, *args, **options: banks.append(bank) or {(1, 1): [1, 0]})
        script.main(parse(script, data_path=data, train_list=lists["train"], val_list=lists["val"], device="cpu",
                          **MINI, **output(script, tmp_path)))  # fmt: skip
    assert len(loaders[-1]["samples"]) == 6
    assert [run["batches"].num_images for run in runs] + [len(bank) for bank in banks] == [18]


class Gpu:
    """A device without computations."""

    type, index = "cuda", 0

    def __str__(self) -> str:
        return "cuda:0"


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
@pytest.mark.parametrize("pinned", [True, False], ids=["pin_mem", "no_pin_mem"])
def test_memory_is_pinned_only_for_a_gpu(monkeypatch, script, pinned, data, tmp_path):
    """The model is placed on the device that the process joins with, and so are normalization and erasing."""
    gpu, placed = Gpu(), []
    no_features = (torch.zeros(0, 128), torch.zeros(0, dtype=torch.int64))
    with monkeypatch.context() as patch:
        narrow(patch)
        patch.setattr(dist, "init", lambda *args: gpu)
        patch.setattr(nn.Module, "to", lambda module, device: placed.append((type(module).__name__, device)) or module)
        patch.setattr(trainer, "Precision", lambda amp, device: SimpleNamespace(device=device))
        loaders, trained = recorder(patch, loader, "eval_loader"), recorder(patch, loader.TrainLoader, "__init__")
        runs = recorder(patch, trainer, "run", call=False)
        if script is not main_finetune:
            patch.setattr("engine_finetune.extract_features", lambda *args, **options: no_features)
        if script is main_knn:
            found = {(1, 1): [1, 0]}
            patch.setattr(main_knn, "classify", lambda *_, device, **__: runs.append({"device": device}) or found)
        flags = {} if pinned else {"no_pin_mem": True}
        script.main(parse(script, data_path=data, **MINI, **output(script, tmp_path), **flags))
    assert {call["pin_memory"] for call in loaders + trained} == {pinned}
    assert len(loaders + trained) == 2
    assert {("VisionTransformer", gpu), ("Normalize", gpu)} <= set(placed)
    if script is main_finetune:
        assert runs[0]["train_one_epoch"].keywords["erase"].device == "cuda:0"
    if script is main_knn:
        assert runs[0]["device"] is gpu
