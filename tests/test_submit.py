"""Jobs: submission scripts, and jobs on this machine. tests/slurm/cases.py tests jobs on a real Slurm."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from mains import argv_of, lines, wait_until
from test_docs import commands

from mae.jobs import code_copy, submit

SCRIPTS = sorted(ROOT.glob("submitit_*.py"))


def small_job(pictures, *flags):
    """Returns the flags of a small job with one process, followed by `flags`."""
    settings = {
        "data_path": pictures, "model": "mae_vit_mini_patch4", "input_size": 16, "batch_size": 4, "warmup_epochs": 1,
        "blr": 0.01, "num_workers": 0, "device": "cpu", "vis_every": 0, "nodes": 1, "ngpus": 1,
    }  # fmt: skip
    return [*argv_of(settings), *map(str, flags)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process, with an empty PATH; returns the output."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(ROOT)

    def run(*flags, main="main_pretrain", fails=False):
        monkeypatch.setattr(sys, "argv", [main.replace("main", "submitit") + ".py", *map(str, flags)])
        if fails:
            with pytest.raises(SystemExit) as stop:
                submit.submit_script(main)
            assert stop.value.code
            return " ".join(capsys.readouterr().err.split())
        submit.submit_script(main)
        return capsys.readouterr().out

    return run


def start(*flags, **options):
    return subprocess.Popen(
        [sys.executable, "submitit_pretrain.py", *map(str, flags)], cwd=ROOT, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


@pytest.fixture
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Writes a command of Slurm, which is found first."""

    def write(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


def test_a_dry_run_prints_the_sbatch_script(run, tmp_path):
    jobs = tmp_path / "jobs"
    script = run(
        "--data_path", "/images", "--shared_dir", jobs, "--dry_run", "--nodes", 3, "--ngpus", 4, "--timeout", 90,
        "--partition", "gpu", "--comment", "for a paper", "--use_volta32", "--after", 12,
        "--slurm", "account=0012", "--slurm", "mem_gb=100", "--slurm", "cpus-per-task=12", "--slurm", "mail-user=me",
        "--slurm", "signal_delay_s=300", "--slurm", "setup=module load cuda", "--slurm", "setup=date",
        "--slurm", "wckey=false", "--slurm", "job_name=mine", "--slurm", "exclusive=true",
        "--slurm", "contiguous=false",
    )  # fmt: skip
    for line in (
        "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=90", "--partition=gpu",
        "--comment='for a paper'", "--constraint=volta32gb", "--dependency=afterok:12", "--kill-on-invalid-dep=yes",
        "--account=0012", "--mem=100GB", "--cpus-per-task=12", "--mail-user=me", "--signal=USR2@300", "--requeue",
        f"--output={jobs}/%j/%j_0_log.out", "--job-name=mine", "--exclusive",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\ndate\n" in script
    assert "wckey" not in script  # although submitit sets one
    assert "contiguous" not in script
    srun = next(line for line in script.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in srun
    assert not jobs.exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_script_submits_its_own_task(script, monkeypatch, capsys):
    """By the command in its docstring. test_docs.py parses those of the documents."""
    (command,) = re.findall(rf"python {script.name} (.*--dry_run)", "\n".join(commands(script.read_text())))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script.name, *shlex.split(command)])
    runpy.run_path(str(script), run_name="__main__")
    assert f"--job-name=mae_{script.stem.removeprefix('submitit_')}\n" in capsys.readouterr().out


def test_the_script_has_no_options_of_a_site(run):
    script = run("--data_path", "/images", "--dry_run", "--job_dir", "/shared/large", main="main_finetune")
    flags = set(re.findall(r"#SBATCH --([\w-]+)", script))
    assert not flags & {"partition", "account", "mem", "cpus-per-task", "constraint", "comment", "dependency"}
    assert "--gpus-per-node=8\n" in script
    assert "--output=/shared/large/%j_0_log.out" in script
    assert "gpus-per-node" not in run("--dry_run", "--device", "cpu")
    assert "--job-name=mae_finetune\n" in script
    for setting in ("gres=gpu:8", "gpus_per_task=1", "gpus=16", "gpus_per_node=false"):
        assert "gpus-per-node" not in run("--dry_run", "--slurm", setting)
    assert "--gpus-per-node=8\n" in run("--dry_run", "--slurm", "gres=lscratch:100")
    assert "--gpus-per-task=1\n" in run("--dry_run", "--slurm", "gpus_per_task=1")


@pytest.mark.parametrize("setting", ["requeue=false", "no-requeue=true"])
def test_a_job_that_is_not_requeued(run, monkeypatch, setting):
    script = run("--dry_run", "--slurm", setting)
    assert "#SBATCH --no-requeue\n" in script
    assert "--requeue" not in script
    assert "#SBATCH --requeue\n" in run("--dry_run", "--slurm", "no_requeue=false")
    handled = []
    monkeypatch.setattr(submit, "is_submitits", lambda signum: handled.append(signum))
    with pytest.raises(SystemExit, match="SIGUSR2"):
        submit.stop_job(SimpleNamespace(cluster="slurm"), signal.SIGUSR2, requeue=False)
    assert handled == []  # neither requeued nor waiting for a requeue


@pytest.mark.parametrize(("flags", "message"), [
    ("--slurm foo", "--slurm"), ("--slurm array=0-2", "array"), ("--slurm signal=USR1@60", "signal"),
    ("--slurm partition=a --partition b", "partition=b"), ("--after 7 --cluster debug", "after=7"),
    ("--after yesterday", "--after"), ("--cluster local", "nodes=2"), ("--batch_size 0", "--batch_size"),
    ("", "sbatch"),
])  # fmt: skip
def test_invalid_flags_are_errors_before_submission(run, flags, message):
    assert message in run(*flags.split(), fails=True)


def test_scontrol_requeue_survives_its_own_sigterm(monkeypatch, handlers):
    """Slurm ends all processes of a requeued job, including the one that calls scontrol."""
    monkeypatch.setattr(submit, "is_submitits", lambda signum: True)
    exit_codes = []
    signal.signal(signal.SIGUSR2, lambda *_: exit_codes.append(subprocess.check_call(["sh", "-c", "kill -TERM $$"])))
    with pytest.raises(SystemExit, match="SIGUSR2"):
        submit.stop_job(SimpleNamespace(cluster="local", global_rank=0), signal.SIGUSR2, requeue=True)
    assert exit_codes == [0]


def test_a_setting_is_passed_on_to_sbatch(run):
    """It replaces what a flag or submitit sets."""
    keys = ("account", "cpus_per_gpu", "exclude", "mail_type", "mem", "qos", "time", "tmpfs")
    script = run("--dry_run", "--partition", "a", *(part for key in keys for part in ("--slurm", f"{key}=7")))
    assert [key for key in keys if f"#SBATCH --{key.replace('_', '-')}=7\n" not in script] == []
    assert script.count("#SBATCH --time=") == 1


def test_an_error_of_sbatch_is_printed_once(run, tool, tmp_path):
    tool("sbatch", "echo 'sbatch: error: invalid partition: moon' >&2\n"
         "echo 'sbatch: error: Batch job submission failed' >&2\nexit 1")  # fmt: skip
    output = run("--partition", "moon", "--shared_dir", tmp_path / "jobs", fails=True)
    assert output.endswith("error: sbatch rejects the job: invalid partition: moon; Batch job submission failed")
    assert output.count("moon") == 1


@pytest.mark.slow
def test_a_local_job_runs_the_submitted_code(pictures, tmp_path):
    """In two processes, although the code and the recipe change after the submission."""
    clone, _ = code_copy.make(tmp_path / "clones", None)
    (clone / "mine.yaml").write_text("epochs: 3\n")
    flags = small_job(
        pictures, "--config", "mine.yaml", "--cluster", "local", "--ngpus", 2, "--batch_size", 2, "--shared_dir",
        tmp_path / "jobs", "--output_dir", tmp_path / "run%j",
    )  # fmt: skip
    with (tmp_path / "told").open("w") as output:  # the job also has the file open
        command = [sys.executable, "submitit_pretrain.py", *flags]
        subprocess.run(command, cwd=clone, stdin=subprocess.DEVNULL, stdout=output, check=True, timeout=120)
    for file in (clone / "mine.yaml", *clone.glob("*.py"), *clone.glob("mae/*.py")):
        file.write_text("this is edited")
    output = (tmp_path / "told").read_text()
    number = re.findall(r"job (\d+) is started", output)[0]
    out, log = tmp_path / f"run{number}", tmp_path / f"jobs/{number}/{number}_0_log.out"
    assert f"results  {out}\n" in output and str(log) in output
    wait_until(lambda: log.exists() and "Exiting after successful completion" in log.read_text())
    assert len(lines(out)) == 3
    assert "2 processes" in log.read_text()
    assert "ngpus=" not in log.read_text()  # settings of the run, not of the job


@pytest.mark.slow
def test_a_local_job_resumes_after_its_time_limit(pictures, tmp_path):
    flags = small_job(pictures, "--epochs", 25, "--cluster", "local", "--job_dir", tmp_path / "job", "--wait")
    job = start(*flags)
    wait_until(lambda: (tmp_path / "job/log.txt").exists() and len(lines(tmp_path / "job")) > 1)
    os.kill(int(re.findall(r"process (\d+) on", (tmp_path / "job/run.lock").read_text())[0]), signal.SIGUSR2)
    assert "succeeded" in job.communicate(timeout=120)[0]
    assert job.returncode == 0
    [log] = (tmp_path / "job").glob("*_0_log.out")
    assert "resuming from" in log.read_text()
    assert log.read_text().count("Starting with JobEnvironment") == 2
    assert [line["epoch"] for line in lines(tmp_path / "job")] == list(range(25))


@pytest.mark.slow
def test_wait_fails_if_the_job_fails(pictures, tmp_path):
    """The error of submitit names the log, which ends with the reason."""
    flags = small_job(pictures, "--data_path", "/nowhere", "--cluster", "local", "--shared_dir", tmp_path, "--wait")
    job = start(*flags)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 1 and "main_pretrain.py failed" in output
    [log] = tmp_path.glob("*/*_0_log.out")
    assert str(log) in output and "main_pretrain.py: error: data_path=/nowhere: " in log.read_text()


@pytest.mark.slow
def test_debug_runs_in_this_process(pictures, tmp_path):
    flags = small_job(pictures, "--epochs", 1, "--cluster", "debug", "--job_dir", tmp_path / "%j")
    job = start(*flags)
    assert "epoch 0 done" in job.communicate(timeout=120)[0]
    assert job.returncode == 0
    [out] = tmp_path.glob("DEBUG_*")
    assert len(lines(out)) == 1


@pytest.mark.parametrize(
    ("cluster", "state", "cancel"), [("slurm", "squeue --job", "scancel"), ("local", "ps", "kill")]
)
def test_instructions_follow_and_cancel_a_job(cluster, state, cancel, capsys):
    submit.print_instructions(cluster, "42", Path("/my logs/42.out"), "/out")
    results, follow, watch, stop = (line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1:5])
    assert (results, follow, watch) == ("/out", "tail -F '/my logs/42.out'", f"{state} 42")
    assert stop.startswith(f"{cancel} 42 ")


def test_code_snapshots_are_named_by_their_content(tmp_path, monkeypatch):
    copy, recipe = code_copy.make(tmp_path, None)
    assert recipe is None
    assert code_copy.make(tmp_path, None)[0] == copy
    assert {"main_pretrain.py", "mae/jobs/submit.py", "recipes/pretrain_vit_large.yaml"} <= {
        file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()
    }
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    other, recipe = code_copy.make(tmp_path, str(tmp_path / "mine.yaml"))
    assert other != copy and recipe.read_text() == "epochs: 3\n"
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(code_copy, "ROOT", tmp_path / "source")
    copies = {}
    for text in ("lr = 1\n", "lr = 2\n"):  # of equal length
        (tmp_path / "source/main.py").write_text(text)
        copies[text] = code_copy.make(tmp_path / "code", None)[0] / "main.py"
    assert [copies[text].read_text() for text in copies] == list(copies)


@pytest.mark.parametrize(("states", "signum", "count"), [
    (["RUNNING"], signal.SIGTERM, 1),  # scancel --signal=TERM, or a preemption with a grace time
    (["COMPLETING"], signal.SIGTERM, 0),  # scancel, or scontrol requeue
    (["RUNNING"], signal.SIGUSR2, 1),
    (["COMPLETING"], signal.SIGUSR2, 0),  # canceled while the run saves its state after the first signal
    (["", "RUNNING"], signal.SIGTERM, 1),  # Slurm does not answer at first
    ([""], signal.SIGTERM, 0),
])  # fmt: skip
def test_a_slurm_job_is_requeued_if_it_still_runs(monkeypatch, tmp_path, tool, handlers, states, signum, count):
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    # Answers the first line of the file; the last one stays.
    tool("squeue", f"""cd {tmp_path}
read state < states
[ $(wc -l < states) = 1 ] || sed -i 1d states
[ "$state" ] || exit 1
echo $state $4 >> asked
echo $state""")  # fmt: skip
    now, requeues = [0.0], []
    monkeypatch.setattr(submit.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(submit, "is_submitits", lambda signum: True)
    signal.signal(signal.SIGTERM, lambda *_: requeues.append("SIGTERM"))
    signal.signal(signal.SIGUSR2, lambda signum, _: requeues.append(signum))
    with pytest.raises(SystemExit, match=f"stopped by {signum.name}, the state is saved"):
        submit.stop_job(SimpleNamespace(cluster="slurm", global_rank=0, job_id="42"), signum, requeue=True)
    assert requeues == [signum] * count
    if states[-1]:
        assert (tmp_path / "asked").read_text() == f"{states[-1]} --jobs=42\n"
