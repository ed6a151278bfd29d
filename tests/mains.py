"""Helpers for runs of the scripts: several processes, interruption, comparison."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import forks
import pytest
import torch

from mae.checkpoints import checkpoint
from mae.cli import entry_point
from mae.data import open as opener
from mae.settings import DataSpec, names_of
from mae.training import saver


def argv_of(flags: Mapping[str, Any]) -> list[str]:
    """The command line of flags by name: True is a flag without a value, and a text with spaces has several values."""
    argv = []
    for flag, value in flags.items():
        argv += [f"--{flag}"] if value is True else [f"--{flag}", *str(value).split()]
    return argv


def parse(script: Any, *argv: Any, **flags: Any) -> Any:
    """The settings of a script that trains or evaluates (a `Run`), or the arguments of another command."""
    parser, words = script.get_args_parser(), [*map(str, argv), *argv_of(flags)]
    is_run = script.__name__.startswith("main_")
    return entry_point.parse(parser, words) if is_run else entry_point.parse_command(parser, words)[0]


def call(script: Any, *argv: Any, **flags: Any) -> Any:
    """Runs a script in this process with these arguments only."""
    return script.main(parse(script, *argv, **flags))


def open_source(split: str, data_path: Any = None, file_list: Any = None, dataset: Any = None, **options: Any) -> Any:
    """The dataset of a split; options are settings of data, and arguments of `mae.data.open.open_source`."""
    settings = {name: options.pop(name) for name in names_of(DataSpec) if name in options}
    if file_list:
        settings[f"{split}_list"] = file_list
    return opener.open_source(DataSpec(data_path=data_path, dataset=dataset, **settings), split, **options)


def printed(capsys, script: Any, **flags: Any) -> str:
    """The output of a script with these flags only."""
    capsys.readouterr()
    call(script, **flags, device="cpu", num_workers=0)
    return capsys.readouterr().out


def fails(capsys, monkeypatch, script, *argv) -> str:
    """Runs a script like the command line, which it refuses; returns the line of the error message."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        is_run = script.__name__.startswith("main_")
        (entry_point.run_script if is_run else entry_point.run)(script.main, script.get_args_parser())
    output = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert "Traceback" not in output
    return next(line for line in output.splitlines() if "error: " in line)


def randomized(model, std):
    """Gives a model random weights, so that a mistake changes the outputs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model.eval()


def weights(out, name="checkpoint-1.pth"):
    return checkpoint.read(out / name)["model"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_same_run(a, b, name="checkpoint-1.pth"):
    """Compares two run directories bit by bit: weights, states of the optimizer, and the log without its times."""
    ours, theirs = (checkpoint.read(out / name) for out in (a, b))
    assert_equal(ours["model"], theirs["model"])
    for number, state in ours["optimizer"]["state"].items():
        assert_equal(state, theirs["optimizer"]["state"][number])
    without = dict.fromkeys(("seconds", "images_per_s", "data_wait", "tflops", "mfu", "peak_memory_gb"))
    assert [line | without for line in lines(a)] == [line | without for line in lines(b)]


def assert_close(a, b, name="checkpoint-1.pth"):
    """Compares two runs up to rounding, without the biases of keys, whose gradient is zero except for rounding."""
    ours, theirs = weights(a, name), weights(b, name)
    for name in ours:
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    for line_a, line_b in zip(lines(a), lines(b), strict=True):
        assert line_a["train_loss"] == pytest.approx(line_b["train_loss"], rel=1e-5)


def lines(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def scores_of(out) -> str:
    """The scores of the last epoch of a classifier, as an evaluation prints them."""
    last = lines(out)[-1]
    return f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"


def wait_until(condition: Callable[[], object], process: Any = None, seconds: float = 120, pause: float = 0.02) -> None:
    """Waits for a condition; fails at the deadline, or if a process ends before, with its output."""
    ends = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < ends, f"nothing happened in {seconds:g} s"
        time.sleep(pause)


class Stopped(BaseException):
    """Interrupts a run like SIGKILL: nothing is saved."""


def stop_after(monkeypatch, method, calls):
    """Interrupts the run after `count` calls of a method of the saver, like SIGKILL."""
    original, count = getattr(saver.Saver, method), iter(range(1, 1000))

    def save_and_stop(self, *args, **options):
        original(self, *args, **options)
        if next(count) == calls:
            self.close()  # completes the write that has begun
            raise Stopped

    monkeypatch.setattr(saver.Saver, method, save_and_stop)


def stop_and_resume(monkeypatch, run, calls, method="save", name="parts", **flags):
    """Interrupts a run, which saves after each update, after `calls` calls of a method of the saver.

    Returns the directory of the resumed run.
    """
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, method, calls)
        run(name, **flags | {"save_minutes": 0})
    return run(name, **flags | {"save_minutes": 10}, resume="auto")


def small_run(data, out, *flags) -> list[str]:
    """Arguments of main_pretrain.py for a small run."""
    return [str(part) for part in (
        "--data_path", data, "--output_dir", out, "--model", "mae_vit_mini_patch4", "--input_size", 16,
        "--warmup_epochs", 1, "--blr", 0.01, "--num_workers", 0, "--device", "cpu", "--amp", "off", "--vis_every", 0,
        *flags,
    )]  # fmt: skip


def run_section(page, heading, folder) -> str:
    """Writes the first program of a section of a document, runs its first commands in a folder; returns the output."""
    section = (forks.ROOT / page).read_text().split(heading)[1].split("\n## ")[0]
    for name, code in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", section, re.DOTALL)[:1]:
        (folder / name).write_text(code)
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    commands = re.sub(r"(?<= )(?=main_\w+\.py|examples/|recipes/|demo/\w+\.py)", f"{forks.ROOT}/", commands)
    environment = {**os.environ, "PYTHONPATH": str(forks.ROOT)}
    with forks.starter(folder) as python:
        shell = ["bash", "-ec", re.sub(r"\bpython\b", str(python), commands)]
        done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_processes(processes, data, out, *flags, script="main_pretrain.py", environment=None) -> str:
    """Runs main_pretrain.py like `pretrain`, in one or several new processes; returns the output."""
    return forks.run(script, small_run(data, out, *flags), out.with_suffix(".output"), processes, environment)
