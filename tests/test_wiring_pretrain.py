"""Arguments of a run of main_pretrain.py for the defaults, the recipes and every flag.

The script runs in this process on small images. `trainer.run` is replaced by a function that records its arguments.
"""

import functools
import re
import struct
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision import transforms as tv

import main_pretrain
import models_build
import models_mae
from models_mae import MaskedAutoencoderViT, mae_vit_mini_patch4
from util import masking
from util.cli import entry_point
from util.data import jpeg as fast_jpeg
from util.data import loader
from util.evaluation import pictures
from util.settings import specs
from util.training import fsdp, run_log

NUM_IMAGES = 70

# The parameters that weight decay acts on: all but biases, 1-D weights and the fixed position tables.
BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
DECAYED = [
    "cls_token", "mask_token", "patch_embed.proj.weight", *(f"blocks.{i}.{name}" for i in range(4) for name in BLOCK),
    "decoder_embed.weight", *(f"decoder_blocks.0.{name}" for name in BLOCK), "decoder_pred.weight",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(root / f"{number:02}.png")
    return root


@pytest.fixture
def capture(images, tmp_path, monkeypatch):
    """Runs the script with flags; returns the arguments of `trainer.run`."""
    monkeypatch.setattr(loader, "_cores", lambda: 16)

    def run(*flags, **options) -> Namespace:
        calls = []

        def record(model, optimizer, batches, precision, settings, **options):
            calls.append(Namespace(model=model, optimizer=optimizer, batches=batches, precision=precision,
                                   settings=settings, **options))  # fmt: skip

        argv = ["--data_path", images, "--output_dir", tmp_path / "run", "--device", "cpu", *flags,
                "--model", "mae_vit_mini_patch4"]  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(main_pretrain.trainer, "run", record)
            main_pretrain.main(
                entry_point.parse(main_pretrain.get_args_parser(), [str(part) for part in argv]), **options
            )
        (call,) = calls
        return call

    return run


def record_calls(monkeypatch, module, name, result=None):
    """Replaces a function by one that records its positional and keyword arguments."""
    calls = []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append((args, kwargs)) or result)
    return calls


def names_of(call, group) -> list[str]:
    names = {id(parameter): name for name, parameter in call.model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def published_augmentation(size, scale=(0.2, 1.0), flip=0.5):
    aspect = size[1] / size[0] if isinstance(size, tuple) else 1
    ratio = (3 / 4 * aspect, 4 / 3 * aspect)
    crop = tv.RandomResizedCrop(size, scale, ratio, interpolation=tv.InterpolationMode.BICUBIC)
    return tv.Compose([crop, tv.RandomHorizontalFlip(flip), tv.PILToTensor()])


def assert_sample(samples, transform, seed, num_noise, mode="RGB"):
    """A sample is a function of (seed, epoch, index): first the noise of the mask, then the augmentation."""
    for epoch, index in ((0, 3), (0, 4), (2, 3), *((1, index) for index in range(8))):
        sample = samples[epoch, index]
        picture = Image.open(samples.source.name(index)).convert(mode)
        torch.manual_seed(zlib.crc32(struct.pack("<3q", seed, epoch, index)))
        assert torch.equal(sample.noise, torch.rand(num_noise))
        assert torch.equal(sample.image, transform(picture))


# -------------------------------------------------------------------------------------------------------- defaults


def test_defaults_optimizer(capture):
    call = capture("--input_size", 16)
    assert type(call.optimizer) is torch.optim.AdamW
    no_decay, decay = call.optimizer.param_groups
    for group, weight_decay in ((no_decay, 0.0), (decay, 0.05)):
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-8
        assert group["weight_decay"] == weight_decay
        assert group["fused"] is True
        assert group["lr"] == 0.0
        assert not group["amsgrad"]
        assert "lr_scale" not in group
    assert names_of(call, decay) == DECAYED
    tables = {"pos_embed", "decoder_pos_embed"}
    no_decay_names = [name for name, _ in call.model.named_parameters() if name not in {*DECAYED, *tables}]
    assert names_of(call, no_decay) == no_decay_names
    assert {"patch_embed.proj.bias", "blocks.0.norm1.weight", "norm.weight", "decoder_pred.bias"} < set(no_decay_names)


def test_defaults_data(capture):
    call = capture()
    order, data = call.batches.order, call.batches.batches
    assert (order.batch_size, order.seed, order.repeats, len(order)) == (64, 0, 1, 1)
    assert (data.num_workers, data.pin_memory) == (10, False)  # pinned memory is for GPUs
    samples = data.dataset
    assert (len(samples), samples.on_bad_image) == (NUM_IMAGES, "error")
    assert samples.decode.keywords == {"in_chans": 3, "fast_jpeg": False}
    assert_sample(samples, published_augmentation(224), seed=0, num_noise=56 * 56)


def test_defaults_engine_and_model(capture):
    call = capture("--input_size", 16)
    assert call.train_one_epoch.func is main_pretrain.train_one_epoch
    assert call.train_one_epoch.keywords.keys() == {"mask_ratio", "normalize"}
    assert call.train_one_epoch.keywords["mask_ratio"] == 0.75
    normalize = call.train_one_epoch.keywords["normalize"]
    assert normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalize.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert not call.model.norm_pix_loss
    assert not any(block.grad_checkpointing for block in [*call.model.blocks, *call.model.decoder_blocks])
    assert (len(call.model.blocks), len(call.model.decoder_blocks)) == (4, 1)
    assert (call.precision.name, call.precision.device) == ("fp32", torch.device("cpu"))
    torch.manual_seed(0)
    for parameter, expected in zip(call.model.parameters(), mae_vit_mini_patch4(img_size=16).parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_defaults_settings_of_the_run(capture, tmp_path):
    settings = capture("--input_size", 16).settings
    assert settings["output_dir"] == settings["log_dir"] == str(tmp_path / "run")
    published = {
        "batch_size": 64, "epochs": 400, "accum_iter": 1, "lr": None, "blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 40,
        "weight_decay": 0.05, "seed": 0, "resume": "", "start_epoch": 0,
    }  # fmt: skip
    added = {"clip_grad": None, "on_nonfinite": "abort", "compile": False, "save_every": 20, "save_minutes": 15.0,
             "keep_last": None, "vis_every": 20}  # fmt: skip
    assert {name: settings[name] for name in published | added} == published | added


# --------------------------------------------------------------------------------------------------------- recipes


PUBLISHED_MODELS = {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}


@pytest.mark.parametrize("size", PUBLISHED_MODELS)
def test_published_recipes(capture, size):
    """4096 images per update, normalized targets, ratio .75, 800 epochs, warm-up 40, blr 1.5e-4, weight decay .05."""
    recipe = ROOT / f"recipes/pretrain_vit_{size}.yaml"
    call = capture("--config", recipe)
    published = {
        "batch_size": 64, "epochs": 800, "warmup_epochs": 40, "blr": 1.5e-4, "lr": None, "min_lr": 0.0, "seed": 0,
        "clip_grad": None, "accum_iter": 1, "input_size": 224,
    }  # fmt: skip
    assert {name: call.settings[name] for name in published} == published
    assert call.batches.order.batch_size == 64
    assert call.train_one_epoch.keywords["mask_ratio"] == 0.75
    assert call.model.norm_pix_loss is True
    assert [group["weight_decay"] for group in call.optimizer.param_groups] == [0.0, 0.05]
    assert [group["betas"] for group in call.optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert_sample(call.batches.batches.dataset, published_augmentation(224), seed=0, num_noise=56 * 56)
    split = r"--nproc_per_node (\d+) main_pretrain.py .*\n.*--batch_size (\d+) --accum_iter (\d+) "
    numbers = re.search(split, recipe.read_text())
    assert np.prod([int(number) for number in numbers.groups()]) == 4096

    args = entry_point.parse(main_pretrain.get_args_parser(), ["--config", str(recipe)])
    with torch.device("meta"):
        model = models_build.autoencoder(*specs(vars(args)))
    width, depth, heads, patch = PUBLISHED_MODELS[size]
    assert (model.cls_token.shape[-1], len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    assert model.patch_embed.patch_size == (patch, patch)
    assert (model.mask_token.shape[-1], len(model.decoder_blocks), model.decoder_blocks[0].attn.num_heads) == (
        512, 8, 16
    )  # fmt: skip


PIXIO_MODELS = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16), "1b": (1536, 48, 24)}


@pytest.mark.parametrize("size", PIXIO_MODELS)
def test_recipes_of_pixio(size):
    """8192 images per update, 400 epochs of 1605 updates, warm-up 40, blr 2.5e-5, weight decay .05, 256 pixels."""
    recipe = ROOT / f"recipes/pretrain_pixio_vit_{size}.yaml"
    args = entry_point.parse(main_pretrain.get_args_parser(), ["--config", str(recipe)])
    published = {
        "epochs": 400, "updates_per_epoch": 1605, "warmup_epochs": 40, "blr": 2.5e-5, "weight_decay": 0.05,
        "input_size": 256, "mask_ratio": 0.75, "mask_block": 4, "crop_scale": [0.2, 1.0], "norm_pix_loss": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    split = r"--nproc_per_node (\d+) main_pretrain.py .*\n.*--batch_size (\d+) --accum_iter (\d+) "
    numbers = [int(number) for number in re.search(split, recipe.read_text()).groups()]
    assert np.prod(numbers) == 8192
    assert args.batch_size == numbers[1]
    with torch.device("meta"):
        model = models_build.autoencoder(*specs(vars(args)))
        factory = getattr(models_mae, f"pixio_vit_{args.model.removeprefix('mae_vit_')}")()
    width, depth, heads = PIXIO_MODELS[size]
    assert (model.cls_token.shape[1:], len(model.blocks), model.blocks[0].attn.num_heads) == ((8, width), depth, heads)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in factory.state_dict().items()}
    assert model.learned_pos_embed
    assert model.decoder_blocks[0].attn.num_heads == factory.decoder_blocks[0].attn.num_heads == 16
    sampler = masking.sampler(args.masking, model.grid_size, args.mask_ratio, args.mask_block)
    assert (sampler[0]().shape, masking.num_visible(256, sampler[1])) == ((256,), 64)


def test_the_demos_recipe(capture, images):
    """Gray images of 28 pixels in 16 patches of 7, with larger crops than the published ones."""
    call = capture("--config", ROOT / "recipes/pretrain_fashion_mnist.yaml", "--data_path", images)
    assert (call.model.patch_embed.patch_size, call.model.num_patches, call.model.patch_embed.in_chans) == (
        (7, 7), 16, 1
    )  # fmt: skip
    normalize = call.train_one_epoch.keywords["normalize"]
    assert (normalize.mean.item(), normalize.std.item()) == pytest.approx((0.286, 0.353))
    assert {name: call.settings[name] for name in ("lr", "epochs", "warmup_epochs")} == {
        "lr": 1e-3, "epochs": 32, "warmup_epochs": 2,
    }  # fmt: skip
    samples = call.batches.batches.dataset
    assert_sample(samples, published_augmentation(28, (0.6, 1.0)), seed=0, num_noise=16, mode="L")


# ------------------------------------------------------------------------------------------------- every other value


def test_flags_of_data(capture, monkeypatch):
    monkeypatch.setattr(fast_jpeg, "decoder", lambda: None)
    call = capture(
        "--input_size", 16, 24, "--batch_size", 6, "--accum_iter", 2, "--repeated_sampling", 3, "--seed", 11,
        "--num_workers", 3, "--in_chans", 1, "--mean", 0.1, "--std", 0.7, "--crop_scale", 0.3, 0.4, "--hflip", 1.0,
        "--fast_jpeg", "--on_bad_image", "skip",
    )  # fmt: skip
    order, data = call.batches.order, call.batches.batches
    assert (order.batch_size, order.seed, order.repeats) == (6, 11, 3)
    assert len(order) == 34  # 210 samples are 17 updates of 2 x 6
    assert call.batches.num_images == 210
    assert data.num_workers == 3
    samples = data.dataset
    assert samples.on_bad_image == "skip"
    assert samples.decode.keywords == {"in_chans": 1, "fast_jpeg": True}
    assert_sample(samples, published_augmentation((16, 24), (0.3, 0.4), 1.0), seed=11, num_noise=24, mode="L")
    normalize = call.train_one_epoch.keywords["normalize"]
    assert (normalize.mean.item(), normalize.std.item()) == pytest.approx((0.1, 0.7))


def test_other_channels_have_the_average_of_imagenets_statistics(capture):
    normalize = capture("--input_size", 16, "--in_chans", 1).train_one_epoch.keywords["normalize"]
    assert (normalize.mean.item(), normalize.std.item()) == pytest.approx((0.449, 0.226))


def test_flags_of_model_and_optimizer(capture):
    call = capture(
        "--input_size", 16, 24, "--patch_size", 8, 4, "--mask_ratio", 0.6, "--norm_pix_loss", "--decoder_depth", 3,
        "--grad_checkpointing", "--weight_decay", 0.3, "--amp", "bf16", "--seed", 5, "--drop_path", 0.4,
        "--updates_per_epoch", 3, "--mask_block", 2,
    )  # fmt: skip
    assert call.train_one_epoch.keywords["mask_ratio"] == 1 - 4.5 / 12  # one of three blocks is visible
    assert call.model.blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
    assert len(call.batches) == 3 * call.settings["accum_iter"]
    assert call.model.norm_pix_loss is True
    assert call.model.patch_embed.patch_size == (8, 4)
    assert call.model.grid_size == (2, 6)
    assert len(call.model.decoder_blocks) == 3
    assert all(block.grad_checkpointing for block in [*call.model.blocks, *call.model.decoder_blocks])
    assert [group["weight_decay"] for group in call.optimizer.param_groups] == [0.0, 0.3]
    assert call.precision.name == "bf16"
    torch.manual_seed(5)
    expected = mae_vit_mini_patch4(img_size=(16, 24), patch_size=(8, 4), decoder_depth=3)
    assert torch.equal(call.model.decoder_pred.weight, expected.decoder_pred.weight)


@pytest.mark.parametrize(("flag", "pinned"), [("--pin_mem", True), ("--no_pin_mem", False)])
def test_pinned_memory_is_for_gpus(capture, monkeypatch, flag, pinned):
    record_calls(monkeypatch, main_pretrain.dist, "init", torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    assert capture("--input_size", 16, flag).batches.batches.pin_memory is pinned


def test_flags_of_processes_and_sources(capture, monkeypatch, tmp_path, images):
    init = record_calls(monkeypatch, main_pretrain.dist, "init", torch.device("cpu"))
    prepare = record_calls(monkeypatch, main_pretrain.run_directory, "prepare")
    open_source = main_pretrain.datasets.open_source
    opened = record_calls(monkeypatch, main_pretrain.datasets, "open_source", open_source("train", str(images)))
    suggested = record_calls(monkeypatch, main_pretrain.datasets, "suggest_statistics")
    capture(
        "--input_size", 16, "--dist_url", "tcp://a:1", "--dist_timeout", 77, "--dist_backend", "gloo", "--resume",
        "run/a.pth", "--train_list", "list.csv", "--dataset", "CIFAR10", "--download", "--num_images", 9,
        "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6,
    )  # fmt: skip
    assert init == [(("cpu", "tcp://a:1", 77.0, "gloo"), {})]
    assert prepare == [((tmp_path / "run", "run/a.pth"), {})]
    assert opened == [(("train", str(images), "list.csv", "CIFAR10"), {"download": True, "num_images": 9})]
    ((_, in_chans, mean, std), _) = suggested[0]
    assert (in_chans, mean, std) == (3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_init_from(capture, tmp_path):
    torch.manual_seed(9)
    other = mae_vit_mini_patch4(img_size=16)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    call = capture("--input_size", 16, "--init_from", tmp_path / "other.pth")
    for parameter, expected in zip(call.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_the_ratio_is_checked_for_the_models_patches(capture, monkeypatch):
    checked = record_calls(monkeypatch, masking, "check_ratio")
    capture("--input_size", 16, "--mask_ratio", 0.6)
    assert checked == [((16, 0.6), {})]


def test_masking(capture, monkeypatch):
    """Samples contain the noise of the sampler. The engine and the pictures use its ratio."""
    assert capture("--input_size", 16).settings["masking"] == "random"
    calls = record_calls(monkeypatch, masking, "sampler", (lambda: torch.full((24,), 0.25), 0.4))
    drawn_pictures = record_calls(monkeypatch, pictures, "reconstruction")
    call = capture("--input_size", 16, 24, "--masking", "block", "--mask_ratio", 0.6)
    assert calls == [(("block", (4, 6), 0.6, 1, (4, 4)), {})]
    assert call.train_one_epoch.keywords["mask_ratio"] == 0.4
    assert call.batches.batches.dataset[0, 3].noise.tolist() == [0.25] * 24
    call.after_epoch(0, Log())
    assert drawn_pictures[0][0][4] == 0.4


class PredictsFeatures(MaskedAutoencoderViT):
    predicts_pixels = False


def test_a_class_of_models(capture, monkeypatch):
    drawn_pictures = record_calls(monkeypatch, pictures, "reconstruction")
    call = capture("--input_size", 16, model_class=PredictsFeatures)
    assert type(call.model) is PredictsFeatures
    assert (call.settings["model_class"], call.settings["predicts_pixels"]) == ("PredictsFeatures", False)
    bound = capture("--input_size", 16, model_class=functools.partial(PredictsFeatures))
    assert bound.settings["model_class"] == "PredictsFeatures"
    assert "model_class" not in capture("--input_size", 16).settings
    call.after_epoch(0, Log())
    assert drawn_pictures == []  # it predicts no pixels


@pytest.mark.parametrize(("kind", "built_on"), [(MaskedAutoencoderViT, "meta"), (PredictsFeatures, "cpu")])
def test_fsdp(capture, monkeypatch, kind, built_on):
    """The model is built on the meta device, but not a subclass, which may set weights. Every block is a unit."""
    calls = []

    def shard(model, units, device, dtype, method):
        calls.append((list(units), device, dtype, method, model.cls_token.device.type))
        model.to_empty(device=device)

    monkeypatch.setattr(fsdp, "shard", shard)
    call = capture("--input_size", 16, "--fsdp", "--amp", "bf16", "--decoder_depth", 2, model_class=kind)
    ((units, *arguments),) = calls
    assert units == [*call.model.blocks, *call.model.decoder_blocks]
    assert arguments == [torch.device("cpu"), torch.bfloat16, "reconstruct", built_on]


# --------------------------------------------------------------------------------------------------------- pictures


class Log(run_log.NullLog):
    def __init__(self):
        self.pictures = []

    def picture(self, tag, picture, epoch):
        self.pictures.append((tag, picture, epoch))


@pytest.mark.parametrize(
    ("flags", "epochs", "logged"),
    [
        ([], 400, [*range(0, 400, 20), 399]),
        (["--vis_every", 15, "--epochs", 32], 32, [0, 15, 30, 31]),
        (["--vis_every", 0], 400, []),
    ],
)
def test_when_reconstructions_are_logged(capture, monkeypatch, flags, epochs, logged):
    record_calls(monkeypatch, pictures, "reconstruction", "picture")
    call, log = capture("--input_size", 16, *flags), Log()
    assert all(call.after_epoch(epoch, log) == {} for epoch in range(epochs))
    assert log.pictures == [("reconstruction", "picture", epoch) for epoch in logged]


def test_eight_evenly_spaced_images_are_reconstructed(capture, monkeypatch):
    """Eight images, evenly spread, as in evaluation: center crops, with the noise of epoch 0."""
    calls = record_calls(monkeypatch, pictures, "reconstruction")
    call = capture("--input_size", 16, "--mask_ratio", 0.6, "--seed", 3)
    call.model.train()
    call.after_epoch(0, Log())
    (((model, images, noise, normalize, mask_ratio), _),) = calls
    assert model is call.model
    assert not model.training  # no drop path
    assert normalize is call.train_one_epoch.keywords["normalize"]
    assert mask_ratio == 0.6
    assert (images.dtype, len(images)) == (torch.uint8, 8)
    center = tv.Compose(
        [tv.Resize(16, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(16), tv.PILToTensor()]
    )
    source = call.batches.batches.dataset.source
    for row, index in ((0, 0), (7, NUM_IMAGES - 1)):
        torch.manual_seed(zlib.crc32(struct.pack("<3q", 3, 0, index)))
        assert torch.equal(noise[row], torch.rand(16))
        assert torch.equal(images[row], center(Image.open(source.name(index))))


def test_all_processes_draw_pictures_only_with_sharded_weights(capture, monkeypatch):
    calls = record_calls(monkeypatch, pictures, "reconstruction")
    monkeypatch.setattr(fsdp, "shard", lambda model, units, device, *_, **__: model.to_empty(device=device))
    plain, sharded = capture("--input_size", 16), capture("--input_size", 16, "--fsdp")
    monkeypatch.setattr(main_pretrain.dist, "is_main", lambda: False)
    plain.after_epoch(0, Log())
    assert len(calls) == 0
    sharded.after_epoch(0, Log())
    assert len(calls) == 1
