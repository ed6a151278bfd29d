"""A process of the speedrun, which speedrun.py starts: it runs the file of an entry, and reads no other file.

    sandbox.py train FILE FOLDER SECONDS SEED       FOLDER has images.npy, and gets encoder.pt
    sandbox.py encode FILE FOLDER BATCH_SIZE        FOLDER has images.npy and encoder.pt, and gets features.npy

PyTorch is imported and the images are read before the line "ready", which starts the clock of speedrun.py. From then
on, Python refuses to open other files, network connections and processes.
"""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

IMAGES = "images.npy"
ENCODER = "encoder.pt"
FEATURES = "features.npy"
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.", "ctypes.")
SYSTEM = ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices", "/dev/null", "/dev/urandom")


def guard(*allowed: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Returns an audit hook that refuses processes, connections, and files outside of libraries and `allowed`."""
    libraries = [sysconfig.get_path("stdlib"), *(path for path in sys.path if path.endswith(".zip"))]
    libraries += [str(Path(module.__path__[0]).parent) for module in (np, torch)]
    folders = [os.path.realpath(folder) for folder in [*libraries, *map(str, allowed), *SYSTEM]]

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"an entry of the speedrun may not use {event}")
        if event == "open" and not isinstance(values[0], int):
            path = os.path.realpath(os.fsdecode(values[0]))
            if not any(path == folder or path.startswith(folder + os.sep) for folder in folders):
                raise PermissionError(f"an entry of the speedrun may not open {path}")

    return refuse


def load(file: Path) -> ModuleType:
    """Returns the module of an entry."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(file: Path, folder: Path, images: np.ndarray, seconds: str, seed: str) -> None:
    """Trains an entry on images (N, 28, 28), uint8, and writes the weights of its encoder."""
    encoder = load(file).train(images, float(seconds), int(seed))
    torch.save(encoder.state_dict(), folder / ENCODER)


@torch.inference_mode()
def encode(file: Path, folder: Path, images: np.ndarray, batch_size: str) -> None:
    """Writes the features (N, D), fp32, of images (N, 28, 28), uint8."""
    encoder = load(file).Encoder()
    encoder.load_state_dict(torch.load(folder / ENCODER, weights_only=True))
    encoder.eval()
    parts = [encoder(batch).float().numpy() for batch in torch.from_numpy(images).split(int(batch_size))]
    np.save(folder / FEATURES, np.concatenate(parts))


if __name__ == "__main__":
    import torch._dynamo  # of optimizers: several seconds

    tasks: dict[str, Callable[..., None]] = {"train": train, "encode": encode}
    file, folder = map(Path, sys.argv[2:4])
    images = np.load(folder / IMAGES)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    print("ready", flush=True)
    sys.addaudithook(guard(file, folder))
    tasks[sys.argv[1]](file, folder, images, *sys.argv[4:])
    sys.stdout.flush()
    os._exit(0)  # at once: the clock runs, and PyTorch takes a second to end
