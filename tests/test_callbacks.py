"""Callbacks between updates: when they run, and their state in checkpoints."""

from argparse import Namespace
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import assert_equal, in_processes, lines, parse, stop_and_resume, weights
from segments import make_scenes

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from examples.averaged_weights import EMA
from examples.rising_ratio import Progress, RisingRatio
from mae import parallel
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.weights import loading

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 32,
        "decoder_depth": 1, "decoder_num_heads": 2}  # fmt: skip


class History:
    def __init__(self):
        self.epochs, self.weights = [], []

    def after_update(self, model, epoch):
        self.epochs.append(epoch)
        self.weights.append(model.cls_token[0, 0, 0].item())

    def state_dict(self):
        return {"epochs": self.epochs, "weights": self.weights}

    def load_state_dict(self, state_dict):
        self.epochs, self.weights = state_dict["epochs"], state_dict["weights"]


def test_a_callback_runs_after_every_update(pretrain):
    """An epoch has six iterations, which are three updates. The weights are those after the optimizer step."""
    history = History()
    out = pretrain(accum_iter=2, callbacks=[history])
    assert history.epochs == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    state = checkpoint.read(out / "checkpoint-1.pth")
    assert state["callbacks"] == [history.state_dict()]
    assert history.weights[-1] == state["model"]["cls_token"][0, 0, 0].item() != history.weights[-2]


@pytest.mark.parametrize(("state", "message"), [
    (np.float64(3), "History.epochs .*float64"), ([Path("a")], "History.epochs.0 .*PosixPath"),
    (deque([1]), "History.epochs .*deque"), ({"a", "b"}, "History.epochs .*set"),
    ({(1, 2): np.int64(3)}, "History.epochs.*int64")
])  # fmt: skip
def test_a_state_that_could_not_be_read_again_is_an_error_before_training(pretrain, tmp_path, state, message):
    history = History()
    history.epochs = state
    with pytest.raises(ValueError, match=message):
        pretrain(callbacks=[history])
    with pytest.raises(ValueError, match=message.rpartition("*")[2]):
        checkpoint.write({"epoch": 1, "state": state}, tmp_path / "m.pth")
    assert not list(tmp_path.rglob("*.pth"))


def test_an_own_flag_that_could_not_be_read_again_is_an_error_before_training(pictures, tmp_path):
    flags = {"data_path": pictures, "output_dir": tmp_path / "out", "model": "mae_vit_mini_patch4", "input_size": 16,
             "batch_size": 4}  # fmt: skip
    settings = parse(main_pretrain, **flags, epochs=1, device="cpu", num_workers=0).record()
    with pytest.raises(ValueError, match=r"teacher.*PosixPath"):
        main_pretrain.main(Namespace(**settings, teacher=Path("t.pth")))
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "calls"), [("save_epoch", 1), ("save", 2)])
def test_an_average_of_the_weights_is_saved_and_resumed_exactly(pretrain, monkeypatch, method, calls):
    settings = {"epochs": 3, "accum_iter": 2, "save_every": 1}

    def averaged(name, **flags):
        return pretrain(name, callbacks=[EMA()], **flags)

    uninterrupted = averaged("whole", **settings)
    resumed = stop_and_resume(monkeypatch, averaged, calls, method, **settings)
    (ours,), (theirs,) = (checkpoint.read(out / "checkpoint-2.pth")["callbacks"] for out in (uninterrupted, resumed))
    assert_equal(ours, theirs)
    assert ours["n_averaged"] == 9
    last = weights(resumed, "checkpoint-2.pth")
    assert any(not torch.equal(ours[f"module.{name}"], weight) for name, weight in last.items())


@pytest.mark.parametrize(("before", "after", "numbers"), [(0, 1, "0 callbacks.* has 1"), (1, 0, "1 callbacks.* has 0")])
def test_a_run_resumes_with_the_same_callbacks(pretrain, before, after, numbers):
    out = pretrain(epochs=1, callbacks=[History()] * before)
    assert ("callbacks" in checkpoint.read(out / "checkpoint-0.pth")) == bool(before)
    with pytest.raises(CheckpointError, match=numbers):
        pretrain(epochs=2, resume="auto", callbacks=[History()] * after)


def test_fsdp_with_callbacks_is_a_one_line_error(pretrain, monkeypatch):
    monkeypatch.setattr(parallel, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="`fsdp`"):
        pretrain(callbacks=[History()])


def test_the_script_of_an_average_writes_its_weights(pictures, tmp_path):
    """The first update sets the average to the weights; the second moves it by a thousandth."""
    flags = ("--batch_size", 4, "--epochs", 1, "--updates_per_epoch", 2, "--warmup_epochs", 0)
    in_processes(2, pictures, tmp_path, *flags, script=ROOT / "examples/averaged_weights.py")
    last, average = weights(tmp_path, "checkpoint-0.pth"), loading.read(tmp_path / "average.pth").tensors
    state = checkpoint.read(tmp_path / "checkpoint-0.pth")["callbacks"][0]
    assert average.keys() == last.keys()
    assert torch.equal(average["cls_token"], state["module.cls_token"])
    assert not torch.equal(average["cls_token"], last["cls_token"])


@pytest.mark.parametrize("name", ["train_loss", "seconds"])
def test_an_entry_that_exists_is_an_error_and_the_epoch_is_saved(pretrain, name):
    class Twice(History):
        def after_epoch(self, model, epoch, log):
            return {name: 0.0}

    with pytest.raises(ValueError, match=f"Twice.*{name}"):
        pretrain("run", callbacks=[Twice()], epochs=1, save_minutes=0)


def test_entries_may_be_numbers_of_pytorch_and_numpy(pretrain):
    class Entries(History):
        def after_epoch(self, model, epoch, log):
            return {"norm": torch.tensor(1.5), "count": np.int64(2)}

    (line,) = lines(pretrain("run", callbacks=[Entries()], epochs=1))
    assert (line["norm"], line["count"]) == (1.5, 2)


@pytest.mark.parametrize("script", [main_finetune, main_linprobe, main_segment])
def test_callbacks_of_every_script(script, classify, tmp_path):
    """An entry of an epoch comes from the weights after its last update."""

    def of_head(state):
        return sum(float(value.double().square().sum()) for name, value in state.items() if name.startswith("head."))

    class Last(History):
        def after_epoch(self, model, epoch, log):
            return {"test_weight": of_head(model.state_dict()), "number": len(self.epochs)}

        def after_update(self, model, epoch):
            self.epochs.append(epoch)

    scenes = {"data_path": make_scenes(tmp_path / "scenes"), "nb_classes": 3} if script is main_segment else {}
    history = Last()
    first, second = lines(classify(script, of_main={"callbacks": [history]}, **scenes))
    assert (first["number"], second["number"]) == (len(history.epochs) / 2, len(history.epochs))
    assert second["test_weight"] == pytest.approx(of_head(weights(tmp_path / "run"))) != first["test_weight"]


def test_a_mask_ratio_rises_with_the_epochs_and_resumes(pretrain, monkeypatch):
    """Of 16 patches, int(16 · (1 - ratio)) are visible: 8 at first, and 4 after two epochs."""
    model, progress, found = RisingRatio(**TINY, first=0.5, epochs=2).train(), Progress(), {}
    for epoch in (0, 0.5, 1, 1.5, 2, 3):
        progress.after_update(model, epoch)
        found[epoch] = int((model(torch.rand(1, 3, 16, 16), 0.75)[2] == 0).sum())
    assert found == {0: 8, 0.5: 7, 1: 6, 1.5: 5, 2: 4, 3: 4}
    progress.after_update(model, 0)
    valid = torch.zeros(1, 16, 16, dtype=torch.bool)
    valid[:, :4] = True  # four patches, fewer than are visible at first
    assert (model(torch.rand(1, 3, 16, 16), 0.75, valid=valid)[2] == 0).sum() == 4
    assert (model.eval()(torch.rand(1, 3, 16, 16), 0.75)[2] == 0).sum() == 4
    own = {"of_main": {"model_class": RisingRatio}, "model_args": "first=0.5 epochs=2"}
    whole = pretrain("whole", **own, callbacks=[Progress()])
    parts = stop_and_resume(monkeypatch, pretrain, 3, **own, callbacks=[Progress()])
    assert_equal(weights(whole), weights(parts))
    assert weights(whole)["decoder_progress"] == 1
