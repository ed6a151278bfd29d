"""How evenly the features of images fill their directions, as a measure and as a loss."""

from torch import Tensor, nn

from mae.fp32 import in_fp32


@in_fp32
def uniformity(features: Tensor) -> Tensor:
    """Features of images (B, D) -> the mean squared cosine over all pairs, (): 1 if all are parallel, at least 1 / D.

    The pixel loss alone lets the features of all images fill few directions. A weight of this loss spreads them (U-MAE,
    Zhang et al. 2022, arXiv 2210.08344, equation 12).
    """
    normed = nn.functional.normalize(features, dim=1)
    # As many squares as the cosines, from the smaller product if there are more images than channels.
    return (normed.T @ normed).square().sum() / len(normed) ** 2
