"""A run directory contains one run, and one process writes to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from util.checkpoints import checkpoint, run_directory

PRELUDE = (
    f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
    "from pathlib import Path; from util.checkpoints import run_directory\n"
)


def test_a_directory_with_a_run_requires_resume(tmp_path):
    (tmp_path / "job.log").write_text("a launcher's file is no run")
    run_directory.prepare(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        run_directory.prepare(tmp_path, "")
    run_directory.prepare(tmp_path, "auto")
    run_directory.prepare(tmp_path, str(tmp_path / "checkpoint-0.pth"))
    with pytest.raises(ValueError, match="already contains a run"):
        run_directory.prepare(tmp_path, str(tmp_path.parent / "checkpoint-0.pth"))


def test_two_runs_can_not_write_to_one_directory(tmp_path):
    script = PRELUDE + f"with run_directory.locked(Path({str(tmp_path)!r})): pass"
    with run_directory.locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert f"by another run (process {os.getpid()} on " in done.stderr
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_lock_is_released_when_its_process_ends(tmp_path):
    """Worker processes are forked while the run has the lock, and outlive a killed run for seconds."""
    script = PRELUDE + (
        f"with run_directory.locked(Path({str(tmp_path)!r})):\n"
        "    if child := os.fork():\n        print(child, flush=True); os.kill(os.getpid(), 9)\n"
        "    os.close(1); import time; time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode == -9
    with run_directory.locked(tmp_path):
        os.kill(int(done.stdout), 9)  # the worker is still there


def test_a_stale_lock_is_ignored(tmp_path, caplog):
    script = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "from util.checkpoints import run_directory; from pathlib import Path\n"
    )
    script += f"with run_directory.locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert (tmp_path / "run.lock").read_text()
    caplog.set_level("INFO")
    with run_directory.locked(tmp_path):
        assert "was killed" in caplog.text


def test_an_output_dir_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--output_dir .*file/run .*\(Not a directory\)"):
        run_directory.prepare(tmp_path / "file" / "run", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_unwritable_run_directory_is_an_error(tmp_path):
    """Root ignores permissions, so the test uses an unprivileged user."""
    script = PRELUDE + f"os.seteuid(65534)\nwith run_directory.locked(Path({str(tmp_path)!r})): pass"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "can't be written to (Permission denied): free space there, or give another" in done.stderr


def test_a_restarted_run_resumes_from_its_newest_checkpoint(monkeypatch, tmp_path):
    other = "other/checkpoint-7.pth"
    assert [run_directory.chosen(tmp_path, resume) for resume in ("", other, "auto")] == ["", other, "auto"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [run_directory.chosen(tmp_path, resume) for resume in ("", other, "auto")] == ["auto", other, "auto"]
    (tmp_path / "log.txt").touch()
    run_directory.prepare(tmp_path, "")  # its own, though it has no state yet
    checkpoint.write({"epoch": 0}, tmp_path / "checkpoint-0.pth")
    assert run_directory.chosen(tmp_path, other) == other  # it was killed before it resumed from it
    run_directory.begin_branch(tmp_path, tmp_path / "checkpoint-0.pth")
    assert run_directory.chosen(tmp_path, other) == "auto"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    with run_directory.locked(tmp_path, str(tmp_path / "checkpoint-0.pth")):  # a person goes back to it once more
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_directory.chosen(tmp_path, str(tmp_path / "checkpoint-0.pth")) != "auto"


def test_a_run_without_a_checkpoint_of_its_own_resumes_from_its_file_again(monkeypatch, tmp_path):
    """It resumed from a file of another run, and was killed before its first checkpoint."""
    out, file = tmp_path / "out", tmp_path / "checkpoint-7.pth"
    checkpoint.write({"epoch": 7}, file)
    run_directory.prepare(out, str(file))
    run_directory.begin_branch(out, file)
    (out / "log.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        run_directory.prepare(out, str(file))
    assert run_directory.chosen(out, "auto") == str(file)  # the remedy of the message
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_directory.prepare(out, str(file))
    with run_directory.locked(out, str(file)):
        assert run_directory.chosen(out, str(file)) == str(file)
        checkpoint.write({"epoch": 8}, out / "checkpoint-8.pth")
    assert run_directory.chosen(out, str(file)) == "auto"


def test_a_second_start_that_is_refused_changes_nothing(monkeypatch, tmp_path):
    file = str(tmp_path / "checkpoint-0.pth")
    checkpoint.write({"epoch": 0}, tmp_path / "checkpoint-0.pth")
    with run_directory.locked(tmp_path, file):
        run_directory.begin_branch(tmp_path, Path(file))
        for resume in ("auto", file):
            run_directory.prepare(tmp_path, resume)
            with pytest.raises(ValueError, match="by another run"), run_directory.locked(tmp_path, resume):
                pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_directory.chosen(tmp_path, file) == "auto"


def test_a_run_that_began_and_ended_in_the_meantime_is_not_overwritten(tmp_path):
    run_directory.prepare(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")  # of the other run
    with pytest.raises(ValueError, match="already contains a run"), run_directory.locked(tmp_path, ""):
        pass


def positions(folder):
    return {path.name: checkpoint.position(path) for path in checkpoint.checkpoints(folder)}


def make_run(folder):
    """Checkpoints of epochs 0 to 5, checkpoint-last within epoch 6, an emergency checkpoint and a damaged one."""
    for name, epoch, images_done in (*((str(n), n + 1, 0) for n in range(6)), ("last", 6, 8), ("emergency", 6, 4)):
        progress = {"epoch": epoch, "images_done": images_done}
        checkpoint.write({"epoch": epoch - 1, "progress": progress}, folder / f"checkpoint-{name}.pth")
    (folder / "checkpoint-best.pth").write_bytes((folder / "checkpoint-1.pth").read_bytes())
    (folder / "checkpoint-6.pth").write_bytes(b"damaged")
    (folder / "log.txt").write_text("".join(f'{{"epoch": {n}}}\n' for n in range(6)))


def test_resuming_from_an_earlier_checkpoint_moves_later_ones(tmp_path, caplog):
    caplog.set_level("INFO")
    make_run(tmp_path)
    run_directory.begin_branch(tmp_path, tmp_path / "checkpoint-last.pth")
    assert sorted(path.name for path in (tmp_path / "abandoned/1").iterdir()) == ["checkpoint-6.pth", "log.txt"]
    run_directory.begin_branch(tmp_path, tmp_path / "checkpoint-3.pth")
    assert positions(tmp_path).keys() == {"checkpoint-best.pth", *(f"checkpoint-{n}.pth" for n in range(4))}
    aside = {"checkpoint-4.pth": (5, 0), "checkpoint-5.pth": (6, 0), "checkpoint-last.pth": (6, 8),
             "checkpoint-emergency.pth": (6, 4)}  # fmt: skip
    assert positions(tmp_path / "abandoned/2") == aside
    assert (tmp_path / "abandoned/2/log.txt").read_text() == (tmp_path / "log.txt").read_text()
    assert f"moved to {tmp_path}/abandoned/2: checkpoint-4.pth, checkpoint-5.pth" in caplog.text
    run_directory.begin_branch(tmp_path, tmp_path / "checkpoint-3.pth")
    assert not (tmp_path / "abandoned/3").exists()


@pytest.mark.parametrize("moved", range(5))
def test_an_interrupted_move_is_completed_at_the_next_start(tmp_path, monkeypatch, moved):
    make_run(tmp_path)
    rename, calls = Path.rename, iter(range(10))

    def crashes(path, target):
        if next(calls) == moved:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crashes)
        run_directory.begin_branch(tmp_path, tmp_path / "checkpoint-3.pth")
    with run_directory.locked(tmp_path):
        assert checkpoint.newest_first(tmp_path)[0].name == "checkpoint-3.pth"
    assert len(checkpoint.checkpoints(tmp_path / "abandoned/1")) == 5
    assert not (tmp_path / "abandoned/1/moving.json").exists()
