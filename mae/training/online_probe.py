"""An autoencoder while it is trained (--probe_every): the loss of held-out images, and scores of the encoder."""

import logging
import time
import zlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mae import parallel
from mae.context import STEPS
from mae.data import equal_images, extra_inputs, labels, loader, raw_pixels
from mae.data.batches import prefetch
from mae.data.run_data import RunData
from mae.data.samples import Samples
from mae.data.source import Source, is_stream
from mae.evaluate import knn
from mae.pooling import Pooling, pooled, pooling_of
from mae.settings import DATASETS, DataSpec, ModelSpec
from mae.settings.choices import BOTH
from mae.training import explained, feature_files
from mae.training.compiling import padded
from mae.training.gate import KNN
from mae.training.precision import Precision
from mae.uniformity import uniformity

logger = logging.getLogger(__name__)

MAX_IMAGES = 25_600  # of each set, chosen at random: the number of images of Garrido et al. 2023
NEIGHBORS = 20
TEMPERATURE = 0.07
HELD_OUT = 0.1  # of the training images, without --probe_path


class OnlineProbe:
    """Evaluates an autoencoder during its training, and leaves the training as it is.

    With `path`, the images of its validation set are held out. Without `path`, HELD_OUT of the training images are; the
    model is trained on them, too. Their masks depend on the seed and on the number of the image only. Another image
    replaces one with too few valid patches.

    The features have the pooling of `pooling_of`, after the last norm, as in main_knn.py. The training images of
    `path`, or the other images of the run, classify those that are held out. If they have no labels, there is no
    accuracy.

    Args:
        data: how the images of the run are read.
        images: the whole training images of the run, and how they are masked.
        mask_ratio: fraction of masked patches.
        path: a dataset with class folders in train/ and val/.
        batch_size: images in a batch, per process.
        precision: precision of the run.
        pooling: of the features.

    Attributes:
        identity: of the held-out images and their labels, for comparisons.
        hits: whether the neighbors classify each held-out image correctly (n,), after `scores`.

    Raises:
        ValueError: the dataset of `path` can't be opened, or there is no `path` and the images are streamed.
        BadImage: an image can't be read, and is not skipped.
    """

    hits: torch.Tensor

    def __init__(
        self, data: RunData, images: Samples, mask_ratio: float, path: str | None, batch_size: int,
        precision: Precision, pooling: Pooling,
    ) -> None:  # fmt: skip
        if path:
            settings = {**data.data.record(), **dict.fromkeys(DATASETS), "extras": None, "data_path": path}
            data = RunData(data.images, DataSpec.of(settings), precision.device)
            try:
                train, val, _ = data.open_pair()
            except ValueError as error:  # it names settings of a run
                raise ValueError(f"probe_path={path}: {error}") from error
        elif is_stream(images.source):
            raise ValueError("`probe_every`: the images of shards (wds:) are streamed; give probe_path=PATH")
        else:
            train, val = labels.hold_out(images.source, HELD_OUT, data.data.seed, "`probe_every`")
            logger.info("`probe_every`: the model is trained on these images, too; `probe_path` names others")
        self.train, self.val = (self._some(part, data) for part in (train, val))
        self.is_labelled = bool(train.classes) and min(train.labels.min(), val.labels.min()) >= 0
        self.num_classes = len(train.classes)
        of_labels = zlib.crc32(np.ascontiguousarray(self.val.labels).tobytes())
        self.identity = f"{labels.identity(self.val, len(val))}, and {of_labels:08x} of the labels"
        self.k = min(NEIGHBORS, len(self.train))
        if not self.is_labelled:
            logger.info("`probe_every`: the images have no labels, so there is no accuracy")
        self.data = data
        self.batch_size = batch_size
        self.precision = precision.of_evaluation()
        self.masked = data.samples(self.val, images.transform, "skip", images.draw_noise)
        self.mask_ratio = mask_ratio
        self.baselines: dict[str, Any] | None = None  # computed once
        self.pooling = pooling
        logger.info(f"`probe_every`: features: {pooling}")

    def _some(self, source: Source, data: RunData) -> Source:
        order = np.random.default_rng(data.data.seed).permutation(len(source))[:MAX_IMAGES]
        return data.readable(labels.Subset(source, np.sort(order)))

    def scores(self, model: Any) -> dict[str, float]:
        """Returns the entries of log.txt.

        test_loss is the loss of the images that are held out, and test_explained the share of their variance. The
        others are of the features: test_knn_acc1 in percent if there are labels, with test_knn_pixels, that of raw
        pixels; test_effective_rank and test_uniformity, of their class tokens.

        All processes call it. The model is in evaluation mode afterwards.
        """
        start = time.perf_counter()
        encode = partial(self.encode, model.eval())
        bank = feature_files.extract(encode, self.train)
        features = torch.cat(parallel.gather(bank[0]))
        if self.pooling.name == BOTH:  # the measures are of the class token, which `uniformity` trains
            features = features[:, : features.shape[1] // 2]
        scores = {
            "test_loss": self.loss(model), "test_effective_rank": effective_rank(features),
            "test_uniformity": float(uniformity(features.double())),
        }  # fmt: skip
        if self.baselines is None:
            self.baselines = self.of_baselines(model)
        if constant := self.baselines["constant"]:
            scores["test_explained"] = 1 - scores["test_loss"] / constant
        if self.is_labelled:
            self.hits = self.hits_of(bank, feature_files.extract(encode, self.val))
            of_pixels = self.baselines["pixels"]
            scores = {KNN: 100 * int(self.hits.sum()) / len(self.val), "test_knn_pixels": of_pixels, **scores}
            images = knn.in_words(self.k, len(self.train), len(self.val))
            logger.info(f"* {self.k}-NN Acc@1 {scores[KNN]:.3f} (raw pixels {of_pixels:.3f}): {images}")
        share = f" ({scores['test_explained']:.1%} explained)" if "test_explained" in scores else ""
        logger.info(
            f"* loss of {len(self.val):,} held-out images {scores['test_loss']:.4f}{share}, effective rank "
            f"{scores['test_effective_rank']:.1f} of {features.shape[1]} (probe: {time.perf_counter() - start:.1f} s)"
        )
        return scores

    def hits_of(
        self, bank: tuple[torch.Tensor, torch.Tensor], queries: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Returns whether the neighbors classify each held-out image correctly (n,).

        Args:
            bank, queries: features (m, D) and labels (m,) of the images of this process.
        """
        ((hits,),) = knn.predict(
            *bank, *queries, lambda votes, truth: (votes.argmax(dim=1) == truth,), ks=[self.k],
            temperatures=[TEMPERATURE], num_classes=self.num_classes, device=self.precision.device,
        ).values()  # fmt: skip
        return torch.from_numpy(hits)

    def of_baselines(self, model: Any) -> dict[str, Any]:
        """Returns the loss of the best constant ("constant"), and the accuracy of raw pixels in percent ("pixels").

        They are None if they are not known.
        """
        with torch.compiler.set_stance("force_eager"), self.precision.autocast():  # no graph of two calls
            constant = explained.loss_of_mean(
                model, self.masked_batches(), self.mask_ratio, self.data.normalize, self.precision.device
            )
        of_pixels = None
        if self.is_labelled:
            workers = self.data.data.num_workers
            parts = []
            of_pictures = []
            for source in (self.train, self.val):
                pixels = raw_pixels.read(source, self.data.images, workers)
                mine = slice(parallel.rank(), None, parallel.world_size())
                parts.append((torch.from_numpy(pixels), torch.as_tensor(np.asarray(source.labels)[mine])))
                of_pictures.append(parallel.interleave(parallel.gather(equal_images.of_pictures(pixels))))
            if equal := equal_images.sentence(self.train, self.val, *of_pictures):
                logger.warning(f"`probe_every`: {equal}")
            of_pixels = 100 * float(self.hits_of(*parts).double().mean())
        return {"constant": constant, "pixels": of_pixels}

    def masked_batches(self) -> Any:
        """Returns the batches of the images that are held out, with the same masks at each call."""
        data = self.data
        return loader.eval_loader(self.masked, self.batch_size, data.data.num_workers, data.pin_memory)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Returns the mean loss of the images that are held out, with the same masks at each call."""
        data = self.data
        total = 0.0
        for batch in prefetch(self.masked_batches(), self.precision.device):
            with self.precision.autocast():
                found = model(batch.normalized(data.normalize), self.mask_ratio, noise=batch.noise, **batch.context)[0]
            terms = found.values() if isinstance(found, dict) else [found]
            total += len(batch.images) * float(sum(terms))
        return sum(parallel.gather(total)) / len(self.val)

    def encode(self, model: Any, source: Source) -> Any:
        """Yields the features of the images of a source, without masks, as `feature_files.encode`."""

        def forward(images: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            return pooled(model, model.get_intermediate_layers(images, **inputs)[0], self.pooling.name)

        batches = self.data.eval_batches(source, self.batch_size)
        return feature_files.encode(
            padded(forward, model), batches, normalize=self.data.normalize, precision=self.precision
        )


def open_probe(
    every: int, path: str | None, data: RunData, images: Samples, mask_ratio: float, batch_size: int,
    precision: Precision, spec: ModelSpec, model: nn.Module,
) -> OnlineProbe | None:  # fmt: skip
    """Opens the data of `probe_every`; returns None if it is 0.

    Args:
        every, path: the settings `probe_every` and `probe_path`.
        data, images, mask_ratio, batch_size, precision: as in `OnlineProbe`.

    Raises:
        ValueError: the model is sharded, the data can't be opened, or they lack extra inputs of the model.
    """
    if not every:
        if path:
            logger.warning("`probe_path` has no effect without `probe_every`")
        return None
    if parallel.is_sharded(model):
        raise ValueError(
            f"probe_every={every}: `fsdp` shards the weights; omit one of them, and evaluate checkpoints with "
            f"main_knn.py"
        )
    probe = OnlineProbe(data, images, mask_ratio, path, batch_size, precision, pooling_of(spec.record()))
    extra_inputs.require_fitting(model, probe.train, probe.val, STEPS)
    return probe


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the normalized singular values.

    Args:
        features: (n, D).
    """
    gram = features.double().T @ features.double()  # its eigenvalues are the squares of the singular values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
