"""The training loop: accumulation, the learning rate's moments, and steps that are not finite."""

import math

import pytest
import torch

from util import loop
from util.interrupts import Interrupts
from util.loader import EpochBatches
from util.precision import Precision
from util.runlog import Meters, NullLog
from util.saver import NullSaver


class Numbers(EpochBatches):
    """Batches of 28 samples of 3 numbers."""

    def __init__(self, batch_size, accum_iter=1):
        super().__init__(28, batch_size, seed=0, accum_iter=accum_iter)
        self.values = torch.randn(28, 3)

    def seed_step(self, step):
        pass

    def __iter__(self):
        for batch in super().__iter__():
            yield [torch.stack([self.values[index] for _, index in batch])]


class RecordingSaver(NullSaver):
    def __init__(self):
        super().__init__(Interrupts())
        self.emergencies = []

    def save_emergency(self, epoch, steps_done, meters):
        self.emergencies.append((epoch, steps_done))
        return "checkpoint-emergency.pth"


def train(batch_size=4, accum_iter=1, lr=0.1, spoil=lambda step, loss: loss, policy="abort", saver=None, guard=None,
          **options):  # fmt: skip
    torch.manual_seed(0)
    batches = Numbers(batch_size, accum_iter)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    seen, moments = [], []

    def compute_loss(batch):
        (batch,) = batch
        seen.append(batch)
        return spoil(len(seen), model(batch).square().mean())

    def schedule(epoch):
        moments.append(epoch)
        return lr

    meters = Meters()
    loop.run_epoch(
        compute_loss, model, batches, optimizer,
        epoch=3, schedule=schedule, precision=Precision("off", torch.device("cpu")), accum_iter=accum_iter,
        guard=guard or loop.NonFiniteGuard(policy),
        meters=meters, log=NullLog(), saver=saver or NullSaver(Interrupts()), **options,
    )  # fmt: skip
    return model, seen, moments, meters


def reference_run(groups, seen, lr=0.1):
    """The same training, each group in one batch."""
    torch.manual_seed(0)
    Numbers(4)
    model = torch.nn.Linear(3, 1)
    losses = []
    for group in groups:
        model.zero_grad()
        loss = model(torch.cat([seen[i] for i in group])).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return model, losses


def test_an_epoch_is_a_whole_number_of_updates():
    model, seen, moments, meters = train(accum_iter=3)
    assert len(seen) == 6  # 28 samples are two effective batches of 12
    twin, losses = reference_run([(0, 1, 2), (3, 4, 5)], seen)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert moments == [3, 3.5]
    stats = meters.means()
    assert stats["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert stats["train_lr"] == pytest.approx(0.1)


def test_starts_in_the_middle():
    _, seen, moments, _ = train()
    _, rest, later, _ = train(first_step=5)
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, seen[5:], strict=True))
    assert later == moments[5:]


@pytest.mark.parametrize("first_step", [0, 3])
def test_every_iteration_is_seeded_by_its_place_before_its_loss(monkeypatch, first_step):
    """What mixup and drop path draw belongs to (epoch, iteration), also in the rest of an epoch."""
    events = []
    monkeypatch.setattr(Numbers, "seed_step", lambda self, step: events.append((self.epoch, step)))
    train(accum_iter=3, first_step=first_step, spoil=lambda step, loss: events.append("loss") or loss)
    assert events == [event for step in range(first_step, 6) for event in ((3, step), "loss")]


def test_clip_grad_bounds_the_step():
    model, _, _, _ = train(batch_size=28, clip_grad=1e-3, lr=1.0)
    torch.manual_seed(0)
    Numbers(4)
    start = torch.nn.Linear(3, 1)
    step = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-3)


def nan_at(*steps):
    return lambda step, loss: loss * (math.nan if step in steps else 1.0)


def test_skip_leaves_the_weights_as_without_the_step():
    saver = RecordingSaver()
    model, seen, _, meters = train(spoil=nan_at(3), policy="skip", saver=saver)
    twin, losses = reference_run([(0,), (1,), (3,), (4,), (5,), (6,)], seen)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert meters.skipped_steps == 1
    assert meters.means()["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert not saver.emergencies


def test_abort_saves_and_says_what_to_try():
    saver = RecordingSaver()
    with pytest.raises(loop.NonFiniteLoss, match=r"epoch 3, batch 1.*--clip_grad"):
        train(spoil=nan_at(2), saver=saver)
    assert saver.emergencies == [(3, 2 + loop.STEPS_LATE)]


def test_an_infinite_loss_with_a_finite_gradient_is_caught():
    with pytest.raises(loop.NonFiniteLoss):
        train(spoil=lambda step, loss: loss + (math.inf if step == 2 else 0))


def test_skipping_has_an_end():
    guard = loop.NonFiniteGuard("skip")  # one for the whole run: epochs here have 7 steps
    train(spoil=lambda step, loss: loss * math.nan, guard=guard)
    _, _, _, meters = train(spoil=lambda step, loss: loss * math.nan, guard=guard)
    assert meters.means() == {"train_lr": None, "train_loss": None, "skipped_steps": 7}
    with pytest.raises(loop.NonFiniteLoss, match="20 such in a row"):
        train(spoil=lambda step, loss: loss * math.nan, guard=guard)


def test_overflow_is_normal_under_fp16_until_it_does_not_end():
    guard = loop.NonFiniteGuard("abort", overflow_is_normal=True)
    assert all(guard.accepts(1.0, math.inf) for _ in range(loop.MAX_SKIPS_IN_A_ROW - 1))
    assert guard.accepts(1.0, 2.0)
    assert all(guard.accepts(1.0, math.inf) for _ in range(loop.MAX_SKIPS_IN_A_ROW - 1))
    assert not guard.accepts(1.0, math.inf)
    assert not loop.NonFiniteGuard("abort", overflow_is_normal=True).accepts(math.nan, 1.0)
    assert not loop.NonFiniteGuard("abort").accepts(1.0, math.inf)


def test_an_optimizer_that_would_ignore_the_guard_is_refused():
    precision = Precision("off", torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match="found_inf"):
        precision.step(torch.optim.SGD([weight], lr=1.0), None)


def test_a_state_saved_in_between_counts_the_steps_on_their_way():
    class Saves(NullSaver):
        def __init__(self):
            super().__init__(Interrupts())
            self.saved = []

        def wish(self):
            return loop.Wish.SAVE

        def save(self, epoch, steps_done, meters, alone=False):
            self.saved.append((steps_done, meters["updates"]))

    saver = Saves()
    train(saver=saver)
    assert saver.saved == [(n, n) for n in range(1, 8)]


class Recorder(NullSaver):
    """Notes what is saved on an error."""

    def __init__(self):
        super().__init__(Interrupts())
        self.saved = []

    def save(self, epoch, steps_done, meters, alone=False):
        self.saved.append((steps_done, meters["updates"], alone))


def test_an_error_within_an_update_leaves_the_state_before_it():
    """Batch norm's statistics change in every forward pass, the weights only in whole updates."""

    def fails_at(call):
        norm, saver = torch.nn.BatchNorm1d(3), Recorder()
        model = torch.nn.Sequential(norm, torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        calls = iter(range(100))

        def compute_loss(batch):
            if next(calls) == call:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
            return model(batch[0]).square().mean()

        with pytest.raises(RuntimeError, match="is killed"):
            loop.run_epoch(
                compute_loss, model, Numbers(4, 2), optimizer, epoch=0, schedule=lambda epoch: 0.1, accum_iter=2,
                precision=Precision("off", torch.device("cpu")), guard=loop.NonFiniteGuard("abort"), meters=Meters(),
                log=NullLog(), saver=saver,
            )  # fmt: skip
        return saver.saved, norm.running_mean.clone()

    torch.manual_seed(0)
    whole, statistics = fails_at(2)
    torch.manual_seed(0)
    within, same = fails_at(3)
    assert whole == within == [(2, 1, True)]
    assert torch.equal(statistics, same)


def test_a_process_that_is_gone_is_found_before_the_weights_change(monkeypatch):
    saver, before = Recorder(), []

    def gone(value):
        before.append([p.clone() for p in model.parameters()])
        raise RuntimeError("Connection closed by peer")

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    monkeypatch.setattr(loop.dist, "mean_over_processes", gone)
    with pytest.raises(RuntimeError, match="closed by peer"):
        loop.run_epoch(
            lambda batch: model(batch[0]).square().mean(), model, Numbers(4),
            torch.optim.SGD(model.parameters(), lr=0.1, fused=True), epoch=1, schedule=lambda epoch: 0.1,
            precision=Precision("off", torch.device("cpu")), guard=loop.NonFiniteGuard("abort"), meters=Meters(),
            log=NullLog(), saver=saver,
        )  # fmt: skip
    assert saver.saved == [(0, 0, True)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0], strict=True))


def test_a_state_within_the_optimizer_step_is_not_saved(monkeypatch):
    saver = Recorder()
    monkeypatch.setattr(Precision, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(saver=saver)
    assert saver.saved == []
