"""A run resumes with its complete state: each part is compared with the saved one."""

import io
import math
import os
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as td
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4
from util import dist
from util.checkpoints import checkpoint, run_directory, run_state, shard_files, sharded
from util.checkpoints.checkpoint import CheckpointError
from util.checkpoints.run_state import Progress
from util.cli import advice
from util.files import atomic
from util.interrupts import Interrupts
from util.pos_embed import resize_pos_embed
from util.training import run_log, saver
from util.training.saver import Request, Saver
from util.weights import loading
from util.weights.loading import Weights

SETTINGS = {"model": "mae_vit_mini_patch4", "mask_ratio": 0.75, "seed": 3, "accum_iter": 2, "data_path": "a"}
METERS = {"loss": 1.5, "lr": 0.25, "updates": 2, "skipped_steps": 1}


def make_run(seed):
    """Returns a model, its optimizer with two groups, a scaler and a progress. Their values depend on the seed."""
    torch.manual_seed(seed)
    model = mae_vit_mini_patch4(img_size=16, in_chans=1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": parameters[:7], "weight_decay": 0.0}, {"params": parameters[7:], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3 * (1 + seed), betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 * (1 + seed))
    return model, optimizer, scaler, Progress(16, 8, num_images=48)


@pytest.fixture
def saved(tmp_path):
    """A run after two updates, saved after 4 batches of epoch 5 with a best accuracy of 70."""
    model, optimizer, scaler, progress = make_run(0)
    for _ in range(2):
        model(torch.randn(2, 1, 16, 16)).__getitem__(0).backward()
        optimizer.step()
    progress.best_accuracy = 70.0
    checkpoint.write({"epoch": 0}, tmp_path / "checkpoint-best.pth")  # otherwise a saver resets the best accuracy
    writer = Saver(
        Interrupts(), tmp_path, lambda: run_state.collect(model, optimizer, scaler, SETTINGS), progress,
        epochs=50, save_every=20, save_minutes=15,
    )  # fmt: skip
    torch.manual_seed(77)
    writer.save(5, 4, METERS)
    writer.close()
    return model, optimizer


def resumed(source, tmp_path, settings=SETTINGS):
    run = make_run(1)
    model, optimizer, scaler, progress = run
    run_state.resume(source, tmp_path, model, optimizer, scaler, settings, progress)
    return run


@pytest.mark.parametrize("source", ["auto", "checkpoint-last.pth"])
def test_every_part_of_the_state_is_restored(saved, tmp_path, source):
    torch.manual_seed(5)
    model, optimizer, scaler, progress = resumed(source if source == "auto" else str(tmp_path / source), tmp_path)
    torch.manual_seed(77)
    expected = torch.rand(4)
    resumed("auto", tmp_path)
    assert torch.equal(torch.rand(4), expected)
    for name, value in saved[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    restored, expected_state = optimizer.state_dict(), saved[1].state_dict()
    assert restored["state"].keys() == expected_state["state"].keys()
    for number, moments in expected_state["state"].items():
        assert moments["step"] == 2
        for name, value in moments.items():
            assert torch.equal(restored["state"][number][name], value)
    assert [group["lr"] for group in restored["param_groups"]] == [2e-3, 2e-3]  # settings are those of this run
    assert [group["weight_decay"] for group in restored["param_groups"]] == [0.0, 0.05]
    assert scaler.get_scale() == 1024.0
    assert (progress.epoch, progress.first_iteration, progress.best_accuracy) == (5, 4, 70.0)
    assert progress.meters == METERS


def test_contents_of_a_checkpoint(saved, tmp_path):
    state = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert state.keys() == {"model", "optimizer", "scaler", "args", "rng", "epoch", "progress", "digest"}
    assert state["args"] == SETTINGS
    assert (state["epoch"], state["scaler"]["scale"]) == (4, 1024.0)
    assert state["progress"] == {
        "epoch": 5, "images_done": 32, "effective_batch_size": 16, "meters": METERS, "best_accuracy": 70.0,
        "num_images": 48,
    }  # fmt: skip


def test_the_next_epoch_starts_at_its_first_iteration():
    progress = Progress(16, 8)
    progress.epoch, progress.first_iteration, progress.meters, progress.best_accuracy = 3, 4, dict(METERS), 50.0
    progress.next_epoch()
    assert (progress.epoch, progress.first_iteration, progress.meters, progress.best_accuracy) == (4, 0, {}, 50.0)


def test_changed_settings_are_named_except_free_ones(saved, tmp_path, caplog):
    resumed("auto", tmp_path, SETTINGS | {"mask_ratio": 0.5, "seed": 4, "accum_iter": 1, "data_path": "b"})
    warned = [record.message for record in caplog.records if "from now on" in record.message]
    assert warned == [
        "--mask_ratio was 0.75 in the resumed run, and is 0.5 from now on",
        "--seed was 3 in the resumed run, and is 4 from now on",
    ]


def test_one_warning_names_the_settings_that_the_code_does_not_know(saved, tmp_path, caplog):
    state = checkpoint.read(tmp_path / "checkpoint-last.pth")
    state["args"] = {**SETTINGS, "new_loss": "l1", "gpu": 3, "ema_rate": 0.5}
    checkpoint.write(state, tmp_path / "checkpoint-last.pth")
    resumed("auto", tmp_path)
    (warned,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "new_loss (l1)" in warned and "ema_rate (0.5)" in warned and "gpu" not in warned


def test_sizes_are_compared_by_value(saved, tmp_path, caplog):
    """A square has one number or two, and statistics are lists or tuples."""
    same = {"input_size": 16, "mean": [0.5], "patch_size": None, "crop_pct": None}
    run_state._require_same_meaning(same, {"input_size": [16, 16], "mean": (0.5,), "crop_pct": 0.875})
    with pytest.raises(CheckpointError) as raised:
        run_state._require_same_meaning(same | {"crop_pct": 0.9}, {"input_size": [8, 32], "mean": None})
    assert raised.value.__notes__ == ["give --input_size 16 --mean 0.5"]


def test_resuming_with_other_classes_is_an_error(tmp_path):
    run_state._require_same_meaning({"classes": ["cat", "dog"]}, {"classes": ["cat", "dog"]})
    with pytest.raises(CheckpointError, match="had other classes") as raised:
        run_state._require_same_meaning({"classes": ["cat", "dog"]}, {"classes": ["dog", "cat"]})
    assert "--finetune FILE starts from its weights" in raised.value.__notes__


def test_resuming_a_diverged_run_is_an_error(saved, tmp_path):
    state = checkpoint.read(tmp_path / "checkpoint-last.pth")
    state["model"]["norm.bias"][3] = math.nan
    checkpoint.write(state, tmp_path / "checkpoint-last.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in .*norm.bias.*resume from an earlier"):
        resumed("auto", tmp_path)


def test_a_resumed_run_records_its_checkpoint(saved, tmp_path):
    """Afterwards, the same command resumes from this checkpoint, and then from the newest one of the directory."""
    out, file = tmp_path / "new", str(tmp_path / "checkpoint-last.pth")
    out.mkdir()
    for which in (file, "auto"):
        assert resumed(which, out)[3].epoch == 5
    state = checkpoint.read(tmp_path / "checkpoint-last.pth")
    state["progress"] |= {"epoch": 9, "images_done": 0}
    checkpoint.write(state, out / "checkpoint-8.pth")
    assert resumed(file, out)[3].epoch == 9


def test_the_position_of_a_published_file(tmp_path):
    """The file has an epoch and no progress, so the epoch is complete."""
    torch.save({"model": {}, "epoch": 19}, tmp_path / "checkpoint-19.pth")
    assert checkpoint.position(tmp_path / "checkpoint-19.pth") == (20, 0)


def test_worker_processes_close_the_lock(tmp_path):
    """A forked process has the lock's file closed."""
    with run_directory.locked(tmp_path):
        child = os.fork()
        if child == 0:
            files = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)]
            os._exit(int(str(tmp_path / "run.lock") in files))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -------------------------------------------------------------------------------------------------------------- saving


def test_checkpoint_last_is_written_every_save_minutes(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = Progress(16, 8)
    writer = Saver(Interrupts(), tmp_path, dict, progress, epochs=9, save_every=20, save_minutes=15)
    requests = []
    for seconds in (0, 899, 2, 1, 897, 3):
        clock.now += seconds
        requests.append(writer.request())
        if requests[-1] is Request.SAVE:
            writer.save(0, 1, {})
    writer.close()
    assert [request is Request.SAVE for request in requests] == [False, False, True, False, False, True]


def test_checkpoints_are_ordered_by_epoch(tmp_path):
    for epoch in (100, 20, 3):
        checkpoint.write({"epoch": epoch}, tmp_path / f"checkpoint-{epoch}.pth")
    assert [path.name for path in checkpoint.milestones(tmp_path)] == [f"checkpoint-{n}.pth" for n in (3, 20, 100)]


def test_data_are_synced_before_the_rename(tmp_path, monkeypatch):
    """After a power failure, either the previous or the new file exists. This requires fsync before the rename."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", lambda a, b: calls.append(("rename", a.name)) or replace(a, b))
    checkpoint.write({"epoch": 0}, tmp_path / "a.pth")
    assert calls == [("fsync", "a.pth"), ("rename", "a.pth")]
    calls.clear()
    with atomic.replacing(tmp_path / "b", sync=False) as file:
        file.write_text("b")
    assert calls == [("rename", "b")]


# ---------------------------------------------------------------------------------------------------------- sharded


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint of one process, with two names."""
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    model, optimizer, scaler, _ = make_run(0)
    model(torch.randn(2, 1, 16, 16))[0].backward()
    optimizer.step()
    state = {"epoch": 0, "progress": {"epoch": 1, "images_done": 0}, "args": {},
             **run_state.collect(model, optimizer, scaler, {}),
             "optimizer": sharded.optimizer_state(model, optimizer)}  # fmt: skip
    sharded.write(state, tmp_path / "checkpoint-0", tmp_path / "checkpoint-best", group=None)
    yield tmp_path / "checkpoint-0"
    dist.teardown()


def test_a_sharded_checkpoint_has_both_names(folder):
    for name in ("checkpoint-0", "checkpoint-best"):
        assert sharded.gather(folder.with_name(name))["epoch"] == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint-0", "checkpoint-best"]


def test_every_file_of_a_sharded_checkpoint_is_verified(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".metadata", "__0_0.distcp", "state.pth"]
    for name in names:
        content = (folder / name).read_bytes()
        generator = random.Random(0)
        for _ in range(3):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 4
            (folder / name).unlink()  # the file has a second name, whose content must not change
            (folder / name).write_bytes(damaged)
            if name != "state.pth":  # some of its bytes are not verified: headers of the archive
                with pytest.raises(CheckpointError, match=f"{name} does not match its digest"):
                    sharded.read(folder)
        (folder / name).write_bytes(content)
    assert sharded.read(folder)["epoch"] == 0


def test_a_sharded_checkpoint_exists_until_the_next_one_is_complete(folder):
    with pytest.raises(FileNotFoundError):  # a crash between the two renames
        sharded._put_in_place(folder.with_name("gone"), folder)
    assert not folder.exists()
    assert sharded.gather(folder.with_name(".checkpoint-0.old"))["epoch"] == 0
    assert checkpoint.newest_first(folder.parent)[0].name in (".checkpoint-0.old", "checkpoint-best")


@pytest.mark.parametrize("function", [torch.load, torch.hub.load, torch.storage._load_from_bytes])
def test_functions_of_torch_are_not_called_by_a_description(function):
    with pytest.raises(CheckpointError, match="which could run code"):
        shard_files._Unpickler(io.BytesIO(pickle.dumps(function))).load()


# ---------------------------------------------------------------------------------------------------------------- logs


def test_scalars_have_their_tags_values_and_axes(tmp_path):
    """x is int(1000 * fractional epoch), that of perf/* is the end of the epoch."""
    log = run_log.RunLog(tmp_path, tmp_path, 3, loss_tag="loss")
    for epoch in (0, 1):
        log.begin_epoch(epoch, 0, 4, 8, run_log.Stopwatch())
        for step in range(1, 5):
            log.update(step, lr=step / 8, loss=step / 2, grad_norm=float(step))
        log.end_epoch({"train_lr": 0.1, "train_loss": 0.5, "test_acc1": 25.0 + epoch, "test_loss": 0.5})
    line = (tmp_path / "log.txt").read_text().splitlines()
    assert len(line) == 2  # at the end of each epoch, not when the log is closed
    log.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    x = [0, 250, 500, 750, 1000, 1250, 1500, 1750]
    for tag, factor in (("loss", 0.5), ("lr", 0.125), ("grad_norm", 1.0)):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [
            (step, factor * (1 + number % 4)) for number, step in enumerate(x)
        ]
    assert [(e.step, e.value) for e in events.Scalars("perf/test_acc1")] == [(999, 25.0), (1999, 26.0)]
    assert [(e.step, e.value) for e in events.Scalars("perf/test_loss")] == [(999, 0.5), (1999, 0.5)]
    assert "train_loss" not in events.Tags()["scalars"]


def test_only_rank_0_writes_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert type(run_log.open_log(tmp_path, tmp_path, 3)) is run_log.NullLog
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(dist, "rank", lambda: 0)
    log = run_log.open_log(tmp_path, tmp_path, 3, loss_tag="loss")
    assert (type(log), log.loss_tag) == (run_log.RunLog, "loss")


# ------------------------------------------------------------------------------------------------------------- weights


def test_a_wide_position_table_is_interpolated():
    """From 2 x 8 to 4 x 4 patches: the same number in another grid."""
    wide, square = vit_mini_patch4(img_size=(8, 32)), vit_mini_patch4(img_size=16)
    file = Weights(wide.state_dict(), {"input_size": [8, 32], "patch_size": 4}, loading.ENCODER, "file")
    assert file.grid_size == (2, 8)
    loading.load_encoder(square, file)
    assert torch.equal(square.pos_embed, resize_pos_embed(wide.pos_embed, (2, 8), (4, 4)))
    assert not torch.equal(square.pos_embed, wide.pos_embed)
    tensors = {"patch_embed.proj.weight": torch.zeros(8, 1, 4, 2), "pos_embed": torch.zeros(1, 49, 8),
               "cls_token": torch.zeros(1, 1, 8)}  # fmt: skip
    assert Weights(tensors, {"input_size": [16, 24]}, loading.ENCODER, "file").grid_size == (4, 12)


def test_a_head_for_other_classes_is_not_loaded():
    source, classes = vit_mini_patch4(img_size=16, num_classes=2), ["cat", "dog"]
    for recorded, is_loaded in ((classes, True), (None, True), (["dog", "cat"], False)):
        model = vit_mini_patch4(img_size=16, num_classes=2)
        file = Weights(source.state_dict(), {"classes": recorded}, loading.CLASSIFIER, "file")
        assert loading.load_encoder(model, file, classes=classes) is is_loaded
        assert torch.equal(model.head.weight, source.head.weight) is is_loaded


def test_explicit_statistics_override_those_of_the_file():
    tensors = {"patch_embed.proj.weight": torch.zeros(8, 1, 4, 4)}
    file = Weights(tensors, {"in_chans": 1, "mean": [0.3], "std": [0.2]}, loading.ENCODER, "file")
    assert loading.statistics(file, 1, None, None) == ([0.3], [0.2])
    assert loading.statistics(file, 1, [0.5], None) == ([0.5], [0.2])
    assert loading.statistics(file, 1, None, [0.6]) == ([0.3], [0.6])
    assert loading.statistics(file, 3, None, None) == (None, None)
    assert loading.statistics(None, 1, [0.5], [0.6]) == ([0.5], [0.6])


def test_suggested_commands_can_be_typed():
    settings = {"global_pool": False, "pin_mem": False, "mean": [0.5, 0.25], "lr": None}
    assert advice.remedy(settings) == "give --cls_token --no_pin_mem --mean 0.5 0.25 and omit --lr"
    assert advice.did_you_mean("cifar10", ["CIFAR10", "MNIST"]) == "; did you mean CIFAR10?"
    assert advice.did_you_mean("MODEL", ["model"]) == "; did you mean model?"
    assert advice.did_you_mean("zzz", ["model"]) == ""


def test_numpy_and_python_generators_are_not_part_of_a_state(saved, tmp_path):
    """Their numbers depend only on (seed, epoch, index)."""
    random.seed(4), np.random.seed(4)
    expected = random.random(), np.random.rand()
    random.seed(4), np.random.seed(4)
    resumed("auto", tmp_path)
    assert (random.random(), np.random.rand()) == expected
