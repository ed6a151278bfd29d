"""A small convolutional masked autoencoder: half of a view is hidden, and its features match another, whole view.

The features are those of an image and its mirror image, on average, and their 128 principal components.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL = 7  # pixels per side of a masked cell
GRID = 4  # cells per side
VISIBLE = 8  # cells of the masked view
WIDTH = 256
POOLED = 64 + 128 + WIDTH  # means of the last three layers
FEATURES = 128
BATCH_SIZE = 128
LR = 3e-3
WARMUP = 0.05  # of the time
TEMPERATURE = 0.2
RECONSTRUCTION = 1.0  # weight of the masked pixels beside the contrast of the views
FINISH = 4.0  # seconds at the end for the statistics and the components
FINISH_IMAGES = 5000


def conv(inputs: int, outputs: int, side: int, stride: int) -> nn.Sequential:
    """A convolution with its normalization and activation."""
    weights = nn.Conv2d(inputs, outputs, side, stride, padding=side // 3, bias=False)
    return nn.Sequential(weights, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Images (B, 28, 28), uint8 -> features (B, 128): components of the means of three layers."""

    mean: Tensor
    components: Tensor

    def __init__(self) -> None:
        super().__init__()
        stem = (conv(1, 32, 4, 2), conv(32, 64, 3, 2))
        self.cells = nn.Sequential(*stem, conv(64, 64, 3, 1), conv(64, 128, 3, 2), conv(128, WIDTH, 1, 1))
        self.register_buffer("mean", torch.zeros(POOLED))
        self.register_buffer("components", torch.zeros(POOLED, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return (self.pooled(images) - self.mean) @ self.components

    def pooled(self, images: Tensor) -> Tensor:
        """Images (B, 28, 28), uint8 -> means of three layers (B, D), for it and its mirror image."""
        x = scaled(images)
        both = torch.cat([x, x.flip(3)])
        means = []
        for layer in self.cells:
            both = layer(both)
            means.append(both.float().mean(dim=(2, 3)))
        return torch.cat(means[-3:], dim=1).unflatten(0, (2, -1)).mean(dim=0)


class Autoencoder(nn.Module):
    """The encoder, a linear decoder of each cell, and a projection for the contrast of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.predict = nn.Linear(WIDTH, CELL**2)
        hidden = (nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True))
        self.project = nn.Sequential(*hidden, nn.Linear(WIDTH, 128))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 28, 28), uint8 -> the loss ()."""
        x = scaled(images)
        whole, target = moved(x), moved(x)
        visible = torch.rand(len(x), GRID**2).argsort(dim=1) < VISIBLE
        mask = visible.view(-1, 1, GRID, GRID).float().repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        cells = self.encoder.cells(torch.cat([whole, target * mask])).flatten(2).transpose(1, 2)
        patches = F.unfold(target, CELL, stride=CELL).transpose(1, 2)[~visible]
        patches = (patches - patches.mean(dim=1, keepdim=True)) / (patches.var(dim=1, keepdim=True) + 1e-3).sqrt()
        reconstruction = F.mse_loss(self.predict(cells[len(x) :][~visible]).float(), patches)
        z = F.normalize(self.project(cells.mean(dim=1)).float(), dim=1)
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
        contrast = F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))
        return contrast + RECONSTRUCTION * reconstruction


def scaled(images: Tensor) -> Tensor:
    """Images (B, 28, 28), uint8 -> pixels (B, 1, 28, 28) from 0 to 2; the background stays zero."""
    return images[:, None].float() / 127.5


def moved(x: Tensor) -> Tensor:
    """Turns, stretches, shifts, mirrors and brightens each image (B, 1, 28, 28) by chance."""
    angle, log_scale, log_aspect, gain = (2 * torch.rand(4, len(x)) - 1) * torch.tensor([[0.3], [0.25], [0.15], [0.4]])
    mirror = torch.where(torch.rand(len(x)) < 0.5, -1.0, 1.0)
    shift = (2 * torch.rand(len(x), 2) - 1) * 0.25
    wide, high = (log_scale + log_aspect).exp() * mirror, (log_scale - log_aspect).exp()
    first = torch.stack([wide * angle.cos(), -high * angle.sin(), shift[:, 0]], dim=1)
    second = torch.stack([wide * angle.sin(), high * angle.cos(), shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) * (1 + gain)[:, None, None, None]


@torch.no_grad()
def finish(encoder: Encoder, images: Tensor) -> None:
    """Computes the statistics of the normalization, and the components, from whole images (N, 28, 28), uint8."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over the batches
    with torch.autocast("cpu", torch.bfloat16):
        for batch in images.split(500):
            encoder.pooled(batch)
        encoder.eval()
        features = torch.cat([encoder.pooled(batch) for batch in images.split(500)])
    std, mean = torch.std_mean(features, dim=0)
    scale = 1 / (std + 1e-3)
    standardized = (features - mean) * scale
    components = torch.linalg.eigh(standardized.T @ standardized).eigenvectors[:, -FEATURES:]
    encoder.mean.copy_(mean)
    encoder.components.copy_(scale[:, None] * components)


def train(images: np.ndarray, seconds: float, seed: int) -> Encoder:
    """Returns an encoder of images (N, 28, 28), uint8, after a time in seconds."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    data = torch.from_numpy(images)
    model = Autoencoder().to(memory_format=torch.channels_last)
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    order = torch.empty(0, dtype=torch.int64)
    updates = 0
    while (progress := (time.perf_counter() - start) / (seconds - FINISH)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(data))
        batch = data[order[:BATCH_SIZE]]
        order = order[BATCH_SIZE:]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    finish(model.encoder, data[torch.randperm(len(data))[:FINISH_IMAGES]])
    print(f"{updates} updates, {updates * BATCH_SIZE / len(data):.1f} epochs, loss {loss.item():.3f}")
    print(f"{time.perf_counter() - start:.1f} of {seconds:.1f} seconds")
    return model.encoder
