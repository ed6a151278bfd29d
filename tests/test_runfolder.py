"""One run to a folder, and one process that writes to it."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from util import checkpoint, runfolder

PRELUDE = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from util import runfolder\n"


def test_a_used_folder_needs_resume(tmp_path):
    (tmp_path / "job.log").write_text("a launcher's file is no run")
    runfolder.prepare(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        runfolder.prepare(tmp_path, "")
    runfolder.prepare(tmp_path, "auto")
    runfolder.prepare(tmp_path, str(tmp_path / "checkpoint-0.pth"))
    with pytest.raises(ValueError, match="already holds a run"):
        runfolder.prepare(tmp_path, str(tmp_path.parent / "checkpoint-0.pth"))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with runfolder.locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        with (
            pytest.raises(ValueError, match=rf"by another run \(process {os.getpid()} on "),
            runfolder.locked(tmp_path),
        ):
            pass
    with runfolder.locked(tmp_path):
        pass


def test_a_lock_that_a_killed_process_left_is_recognised(tmp_path, caplog):
    script = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); from util import runfolder; from pathlib import Path\n"
    )
    script += f"with runfolder.locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert (tmp_path / "run.lock").read_text()
    caplog.set_level("INFO")
    with runfolder.locked(tmp_path):
        assert "ended without goodbye" in caplog.text


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--output_dir .*file/run can't be made \(Not a directory\)"):
        runfolder.prepare(tmp_path / "file" / "run", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else(tmp_path):
    """Root passes through modes, so that an unprivileged user tries."""
    script = PRELUDE + f"os.seteuid(65534)\nwith runfolder.locked(Path({str(tmp_path)!r})): pass"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "can't be written to (Permission denied): give another" in done.stderr


def test_a_restarted_run_goes_on_from_its_newest_state(monkeypatch, tmp_path):
    other = "other/checkpoint-7.pth"
    assert [runfolder.chosen(tmp_path, resume) for resume in ("", other, "auto")] == ["", other, "auto"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [runfolder.chosen(tmp_path, resume) for resume in ("", other, "auto")] == ["auto", other, "auto"]
    (tmp_path / "log.txt").touch()
    runfolder.prepare(tmp_path, "")  # its own, though it has no state yet
    checkpoint.write({"epoch": 0}, tmp_path / "checkpoint-0.pth")
    assert runfolder.chosen(tmp_path, other) == "auto"
