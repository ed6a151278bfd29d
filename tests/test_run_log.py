"""The log of a run: header, progress, log.txt, TensorBoard."""

import contextlib
import io
import logging
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import argv_of, call, lines, small_run, stop_and_resume
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main_finetune
import main_pretrain
from mae import parallel
from mae.inference import report
from mae.settings import DataSpec, EvaluationSpec, ModelSpec
from mae.training import costs, environment, log, log_writers, trainer
from mae.training.log import RunLog, start_logging
from mae.training.meters import Meters, Stopwatch
from mae.training.precision import Precision


class Slow:
    """A callback that counts the updates, and takes .3 seconds for each."""

    count = 0

    def after_update(self, model, epoch):
        self.count += 1
        time.sleep(0.3)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_seconds_of_an_epoch_have_its_updates_before_a_stop(pretrain, monkeypatch):
    callback = Slow()
    parts = stop_and_resume(monkeypatch, pretrain, 1, epochs=1, callbacks=[callback])
    assert callback.count > 2
    assert lines(parts)[0]["seconds"] >= 0.3 * callback.count


def test_meters_are_means_over_updates():
    meters = Meters()
    for loss, lr in ((2.0, 0.1), (2.0, 0.1), (2.0, 0.1), (6.0, 0.5)):
        meters.add(loss, 1.0, lr)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2})
    assert Meters(**meters.state_dict()) == meters
    meters.add(loss=math.nan, grad_norm=1.0, lr=0.5)
    meters.add(loss=1.0, grad_norm=math.inf, lr=0.5)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2, "skipped_steps": 2})
    assert Meters().means() == {"train_loss": None, "train_lr": None}


def test_stopwatch_measures_only_data_loading():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    watch = Stopwatch()
    for _ in watch.watch(slow()):
        time.sleep(0.05)
    assert 0.3 < watch.loading_share < 0.7 and watch.seconds >= 0.3


@pytest.mark.parametrize(("loader", "idle"), [(92, 92 + 49 * 2), (20, 20)])  # milliseconds for a batch, and in total
def test_data_loading_on_a_gpu_is_the_time_in_which_it_is_idle(monkeypatch, loader, idle):
    """The GPU computes 90 ms for a batch, and the host launches this in 10 ms: it waits for the loader, not the GPU."""
    clock = SimpleNamespace(host=0, gpu=0)  # now; the end of all that is launched

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = max(clock.host, clock.gpu)

        def query(self):
            return self.time <= clock.host

        def elapsed_time(self, end):
            assert end.query()
            return end.time - self.time

    def batches():
        for number in range(1, 51):
            clock.host = max(clock.host, number * loader)
            yield number

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.host / 1000)
    watch = Stopwatch(torch.device("cuda"))
    for _ in watch.watch(batches()):
        clock.gpu = max(clock.host, clock.gpu) + 90
        clock.host += 10
    clock.host = clock.gpu
    watch.stop()
    assert watch.loading_seconds == pytest.approx(idle / 1000)
    assert watch.seconds == pytest.approx(50 * 0.090 + idle / 1000)


@pytest.mark.parametrize(("suffix", "flags", "remedies"), [
    ("jpg", {}, {"num_workers=", "`fast_jpeg`", "resize_folder.py"}),
    ("png", {}, {"num_workers=", "resize_folder.py"}),
    ("jpg", {"cache_images": True}, {"num_workers="}),
])  # fmt: skip
def test_the_first_epoch_names_what_makes_data_loading_faster(tmp_path, monkeypatch, capsys, suffix, flags, remedies):
    """The device waits while the training process decodes images of 800 pixels: there are no worker processes."""
    for number in range(6):
        file = tmp_path / "images" / f"{number}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        Image.effect_noise((800, 800), 99).convert("RGB").save(file)
    monkeypatch.setattr("joblib.cpu_count", lambda: 7)
    if flags:  # fast machines hardly wait for decoded images
        monkeypatch.setattr("mae.training.log.MAX_LOADING", 0)
    images, out = tmp_path / "images", tmp_path / "out"
    call(main_pretrain, *small_run(images, out, "--epochs", 2, "--batch_size", 2, *argv_of(flags)))
    advice = re.findall(r"^data loading limits.*", capsys.readouterr().out, re.MULTILINE)
    assert len(advice) == 1
    assert {name for name in ("num_workers=", "`fast_jpeg`", "resize_folder.py") if name in advice[0]} == remedies
    assert f"num_workers={7 - torch.get_num_threads()}" in advice[0]  # on a CPU, the other cores compute


def products(tokens, width, depth):
    """Multiply-adds of transformer blocks."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


SLIPS = """
from models_mae import MaskedAutoencoderViT
class Slip(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        rows, columns = pred.shape
class Pairs(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        return super().forward_loss(imgs, pred, mask, **context) + 0 * imgs[1].sum()
"""


def test_a_failed_count_of_flops_names_no_cause_and_ends_no_run(own_module, pretrain, capsys):
    """The first update shows an error of the user's class. A model may need more than the one image of the count."""
    own_module("slips", SLIPS)
    with pytest.raises(ValueError, match="unpack") as raised:
        pretrain(model_class="slips:Slip")
    assert "unpack" not in capsys.readouterr().out
    assert raised.traceback[-1].path.name == "slips.py"
    (entries,) = lines(pretrain("pairs", model_class="slips:Pairs", epochs=1))
    assert "tflops" not in entries
    assert "index" not in capsys.readouterr().out


def test_tflops_are_those_of_forward_and_backward_pass(pretrain, classify):
    """Images of 4 x 4 patches with 48 values. The encoder is 128 wide and 4 deep, the decoder 64 wide and 1 deep."""
    patches = 16 * 48 * 128
    masked = patches + products(5, 128, 4) + 5 * 128 * 64 + products(17, 64, 1) + 17 * 64 * 48
    whole = patches + products(17, 128, 4) + 128 * 6
    for out, expected in ((pretrain(epochs=1), masked), (classify(main_finetune, "whole", epochs=1), whole)):
        entries = lines(out)[0]
        assert entries["tflops"] * 1e12 / entries["images_per_s"] == pytest.approx(3 * 2 * expected, rel=2e-3)
        assert "mfu" not in entries and "peak_memory_gb" not in entries
    frozen = lines(classify(main_finetune, "frozen", epochs=1, unfreeze_blocks=1))[0]
    assert "tflops" not in frozen  # a third of this for blocks below


@pytest.mark.parametrize("reads_noise", [False, True])  # a forward pass that ends with an error has counted, too
def test_counting_flops_restores_the_buffers(reads_noise):
    """A user's model counts its forward passes, and its loss depends on the count."""

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, imgs, **extras):
            self.count = self.count + 1
            return super().forward(imgs + extras["noise"] if reads_noise else imgs)

    model, imgs = Counting(), torch.zeros(1, 4)
    flops = costs.training_flops(model, lambda: model(imgs), Precision("off", torch.device("cpu")))
    assert flops == (None if reads_noise else 3 * 2 * 4 * 4)
    assert model.count == 0


def test_flops_of_a_transformer_layer_of_pytorch():
    layer, tokens = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), torch.zeros(1, 17, 128)
    flops = costs.training_flops(layer, lambda: layer(tokens), Precision("off", torch.device("cpu")))
    assert flops == 3 * 2 * products(17, 128, 1)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("gpu", "amp", "share"), [
    ("NVIDIA H200", "bf16", 0.329), ("NVIDIA H100 PCIe", "bf16", 0.4305), ("NVIDIA H200", "off", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
])  # fmt: skip
def test_the_share_of_the_peak_is_that_of_a_known_gpu(monkeypatch, gpu, amp, share):
    """ViT-B on an H200: 5,567 images/s of 58.46 GFLOPs; the other GPUs at the same throughput."""
    measured = {"get_device_name": gpu, "max_memory_allocated": 61_200_000_000, "reset_peak_memory_stats": None}
    for name, value in measured.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    entries = costs.of_epoch(Precision(amp, torch.device("cuda")), 58_460_000_000, 5567)
    assert entries == {"tflops": 325.4, "peak_memory_gb": 61.2} | (
        {"mfu": pytest.approx(share, abs=1e-3)} if share else {}
    )


def test_a_resumed_log_has_every_epoch_once(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "x": 1}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    RunLog(tmp_path, tmp_path, epochs=4, first_epoch=2).close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "x": 1}\n{"epoch": 1}\n'


def test_the_remaining_time_has_the_evaluations(tmp_path, caplog):
    """Three of them remain, of .7 seconds each; the updates take no time."""
    written = RunLog(tmp_path, tmp_path, epochs=4)
    with caplog.at_level(logging.INFO):
        for epoch in range(2):
            watch = Stopwatch()
            written.next_line = 0.0
            written.begin_epoch(epoch, 0, 1, 8, watch)
            for _ in watch.watch(range(1)):
                pass
            written.update(1, lr=1e-3, loss=1.0, grad_norm=2.0)
            watch.stop()
            time.sleep(0.7)
            written.end_epoch({"train_loss": 1.0, "train_lr": 1e-3})
    written.close()
    left = [line.rpartition(" left ")[2] for line in caplog.messages if " left " in line]
    assert left == ["0:00:00", "0:00:02"]


START = """
import os, signal, sys
from pathlib import Path
import numpy as np
from mae.training.meters import Stopwatch
from mae.training.log import RunLog, next_x
value, first, done, last = map(int, sys.argv[1:])
log = RunLog(Path("."), Path("."), 9, first, next_x(first, done, 10))
for epoch in range(first, last):
    log.begin_epoch(epoch, done, 10, 8, Stopwatch())
    for iterations in range(done, 10):
        log.update(iterations + 1, lr=1e-3, loss=value, grad_norm=2.0)
    log.picture("reconstruction", np.full((4, 4, 3), value, np.uint8), epoch)
    log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": value})
    done = 0
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("done", [0, 5, 10])  # iterations of the epoch; the last is before its evaluation
def test_tensorboard_shows_each_x_once_with_the_values_of_the_resumed_run(tmp_path, done):
    """Two starts are killed. The second resumes from a state before the last epoch of the first."""
    for argv in ((1, 0, 0, 3), (2, 2, done, 4)):
        (tmp_path / "start.py").write_text(START)
        run = forks.Forks("start.py", argv, tmp_path / "output", folder=tmp_path)
        assert run.wait(60) == [-signal.SIGKILL]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("train_loss")]
    assert shown == [(100 * n, 1 if n < 20 + done else 2) for n in range(40)]
    results = [(999, 1), (1999, 1), (2999, 2), (3999, 2)]
    assert [(e.step, e.value) for e in events.Scalars("perf/test_acc1")] == results
    pictures = [(e.step, Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images("reconstruction")]
    assert [(x, picture.getpixel((0, 0))[0]) for x, picture in pictures] == results


def test_runs_that_share_a_folder_for_tensorboard_keep_their_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        before = {path: path.read_bytes() for path in tmp_path.glob("events.*")}
        RunLog(tmp_path / name, tmp_path, 4).close()
        assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.glob("events.*"))) == 2


def fill(file, size):
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(size))


def test_log_lines_are_written_after_a_full_disk_has_space(small_disk, caplog, capfd, monkeypatch):
    """Events of that time are lost. Later ones are written, a minute after the last attempt."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(log_writers, "time", clock)
    subprocess.run(["mount", "-o", "remount,size=256k", small_disk], check=True)
    start_logging()
    logging.getLogger().addHandler(caplog.handler)
    results, filler = {"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": 1.0}, small_disk / "filler"
    log = RunLog(small_disk, small_disk, epochs=4)
    for epoch in range(4):
        if epoch == 1:
            fill(filler, 4096)
        elif epoch == 3:
            warned = [r.message for r in caplog.records if "No space left on device" in r.message]
            assert len(warned) == 2 and "log.txt" in warned[1] and "events of TensorBoard are lost" in warned[0]
            filler.unlink()
            clock.now += 61
            time.sleep(1)  # TensorBoard orders the files by their second
        log.begin_epoch(epoch, 0, 2, 8, Stopwatch())
        if epoch in (1, 2):
            log.picture("reconstruction", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), epoch)
        log.end_epoch(results | ({"note": "x" * 3000} if epoch in (1, 2) else {}))
    log.close()
    assert [line["epoch"] for line in lines(small_disk)] == [0, 1, 2, 3]
    events = EventAccumulator(str(small_disk)).Reload()
    assert [e.step for e in events.Scalars("perf/test_acc1")] == [999, 3999]
    log = RunLog(small_disk, small_disk, epochs=5, first_epoch=4, first_x=4000)
    fill(filler, 512)
    log.begin_epoch(4, 0, 2, 8, Stopwatch())
    log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "note": "x" * 9000})
    with pytest.raises(OSError, match=r"can't write .*; the last [\d,]+ bytes are in (.*)") as stop:
        log.close()
    assert Path(str(stop.value).rpartition(" ")[2]).stat().st_size > 0
    assert "Traceback" not in "".join(capfd.readouterr())


def test_progress_is_logged_as_lines_without_a_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    log = RunLog(tmp_path, tmp_path, epochs=2)
    log.begin_epoch(1, 0, num_iterations=10, images_per_iteration=8, watch=Stopwatch())
    for step in range(1, 11):
        log.update(step, lr=1e-3, loss=0.5, grad_norm=2.0)
    log.end_epoch({"train_lr": 1e-3, "train_loss": 0.5})
    log.close()
    first, last = (record.getMessage() for record in caplog.records)
    assert re.match(r"epoch 1 \[ 1/10\]  loss 0.5000  lr 1.00e-03  grad 2  [\d,]+ images/s  ", first)
    assert re.match(r"epoch 1 .*loss 0.5000", last)
    assert [(line["epoch"], line["train_loss"]) for line in lines(tmp_path)] == [(1, 0.5)]


def test_short_epochs_share_a_line(tmp_path, caplog, monkeypatch):
    """The first and the last epoch have lines. log.txt has a line for each epoch."""
    caplog.set_level("INFO")
    log = RunLog(tmp_path, tmp_path, epochs=9)
    for epoch in range(9):
        watch = Stopwatch()
        monkeypatch.setattr(type(watch), "seconds", 0.4)
        log.begin_epoch(epoch, 0, num_iterations=1, images_per_iteration=8, watch=watch)
        log.update(1, lr=1e-3, loss=0.5, grad_norm=2.0)
        log.end_epoch({"train_lr": 1e-3, "train_loss": 0.5})
    log.close()
    found = [record.getMessage().split(":")[0] for record in caplog.records]
    done = [text.partition(" done")[0] for text in found if " done in " in text]
    assert done == ["epoch 0", "epochs 1 to 3", "epochs 4 to 6", "epochs 7 to 8"]
    assert len(lines(tmp_path)) == 9
    assert sum("[1/1]" in record.getMessage() for record in caplog.records) == 1  # of updates, in ten seconds


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    code = """
import time
from pathlib import Path
from mae.training.meters import Stopwatch
from mae.training.log import RunLog
log = RunLog(Path("."), Path("."), epochs=3)
log.begin_epoch(0, 0, num_iterations=4, images_per_iteration=16, watch=Stopwatch())
for step in range(1, 5):
    time.sleep(0.15)  # the bar refreshes ten times a second
    log.update(step, lr=1e-3, loss=0.25, grad_norm=2.0)
log.end_epoch({"train_lr": 1e-3, "train_loss": 0.25})
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 150))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=theirs, env=environment)
    os.close(theirs)
    data = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            data += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    text = data.decode()
    for part in ("epoch 0/3", "loss 0.2500", "lr 1.00e-03", "img/s", "data loading", "run ends in"):
        assert part in text


def test_other_ranks_log_only_their_own_messages(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "rank", lambda: 3)
    start_logging()
    logger = logging.getLogger("util.x")
    logger.info("all alike")
    logger.warning("all alike, too")
    logger.warning("an image of mine", extra={"every_rank": True})
    monkeypatch.undo()
    start_logging()
    logger.warning("all alike, too")
    assert capsys.readouterr().out == "warning: [rank 3] an image of mine\nwarning: all alike, too\n"


def test_other_ranks_do_not_read_what_rank_0_writes(tmp_path, monkeypatch):
    """log.txt is there from the start of a run, and rank 0 writes its last lines while the others end."""
    (tmp_path / "log.txt").touch()
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    log.log_commands(str(tmp_path), 1, DataSpec(), ModelSpec(), EvaluationSpec(), has_labels=False)


def test_lines_that_a_crash_has_cut_off_are_skipped_and_named(pretrain, capsys):
    """A page is written, and a run resumes, whose line is a new one."""
    out = pretrain(epochs=1)
    files = [out / "environment.jsonl", out / "log.txt"]
    for file in files:
        line = file.read_text()
        file.write_text(line + line[:-9])
    capsys.readouterr()
    assert call(report, out, device="cpu", num_workers=0).exists()
    pretrain(epochs=2, resume="auto")
    text = capsys.readouterr().out
    assert all(f"{file}, line 2" in text for file in files)
    assert [line["epoch"] for line in lines(out)] == [0, 1]
    assert [start["settings"]["epochs"] for start in environment.read(out)] == [1, 2]
    files[0].write_text(line[:-9])
    with pytest.raises(ValueError, match=r"environment\.jsonl"):
        environment.read(out)


def test_a_log_that_is_no_text_is_named(pretrain):
    """It may be another file, so it stays."""
    out = pretrain(epochs=1)
    (out / "log.txt").write_bytes(b"\x80\x81\n")
    with pytest.raises(ValueError, match=re.escape(str(out / "log.txt"))):
        pretrain(epochs=2, resume="auto")
    assert (out / "log.txt").read_bytes() == b"\x80\x81\n"


def test_the_error_that_ends_a_run_precedes_an_error_of_the_log(caplog):
    class Full(log.NullLog):
        def close(self):
            raise OSError("the log is full")

    with pytest.raises(OSError, match=r"^The state is in X$"), trainer.closing_log(Full()):
        raise OSError("The state is in X")
    assert "the log is full" in caplog.text
    with pytest.raises(OSError, match="the log is full"), trainer.closing_log(Full()):
        pass
