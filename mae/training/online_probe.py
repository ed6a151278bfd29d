"""The features of an encoder while it is pre-trained: k-NN accuracy and effective rank (--probe_every)."""

import logging
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mae import parallel
from mae.data import extras, labels
from mae.data.run_data import RunData
from mae.data.source import Source, Stream, is_stream
from mae.evaluate import knn
from mae.settings import DATASETS, DataSpec, Run
from mae.training import feature_files
from mae.training.compiling import padded
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

MAX_IMAGES = 25_600  # of each set, chosen at random: the number of images of Garrido et al. 2023
NEIGHBORS, TEMPERATURE = 20, 0.07
HELD_OUT = 0.1  # of the training images, without --probe_path


class OnlineProbe:
    """Evaluates an autoencoder during its training, and leaves the training as it is.

    The features are the class token after the last norm, as in main_knn.py. With `path`, the training images of that
    dataset classify its validation images. Without `path`, the training images of the run classify HELD_OUT of them;
    if they have no labels, there is no accuracy.

    Args:
        data: how the images of the run are read.
        source: the training images of the run.
        path: a dataset with class folders in train/ and val/.
        batch_size: images in a batch, per process.
        precision: precision of the features.

    Raises:
        ValueError: the dataset of `path` can't be opened, or there is no `path` and the images are streamed.
        BadImage: an image can't be read, and is not skipped.
    """

    def __init__(
        self, data: RunData, source: Source | Stream, path: str | None, batch_size: int, precision: Precision
    ) -> None:
        if path:
            settings = {**data.data.record(), **dict.fromkeys(DATASETS), "extras": None, "data_path": path}
            data = RunData(data.images, DataSpec.of(settings), precision.device)
            try:
                train, val, _ = data.open_pair()
            except ValueError as error:  # it names settings of a run
                raise ValueError(f"probe_path={path}: {error}") from error
        elif is_stream(source):
            raise ValueError("`probe_every`: the images of shards (wds:) are streamed; give probe_path=PATH")
        else:
            train, val = labels.hold_out(source, HELD_OUT, data.data.seed, "`probe_every`")
        self.train, self.val = (self._some(part, data) for part in (train, val))
        self.is_labelled = bool(train.classes) and min(train.labels.min(), val.labels.min()) >= 0
        self.num_classes = len(train.classes)
        if not self.is_labelled:
            logger.info("`probe_every`: the images have no labels, so there is an effective rank and no accuracy")
        self.encode = partial(_encode, data=data, batch_size=batch_size, precision=precision.of_evaluation())
        self.device = precision.device

    def _some(self, source: Source, data: RunData) -> Source:
        order = np.random.default_rng(data.data.seed).permutation(len(source))[:MAX_IMAGES]
        return data.readable(labels.Subset(source, np.sort(order)))

    def scores(self, model: Any) -> dict[str, float]:
        """Returns the entries of log.txt: test_knn_acc1 in percent if there are labels, and test_effective_rank.

        All processes call it. The model is in evaluation mode afterwards.
        """
        start = time.perf_counter()
        encode = partial(self.encode, model.eval())
        bank = feature_files.extract(encode, self.train)
        scores = {"test_effective_rank": effective_rank(torch.cat(parallel.gather(bank[0])))}
        if self.is_labelled:
            k = min(NEIGHBORS, len(self.train))
            (right,) = knn.classify(
                *bank, *feature_files.extract(encode, self.val), ks=[k], temperatures=[TEMPERATURE],
                num_classes=self.num_classes, device=self.device,
            ).values()  # fmt: skip
            scores = {"test_knn_acc1": 100 * sum(right) / len(self.val), **scores}
            logger.info(f"* {k}-NN Acc@1 {scores['test_knn_acc1']:.3f}")
        logger.info(
            f"* effective rank {scores['test_effective_rank']:.1f} of {bank[0].shape[1]} "
            f"(probe: {time.perf_counter() - start:.1f} s)"
        )
        return scores


def open_probe(
    run: Run, data: RunData, source: Source | Stream, model: nn.Module, precision: Precision
) -> OnlineProbe | None:
    """Opens the data of `probe_every`; returns None if it is 0.

    Raises:
        ValueError: the model is sharded, the data can't be opened, or they lack extra inputs of the model.
    """
    every, path = run.evaluation.probe_every, run.evaluation.probe_path
    if not every:
        if path:
            logger.warning("`probe_path` has no effect without `probe_every`")
        return None
    if run.machine.fsdp:
        raise ValueError(
            f"probe_every={every}: `fsdp` shards the weights; omit one of them, and evaluate checkpoints with "
            f"main_knn.py"
        )
    probe = OnlineProbe(data, source, path, run.optim.batch_size, precision)
    extras.require_fitting(model, probe.train, probe.val)
    return probe


def _encode(model: Any, source: Source, *, data: RunData, batch_size: int, precision: Precision) -> Any:
    def forward(images: torch.Tensor, **extras: torch.Tensor) -> torch.Tensor:
        return model.class_features(model.get_intermediate_layers(images, **extras)[0])

    batches = data.eval_batches(source, batch_size)
    return feature_files.encode(padded(forward, model), batches, normalize=data.normalize, precision=precision)


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the normalized singular values.

    Args:
        features: (n, D).
    """
    gram = features.double().T @ features.double()  # its eigenvalues are the squares of the singular values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
