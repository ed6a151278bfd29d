"""Arguments that `trainer.run` passes to every epoch, the learning rate of every update, and the loss of a batch."""

import pytest
import torch
from mains import lines

import engine_pretrain
from models_mae import mae_vit_mini_patch4
from util import dist, lr_sched
from util.checkpoints import run_directory
from util.checkpoints.run_state import Progress
from util.data import loader, transforms
from util.training import loop, saver, trainer
from util.training.precision import Precision
from util.training.run_log import Stopwatch


def log_empty_epoch(batches, options) -> None:
    """Logs an epoch without training."""
    if options:
        watch = Stopwatch()
        watch.stop()
        options.log.begin_epoch(options.epoch, 0, len(batches), batches.images_per_iteration, watch)


@pytest.fixture
def loop_calls(monkeypatch):
    """Replaces the loop by a function that records its arguments."""
    calls = []

    def record(compute_loss, model, loader, optimizer, options):
        log_empty_epoch(loader, options)
        arguments = {"compute_loss": compute_loss, "model": model, "loader": loader, "optimizer": optimizer}
        calls.append(arguments | (vars(options) if options else {}))

    monkeypatch.setattr(loop, "run_epoch", record)
    return calls


def record_calls(monkeypatch, module, name):
    """Records the arguments of all calls of a function."""
    calls, original = [], getattr(module, name)

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, record)
    return calls


LOOP_ARGUMENTS = {
    "compute_loss", "model", "loader", "optimizer", "epoch", "schedule", "precision", "guard", "first_iteration",
    "accum_iter", "clip_grad", "meters", "log", "saver", "after_update",
}  # fmt: skip


def test_every_argument_of_the_loop_by_default(pretrain, loop_calls):
    out = pretrain(epochs=3)
    assert [call["epoch"] for call in loop_calls] == [0, 1, 2]
    first, second, _ = loop_calls
    assert first.keys() == LOOP_ARGUMENTS
    assert isinstance(first["loader"], loader.TrainLoader)
    assert len(first["loader"]) == 6
    parameters = [parameter for group in first["optimizer"].param_groups for parameter in group["params"]]
    trained = [parameter for parameter in first["model"].parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in trained}
    assert (first["first_iteration"], first["accum_iter"], first["clip_grad"]) == (0, 1, None)
    guard = first["guard"]
    assert (guard.policy, guard.overflow_is_normal, guard.in_a_row) == ("abort", False, 0)
    assert first["precision"].name == "fp32"
    saves = first["saver"]
    assert (saves.output_dir, saves.epochs, saves.save_every, saves.save_seconds, saves.keep_last) == (
        out, 3, 20, 900.0, None
    )  # fmt: skip
    assert first["log"].loss_tag == "train_loss"
    assert first["meters"].updates == 0
    # These objects exist once per run; the meters are new in every epoch.
    for name in ("model", "loader", "optimizer", "guard", "precision", "saver", "log"):
        assert second[name] is first[name]
    assert second["meters"] is not first["meters"]


def test_every_argument_of_the_loop_by_flag(pretrain, loop_calls, monkeypatch, tmp_path):
    logs = record_calls(monkeypatch, trainer.run_log, "open_log")
    wrapped = record_calls(monkeypatch, dist, "wrap")
    resumed = record_calls(monkeypatch, trainer.run_state, "resume")
    pretrain(
        epochs=9, start_epoch=6, accum_iter=2, clip_grad=0.7, on_nonfinite="skip", save_every=5, save_minutes=2,
        keep_last=4, log_dir=tmp_path / "events", amp="bf16", warmup_epochs=2, min_lr=0.002, lr=0.01,
    )  # fmt: skip
    assert [call["epoch"] for call in loop_calls] == [6, 7, 8]
    call = loop_calls[0]
    assert (call["first_iteration"], call["accum_iter"], call["clip_grad"]) == (0, 2, 0.7)
    assert call["guard"].policy == "skip"
    assert call["precision"].name == "bf16"
    saves = call["saver"]
    assert (saves.epochs, saves.save_every, saves.save_seconds, saves.keep_last) == (9, 5, 120.0, 4)
    assert (saves.progress.effective_batch_size, saves.progress.global_batch_size, saves.progress.num_images) == (
        8, 4, 24
    )  # fmt: skip
    settings = saves.collect()["args"]
    assert {name: settings[name] for name in ("lr", "min_lr", "epochs")} == {"lr": 0.01, "min_lr": 0.002, "epochs": 9}
    ((args, options),) = logs
    assert args == (tmp_path / "run", tmp_path / "events", 9)
    assert options == {"first_epoch": 6, "first_x": 6000, "loss_tag": "train_loss"}
    (((source, output_dir, model, optimizer, scaler, _, progress, callbacks), _),) = resumed
    assert callbacks == ()
    assert (source, output_dir) == ("", tmp_path / "run")
    assert model is call["model"]
    assert optimizer is call["optimizer"]
    assert scaler is call["precision"].scaler
    assert progress is saves.progress
    assert wrapped == [((model, torch.device("cpu")), {})]
    # The schedule sets the rate of every group and returns it.
    assert [call["schedule"](epoch) for epoch in (0, 1, 2, 5.5, 9)] == pytest.approx([0, 0.005, 0.01, 0.006, 0.002])
    assert call["schedule"](1) == 0.005
    assert [group["lr"] for group in call["optimizer"].param_groups] == [0.005, 0.005]


def test_the_published_schedule(pretrain, loop_calls):
    """blr 1.5e-4, warm-up 40, 800 epochs. The effective batch size is 24."""
    pretrain(epochs=800, start_epoch=799, warmup_epochs=40, blr=1.5e-4, batch_size=24)
    schedule, peak = loop_calls[0]["schedule"], 1.40625e-5  # 1.5e-4 x 24 / 256
    rates = {0: 0, 10: peak / 4, 40: peak, 230: peak * 0.8535534, 420: peak / 2, 610: peak * 0.1464466, 800: 0}
    for epoch, rate in rates.items():
        assert schedule(epoch) == pytest.approx(rate, rel=1e-6, abs=1e-12)


def test_the_learning_rate_counts_the_images_of_all_processes(pretrain, loop_calls, monkeypatch):
    scaled = record_calls(monkeypatch, lr_sched, "scaled_lr")
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "mean_over_processes", lambda value: value)
    monkeypatch.setattr(dist, "wrap", lambda model, device: model)
    pretrain(epochs=2, batch_size=4, accum_iter=3, blr=0.256)
    assert scaled == [((None, 0.256, 24), {})]
    assert loop_calls[0]["schedule"](1) == pytest.approx(0.024)
    progress = loop_calls[0]["saver"].progress
    assert (progress.effective_batch_size, progress.global_batch_size) == (24, 8)


def test_the_learning_rate_of_every_update(pretrain, monkeypatch):
    """Two updates of 3 x 4 images per epoch; two epochs of warm-up and two of cosine from 0.012 to 0.002."""
    rates, step = [], Precision.step

    def record(self, optimizer, clip_grad):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(self, optimizer, clip_grad)

    monkeypatch.setattr(Precision, "step", record)
    out = pretrain(epochs=4, accum_iter=3, blr=0.256, warmup_epochs=2, min_lr=0.002)
    published = [0, 0.003, 0.006, 0.009, 0.012, 0.0105355339, 0.007, 0.0034644661]
    assert [no_decay for no_decay, _ in rates] == pytest.approx(published)
    assert [decay for _, decay in rates] == pytest.approx(published)
    assert [line["train_lr"] for line in lines(out)] == pytest.approx([0.0015, 0.0075, 0.01126776695, 0.00523223305])


def test_compile_is_enabled_by_its_flag(pretrain, loop_calls, monkeypatch):
    compiled = []
    monkeypatch.setattr(trainer, "compile_model", lambda *args: compiled.append(args))
    pretrain("plain", epochs=1)
    assert compiled == []
    pretrain("compiled", epochs=1, compile=True)
    assert compiled == [(loop_calls[1]["model"], torch.device("cpu"))]


def test_fp16_overflow_is_normal(pretrain, loop_calls, monkeypatch):
    monkeypatch.setattr(Precision, "__init__", init_fp16)
    pretrain(epochs=1)
    assert loop_calls[0]["guard"].overflow_is_normal is True


def init_fp16(self, amp, device):
    self.device, self.dtype, self.overflow_is_normal = device, torch.float16, True
    self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)


def test_the_loss_scaler_is_restored(pretrain, loop_calls, monkeypatch):
    """fp16 requires a GPU. The test restores the state of a scaler on the CPU."""
    monkeypatch.setattr(Precision, "__init__", init_fp16)
    with monkeypatch.context() as patch:
        # The state after an overflow.
        def train(compute_loss, model, batches, optimizer, options):
            log_empty_epoch(batches, options)
            scaler = options.precision.scaler
            scaler.load_state_dict(scaler.state_dict() | {"scale": 0.5, "_growth_tracker": 7})

        patch.setattr(loop, "run_epoch", train)
        pretrain(epochs=1, save_every=1)
    pretrain(epochs=2, resume="auto")
    state = loop_calls[0]["precision"].scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (0.5, 7)


def test_buffers_are_synchronized_before_an_epoch_is_saved(pretrain, loop_calls, monkeypatch):
    """After every epoch, all processes receive the buffers of rank 0 before the checkpoint is saved."""
    order = []
    monkeypatch.setattr(dist, "share_buffers", lambda model: order.append(("share", model)))
    save_epoch = saver.Saver.save_epoch

    def save(self, epoch, accuracy=None):
        order.append(("save", epoch, accuracy))
        save_epoch(self, epoch, accuracy)

    monkeypatch.setattr(saver.Saver, "save_epoch", save)
    pretrain(epochs=2)
    model = loop_calls[0]["model"]
    assert order == [("share", model), ("save", 0, None), ("share", model), ("save", 1, None)]


def test_a_resumed_run_trains_the_rest_of_an_epoch(pretrain, loop_calls, monkeypatch):
    """A run that resumes within an epoch trains the remaining iterations and continues the meters."""

    def resume(source, output_dir, model, optimizer, scaler, settings, progress: Progress, callbacks):
        progress.epoch, progress.first_iteration, progress.meters = 1, 4, {"loss": 3.0, "lr": 0.5, "updates": 2}

    monkeypatch.setattr(trainer.run_state, "resume", resume)
    logs = record_calls(monkeypatch, trainer.run_log, "open_log")
    pretrain(epochs=3, accum_iter=2)
    first, second = loop_calls
    assert (first["epoch"], first["first_iteration"], first["meters"].loss, first["meters"].updates) == (1, 4, 3.0, 2)
    assert (second["epoch"], second["first_iteration"], second["meters"].updates) == (2, 0, 0)
    assert logs[0][1]["first_epoch"] == 1
    assert logs[0][1]["first_x"] == 1666  # int(1000 x (1 + 4 / 6))


def test_a_run_locks_its_directory(pretrain, monkeypatch, tmp_path):
    def train(compute_loss, model, batches, optimizer, options):
        log_empty_epoch(batches, options)
        with (
            pytest.raises(ValueError, match="is being written to by another run"),
            run_directory.locked(tmp_path / "run"),
        ):
            pass
        entered.append(True)

    entered = []
    monkeypatch.setattr(loop, "run_epoch", train)
    pretrain(epochs=1)
    assert entered == [True]


# ------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_the_engine_computes_the_loss_of_normalized_images_and_the_samples_masks(loop_calls, mask_ratio):
    model = mae_vit_mini_patch4(img_size=16)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels, noise = torch.arange(4), torch.rand(4, 16)
    normalize = transforms.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    batches, optimizer = object(), object()
    engine_pretrain.train_one_epoch(model, batches, optimizer, None, mask_ratio=mask_ratio, normalize=normalize)
    (call,) = loop_calls
    compute_loss = call.pop("compute_loss")
    assert call == {"model": model, "loader": batches, "optimizer": optimizer}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    expected, _, mask = model((images / 255 - mean) / std, mask_ratio, noise=noise)
    assert mask.sum() == 4 * 16 * mask_ratio
    torch.testing.assert_close(compute_loss([images, labels, noise]), expected)


def test_the_loop_trains_with_the_gradient_of_that_loss(pretrain, monkeypatch):
    """An update of a run equals the update computed from its formulas: sampling, normalization, mask, AdamW."""
    batches = []
    run_epoch = loop.run_epoch

    def record(compute_loss, model, data, optimizer, options):
        data.seek(0)
        batches.extend(data)
        before.extend(parameter.detach().clone() for parameter in model.parameters())
        run_epoch(compute_loss, model, data, optimizer, options)
        after.extend(model.parameters())

    before, after = [], []
    monkeypatch.setattr(loop, "run_epoch", record)
    pretrain(epochs=1, batch_size=24, warmup_epochs=0, lr=0.01, norm_pix_loss=True)
    ((images, _, noise),) = batches
    reference = mae_vit_mini_patch4(img_size=16, norm_pix_loss=True)
    for parameter, value in zip(reference.parameters(), before, strict=True):
        parameter.data.copy_(value)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    reference((images / 255 - mean) / std, 0.75, noise=noise)[0].backward()
    for (name, start), result in zip(reference.named_parameters(), after, strict=True):
        if start.grad is None:
            assert torch.equal(result, start)
            continue
        decay = 1 - 0.01 * 0.05 if start.ndim > 1 else 1.0
        # The first update of AdamW is the sign of the gradient, except for the eps of 1e-8.
        expected = start * decay - 0.01 * start.grad / (start.grad.abs() + 1e-8)
        large = start.grad.abs() > 1e-5
        torch.testing.assert_close(result[large], expected[large], rtol=1e-4, atol=1e-5, msg=name)
