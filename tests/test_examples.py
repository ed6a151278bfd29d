"""The examples that change the method: each trains, resumes, and its checkpoint serves the other scripts.

test_own_encoder.py has those that change the encoder only.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from mains import (
    Stopped,
    argv_of,
    assert_close,
    assert_equal,
    assert_same_run,
    call,
    in_processes,
    lines,
    parse,
    stop_after,
    stop_and_resume,
    weights,
)
from PIL import Image
from scipy.special import ndtr
from test_dino import of_transformers
from torch import nn

import mae.build
import main_finetune
import main_knn
import main_pretrain
from examples import data_clips, data_volumes, ordinal, reconstructions
from examples.colored_masks import ColoredMasks
from examples.complementary_masks import ComplementaryMasks
from examples.cross_decoder import CrossDecoder
from examples.date_and_place import DateAndPlace
from examples.frozen_teacher import FrozenTeacher
from examples.fused_blocks import FusedBlocks
from examples.local_decoder import LocalDecoder, window_mask
from examples.tubes import Tubes
from examples.two_crops import TwoCrops
from mae.checkpoints import checkpoint
from mae.data import transforms
from mae.inference import features, get_model
from mae.masking import sampler as masking_sampler
from mae.user_code import import_object
from mae.weights import loading, reading
from models_mae import MaskedAutoencoderViT
from models_vit import Block, VisionTransformer

TEACHER = "vit_tiny_patch16_224"
DISTANCE = "examples.ordinal:distance"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file with random weights of a model of timm, and that model for images of 64 x 64 pixels."""
    model = timm.create_model(TEACHER, num_classes=0, img_size=64).eval()
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return path, model


CLASSES = {"colored_masks:ColoredMasks": {"model_args": "color=blue"},
           "complementary_masks:ComplementaryMasks": {"model_args": "consistency=0.5"},
           "cross_decoder:CrossDecoder": {"model_args": "predicted=0.5", "input_size": "16 24", "accum_iter": 2,
                                          "amp": "bf16", "uniformity": 0.1},
           "fused_blocks:FusedBlocks": {"model_args": "hidden=0.5", "input_size": "16 24", "uniformity": 0.1},
           "hog_target:HOGTarget": {},
           "local_decoder:LocalDecoder": {"model_args": "window=[2,4]"},
           "random_projection:RandomProjection": {"model_args": "width=16"},
           "two_crops:TwoCrops": {"model_args": "weight=0.1", "repeated_sampling": 2},
           "wide_decoder:WideDecoder": {"model_args": "width=64"}}  # fmt: skip


def train_and_resume(pretrain, monkeypatch, **flags):
    """Returns the directory of a run that is equal to an interrupted and resumed run."""
    own = {name: flags[name] for name in ("model_class", "lr_schedule") if name in flags}
    whole = pretrain("whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        pretrain("parts", **flags, save_minutes=0)
    machine = {"input_size": flags.get("input_size", 16), "amp": flags.get("amp", "off")}
    resumed = {"resume": "auto", **machine, "save_minutes": 10}
    parts = pretrain("parts", **resumed, **own)  # the checkpoint has the arguments
    assert_equal(weights(whole), weights(parts))
    for ours, theirs in zip(lines(whole), lines(parts), strict=True):
        assert all(ours[name] == theirs[name] for name in ours.keys() | theirs.keys() if name.startswith("train_"))
    for name, flag in own.items():
        with pytest.raises(ValueError, match=f"{name}={flag}"):
            pretrain("parts", **resumed)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_class_is_trained_and_resumed(name, pretrain, classify, monkeypatch):
    whole = train_and_resume(pretrain, monkeypatch, model_class=f"examples.{name}", **CLASSES[name])
    assert lines(whole)[1]["train_loss"] < lines(whole)[0]["train_loss"]
    if name.startswith("local_decoder"):
        own = partial(LocalDecoder, window=[2, 4])
        assert_equal(weights(whole), weights(pretrain("python", of_main={"model_class": own})))
        assert classify(main_knn, k=3, finetune=whole / "checkpoint-1.pth")[3, 0.07] > 0


@pytest.mark.slow
def test_features_of_a_frozen_teacher_are_the_target(teacher, pretrain, monkeypatch):
    path, model = teacher
    flags = {"model_class": "examples.frozen_teacher:FrozenTeacher", "input_size": 64, "patch_size": 16}
    given = f"teacher={TEACHER} weights={path}"
    whole = train_and_resume(pretrain, monkeypatch, **flags, model_args=given)
    assert not [name for name in weights(whole) if "teacher" in name]
    ours = FrozenTeacher(**{**SMALL, "img_size": 64, "patch_size": 16}, teacher=TEACHER, weights=str(path)).train()
    pixels = torch.rand(2, 3, 64, 64)
    imgs = transforms.Normalize(*transforms.channel_statistics(3))(pixels)
    expected = nn.functional.layer_norm(model.forward_features(2 * pixels - 1)[:, 1:], (192,))
    torch.testing.assert_close(ours.target(imgs), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="patch_size"):
        pretrain("wrong", **{**flags, "patch_size": 8}, model_args=given)


@pytest.mark.parametrize("kind", ["timm", "ours"])
def test_a_teacher_sees_images_in_its_own_mean_and_std(kind, teacher, tmp_path):
    """Whatever those of the student are, which a recipe for its images sets."""
    if kind == "timm":
        given, (mean, std) = f"teacher={TEACHER} weights={teacher[0]}", (0.5, 0.5)
        features = teacher[1].forward_features
    else:
        mean, std = 0.1, 0.4
        model = get_model("vit_mini_patch4", input_size=64, patch_size=16, global_pool=False, nb_classes=0,
                          mean=[mean] * 3, std=[std] * 3)  # fmt: skip
        torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "teacher.pth")
        given, features = f"teacher={tmp_path / 'teacher.pth'}", lambda imgs: model.get_intermediate_layers(imgs)[0]
    run = parse(main_pretrain, data_path="unused", model="mae_vit_mini_patch4", input_size=64, patch_size=16,
                model_class="examples.frozen_teacher:FrozenTeacher", model_args=given,
                mean="0.2 0.3 0.7", std="0.05 0.1 0.2")  # fmt: skip
    student = mae.build.autoencoder(run.model, run.images, FrozenTeacher)
    pixels = torch.rand(2, 3, 64, 64)
    imgs = (pixels - torch.tensor(run.images.mean)[:, None, None]) / torch.tensor(run.images.std)[:, None, None]
    with torch.no_grad():
        tokens = features((pixels - mean) / std)[:, 1:]
    target = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    torch.testing.assert_close(student.target(imgs), target, rtol=1e-4, atol=1e-4)
    loss, pred, mask = student(imgs, noise=torch.rand(2, 16))
    assert loss.item() == pytest.approx(float((pred - target).square().mean(2)[mask > 0].mean()), rel=1e-4)
    with pytest.raises(ValueError, match="mean="):
        mae.build.autoencoder(run.model, replace(run.images, mean=[4000.0] * 3, std=[200.0] * 3), FrozenTeacher)


def test_a_checkpoint_of_ours_is_a_frozen_teacher(pretrain):
    first = pretrain("teacher", epochs=1, input_size=16, patch_size=4)
    teacher, imgs = get_model(first / "checkpoint-0.pth"), torch.randn(2, 3, 16, 16)
    flags = {"model_class": "examples.frozen_teacher:FrozenTeacher", "input_size": 16, "patch_size": 4}
    whole = pretrain("student", **flags, model_args=f"teacher={first / 'checkpoint-0.pth'}", epochs=2)
    assert lines(whole)[1]["train_loss"] < lines(whole)[0]["train_loss"]
    assert weights(whole).keys() == weights(first, "checkpoint-0.pth").keys()
    ours = FrozenTeacher(**SMALL, teacher=str(first / "checkpoint-0.pth")).train()
    expected = nn.functional.layer_norm(teacher.forward_features(imgs)[:, 1:], (128,))
    torch.testing.assert_close(ours.target(imgs), expected)


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_a_teacher_of_dino_is_distilled_without_masks(distance, pretrain, tmp_path):
    """All patches and the class token are the target of a student of another width and depth."""
    theirs = of_transformers("v3", tmp_path / "teacher")
    flags = {"model_class": "examples.frozen_teacher:FrozenTeacher", "input_size": 32, "patch_size": 8}
    own = f"teacher={tmp_path / 'teacher'} distance={distance} class_token=true"
    out = pretrain(**flags, model_args=own, mask_ratio=0)
    first, last = lines(out)
    for line in (first, last):
        assert line["train_patches"] + line["train_class"] == pytest.approx(line["train_loss"], rel=1e-5)
    assert last["train_loss"] < first["train_loss"]
    small = {**SMALL, "img_size": 32, "patch_size": 8}
    model = FrozenTeacher(**small, teacher=str(tmp_path / "teacher"), distance=distance, class_token=True)
    imgs = torch.randn(2, 3, 32, 32)
    terms, pred, mask = model(imgs, 0.0)
    tokens = theirs(imgs).last_hidden_state
    target = nn.functional.layer_norm(torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1), (128,))
    if distance == "cosine":
        expected = 1 - nn.functional.cosine_similarity(pred, target, dim=2)
    else:
        expected = nn.functional.smooth_l1_loss(pred, target, reduction="none").mean(dim=2)
    assert not mask.any()
    torch.testing.assert_close(terms, {"patches": expected[:, 1:].mean(), "class": expected[:, 0].mean()})


OF_OURS = {"model_class": "examples.frozen_teacher:FrozenTeacher", "input_size": 16, "patch_size": 4, "mask_ratio": 0}


@pytest.fixture(scope="module")
def distilled(pretrain_once):
    """The flags of a distillation from a checkpoint."""
    file = pretrain_once("teacher", epochs=1, input_size=16, patch_size=4) / "checkpoint-0.pth"
    return {**OF_OURS, "model_args": f"teacher={file} distance=cosine class_token=true"}


@pytest.mark.slow
def test_a_distillation_is_resumed_to_the_bit(distilled, pretrain, monkeypatch):
    """In the middle of an epoch, with the states of the optimizer."""
    parts = stop_and_resume(monkeypatch, pretrain, 3, **distilled, num_workers=1)
    assert_same_run(pretrain("whole", **distilled, num_workers=1), parts)


@pytest.mark.slow
def test_a_distillation_in_two_processes_equals_that_in_one(distilled, pictures, tmp_path):
    flags = (*argv_of(distilled), "--epochs", 2)
    in_processes(1, pictures, tmp_path / "one", "--batch_size", 8, *flags)
    in_processes(2, pictures, tmp_path / "two", "--batch_size", 4, *flags)
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path):
    small = {**SMALL, "img_size": 64, "patch_size": 16}
    with pytest.raises(ValueError, match=r"distance=l1.*give one of l2, smooth_l1, cosine"):
        FrozenTeacher(**small, teacher=TEACHER, weights=str(teacher[0]), distance="l1")
    without = "test_vit2"
    torch.save(timm.create_model(without, num_classes=0, img_size=64).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="no class token"):
        FrozenTeacher(**small, teacher=without, weights=str(tmp_path / "teacher.pth"), class_token=True)


def test_the_model_of_a_file_is_a_teacher(pretrain, tmp_path):
    file = pretrain("teacher", epochs=1) / "checkpoint-0.pth"
    own = checkpoint.read(file)
    average = {name: value + 1 for name, value in own["model"].items()}
    torch.save({"model": own["model"], "model_ema": average, "args": own["args"]}, tmp_path / "two.pth")
    imgs = torch.randn(2, 3, 16, 16)
    targets = [
        FrozenTeacher(**SMALL, teacher=f"{tmp_path / 'two.pth'}{suffix}").target(imgs) for suffix in ("", "#model_ema")
    ]
    assert not torch.equal(*targets)


def test_two_crops_have_two_terms_of_the_loss(pretrain, pictures, tmp_path):
    whole = pretrain(model_class="examples.two_crops:TwoCrops", repeated_sampling=2)
    # The terms of two processes are averaged.
    own = ("--model_class", "examples.two_crops:TwoCrops", "--repeated_sampling", "2", "--epochs", "1")
    in_processes(2, pictures, tmp_path / "two", "--batch_size", "4", *own)
    for line in (*lines(whole), *lines(tmp_path / "two")):
        assert line["train_pixels"] + line["train_contrast"] == pytest.approx(line["train_loss"], rel=1e-5)
    (line,) = lines(pretrain("spread", model_class="examples.two_crops:TwoCrops", epochs=1, uniformity=0.1))
    assert line["train_uniformity"] > 0
    model = TwoCrops(**SMALL).train()
    pairs, unrelated = torch.randn(3, 32).repeat_interleave(2, dim=0), torch.randn(6, 32)
    assert model.contrast(pairs) < model.contrast(unrelated)


def test_five_complementary_masks_show_each_patch_once():
    """1 - .8 is less than a fifth in floating point."""
    model = ComplementaryMasks(**SMALL | {"img_size": 40}, parts=5).train()
    mask = model(torch.rand(2, 3, 40, 40), 0.8)[2]
    assert torch.equal((1 - mask).view(5, 2, 100).sum(dim=0), torch.ones(2, 100))


def test_complementary_masks_show_each_patch_once():
    model = ComplementaryMasks(**SMALL).train()
    imgs, noise = torch.rand(3, 3, 16, 16), torch.rand(3, 16)
    terms, pred, mask = model(imgs, 0.75, noise=noise)
    visible = 1 - mask.view(4, 3, 16)
    assert torch.equal(visible.sum(dim=0), torch.ones(3, 16))
    assert torch.equal(visible.sum(dim=2), torch.full((4, 3), 4.0))
    plain = MaskedAutoencoderViT(**SMALL)
    plain.load_state_dict(model.state_dict())
    losses = [plain(imgs, mask=part)[0] for part in mask.view(4, 3, 16)]
    torch.testing.assert_close(terms["pixels"], torch.stack(losses).mean())
    torch.testing.assert_close(model.eval()(imgs, 0.75, noise=noise)[0], plain(imgs, 0.75, noise=noise)[0])
    pred = pred.view(4, 3, 16, -1)
    pairs = [(pred[k] - pred[k - 1]).abs().mean(2)[(visible[k] + visible[k - 1]) == 0] for k in range(4)]
    torch.testing.assert_close(terms["consistency"], torch.cat(pairs).mean())
    with pytest.raises(ValueError, match="complementary masks"):
        model.train()(imgs, 0.5)


def test_attention_of_the_decoder_is_local():
    mask = window_mask((2, 4), (1, 2), 1, shifted=False)
    assert mask[0].all() and mask[:, 0].all()
    assert mask[1].nonzero().flatten().tolist() == [0, 1, 2]  # the first patch: itself and its right neighbor
    assert window_mask((2, 4), (1, 2), 1, shifted=True)[2].nonzero().flatten().tolist() == [0, 2, 3]
    sizes = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    model = LocalDecoder(**SMALL, window=[2, 2], **sizes, block=partial(Block, qk_norm="layer"))
    latent = torch.randn(1, 1 + 16, 32, requires_grad=True)
    pred = model.forward_decoder(latent, torch.arange(16)[None])
    pred[0, 0].sum().backward()
    reached = latent.grad.abs().sum(dim=2)[0].nonzero().flatten().tolist()
    assert reached == [0, 1, 2, 5, 6]  # the class token, and the window of 2 x 2 in a grid of 4 x 4


def test_date_and_place_reach_training_and_features(pretrain, pictures, tmp_path):
    own, extras = {"encoder": "examples.date_and_place:DateAndPlace"}, {"extras": "lat lon day"}
    files = sorted(pictures.rglob("*.*g"))
    rows = [f"{file},{file.parent.name},{number},{2 * number},{7 * number}" for number, file in enumerate(files)]
    (tmp_path / "images.csv").write_text("\n".join(["path,label,lat,lon,day", *rows]))
    out = pretrain(**own, **extras, encoder_args="harmonics=2", data_path="/", train_list=tmp_path / "images.csv",
                   lr=0.01)  # fmt: skip
    assert weights(out)["place_embed.weight"].shape == (128, 12)
    model, imgs = get_model(out / "checkpoint-1.pth", encoder=DateAndPlace), torch.rand(2, 3, 16, 16)
    place = {"lat": torch.tensor([47.0, 47.0]), "lon": torch.tensor([8.0, 8.0])}
    winter, year, summer = (model.extract_feat(imgs, **place, day=torch.full((2,), day)) for day in (10, 375.25, 190))
    torch.testing.assert_close(winter, year, rtol=1e-3, atol=1e-3)
    assert (winter - summer).abs().max() > 100 * (winter - year).abs().max()


def test_a_decoder_of_fused_blocks_with_the_weight_of_the_last_one_is_that_of_the_autoencoder():
    torch.manual_seed(0)
    model = FusedBlocks(**SMALL, uniformity=0.1).train()
    plain = MaskedAutoencoderViT(**SMALL, uniformity=0.1).train()
    plain.load_state_dict(model.state_dict(), strict=False)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    expected, pred, _ = plain(imgs, noise=noise)
    assert not torch.allclose(model(imgs, noise=noise)[1], pred, atol=1e-3)  # a mean of all blocks
    model.decoder_weights.data = torch.tensor([-torch.inf, 0.0])
    found, ours, _ = model(imgs, noise=noise)
    torch.testing.assert_close(ours, pred)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)


def test_hidden_images_are_predicted_from_the_class_token():
    torch.manual_seed(0)
    model = FusedBlocks(**SMALL, hidden=0.5).train()
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    loss, pred, mask = model(imgs, noise=noise)
    latent, _, ids_restore = model.forward_encoder(imgs, 0.75, noise=noise)
    changed = latent.clone()
    changed[:, 1:] = torch.randn_like(latent[:, 1:])  # all but the class token
    others = model.forward_decoder(changed, ids_restore)
    torch.testing.assert_close(others[:2], pred[:2])
    assert not torch.allclose(others[2:], pred[2:], atol=1e-3)
    errors = (pred - model.target(imgs)).square().mean(dim=2)
    assert (mask.sum(dim=1) == 12).all()
    of_images = [*errors[:2].mean(dim=1), *((errors * mask).sum(dim=1) / 12)[2:]]
    torch.testing.assert_close(loss, torch.stack(of_images).mean())
    assert not torch.allclose(model.eval()(imgs, noise=noise)[1][:2], pred[:2], atol=1e-3)  # nothing is hidden


def test_a_clouded_image_has_the_weight_of_the_others_in_the_loss_of_hidden_images():
    """Nothing is hidden in evaluation mode: the loss is that of the autoencoder."""
    model = FusedBlocks(**SMALL, hidden=0.5).eval()
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, :8] = False
    found = model(imgs, noise=noise, valid=valid)[0]
    model.hidden = 0.0
    torch.testing.assert_close(found, model(imgs, noise=noise, valid=valid)[0])
    with pytest.raises(ValueError, match="hidden=50"):
        FusedBlocks(**SMALL, hidden=50)


def test_a_cross_attention_decoder_predicts_a_part_of_the_masked_patches():
    model = CrossDecoder(**SMALL, predicted=0.25, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    loss, pred, mask = model(imgs, noise=noise)
    assert torch.equal(mask, ((ranks >= 4) & (ranks < 8)).float())
    assert torch.equal(pred.abs().sum(dim=2) > 0, mask.bool())
    _, all_of_them, masked = model.eval()(imgs, noise=noise)
    assert torch.equal(masked, (ranks >= 4).float())
    torch.testing.assert_close(all_of_them[mask.bool()], pred[mask.bool()])  # each is predicted alone
    errors = (pred - model.target(imgs)).square().mean(dim=2)
    torch.testing.assert_close(loss, errors[mask.bool()].mean())
    with pytest.raises(RuntimeError, match="masking=random"):
        model.train()(imgs, noise=noise.round())


def test_each_block_of_the_cross_attention_decoder_has_its_sum_of_all_encoder_outputs():
    """NumPy computes the decoder from the outputs of the encoder blocks."""
    torch.manual_seed(0)
    size = {**SMALL, "img_size": (8, 12), "num_cls_tokens": 2}
    model = CrossDecoder(**size, decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2).double().eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    imgs, noise = torch.randn(2, 3, 8, 12).double(), torch.rand(2, 6)
    order = noise.argsort(dim=1)
    tokens = model.tokenize(imgs).gather(1, order[:, :2, None].expand(-1, -1, 32))
    outputs = [model.with_class_tokens(tokens, (2, 3))]
    for block in model.blocks:
        outputs.append(block(outputs[-1]))
    given = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def linear(name, x):
        return x @ given[f"{name}.weight"].T + given[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * given[f"{name}.weight"] + given[f"{name}.bias"]

    def heads(x):
        return x.reshape(2, -1, 2, 8).swapaxes(1, 2)

    maps = np.stack([output.detach().numpy() for output in outputs])  # (3, 2, 4, 32)
    mixed = np.einsum("ji,ibld->jbld", given["decoder_mix.weight"], maps)
    x = given["mask_token"][0] + given["decoder_pos_embed"][0, 2:][order[:, 2:].numpy()]
    for number, mix in enumerate(mixed):
        at = f"decoder_blocks.{number}."
        keys, values = np.split(linear(f"{at}kv", norm(f"{at}norm_tokens", mix)), 2, axis=2)
        scores = heads(linear(f"{at}q", norm(f"{at}norm1", x))) @ heads(keys).swapaxes(2, 3) / np.sqrt(8)
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        x = x + linear(f"{at}proj", (shares @ heads(values)).swapaxes(1, 2).reshape(2, -1, 16))
        hidden = linear(f"{at}mlp.fc1", norm(f"{at}norm2", x))
        x = x + linear(f"{at}mlp.fc2", hidden * ndtr(hidden))
    expected = linear("decoder_pred", norm("decoder_norm", x))
    pred = model(imgs, mask_ratio=0.6, noise=noise)[1].gather(1, order[:, 2:, None].expand(-1, -1, 48))
    np.testing.assert_allclose(pred.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("uniformity", [0.0, 0.1])
def test_all_weights_of_the_cross_attention_decoder_are_trained(uniformity):
    """Without uniformity, no loss has the final norm of the encoder, and it stays as it is."""
    model = CrossDecoder(**SMALL, uniformity=uniformity, decoder_embed_dim=32, decoder_depth=3, decoder_num_heads=2)
    loss = model(torch.randn(4, 3, 16, 16))[0]
    (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
    untrained = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    norm = set() if uniformity else {"norm.weight", "norm.bias"}
    assert untrained == {"pos_embed", "decoder_pos_embed"} | norm
    assert model.decoder_mix.weight.grad.shape == (3, 3) and (model.decoder_mix.weight.grad != 0).all()
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == untrained


def test_masks_of_red_noise_are_clustered_and_of_blue_noise_spread():
    def masked_neighbors(color):
        model = ColoredMasks(**{**SMALL, "img_size": 56}, color=color)
        noise = torch.rand(200, 196, generator=torch.Generator().manual_seed(0))
        _, mask, _ = model.random_masking(torch.zeros(200, 196, 1), 0.75, noise)
        assert (mask.sum(dim=1) == 147).all()
        grid = mask.view(200, 14, 14)
        return ((1 - grid[:, 1:]) * (1 - grid[:, :-1])).mean().item()  # both visible

    blue, green, red = (masked_neighbors(color) for color in ("blue", "green", "red"))
    assert blue < 0.05 < 0.25**2 < 0.07 < green < red
    with pytest.raises(ValueError, match="color=pink"):
        ColoredMasks(**SMALL, color="pink")


def test_colored_masks_have_the_patches_without_valid_pixels_and_no_other_shape():
    model, imgs = ColoredMasks(**{**SMALL, "img_size": 16}), torch.rand(8, 3, 16, 16)
    valid = torch.ones(8, 16, 16, dtype=torch.bool)
    valid[:, :8] = False
    mask = model(imgs, valid=valid)[2].view(8, 2, 8)
    assert mask[:, 0].all() and len(mask[:, 1].unique(dim=0)) > 1
    with pytest.raises(RuntimeError, match="masking=random"):
        model(imgs, noise=torch.arange(16.0).expand(8, 16))


TUBES = {"encoder": "examples.tubes:Tubes", "num_workers": 1, "crop": "none"}
DATA = {"clips": (data_clips, {"in_chans": 8, "input_size": 32, "patch_size": 8}, "masks=true"),
        "volumes": (data_volumes, {"in_chans": 16, "input_size": 24, "patch_size": 8}, "tube=4")}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_clips_and_volumes_train_and_serve_the_other_scripts(name, pretrain, classify, tmp_path):
    module, shape, arguments = DATA[name]
    module.generate(tmp_path / "data", {"train": 24, "val": 12})
    data = TUBES | {"dataset": f"py:examples.data_{name}:open_dataset", "data_path": tmp_path / "data"}
    flags = data | shape | {"encoder_args": arguments, "epochs": 1, "warmup_epochs": 0}
    whole = pretrain("whole", **flags, vis_every=1)
    given = data | {"finetune": whole / "checkpoint-0.pth"}
    assert classify(main_knn, k=3, **given)[3, 0.07] > 0
    own = {"model": whole / "checkpoint-0.pth", "encoder": TUBES["encoder"], "dataset": data["dataset"]}
    call(features, tmp_path / "data", **own, split="val", out=tmp_path / "features.npz")
    assert np.load(tmp_path / "features.npz")["features"].shape == (12, 128)
    call(reconstructions, **own, data_path=tmp_path / "data", frames=4, out=tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 500


FOUR_STEPS = SMALL | {"img_size": (16, 8), "in_chans": 24, "tube": 2, "colors": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def test_patches_of_tubes_are_those_of_a_3d_convolution():
    model, clips = mae.build.combined(Tubes, MaskedAutoencoderViT)(**FOUR_STEPS, **DECODER), torch.rand(2, 24, 16, 8)
    torch.testing.assert_close(model.unpatchify(model.patchify(clips)), clips)
    frames = clips.unflatten(1, (8, 3)).transpose(1, 2)  # (B, colors, frames, H, W)
    conv = nn.Conv3d(3, 32, (2, 4, 4), (2, 4, 4))
    with torch.no_grad():
        conv.weight.copy_(model.patch_embed.proj.weight.unflatten(1, (2, 3)).transpose(1, 2))
        conv.bias.copy_(model.patch_embed.proj.bias)
    torch.testing.assert_close(model.patch_embed(clips), conv(frames).flatten(2).transpose(1, 2))


def test_positions_of_tubes_are_factorized():
    model = mae.build.combined(Tubes, MaskedAutoencoderViT)(**FOUR_STEPS, **DECODER)

    def encoding(place, width):
        angles = [place / 10000 ** (2 * number / width) for number in range(width // 2)]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    for table, dim in ((model.pos_embed, 32), (model.decoder_pos_embed, 16)):
        assert not table.requires_grad and not table[0, 0].any()
        expected = [
            encoding(column, 6 * dim // 16) + encoding(row, 6 * dim // 16) + encoding(step, 4 * dim // 16)
            for step in range(4) for row in range(4) for column in range(2)
        ]  # fmt: skip
        torch.testing.assert_close(table[0, 1:], torch.tensor(expected))
    larger = mae.build.combined(Tubes, MaskedAutoencoderViT)(**FOUR_STEPS | {"img_size": 24}, **DECODER)
    torch.testing.assert_close(model.positions((24, 6)), larger.pos_embed)
    with pytest.raises(ValueError, match="learned_pos_embed"):
        mae.build.combined(Tubes, MaskedAutoencoderViT)(**FOUR_STEPS, **DECODER, learned_pos_embed=True)
    with pytest.raises(ValueError, match="in_chans=24"):
        mae.build.combined(Tubes, VisionTransformer)(**FOUR_STEPS | {"tube": 3})


def test_tubes_are_masked_in_all_time_steps():
    """Of 8 patches, int(8 · 0.3) are visible in each of four steps; 32 · 0.3 tokens would split a tube."""
    model, clips = (
        mae.build.combined(Tubes, MaskedAutoencoderViT)(**FOUR_STEPS, **DECODER, masks=True),
        torch.rand(9, 24, 16, 8),
    )
    mask = model(clips, 0.7)[2].view(9, 4, 8)
    assert torch.equal(mask, mask[:, :1].expand(-1, 4, -1)) and (mask.sum(dim=2) == 6).all()
    assert len(mask[:, 0].unique(dim=0)) > 1
    equal = torch.zeros(9, 32)  # noise of equal numbers splits no tube
    assert torch.equal(*(model(clips, 0.7, noise=equal)[2].view(9, 4, 8)[:, step] for step in (0, 3)))
    valid = torch.ones(9, 16, 8, dtype=torch.bool)
    valid[:, :8] = False
    assert model(clips, 0.7, valid=valid)[2].view(9, 4, 8)[:, :, :4].all()
    for given in (mask.flatten(1), 1 - mask.flatten(1)):
        assert torch.equal(model(clips, mask=given)[2], given)
    split = torch.arange(32).expand(9, -1) < 16
    with pytest.raises(RuntimeError, match="splits tubes"):
        model(clips, mask=split)
    for masking, mask_block in (("block", 1), ("random", 2)):
        noise = masking_sampler(masking, model.grid_size, 0.75, mask_block)[0]()
        with pytest.raises(RuntimeError, match="splits tubes"):
            model(clips, 0.75, noise=noise.expand(9, -1))


def test_weights_of_single_frames_are_inflated(pretrain, tmp_path):
    """A frame that stands still has in each time step the tokens of the frame."""
    file = pretrain(epochs=1) / "checkpoint-0.pth"
    own = {"encoder": Tubes, "encoder_args": ["colors=3"], "in_chans": 24, "nb_classes": 0}
    clip = get_model("vit_mini_patch4", input_size=16, **own)
    loading.load_encoder(clip, reading.read(file), adapt_input="repeat")
    frame, single = torch.rand(2, 3, 16, 16), get_model(file)
    tokens = clip.patch_embed(frame.repeat(1, 8, 1, 1)).unflatten(1, (4, 16))
    for step in range(4):
        torch.testing.assert_close(tokens[:, step], single.patch_embed(frame))
    gray = get_model("vit_mini_patch4", input_size=16, encoder=Tubes, in_chans=8, nb_classes=0)
    loading.load_encoder(gray, reading.read(file), adapt_input="mean")
    still = gray.patch_embed(frame[:, :1].repeat(1, 8, 1, 1)).unflatten(1, (4, 16))
    torch.testing.assert_close(still[:, 2], single.patch_embed(frame[:, :1].expand(-1, 3, -1, -1)))
    assert torch.equal(clip.pos_embed, clip.table(128, (16, 4)))
    assert torch.equal(clip.blocks[3].mlp.fc2.weight, single.blocks[3].mlp.fc2.weight)


def test_a_head_a_loss_and_a_metric_of_the_users_code_train_select_and_resume(labelled, tmp_path, monkeypatch):
    """Labels are grades. A run that lacks the class or the loss is refused, and so is another program."""

    def train(name, main=ordinal.main, **flags):
        settings = {
            "data_path": labelled, "model": "vit_mini_patch4", "input_size": 16, "batch_size": 8, "epochs": 3,
            "warmup_epochs": 0, "aa": "none", "reprob": 0, "drop_path": 0, "lr": 0.003, "num_workers": 0, "amp": "off",
            "device": "cpu", "output_dir": tmp_path / name, "metric": DISTANCE,
        }  # fmt: skip
        found = main(parse(main_finetune, **{**settings, **flags}))
        return tmp_path / name if found is None else found

    whole = train("whole")
    assert_same_run(whole, stop_and_resume(monkeypatch, train, 3, epochs=3), "checkpoint-2.pth")
    scores = [line[f"test_{DISTANCE}"] for line in lines(whole)]
    assert lines(whole)[-1]["train_loss"] < lines(whole)[0]["train_loss"]
    assert checkpoint.read(whole / "checkpoint-best.pth")["epoch"] == np.argmin(scores)
    record = checkpoint.read(whole / "checkpoint-2.pth")["args"]
    assert (record["model_class"], record["loss"]) == ("Ordinal", "examples.ordinal:squared_distance")
    code = {"loss": ordinal.squared_distance, "model_class": ordinal.Ordinal}
    for missing in code:
        given = {name: value for name, value in code.items() if name != missing}
        with pytest.raises(ValueError, match=f"{missing}=.*{record[missing]}"):
            train("whole", partial(main_finetune.main, **given), resume="auto", epochs=4)
    evaluated = {"eval": True, "resume": whole / "checkpoint-2.pth"}
    found = train("evaluated", partial(main_finetune.main, model_class=ordinal.Ordinal), **evaluated)
    assert found.metrics[DISTANCE] == pytest.approx(scores[-1])
    for wrong in (
        partial(train, "evaluated", main_finetune.main, **evaluated),
        partial(get_model, evaluated["resume"]),
    ):
        with pytest.raises(ValueError, match="model_class=Ordinal"):
            wrong()


@pytest.mark.slow
def test_a_schedule_of_the_users_code_trains_and_resumes(pretrain, monkeypatch):
    """After an epoch of warm-up, five of six updates have the full rate, and the last one 5/6 of it."""
    name = "examples.stable_decay:stable_decay"
    whole = train_and_resume(pretrain, monkeypatch, lr_schedule=name)
    assert lines(whole)[1]["train_lr"] == pytest.approx(0.01 * 4 / 256 * (5 + 5 / 6) / 6)
    assert checkpoint.read(whole / "checkpoint-1.pth")["args"]["lr_schedule"] == name
    own = pretrain("python", of_main={"lr_schedule": partial(import_object("", name))})
    assert checkpoint.read(own / "checkpoint-1.pth")["args"]["lr_schedule"] == name
    assert_equal(weights(whole), weights(own))


def test_a_schedule_of_numpy_is_saved(own_module, pretrain):
    own_module("own_schedule", "import numpy\ndef half(progress):\n    return numpy.float64(0.5)\n")
    out = pretrain(lr_schedule="own_schedule:half", warmup_epochs=0, lr=0.1)
    assert lines(out)[1]["train_lr"] == pytest.approx(0.05)
