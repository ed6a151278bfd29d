"""Processes and devices."""

import os
import subprocess

import pytest
import torch
from conftest import ROOT, torchrun
from mains import in_processes

from util import dist


def test_one_process_needs_no_launcher():
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    model = torch.nn.Linear(2, 2)
    assert dist.wrap(model, torch.device("cpu")) is model
    value = torch.tensor(3.0)
    assert dist.mean_over_processes(value) is value
    dist.barrier()
    with dist.gradient_sync(model, enabled=False):
        pass


def test_devices():
    assert dist.choose_device("cpu") == torch.device("cpu")
    assert dist.choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("abacus", "meta", "cuda:x"):
        with pytest.raises(ValueError, match="give auto, cpu, cuda, cuda:N or mps"):
            dist.choose_device(name)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no MPS device"):
            dist.choose_device("mps")


def test_cuda_devices_have_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert dist.init("auto") == dist.init("cuda") == torch.device("cuda", 0)
    assert dist.init("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.init("auto") == torch.device("cuda", 1)
    assert {device.index for device in chosen} == {0, 1}
    with pytest.raises(ValueError, match="needs CUDA device 2, and there are 2 here"):
        dist.init("cuda:2")


def test_half_an_environment_is_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is not: start several processes with torchrun"):
        dist.init("cpu")


CODE = """
import torch
from util import dist

def main(device):
    model = dist.wrap(torch.nn.Linear(1, 1, bias=False), device)
    x = torch.full((1, 1), dist.rank() + 1.0)
    with dist.gradient_sync(model, enabled=False):
        model(x).sum().backward()
    alone = model.module.weight.grad.item()
    with dist.gradient_sync(model, enabled=True):
        model(x).sum().backward()
    mean = dist.mean_over_processes(torch.tensor(float(dist.rank())))
    line = f"{dist.rank()}/{dist.world_size()} {alone} {model.module.weight.grad.item()} {mean.item()}"
    open(f"out{dist.rank()}", "w").write(line)

main(dist.init("cpu"))
dist.teardown()
"""


def test_two_processes_average_only_when_told(tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    subprocess.run(
        [*torchrun(2), "code.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True,
        timeout=120,
    )  # fmt: skip
    # Gradients 1 and 2 stay apart without a sync; the sync averages all that was gathered: (2 + 4) / 2.
    assert (tmp_path / "out0").read_text() == "0/2 1.0 3.0 0.5"
    assert (tmp_path / "out1").read_text() == "1/2 2.0 3.0 0.5"


def test_nothing_is_warned_of(pictures, tmp_path):
    flags = ("--batch_size", 12, "--in_chans", 1, "--epochs", 1)
    assert b"warning" not in in_processes(2, pictures, tmp_path / "run", *flags).stdout.lower()


STEP = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "40017", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; what is set beside them is taken back too."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ.update


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-04]", "gpu03"), ("n1", "n1"), ("a1,b2", "a1"), ("c[7,9-10]", "c7"), ("x-0-1", "x-0-1")],
)
def test_srun_starts_processes_too(environment, nodes, first):
    environment(STEP | {"SLURM_STEP_NODELIST": nodes})
    dist._translate_srun()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == first
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000


def test_a_batch_script_or_a_shell_in_an_allocation_is_one_process(environment):
    environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    dist._translate_srun()
    assert "WORLD_SIZE" not in os.environ
    environment(STEP | {"SLURM_STEP_NUM_TASKS": "1"})  # the shell that salloc opens as a step
    dist._translate_srun()
    assert "WORLD_SIZE" not in os.environ


def test_torchrun_within_a_step_counts(environment):
    environment(STEP | {"WORLD_SIZE": "2", "RANK": "0"})
    dist._translate_srun()
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("2", "0")


def test_backends(monkeypatch):
    assert dist.init("cpu", backend="gloo") == torch.device("cpu")
    with pytest.raises(ValueError, match="--dist_backend nccl connects GPUs, and the device is cpu"):
        dist.init("cpu", backend="nccl")


def test_a_launcher_that_starts_a_run_again(monkeypatch):
    assert not dist.restarted()
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as again:
            again.setenv(name, "0")
            assert not dist.restarted()
            again.setenv(name, "2")
            assert dist.restarted()
