"""The order of operations between epochs: evaluation, log, checkpoint, signals, errors."""

import pytest
import torch

from util.checkpoints.run_state import Progress
from util.interrupts import Interrupted, Interrupts
from util.training import trainer

METERS = {"loss": 6.0, "lr": 0.6, "updates": 2, "skipped_steps": 0}  # of an epoch of which a part was trained before


class Events:
    """A saver, a log and a data loader that record calls."""

    def __init__(self):
        self.events = []

    def __len__(self):
        return 6

    def counts(self):
        return {"bad_images": 2}

    def end_epoch(self, stats):
        self.events.append(("log", stats))

    def save(self, epoch, iterations, meters, alone=False):
        self.events.append(("save", epoch, iterations, meters, alone))

    def save_epoch(self, epoch, accuracy=None):
        self.events.append(("save_epoch", epoch, accuracy))

    def flush(self):
        pass

    def raise_if_stopping(self, error):
        self.events.append(("raise_if_stopping", str(error)))

    def stop(self):
        raise Interrupted(15)


def train_epochs(events, after_epoch, num_epochs=1, eval_every=1, evaluates=False, interrupts=None):
    def train(options):
        events.events.append(("train", options.epoch, options.first_iteration))
        options.meters.add(4.0, 1.0, 0.5)

    progress = Progress(4, 4)
    progress.first_iteration, progress.meters = 4, {"loss": 2.0, "lr": 0.1, "updates": 1}
    options = trainer.EpochOptions(0, schedule=None, precision=None, guard=None, log=events, saver=events)
    trainer._train_epochs(
        train, options, after_epoch, torch.nn.Linear(1, 1), events, progress, interrupts or Interrupts(),
        epochs=num_epochs, eval_every=eval_every, evaluates=evaluates, metric="test_acc1",
    )  # fmt: skip


def test_the_order_of_training_saving_and_evaluation():
    """The state is saved first, because a signal may interrupt the evaluation, which selects the best checkpoint."""
    events = Events()

    def evaluate(epoch, log):
        events.events.append(("evaluate", epoch))
        return {"test_acc1": 71.0}

    train_epochs(events, evaluate, evaluates=True)
    assert events.events == [
        ("train", 0, 4),
        ("save", 0, 6, METERS, False),
        ("evaluate", 0),
        ("log", {"train_lr": 0.3, "train_loss": 3.0, "test_acc1": 71.0, "bad_images": 2}),
        ("save_epoch", 0, 71.0),
    ]


@pytest.mark.parametrize(("eval_every", "evaluated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (3, [2, 4]), (9, [4])])
def test_evaluation_every_few_epochs_and_after_the_last(eval_every, evaluated):
    events, calls = Events(), []
    train_epochs(events, lambda epoch, log: calls.append(epoch) or {}, 5, eval_every)
    assert calls == evaluated
    assert [event[1:] for event in events.events if event[0] == "train"] == [(0, 4), (1, 0), (2, 0), (3, 0), (4, 0)]
    assert not any(event[0] == "save" for event in events.events)  # nothing takes long


def test_an_error_after_training_saves_the_epoch_and_a_signal_stops_between_epochs():
    def fails(epoch, log):
        raise OSError("the disk is gone")

    events = Events()
    with pytest.raises(OSError, match="the disk is gone"):
        train_epochs(events, fails)
    assert events.events[1:] == [("save", 0, 6, METERS, True), ("raise_if_stopping", "the disk is gone")]

    interrupts = Interrupts()
    interrupts.pending = 15
    events = Events()
    with pytest.raises(Interrupted):
        train_epochs(events, lambda epoch, log: {}, 2, interrupts=interrupts)
    assert events.events[-2:] == [("save_epoch", 0, None), ("save", 1, 0, {}, False)]
    events = Events()
    train_epochs(events, lambda epoch, log: {}, 1, interrupts=interrupts)  # the run is complete
    assert events.events[-1] == ("save_epoch", 0, None)
