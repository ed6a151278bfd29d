"""Images/s of main_pretrain.py with the recipe of the demo, compared with a lean loop of the same method.

    python demo/unpack_data.py
    python benchmarks/lean.py       # in turns, in one and in two processes: 6 minutes on two cores

The lean loop has what the method needs and nothing else: all images are one tensor, patches are embedded after the
selection, only masked patches are predicted, and modules are plain. Sizes, losses, optimizer, precision and batch size
are those of the recipe. It has no checkpoints, logs, exact resume, handling of infinite gradients, or other settings.

A rate is that of the updates after the first epoch, without what happens between epochs. The rate by CPU time divides
the images of all processes by the CPU time of one. Other programs on the machine change it less than the rate by the
clock.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import main_pretrain
from benchmarks import machine, scripts, timing
from mae import parallel
from mae.cli import entry_point
from mae.position_tables import get_2d_sincos_pos_embed

EPOCHS = 4
BATCH_SIZE = 128  # of all processes
PATCH = 7  # pixels per side
GRID = 4  # patches per side
VISIBLE = 4  # patches
HOST = torch.device("cpu")
RATES = "rates.json"


class Clock:
    """A callback that measures the updates after the first epoch: seconds of the clock, and of the CPU."""

    def __init__(self) -> None:
        self.epoch = 0
        self.last = np.zeros(2)
        self.updates = 0
        self.seconds = np.zeros(2)

    def after_update(self, model: nn.Module, epoch: float) -> None:
        now = np.array([time.perf_counter(), time.process_time()])
        number = math.ceil(epoch)
        if number > 1 and number == self.epoch:
            self.seconds += now - self.last
            self.updates += 1
        self.epoch = number
        self.last = now

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Block(nn.Module):
    """A pre-norm block: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3)
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Autoencoder(nn.Module):
    """The masked autoencoder of the recipe."""

    def __init__(self, dim: int = 128, depth: int = 4, decoder_dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, dim)
        self.blocks = nn.Sequential(*(Block(dim, 4) for _ in range(depth)), nn.LayerNorm(dim, eps=1e-6))
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder = nn.Sequential(Block(decoder_dim, 2), nn.LayerNorm(decoder_dim, eps=1e-6))
        self.predict = nn.Linear(decoder_dim, PATCH**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.positions, self.decoder_positions = (
            nn.Buffer(torch.from_numpy(get_2d_sincos_pos_embed(width, GRID)).float()) for width in (dim, decoder_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 28, 28) -> the loss (). Tokens stay in the order of their noise."""
        patches = images.unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH)).transpose(2, 3).flatten(3)
        patches = patches.flatten(1, 2)
        order = torch.rand(patches.shape[:2]).argsort(dim=1)
        rows = torch.arange(len(images))[:, None]
        visible = order[:, :VISIBLE]
        x = self.embed(patches[rows, visible]) + self.positions[visible]
        latent = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), GRID**2 - VISIBLE, -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1) + self.decoder_positions[order]
        pred = self.predict(self.decoder(torch.cat([x[:, :1], tokens], dim=1))[:, 1 + VISIBLE :])
        target = patches[rows, order[:, VISIBLE:]]
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        with torch.autocast("cpu", enabled=False):
            normed = F.normalize(latent[:, 0].float(), dim=1)
            return F.mse_loss(pred.float(), target) + 0.1 * (normed.T @ normed).square().sum() / len(normed) ** 2


def train_lean(clock: Clock, folder: Path) -> None:
    """Trains the lean loop for EPOCHS epochs, the first of which is the warm-up."""
    parallel.init("cpu")
    torch.manual_seed(0)
    files = sorted((scripts.ROOT / scripts.DATA / "train").rglob("*.png"))
    data = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files]))
    model = parallel.wrap(Autoencoder(), HOST)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0},
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    updates = len(data) // BATCH_SIZE
    for update in range(EPOCHS * updates):
        if update % updates == 0:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(update))
        epoch = update / updates
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(epoch, 0.5 + 0.5 * math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))
        batch = order[update % updates * BATCH_SIZE :][:BATCH_SIZE]
        images = data[batch[parallel.rank() :: parallel.world_size()]]
        images = torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(2), images)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model((images.float() / 255 - 0.286) / 0.353)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.after_update(model, (update + 1) / updates)


def train_ours(clock: Clock, folder: Path) -> None:
    """Trains with main_pretrain.py for EPOCHS epochs, the first of which is the warm-up."""
    batch_size = BATCH_SIZE // parallel.launched_processes()
    words = ["--config", "recipes/pretrain_fashion_mnist.yaml", "--batch_size", batch_size, "--epochs", EPOCHS,
             "--warmup_epochs", 1, "--output_dir", folder / "run"]  # fmt: skip
    run = entry_point.parse(main_pretrain.get_args_parser(), list(map(str, words)))
    main_pretrain.main(run, callbacks=[clock])


WAYS = {"lean": train_lean, "main_pretrain.py": train_ours}


def measure(way: str, processes: int) -> list[float]:
    """Images/s of a way in processes of their own: by the clock, and by CPU time."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    with tempfile.TemporaryDirectory() as folder:
        scripts.run_python(*launcher, "benchmarks/lean.py", "--way", way, "--folder", folder, threads=1)
        return json.loads(Path(folder, RATES).read_text())


def main(args: argparse.Namespace) -> None:
    """Prints images/s, and writes them as JSON; with `way`, trains in this process."""
    if args.way:
        clock = Clock()
        WAYS[args.way](clock, args.folder)
        if parallel.is_main():
            rates = clock.updates * BATCH_SIZE / clock.seconds
            (args.folder / RATES).write_text(json.dumps(rates.tolist()))
        parallel.teardown()
        return
    if not (scripts.ROOT / scripts.DATA).is_dir():
        raise ValueError("the images are not unpacked: run python demo/unpack_data.py")
    found = {}
    for processes in (1, 2):
        title = f"{processes} process{'es' if processes > 1 else ''}"
        runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                runs[way].append(measure(way, processes))
        for number, by in enumerate(("by the clock", "by CPU time")):
            of_one_kind = {way: [pair[number] for pair in pairs] for way, pairs in runs.items()}
            found[f"{title}, {by}"] = timing.report(f"{title}, {by}", of_one_kind)
    machine.write("lean_cpu", HOST, {"rounds": args.rounds}, found, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = machine.parser("Images/s of main_pretrain.py for a small model, compared with a lean loop.")
    parser.add_argument("--way", choices=WAYS, help="train in this process; the command starts processes with it")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="with --way: folder of the rates")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
