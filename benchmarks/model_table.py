"""Parameters and MACs of the models: the table in docs/zoo.md.

    python benchmarks/model_table.py

MACs are counted for one image with the rules of fvcore: one for each multiply-add of a matrix product or a convolution,
and five for each value of a layer norm. "All tokens" is the encoder without a head on all patches: the cost of a
classifier, which other libraries also print for masked autoencoders. "Masked" is the forward pass in pre-training: the
encoder on a quarter of the patches, the decoder on all.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

import mae.build
import models_mae
import models_vit
from mae import user_code
from mae.evaluate.tables import markdown
from mae.settings import Run
from mae.training.costs import count_flops

ROWS = (*((size, entry.get("img_size", 224)) for size, entry in models_vit.SIZES.items()), ("huge_patch14", 448))


def training_flops(size: str) -> int:
    """FLOPs of a pre-training iteration per image: two for each multiply-add of a matrix product or a convolution."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}")().to("meta")  # its tables are computed on the CPU
        image = torch.empty(1, 3, *model.patch_embed.img_size)
        noise = torch.empty(1, model.num_patches)
        return count_flops(lambda: model(image, noise=noise)[0].backward())


def classifier_flops(size: str) -> int:
    """FLOPs of the forward pass of a classifier without its head per image, counted as in `training_flops`."""
    with torch.device("meta"), torch.no_grad():
        model = getattr(models_vit, f"vit_{size}")(global_pool=True)
        image = torch.empty(1, 3, *model.patch_embed.img_size)
        return count_flops(lambda: model.forward_features(image))


def count_macs(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Counts the MACs of a call of a model, on any device, from the shapes alone."""
    normalized: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, __, output: normalized.append(output.numel()))
    with torch.no_grad():
        return count_flops(call) // 2 + 5 * sum(normalized)


def pretraining_macs(run: Run) -> int:
    """Counts the MACs of a forward pass in training by main_pretrain.py, for one image of a pair."""
    encoder = user_code.named_object("encoder", run.model.encoder)
    model_class = mae.build.model_class_of(run.model.model_class)
    model = mae.build.autoencoder(run.model, run.images, model_class, encoder)
    images = torch.zeros(2, run.images.in_chans, *model.patch_embed.img_size)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused attention of CPUs
        return count_macs(model, lambda: model(images, run.model.mask_ratio)) // len(images)


def measure(size: str, pixels: int) -> dict[str, int]:
    """Counts parameters and MACs on the meta device: no weights are allocated."""
    with torch.device("meta"):
        image = torch.empty(1, 3, pixels, pixels)
        vit = getattr(models_vit, f"vit_{size}")(img_size=pixels, global_pool=True)
        mae = getattr(models_mae, f"mae_vit_{size}")(img_size=pixels).to("meta")  # its tables are computed on the CPU
        noise = torch.empty(1, mae.num_patches)
    return {
        "classifier": sum(p.numel() for p in vit.parameters()),
        "autoencoder": sum(p.numel() for p in mae.parameters()),
        "all_tokens": count_macs(vit, lambda: vit.forward_features(image)),
        "masked": count_macs(mae, lambda: mae(image, noise=noise)),
    }


def table() -> str:
    """The table in Markdown."""
    titles = ["model", "pixels", "encoder: width, depth, heads", "decoder: width, depth, heads", "classifier",
              "autoencoder", "MACs, all tokens", "MACs, masked pre-training"]  # fmt: skip
    rows = []
    for size, pixels in ROWS:
        encoder = models_vit.SIZES[size]
        decoder = models_mae.DECODERS[size]
        found = measure(size, pixels)
        rows.append([
            f"`mae_vit_{size}`, `vit_{size}`", str(pixels),
            f"{encoder['embed_dim']}, {encoder['depth']}, {encoder['num_heads']}",
            f"{decoder['decoder_embed_dim']}, {decoder['decoder_depth']}, {decoder['decoder_num_heads']}",
            f"{found['classifier'] / 1e6:.2f} M", f"{found['autoencoder'] / 1e6:.2f} M",
            f"{found['all_tokens'] / 1e9:.2f} G", f"{found['masked'] / 1e9:.2f} G",
        ])  # fmt: skip
    return markdown(titles, rows)


if __name__ == "__main__":
    print(table())
