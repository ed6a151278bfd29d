"""The training loop: accumulation, the schedule of the learning rate, and updates that are not finite."""

import contextlib
import math
from itertools import islice, pairwise

import pytest
import torch

from mae.checkpoints.run_state import Progress
from mae.data.sampler import EpochBatches
from mae.interrupts import Interrupted, Interrupts
from mae.training import loop
from mae.training.log import NullLog
from mae.training.meters import Meters
from mae.training.nonfinite import MAX_SKIPS_IN_A_ROW, NonFiniteGuard, NonFiniteLoss
from mae.training.precision import Precision
from mae.training.saver import NullSaver, Request
from mae.training.transaction import Loader


class Numbers(EpochBatches, Loader):
    """Batches of 28 samples of 3 numbers."""

    def __init__(self, batch_size, accum_iter=1):
        super().__init__(28, batch_size, seed=0, accum_iter=accum_iter)
        self.values = torch.randn(28, 3)

    def __iter__(self):
        for batch in super().__iter__():
            yield [torch.stack([self.values[index] for _, index in batch])]

    def seed_iteration(self, iteration):
        pass

    def counts(self):
        return {}


class Recorder(NullSaver):
    def __init__(self, *requests):
        super().__init__(Interrupts())
        self.saved, self.emergencies, self.requests = [], [], iter(requests)

    def request(self):
        return next(self.requests, Request.NONE)

    def save(self, epoch, iterations, meters, only_this_rank=False):
        self.saved.append((iterations, meters["updates"], only_this_rank))

    def save_emergency(self, epoch, iterations, meters):
        self.emergencies.append((epoch, iterations))
        return "checkpoint-emergency.pth"

    def stop(self):
        raise Interrupted(15)


def train_epoch(loss, model, batches, optimizer, epoch=0, **options):
    """Trains for an epoch, and returns its meters."""
    trainer = loop.Trainer(**{
        "loss": loss, "model": model, "model_without_ddp": model, "optimizer": optimizer, "batches": batches,
        "precision": Precision("off", torch.device("cpu")), "schedule": lambda epoch: 0.1,
        "progress": Progress(1, 1, epoch), "log": NullLog(), "saver": NullSaver(Interrupts()),
        "guard": NonFiniteGuard("abort"), "epochs": epoch + 1,
    } | options)  # fmt: skip
    trainer.fit(lambda epoch, log: {})
    return trainer.transaction.meters


def train(batch_size=4, accum_iter=1, lr=0.1, spoil=lambda step, loss: loss, policy="abort", saver=None, guard=None,
          log=None, **options):  # fmt: skip
    torch.manual_seed(0)
    batches = Numbers(batch_size, accum_iter)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    inputs, moments = [], []

    def compute_loss(model, batch):
        (batch,) = batch
        inputs.append(batch)
        return spoil(len(inputs), model(batch).square().mean())

    def schedule(epoch):
        moments.append(epoch)
        return lr

    meters = train_epoch(
        compute_loss, model, batches, optimizer, epoch=3, schedule=schedule, accum_iter=accum_iter,
        guard=guard or NonFiniteGuard(policy), log=log or NullLog(), saver=saver or NullSaver(Interrupts()), **options
    )  # fmt: skip
    return model, inputs, moments, meters


def reference_run(groups, batches, lr=0.1):
    torch.manual_seed(0)
    Numbers(4)
    model = torch.nn.Linear(3, 1)
    losses = []
    for group in groups:
        model.zero_grad()
        loss = model(torch.cat([batches[i] for i in group])).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return model, losses


def test_an_epoch_is_a_whole_number_of_updates():
    model, batches, moments, meters = train(accum_iter=3)
    assert len(batches) == 6  # 28 samples are two effective batches of 12
    twin, losses = reference_run([(0, 1, 2), (3, 4, 5)], batches)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert moments == [3, 3.5]
    stats = meters.means()
    assert stats["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert stats["train_lr"] == pytest.approx(0.1)


def test_gradients_are_averaged_in_the_last_iteration_of_an_update(monkeypatch):
    synced, sync = [], loop.parallel.gradient_sync
    monkeypatch.setattr(loop.parallel, "gradient_sync", lambda m, enabled: synced.append(enabled) or sync(m, enabled))
    train(accum_iter=3)
    assert synced == [False, False, True] * 2


class Log(NullLog):
    def __init__(self):
        self.lines = []

    def begin_epoch(self, epoch, first_iteration, num_iterations, images_per_iteration, watch):
        self.lines.append((epoch, first_iteration, num_iterations, images_per_iteration))

    def update(self, iterations, lr, loss, grad_norm, terms=None):
        self.lines.append((iterations, lr, loss, grad_norm))


def test_every_update_is_logged_once_with_its_own_numbers():
    """The loss of an update is the mean over its iterations; its index counts iterations."""
    log, constants = Log(), iter([1.0, 3.0, 5.0, 7.0])
    _, _, _, meters = train(batch_size=7, accum_iter=2, log=log, spoil=lambda step, loss: 0 * loss + next(constants))
    assert log.lines == [(3, 0, 4, 7), (2, 0.1, 2.0, 0.0), (4, 0.1, 6.0, 0.0)]
    assert (meters.loss, meters.updates) == (8.0, 2)


@pytest.mark.parametrize("updates", [1, 3, 7])
def test_a_stop_request_is_saved_and_applied_after_the_update(updates):
    saver = Recorder(*[Request.NONE] * (updates - 1), Request.STOP)
    with pytest.raises(Interrupted):
        train(saver=saver)
    assert saver.saved == [(updates, updates, False)]


def test_an_error_after_a_signal_is_an_interruption():
    class Stopping(Recorder):
        def raise_if_stopping(self, error):
            raise Interrupted(15) from error

    def fails(step, loss):
        raise RuntimeError("DataLoader worker is killed")

    with pytest.raises(Interrupted):
        train(saver=Stopping(), spoil=fails)


def test_the_strongest_request_applies_to_all_processes(monkeypatch):
    """One of two processes requests a save, the other nothing."""
    saver = Recorder()
    monkeypatch.setattr(loop.parallel, "world_size", lambda: 2)
    monkeypatch.setattr(loop.parallel, "mean_over_processes", lambda value: (value + torch.tensor([0, 0, 1, 0])) / 2)
    train(saver=saver)
    # Three iterations of 8 images; they are read UPDATES_IN_FLIGHT later, here at the end of the epoch.
    assert saver.saved == [(3, 3, False)]


def test_a_loss_of_another_form_is_an_error():
    for change, kind in ((lambda loss: (loss, {}), "tuple"), (lambda loss: loss.expand(4), r"tensor of shape \(4,\)")):
        with pytest.raises(TypeError, match=kind):
            train(spoil=lambda step, loss, change=change: change(loss))


def test_skip_leaves_the_weights_unchanged():
    saver = Recorder()
    model, batches, _, meters = train(
        spoil=lambda step, loss: loss * (math.nan if step == 3 else 1), policy="skip", saver=saver
    )
    twin, losses = reference_run([(0,), (1,), (3,), (4,), (5,), (6,)], batches)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert meters.skipped_steps == 1
    assert meters.means()["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert not saver.emergencies


@pytest.mark.parametrize("policy", ["skip", "abort"])
def test_an_update_that_is_skipped_does_not_change_the_statistics_of_batch_norm(policy):
    """A batch with an infinite value makes the running mean infinite."""
    batches, model = Numbers(4), torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    batches.values[5] = math.inf
    statistics = []

    def compute_loss(model, batch):
        statistics.append([buffer.clone() for buffer in model.buffers()])
        is_infinite.append(bool(batch[0].isinf().any()))
        return model(batch[0]).square().mean()

    is_infinite = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with pytest.raises(NonFiniteLoss) if policy == "abort" else contextlib.nullcontext():
        train_epoch(compute_loss, model, batches, optimizer, guard=NonFiniteGuard(policy), saver=Recorder())
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model[0].num_batches_tracked == len(is_infinite) - sum(is_infinite)
    first = is_infinite.index(True)
    if first + 1 < len(statistics):
        assert all(torch.equal(*pair) for pair in zip(statistics[first], statistics[first + 1], strict=True))


def test_an_infinite_loss_with_a_finite_gradient_is_caught():
    with pytest.raises(NonFiniteLoss):
        train(spoil=lambda step, loss: loss + (math.inf if step == 2 else 0))


def test_too_many_skipped_updates_are_an_error():
    guard = NonFiniteGuard("skip")  # one for the whole run: epochs here have 7 steps
    train(spoil=lambda step, loss: loss * math.nan, guard=guard)
    _, _, _, meters = train(spoil=lambda step, loss: loss * math.nan, guard=guard)
    assert meters.means() == {"train_lr": None, "train_loss": None, "skipped_steps": 7}
    with pytest.raises(NonFiniteLoss, match="20 in a row"):
        train(spoil=lambda step, loss: loss * math.nan, guard=guard)


def test_persistent_overflow_under_fp16_is_an_error():
    guard = NonFiniteGuard("abort", overflow_is_normal=True)
    assert all(guard.accepts(1.0, math.inf) for _ in range(MAX_SKIPS_IN_A_ROW - 1))
    assert guard.accepts(1.0, 2.0)
    assert all(guard.accepts(1.0, math.inf) for _ in range(MAX_SKIPS_IN_A_ROW - 1))
    assert not guard.accepts(1.0, math.inf)
    assert not NonFiniteGuard("abort", overflow_is_normal=True).accepts(math.nan, 1.0)
    assert not NonFiniteGuard("abort").accepts(1.0, math.inf)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.AdamW])  # without fused=True
def test_an_optimizer_without_found_inf_skips_updates_that_are_not_finite(kind):
    model, weights = torch.nn.Linear(3, 1, bias=False), []

    def compute_loss(model, batch):
        weights.append(model.weight.detach().clone())
        return model(batch[0]).square().mean() * (math.inf if len(weights) in (3, 4) else 1)

    optimizer = kind(model.parameters(), lr=0.1)
    train_epoch(compute_loss, model, Numbers(4), optimizer, guard=NonFiniteGuard("skip"))
    changes = [not torch.equal(before, after) for before, after in pairwise(weights)]
    assert changes == [True, True, False, False, True, True]


def test_terms_of_the_loss_are_logged_and_their_sum_is_trained():
    lines = []

    class Terms(NullLog):
        def update(self, iterations, lr, loss, grad_norm, terms=None):
            lines.append((loss, terms))

    def split(step, loss):
        return {"pixels": 0.75 * loss, "smoothness": 0.25 * loss}

    whole, _, _, plain = train(accum_iter=3)
    model, _, _, meters = train(accum_iter=3, spoil=split, log=Terms())
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    means = meters.means()
    assert means["train_pixels"] == pytest.approx(0.75 * plain.means()["train_loss"])
    assert means["train_pixels"] + means["train_smoothness"] == pytest.approx(means["train_loss"])
    assert Meters(**meters.state_dict()) == meters
    for loss, terms in lines:
        assert terms == pytest.approx({"pixels": 0.75 * loss, "smoothness": 0.25 * loss})
    # A term that an iteration lacks is 0 there: the sum of the means is the mean loss.
    lacking = train(accum_iter=3, spoil=lambda step, loss: {"even" if step % 2 else "odd": loss})[3].means()
    assert lacking["train_even"] + lacking["train_odd"] == pytest.approx(lacking["train_loss"])
    with pytest.raises(ValueError, match="lr"):
        train(spoil=lambda step, loss: {"lr": loss})


def test_an_error_leaves_the_state_after_the_last_update():
    """The statistics of batch norm change in every forward pass, the weights only in complete updates."""

    class Broken(Numbers):
        def __iter__(self):
            yield from islice(super().__iter__(), 2)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def fails_at(call, batches=Numbers):
        torch.manual_seed(0)
        norm, saver = torch.nn.BatchNorm1d(3), Recorder()
        model = torch.nn.Sequential(norm, torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        calls = iter(range(100))

        def compute_loss(model, batch):
            if next(calls) == call:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
            return model(batch[0]).square().mean()

        with pytest.raises(RuntimeError, match="is killed"):
            train_epoch(compute_loss, model, batches(4, 2), optimizer, accum_iter=2, saver=saver)
        return saver.saved, norm.running_mean.clone()

    (whole, statistics), (within, same), (between, also_same) = fails_at(2), fails_at(3), fails_at(99, Broken)
    assert whole == within == between == [(2, 1, True)]
    assert torch.equal(statistics, same) and torch.equal(statistics, also_same)


def test_a_lost_process_is_detected_before_the_update(monkeypatch):
    saver, before = Recorder(), []

    def gone(value):
        before.append([p.clone() for p in model.parameters()])
        raise RuntimeError("Connection closed by peer")

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    monkeypatch.setattr(loop.parallel, "mean_over_processes", gone)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train_epoch(
            lambda model, batch: model(batch[0]).square().mean(), model, Numbers(4),
            torch.optim.SGD(model.parameters(), lr=0.1, fused=True), epoch=1, saver=saver,
        )  # fmt: skip
    assert saver.saved == [(0, 0, True)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0], strict=True))


def test_a_state_within_the_optimizer_step_is_not_saved(monkeypatch):
    saver = Recorder()
    monkeypatch.setattr(Precision, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(saver=saver)
    assert saver.saved == []
