"""Arguments of the nearest-neighbor classification, weights of the votes, and the scripts of jobs."""

import math
import runpy
import sys

import pytest
import torch
from capture import center_crop, make_images, narrow, normalized, parse, recorder, seed_all
from conftest import ROOT
from torch.nn import functional as F

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from models_vit import VisionTransformer
from util import dist
from util.checkpoints.checkpoint import CheckpointError
from util.data import loader
from util.evaluation import knn
from util.jobs import submit

DEFAULTS = {"k": [10, 20, 100], "temperature": [0.07], "model": "vit_large_patch16", "input_size": 224, "finetune": "",
            "global_pool": False, "batch_size": 256, "seed": 0, "num_workers": 10, "pin_mem": True}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbors")
    return make_images(folder, train={"ant": 60, "bee": 50}, val={"ant": 5, "bee": 3})


@pytest.fixture
def encoder(tmp_path):
    seed_all(9)  # another seed than that of the run
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=0)
    torch.save({"model": model.state_dict()}, tmp_path / "encoder.pth")
    return model.eval()


def captured(monkeypatch, **flags):
    """The arguments of `knn.classify`, of `loader.eval_loader` and of `dist.init`, and what the script returns."""
    with monkeypatch.context() as patch:
        narrow(patch)
        normalize = knn._unit
        patch.setattr(knn, "_unit", lambda features, device: normalize(features.clone(), device))  # it works in place
        calls = recorder(patch, main_knn, "classify")
        loaders, joined = recorder(patch, loader, "eval_loader"), recorder(patch, dist, "init")
        accuracies = main_knn.main(parse(main_knn, **({"device": "cpu", "num_workers": 0} | flags)))
    (arguments,) = calls
    return arguments, loaders, joined, accuracies


def test_the_defaults_are_the_published_ones():
    args = vars(parse(main_knn))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_the_bank_is_the_training_set(monkeypatch, data):
    arguments, loaders, _, accuracies = captured(monkeypatch, data_path=data)
    assert arguments["bank_labels"].tolist() == [0] * 60 + [1] * 50
    assert arguments["labels"].tolist() == [0] * 5 + [1] * 3
    assert (len(arguments["bank"]), len(arguments["queries"])) == (110, 8)
    assert (arguments["ks"], arguments["temperatures"], arguments["num_classes"]) == ([10, 20, 100], [0.07], 2)
    assert arguments["device"] == torch.device("cpu")
    assert [call["batch_size"] for call in loaders] == [256, 256]
    assert loaders[0]["samples"].transform(torch.zeros(3, 300, 300, dtype=torch.uint8)).shape == (3, 224, 224)
    assert accuracies == {(10, 0.07): 100.0, (20, 0.07): 100.0, (100, 0.07): 100.0}  # each class is one picture


def test_every_flag_reaches_its_place(monkeypatch, data, encoder, tmp_path):
    arguments, loaders, joined, accuracies = captured(
        monkeypatch, data_path=data, model="vit_mini_patch4", input_size=16, finetune=tmp_path / "encoder.pth",
        k="1 90", temperature="3 0.5", train_per_class=45, batch_size=7, crop_pct=1, mean="0.1 0.2 0.3",
        std="0.4 0.5 0.6", dist_url="tcp://x", dist_timeout=9, dist_backend="gloo",
    )  # fmt: skip
    assert (arguments["ks"], arguments["temperatures"]) == ([1, 90], [3, 0.5])
    assert arguments["bank_labels"].tolist() == [0] * 45 + [1] * 45
    assert [call["batch_size"] for call in loaders] == [7, 7]
    assert joined == [{"device_name": "cpu", "dist_url": "tcp://x", "timeout": 9, "backend": "gloo"}]
    assert accuracies[1, 3] == 100.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    pixels = loaders[0]["samples"][0, 0].image
    with torch.no_grad():
        expected = encoder.forward_features(((pixels / 255 - mean) / std)[None])
    torch.testing.assert_close(arguments["bank"][:1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the data has 2 classes, and --nb_classes is 3"):
        captured(monkeypatch, data_path=data, nb_classes=3)


def test_features_are_the_class_tokens(monkeypatch, data, encoder, tmp_path):
    flags = {"data_path": data, "model": "vit_mini_patch4", "input_size": 16, "finetune": tmp_path / "encoder.pth"}
    arguments, loaders, *_ = captured(monkeypatch, **flags, k=1)
    with torch.no_grad():
        expected = encoder.norm(encoder.get_intermediate_layers(center_crop(data / "train/ant/0.png"), norm=False)[0])
    torch.testing.assert_close(arguments["bank"][:1], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normalized(loaders[0]["samples"][0, 0].image), center_crop(data / "train/ant/0.png")[0])
    pooled, *_ = captured(monkeypatch, **flags, k=1, global_pool=True)
    expected = F.layer_norm(
        encoder.get_intermediate_layers(center_crop(data / "train/ant/0.png"), norm=False)[0][:, 1:].mean(dim=1), [128]
    )
    torch.testing.assert_close(pooled["bank"][:1], expected, rtol=1e-3, atol=1e-3)


def test_recorded_settings_and_adapted_channels(monkeypatch, data, encoder, tmp_path):
    recorded = {"model": "vit_mini_patch4", "input_size": 16, "in_chans": 3}
    torch.save({"model": encoder.state_dict(), "args": recorded}, tmp_path / "recorded.pth")
    arguments, loaders, *_ = captured(monkeypatch, data_path=data, finetune=tmp_path / "recorded.pth", k=1)
    assert arguments["bank"].shape == (110, 128)
    assert loaders[0]["samples"][0, 0].image.shape == (3, 16, 16)
    gray = {"data_path": data, "finetune": tmp_path / "recorded.pth", "k": 1, "in_chans": 1}
    arguments, *_ = captured(monkeypatch, **gray, adapt_input="mean")
    assert arguments["bank"].shape == (110, 128)
    with pytest.raises(CheckpointError, match="choose --adapt_input mean"):
        captured(monkeypatch, **gray)


def test_an_encoder_without_a_file_is_initialized_by_the_seed(monkeypatch, data):
    flags = {"data_path": data, "model": "vit_mini_patch4", "input_size": 16, "seed": 5}
    arguments, *_ = captured(monkeypatch, **flags, k=1)
    seed_all(5)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=0).eval()
    with torch.no_grad():
        expected = model.forward_features(center_crop(data / "val/bee/0.png"))
    torch.testing.assert_close(arguments["queries"][-1:], expected, rtol=1e-4, atol=1e-5)


def votes(bank, labels, temperature, k=3):
    """Returns the predicted class of a query along the first axis."""
    for label in (0, 1):
        correct = knn.classify(
            bank, torch.tensor(labels), torch.tensor([[2.0, 0.0]]), torch.tensor([label]),
            ks=[k], temperatures=[temperature], num_classes=2, device=torch.device("cpu"),
        )  # fmt: skip
        if any(correct[k, temperature]):
            return label
    return None


def test_neighbors_vote_with_the_exponential_of_their_cosine():
    """One neighbor with cosine 1 outvotes two neighbors with cosine c if exp(1 / T) > 2 exp(c / T)."""
    for temperature in (0.07, 0.2, 1.0):
        limit = 1 - temperature * math.log(2)
        for cosine, winner in ((limit - 0.01, 0), (limit + 0.01, 1)):
            neighbor = [cosine, math.sqrt(1 - cosine**2)]
            bank = torch.tensor([[7.0, 0.0], neighbor, [neighbor[0] * 5, -neighbor[1] * 5], [-1.0, 0.0]])
            assert votes(bank, [0, 1, 1, 1], temperature) == winner


# -------------------------------------------------------------------------------------------------------------- jobs


@pytest.mark.parametrize(
    ("name", "script"), [("pretrain", main_pretrain), ("finetune", main_finetune), ("linprobe", main_linprobe)]
)
def test_a_job_runs_its_own_script_with_all_its_flags(monkeypatch, name, script):
    calls = []
    monkeypatch.setattr(submit, "run", calls.append)
    monkeypatch.setattr(sys, "argv", [f"submitit_{name}.py"])
    runpy.run_path(str(ROOT / f"submitit_{name}.py"), run_name="__main__")
    assert calls == [f"main_{name}"]
    parser, _ = submit.get_args_parser(f"main_{name}")
    args, defaults = vars(parser.parse_args([])), vars(parse(script))
    published = {"ngpus": 8, "nodes": 2, "timeout": 4320, "job_dir": "", "partition": None, "use_volta32": False}
    assert {flag: args[flag] for flag in published} == published
    changed = {"output_dir", "log_dir", "resume"}  # in the directory of the job, from its newest checkpoint
    assert {flag: args[flag] for flag in defaults.keys() - changed} == {
        flag: defaults[flag] for flag in defaults.keys() - changed
    }
