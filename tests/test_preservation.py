"""`--preserve`: a loss that keeps the features of a continued encoder near those of its start."""

import re

import numpy as np
import pytest
import torch
from mains import assert_close, assert_same_run, fails, in_processes, lines, randomized, stop_and_resume

import main_pretrain
import models_mae
from mae.checkpoints import checkpoint
from mae.data.transforms import Normalize, renormalization
from mae.inference import get_model
from mae.lora import add_updates
from mae.preservation import Preservation, frozen_copy
from mae.settings import ImageSpec
from mae.training import preserving
from mae.weights import reading


@pytest.fixture(scope="module")
def start(pretrain_once):
    """The file from which the runs start."""
    return pretrain_once("start", epochs=1) / "checkpoint-0.pth"


def model_of(seed=0):
    torch.manual_seed(seed)
    return models_mae.mae_vit_mini_patch4(in_chans=1)


def cosine(a, b):
    a, b = (array.detach().double().numpy() for array in (a, b))
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_loss_is_that_of_the_whole_image_in_the_normalization_of_the_start():
    """An oracle: the visible patches are found by their noise, and the start sees images in its own mean and std."""
    start = randomized(model_of(), 0.3)
    model = randomized(model_of(), 0.2).train()
    raw = torch.rand(3, 1, 32, 32)
    noise = torch.rand(3, 64)
    images = Normalize([0.2], [0.4])(raw)
    pixels = model(images, 0.75, noise=noise)[0]
    model.preserve = Preservation(start, 0.5, *renormalization(1, ([0.2], [0.4]), ([0.5], [0.25])))
    with torch.no_grad():
        loss = model(images, 0.75, noise=noise)[0]
        latent = model.forward_encoder(images, 0.75, noise=noise)[0]
        whole = start.forward_features(Normalize([0.5], [0.25])(raw))
    visible = noise.argsort(dim=1)[:, :16] + 1
    chosen = torch.stack([tokens[ids] for tokens, ids in zip(whole, visible, strict=True)])
    patches = 1 - cosine(latent[:, 1:], chosen).mean()
    expected = 0.5 * ((1 - cosine(latent[:, 0], whole[:, 0]).mean()) / 2 + patches / 2)
    assert expected > 0.01
    assert loss["preserve"].item() == pytest.approx(expected, rel=1e-5)
    assert loss["pixels"] == pixels


def test_the_loss_is_zero_at_the_start_without_masks_and_trains_the_encoder_only():
    model = randomized(model_of(), 0.2)
    start = frozen_copy(model)
    term = Preservation(start, 1.0, torch.ones(1), torch.zeros(1))
    images = torch.rand(2, 1, 32, 32)
    noise = torch.rand(2, 64)
    latent, _, ids_restore = model.forward_encoder(images, 0, noise=noise)
    assert term(latent, images, ids_restore).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(0.1)
    latent, _, ids_restore = model.forward_encoder(images, 0.5, noise=noise)
    term(latent, images, ids_restore).backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert "blocks.0.attn.qkv.weight" in trained
    assert not [name for name in trained if name.startswith(("decoder", "mask_token"))]
    assert all(weight.grad is None and not weight.requires_grad for weight in start.parameters())


def test_with_low_rank_updates_the_start_shares_the_frozen_weights():
    model = model_of()
    add_updates(model, 4, None)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith(("lora_a", "lora_b")) or name.startswith(("norm", "decoder")))
    start = frozen_copy(model)
    ours = {weight.data_ptr() for weight in model.parameters()}
    copied = {name for name, weight in start.named_parameters() if weight.data_ptr() not in ours}
    assert {re.sub(r"blocks\.\d\.", "", name) for name in copied} == {
        "attn.qkv.lora_a", "attn.qkv.lora_b", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert not [name for name, _ in start.named_parameters() if name.startswith("decoder")]
    images = torch.rand(2, 1, 32, 32)
    before = start.forward_features(images)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    assert torch.equal(start.forward_features(images), before)
    assert not torch.allclose(model.forward_features(images), before, atol=0.1)


def test_the_log_has_the_loss_and_more_weight_keeps_the_features_nearer(start, pretrain):
    def distances(weight):
        run = pretrain(f"weight_{weight}", init_from=start, preserve=weight, epochs=4, lr=0.01)
        return [line["train_preserve"] / weight for line in lines(run)]

    weak = distances(1e-6)
    strong = distances(10)
    assert strong[-1] < weak[-1]
    assert 0 < strong[-1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("updates", [{}, {"lora": 4, "unfreeze_blocks": 1}])
def test_a_run_is_resumed_to_the_bit(updates, start, pretrain, monkeypatch):
    flags = {"init_from": start, "preserve": 1, "drop_path": 0.1, "num_workers": 1, **updates}
    assert_same_run(pretrain("whole", **flags), stop_and_resume(monkeypatch, pretrain, 3, **flags))


def test_a_resumed_run_finds_its_start_and_refuses_another(start, pretrain, pretrain_once, tmp_path):
    first = pretrain("first", init_from=start, preserve=1, epochs=2)
    state = first / "checkpoint-0.pth"
    resumed = pretrain("resumed", resume=state, epochs=2)
    assert [line["train_preserve"] for line in lines(resumed)] == [lines(first)[1]["train_preserve"]]
    other = pretrain_once("other", epochs=1, seed=3) / "checkpoint-0.pth"
    with pytest.raises(checkpoint.CheckpointError, match="not the file from which the run started"):
        pretrain("again", resume=state, init_from=other, epochs=2)
    gone = tmp_path / "gone.pth"
    with pytest.raises(checkpoint.CheckpointError, match=r"gone\.pth"):
        pretrain("without", resume=state, init_from=gone, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("own", [(), ("--fsdp",), ("--lora", 4), ("--lora", 4, "--fsdp")])
def test_two_processes_equal_one(own, start, pictures, tmp_path):
    flags = ("--init_from", start, "--epochs", 2, "--preserve", 1)
    updates = [word for word in own if word != "--fsdp"]
    in_processes(1, pictures, tmp_path / "one", "--batch_size", 8, *flags, *updates)
    in_processes(2, pictures, tmp_path / "two", "--batch_size", 4, *flags, *own)
    for name in ("train_loss", "train_preserve"):
        expected = [line[name] for line in lines(tmp_path / "one")]
        assert [line[name] for line in lines(tmp_path / "two")] == pytest.approx(expected, rel=1e-5)
    if "--fsdp" not in own:
        assert_close(tmp_path / "one", tmp_path / "two")
        return
    in_processes(2, pictures, tmp_path / "three", "--batch_size", 4, "--epochs", 2, "--fsdp", *updates,
                 "--resume", tmp_path / "two/checkpoint-0")  # fmt: skip
    assert lines(tmp_path / "three")[-1]["train_preserve"] == lines(tmp_path / "two")[-1]["train_preserve"]


def test_without_a_start_and_with_another_forward_it_is_refused(start, pictures, own_module, capsys, monkeypatch):
    words = ("--data_path", pictures, "--preserve", 1, "--model", "mae_vit_mini_patch4", "--device", "cpu")
    assert "preserve=1 keeps the features of a file: give init_from=FILE" in fails(
        capsys, monkeypatch, main_pretrain, *words, "--output_dir", pictures.parent / "without"
    )
    own_module(
        "forwards",
        """
from models_mae import MaskedAutoencoderViT

class Own(MaskedAutoencoderViT):
    def forward(self, imgs, mask_ratio=0.75, **context):
        imgs, mask_ratio, context = self.prepare_masking(imgs, mask_ratio, **context)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **context)
        pred = self.forward_decoder(latent, ids_restore, **context)
        return self.forward_loss(imgs, pred, mask, **context), pred, mask
""",
    )
    words = (*words, "--init_from", start, "--model_class", "forwards:Own", "--output_dir", pictures.parent / "own",
             "--batch_size", 8)  # fmt: skip
    without = "the `forward` of the model class has no such term of the loss"
    assert f"`preserve`: {without}" in fails(capsys, monkeypatch, main_pretrain, *words)
    words = ["--uniformity" if word == "--preserve" else word for word in words]
    assert f"`uniformity`: {without}" in fails(capsys, monkeypatch, main_pretrain, *words)


def test_a_run_sees_its_start_in_the_statistics_of_the_file(start):
    file = reading.read(str(start))
    model = get_model(start)
    ours = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
    images = ImageSpec.of({**file.settings, "mean": ours[0], "std": ours[1]})
    preserving.open_term(model, 1.0, images, file, torch.device("cpu"), False, None)
    scale, shift = renormalization(3, ours, (None, None))  # the start has those of ImageNet
    torch.testing.assert_close(model.preserve.scale, scale)
    torch.testing.assert_close(model.preserve.shift, shift)


def test_the_start_has_no_drop_path():
    """Its features are the same in each update, and those of the evaluation."""
    model = randomized(models_mae.mae_vit_mini_patch4(in_chans=1, drop_path_rate=0.5), 0.2).train()
    term = Preservation(frozen_copy(model), 1.0, torch.ones(1), torch.zeros(1))
    images = torch.rand(4, 1, 32, 32)
    latent, _, ids_restore = model.eval().forward_encoder(images, 0)
    assert term(latent, images, ids_restore).item() == pytest.approx(0, abs=1e-6)
