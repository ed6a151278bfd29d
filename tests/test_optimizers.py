"""Muon, and optimizers of the user's code."""

import pytest
import torch
from mains import Stopped, assert_equal, in_processes, lines, stop_after, weights
from torch import nn
from torch.optim import Muon

import main_finetune
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.training.muon import BatchedMuon, muon_and_adamw, orthogonalized
from models_vit import VisionTransformer

LAST = "checkpoint-0.pth"


@pytest.mark.slow
def test_muon_trains_resumes_and_fine_tunes(pretrain, classify, monkeypatch):
    """A resumed run has the optimizer of its checkpoint."""
    whole = pretrain("whole", optimizer="muon")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        pretrain("parts", optimizer="muon", save_minutes=0)
    assert_equal(weights(pretrain("parts", resume="auto", save_minutes=10)), weights(whole))
    assert lines(whole)[1]["train_loss"] < lines(whole)[0]["train_loss"]
    moments = checkpoint.read(whole / "checkpoint-1.pth")["optimizer"]["state"].values()
    assert {tuple(sorted(state)) for state in moments} == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    tuned = classify(main_finetune, "tuned", finetune=whole / "checkpoint-1.pth", optimizer="muon", layer_decay=0.5)
    plain = classify(main_finetune, "plain", finetune=whole / "checkpoint-1.pth", layer_decay=0.5)
    key = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(weights(tuned)[key], weights(plain)[key])


@pytest.mark.slow
def test_muon_of_sharded_weights_equals_that_of_one_process(pictures, tmp_path):
    flags = ("--optimizer", "muon", "--epochs", 12)  # of one update
    in_processes(1, pictures, tmp_path / "one", "--batch_size", 24, *flags)
    in_processes(2, pictures, tmp_path / "two", "--batch_size", 12, "--fsdp", *flags)
    one, two = ([line["train_loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


def test_muon_has_the_matrices_of_the_blocks():
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    groups = [{"params": [*model.parameters()], "weight_decay": 0.05, "lr_scale": 0.5}]
    muon, adamw = muon_and_adamw(model, groups, betas=(0.9, 0.95)).param_groups
    assert {id(p) for p in muon["params"]} == {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert len(muon["params"]) + len(adamw["params"]) == len([*model.parameters()])
    assert (muon["weight_decay"], muon["lr_scale"], adamw["lr_scale"]) == (0.05, 0.5, 0.5)


def test_adamw_replaces_the_optimizer_of_a_recipe(pretrain, tmp_path):
    runs = (("muon", {}, 2), ("muon", {"optimizer": "adamw"}, 1), ("adamw", {}, 1))
    for number, (name, given, moments) in enumerate(runs):
        (tmp_path / f"{name}.yaml").write_text(f"optimizer: {name}\n")
        state = checkpoint.read(pretrain(f"{number}", epochs=1, config=tmp_path / f"{name}.yaml", **given) / LAST)
        assert len({tuple(sorted(of)) for of in state["optimizer"]["state"].values()}) == moments
    with pytest.raises(SystemExit):
        pretrain(optimizer="Muon")


def test_a_resumed_run_keeps_its_optimizer(pretrain):
    pretrain(epochs=1, optimizer="muon")
    with pytest.raises(CheckpointError, match="optimizer=muon") as error:
        pretrain(epochs=2, optimizer="adamw", resume="auto")
    assert "data" not in str(error.value) and "task" not in str(error.value)


def test_muon_is_the_name_of_an_optimizer_only(pretrain):
    with pytest.raises(SystemExit):
        pretrain(encoder="muon")


def test_muon_of_frozen_blocks_is_an_error_in_one_line(classify):
    with pytest.raises(ValueError, match="optimizer=muon: no matrix"):
        classify(main_finetune, optimizer="muon", unfreeze_blocks=0)


def test_muon_updates_as_that_of_pytorch():
    """PyTorch iterates in bf16, so its updates are equal up to that rounding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 16), (16, 64), (64, 16), (48, 16)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.5}
    optimizers = BatchedMuon(ours, **options), Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, old in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - old).norm()
    torch.testing.assert_close(*(optimizer.state_dict()["state"] for optimizer in optimizers))


def test_matrices_are_orthogonalized_as_by_newton_schulz_iterations():
    scales = torch.logspace(0, -3, 24)
    for shape in ((3, 16, 24), (3, 24, 16), (1, 24, 24)):
        matrices = torch.randn(shape) * scales[: shape[2]]
        x = matrices.double() / matrices.norm(dim=(1, 2), keepdim=True)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        torch.testing.assert_close(orthogonalized(matrices).double(), x, rtol=0, atol=1e-3)


OPTIMIZERS = """
import torch
def half(model, groups):
    return torch.optim.AdamW(groups[:1])
def nothing(model, groups):
    return groups
def sgd(model, groups):
    return torch.optim.SGD(groups, lr=0, momentum=0.9)
def broken(model, groups):
    return torch.optim.SGD(groups, lr=-1)
class Keys(torch.optim.SGD):
    def state_dict(self):
        return {"first": super().state_dict()}
def keys(model, groups):
    return Keys(groups, lr=0)
class Parts(torch.optim.SGD):
    def step(self):
        self.parts[0].step()
def parts(model, groups):
    found = Parts(groups, lr=0)
    found.parts = [sgd(model, groups)]
    return found
"""


@pytest.mark.parametrize(("name", "error", "message"), [
    ("half", ValueError, "own_optimizers:half"), ("broken", RuntimeError, "own_optimizers:broken"),
    ("parts", ValueError, "parts .*Joined"), ("keys", ValueError, "keys .*Joined"), ("absent", ValueError, "absent"),
])  # fmt: skip
def test_mistakes_in_an_optimizer_are_errors_in_one_line(name, error, message, own_module, pretrain):
    own_module("own_optimizers", OPTIMIZERS)
    with pytest.raises(error, match=message):
        pretrain(optimizer=f"own_optimizers:{name}")


def test_a_resumed_run_needs_its_own_optimizer_again(own_module, pretrain):
    own_module("own_optimizers", OPTIMIZERS)
    name = "own_optimizers:sgd"
    pretrain(optimizer=name, epochs=1)
    with pytest.raises(ValueError, match=f"optimizer={name}"):
        pretrain(epochs=2, resume="auto")


def test_an_optimizer_of_pytorch_trains_in_python(pretrain):
    def sgd(model, groups):
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)

    state = checkpoint.read(pretrain(epochs=1, of_main={"optimizer": sgd}) / "checkpoint-0.pth")
    assert state["args"]["optimizer"].endswith("sgd")
    assert {tuple(state) for state in state["optimizer"]["state"].values()} == {("momentum_buffer",)}
