"""A training loop of your own over the parts of main_pretrain.py.

    python examples/own_loop.py --config recipes/pretrain_fashion_mnist.yaml --output_dir runs/own_loop

It trains to the same weights as main_pretrain.py, to the bit. A run that is interrupted saves its state, and the same
command with --resume auto continues it. Change what is between `begin` and `commit`: a second forward pass, another
order of backward passes, several steps. It has one iteration an update, no pictures and no online probe.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

import mae.build
import main_pretrain
from engine_pretrain import loss
from mae import masking, parallel
from mae.cli import entry_point
from mae.data import loader
from mae.data.fingerprint import fingerprint
from mae.session import INITIAL_WEIGHTS, open_session
from mae.settings import Run
from mae.training import optimizers, trainer
from mae.training.callbacks import Callback, entries_after_epoch
from mae.training.loop import terms_of
from mae.training.unlabelled import open_images, open_samples, with_required_terms
from models_mae import MaskedAutoencoderViT


def main(args: Namespace | Run, callbacks: Sequence[Callback] = ()) -> None:
    """Trains for `--epochs` epochs.

    Raises:
        ValueError: a setting has no effect in this loop.
    """
    session = open_session(
        main_pretrain.get_args_parser(), args, "main_pretrain", uses=INITIAL_WEIGHTS, model_class=MaskedAutoencoderViT,
        encoder=None, optimizer=None, lr_schedule=None,
    )  # fmt: skip
    run = session.run
    if run.optim.accum_iter != 1 or run.evaluation.probe_every:
        raise ValueError("this loop has no `accum_iter` and no `probe_every`: omit them")
    precision = session.precision
    data = session.open_data()
    train = open_images(data, run.evaluation)
    model, facts = main_pretrain.open_model(session)
    draw_noise, mask_ratio = mae.build.mask_sampler(run.model, model)
    num_visible = masking.num_visible(model.num_patches, mask_ratio)
    samples, _ = open_samples(data, train, run.augmentation, draw_noise, model, num_visible)
    batches = loader.TrainLoader(
        samples, run.optim.batch_size, run.data.seed, run.data.num_workers, data.pin_memory, run.data.repeated_sampling,
        updates=run.optim.updates_per_epoch,
    )  # fmt: skip
    groups = optimizers.param_groups_weight_decay(model, run.optim.weight_decay)
    optimizer = optimizers.build(run.optim.optimizer, session.code.optimizer, model, groups, betas=main_pretrain.BETAS)

    with trainer.opened(
        with_required_terms(partial(loss, mask_ratio=mask_ratio, normalize=data.normalize), run.model), model,
        optimizer, batches, precision, session.record(facts), run.optim, run.machine,
        fingerprint(train, with_labels=False), callbacks=callbacks, lr_schedule=session.code.lr_schedule,
    ) as training:  # fmt: skip
        for epoch in range(training.progress.epoch, training.epochs):
            training.model.train()
            with training.transaction as transaction:  # an update changes the state as a whole, or not at all
                for batch in transaction.batches():
                    lr = training.schedule(transaction.epoch)
                    transaction.begin()
                    transaction.seed()
                    with precision.autocast():
                        value = training.loss(training.model, batch)
                    terms = terms_of(value)
                    precision.backward(terms["loss"])
                    transaction.add(terms)
                    transaction.prepare()
                    grad_norm = precision.step(optimizer, training.clip_grad)
                    transaction.commit(grad_norm, lr)
            training.progress.next_epoch()
            parallel.share_buffers(model)  # the statistics of batch norm differ between processes
            entries = transaction.meters.means() | batches.counts()
            further = entries_after_epoch(callbacks, model, epoch, training.log, entries)
            training.log.end_epoch(entries | further)
            training.saver.save_epoch(epoch)


if __name__ == "__main__":
    entry_point.run_script(main, main_pretrain.get_args_parser())
