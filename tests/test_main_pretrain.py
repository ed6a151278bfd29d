"""main_pretrain.py: its files, exact resume, and error messages."""

import functools
import io
import itertools
import os
import re
import signal
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import mains
import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun
from mains import Stopped, assert_close, assert_equal, assert_same_run, lines, stop_after, stop_and_resume, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import main_pretrain
from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.checkpoints.checkpoint import CheckpointError
from mae.data import loader
from mae.interrupts import Interrupted
from mae.training import log
from mae.training.nonfinite import NonFiniteLoss
from models_mae import MaskedAutoencoderViT

WHOLE = {"epochs": 4, "clip_grad": 1.0}


@pytest.fixture(scope="module")
def whole(pretrain_once):
    """Four epochs without an interruption."""
    return pretrain_once("whole", **WHOLE, save_every=1)


def test_the_log_has_both_terms_of_a_loss_with_uniformity(pretrain):
    for line in lines(pretrain(uniformity=0.5)):
        assert line["train_pixels"] + line["train_uniformity"] == pytest.approx(line["train_loss"], rel=1e-5)
        assert 0 < line["train_uniformity"] <= 0.5


def test_a_run_writes_the_files_of_the_published_code(pretrain):
    out = pretrain(vis_every=1)
    assert sorted(p.name for p in out.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1.pth"]
    state = torch.load(out / "checkpoint-1.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= state.keys()
    assert state["epoch"] == 1
    assert state["args"]["model"] == "mae_vit_mini_patch4"
    assert [g["weight_decay"] for g in state["optimizer"]["param_groups"]] == [0.0, 0.05]
    assert [line["epoch"] for line in lines(out)] == [0, 1]
    assert {"train_lr", "train_loss", "epoch"} <= lines(out)[0].keys()
    events = EventAccumulator(str(out)).Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [int(1000 * (i / 6)) for i in range(12)]
    assert events.Scalars("lr")[6].value == pytest.approx(0.01 * 4 / 256)
    shown = events.Images("reconstruction")
    assert len(shown) == 2
    images = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
    titles = images[: -(8 * 80 + 7 * 2 + 18)]  # above 8 images of 16 pixels, enlarged to 80, the gaps and the note
    assert (titles[:, -4 * 80 :] < 128).any()


def test_the_learning_rate_of_every_update(pretrain, tmp_path):
    """Two updates of 3 x 4 images per epoch; two epochs of warm-up and two of cosine from 0.012 to 0.002."""
    out = pretrain(epochs=4, accum_iter=3, blr=0.256, warmup_epochs=2, min_lr=0.002, log_dir=tmp_path / "events")
    published = [0, 0.003, 0.006, 0.009, 0.012, 0.0105355339, 0.007, 0.0034644661]
    rates = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("lr")
    assert [rate.value for rate in rates] == pytest.approx(published)
    assert [line["train_lr"] for line in lines(out)] == pytest.approx([0.0015, 0.0075, 0.01126776695, 0.00523223305])
    groups = checkpoint.read(out / "checkpoint-3.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([published[-1]] * 2)


@pytest.mark.parametrize(("vis_every", "epochs"), [(3, [999, 3999, 4999]), (0, [])])
def test_reconstructions_are_logged_every_few_epochs_and_after_the_last(pretrain, tmp_path, vis_every, epochs):
    pretrain(epochs=5, vis_every=vis_every, log_dir=tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Tags()["images"] == ["reconstruction"][: len(epochs)]
    assert [event.step for event in (events.Images("reconstruction") if epochs else [])] == epochs


class PredictsFeatures(MaskedAutoencoderViT):
    predicts_pixels = False


def test_a_class_of_models_is_recorded_and_without_pixels_draws_no_pictures(pretrain):
    out = pretrain("own", epochs=1, vis_every=1, of_main={"model_class": functools.partial(PredictsFeatures)})
    settings = checkpoint.read(out / "checkpoint-0.pth")["args"]
    assert (settings["model_class"], settings["predicts_pixels"]) == ("PredictsFeatures", False)
    assert checkpoint.read(pretrain("base", epochs=1) / "checkpoint-0.pth")["args"]["model_class"] is None
    assert EventAccumulator(str(out)).Reload().Tags()["images"] == []


@pytest.mark.parametrize(("method", "calls"), [("save_epoch", 2), ("save", 1), ("save", 6)])
def test_stopped_and_resumed_equals_uninterrupted(pretrain, whole, monkeypatch, method, calls):
    parts = stop_and_resume(monkeypatch, pretrain, calls, method, **WHOLE, save_every=1)
    assert_same_run(whole, parts, "checkpoint-3.pth")


@pytest.mark.slow
@pytest.mark.parametrize("place", [(loader.TrainLoader, "seek"), (log.RunLog, "end_epoch"), (parallel, "gather")])
def test_an_error_between_epochs_saves_the_state(pretrain, whole, tmp_path, monkeypatch, place):
    """PyTorch may report a killed worker process at any time, also between epochs."""
    settings = {**WHOLE, "save_every": 1000}
    original, log = getattr(*place), tmp_path / "parts/log.txt"

    def fails(*given):
        if log.exists() and len(log.read_text().splitlines()) == 2:
            raise RuntimeError("DataLoader worker is killed")
        return original(*given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="is killed"):
        patch.setattr(*place, fails)
        pretrain("parts", **settings)
    assert checkpoint.read(tmp_path / "parts/checkpoint-last.pth")["progress"]["epoch"] >= 1
    assert_same_run(whole, pretrain("parts", **settings, resume="auto"), "checkpoint-3.pth")


@pytest.mark.parametrize(("epoch", "error"), [(1, None), (1, OSError("the disk is gone")), (3, None)])
def test_a_signal_between_epochs_saves_the_state(pretrain, whole, tmp_path, monkeypatch, epoch, error):
    """Also if an error follows the signal. A run whose last epoch is complete does not stop."""
    settings, end_epoch = {**WHOLE, "save_every": 1000}, log.RunLog.end_epoch

    def end(log, stats):
        end_epoch(log, stats)
        if lines(tmp_path / "parts")[-1]["epoch"] == epoch:
            signal.raise_signal(signal.SIGTERM)
            if error:
                raise error

    with monkeypatch.context() as patch, pytest.raises(Interrupted) if epoch < 3 else nullcontext():
        patch.setattr(log.RunLog, "end_epoch", end)
        pretrain("parts", **settings)
    if epoch < 3:
        assert run_directory.position(tmp_path / "parts/checkpoint-last.pth") == ((1, 24) if error else (2, 0))
    assert_same_run(whole, pretrain("parts", **settings, resume="auto"), "checkpoint-3.pth")


def test_every_split_of_the_effective_batch_trains_equally(pretrain, pictures, tmp_path):
    """24 images are 2 updates of 10, which leave out 4."""
    one = pretrain("one", batch_size=10)
    assert checkpoint.read(one / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 4
    for batch_size, accum_iter in ((5, 2), (2, 5)):
        assert_close(one, pretrain(f"{batch_size}", batch_size=batch_size, accum_iter=accum_iter))
    mains.in_processes(2, pictures, tmp_path / "two", "--batch_size", 1, "--accum_iter", 5, "--epochs", 2)
    assert_close(one, tmp_path / "two")


@pytest.mark.slow
def test_an_earlier_checkpoint_resumes_into_another_directory(pretrain, whole, tmp_path, monkeypatch):
    """The remedy of the error. After an interruption, the same command continues the new run, and equals the rest."""
    before = {path: path.read_bytes() for path in whole.iterdir()}
    back = {**WHOLE, "save_minutes": 0, "resume": whole / "checkpoint-1.pth"}
    with pytest.raises(ValueError, match=r"checkpoint-1.pth: .*`output_dir`"):
        pretrain(output_dir=whole, **back)
    for method, calls in (("request", 1), ("save", 2), ("save", 3)):  # the first is before a checkpoint is written
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, method, calls)
            pretrain("new", **back)
    new = tmp_path / "new"
    assert run_directory.position(new / "checkpoint-last.pth") > (2, 8)
    pretrain("new", **back)
    assert_equal(weights(new, "checkpoint-3.pth"), weights(whole, "checkpoint-3.pth"))
    assert [line["train_loss"] for line in lines(new)] == [line["train_loss"] for line in lines(whole)][2:]
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_a_rejected_checkpoint_changes_no_files(pretrain):
    out = pretrain("run", save_every=1)
    state = checkpoint.read(out / "checkpoint-1.pth")
    state["model"]["cls_token"][0, 0, 3] = float("nan")
    checkpoint.write(state, out / "checkpoint-7.pth")
    with pytest.raises(ValueError, match=r"checkpoint-7.pth: .* cls_token"):
        pretrain("run", resume=out / "checkpoint-7.pth")
    pretrain("new", resume=out / "checkpoint-0.pth")  # the remedy
    (out / "checkpoint-7.pth").unlink()
    with pytest.raises(ValueError, match="in_chans"):
        pretrain("run", resume=out / "checkpoint-1.pth", in_chans=1)
    assert {path.name for path in out.glob("*.pth")} == {"checkpoint-0.pth", "checkpoint-1.pth"}
    assert len(lines(out)) == 2


def test_the_sizes_of_encoder_and_decoder_are_logged(pretrain, capsys):
    state = weights(pretrain(epochs=1, warmup_epochs=0), "checkpoint-0.pth")
    sizes = {True: 0, False: 0}
    for name, tensor in state.items():
        sizes[name.startswith("decoder_") or name == "mask_token"] += tensor.numel()
    output = capsys.readouterr().out
    assert re.search(rf"encoder\b.* 128 wide, 4 deep, {sizes[False]:,} parameters", output)
    assert re.search(rf"decoder\b.* 64 wide, 1 deep, {sizes[True]:,} parameters", output)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [6, 5000])
def test_a_run_that_is_stopped_shows_every_x_once(pretrain, tmp_path, monkeypatch, updates):
    """Long epochs have several updates at each x, which is thousandths of an epoch; the first of them is shown."""
    seconds = itertools.count(2_000_000_000)  # TensorBoard orders the files by their second
    for count in (8, 3, 7):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))
            stop_after(patch, "save", count)
            pretrain(epochs=10, updates_per_epoch=updates, resume="auto", save_minutes=0)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    position = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["progress"]
    done = position["epoch"] * updates + position["images_done"] // 4
    assert done >= 18
    for tag in ("train_loss", "lr", "grad_norm"):
        assert [e.step for e in events.Scalars(tag)] == sorted({int(1000 * (i / updates)) for i in range(done)})


def test_resuming_with_a_different_meaning_of_the_data_is_an_error(pretrain):
    again = {"warmup_epochs": 0, "epochs": 2, "resume": "auto"}
    pretrain(epochs=1, warmup_epochs=0, crop_scale="0.5 1", norm_pix_loss=True)
    for changed in (
        {"mean": "0.5 0.5 0.5"},
        {"input_size": "8 32"},  # the same number of patches
        {"crop_scale": "0.9 1"},
        {"no_norm_pix_loss": True},
        {"patch_size": 8},
    ):
        with pytest.raises(CheckpointError, match=min(changed).removeprefix("no_")):
            pretrain(**again, **changed)
    assert len(lines(pretrain(**again))) == 2


def test_changed_and_unknown_settings_are_logged(pretrain, capsys, tmp_path):
    pretrain("run", epochs=2)
    (warned,) = re.findall(r"^warning: .*", capsys.readouterr().out, re.MULTILINE)
    assert "process 48 images, less than 0.1% of the 800,000 that measured runs needed" in warned
    pretrain("run", epochs=2, resume="auto", mask_ratio=0.5, num_workers=1, input_size="16 16")
    (warned,) = re.findall(r"^warning: .*", capsys.readouterr().out, re.MULTILINE)
    assert re.search(r"`mask_ratio` .*0\.75 .*0\.5 ", warned)
    state = checkpoint.read(tmp_path / "run/checkpoint-1.pth")
    state["args"] |= {"new_loss": "l1", "gpu": 3, "ema_rate": 0.5}
    checkpoint.write(state, tmp_path / "run/checkpoint-1.pth")
    pretrain("run", epochs=2, resume="auto")
    (warned,) = re.findall(r"^warning: .*", capsys.readouterr().out, re.MULTILINE)
    assert "new_loss (l1)" in warned and "ema_rate (0.5)" in warned and "gpu" not in warned


def test_init_from_loads_only_the_weights(pretrain):
    out = pretrain("first")
    assert_equal(weights(out), weights(pretrain("next", init_from=out / "checkpoint-1.pth", lr=0.0)))


def test_init_from_takes_the_model_and_images_of_the_file(pretrain, capsys):
    own = {"norm_pix_loss": True, "in_chans": 1, "mean": [0.3], "std": [0.2], "hflip": 0, "mask_ratio": 0.5,
           "value_range": [0, 255], "crop": "none", "nodata": -1, "min_valid": 0.9}  # fmt: skip
    flags = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in own.items()}
    file = pretrain("first", epochs=1, **flags) / "checkpoint-0.pth"
    capsys.readouterr()
    found = checkpoint.read(pretrain("next", epochs=1, init_from=file, lr=0.0) / "checkpoint-0.pth")["args"]
    assert {name: found[name] for name in own} == own
    assert " is used, and " not in capsys.readouterr().out
    pretrain("other", epochs=1, init_from=file, mask_ratio=0.75, mean=0.4)
    warned = re.findall(r"^warning: (\w+=\S+) is used", capsys.readouterr().out, re.MULTILINE)
    assert sorted(warned) == ["mask_ratio=0.75", "mean=0.4"]


def test_a_resumed_run_does_not_need_its_initial_weights(pretrain, capsys):
    file = pretrain("first", epochs=1) / "checkpoint-0.pth"
    state = checkpoint.read(file)
    state["args"]["layer_norm_eps"] = 0.1  # of a foreign model; there is no flag
    checkpoint.write(state, file)
    out = pretrain("next", epochs=1, init_from=file)
    file.unlink()
    pretrain("next", epochs=2, init_from=file, resume="auto")
    assert [checkpoint.read(out / f"checkpoint-{n}.pth")["args"]["layer_norm_eps"] for n in range(2)] == [0.1, 0.1]


def test_a_nan_loss_writes_an_emergency_checkpoint(pretrain, monkeypatch, tmp_path):
    forward, calls = MaskedAutoencoderViT.forward, iter(range(100))

    def spoiled(self, *given, **context):
        loss, *others = forward(self, *given, **context)
        is_update = self.training and torch.is_grad_enabled()
        return loss * (float("nan") if is_update and next(calls) == 3 else 1), *others

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", spoiled)
    with pytest.raises(NonFiniteLoss, match=r"epoch 0, batch 3.*checkpoint-emergency.pth"):
        pretrain("nan")
    state = checkpoint.read(tmp_path / "nan" / "checkpoint-emergency.pth")
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    calls = iter(range(100))
    first, second = lines(pretrain("skip", on_nonfinite="skip"))
    assert (first["skipped_steps"], "skipped_steps" in second) == (1, False)


def test_invalid_inputs_are_one_line_errors(pretrain, pictures, tmp_path, capsys, monkeypatch):
    out = pretrain("good")
    good, truncated, bare = out / "checkpoint-1.pth", tmp_path / "truncated.pth", tmp_path / "bare.pth"
    mini = ["--model", "mae_vit_mini_patch4", "--input_size", "16", "--batch_size", "4", "--num_workers", "0"]
    here = ["--data_path", pictures, "--output_dir", tmp_path / "wrong", *mini]
    (tmp_path / "empty").mkdir()
    truncated.write_bytes(good.read_bytes()[:5000])
    torch.save({"model": weights(out)}, bare)

    def error_of(*argv):
        return mains.fails(capsys, monkeypatch, main_pretrain, "--device", "cpu", *argv)

    assert "data_path` is needed" in error_of(*mini, "--output_dir", tmp_path / "wrong")
    continued = [*here, "--output_dir", out, "--resume", good]
    assert "in_chans=3" in error_of(*continued, "--in_chans", "1")
    assert "batch_size" in error_of(*continued, "--batch_size", "2")
    for flags, message in (
        (f"--data_path {tmp_path}/nowhere", f"data_path={tmp_path}/nowhere: "),
        (f"--data_path {tmp_path}/empty", f"data_path={tmp_path}/empty: "),
        ("--batch_size 25", "batch_size=24"),
        ("--in_chans 5", "in_chans=5"),
        ("--mask_ratio 0.95", "mask_ratio=0.95"),
        (f"--output_dir {out}", f"{out}"),
        (f"--output_dir {pretrain('other', epochs=1)} --resume {good}", f"{tmp_path}/other"),
        (f"--resume {tmp_path}/nothing.pth", f"{tmp_path}/nothing.pth"),
        (f"--resume {truncated}", f"{truncated}"),
        (f"--resume {bare}", f"init_from={bare}"),
        (f"--init_from {good} --in_chans 1", f"{good}"),
        *([] if torch.cuda.is_available() else [("--device cuda", "device=cuda")]),
    ):
        assert message in error_of(*here, *flags.split()), flags


ONE_RANK_NAN = """
import time
import torch
import main_pretrain
from models_mae import MaskedAutoencoderViT
from mae import parallel; from mae.checkpoints import checkpoint; from mae.cli import entry_point
forward, write, calls = MaskedAutoencoderViT.forward, checkpoint.write, iter(range(1000))
def spoiled(self, *given, **context):
    loss, *others = forward(self, *given, **context)
    is_spoiled = self.training and torch.is_grad_enabled() and next(calls) >= 2 and parallel.rank() == 1
    return loss * (float("nan") if is_spoiled else 1), *others
def slowly(*given):
    time.sleep(3)
    write(*given)
MaskedAutoencoderViT.forward, checkpoint.write = spoiled, slowly
entry_point.run(main_pretrain.main, main_pretrain.get_args_parser())
"""


@pytest.mark.slow
def test_a_nan_in_one_process_ends_all_after_the_save(pictures, tmp_path):
    """The write is slow: if a process ended before it was complete, torchrun would kill the writing process."""
    (tmp_path / "spoiled.py").write_text(ONE_RANK_NAN)
    flags = mains.small_run(pictures, tmp_path / "out", "--batch_size", 2, "--epochs", 9, "--save_every", 99)
    command = [*torchrun(2), tmp_path / "spoiled.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "epoch 0, batch 2: loss nan" in done.stderr
    state = checkpoint.read(tmp_path / "out" / "checkpoint-emergency.pth")
    assert state["progress"]["meters"]["updates"] == 2
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_a_warmup_as_long_as_the_run_warns(pretrain, capsys):
    pretrain("all", epochs=1, warmup_epochs=1)
    assert "warning: warmup_epochs=1 is not shorter than the run of epochs=1" in capsys.readouterr().out
    pretrain("part", epochs=1, warmup_epochs=0.5)
    assert "warmup_epochs=0.5 is" not in capsys.readouterr().out


def test_deep_images_without_statistics_suggest_mean_and_std(pretrain, tmp_path, capsys):
    """The suggested flags can be pasted, and the loss then has the usual scale."""
    (tmp_path / "deep").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        values = generator.normal(-3000, 500, size=(20, 20)).astype(np.float32)
        Image.fromarray(values).save(tmp_path / "deep" / f"{number}.tif")
    flags = {"data_path": tmp_path / "deep", "in_chans": 1, "epochs": 1}
    pretrain("without", **flags)
    (found,) = re.findall(r"more than 8 bits.* suggest mean=\[(\S+)\] std=\[(\S+)\]", capsys.readouterr().out)
    assert [float(found[0]), float(found[1])] == [pytest.approx(-3000, abs=50), pytest.approx(500, abs=20)]
    out = pretrain("with", **flags, mean=found[0], std=found[1])
    assert "more than 8 bits" not in capsys.readouterr().out
    assert lines(out)[0]["train_loss"] < 5


@pytest.mark.parametrize(("low", "high", "statistics", "count"), [
    (0, 255, {}, 1), (0, 255, {"mean": 128, "std": 74}, 0), (-3, 3, {"mean": 0, "std": 1}, 0),
])  # fmt: skip
def test_float_images_of_another_range_have_one_warning(pretrain, tmp_path, capsys, low, high, statistics, count):
    """Images in their own units, with their own statistics, have none."""
    (tmp_path / "floats").mkdir()
    for number in range(8):
        values = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)
        np.save(tmp_path / "floats" / f"{number}.npy", np.roll(values, number))
    pretrain(data_path=tmp_path / "floats", in_chans=1, crop="none", epochs=1, num_workers=2, **statistics)
    assert re.findall(r"warning: .* from (\S+) to (\S+), .*`mean`", capsys.readouterr().out) == [("0", "255")] * count


@pytest.mark.slow
@pytest.mark.parametrize(("method", "calls", "workers"), [("save_epoch", 2, 0), ("save", 6, 2)])
def test_epochs_of_a_number_of_updates_resume_exactly(pretrain, monkeypatch, method, calls, workers):
    """24 images are 6 updates; epochs of 4 and accumulation of 2 begin and end within a pass. All options are on."""
    settings = {
        "epochs": 3, "updates_per_epoch": 4, "accum_iter": 2, "save_every": 1, "num_cls_tokens": 3,
        "learned_pos_embed": True, "drop_path": 0.3, "mask_block": 2, "num_workers": workers,
    }  # fmt: skip
    parts = stop_and_resume(monkeypatch, pretrain, calls, method, **settings)
    assert checkpoint.read(parts / "checkpoint-2.pth")["optimizer"]["state"][0]["step"] == 12
    assert_same_run(pretrain("whole", **settings), parts, "checkpoint-2.pth")


def test_another_length_of_epochs_can_not_be_resumed(pretrain):
    for name, flags, remedy in (("run", {"updates_per_epoch": 2}, "give updates_per_epoch=2"),
                                ("plain", {}, "omit `updates_per_epoch`")):  # fmt: skip
        pretrain(name, **flags, epochs=1)
        with pytest.raises(CheckpointError, match=remedy):
            pretrain(name, resume="auto", updates_per_epoch=3)


def test_resuming_with_other_groups_names_the_groups(pretrain, monkeypatch):
    pretrain(epochs=1)
    original = main_pretrain.param_groups_weight_decay

    def one_group(model, weight_decay):  # in the line of the script
        return [{"params": [p for group in original(model, weight_decay) for p in group["params"]]}]

    monkeypatch.setattr(main_pretrain, "param_groups_weight_decay", one_group)
    with pytest.raises(CheckpointError, match="groups") as caught:
        pretrain(epochs=2, resume="auto")
    now, *before = map(int, re.findall(r"\d+", str(caught.value)))
    assert len(before) == 2 and now == sum(before)


def test_resumed_with_another_split(pretrain, monkeypatch):
    """The run resumes within an epoch; every update has the same weight in the means of log.txt."""
    whole = pretrain("whole", batch_size=4, accum_iter=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 2)
        pretrain("parts", batch_size=4, accum_iter=2, save_minutes=0)
    assert run_directory.position(whole.parent / "parts/checkpoint-last.pth") == (0, 16)
    assert_close(whole, pretrain("parts", batch_size=2, accum_iter=4, resume="auto"))
