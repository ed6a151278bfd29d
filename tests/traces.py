"""Counts the functions of this project that a value passes in a small run, and the modules that the run loads.

    python tests/traces.py
    python tests/traces.py --trip    # of this tree, also of an earlier commit into which the file is copied

A function counts if an argument is the value itself, a path of the file, or a tensor of the file. The settings of a run
(`Run` and its parts) do not count, nor does the command line. A function in a function is a part of it.
"""

import ast
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = ["--input_size", 16, "--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0,
         "--device", "cpu"]  # fmt: skip
RATIO = 0.7182818  # a mask ratio that no other value equals
Function = tuple[str, str]  # file, qualified name

# Prints the modules that a default run on a folder has loaded after its first update, as a process of its own.
LOADED = """
import json, os, sys
import main_pretrain
from mae.cli import entry_point
class Stop:
    def after_update(self, model, epoch):
        print(json.dumps(sorted(file for module in list(sys.modules.values())
                                if (file := getattr(module, "__file__", None)))), flush=True)
        os._exit(0)
    def state_dict(self):
        return {}
main_pretrain.main(entry_point.parse(main_pretrain.get_args_parser()), callbacks=[Stop()])
"""


class Trace:
    """A profiler of Python that records the functions of this project that receive a value, until the first update."""

    def __init__(self, is_value: Callable[[Any], bool]) -> None:
        self.is_value, self.functions = is_value, dict[Function, None]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self.record(frame, event)

    def record(self, frame: FrameType, event: str) -> None:
        """Records the function of a frame if it receives the value."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)) or "/.venv/" in code.co_filename:
            return
        file = str(Path(code.co_filename).relative_to(ROOT))
        if file.startswith(("tests/", "mae/cli/", "mae/settings/")):
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        values = [frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals]
        if code.co_name[0] != "<" and any(self.is_value(value) for value in values):
            self.functions[file, code.co_qualname.partition(".<locals>")[0]] = None

    def run(self, call: Callable[[], Any]) -> list[Function]:
        """Calls a function, and returns the functions that received the value."""
        sys.setprofile(self)
        try:
            call()
        except Stopped:
            pass
        finally:
            sys.setprofile(None)
        return list(self.functions)


class BatchTrace(Trace):
    """A profiler that records the functions that an image passes from its index to the model.

    All functions count until the bytes of the first image are read, and then those that receive an image or a batch.
    """

    def __init__(self) -> None:
        super().__init__(lambda value: self.is_reading or is_image(value))
        self.is_open, self.is_reading = False, True

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        self.is_open |= name == "__getitems__" and file == str(ROOT / "mae/data/samples.py")
        self.is_reading &= not (event == "return" and isinstance(argument, bytes))
        if file == str(ROOT / "models_mae.py"):
            raise Stopped
        if self.is_open:
            self.record(frame, event)


def is_image(value: Any, depth: int = 3) -> bool:
    """Whether a value is an image or a batch of images, or a list or tuple that contains one."""
    if isinstance(value, list | tuple) and depth:
        return any(is_image(part, depth - 1) for part in value)
    return isinstance(value, bytes | Image.Image) or (isinstance(value, torch.Tensor) and value.ndim > 2)


class Stopped(Exception):
    """Ends a run after its first update."""


class FirstUpdate:
    """A callback that ends a run after its first update."""

    def after_update(self, model: torch.nn.Module, epoch: float) -> None:
        raise Stopped

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_images(folder: Path) -> Path:
    """Writes 4 images of each of 2 classes for training and for validation."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


def settings(script: Any, *argv: Any) -> Any:
    from mae.cli import entry_point

    return entry_point.parse(script.get_args_parser(), [str(word) for word in argv])


def functions_of_mask_ratio(images: Path, out: Path) -> list[Function]:
    """Returns the functions that receive the mask ratio in main_pretrain.py."""
    import main_pretrain

    run = settings(main_pretrain, *SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images, "--output_dir", out,
                   "--mask_ratio", RATIO)  # fmt: skip
    trace = Trace(lambda value: isinstance(value, float) and value == RATIO)
    return trace.run(lambda: main_pretrain.main(run, callbacks=[FirstUpdate()]))


def functions_to_backward(images: Path, out: Path) -> list[Function]:
    """Returns the functions below `main` that are active when `Tensor.backward` is called in main_pretrain.py."""
    import main_pretrain

    run = settings(main_pretrain, *SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images, "--output_dir", out)
    backward = torch.Tensor.backward
    found: list[Function] = []

    def traced(*arguments: Any, **options: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame and frame.f_code is not main_pretrain.main.__code__:
            if frame.f_code.co_filename.startswith(str(ROOT)):
                found.insert(0, (str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_code.co_qualname))
            frame = frame.f_back
        raise Stopped

    torch.Tensor.backward = traced  # type: ignore[method-assign]
    try:
        main_pretrain.main(run)
    except Stopped:
        pass
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    return found


class TripTrace:
    """A profiler that records all functions of this project that run in the second update, from the index to the loss.

    They are functions by file and name, in the main process, without worker processes: from the first call of
    `Samples.__getitems__` to the call of `forward` of the autoencoder, and on to its return.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.found: dict[str, set[Function]] = {"to the model": set(), "to the loss": set()}
        self.reached: list[str] = []  # what the trip has passed

    def after_update(self, model: torch.nn.Module, epoch: float) -> None:
        """Counts the updates, as a callback."""
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if self.updates != 1 or not code.co_filename.startswith(str(ROOT)) or code.co_name[0] == "<":
            return
        name = code.co_qualname
        if event == "call" and name == "Samples.__getitems__" and not self.reached:
            self.reached.append("index")
        elif event == "call" and name == "MaskedAutoencoderViT.forward" and self.reached == ["index"]:
            self.reached.append("model")
        elif event == "return" and name == "MaskedAutoencoderViT.forward":
            raise Stopped
        if event == "call" and self.reached and "/.venv/" not in code.co_filename:
            function = (str(Path(code.co_filename).relative_to(ROOT)), name.partition(".<locals>")[0])
            self.found["to the loss"].add(function)
            if self.reached == ["index"]:
                self.found["to the model"].add(function)


def functions_of_trip(images: Path, out: Path) -> dict[str, set[Function]]:
    """Returns the functions that run in main_pretrain.py from the sampler's index to the model, and to the loss."""
    import main_pretrain

    flags = [*SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images, "--output_dir", out, "--vis_every", 0]
    trace = TripTrace()
    sys.setprofile(trace)
    try:
        main_pretrain.main(settings(main_pretrain, *flags), callbacks=[trace])
    except Stopped:
        pass
    finally:
        sys.setprofile(None)
    return trace.found


def functions_of_image(images: Path, out: Path) -> list[Function]:
    """Returns the functions that an image passes before the model in main_pretrain.py."""
    import main_pretrain
    from mae.training.loop import Trainer

    run = settings(main_pretrain, *SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images, "--output_dir", out,
                   "--vis_every", 0)  # fmt: skip
    trace, fit = BatchTrace(), Trainer.fit

    def traced(*arguments: Any, **options: Any) -> Any:
        return trace.run(lambda: fit(*arguments, **options))

    Trainer.fit = traced  # type: ignore[method-assign]
    try:
        main_pretrain.main(run)
    finally:
        Trainer.fit = fit  # type: ignore[method-assign]
    return list(trace.functions)


def functions_of_weights(images: Path, out: Path) -> list[Function]:
    """Returns the functions that receive a file of --finetune, its path or its tensors, in main_finetune.py."""
    import main_finetune
    import main_pretrain

    pretrained = settings(main_pretrain, *SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images,
                          "--output_dir", out / "mae", "--vis_every", 0)  # fmt: skip
    main_pretrain.main(pretrained)
    path = out / "mae/checkpoint-0.pth"
    known: list[torch.Tensor] = []  # those of the file. It keeps them, so that no other tensor gets their address
    load = torch.load

    def loaded(*arguments: Any, **options: Any) -> Any:
        content = load(*arguments, **options)
        known.extend(tensors(content))
        return content

    def is_file(value: Any) -> bool:
        if isinstance(value, str | Path):
            return str(value).startswith(str(path))
        addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
        return any(tensor.untyped_storage().data_ptr() in addresses for tensor in tensors(value))

    run = settings(main_finetune, *SMALL, "--model", "vit_mini_patch4", "--data_path", images, "--aa", "none",
                   "--finetune", path, "--output_dir", out / "tuned")  # fmt: skip
    torch.load = loaded
    try:
        return Trace(is_file).run(lambda: main_finetune.main(run, callbacks=[FirstUpdate()]))
    finally:
        torch.load = load


def tensors(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested dicts, lists and named tuples. A parameter belongs to a model, not to a file."""
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        yield value
    elif depth and isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item, depth - 1)


def loaded_modules(images: Path, out: Path) -> dict[str, int]:
    """Returns the modules of this project after the first update of a default run, and their numbers of statements."""
    argv = [*SMALL, "--model", "mae_vit_mini_patch4", "--data_path", images, "--output_dir", out]
    command = [sys.executable, "-c", LOADED, *map(str, argv)]
    process = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    files = [Path(file) for file in json.loads(process.stdout.splitlines()[-1])]
    ours = [file for file in files if ROOT in file.parents and ".venv" not in file.parts]
    return {str(file.relative_to(ROOT)): statements(file) for file in ours}


def statements(file: Path) -> int:
    """Returns the number of statements of a file."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(file.read_bytes())))


def report() -> dict[str, list[str]]:
    """Returns the functions that mask_ratio, an image and a file of weights pass, and the modules that a run loads."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = make_images(folder / "images")
        found: dict[str, list[str]] = {}
        for title, functions in (
            ("functions that receive mask_ratio", functions_of_mask_ratio(images, folder / "ratio")),
            ("functions from main to backward", functions_to_backward(images, folder / "backward")),
            ("functions that an image passes before the model", functions_of_image(images, folder / "image")),
            ("functions that receive a file of --finetune", functions_of_weights(images, folder / "weights")),
        ):
            found[title] = [f"{file} {function}" for file, function in functions]
        modules = loaded_modules(images, folder / "loaded")
        title = f"modules after the first update, with {sum(modules.values()):,} statements"
        return found | {title: [f"{count} {file}" for file, count in modules.items()]}


def print_trip() -> None:
    """Prints the functions that run from the index of an image to the model, and their number to the loss."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        found = functions_of_trip(make_images(Path(name, "images")), Path(name, "out"))
    for title, functions in found.items():
        print(f"functions that run from the index of an image {title}: {len(functions)}")
    print("\n".join(f"  {file} {function}" for file, function in sorted(found["to the model"])))


if __name__ == "__main__":
    if "--trip" in sys.argv:
        print_trip()
        sys.exit()
    for title, entries in report().items():
        print("\n".join([f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]))
