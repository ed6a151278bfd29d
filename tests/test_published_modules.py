"""util/: a training script in the style of the published code, with its own loop, imports and runs."""

import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import assert_equal
from timm.optim import param_groups_weight_decay as timm_groups

import engine_finetune
import engine_pretrain
import models_mae
from mae.inference import get_model
from mae.training.nonfinite import NonFiniteLoss
from mae.training.optimizers import param_groups_weight_decay
from util import datasets, misc
from util.lr_sched import adjust_learning_rate
from util.pos_embed import get_2d_sincos_pos_embed, get_2d_sincos_pos_embed_from_grid

IMPORTS = """
import argparse
import sys

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, transforms

import models_mae
import util.lr_sched as lr_sched
import util.misc as misc
from util.misc import NativeScalerWithGradNormCount as NativeScaler
from util.pos_embed import get_2d_sincos_pos_embed
"""

LOOP = """
def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer, args):
    model.train(True)
    metric_logger = misc.MetricLogger(delimiter="  ")
    metric_logger.add_meter("lr", misc.SmoothedValue(window_size=1, fmt="{value:.6f}"))
    optimizer.zero_grad()
    for step, (samples, _) in enumerate(metric_logger.log_every(data_loader, 1, f"Epoch: [{epoch}]")):
        if step % args.accum_iter == 0:
            lr_sched.adjust_learning_rate(optimizer, step / len(data_loader) + epoch, args)
        loss, _, _ = model(samples.to(device), mask_ratio=0.75)
        value = loss.item()
        updates = (step + 1) % args.accum_iter == 0
        loss_scaler(loss / args.accum_iter, optimizer, parameters=model.parameters(), update_grad=updates)
        if updates:
            optimizer.zero_grad()
        metric_logger.update(loss=value)
        metric_logger.update(lr=optimizer.param_groups[0]["lr"])
        mean = misc.all_reduce_mean(value)
    metric_logger.synchronize_between_processes()
    print("Averaged stats:", metric_logger)
    return {name: meter.global_avg for name, meter in metric_logger.meters.items()}
"""

SCRIPT = """
args = argparse.Namespace(
    lr=1e-3, min_lr=0.0, epochs=2, warmup_epochs=1, accum_iter=2, mask_ratio=0.75, device="cpu", dist_url="env://",
    start_epoch=0, data_path=sys.argv[1], output_dir=sys.argv[2], resume=sys.argv[3], batch_size=2,
)
misc.init_distributed_mode(args)
torch.manual_seed(misc.get_rank())
transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
pictures = datasets.ImageFolder(args.data_path, transform)
sampler = torch.utils.data.DistributedSampler(pictures, misc.get_world_size(), misc.get_rank())
loader = torch.utils.data.DataLoader(pictures, sampler=sampler, batch_size=args.batch_size, drop_last=True)
model = models_mae.mae_vit_mini_patch4(img_size=16)
assert get_2d_sincos_pos_embed(128, 4, cls_token=True).shape == (17, 128)
model_without_ddp = model
if args.distributed:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model_without_ddp.parameters(), lr=args.lr, betas=(0.9, 0.95))
loss_scaler = NativeScaler()
misc.load_model(args=args, model_without_ddp=model_without_ddp, optimizer=optimizer, loss_scaler=loss_scaler)
log_writer = SummaryWriter(args.output_dir) if misc.is_main_process() else None
for epoch in range(args.start_epoch, args.epochs):
    stats = train_one_epoch(model, loader, optimizer, "cpu", epoch, loss_scaler, log_writer, args=args)
    print(f"mean loss {stats['loss']!r} of epoch {epoch}")
    misc.save_model(args=args, model=model, model_without_ddp=model_without_ddp, optimizer=optimizer,
                    loss_scaler=loss_scaler, epoch=epoch)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_script_of_a_fork_trains_saves_and_resumes(labelled, tmp_path, processes):
    """With its own loop, and with that of our engine, which has the same losses."""
    scripts = {"own": LOOP, "engine": "from engine_pretrain import train_one_epoch\n"}
    for name, loop in scripts.items():
        (tmp_path / f"{name}.py").write_text(IMPORTS + loop + SCRIPT)
        (tmp_path / f"out_{name}").mkdir()

    def losses(name, resume=""):
        argv = [labelled / "train", tmp_path / f"out_{name}", resume]
        text = forks.run(tmp_path / f"{name}.py", argv, tmp_path / f"{name}{bool(resume)}.output", processes)
        return [float(value) for value in re.findall(r"mean loss (\S+) of epoch", text)]  # of rank 0, the mean over all

    first, last = losses("own")
    assert last < first / 2
    assert losses("engine") == pytest.approx([first, last], rel=1e-6)
    resumed = losses("engine", tmp_path / "out_engine/checkpoint-0.pth")
    assert resumed == [pytest.approx(last, rel=0.1)]  # other masks
    file = tmp_path / "out_engine/checkpoint-1.pth"
    model = get_model(str(file), norm_pix_loss=False)
    assert_equal(model.state_dict(), torch.load(file, weights_only=False)["model"])


def test_the_page_names_every_module_and_function():
    """The table of docs/migrating.md."""
    page = (ROOT / "docs/migrating.md").read_text(encoding="utf-8").partition("## Scripts of a fork")[2]
    rows = dict(re.findall(r"^\| `util\.(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert set(rows) == {file.stem for file in ROOT.glob("util/*.py")} - {"__init__"}
    for name, row in rows.items():
        module = importlib.import_module(f"util.{name}")
        public = getattr(module, "__all__", ["build_dataset", "build_transform"])
        assert set(re.findall(r"`(\w+)`", row)) - {"args", "lr", "min_lr", "epochs", "warmup_epochs"} == set(public)
        assert [function for function in public if not hasattr(module, function)] == []


PUBLISHED = {
    engine_pretrain.train_one_epoch: (
        "(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=None, args=None)"
    ),
    engine_finetune.train_one_epoch: (
        "(model, criterion, data_loader, optimizer, device, epoch, loss_scaler, max_norm=0, mixup_fn=None, "
        "log_writer=None, args=None)"
    ),
    engine_finetune.evaluate: "(data_loader, model, device)",
}


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_engines_have_the_published_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert f"({', '.join(plain)})" == PUBLISHED[function]


class Scalars:
    """As a SummaryWriter."""

    def __init__(self):
        self.rows = []

    def add_scalar(self, *row):
        self.rows.append(row)


def labelled_batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(4, 3, 8, 8, generator=generator), torch.randint(7, (4,), generator=generator)) for _ in range(5)
    ]


def small_classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))


@pytest.mark.parametrize("max_norm", [0, 0.1])
def test_an_epoch_of_fine_tuning_is_that_of_a_plain_loop(max_norm):
    """Two updates of two batches; the last batch is none. The labels are mixed."""
    criterion = torch.nn.CrossEntropyLoss()
    args = SimpleNamespace(lr=0.5, min_lr=0.0, epochs=4, warmup_epochs=0, accum_iter=2)

    def mixup(images, labels):
        return images.flip(0), labels.flip(0)

    model, writer = small_classifier(), Scalars()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    stats = engine_finetune.train_one_epoch(
        model, criterion, labelled_batches(), optimizer, "cpu", 1, misc.NativeScalerWithGradNormCount(), max_norm,
        mixup, writer, args,
    )  # fmt: skip

    twin, losses, rates = small_classifier(), [], []
    for iteration, (images, labels) in enumerate(labelled_batches()):
        loss = criterion(twin(images), labels)
        losses.append(loss.item())
        moment = 1 + (iteration - iteration % 2) / 5
        rates.append(0.25 * (1 + np.cos(np.pi * moment / 4)))
        (loss / 2).backward()
        if iteration % 2:
            if max_norm:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
            with torch.no_grad():
                for weight in twin.parameters():
                    weight -= rates[-1] * weight.grad
            twin.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert stats == pytest.approx({"loss": np.mean(losses), "lr": np.mean(rates)})
    assert [row[0] for row in writer.rows] == ["loss", "lr"] * 2
    assert [row[2] for row in writer.rows] == [1200, 1200, 1600, 1600]
    assert writer.rows[2][1] == pytest.approx(losses[3])


def test_an_evaluation_counts_images():
    """Batches differ in size."""
    model = small_classifier()
    batches = [(images[: 4 - number], labels[: 4 - number]) for number, (images, labels) in
               enumerate(labelled_batches()[:4])]  # fmt: skip
    stats = engine_finetune.evaluate(batches, model, "cpu")
    outputs = model(torch.cat([images for images, _ in batches])).detach()
    truth = torch.cat([labels for _, labels in batches])
    places = (outputs > outputs.gather(1, truth[:, None])).sum(dim=1)
    expected = {"acc1": 100 * (places < 1).double().mean(), "acc5": 100 * (places < 5).double().mean()}
    expected["loss"] = torch.nn.functional.cross_entropy(outputs, truth)
    assert stats == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_an_epoch():
    args = SimpleNamespace(lr=0.5, min_lr=0.0, epochs=4, warmup_epochs=0, accum_iter=1)
    model = small_classifier()
    with pytest.raises(NonFiniteLoss, match="epoch 1, batch 0"):
        engine_finetune.train_one_epoch(
            model, lambda outputs, labels: outputs.sum() * np.inf, labelled_batches(),
            torch.optim.SGD(model.parameters(), lr=1.0), "cpu", 1, misc.NativeScalerWithGradNormCount(), args=args,
        )  # fmt: skip


PRINTING = """
import sys
import util.misc as misc
rank, force = (word == "True" for word in sys.argv[1:])
print("before")
misc.setup_for_distributed(False)
misc.setup_for_distributed(rank)
print("after", "two", sep="-")
print("error", file=sys.stderr)
if force:
    print("forced", force=True)
print("group", misc.is_dist_avail_and_initialized())
import torch.distributed as group
group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
print("group", misc.is_dist_avail_and_initialized(), force=True)
"""


@pytest.mark.parametrize(("is_master", "force"), [(True, False), (False, False), (False, True)])
def test_only_rank_0_prints(is_master, force, tmp_path):
    """The time is in front. `force` prints on each rank."""
    (tmp_path / "script.py").write_text(PRINTING)
    command = [sys.executable, tmp_path / "script.py", str(is_master), str(force)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    time = r"\[\d\d:\d\d:\d\d\.\d+\] "
    expected = ["after-two"] * is_master + ["forced"] * force + ["group False"] * is_master + ["group True"]
    assert re.fullmatch("before\n" + "".join(f"{time}{line}\n" for line in expected), done.stdout), done.stderr
    assert bool(re.search(f"{time}error\n", done.stderr)) == is_master


def test_util_datasets_is_the_command_of_mae_data(labelled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets.py", str(labelled), "--num_workers", "0"])
    runpy.run_path(str(ROOT / "util/datasets.py"), run_name="__main__")
    assert "images      48" in capsys.readouterr().out


def test_weight_decay_groups_are_those_of_timm():
    model = models_mae.mae_vit_mini_patch4(img_size=16)
    groups, expected = param_groups_weight_decay(model, 0.05), timm_groups(model, 0.05)
    decays = [
        {id(p): group["weight_decay"] for group in found for p in group["params"]} for found in (groups, expected)
    ]
    assert decays[0] == decays[1]


def test_meters_have_the_median_and_the_means():
    meter = misc.SmoothedValue(window_size=2, fmt="{median} {avg} {global_avg} {max} {value}")
    for value in (1.0, 2.0, 6.0):
        meter.update(value)
    assert str(meter) == "2.0 4.0 3.0 6.0 6.0"


def test_the_schedule_needs_four_settings():
    optimizer = torch.optim.SGD([{"params": torch.zeros(1), "lr_scale": 0.5}], lr=0)
    args = SimpleNamespace(lr=2.0, min_lr=1.0, epochs=3, warmup_epochs=1)
    assert [adjust_learning_rate(optimizer, epoch, args) for epoch in (0.5, 1, 2, 3)] == [1.0, 2.0, 1.5, 1.0]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_tables_of_positions_agree():
    grid = np.stack(np.meshgrid(np.arange(3.0), np.arange(2.0))).reshape(2, 1, 2, 3)
    table = get_2d_sincos_pos_embed_from_grid(8, grid)
    assert table.shape == (6, 8)
    assert np.array_equal(table, get_2d_sincos_pos_embed(8, (2, 3)))


def test_folders_of_classes_are_augmented_in_training_only(labelled):
    args = SimpleNamespace(data_path=labelled, input_size=16, color_jitter=None, aa="rand-m9-mstd0.5-inc1", reprob=0.25,
                           remode="pixel", recount=1)  # fmt: skip
    training, validation = (datasets.build_dataset(is_train, args) for is_train in (True, False))
    assert training.classes == validation.classes
    assert training[0][0].shape == validation[0][0].shape == (3, 16, 16)
    assert torch.equal(validation[0][0], validation[0][0])
    assert not torch.equal(training[0][0], training[0][0])


def test_the_packages_do_not_import_util():
    code = "import sys, main_pretrain, main_finetune, mae.inference; sys.exit('util' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
