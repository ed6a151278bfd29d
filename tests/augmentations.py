"""The transforms of the library as functions of a picture, which return its tensor (c, H, W)."""

from functools import partial

from mae.data import transforms
from mae.data.item import Item


def transformed(transform, picture):
    """Returns the tensor of a transformed picture."""
    return transform(Item(picture)).image


def _of_pictures(make):
    return lambda *args, **options: partial(transformed, make(*args, **options))


pretrain_transform, finetune_transform, probe_transform, eval_transform, scaled_transform = map(
    _of_pictures,
    (
        transforms.pretrain_transform, transforms.finetune_transform, transforms.probe_transform,
        transforms.eval_transform, transforms.scaled_transform,
    ),
)  # fmt: skip
