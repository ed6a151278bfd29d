"""Signals: the run completes the update, saves its state, exits with the documented code, and resumes exactly.

The tests send signals to all processes of a run, including worker processes, like terminals, `timeout`, torchrun and
Slurm.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT
from mains import assert_equal, lines, wait_until, weights

from mae.checkpoints import run_directory
from mae.interrupts import SIGNALS, Interrupted, Interrupts, blocked

EPOCHS = 30
FLAGS = ["--model", "mae_vit_mini_patch4", "--input_size", 16, "--epochs", EPOCHS, "--warmup_epochs", 1, "--blr", 0.01,
         "--num_workers", 1, "--device", "cpu", "--vis_every", 0, "--save_every", 1000, "--resume", "auto"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _hangups():
    """SIGHUP is not ignored, as it is under nohup; processes inherit it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def flags(pictures, out, batch_size=4):
    return ["--data_path", pictures, "--output_dir", out, "--batch_size", batch_size, *FLAGS]


def start(pictures, out, *more):
    command = [sys.executable, "main_pretrain.py", *flags(pictures, out), *more]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
                            start_new_session=True)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    forks.run("main_pretrain.py", flags(pictures, out), out / "output")
    return out


@pytest.mark.slow
def test_a_run_stopped_by_signals_resumes_exactly(pictures, tmp_path, undisturbed):
    reached, log = 0, tmp_path / "log.txt"
    for number in (signal.SIGTERM, signal.SIGHUP):
        before, process = log.read_text() if log.exists() else "", start(pictures, tmp_path)
        wait_until(lambda before=before: log.exists() and log.read_text() != before, process)
        os.killpg(process.pid, number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + number, output
        assert f"{number.name}: the run stops after this update and saves its state" in output
        assert f"stopped by {number.name}, the state is saved; the same command resumes the run" in output
        assert "DataLoader" not in output and "Traceback" not in output
        state = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
        assert reached < state["progress"]["epoch"] < EPOCHS
        reached = state["progress"]["epoch"]
    forks.run("main_pretrain.py", flags(pictures, tmp_path), tmp_path / "output")
    name = f"checkpoint-{EPOCHS - 1}.pth"
    assert_equal(weights(tmp_path, name), weights(undisturbed, name))
    assert [line["epoch"] for line in lines(tmp_path)] == list(range(EPOCHS))
    assert [line["train_loss"] for line in lines(tmp_path)] == [line["train_loss"] for line in lines(undisturbed)]


def test_all_processes_stop_after_the_same_update(pictures, tmp_path):
    """Only one process receives the signal, and it is not rank 0."""
    run = forks.Forks("main_pretrain.py", flags(pictures, tmp_path, batch_size=2), tmp_path / "output", count=2)
    wait_until((tmp_path / "log.txt").exists)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.wait(90) == [128 + signal.SIGTERM] * 2
    output = (tmp_path / "output").read_text()
    assert "[rank 1] SIGTERM: the run stops after this update" in output
    assert output.count("stopped by SIGTERM, the state is saved") == 2
    assert (tmp_path / "checkpoint-last.pth").exists()


@pytest.mark.slow
def test_a_killed_worker_process_is_a_one_line_error(pictures, tmp_path):
    process, workers = start(pictures, tmp_path, "--epochs", 2000), []
    wait_until((tmp_path / "log.txt").exists, process)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has ended
            if stat.read_text().rpartition(")")[2].split()[1:2] == [str(process.pid)]:
                workers.append(int(stat.parent.name))
    (worker,) = workers
    os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert re.search(r"error: DataLoader worker .*(killed|exited).*lower `num_workers`", output)
    assert "Traceback" not in output and (tmp_path / "checkpoint-last.pth").exists()


LONG_EVALUATION = """
import time
import main_finetune
from mae.cli import entry_point
def slowly(*given, **named):
    print("evaluates", flush=True)
    time.sleep(300)
main_finetune.evaluate_model = slowly
entry_point.run(main_finetune.main, main_finetune.get_args_parser())
"""


@pytest.mark.slow
def test_an_evaluation_ends_at_once_and_is_repeated(labelled, tmp_path):
    """Slurm kills a job 30 seconds after the signal, and an evaluation may take longer."""
    argv = ["--model", "vit_mini_patch4", "--input_size", 16, "--epochs", 2, "--warmup_epochs", 1, "--lr", 0.003,
             "--num_workers", 1, "--device", "cpu", "--batch_size", 8, "--data_path", labelled]  # fmt: skip
    (tmp_path / "slow.py").write_text(LONG_EVALUATION)

    def finetune(out, script):
        own = [*argv, "--output_dir", tmp_path / out, "--resume", "auto"]
        return forks.Forks(script, own, tmp_path / f"{out}.output")

    process, output = finetune("parts", tmp_path / "slow.py"), tmp_path / "parts.output"
    wait_until(lambda: output.exists() and "\nevaluates\n" in output.read_text())
    process.signal(signal.SIGTERM)
    assert process.wait(30) == [128 + signal.SIGTERM], output.read_text()
    assert "SIGTERM: the run stops now and saves its state" in output.read_text()
    assert run_directory.position(tmp_path / "parts/checkpoint-last.pth") == (0, 48)
    for out in ("parts", "whole"):
        assert finetune(out, "main_finetune.py").wait(120) == [0]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert_equal(weights(parts), weights(whole))
    for key in ("train_loss", "test_acc1", "test_loss"):
        assert [line[key] for line in lines(parts)] == [line[key] for line in lines(whole)]


PARTS = """
import sys, time
from pathlib import Path
from mae import start
from mae.cli import entry_point
part = sys.argv.pop(1)
Path("mine").mkdir()
LONG = [sys.executable, "-c", "import os, time; print('process', os.getpid(), flush=True); time.sleep(60)"]
call = start.call
def run(name):
    if name == part == "between":
        print("process 0", flush=True)
        time.sleep(60)
    call(LONG if name == part else ["true"])
start.write_recipe = lambda given, file: run("check")
start.train = lambda *_: run("training")
start.arguments = lambda settings: run("between") or []
start.call = lambda words: run("page")
entry_point.run(start.main, start.get_args_parser())
"""


@contextlib.contextmanager
def started(folder, part):
    """`mae start` whose parts do nothing, but one, which does not end. Yields it, and the process ID of the part."""
    (folder / "parts.py").write_text(PARTS)
    output = folder / "output"
    run = forks.Forks("parts.py", [part, "images", "--output_dir", "mine"], output, folder=folder)
    wait_until(lambda: output.exists() and re.search(r"process \d+\n", output.read_text()))
    try:
        yield run, int(re.search(r"process (\d+)\n", output.read_text())[1])
    finally:
        run.signal(signal.SIGKILL)


def is_running(process):
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()


@pytest.mark.parametrize(("part", "number"), [
    ("check", signal.SIGINT), ("training", signal.SIGUSR1), ("between", signal.SIGTERM), ("page", signal.SIGHUP),
])  # fmt: skip
def test_a_signal_ends_each_part_of_start(tmp_path, part, number):
    with started(tmp_path, part) as (run, process):
        os.kill(run.processes[0].pid, number)
        assert run.wait(20) == [128 + number], (tmp_path / "output").read_text()
        assert not is_running(process)
    assert "saved" not in (tmp_path / "output").read_text()  # by a part that has no state


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_no_part_goes_on_after_start_is_killed(tmp_path):
    with started(tmp_path, "training") as (run, process):
        os.kill(run.processes[0].pid, signal.SIGKILL)
        wait_until(lambda: not is_running(process))


def test_stop_signals_are_recorded_and_handlers_restored():
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2} == set(SIGNALS)
    before = [signal.getsignal(signum) for signum in SIGNALS]
    for signum in SIGNALS:
        with Interrupts() as interrupts:
            assert interrupts.pending is None
            os.kill(os.getpid(), signum)
            assert interrupts.pending == signum
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_only_a_repeated_sigint_stops_at_once():
    """A SIGTERM precedes the first SIGINT; the last signal determines the exit code."""
    with Interrupts() as interrupts:
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
            assert interrupts.pending == signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_signal_interrupts_only_evaluations_at_once(caplog):
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted) as stopped, interrupts.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert stopped.value.signum == signal.SIGTERM
        assert "SIGTERM: the run stops now" in caplog.text
        os.kill(os.getpid(), signal.SIGUSR1)  # outside of an evaluation, the signal is only recorded
        assert interrupts.pending == signal.SIGUSR1
        evaluated = False
        with pytest.raises(Interrupted), interrupts.at_once():  # a signal before the evaluation
            evaluated = True
        assert not evaluated
    with Interrupts() as interrupts:
        with interrupts.at_once():
            evaluated = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.pending == signal.SIGTERM


def test_nohup_stays_in_effect():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.pending is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_blocked_while_processes_start():
    masks = [signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    with blocked():
        with blocked():
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert masks[1] >= set(SIGNALS) <= masks[2]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == masks[0]
