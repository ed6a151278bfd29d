"""`python -m mae.data --recipe --init_from`: the recipe continues an encoder, and runs as it is written."""

import math

import pytest
import torch
from mains import call, fails
from test_dino import of_transformers
from test_recommend import gray, recipe_of, write_images

import main_pretrain
from mae.checkpoints import checkpoint
from mae.inference import get_model
from mae.recommend import check, continued, trial
from models_mae import mae_vit_mini_patch4

TRAINING = {"epochs": 2, "warmup_epochs": 0, "updates_per_epoch": 2, "vis_every": 0, "device": "cpu", "amp": "off"}


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """A machine of two cores, without a trial run."""
    monkeypatch.setattr(trial, "measure", lambda *arguments: trial.Trial(4000, 10))
    monkeypatch.setattr("mae.parallel.cores_of_process", lambda: 2)


@pytest.fixture
def images(tmp_path):
    """Color images of three classes."""
    for number in range(3):
        (tmp_path / f"images/kind{number}").mkdir(parents=True)
        write_images(tmp_path / f"images/kind{number}", 20, 40, 44, 3)
    return tmp_path / "images"


def train(recipe, out, **flags):
    call(main_pretrain, config=recipe, output_dir=out, **{**TRAINING, **flags})
    return checkpoint.read(out / "checkpoint-1.pth")


@pytest.mark.parametrize(("name", "patch"), [("v2 registers", 14), ("v3", 16)])
def test_a_released_encoder_has_the_settings_of_explora(name, patch, images, tmp_path, capsys):
    """With its patches and channels, in an input of at least four of them. The run starts from its features."""
    own = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "patch_size": patch,
           "image_size": 4 * patch}  # fmt: skip
    of_transformers(name, tmp_path / "encoder", **own)
    found = recipe_of(images, tmp_path / "mine.yaml", "--init_from", tmp_path / "encoder")
    expected = {"init_from": str(tmp_path / "encoder"), "lora": 64, "unfreeze_blocks": 1, "decoder_depth": 4,
                "patch_size": patch, "input_size": 4 * patch, "in_chans": 3, "uniformity": 0,
                "optimizer": "adamw"}  # fmt: skip
    assert found | expected == found
    assert found.keys().isdisjoint({"mean", "std", "model"})
    text = (tmp_path / "mine.yaml").read_text()
    assert all("  # " in line for line in text.splitlines() if line[0] != "#")
    for setting, known in {"lr": "docs/start_from.md", "epochs": "not measured"}.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{setting}:"))
        assert known in line
    capsys.readouterr()
    state = train(tmp_path / "mine.yaml", tmp_path / "run")
    output = capsys.readouterr().out
    assert "is used, and" not in output and "at the start" in output
    assert (tmp_path / "run/checkpoint-best.pth").exists()
    assert state["model"]["blocks.0.attn.qkv.lora_b"].any()
    start = get_model(tmp_path / "encoder").state_dict()
    changed = {key for key in start if not torch.equal(start[key], state["model"][key])}
    assert changed == {key for key in start if key.startswith(("blocks.1.", "norm."))}


def test_a_small_encoder_of_a_run_is_trained_in_full(images, tmp_path, pretrain, capsys):
    """Its decoder, its loss and its flips go on."""
    own = {"norm_pix_loss": True, "uniformity": 0.05, "hflip": 0, "patch_size": 8, "decoder_depth": 2, "crop": "none"}
    start = pretrain("start", **own, epochs=1) / "checkpoint-0.pth"
    found = recipe_of(images, tmp_path / "mine.yaml", "--init_from", start, "--input_size", 40)
    expected = {"norm_pix_loss": True, "uniformity": 0.05, "patch_size": 8, "input_size": 40, "decoder_depth": 2}
    assert found | expected == found
    assert found.keys().isdisjoint({"lora", "unfreeze_blocks", "hflip", "mean", "std"})
    capsys.readouterr()
    state = train(tmp_path / "mine.yaml", tmp_path / "run")
    output = capsys.readouterr().out
    assert "is used, and" not in output.replace("input_size=40 is used", "") and "the decoder starts" not in output
    assert state["args"]["hflip"] == 0
    before = checkpoint.read(start)["model"]
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], state["model"]["blocks.0.attn.qkv.weight"])


def test_updates_of_a_file_are_continued(images, tmp_path, pretrain):
    start = pretrain("start", lora=3, patch_size=8, epochs=1) / "checkpoint-0.pth"
    assert recipe_of(images, tmp_path / "mine.yaml", "--init_from", start)["lora"] == 3
    train(tmp_path / "mine.yaml", tmp_path / "run")


def test_published_weights_have_the_loss_of_their_training(tmp_path):
    """Which a file does not record."""
    torch.save({"model": mae_vit_mini_patch4().state_dict()}, tmp_path / "mae_visualize_vit_large_ganloss.pth")
    name = str(tmp_path / "mae_visualize_vit_large_ganloss.pth")
    assert continued.read(name).settings["norm_pix_loss"] is False


def test_gray_images_without_classes_start_unmeasured(tmp_path, pretrain):
    """They have the channels of the encoder."""
    start = pretrain("start", patch_size=8, epochs=1) / "checkpoint-0.pth"
    (tmp_path / "flat").mkdir()
    gray(tmp_path / "flat")
    found = recipe_of(tmp_path / "flat", tmp_path / "mine.yaml", "--init_from", start)
    assert found["probe_every"] == 0 and found["in_chans"] == 3
    train(tmp_path / "mine.yaml", tmp_path / "run")


@pytest.mark.parametrize(("rate", "updates"), [(10, [1]), (10_000, [1, trial.UPDATES])])
def test_the_trial_of_a_slow_encoder_is_short(rate, updates, tmp_path, pretrain, monkeypatch):
    """The usual one would take longer than the run."""
    start = pretrain("start", patch_size=8, epochs=1) / "checkpoint-0.pth"
    (tmp_path / "flat").mkdir()
    gray(tmp_path / "flat")
    done = []
    monkeypatch.setattr(trial, "measure", lambda *arguments: done.append(arguments[-1]) or trial.Trial(rate, 1))
    recipe_of(tmp_path / "flat", tmp_path / "mine.yaml", "--init_from", start, "--minutes", 3)
    assert done == updates


@pytest.mark.parametrize("seconds", [11, 21, 60, 1000])
def test_measurements_fit_the_time(seconds):
    """Each takes about an epoch, here of a second. A run of few epochs has none."""
    lines_of = continued.length_lines(100, 100, 10, seconds, is_labelled=True)
    settings = {line.name: line.value for line in lines_of}
    every = settings["probe_every"]
    measurements = 1 + math.ceil(settings["epochs"] / every) if every else 0
    assert 10 + settings["epochs"] + measurements <= seconds
    assert bool(every) == (seconds >= 20)
    assert measurements <= settings["epochs"] / 4


@pytest.mark.parametrize(("flags", "expected"), [
    (("--init_from", "FILE"), "recipe=FILE"),
    (("--init_from", "none.pth", "--recipe", "mine.yaml"), "none.pth"),
    (("--init_from", "FILE", "--recipe", "mine.yaml", "--in_chans", 1), "in_chans=1"),
    (("--init_from", "FILE", "--recipe", "mine.yaml", "--input_size", 30), "input_size=30"),
    (("--init_from", "images", "--recipe", "mine.yaml"), "images"),
    (("--init_from", "text.pth", "--recipe", "mine.yaml"), "text.pth"),
    (("--init_from", "own.pth", "--recipe", "mine.yaml"), "encoder=own:Encoder"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, expected, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": "mae_vit_mini_patch4", "input_size": 32}
    state = {"model": mae_vit_mini_patch4().state_dict(), "args": settings}
    torch.save(state, "FILE")
    torch.save({**state, "args": {**settings, "encoder": "own:Encoder"}}, "own.pth")
    (tmp_path / "text.pth").write_text("no weights")
    assert expected in fails(capsys, monkeypatch, check, images, "--num_workers", 0, *flags)
    assert not (tmp_path / "mine.yaml").exists()
