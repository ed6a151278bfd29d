"""Processes and devices."""

import os
import socket

import forks
import pytest
import torch
from mains import in_processes, small_run, wait_until

from mae import parallel


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ.update


def test_devices():
    for name in ("abacus", "meta", "cuda:x"):
        with pytest.raises(ValueError, match="device"):
            parallel.choose_device(name)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="device=mps"):
            parallel.choose_device("mps")
    assert parallel.init("cpu", backend="gloo") == torch.device("cpu")


def test_cuda_devices_have_a_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert parallel.init("auto") == parallel.init("cuda") == torch.device("cuda", 0)
    assert parallel.init("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (parallel.init("auto"), {device.index for device in chosen}) == (torch.device("cuda", 1), {0, 1})
    with pytest.raises(ValueError, match="device 2"):
        parallel.init("cuda:2")


# As srun sets them on a node with four GPUs (measured with --gpus-per-node=4, --gpus-per-task, and --gpu-bind).
SHARED = {"SLURM_STEP_GPUS": "0-3", "SLURM_GPUS_ON_NODE": "4"}
ONE_EACH = {"SLURM_STEP_GPUS": "3", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    ("visible", "variables", "device"),
    [
        (4, SHARED, 3),
        (1, ONE_EACH, 0),
        (1, {"SLURM_GPUS_PER_TASK": "1"}, 0),
        (2, {"SLURM_STEP_GPUS": "6,7", "SLURM_GPUS_ON_NODE": "8"}, 1),
        (4, {"SLURM_GPUS_PER_TASK": "1"}, 3),  # with --gpu-bind=none, tasks see each other's
        (1, {"SLURM_STEP_GPUS": "0", "SLURM_GPUS_ON_NODE": "1"}, None),  # four tasks for one GPU
        (1, {}, None),  # torchrun --nproc_per_node 4, or a cluster without GRES
        (1, {"SLURM_GPUS_PER_TASK": "1", "SLURM_LOCALID": "0"}, None),  # torchrun in a task
    ],
)
def test_a_task_uses_the_gpus_assigned_by_slurm(monkeypatch, visible, variables, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    in_a_step = {"SLURM_LOCALID": "3"} if variables else {}
    for name, value in ({"LOCAL_RANK": "3"} | in_a_step | variables).items():
        monkeypatch.setenv(name, value)
    if device is None:
        with pytest.raises(ValueError, match="device 3"):
            parallel.choose_device("cuda")
    else:
        assert parallel.choose_device("cuda") == torch.device("cuda", device)
    assert parallel.choose_device("cuda:0") == torch.device("cuda", 0)  # which the message advises


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "40017", "SLURM_STEP_ID": "0"}  # fmt: skip
MISSING = "SLURM_STEP_ID, SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST"
TWO = {"WORLD_SIZE": "2"}


@pytest.mark.parametrize(("variables", "message"), [
    (TWO, "RANK"), (TWO | {"RANK": "0"}, "MASTER_ADDR"),
    ({name: value for name, value in STEP.items() if name not in MISSING},
     rf"SLURM_STEP_NUM_TASKS .* without {MISSING},")
])  # fmt: skip
def test_an_incomplete_launcher_environment_is_an_error(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message):
        parallel.init("cpu")


@pytest.mark.slow
def test_missing_processes_and_a_port_in_use_are_named(environment, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        environment({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        environment({"RANK": "1"})
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}"):
            parallel.init("cpu", timeout=1)
        taken.listen()
        environment({"RANK": "0"})
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}"):
            parallel.init("cpu", timeout=1)
    with pytest.raises(ValueError, match=f"127.0.0.1:{port}"):
        parallel.init("cpu", timeout=1)
    assert "frame #" not in capfd.readouterr().err  # PyTorch's backtraces


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_is_a_one_line_error_in_the_others(pictures, tmp_path, killed):
    """The processes are started without torchrun, which may end the other process before it prints its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    flags = small_run(pictures, tmp_path, "--batch_size", 2, "--epochs", 1000, "--num_workers", 1)
    files = [tmp_path / f"errors{number}" for number in range(2)]
    processes = [forks.Forks("main_pretrain.py", flags, tmp_path / "output",
                             environment=together | {"RANK": str(number)},
                             errors=file) for number, file in enumerate(files)]  # fmt: skip
    wait_until((tmp_path / "log.txt").exists)
    processes[killed].processes[0].kill()
    assert processes[1 - killed].wait(120) == [1]
    [line] = [line for line in files[1 - killed].read_text().splitlines() if "WARNING" not in line]
    assert line.startswith(f"main_pretrain.py: error: process {1 - killed} of 2 lost process {killed}; ")
    assert "--resume auto" in line


CODE = """
import os, time
import torch
from mae import parallel
def main(device):
    if parallel.rank() == 1:
        time.sleep(0.5)
        open("late", "w").close()
    parallel.barrier()
    met = os.path.exists("late")
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(5.0 + parallel.rank())
    parallel.share_buffers(norm)
    model = parallel.wrap(torch.nn.Linear(1, 1, bias=False), device)
    x = torch.full((1, 1), parallel.rank() + 1.0)
    with parallel.gradient_sync(model, enabled=False):
        model(x).sum().backward()
    alone = model.module.weight.grad.item()
    with parallel.gradient_sync(model, enabled=True):
        model(x).sum().backward()
    mean = parallel.mean_over_processes(torch.tensor(float(parallel.rank())))
    line = f"{parallel.rank()}/{parallel.world_size()} {alone} {model.module.weight.grad.item()} {mean.item()}"
    line += f" {met} {parallel.gather(parallel.rank() + 7)} {norm.running_mean.item()} {parallel.is_main()}"
    open(f"out{parallel.rank()}", "w").write(line)
main(parallel.init("cpu"))
parallel.teardown()
"""


def test_two_processes_average_gradients_on_demand_and_meet_at_a_barrier(tmp_path):
    forks.run_code(CODE, tmp_path, count=2)
    # Without a sync, gradients 1 and 2 stay separate; the sync averages the accumulated ones: (2 + 4) / 2.
    # The barrier waits for the late process; objects are in the order of ranks; buffers are those of rank 0.
    assert (tmp_path / "out0").read_text() == "0/2 1.0 3.0 0.5 True [7, 8] 5.0 True"
    assert (tmp_path / "out1").read_text() == "1/2 2.0 3.0 0.5 True [7, 8] 5.0 False"


OF_ONE = """
import sys, time
from mae import parallel
from mae.checkpoints.checkpoint import CheckpointError
calls, exchanges, gather = [], [], parallel.gather
parallel.gather = lambda value: exchanges.append(value) or gather(value)
parallel.EXCHANGE_SECONDS = 0.1
class Unpicklable(ValueError):
    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
def slow():
    calls.append(parallel.rank())
    time.sleep(0.5)
    return {"rank": parallel.rank()}
def fails(error):
    def compute():
        raise error
    return compute
parallel.init("cpu")
call = getattr(parallel, sys.argv[1])
line = f"{call(slow)} {calls} {len(exchanges) > 3}"
missing = OSError(2, "No such file", "list.txt")
for error in (CheckpointError("resume=x: no file"), missing, Unpicklable("dataset=x", "empty")):
    try:
        call(fails(error))
    except (OSError, ValueError) as caught:
        line += f"\\n{type(caught).__name__} {getattr(caught, 'filename', '')} {caught}"
open(f"out{parallel.rank()}", "w").write(line)
parallel.teardown()
"""


@pytest.mark.parametrize(("function", "returned"), [("from_rank_0", {"rank": 0}), ("once_per_machine", None)])
def test_one_process_computes_for_all(tmp_path, function, returned):
    """The exchanges keep a long call below the timeout of the process group. An error is raised in all processes."""
    forks.run_code(OF_ONE, tmp_path, function, count=2)
    errors = ["CheckpointError  resume=x: no file", "FileNotFoundError list.txt [Errno 2] No such file: 'list.txt'"]
    for rank, called in enumerate(([0], [])):
        lines = (tmp_path / f"out{rank}").read_text().splitlines()
        assert lines[:-1] == [f"{returned} {called} True", *errors]
        assert lines[-1].partition(" ")[2] == " dataset=x: empty"  # an exception that can't be pickled


def test_a_run_prints_no_warnings(pictures, tmp_path):
    flags = ("--batch_size", 12, "--in_chans", 1, "--epochs", 1, "--warmup_epochs", 0)
    output = in_processes(2, pictures, tmp_path / "run", *flags).lower()
    (said,) = [line for line in output.splitlines() if "warning:" in line]
    assert "measured runs needed" in said  # the run is short


UNUSED = """
from torch import nn
from models_mae import MaskedAutoencoderViT
class Unused(MaskedAutoencoderViT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.projection = nn.Linear(4, 4)
"""


def test_parameters_without_a_gradient_are_named_before_the_first_update(own_module, pictures, tmp_path):
    """PyTorch would update weights with gradients that are not averaged, and fail in the next forward pass, if any."""
    own_module("unused", UNUSED)
    one_update = ("--batch_size", 12, "--epochs", 1, "--warmup_epochs", 0, "--model_class", "unused:Unused")
    argv = small_run(pictures, tmp_path / "run", *one_update)
    assert 1 in forks.Forks("main_pretrain.py", argv, tmp_path / "output", 2).wait(60)
    errors = [line for line in (tmp_path / "output").read_text().splitlines() if "error: " in line]
    assert any("projection.weight, projection.bias" in line for line in errors)
    assert not list((tmp_path / "run").glob("*.pth"))


ONE_DIFFERS = """
import os, sys
import main_pretrain
from functools import partial
from PIL import Image
from mae.cli import entry_point
different, *sys.argv[1:] = sys.argv[1:]
is_other = os.environ["RANK"] == "1"
sys.argv += different.split() if is_other and different.startswith("--") else []
def images(split, data_path):
    return [(Image.new("RGB", (20, 20)), 0)] * (8 if is_other and different == "8 images" else 4)
entry_point.run(partial(main_pretrain.main, source=images), main_pretrain.get_args_parser())
"""


@pytest.mark.parametrize(("different", "message"), [
    ("--weight_decay 0.2", "weight_decay 0.2 instead of 0.05"), ("8 images", "images of an epoch 8 instead of 4"),
])  # fmt: skip
def test_processes_with_different_settings_are_an_error(different, message, tmp_path):
    """Each machine of a run has its own command and its own copy of the images."""
    (tmp_path / "own.py").write_text(ONE_DIFFERS)
    argv = [different, *small_run(tmp_path, tmp_path / "run", "--batch_size", 1, "--epochs", 1, "--warmup_epochs", 0)]
    assert forks.Forks(tmp_path / "own.py", argv, tmp_path / "output", 2).wait(60) == [1, 1]
    errors = [line for line in (tmp_path / "output").read_text().splitlines() if "error: process 1 has " in line]
    assert errors and all(message in line for line in errors)
    assert not list((tmp_path / "run").glob("*.pth"))


# The port is 20000 + 40017 % 12000.
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "24017"}


@pytest.mark.parametrize(("variables", "expected"), [
    *((STEP | {"SLURM_STEP_NODELIST": nodes}, TORCHRUN | {"MASTER_ADDR": first}) for nodes, first in (
        ("gpu[03-04]", "gpu03"), ("n1", "n1"), ("a1,b2", "a1"), ("c[7,9-10]", "c7"), ("x-0-1", "x-0-1"))),
    ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"WORLD_SIZE": None}),  # the script of sbatch
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": None}),  # the shell that salloc opens as a step
    (STEP | {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "0"}),  # torchrun within a step
    (STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29999"},
     {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29999", "RANK": "3"}),
])  # fmt: skip
def test_the_environment_of_srun_is_translated_for_several_tasks_without_a_launcher(environment, variables, expected):
    environment(variables)
    parallel.translate_srun()
    assert {name: os.environ.get(name) for name in expected} == expected
