"""A resumed run has the settings of its checkpoint; explicit flags win. So has a run that starts from a file."""

import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from mains import argv_of, assert_equal, call, fails, lines, weights
from PIL import Image
from segments import make_scenes

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import models_segment
from mae.checkpoints.checkpoint import CheckpointError
from mae.data.pixels import BadImage
from mae.inference import export, features, get_model

SMALL = ["--epochs", "2", "--warmup_epochs", "0", "--batch_size", "4", "--save_every", "1", "--device", "cpu",
         "--num_workers", "0"]  # fmt: skip
MAE, VIT = ["--model", "mae_vit_mini_patch4"], ["--model", "vit_mini_patch4"]
# Flags that differ from the defaults, in data, model, augmentation and optimization.
RUNS = {
    main_pretrain: [*MAE, "--input_size", "16", "--mean", ".5", ".5", ".5", "--hflip", "0", "--norm_pix_loss",
                    "--mask_ratio", ".6", "--blr", ".02", "--decoder_depth", "2", "--seed", "3", "--min_lr", "1e-4"],
    main_finetune: [*VIT, "--input_size", "16", "--cls_token", "--train_per_class", "4", "--aa", "none", "--lr", ".01",
                    "--layer_decay", ".9", "--smoothing", "0", "--unfreeze_blocks", "2", "--mixup", ".8"],
    main_linprobe: [*VIT, "--input_size", "16", "--blr", ".3", "--val_fraction", ".25", "--cache_features"],
    main_segment: [*VIT, "--input_size", "16", "24", "--nb_classes", "3", "--head", "dpt", "--short_side", "20",
                   "--unfreeze_blocks", "all", "--warmup_epochs", "0.5"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(pictures, labelled, tmp_path_factory):
    scenes = make_scenes(tmp_path_factory.mktemp("scenes"))
    return {main_pretrain: pictures, main_finetune: labelled, main_linprobe: labelled, main_segment: scenes}


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_resume_needs_no_other_flag(script, data, tmp_path, monkeypatch):
    monkeypatch.setattr(models_segment, "DPT_CHANNELS", (16, 16, 16, 16))  # of 27 million parameters
    monkeypatch.setattr(models_segment, "DPT_FEATURES", 16)
    call(script, *SMALL, *RUNS[script], "--data_path", data[script], "--output_dir", tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-0.pth", tmp_path / "resumed")
    call(script, "--resume", "auto", "--output_dir", tmp_path / "resumed", "--num_workers", "0", "--device", "cpu")
    whole, resumed = (torch.load(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "resumed"))
    assert_equal(whole["model"], resumed["model"])
    own = dict.fromkeys(("output_dir", "log_dir", "resume"))
    assert whole["args"] | own == resumed["args"] | own


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    call(main_pretrain, *SMALL, *RUNS[main_pretrain], data_path=data[main_pretrain], output_dir=out)
    return out


@pytest.fixture
def mae(pretrained, tmp_path):
    return shutil.copytree(pretrained, tmp_path / "a")


def test_explicit_flags_win(mae):
    call(main_pretrain, resume="auto", output_dir=mae, epochs=3, blr=0.5, device="cpu", batch_size=2, accum_iter=2)
    args = torch.load(mae / "checkpoint-2.pth")["args"]
    assert (args["epochs"], args["blr"], args["batch_size"], args["mask_ratio"]) == (3, 0.5, 2, 0.6)
    assert len(lines(mae)) == 3


def test_a_checkpoint_of_another_script(mae, data):
    """test_remedies.py has the remedy for a file."""
    with pytest.raises(CheckpointError, match=r"main_pretrain\.py.*`output_dir`"):
        call(main_finetune, "--resume", "auto", "--output_dir", mae, "--data_path", data[main_finetune])


def test_a_checkpoint_never_runs_a_program_or_chooses_a_machine(mae):
    file, flags = mae / "checkpoint-1.pth", ["--resume", "auto", "--output_dir", mae]
    state = torch.load(file)
    del state["digest"]

    def resume(**args):
        torch.save({**state, "args": {**state["args"], **args}}, file)
        call(main_pretrain, *flags)

    machine = {"device": "cuda:7", "dist_url": "tcp://192.0.2.1:1", "num_workers": 99}
    resume(**machine)
    with pytest.raises(CheckpointError, match="dataset="):
        resume(**machine, dataset="wds:pipe:touch proof {000..001}")
    with pytest.raises(CheckpointError, match="batch_size"):
        resume(**machine, batch_size="many")


def test_published_checkpoints_give_model_and_optimization_only(mae, data, tmp_path):
    """Their data and machine are those of their authors."""
    state = torch.load(mae / "checkpoint-0.pth")
    args = Namespace(**state["args"] | {"data_path": "/datasets01/imagenet", "pin_mem": False})
    published = {key: state[key] for key in ("model", "optimizer", "epoch", "scaler")} | {"args": args}
    torch.save(published, tmp_path / "published.pth")
    call(main_pretrain, resume=tmp_path / "published.pth", output_dir=tmp_path / "b", device="cpu", num_workers=0,
         data_path=data[main_pretrain])  # fmt: skip
    found = torch.load(tmp_path / "b" / "checkpoint-1.pth")["args"]
    assert (found["mask_ratio"], found["weight_decay"], found["pin_mem"]) == (0.6, 0.05, True)
    args.world_size, args.lr = 8, 2.4e-3  # the published code records the learning rate of its effective batch size
    torch.save(published, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"32 .* 4"):
        call(main_pretrain, resume=tmp_path / "published.pth", output_dir=tmp_path / "c", device="cpu",
             data_path=data[main_pretrain])  # fmt: skip


def test_fine_tuning_takes_model_and_images_from_the_file(data, tmp_path):
    flags = [*RUNS[main_pretrain], "--in_chans", "1", "--mean", ".3", "--std", ".2"]
    call(main_pretrain, *SMALL, *flags, "--data_path", data[main_pretrain], "--output_dir", tmp_path / "a")
    file = tmp_path / "a" / "checkpoint-1.pth"
    call(main_finetune, *SMALL, "--finetune", file, "--data_path", data[main_finetune], "--output_dir", tmp_path / "b")
    args = torch.load(tmp_path / "b" / "checkpoint-1.pth")["args"]
    assert (args["model"], args["input_size"], args["in_chans"]) == ("vit_mini_patch4", 16, 1)
    assert (args["mean"], args["std"]) == ([0.3], [0.2])
    assert args["crop_scale"] == [0.08, 1.0]  # of fine-tuning
    assert weights(tmp_path / "b")["head.weight"].shape[0] == 6


@pytest.mark.slow
def test_supervised_training_does_not_flip_if_pretraining_did_not(mae, data, tmp_path):
    """A flip changes the class of signals and letters. Without crops, the loss shows a flip."""
    losses, file = {}, mae / "checkpoint-1.pth"
    export.export(get_model(file), "safetensors", tmp_path / "exported.safetensors")
    for script, own in ((main_finetune, ["--aa", "none", "--reprob", "0", "--drop_path", "0"]), (main_linprobe, [])):
        choices = {"recorded": [], "none": ["--hflip", "0"], "flips": ["--hflip", "1"], "exported": []}
        for name, flags in choices.items():
            source = tmp_path / "exported.safetensors" if name == "exported" else file
            argv = [*SMALL, *own, *flags, "--finetune", source, "--crop", "none", "--blr", "1", "--epochs", "1"]
            out = tmp_path / f"{script.__name__}-{name}"
            call(script, *argv, "--data_path", data[script], "--output_dir", out)
            losses[name] = lines(out)[-1]["train_loss"]
        assert losses["recorded"] == losses["exported"] == losses["none"] != losses["flips"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--cache_images"], ["--fast_jpeg"]])
def test_a_run_applies_and_records_the_orientation(flags, tmp_path):
    """Training on turned files with --exif equals training on upright files."""
    generator, exif = np.random.default_rng(0), Image.Exif()
    exif[274] = 6
    for kind in ("turned", "upright"):
        (tmp_path / kind).mkdir()
    for number in range(8):
        stored = Image.fromarray(generator.integers(0, 256, (20, 32, 3), dtype=np.uint8))
        stored.save(tmp_path / f"turned/{number}.tif", exif=exif)
        stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"upright/{number}.tif")
    for kind, own in (("turned", ["--exif"]), ("upright", [])):
        call(main_pretrain, *SMALL, *RUNS[main_pretrain], *flags, *own, data_path=tmp_path / kind,
             output_dir=tmp_path / "runs" / kind)  # fmt: skip
    assert_equal(*(weights(tmp_path / "runs" / kind) for kind in ("turned", "upright")))
    assert torch.load(tmp_path / "runs" / "turned" / "checkpoint-1.pth")["args"]["exif"] is True
    with pytest.raises(CheckpointError, match="exif=true"):
        call(main_pretrain, "--resume", "auto", "--output_dir", tmp_path / "runs" / "turned", "--no_exif")


@pytest.mark.slow
def test_the_order_of_the_axes_of_arrays_is_given_and_recorded(tmp_path, pretrain, capsys, monkeypatch):
    """The first and the last axis of the arrays (c, H, W) have as many entries as there are channels."""
    arrays = np.random.default_rng(0).integers(0, 256, (8, 16, 32, 16), dtype=np.uint8)
    (tmp_path / "files").mkdir()
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"files/{number}.npy", array)
    images = {"data_path": tmp_path / "files", "in_chans": 16, "input_size": "32 16", "crop": "none", "epochs": 1}
    refused = argv_of({**images, "model": "mae_vit_mini_patch4", "output_dir": tmp_path / "run", "batch_size": 4})
    assert "channels_last" in fails(capsys, monkeypatch, main_pretrain, *refused, "--warmup_epochs", 0)
    files = pretrain("of_files", **images, channels_first=True)
    last = list(np.moveaxis(arrays, 1, 3))
    items = [(array, None) for array in last]
    of_items = pretrain(
        "of_items", **images | {"data_path": None}, channels_last=True, of_main={"source": lambda *_: items}
    )
    assert_equal(weights(files, "checkpoint-0.pth"), weights(of_items, "checkpoint-0.pth"))

    model = get_model(files / "checkpoint-0.pth")
    expected = model.extract_feat(torch.from_numpy(arrays))  # tensors are always (c, H, W)
    assert torch.equal(model.extract_feat(list(arrays)), expected)
    assert torch.equal(model.extract_feat(last, channels_last=True), expected)
    assert torch.equal(get_model(of_items / "checkpoint-0.pth").extract_feat(last), expected)
    call(features, tmp_path / "files", model=files / "checkpoint-0.pth", out=tmp_path / "rows.npz", device="cpu",
         num_workers=0)  # fmt: skip
    assert np.allclose(np.load(tmp_path / "rows.npz")["features"], expected.detach(), atol=1e-4)
    with pytest.raises(BadImage, match="channels_last"):
        get_model("mae_vit_mini_patch4", in_chans=16, input_size=16).prepare(arrays[0])


def test_a_namespace_that_lacks_settings_has_the_defaults_of_the_script(labelled, tmp_path):
    """Programs of forks do not have all flags. Fine-tuning has other defaults than pre-training."""
    args = Namespace(
        data_path=str(labelled), model="vit_mini_patch4", input_size=16, batch_size=4, epochs=1, device="cpu",
        num_workers=0, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    main_finetune.main(args)
    recorded = torch.load(tmp_path / "run" / "checkpoint-0.pth")["args"]
    expected = {"drop_path": 0.1, "min_lr": 1e-6, "warmup_epochs": 5, "crop_scale": [0.08, 1.0], "global_pool": True}
    assert {name: recorded[name] for name in expected} == expected
    assert recorded["log_dir"] == recorded["output_dir"]
