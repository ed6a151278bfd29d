"""Checkpoints of earlier versions, whose weights load; the runs of df1688b4 resume: `python tests/earlier.py COMMIT`.

It trains in a worktree of each commit, and keeps tests/fixtures/earlier/COMMIT/NAME: the state after two updates of the
first epoch, and log.txt of the same run without interruption. The commit has `call` in tests/mains.py; df30571, which
lacks it, was written by this file of that time.
"""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "fixtures/earlier"
SIZE = {"embed_dim": 16, "depth": 2, "num_heads": 2}  # of the encoder that replaces "mini_patch4"
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SHARED = ("--input_size 8 --patch_size 4 --batch_size 4 --epochs 2 --warmup_epochs 1 --num_workers 0 --save_minutes 0 "
          "--amp off --device cpu --seed 3")  # fmt: skip
PRETRAIN = f"--model mae_vit_mini_patch4 --blr 0.05 --vis_every 0 {SHARED}"
RUNS = {  # name of a run -> script, its dataset, its flags
    "pretrain": ("main_pretrain", "images", f"{PRETRAIN} --norm_pix_loss"),
    "sharded": ("main_pretrain", "images", f"{PRETRAIN} --batch_size 2 --fsdp"),
    "finetune": ("main_finetune", "images", f"--model vit_mini_patch4 --blr 0.05 {SHARED}"),
    "linprobe": ("main_linprobe", "images", f"--model vit_mini_patch4 --blr 0.1 1 {SHARED}"),
    "segment": ("main_segment", "scenes", f"--model vit_mini_patch4 --nb_classes 3 --lr 0.01 {SHARED}"),
}
# Of df1688b4, whose encoders of DINO and low-rank updates were examples. {written}: the folder of the runs above them.
OF_EXAMPLES = {
    "dinov2": ("main_pretrain", "images", f"{PRETRAIN} --encoder examples.dino:DINOv2 --learned_pos_embed"),
    "dinov3": ("main_pretrain", "images", f"{PRETRAIN} --encoder examples.dino:DINOv3 --encoder_args swiglu=true "
               "--num_cls_tokens 3"),
    "continued": ("main_pretrain", "images", f"{PRETRAIN} --init_from {{written}}/dinov2/checkpoint-last.pth --encoder "
                  "examples.lora:LoRADINOv2 --encoder_args rank=2 alpha=3"),
    "lora": ("main_finetune", "images", f"--finetune {{written}}/pretrain/checkpoint-last.pth --model vit_mini_patch4 "
             f"--encoder examples.lora:LoRA --encoder_args rank=2 --blr 0.05 {SHARED}"),
}  # fmt: skip


def make_data(folder: Path) -> None:
    """Draws images/{train,val}/CLASS with 16 and 8 images of 10 x 12 pixels, and as many scenes with masks."""
    generator = np.random.default_rng(0)
    for split, name, count in (("train", "training", 16), ("val", "validation", 8)):
        for number in range(count):
            pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            mask = generator.integers(0, 3, (10, 12), dtype=np.uint8)
            for path, content in (
                (f"images/{split}/{'ab'[number % 2]}/{number:02}.png", pixels),
                (f"scenes/images/{name}/{number:02}.png", pixels),
                (f"scenes/annotations/{name}/{number:02}.png", mask),
            ):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(folder / path)


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Makes the models of "mini_patch4" smaller, so that their checkpoints have few bytes."""
    import models_mae
    import models_vit

    decoder = mock.patch.dict(models_mae.DECODERS["mini_patch4"], DECODER)
    with mock.patch.dict(models_vit.SIZES["mini_patch4"], SIZE), decoder:
        yield


def main(commit: str) -> None:
    """Trains in a worktree of a commit."""
    from conftest import torchrun

    root, folder = Path(__file__).parents[1], FOLDER / commit
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        tree, data = Path(temporary, "tree"), Path(temporary, "data")
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=root, check=True)
        make_data(data)
        try:
            of_examples = OF_EXAMPLES if (tree / "examples/lora.py").exists() else {}
            for name, (script, dataset, flags) in {**RUNS, **of_examples}.items():
                for out, stop in ((data / "whole" / name, 0), (data / "stopped" / name, 2)):
                    argv = flags.format(written=data / "stopped").split()
                    argv += ["--data_path", str(data / dataset), "--output_dir", str(out)]
                    code, paths = Path(temporary, "code.py"), [tree, tree / "tests", Path(__file__).parent]
                    code.write_text(f"import sys\nsys.path[:0] = {[*map(str, paths)]}\n"
                                    f"import earlier\nearlier.train{(script, argv, stop)}")  # fmt: skip
                    command = [*torchrun(2), code] if "--fsdp" in argv else [sys.executable, code]
                    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                (folder / name).mkdir(parents=True)
                for path in data.joinpath("stopped", name).glob("checkpoint-last*"):
                    (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name / path.name)
                shutil.copy(data / "whole" / name / "log.txt", folder / name / "expected.txt")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=root, check=True)


def train(script: str, argv: list[str], stop: int) -> None:
    """Trains in this process, with the modules of the worktree; `stop`: after this number of saves, if any."""
    import pytest
    from mains import Stopped, call, stop_after  # of the worktree

    with small_models(), pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        if stop:
            stop_after(patch, "save", stop)
        call(importlib.import_module(script), *argv)


if __name__ == "__main__":
    for commit in sys.argv[1:]:
        main(commit)
