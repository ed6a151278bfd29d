"""Errors on purpose are one line. A mistake in code, also in an edited file of this project, shows its line."""

import os
import shutil
import subprocess
import sys
import traceback

import forks
import pytest
from conftest import ROOT, torchrun
from mains import small_run

from mae import errors
from mae.data.pixels import BadImage

# The code of a user, with a slip in each kind. `WORD` chooses it.
SLIPS = {
    "encoder": "a, b = torch.zeros(3)", "model_class": "a, b, c, d = pred.shape", "optimizer": "1 / 0",
    "lr_schedule": "1 / int(progress < 0)", "callback": "{}['key']", "dataset": "open('missing.txt')",
    "transform": "raise ValueError('of the user')", "target": "int('a')",
}  # fmt: skip
CODE = """
import numpy as np, torch
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder

class OfEncoder(Encoder):
    def tokenize(self, imgs, **context):
        {encoder}

class OfModel(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        {model_class}

class OfTarget(MaskedAutoencoderViT):
    def target(self, imgs, **context):
        {target}

def optimizer(model, groups):
    {optimizer}

def schedule(progress):
    {lr_schedule}

class OfCallback:
    def state_dict(self):
        return {{}}

    def after_update(self, model, epoch):
        {callback}

class Images(list):
    def __init__(self, path, transform):
        super().__init__([path] * 8)
        self.transform = transform

    def __getitem__(self, index):
        if not self.transform:
            {dataset}
        return self.transform(np.zeros((16, 16, 3), np.uint8)), 0

def transform(image):
    {transform}

def plain(split, data_path):
    return Images(data_path, None)

def transformed(split, data_path):
    return Images(data_path, transform)
""".format(**SLIPS)
FLAGS = {
    "encoder": ("--encoder", "slips:OfEncoder"), "model_class": ("--model_class", "slips:OfModel"),
    "optimizer": ("--optimizer", "slips:optimizer"), "lr_schedule": ("--lr_schedule", "slips:schedule"),
    "callback": ("--seed", 1), "dataset": ("--dataset", "py:slips:plain"),
    "transform": ("--dataset", "py:slips:transformed"), "target": ("--model_class", "slips:OfTarget"),
}  # fmt: skip
OF_PROJECT = {  # a line of a file, and the slip below it
    "models_mae.py": ("        target = self.target(imgs, **context)\n", "        a, b = imgs.shape"),
    "engine_pretrain.py": (
        '        normalize: images -> the input of the model, on the device.\n    """\n',
        "    1 / 0",
    ),
    "main_pretrain.py": ("    precision = session.precision\n", "    {}['key']"),
}


MAIN = """
import main_pretrain, slips
from mae.cli import entry_point

def main(run):
    main_pretrain.main(run, callbacks=[slips.OfCallback()] * run.data.seed)

entry_point.run_script(main, main_pretrain.get_args_parser())
"""


def place_of(kind):
    number = CODE.splitlines().index(next(line for line in CODE.splitlines() if line.strip() == SLIPS[kind])) + 1
    return f'slips.py", line {number}, in '


def argv_of(kind, pictures, out):
    data = () if kind in ("dataset", "transform") else (pictures,)
    workers = 1 if kind in ("dataset", "transform") else 0
    run = small_run(
        *data or ("unused",),
        out,
        "--epochs",
        1,
        "--batch_size",
        2,
        "--num_workers",
        workers,
        "--warmup_epochs",
        0,
        *FLAGS[kind],
    )
    return run if data else run[2:]


@pytest.mark.parametrize("kind", SLIPS)
def test_a_slip_of_the_user_shows_its_line(kind, pictures, tmp_path, own_module, monkeypatch):
    own_module("slips", CODE)
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", *argv_of(kind, pictures, tmp_path / "out")])
    with pytest.raises(Exception) as raised:  # and no SystemExit: any type
        exec(MAIN, {})
    assert place_of(kind) in "".join(traceback.format_exception(raised.value))


@pytest.mark.slow
def test_slips_in_two_processes(pictures, tmp_path):
    (tmp_path / "slips.py").write_text(CODE)
    (tmp_path / "run.py").write_text(f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{MAIN}")
    started = {}
    for kind in SLIPS:
        argv = argv_of(kind, pictures, tmp_path / f"out-{kind}")
        started[kind] = forks.Forks(tmp_path / "run.py", argv, tmp_path / f"{kind}.output", count=2, folder=tmp_path)
    for kind, processes in started.items():
        assert processes.wait(120) == [1, 1]
        assert place_of(kind) in (tmp_path / f"{kind}.output").read_text()


@pytest.mark.slow
def test_slips_in_files_of_a_clone(pictures, tmp_path):
    """A wrong unpacking, a division by zero and a key that is missing; the first also under torchrun."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of the clone only
    started = []
    for file, (start, slip) in OF_PROJECT.items():
        clone = tmp_path / file.removesuffix(".py")
        for name in listed.stdout.split():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
        before, found, after = (clone / file).read_text().partition(start)
        assert found
        (clone / file).write_text(f"{before}{found}{slip}\n{after}")
        place = f'{clone / file}", line {(before + found).count(chr(10)) + slip.count(chr(10)) + 1}, in '
        launchers = [[sys.executable], torchrun(1)]
        for number, launcher in enumerate(launchers if not started else launchers[:1]):
            flags = small_run(pictures, tmp_path / f"out{number}-{file}", "--epochs", 1, "--batch_size", 2)
            command = [*launcher, "main_pretrain.py", *flags]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": variables}
            started.append((place, subprocess.Popen(command, cwd=clone, **options)))
    for place, process in started:
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 1
        assert place in output


@pytest.mark.parametrize(("file", "code", "expected"), [
    ("mae/a.py", "raise ValueError(0)", True),
    ("mae/a.py", "raise (\n  ValueError\n)(\n  'a'\n)", True),
    ("main_pretrain.py", "raise OSError('a') from KeyError(1)", True),
    ("examples/a.py", "raise ArithmeticError", True),
    ("mae/a.py", "1 / 0", False),
    ("mae/a.py", "int('a')", False),
    ("mae/a.py", "raise ValueError(1 / 0)", False),
    ("mae/a.py", "try:\n  int('a')\nexcept ValueError:\n  raise", False),
    ("mae/a.py", "try:\n  int('a')\nfinally:\n  x = 1", False),
    ("mae/a.py", "try:\n  int('a')\nexcept ValueError as error:\n  raise ValueError('b') from error", True),
    ("mae/a.py", "open('named/missing')", True),
    ("mae/a.py", "open('other/missing')", False),
    ("mae/a.py", "try:\n  user()\nexcept ValueError as error:\n  raise ValueError('b') from error", False),
    ("mae/a.py", "user()", False),
    ("mine/a.py", "raise ValueError(0)", False),
    ("mine/a.py", "raise BadImage('a')", True),
    ("mine/a.py", "open('named/missing')", False),
    ("mine/main_a.py", "raise ValueError(0)", False),
])  # fmt: skip
def test_an_error_on_purpose_is_a_raise_of_this_project(file, code, expected):
    names = {"BadImage": BadImage}
    exec(compile("def user():\n  int('a')", ROOT / "tests/a.py", "exec"), names)
    with pytest.raises(Exception) as raised:
        exec(compile(code, ROOT / file, "exec"), names)
    assert errors.is_on_purpose(raised.value, ["named", 3, None]) == expected
