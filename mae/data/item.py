"""One sample of a dataset, from the file to the model, and a batch of them. Both have the same slots."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

IGNORED = 255  # in masks: the value of pixels without a class
NO_INPUTS: Mapping[str, Tensor] = {}  # read only; a MappingProxyType can't be sent to another process


class Item(NamedTuple):
    """A sample of a dataset.

    A source returns the image as it is stored: the bytes of a file, a Pillow image, an array, or a tensor. `decode`
    turns it into a picture: a Pillow image of 8 bits, or a tensor (c, H, W). A transform turns that into a tensor.

    Slots that are `torchvision.tv_tensors` follow the crops and flips of the image: a mask as the label, and maps
    (1, H, W) among the inputs.
    """

    image: Any
    label: Any = -1  # number of a class, -1 for none; a vector (C,); or the classes of the pixels (H, W)
    valid: Tensor | None = None  # the valid pixels, bool (H, W); None: all
    inputs: Mapping[str, Tensor] = NO_INPUTS  # further inputs of the model by name, such as place and date


class Batch(NamedTuple):
    """A batch of items. For heads on stored features, the images are features, and the noise is their indices."""

    images: Tensor  # (B, c, H, W), uint8 or float
    labels: Tensor  # (B,), masks (B, H, W), or vectors (B, C)
    valid: Tensor | None = None  # bool (B, H, W); None: all pixels are valid
    inputs: Mapping[str, Tensor] = NO_INPUTS  # (B, ...)
    noise: Tensor | None = None  # (B, N), which determines the masks of pre-training

    def normalized(self, normalize: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the normalized images. Invalid pixels are 0, the mean."""
        imgs = normalize(self.images)
        return imgs if self.valid is None else imgs.masked_fill(~self.valid[:, None], 0)

    @property
    def context(self) -> dict[str, Tensor]:
        """The arguments of the model's steps: the inputs, and the valid pixels if some are not."""
        return dict(self.inputs) if self.valid is None else {**self.inputs, "valid": self.valid}
