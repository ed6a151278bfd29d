"""Jobs: what would be submitted, and jobs of this machine. Those of a real Slurm: tests/slurm/cases.py."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from mains import lines
from test_docs import DOCUMENTS, bash_blocks, commands

from util import cli, code_copy, submit

SCRIPTS = sorted(ROOT.glob("submitit_*.py"))


def tiny(pictures, *flags):
    """Flags of a job of one small process, but for those given."""
    settings = {
        "data_path": pictures, "model": "mae_vit_mini_patch4", "input_size": 16, "batch_size": 4, "warmup_epochs": 1,
        "blr": 0.01, "num_workers": 0, "device": "cpu", "vis_every": 0, "nodes": 1, "ngpus": 1,
    }  # fmt: skip
    return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)] + [*map(str, flags)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process, on a machine where nothing is installed; what it prints."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(ROOT)

    def run(*flags, main="main_pretrain", fails=False):
        monkeypatch.setattr(sys, "argv", [main.replace("main", "submitit") + ".py", *map(str, flags)])
        if fails:
            with pytest.raises(SystemExit) as ended:
                submit.run(main)
            assert ended.value.code
            return " ".join(capsys.readouterr().err.split())
        submit.run(main)
        return capsys.readouterr().out

    return run


def start(*flags):
    return subprocess.Popen(
        [sys.executable, "submitit_pretrain.py", *map(str, flags)], cwd=ROOT, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(holds):
    ends = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_dry_run_prints_what_sbatch_would_get(run, tmp_path):
    jobs = tmp_path / "jobs"
    script = run(
        "--data_path", "/images", "--shared_dir", jobs, "--dry_run", "--nodes", 3, "--ngpus", 4, "--timeout", 90,
        "--partition", "gpu", "--comment", "for a paper", "--use_volta32", "--after", 12,
        "--slurm", "account=lab", "--slurm", "mem_gb=100", "--slurm", "cpus-per-task=12", "--slurm", "mail-user=me",
        "--slurm", "signal_delay_s=300", "--slurm", "setup=module load cuda", "--slurm", "setup=date",
        "--slurm", "wckey=false",
    )  # fmt: skip
    for line in (
        "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=90", "--partition=gpu",
        "--comment='for a paper'", "--constraint=volta32gb", "--dependency=afterok:12", "--kill-on-invalid-dep=yes",
        "--account=lab", "--mem=100GB", "--cpus-per-task=12", "--mail-user=me", "--signal=USR2@300", "--requeue",
        f"--output={jobs}/%j/%j_0_log.out", "--job-name=mae_pretrain",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\ndate\n" in script
    assert "wckey=False" not in script
    srun = next(line for line in script.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in srun
    assert not jobs.exists()


def test_nothing_of_a_site_is_assumed(run):
    script = run("--data_path", "/images", "--dry_run", "--job_dir", "/shared/large", main="main_finetune")
    flags = set(re.findall(r"#SBATCH --([\w-]+)", script))
    assert not flags & {"partition", "account", "mem", "cpus-per-task", "constraint", "comment", "dependency"}
    assert "--gpus-per-node=8\n" in script
    assert "--output=/shared/large/%j_0_log.out" in script
    assert "gpus-per-node" not in run("--dry_run", "--device", "cpu")
    assert "gpus-per-node" not in run("--dry_run", "--slurm", "gres=gpu:8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slurm", "foo"], "--slurm: must be KEY=VALUE, such as account=lab, got foo"),
        (["--after", "yesterday"], "--after: must be the number of a job"),
        (["--cluster", "moon"], "choose from"),
        (["--cluster", "local"], "--nodes 2: --cluster local is this machine alone; give --nodes 1"),
        (["--nodes", "0"], "--nodes: must be at least 1"),
        (["--batch_size", "0"], "--batch_size: must be at least 1"),
        ([], "there is no sbatch here: submit where Slurm is, or give --cluster local, or --dry_run"),
    ],
)
def test_wrong_flags_are_told_at_once(run, flags, said):
    assert said in run(*flags, fails=True)


def test_after_a_requeue_a_run_goes_on():
    job = submit.Job("main_pretrain", ("--epochs", "2"), "/here")
    for again in (job.checkpoint(), job.__submitit_checkpoint__(), job.checkpoint(restarted=True)):
        assert again.function is job
        assert again.kwargs == {"restarted": True}


def test_a_local_job_runs_the_code_as_it_was_submitted(pictures, tmp_path):
    """In two processes, and in spite of what happens to the code and the recipe."""
    clone, _ = code_copy.make(tmp_path / "clones", None)
    (clone / "mine.yaml").write_text("epochs: 3\n")
    flags = tiny(
        pictures, "--config", "mine.yaml", "--cluster", "local", "--ngpus", 2, "--batch_size", 2, "--shared_dir",
        tmp_path / "jobs", "--output_dir", tmp_path / "run%j",
    )  # fmt: skip
    with (tmp_path / "told").open("w") as told:  # the job has it open, too
        command = [sys.executable, "submitit_pretrain.py", *flags]
        subprocess.run(command, cwd=clone, stdin=subprocess.DEVNULL, stdout=told, check=True, timeout=120)
    for file in (clone / "mine.yaml", *clone.glob("*.py"), *clone.glob("util/*.py")):
        file.write_text("this is edited")
    told = (tmp_path / "told").read_text()
    number = re.findall(r"job (\d+) is started", told)[0]
    out = tmp_path / f"run{number}"
    assert f"results  {out}\n" in told
    log = tmp_path / f"jobs/{number}/{number}_0_log.out"
    assert str(log) in told
    wait_for(lambda: log.exists() and "Exiting after successful completion" in log.read_text())
    assert len(lines(out)) == 3
    assert "2 process(es)" in log.read_text()
    assert "ngpus=" not in log.read_text()  # settings of the run, not of the job


def test_a_local_job_goes_on_after_the_signal_of_its_time_limit(pictures, tmp_path):
    flags = tiny(pictures, "--epochs", 60, "--cluster", "local", "--job_dir", tmp_path / "job", "--wait")
    job = start(*flags)
    wait_for(lambda: (tmp_path / "job/log.txt").exists() and len(lines(tmp_path / "job")) > 1)
    os.kill(int(re.findall(r"process (\d+) on", (tmp_path / "job/run.lock").read_text())[0]), signal.SIGUSR2)
    assert "succeeded" in job.communicate(timeout=120)[0]
    assert job.returncode == 0
    [log] = (tmp_path / "job").glob("*_0_log.out")
    assert "resuming from" in log.read_text()
    assert log.read_text().count("Starting with JobEnvironment") == 2
    assert [line["epoch"] for line in lines(tmp_path / "job")] == list(range(60))


def test_who_waits_for_a_job_that_failed_is_told_why(pictures, tmp_path):
    flags = tiny(pictures, "--data_path", "/nowhere", "--cluster", "local", "--shared_dir", tmp_path, "--wait")
    job = start(*flags)
    told = job.communicate(timeout=120)[0]
    assert job.returncode == 1
    assert "main_pretrain.py: error: --data_path: there is no folder or archive /nowhere" in told
    assert "submitit_pretrain.py: error: job" in told
    assert "Traceback" not in told


def test_debug_runs_in_this_process(pictures, tmp_path):
    flags = tiny(pictures, "--epochs", 1, "--cluster", "debug", "--job_dir", tmp_path / "%j")
    job = start(*flags)
    assert "epoch 0 done" in job.communicate(timeout=120)[0]
    assert job.returncode == 0
    [out] = tmp_path.glob("DEBUG_*")
    assert len(lines(out)) == 1
    job = start(*flags, "--output_dir", out)
    assert "already holds a run" in job.communicate(timeout=120)[0]
    assert job.returncode == 1


def test_copies_of_code_are_named_after_what_is_in_them(tmp_path):
    copy, recipe = code_copy.make(tmp_path, None)
    assert recipe is None
    assert code_copy.make(tmp_path, None)[0] == copy
    assert {"main_pretrain.py", "util/submit.py", "recipes/pretrain_vit_large.yaml"} <= {
        file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()
    }
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    other, recipe = code_copy.make(tmp_path, str(tmp_path / "mine.yaml"))
    assert other != copy
    assert recipe.read_text() == "epochs: 3\n"
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2


def test_shown_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [command for path in DOCUMENTS for command in bash_blocks(path)]
    shown += [command for path in SCRIPTS for command in commands(path.read_text())]
    calls = [re.search(r"python submitit_(\w+)\.py (-.*)", command) for command in shown]
    found = [(f"main_{call[1]}", shlex.split(call[2])) for call in calls if call]
    assert len(found) >= 5
    for main, flags in found:
        importlib.import_module(main)
        assert cli.parse(submit.get_args_parser(main)[0], flags)
