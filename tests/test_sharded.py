"""Runs with --fsdp: losses equal to those of one process, and complete checkpoints."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from functools import partial

import forks
import pytest
import torch
import torch.distributed as td
from mains import in_processes, lines, small_run, wait_until
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mae import parallel
from mae.checkpoints import checkpoint, run_directory, run_state, shard_files, sharded_state
from mae.checkpoints.checkpoint import CheckpointError
from mae.training import fsdp, resume
from models_mae import mae_vit_mini_patch4

# 24 images are one update per epoch, so that log.txt contains the loss of each of the 30 updates.
STEPS = ("--epochs", 30, "--save_every", 12)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)  # of tensors, also in dictionaries


@pytest.fixture
def one_process():
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    yield
    parallel.teardown()


def sharded_model(seed, reverse=False):
    """A sharded model and its optimizer after an update. It may have its parameters in the opposite order."""
    torch.manual_seed(seed)
    model = mae_vit_mini_patch4(img_size=8)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": parameters[:5], "weight_decay": 0.0}, {"params": parameters[5:]}]
    if reverse:
        groups = [{"params": group["params"][::-1]} for group in groups[::-1]]
    optimizer = torch.optim.AdamW(groups)
    model(torch.rand(2, 3, 8, 8))[0].backward()
    optimizer.step()
    return model, optimizer


def moments_by_name(model, optimizer):
    return {
        name: {key: getattr(value, "_local_tensor", value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def test_optimizer_states_are_written_and_read_by_name(one_process, tmp_path):
    """The order of the parameters in the optimizer may differ."""
    model, optimizer = sharded_model(seed=0)
    scaler, folder = torch.amp.GradScaler("cpu"), tmp_path / "checkpoint-3"
    state = {**run_state.collect(model, optimizer, scaler, {"model": "mini"}), "epoch": 3}
    sharded_state.write(checkpoint.snapshot(state), folder, group=None)
    contents = sharded_state.read(folder)
    saved_names = {name.rpartition(".")[0] for name in contents["tensors"] if name.startswith("optimizer.")}
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert saved_names == {f"optimizer.{name}" for name in names}
    other, other_optimizer = sharded_model(seed=1, reverse=True)
    contents["optimizer"]["param_groups"][0]["estimate"] = 7.0  # of an optimizer such as Prodigy
    filled = sharded_state.fill(contents, other, other_optimizer)
    assert filled["optimizer"]["param_groups"][0].pop("estimate") == 7.0
    assert filled.keys() == state.keys()
    resume.restore_model(other, filled, {})
    resume.restore_optimizer(other_optimizer, filled["optimizer"])
    assert_equal(moments_by_name(other, other_optimizer), moments_by_name(model, optimizer))
    assert_equal(*({k: v.full_tensor() for k, v in kind.state_dict().items()} for kind in (other, model)))


def test_the_state_of_an_optimizer_may_have_numbers(one_process, tmp_path):
    """As those of many optimizers in timm."""
    model, optimizer = sharded_model(seed=0)
    for number, state in enumerate(optimizer.state.values()):
        state["count"] = number
    expected = moments_by_name(model, optimizer)
    state = run_state.collect(model, optimizer, torch.amp.GradScaler("cpu"), {})
    sharded_state.write(checkpoint.snapshot(state), tmp_path / "checkpoint-0", group=None)
    gathered = sharded_state.gather(tmp_path / "checkpoint-0")["optimizer"]["state"]
    assert sorted(moments["count"] for moments in gathered.values()) == list(range(len(optimizer.state)))
    other, other_optimizer = sharded_model(seed=1, reverse=True)
    filled = sharded_state.fill(sharded_state.read(tmp_path / "checkpoint-0"), other, other_optimizer)
    resume.restore_optimizer(other_optimizer, filled["optimizer"])
    assert_equal(moments_by_name(other, other_optimizer), expected)
    state["optimizer"]["state"]["norm.weight"]["factors"] = [torch.zeros(2)]
    with pytest.raises(ValueError, match=r"`fsdp` .*factors"):
        sharded_state.write(checkpoint.snapshot(state), tmp_path / "checkpoint-1", group=None)


def test_an_optimizer_without_a_step_is_saved_as_it_is(one_process, tmp_path):
    model, _ = sharded_model(seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = run_state.collect(model, optimizer, torch.amp.GradScaler("cpu"), {})
    assert (state["optimizer"]["state"], optimizer.state) == ({}, {})
    sharded_state.write(checkpoint.snapshot(state), tmp_path / "checkpoint-0", group=None)
    filled = sharded_state.fill(sharded_state.read(tmp_path / "checkpoint-0"), model, optimizer)
    assert filled["optimizer"]["state"] == {}


def test_every_type_of_tensor_is_written_and_read(one_process, tmp_path):
    """PyTorch's metadata name its private classes, all of which `DESCRIBED_BY` must list."""
    types = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)  # fmt: skip
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in types}
    state = {"model": tensors, "optimizer": {"state": {}, "param_groups": []}, "args": {}}
    sharded_state.write(state, tmp_path / "checkpoint-0", group=None)
    assert_equal(sharded_state.gather(tmp_path / "checkpoint-0")["model"], {k: v.float() for k, v in tensors.items()})
    reader = shard_files.ShardReader(tmp_path / "checkpoint-0")
    described = reader.read_metadata().state_dict_metadata
    assert {name: tensor.properties.dtype for name, tensor in described.items()} == {
        f"model.{dtype}": dtype for dtype in types
    }


def losses(out):
    return {line["epoch"]: line["train_loss"] for line in lines(out)}


def relative_error(out, single):
    expected = losses(single)
    return max(abs(value / expected[epoch] - 1) for epoch, value in losses(out).items())


@pytest.fixture(scope="module")
def single(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    in_processes(1, pictures, out, "--batch_size", 24, *STEPS)
    return out


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory):
    """The same run, sharded over two processes."""
    out = tmp_path_factory.mktemp("shards") / "run"
    in_processes(2, pictures, out, "--batch_size", 12, "--fsdp", *STEPS)
    return out


@pytest.mark.slow
def test_fsdp_losses_equal_those_of_one_process(shards, single):
    assert len(losses(shards)) == 30
    assert relative_error(shards, single) < 1e-5
    assert [path.name for path in run_directory.checkpoints(shards)] == [f"checkpoint-{n}" for n in (0, 12, 24, 29)]


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_in_one_process(shards, single, pictures, tmp_path):
    flags = ("--batch_size", 24, "--resume", shards / "checkpoint-12", *STEPS)
    in_processes(1, pictures, tmp_path / "run", *flags)
    assert min(losses(tmp_path / "run")) == 13
    assert relative_error(tmp_path / "run", single) < 1e-5


@pytest.mark.slow
def test_a_file_checkpoint_resumes_with_fsdp_bf16_and_accumulation(single, pictures, tmp_path):
    state = single / "checkpoint-24.pth"
    flags = ("--batch_size", 4, "--accum_iter", 3, "--fsdp", "--clip_grad", 5, "--resume", state, *STEPS)
    in_processes(2, pictures, tmp_path / "run", "--grad_checkpointing", "--amp", "bf16", *flags)
    assert min(losses(tmp_path / "run")) == 25
    assert relative_error(tmp_path / "run", single) < 1e-2  # bf16 compared with fp32


@pytest.mark.slow
def test_the_command_converts_to_a_file(shards, single, tmp_path):
    file = tmp_path / "plain.pth"
    output = forks.run("mae/checkpoints/sharded.py", [shards / "checkpoint-29", file], tmp_path / "output")
    assert output.startswith(f"{file}: give it as `resume`")
    assert len(output.splitlines()) == 1
    state, reference = checkpoint.read(file), checkpoint.read(single / "checkpoint-29.pth")
    assert (state.keys(), list(state["model"])) == (reference.keys(), list(reference["model"]))
    assert state["progress"].keys() == reference["progress"].keys()
    for name, weight in reference["model"].items():
        torch.testing.assert_close(state["model"][name], weight, rtol=1e-3, atol=1e-3)
    moments, expected = state["optimizer"]["state"], reference["optimizer"]["state"]
    assert moments.keys() == expected.keys()
    assert all(moments[n][k].shape == expected[n][k].shape for n in expected for k in expected[n])
    mae_vit_mini_patch4(img_size=16).load_state_dict(state["model"])
    with pytest.raises(CheckpointError, match="is already a plain checkpoint"):
        sharded_state.gather(file)


@pytest.mark.slow
def test_stopped_fsdp_runs_resume(shards, pictures, tmp_path):
    """After SIGTERM, after SIGKILL, and with a damaged newest checkpoint. Old checkpoints are removed."""
    out, flags = tmp_path / "run", ("--batch_size", 12, "--fsdp", "--save_minutes", 0.02, *STEPS, "--keep_last", 2)
    command = small_run(pictures, out, *flags, "--resume", "auto")
    for signum, epochs, code in ((signal.SIGTERM, 6, 128 + 15), (signal.SIGKILL, 15, -9)):
        run = forks.Forks("main_pretrain.py", command, tmp_path / f"{signum}.output", 2)
        wait_until(lambda epochs=epochs: (out / "log.txt").exists() and len(lines(out)) >= epochs)
        if signum == signal.SIGKILL:
            run.signal(signal.SIGSTOP)  # else the second process may end because the first one has ended
        run.signal(signum)
        assert run.wait(60) == [code, code]
    newest = run_directory.newest_first(out)[0]
    (newest / "__1_0.distcp").unlink()  # which process 0 does not read
    output = in_processes(2, pictures, out, *flags, "--resume", "auto")
    assert (output.count(f"resume=auto skips {newest.name}: "), losses(out)) == (1, losses(shards))
    assert run_directory.milestones(out) == [out / "checkpoint-24", out / "checkpoint-29"]
    state, reference = sharded_state.gather(out / "checkpoint-29"), sharded_state.gather(shards / "checkpoint-29")
    assert all(torch.equal(state["model"][name], reference["model"][name]) for name in reference["model"])


def rewritten(folder, **entries):
    """Changes entries of the state in a checkpoint."""
    state = {name: value for name, value in checkpoint.read(folder).items() if name != "folder"}
    checkpoint.write({**state, **entries}, folder / "state.pth")


@pytest.mark.slow
def test_a_checkpoint_that_names_a_device_or_a_pipe_is_refused(shards, tmp_path):
    """Reading them would never end."""
    folder = shutil.copytree(shards / "checkpoint-0", tmp_path / "checkpoint-0")
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "link").symlink_to(folder / "pipe")
    files = checkpoint.read(folder)["files"]
    for name in ("pipe", "zero", "link"):
        rewritten(folder, files=files | {name: "0"})
        output = tmp_path / f"{name}.output"
        assert forks.Forks("mae/checkpoints/sharded.py", [folder, tmp_path / "a.pth"], output).wait(60) == [1]
        (line,) = output.read_text().splitlines()
        assert re.search(rf"{folder} is refused, or is damaged: .*not a regular file", line), line


class Call:
    """Is pickled as a call, like members of an enumeration by Python 3.11.0 to 3.11.3."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def call_by_name(name: str, module: str = "torch.distributed.checkpoint.filesystem") -> bytes:
    """Returns a pickle that creates a directory through a name in a module of PyTorch."""
    code = f"{module}\n{name}\n".encode()
    return pickle.PROTO + b"\x04" + b"".join(
        pickle.BINUNICODE + len(part).to_bytes(4, "little") + part for part in code.splitlines()
    ) + pickle.STACK_GLOBAL + pickle.dumps(("done",), 0)[:-1] + pickle.REDUCE + pickle.STOP  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("content", [
    Call(os.mkdir, "done"), {"x": Call(os.mkdir, "done")}, print, torch.load, "os.mkdir", "FileSystem.mkdir",
    "Path.mkdir", "Path.__class__", "FileSystemWriter",
])  # fmt: skip
def test_metadata_execute_no_code(content, shards, tmp_path, monkeypatch):
    """Even with a correct digest. Strings are names that are reachable from modules of PyTorch."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(shards / "checkpoint-0", tmp_path / "checkpoint-0")
    evil = call_by_name(content) if isinstance(content, str) else pickle.dumps(content)
    (folder / ".metadata").write_bytes(evil)
    rewritten(folder, files=checkpoint.read(folder)["files"] | sharded_state.digests_of([folder / ".metadata"]))
    with pytest.raises(CheckpointError, match="is refused"):
        sharded_state.gather(folder)
    assert not (tmp_path / "done").exists()


def test_metadata_of_older_pythons_are_read():
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    content = pickle.dumps(Call(getattr, encoding, "TORCH_CHANNELS_LAST"))
    assert shard_files.MetadataUnpickler(io.BytesIO(content)).load() is encoding.TORCH_CHANNELS_LAST
    for kind, name in ((torch.Size, "numel"), (encoding, "__class__"), (encoding, "mro")):
        with pytest.raises(CheckpointError, match=rf"'{name}'.*could run code"):
            shard_files.MetadataUnpickler(io.BytesIO(pickle.dumps(Call(getattr, kind, name)))).load()


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [[], {}, {"param_groups": 3}, {"param_groups": [["params"]]}, {"param_groups": [{"params": 3}]}]
)
def test_unknown_metadata_are_a_one_line_error(optimizer, shards, tmp_path):
    folder = shutil.copytree(shards / "checkpoint-0", tmp_path / "checkpoint-0")
    rewritten(folder, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="checkpoint-0"):
        sharded_state.gather(folder)
    (folder / "state.pth").unlink()
    with pytest.raises(CheckpointError, match="checkpoint"):
        sharded_state.gather(folder)


@pytest.mark.slow
def test_an_interrupted_rename_leaves_a_readable_checkpoint(shards, tmp_path):
    """The previous checkpoint is read under its temporary name. Incomplete checkpoints are ignored."""
    shutil.copytree(shards / "checkpoint-12", tmp_path / ".checkpoint-last.old")
    shutil.copytree(shards / "checkpoint-24", tmp_path / ".checkpoint-last.tmp")
    (tmp_path / "checkpoint-29").mkdir()
    assert resume.read_newest(tmp_path)["epoch"] == 12
    with pytest.raises(FileNotFoundError):  # a second crash, in the same place
        sharded_state.replace_folder(tmp_path / "gone", tmp_path / "checkpoint-last")
    assert resume.read_newest(tmp_path)["epoch"] == 12
    sharded_state.replace_folder(tmp_path / ".checkpoint-last.tmp", tmp_path / "checkpoint-last")
    assert resume.read_newest(tmp_path)["epoch"] == 24
    assert not (tmp_path / ".checkpoint-last.old").exists()


READ_NEWEST = """
import json, logging, sys
from pathlib import Path
from mae import parallel; from mae.checkpoints import run_state; from mae.training import log, resume
parallel.init("cpu")
log.start_logging()
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    state = resume.read_newest(folder)
    found[folder.name] = state and state["epoch"]
Path(sys.argv[2] + str(parallel.rank())).write_text(json.dumps(found))
"""


def in_two_processes(script, tmp_path, *arguments):
    return forks.run_code(script + "parallel.teardown()\n", tmp_path, *arguments, count=2)


@pytest.mark.slow
def test_resume_auto_uses_the_previous_checkpoint_if_the_newest_is_damaged(shards, tmp_path):
    """For every damaged file, both processes use the same older checkpoint, and one warning names the damaged one."""
    newest, runs = shards / "checkpoint-29", tmp_path / "runs"
    for name in sorted(path.name for path in newest.iterdir()):
        for damage in ("changed", "cut", "missing"):
            if (name, damage) == ("state.pth", "missing"):
                continue  # a folder without this file is not a checkpoint
            run = runs / f"{name} {damage}"
            for folder in ("checkpoint-0", "checkpoint-24", "checkpoint-29"):
                shutil.copytree(shards / folder, run / folder)
            data = bytearray((newest / name).read_bytes())
            data[len(data) // 2] ^= 1
            (run / newest.name / name).write_bytes(data if damage == "changed" else data[: len(data) // 2])
            if damage == "missing":
                (run / newest.name / name).unlink()
    output = in_two_processes(READ_NEWEST, tmp_path, runs, tmp_path / "found")
    epochs = [json.loads((tmp_path / f"found{rank}").read_text()) for rank in (0, 1)]
    assert (len(epochs[0]), epochs) == (11, [dict.fromkeys(epochs[0], 24)] * 2)
    for run in sorted(runs.iterdir()):
        warnings = [line for line in output.splitlines() if "skips" in line and f"{run.name}/" in line]
        assert len(warnings) == 1
        assert "resume=auto skips checkpoint-29: " in warnings[0]
        assert run.name.split()[0] in warnings[0]  # the damaged file
        assert re.search(r"is damaged|is refused: ", warnings[0])


FULL = """
import logging, os, sys
from pathlib import Path
import torch
from mae import parallel; from mae.training import log
from mae.interrupts import Interrupts
from mae.checkpoints.run_state import Progress
from mae.training.saver import ShardedSaver
parallel.init("cpu")
log.start_logging()
place, size = Path(sys.argv[1]), {}
def collect():
    model = {"rank%d" % parallel.rank(): torch.zeros(size["mine"] // 4)}
    return {"model": model, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "args": {}, "rng": {}}
progress = Progress(2, 2)
def save(epoch, *sizes):
    saver = ShardedSaver(Interrupts(), place, collect, progress, epochs=50, save_every=1, save_minutes=0)
    size["mine"] = sizes[parallel.rank()]
    saver.save_epoch(epoch, accuracy=epoch)
    failed = saver.writing.exception()
    saver.close()
    names = sorted(path.name for path in place.iterdir() if path.name != "filler")
    assert len(set(parallel.gather(str(failed)))) == 1, parallel.gather(str(failed))
    return failed, names
both = ["checkpoint-0", "checkpoint-best"]
assert save(0, 1000, 1000) == (None, both)
for sizes in ((3_000_000, 1000), (1000, 3_000_000), (3_000_000, 3_000_000)):
    failed, names = save(1, *sizes)
    assert isinstance(failed, OSError) and "No space left on device" in str(failed), failed
    assert f"can't write {place}/checkpoint-1 (" in str(failed), failed
    assert names == both
for pages in (1, 2, 3):  # no space for the tensors of one process, for the metadata, for the other state
    if parallel.is_main():
        with (place / "filler").open("wb") as file:
            file.write(bytes(os.statvfs(place).f_bavail * 4096 - 4096 * pages))
    parallel.barrier()
    failed, names = save(1, 1000, 1000)
    assert "No space left on device" in str(failed) and names == both, (failed, names)
    if parallel.is_main():
        (place / "filler").unlink()
    parallel.barrier()
assert save(2, 1000, 1000) == (None, ["checkpoint-0", "checkpoint-2", "checkpoint-best"])
"""


def test_a_full_disk_leaves_only_complete_checkpoints(tmp_path, small_disk):
    """A full disk in one or both of two processes: both raise the same error, which names the folder."""
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    output = in_two_processes(FULL, tmp_path, small_disk)
    assert output.count(f"can't write {small_disk}/checkpoint-1 (") == 6  # by rank 0
    assert run_directory.newest_first(small_disk)[0] == small_disk / "checkpoint-best"
    assert sharded_state.gather(small_disk / "checkpoint-2")["model"].keys() == {"rank0"}


@pytest.mark.slow
def test_sharded_errors_are_one_line(shards, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"`fsdp` .*amp=bf16"):
        fsdp.shard(mae_vit_mini_patch4(), [], torch.device("cpu"), torch.float16, "reconstruct")
    model = mae_vit_mini_patch4(img_size=32)
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {"model": "mae_vit_mini_patch4"}
    with pytest.raises(CheckpointError, match="another architecture"):
        resume.restore_run(str(shards / "checkpoint-0"), tmp_path, model, optimizer, torch.amp.GradScaler("cpu"),
                        settings, run_state.Progress(24, 24, num_images=24))  # fmt: skip


def test_ddp_losses_equal_those_of_one_process(single, pictures, tmp_path):
    in_processes(2, pictures, tmp_path / "run", "--batch_size", 4, "--accum_iter", 3, *STEPS)
    assert len(losses(tmp_path / "run")) == 30
    assert relative_error(tmp_path / "run", single) < 1e-5


@pytest.mark.slow
def test_damaged_checkpoints_are_rejected(shards, tmp_path):
    files = [path.name for path in (shards / "checkpoint-0").iterdir()]
    assert len(files) == 4  # tensors of two processes, metadata, other state
    for name in files:
        file = shutil.copytree(shards / "checkpoint-0", tmp_path / name / "checkpoint-0") / name
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.parent.name):
            sharded_state.gather(file.parent)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.parent.name):
            sharded_state.gather(file.parent)


INITIALIZE = """
import copy, pytest, sys, torch, models_mae
from torch import nn
from mae import parallel; from mae.training import fsdp; from mae.weights import loading
device = parallel.init("cpu")
def shard(build, **arguments):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build(**arguments)
    fsdp.shard(model, [*model.blocks, *model.decoder_blocks], device, None, "reconstruct")
    return model
def compare(model, expected):
    ours = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    assert all(not parameter.to_local().is_meta for parameter in model.parameters())
for arguments in ({}, {"patch_size": 8, "in_chans": 1, "embed_dim": 100, "decoder_embed_dim": 60},
                  {"num_cls_tokens": 3, "learned_pos_embed": True}):
    model = shard(models_mae.mae_vit_mini_patch4, **arguments)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    whole = models_mae.mae_vit_mini_patch4(**arguments)
    assert torch.equal(after, torch.get_rng_state())
    compare(model, dict(whole.named_parameters()))
model = shard(models_mae.mae_vit_mini_patch4, img_size=16)
file = loading.read(sys.argv[1])
assert (file.kind, file.settings["model"]) == ("encoder and decoder", "mae_vit_mini_patch4")
loading.init_mae(model, file)
compare(model, file.tensors)
imgs, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
plain = models_mae.mae_vit_mini_patch4(img_size=16)
loading.init_mae(plain, file)
torch.testing.assert_close(model.reconstruct(imgs, noise=noise), plain.reconstruct(imgs, noise=noise))  # gathers first
class Scaled(models_mae.MaskedAutoencoderViT):
    def __init__(self, **arguments):
        super().__init__(depth=1, embed_dim=32, decoder_depth=1, decoder_embed_dim=32)
        self.gamma = nn.Parameter(torch.ones(7))
class Teaches(Scaled):
    def __init__(self, **arguments):
        super().__init__()
        self.register_buffer("kernel", torch.arange(3.0))
        self.teacher = copy.deepcopy(self.blocks)
for kind, name in ((Scaled, "gamma"), (Teaches, "kernel")):
    with pytest.raises(ValueError, match=name):
        shard(kind)
torch.manual_seed(3)
whole = Teaches()
model = copy.deepcopy(whole)
fsdp.shard(model, [*model.blocks, *model.decoder_blocks], device, None, "reconstruct")
compare(model, dict(whole.named_parameters()))
assert torch.equal(model.kernel, torch.arange(3.0))
"""


@pytest.mark.slow
def test_sharded_initial_weights_equal_those_of_one_process(shards, tmp_path):
    """The weights are bit-equal, and so is the state of the random generator. Weights from a file are equal too."""
    in_two_processes(INITIALIZE, tmp_path, shards / "checkpoint-29")


MEMORY = """
import resource, torch, torch._dynamo, models_mae  # imported here, before the memory of weights is measured
from mae import parallel; from mae.training import fsdp
device = parallel.init("cpu")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with torch.device("meta"):
    model = models_mae.mae_vit_base_patch16(img_size=32)
fsdp.shard(model, [*model.blocks, *model.decoder_blocks], device, None, "reconstruct")
started, numel = peak() - before, sum(p.numel() for p in model.parameters())
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
model(torch.rand(1, 3, 32, 32))[0].backward()
optimizer.step()
moments = [value for state in optimizer.state.values() for value in state.values()]
gradients = [p.grad for p in model.parameters() if p.grad is not None]
held = [getattr(t, "_local_tensor", t) for t in (*model.parameters(), *gradients, *moments)]
pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
parts = sum(pieces.values())
# One process has 15.9 bytes for each parameter: the parameter, and if it is trained, its gradient and two moments.
assert numel > 100_000_000 and 7 * numel < parts <= 0.62 * 15.9 * numel, (parts, numel)
assert started <= 0.75 * 4 * numel, (started, numel)
"""


@pytest.mark.slow
def test_fsdp_halves_the_memory_of_each_process(tmp_path):
    """Parameters, gradients and optimizer states; and the peak memory of the construction."""
    in_two_processes(MEMORY, tmp_path)
