"""`./run`: failed installations and signals. Its tasks have their own tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that ./run needs, in a folder whose name contains a space; nothing is installed."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("run", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder of commands at the start of PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def write_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run(clone: Path, tools: Path, *task: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(clone / "run"), *task], cwd=clone.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | environment, timeout=240,
    )  # fmt: skip


def test_tasks_are_listed_from_any_folder(clone):
    done = subprocess.run(["my clone/run"], cwd=clone.parent, capture_output=True, text=True, check=True)
    assert "usage: ./run TASK" in done.stdout
    assert "\n  demo" in done.stdout
    assert done.stderr == ""


def test_an_interpreter_with_its_packages_is_used_as_it_is(clone, tools):
    write_tool(tools, "my-python", 'echo "it runs: $*"')
    done = run(clone, tools, "test", PYTHON="my-python")
    assert done.returncode == 0, done.stderr
    assert "it runs: -m pytest" in done.stdout and "-m not slow" in done.stdout
    assert not (clone / ".venv").exists()
    of_all = run(clone, tools, "test", "--all", PYTHON="my-python").stdout
    assert "it runs: -m pytest" in of_all and "slow" not in of_all
    of_one = run(clone, tools, "test", "tests/test_loop.py", PYTHON="my-python").stdout
    assert "it runs: -m pytest tests/test_loop.py" in of_one
    done = run(clone, tools, "test", PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no-such-python" in done.stderr


def test_an_old_python_is_named(clone, tools):
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        write_tool(tools, name, 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    done = run(clone, tools, "demo")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "needs Python 3.11 or newer" in line and "Python 3.9.2" in line


@pytest.mark.parametrize(("user", "message"), [
    (0, "apt-get could not install python3-venv"), (1000, "type: sudo apt-get install python3-venv"),
])  # fmt: skip
def test_a_python_without_venv_is_named(clone, tools, user, message):
    """Debian's python3 has no venv: for root without a network, and for other users."""
    write_tool(tools, "id", f"echo {user}")
    write_tool(tools, "apt-get", "echo E: no network >&2; exit 100")
    write_tool(tools, "python3", "case $* in *ensurepip*) exit 1; esac")
    done = run(clone, tools, "demo")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (clone / ".venv").exists()


def disks(tools: Path, here: int, temporary: int) -> None:
    """A fake df of two file systems with the given free GB."""
    line = f'if [ "$2" = . ]; then echo "a 9 9 {here}000000 9% /"; else echo "b 9 9 {temporary}000000 9% $2"; fi'
    write_tool(tools, "df", f"echo head\n{line}")


@pytest.mark.parametrize(("here", "temporary", "environment", "message"), [
    (2, 90, {"CPU": "0"}, "my clone needs 8 GB of free disk, and has 2 GB"),
    (90, 1, {"CPU": "0"}, "needs 4 GB of free disk, and has 1 GB; type: TMPDIR=FOLDER ./run demo"),
    (2, 90, {"CPU": "1"}, "my clone needs 3 GB of free disk, and has 2 GB"),
])  # fmt: skip
def test_a_small_disk_is_named_before_anything_is_downloaded(clone, tools, here, temporary, environment, message):
    disks(tools, here, temporary)
    done = run(clone, tools, "demo", **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (clone / ".venv").exists()
    assert ("download.pytorch.org/whl/cpu" in done.stdout) == (environment["CPU"] == "1")
    assert ("CPU=1 ./run demo" in done.stdout) != (environment["CPU"] == "1")


def write_python(tools: Path, pip: str) -> None:
    """A fake Python that creates environments with a fake pip, and enough space on the disks."""
    disks(tools, 90, 90)
    venv = 'mkdir -p .venv/bin; cp "$0" .venv/bin/python'
    write_tool(tools, "python3", f'case "$*" in "-m venv .venv") {venv} ;; "-m pip install "*) {pip} ;; esac')


@pytest.mark.parametrize(("gpu", "cluster", "network", "index"), [
    (False, False, True, True), (False, False, False, False), (True, False, True, False), (False, True, True, False),
])  # fmt: skip
def test_without_a_gpu_the_cpu_build_is_installed(clone, tools, gpu, cluster, network, index):
    """PyPI's build is installed where the index of the CPU build does not answer, and where GPUs may be."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    commands = clone.parent / "commands"
    commands.mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name not in ("nvidia-smi", "sbatch"):
            (commands / path.name).symlink_to(path)
    write_python(tools, "echo $* >> ../arguments; exit 3")
    write_tool(tools, "timeout", f"exit {int(not network)}")
    for name in ["nvidia-smi"] * gpu + ["sbatch"] * cluster:
        write_tool(tools, name, "")
    assert run(clone, tools, "demo", PATH=f"{tools}:{commands}").returncode == 1
    assert ("--index-url https://download.pytorch.org/whl/cpu" in (clone.parent / "arguments").read_text()) == index


def test_a_failing_pip_fails_the_task_with_pips_message(clone, tools):
    write_python(tools, "echo Collecting torch; echo ERROR: no network >&2; exit 3")
    done = run(clone, tools, "demo")
    assert done.returncode == 1
    pips, ours = done.stderr.splitlines()
    assert pips == "ERROR: no network" and ours.startswith("run: pip failed")
    assert not (clone / ".venv/installed").exists()


def install(clone: Path) -> None:
    """Makes a clone look installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    (clone / ".venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages/pip.py").touch()
    summed = subprocess.run(["cksum"], stdin=(clone / "pyproject.toml").open(), capture_output=True, check=True)
    (clone / ".venv/installed").write_bytes(summed.stdout)


TASKS = re.findall(r"^([a-z-]+)\(\) \{ # ", (ROOT / "run").read_text().partition("\n# ---")[0], re.MULTILINE)


@pytest.fixture
def started(clone, tools):
    """Starts a task whose first command starts another process, and then sleeps; returns the task, and a function that
    reads both process IDs."""
    install(clone)
    sleeping = "[ $1 = -c ] && exit; sleep 200 & echo $! $$ >pids; wait"
    for name in ("python", "ruff"):
        (clone / ".venv/bin" / name).unlink(missing_ok=True)
        write_tool(clone / ".venv/bin", name, sleeping)
    for name in ("apt-get", "chromium"):
        write_tool(tools, name, "exit 0")
    write_tool(tools, "id", "echo 0")

    def start(task: str, stdin: int = subprocess.DEVNULL, ignored: int = signal.SIGUSR1) -> subprocess.Popen:
        process = subprocess.Popen(
            [str(clone / "run"), task], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}, start_new_session=True,
            preexec_fn=lambda: [signal.signal(n, signal.SIG_IGN if n == ignored else signal.SIG_DFL) for n in
                                (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not ((clone / "pids").exists() and (clone / "pids").read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return process

    return start


def assert_stopped(process: subprocess.Popen, clone: Path, task: str, code: int = 143) -> None:
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert f"run {task}: stopped after" in output
    for pid in (clone / "pids").read_text().split():
        status = Path(f"/proc/{pid}/stat")
        for _ in range(100):
            if not status.exists() or ") Z " in status.read_text():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"process {pid} continues")


def test_the_demo_keeps_earlier_results(clone, tools):
    """Of two earlier demos. The commands of this one fail."""
    install(clone)
    (clone / ".venv/bin/python").unlink()
    write_tool(clone / ".venv/bin", "python", "[ $1 = -c ]")
    for name in ("first", "second"):
        (clone / "demo/output").mkdir(parents=True)
        (clone / "demo/output/results.json").write_text(name)
        assert run(clone, tools, "demo").returncode == 1
    assert {path.name: (path / "results.json").read_text() for path in (clone / "demo").iterdir()} == {
        "output.1": "first", "output.2": "second",
    }  # fmt: skip


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"help"}))
def test_a_signal_ends_all_processes_of_a_task(started, clone, task):
    process = started(task)
    process.send_signal(signal.SIGTERM)
    assert_stopped(process, clone, task)


def test_every_signal_ends_a_task(started, clone):
    for number in (signal.SIGINT, signal.SIGHUP):
        process = started("app")
        process.send_signal(number)
        assert_stopped(process, clone, "app")
        (clone / "pids").unlink()
    process = started("app", ignored=signal.SIGINT)  # as in the background of a script
    process.send_signal(signal.SIGTERM)
    assert_stopped(process, clone, "app")


def test_a_signal_ends_a_task_at_a_terminal(started, clone):
    """The command gets the terminal, and SIGINT, as after Ctrl-C."""
    write_tool(clone / ".venv/bin", "python", "[ $1 = -c ] && exit; [ -t 0 ] && echo $$ >pids; exec sleep 200")
    ours, theirs = os.openpty()
    process = started("app", stdin=theirs)
    process.send_signal(signal.SIGTERM)
    assert_stopped(process, clone, "app")
    (clone / "pids").unlink()
    process = started("app", stdin=theirs)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    assert_stopped(process, clone, "app", 130)
    os.close(ours)
    os.close(theirs)
