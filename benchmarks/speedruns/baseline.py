"""The first entry of the speedrun: a masked autoencoder in plain PyTorch. Copy this file, and change the copy.

The harness calls `train`, and later `Encoder` in another process. ../SPEEDRUN.md has the rules.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 28  # pixels
PATCH = 7  # pixels per side
GRID = SIDE // PATCH  # patches per side
VISIBLE = 4  # patches
WIDTH = 128
DEPTH = 4
DECODER_WIDTH = 64
BATCH_SIZE = 128
LR = 2e-3
WARMUP = 0.05  # of the time
UNIFORMITY = 0.1  # weight of the term that spreads the class tokens


class Block(nn.Module):
    """A pre-norm transformer block: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3)
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Images (B, 28, 28), uint8 -> features (B, 128): the mean of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(GRID**2, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, 4) for _ in range(DEPTH)), nn.LayerNorm(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.latent(patchify(images), torch.arange(GRID**2).expand(len(images), -1))[:, 1:].mean(dim=1)

    def latent(self, patches: Tensor, numbers: Tensor) -> Tensor:
        """Patches (B, N, P) and their numbers in the grid (B, N) -> tokens (B, 1 + N, D), the class token first."""
        x = self.embed(patches) + self.positions[numbers]
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))


class Autoencoder(nn.Module):
    """An encoder of visible patches, and a decoder that predicts the masked ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder_embed = nn.Linear(WIDTH, DECODER_WIDTH)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, DECODER_WIDTH))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(GRID**2, DECODER_WIDTH))
        self.decoder = nn.Sequential(Block(DECODER_WIDTH, 2), nn.LayerNorm(DECODER_WIDTH))
        self.predict = nn.Linear(DECODER_WIDTH, PATCH**2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 28, 28), uint8 -> the loss (). Tokens stay in the order of their noise."""
        patches = patchify(images)
        order = torch.rand(patches.shape[:2]).argsort(dim=1)
        rows = torch.arange(len(images))[:, None]
        visible = order[:, :VISIBLE]
        latent = self.encoder.latent(patches[rows, visible], visible)
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(x), GRID**2 - VISIBLE, -1)
        tokens = torch.cat([x[:, 1:], mask_tokens.to(x.dtype)], dim=1) + self.decoder_positions[order]
        pred = self.predict(self.decoder(torch.cat([x[:, :1], tokens], dim=1))[:, 1 + VISIBLE :])
        target = patches[rows, order[:, VISIBLE:]]
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        normed = F.normalize(latent[:, 0].float(), dim=1)
        return F.mse_loss(pred.float(), target) + UNIFORMITY * (normed @ normed.T).square().mean()


def patchify(images: Tensor) -> Tensor:
    """Images (B, 28, 28), uint8 -> normalized patches (B, N, P)."""
    images = (images.float() / 255 - 0.286) / 0.353
    return images.unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)


def train(images: np.ndarray, seconds: float, seed: int) -> Encoder:
    """Returns an encoder of images (N, 28, 28), uint8, after a time in seconds."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    data = torch.from_numpy(images)
    model = Autoencoder()
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    order = torch.empty(0, dtype=torch.int64)
    updates = 0
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(data))
        batch = data[order[:BATCH_SIZE]]
        order = order[BATCH_SIZE:]
        batch = torch.where(torch.rand(len(batch), 1, 1) < 0.5, batch.flip(2), batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    print(f"{updates} updates, {updates * BATCH_SIZE / len(data):.1f} epochs, loss {loss.item():.3f}")
    return model.encoder
