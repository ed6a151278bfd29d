"""A run directory contains one run, and one process writes to it."""

import os
import resource
import subprocess
from pathlib import Path

import forks
import pytest
from conftest import ROOT
from mains import fails, in_processes, small_run

import main_pretrain
from mae.checkpoints import checkpoint, run_directory

LOCK = """
import os, sys, time
from pathlib import Path; from mae.checkpoints import run_directory
os.seteuid(int(sys.argv[1]))
with run_directory.locked(Path.cwd()):
    exec(sys.argv[2])
"""


def locks(folder, code="", user=0) -> tuple[int, str]:
    """Runs code in another process that has locked a run directory; returns the exit code and the output."""
    (folder / "lock.py").write_text(LOCK)
    run = forks.Forks("lock.py", [user or os.geteuid(), code], folder / "output", folder=folder)
    return run.wait(50)[0], (folder / "output").read_text()


def test_two_runs_can_not_write_to_one_directory(tmp_path):
    with run_directory.locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        assert f"by another run (process {os.getpid()} on " in locks(tmp_path)[1]
    assert locks(tmp_path)[0] == 0


def test_the_lock_is_released_when_its_process_ends(tmp_path, caplog):
    """Worker processes are forked while the run has the lock, and outlive a killed run for seconds."""
    killed = "if child := os.fork(): print(child, flush=True); os.kill(os.getpid(), 9)\ntime.sleep(60)"
    code, output = locks(tmp_path, killed)
    assert code == -9
    caplog.set_level("INFO")
    with run_directory.locked(tmp_path):
        assert "was killed" in caplog.text
        os.kill(int(output), 9)  # the worker is still there


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_unwritable_run_directory_is_an_error(tmp_path):
    """Root ignores permissions, so the test uses an unprivileged user."""
    output = locks(tmp_path, user=65534)[1]
    assert "can't be written to (Permission denied)" in output


def write(folder, *names, epoch):
    for name in names:
        checkpoint.write({"epoch": epoch}, folder / f"checkpoint-{name}.pth")


@pytest.fixture
def start():
    """Starts a run up to the choice of its checkpoint, and records the choice, as `resume.restore_run` does."""

    def start(out, resume):
        run_directory.prepare(out, str(resume))
        with run_directory.locked(out, str(resume)):
            which = run_directory.chosen(out, str(resume))
            if which not in ("", "auto"):
                run_directory.record_start(out, Path(which))
            (out / "log.txt").touch()
            return which

    return start


def test_a_restarted_command_resumes_with_auto_and_is_refused_otherwise(tmp_path, start, monkeypatch):
    (tmp_path / "job.log").write_text("a launcher's file is no run")
    assert start(tmp_path, "") == ""
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(ValueError, match="resume=auto"):
            start(tmp_path, "")
    assert start(tmp_path, "auto") == "auto"


def test_the_command_that_resumed_from_a_file_continues_its_run(tmp_path, start):
    """From the file until there is a checkpoint, then from the newest one."""
    out, file = tmp_path / "out", tmp_path / "checkpoint-7.pth"
    write(tmp_path, 7, 8, epoch=7)
    assert (start(out, file), start(out, file)) == (str(file), str(file))
    assert start(out, "auto") == str(file)
    write(out, 8, epoch=8)
    assert start(out, file) == start(out, "auto") == "auto"
    for other in ("", tmp_path / "checkpoint-8.pth"):
        with pytest.raises(ValueError, match="resume=auto"):
            start(out, other)
    with run_directory.locked(out, str(out / "checkpoint-8.pth")):
        pass  # it is refused later, for example because of its architecture
    assert start(out, file) == "auto"  # the refused commands changed nothing


def test_a_new_run_forgets_the_file_of_an_earlier_one(tmp_path, start):
    """The earlier run was killed before it wrote a file."""
    write(tmp_path, 7, epoch=7)
    run_directory.record_start(tmp_path, tmp_path / "checkpoint-7.pth")
    (tmp_path / "checkpoint-7.pth").unlink()
    assert (start(tmp_path, ""), start(tmp_path, "auto")) == ("", "auto")


def test_a_file_of_the_directory_must_be_its_newest_checkpoint(tmp_path, start):
    write(tmp_path, 0, epoch=0)
    write(tmp_path, 1, "best", epoch=1)
    (tmp_path / "checkpoint-2.pth").write_bytes(b"damaged")  # --resume auto skips it, too
    progress = {"epoch": 1, "images_done": 8}  # between the two
    checkpoint.write({"epoch": 0, "progress": progress}, tmp_path / "checkpoint-last.pth")
    for name, later in (("0", "checkpoint-1.pth, checkpoint-best.pth, checkpoint-last.pth"),
                        ("last", "checkpoint-1.pth, checkpoint-best.pth")):  # fmt: skip
        with pytest.raises(ValueError, match="later checkpoints") as raised:
            start(tmp_path, tmp_path / f"checkpoint-{name}.pth")
        assert f"resume={tmp_path}/checkpoint-{name}.pth: " in str(raised.value) and later in str(raised.value)
    assert start(tmp_path, tmp_path / "checkpoint-best.pth") == f"{tmp_path}/checkpoint-best.pth"
    newest = tmp_path / "checkpoint-1.pth"
    assert start(tmp_path, newest) == str(newest)
    write(tmp_path, 3, epoch=3)
    with pytest.raises(ValueError, match="later checkpoints"):
        start(tmp_path, newest)
    assert start(tmp_path.parent / "other", newest) == str(newest)


def test_a_second_start_that_is_refused_changes_nothing(tmp_path, start):
    file = tmp_path / "checkpoint-0.pth"
    write(tmp_path, 0, epoch=0)
    start(tmp_path, file)
    with run_directory.locked(tmp_path, str(file)):
        run_directory.record_start(tmp_path, file)
        for resume in ("auto", file):
            with pytest.raises(ValueError, match="by another run"):
                start(tmp_path, resume)
    assert start(tmp_path, "auto") == "auto"


def test_a_run_that_began_and_ended_in_the_meantime_is_not_overwritten(tmp_path):
    run_directory.prepare(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")  # of the other run
    with pytest.raises(ValueError, match=str(tmp_path)), run_directory.locked(tmp_path, ""):
        pass


@pytest.mark.slow
def test_processes_with_different_directories_are_an_error(pictures, tmp_path):
    """On machines with disks of their own, the same path is a directory of each machine."""
    script = tmp_path / "there.py"
    script.write_text(
        f"import os, runpy; os.chdir({str(tmp_path)!r} + '/machine' + os.environ['RANK'])\n"
        f"runpy.run_path({str(ROOT / 'main_pretrain.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "machine0").mkdir()
    (tmp_path / "machine1").mkdir()
    in_processes(1, pictures, tmp_path / "machine0/run", "--batch_size", 8, "--epochs", 1)
    argv = ["--output_dir", "run", "--epochs", 2, "--batch_size", 4, "--resume", "auto", "--device", "cpu"]
    with pytest.raises(subprocess.CalledProcessError) as raised:  # the other settings are recorded
        forks.run(script, argv, tmp_path / "output", count=2)
    assert "output_dir=run of process 1 " in raised.value.output
    assert not list((tmp_path / "machine1").rglob("*.pth"))


def test_a_directory_on_a_full_disk_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no byte can be written
    try:
        with pytest.raises(OSError, match=str(tmp_path)), run_directory.locked(tmp_path, ""):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_the_start_is_named(pictures, tmp_path, capsys, monkeypatch):
    (tmp_path / "environment.jsonl").symlink_to("/dev/full")
    line = fails(capsys, monkeypatch, main_pretrain, *small_run(pictures, tmp_path, "--batch_size", 4))
    assert f"{tmp_path}/environment.jsonl (No space left on device)" in line


def test_an_empty_checkpoint_has_its_reason_once(tmp_path, caplog):
    (tmp_path / "checkpoint-last.pth").touch()
    assert run_directory.newest_first(tmp_path) == run_directory.newest_first(tmp_path) == []
    assert caplog.text.count("checkpoint-last.pth is not a checkpoint") == caplog.text.count("it is empty") == 1
