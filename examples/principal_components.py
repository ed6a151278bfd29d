"""Principal components are masked instead of patches (PMAE, Bizeul et al. 2025, section 3).

    python examples/principal_components.py --data_path demo/data/fashion_mnist --out runs/components.pt
    python main_pretrain.py --model_class examples.principal_components:PrincipalComponents \\
        --model_args components=runs/components.pt --crop none --vis_every 0 ...

The first command computes the principal components of the training images, which have one size, with bytes as values.
The encoder sees all patches of an image without some of its components, and the decoder predicts their coefficients.
The masks of the patches, and with them --mask_ratio, have no effect on the training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.cli import entry_point
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.data.transforms import scaled_transform
from mae.settings import DataSpec
from models_mae import MaskedAutoencoderViT


class PrincipalComponents(MaskedAutoencoderViT):
    """A masked autoencoder of principal components.

    Args:
        components: the file of this module's command.
        masked: the share of the variance in the masked components, which are random in each batch.

    Raises:
        ValueError: the components are of images of another size; in training, images have invalid pixels.
    """

    decoder_vectors: Tensor
    decoder_variance: Tensor
    decoder_mean: Tensor
    decoder_std: Tensor

    def __init__(self, *, components: str, masked: float = 0.2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.masked = masked
        found = torch.load(components, weights_only=True)
        if len(found["mean"]) != self.num_patches * self.values_per_patch:
            raise ValueError(f"--model_args components={components}: it is of images of another size")
        for name, value in found.items():
            self.register_buffer(f"decoder_{name}", value, persistent=False)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, **context: Any) -> Any:
        if not self.training:
            return super().forward(imgs, mask_ratio, **context)
        if context.get("valid") is not None:
            raise ValueError("principal components need images without invalid pixels")
        vectors, offset, scale = self.decoder_vectors, self.decoder_mean, self.decoder_std
        coefficients = (imgs.flatten(1) - offset) / scale @ vectors
        is_masked = self.draw().to(imgs.dtype)
        visible = (coefficients * (1 - is_masked)) @ vectors.T * scale + offset
        latent, mask, ids_restore = self.forward_encoder(visible.view_as(imgs), 0.0)
        pred = self.forward_decoder(latent, ids_restore)
        found = (self.unpatchify(pred).flatten(1) - offset) / scale @ vectors
        loss = ((found - coefficients).square() * is_masked).sum() / (is_masked.sum() * len(imgs))
        return loss, pred, mask

    def draw(self) -> Tensor:
        """Returns which components are masked (D,): random ones until their variance is nearest the share `masked`."""
        variance = self.decoder_variance
        order = torch.randperm(len(variance), device=variance.device)
        sums = variance[order].cumsum(0) / variance.sum()
        count = (sums - self.masked).abs().argmin() + 1
        return torch.zeros_like(variance).scatter(
            0, order, (torch.arange(len(order), device=order.device) < count) * 1.0
        )


def components_of(images: Tensor) -> dict[str, Tensor]:
    """Images (n, c, H, W), normalized for the model -> mean and std (D,), vectors (D, D), variance (D,)."""
    pixels = images.flatten(1).double()
    mean, std = pixels.mean(dim=0), pixels.std(dim=0).clamp(min=1e-2)  # some pixels are constant
    variance, vectors = torch.linalg.eigh(((pixels - mean) / std).T.cov())
    found = {"mean": mean, "std": std, "vectors": vectors, "variance": variance.clamp(min=0)}
    return {name: value.float() for name, value in found.items()}


def main(args: argparse.Namespace) -> None:
    """Writes the components of the training images."""
    samples = Samples(
        open_source(DataSpec(data_path=args.data_path), "train"), scaled_transform(0), in_chans=len(args.mean), seed=0
    )
    images = torch.stack([samples[0, number].item.image for number in range(len(samples))]) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (args.mean, args.std))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(components_of((images - mean) / std), args.out)
    print(f"{images[0].numel()} components of {len(images):,} images: {args.out}")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Computes the principal components of training images of one size.")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the components (.pt)")
    parser.add_argument("--mean", nargs="+", type=float, default=[0.286], help="as for main_pretrain.py")
    parser.add_argument("--std", nargs="+", type=float, default=[0.353], help="as for main_pretrain.py")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
