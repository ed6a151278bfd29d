"""Jobs: arguments of the script, handling of signals, and the end of --wait."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import UncompletedJobError

import main_pretrain
from util.jobs import code_copy, submit, waiting


@pytest.fixture
def run_job(monkeypatch, tmp_path):
    """Runs a job in this process as rank 0 of Slurm job 42; returns the settings and the working directory."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.chdir(tmp_path)
    environment = SimpleNamespace(cluster="slurm", job_id="42", global_rank=0)
    monkeypatch.setattr(submit.submitit, "JobEnvironment", lambda: environment)
    runs = []
    monkeypatch.setattr(main_pretrain, "main", lambda args: runs.append((vars(args), Path.cwd())))

    def run(*argv, folder=tmp_path, restarted=False):
        submit.Job("main_pretrain", argv, str(folder))(restarted=restarted)
        return runs[-1]

    return run


def test_a_job_runs_its_script(run_job, tmp_path):
    (tmp_path / "here").mkdir()
    args, folder = run_job("--output_dir", "/runs/%j", "--log_dir", "/logs/%j/x", "--epochs", "7", "--ngpus", "4",
                           folder=tmp_path / "here")  # fmt: skip
    assert folder == tmp_path / "here"
    assert (args["output_dir"], args["log_dir"], args["epochs"]) == ("/runs/42", "/logs/42/x", 7)
    assert not {"ngpus", "nodes", "timeout", "job_dir", "partition", "slurm", "wait"} & args.keys()


def test_a_requeued_job_resumes(run_job):
    """As after a restart by torchrun: `util.checkpoints.run_directory.chosen` selects the newest checkpoint."""
    run_job()
    assert "TORCHELASTIC_RESTART_COUNT" not in os.environ
    run_job(restarted=True)
    assert os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """Submits a job of main_pretrain.py to this machine without starting it; returns the job."""
    jobs = []

    def start(executor, job):
        jobs.append((job, Path.cwd()))
        return SimpleNamespace(job_id="42", task=lambda number: SimpleNamespace(paths=SimpleNamespace(stdout="log")))

    monkeypatch.setattr(submit, "_start", start)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        argv = ["--cluster", "local", "--nodes", "1", *argv]
        monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", *argv])
        submit.run("main_pretrain")
        return jobs[-1]

    return run


def test_a_submission_has_the_flags_and_the_snapshot(submitted, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    job, code = submitted("--config", "mine.yaml", "--log_dir", "logs", "--output_dir", "out/%j")
    assert job.main == "main_pretrain"
    assert job.folder == str(tmp_path)
    assert job.requeue is True
    args = submit.get_args_parser("main_pretrain")[0].parse_args(job.argv)
    assert args.output_dir == f"{tmp_path}/out/%j"
    assert args.log_dir == f"{tmp_path}/logs"
    assert args.config != "mine.yaml"
    assert Path(args.config).read_text() == "epochs: 3\n"
    assert Path(args.config).parent == code
    assert code.parent == tmp_path / "runs" / "jobs" / "code"
    assert f"results  {tmp_path}/out/42\n" in capsys.readouterr().out


def test_folders_of_a_job_by_default(submitted, tmp_path):
    for flags, folder in (
        ([], tmp_path / "runs" / "jobs" / "%j"),
        (["--job_dir", "a", "--shared_dir", "shared"], tmp_path / "a"),
        (["--shared_dir", "shared"], tmp_path / "shared" / "%j"),
    ):
        args = submit.get_args_parser("main_pretrain")[0].parse_args(submitted(*flags)[0].argv)
        assert args.output_dir == args.log_dir == str(folder)


def test_requeue_false_is_passed_to_the_job(submitted):
    assert submitted("--slurm", "requeue=false")[0].requeue is False
    assert submitted("--slurm", "no_requeue=true")[0].requeue is False


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_requeues_the_job(monkeypatch, rank):
    requeues = []
    monkeypatch.setattr(submit, "_is_submitits", lambda signum: True)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        signal.signal(signal.SIGUSR2, lambda *_: requeues.append(rank))
        with pytest.raises(SystemExit, match="stopped by SIGUSR2"):
            submit._stop(SimpleNamespace(cluster="local", global_rank=rank), signal.SIGUSR2, requeue=True)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert requeues == [0] * (rank == 0)


# ------------------------------------------------------------------------------------------------------ wait, the code


def finished(fails):
    """Returns a job that ended."""

    def results():
        if fails:
            raise UncompletedJobError("of submitit")

    return SimpleNamespace(results=results, job_id="42", state="FAILED")


def test_a_job_succeeds_or_fails(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("the state is saved\nepoch 1\nerror: out of memory\n")
    waiting.wait(finished(False), "slurm", log, "/out", None)
    assert capsys.readouterr().out == "job 42 succeeded\n"
    with pytest.raises(ValueError, match=r"job 42 failed \(state FAILED\)"):
        waiting.wait(finished(True), "slurm", log, "/out", None)
    assert "error: out of memory" in capsys.readouterr().out


def test_a_stopped_job_says_how_to_resume(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("epoch 1\nstopped by SIGTERM, the state is saved\n")
    with pytest.raises(SystemExit) as stop:
        waiting.wait(finished(True), "local", log, "/my jobs/42", None)
    assert stop.value.code == 130
    assert "to resume, add --resume auto --output_dir '/my jobs/42' to the command" in capsys.readouterr().out


def test_a_job_that_never_started_names_its_dependency(tmp_path):
    with pytest.raises(ValueError, match=r"job 42 has not started .*: job 41 of --after has not succeeded"):
        waiting.wait(finished(True), "slurm", tmp_path / "log", "/out", "41")


@pytest.mark.parametrize(
    ("cluster", "state", "cancel"), [("slurm", "squeue --job", "scancel"), ("local", "ps", "kill")]
)
def test_instructions_follow_and_cancel_a_job(cluster, state, cancel, capsys):
    waiting.print_instructions(cluster, "42", Path("/my logs/42.out"), "/out")
    printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed[0] == ["results", "/out"]
    assert printed[1] == ["follow", "tail -F '/my logs/42.out'"]
    assert printed[2] == ["state", f"{state} 42"]
    assert printed[3][1].startswith(f"{cancel} 42 ")


def test_changed_code_of_equal_length_has_another_snapshot(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.setattr(code_copy, "ROOT", source)
    copies = []
    for text in ("lr = 1\n", "lr = 2\n"):
        (source / "main.py").write_text(text)
        copies.append(code_copy.make(tmp_path / "code", None)[0])
        assert (copies[-1] / "main.py").read_text() == text
    assert copies[0] != copies[1]
    assert (copies[0] / "main.py").read_text() == "lr = 1\n"
