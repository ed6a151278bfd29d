"""Arguments of fine-tuning for the defaults and the recipes, compared with the published values."""

import numpy as np
import pytest
import torch
from capture import (
    capture,
    center_crop,
    constant_head,
    loop_arguments,
    loss_function,
    make_images,
    normalized,
    parse,
    photo,
    seed_all,
    seeded,
)
from conftest import ROOT
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F
from torchvision import transforms as tv

import engine_finetune
import main_finetune
from models_vit import VisionTransformer
from util import lr_sched

# The published defaults, --nb_classes, --data_path and --device excepted.
DEFAULTS = {
    "batch_size": 64, "epochs": 50, "accum_iter": 1, "model": "vit_large_patch16", "input_size": 224, "drop_path": 0.1,
    "clip_grad": None, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "layer_decay": 0.75, "min_lr": 1e-6,
    "warmup_epochs": 5, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "reprob": 0.25,
    "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0, "cutmix": 0, "cutmix_minmax": None,
    "mixup_prob": 1, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "finetune": "", "global_pool": True,
    "eval": False, "dist_eval": False, "output_dir": "./output_dir", "log_dir": "./output_dir", "seed": 0,
    "resume": "", "start_epoch": 0, "num_workers": 10, "pin_mem": True, "world_size": 1, "local_rank": -1,
    "dist_on_itp": False, "dist_url": "env://", "save_every": 1, "nb_classes": None,
}  # fmt: skip

# Model, blocks, epochs, learning rate at an effective batch size of 1024, layer decay, drop path.
BASE = ("vit_base_patch16", 12, 100, 2e-3, 0.65, 0.1)
LARGE = ("vit_large_patch16", 24, 50, 4e-3, 0.75, 0.2)
HUGE = ("vit_huge_patch14", 32, 50, 4e-3, 0.75, 0.3)
RECIPES = {
    "vit_base": BASE, "vit_large": LARGE, "vit_huge": HUGE, "vit_huge_448": HUGE, "vit_base_mmpretrain": BASE,
    "vit_large_mmpretrain": LARGE, "vit_huge_mmpretrain": HUGE, "inat2017": BASE, "inat2018": BASE, "inat2019": BASE,
    "places205": (*BASE[:2], 50, *BASE[3:]), "places365": (*BASE[:2], 50, *BASE[3:]),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return make_images(folder, train={"ant": 50, "bee": 50, "cat": 30}, val={"ant": 5, "bee": 2, "cat": 1})


@pytest.fixture
def captured(monkeypatch, data, tmp_path):
    def run(**flags):
        return capture(monkeypatch, main_finetune, **({"data_path": data, "output_dir": tmp_path / "run"} | flags))

    return run


def groups(run):
    """Returns the learning-rate scale and the weight decay of each trained parameter."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    param_groups = run.optimizer.param_groups
    return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in param_groups for p in group["params"]}


def published_groups(model, depth, layer_decay, weight_decay):
    expected = {}
    for name, parameter in model.named_parameters():
        layer_id = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0}.get(name.split(".")[0], depth + 1)
        if name.startswith("blocks."):
            layer_id = int(name.split(".")[1]) + 1
        decays = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        expected[name] = (pytest.approx(layer_decay ** (depth + 1 - layer_id)), weight_decay if decays else 0)
    return expected


def drop_paths(model):
    return [float(getattr(block.drop_path, "drop_prob", 0)) for block in model.blocks]


def timms_transform(size=(224, 224), **options):
    options = {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": None,
        "scale": (0.08, 1.0),
        "hflip": 0.5,
    } | options
    return create_transform((3, *size), is_training=True, interpolation="bicubic", normalize=False,
                            mean=(0.485, 0.456, 0.406), **options)  # fmt: skip


def assert_same_transform(transform, expected, seeds=6):
    for seed in range(seeds):
        assert torch.equal(seeded(transform, photo(), seed), seeded(expected, photo(), seed)), seed


def training_samples(run):
    return run.batches.batches.dataset


def test_the_defaults_are_the_published_ones():
    args = vars(parse(main_finetune))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_the_defaults_reach_the_run(captured, data, tmp_path):
    run = captured()
    assert len(run.model.blocks) == 24
    assert type(run.optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.9, 0.999) and group["fused"] for group in run.optimizer.param_groups)
    assert groups(run) == published_groups(run.model, 24, 0.75, 0.05)
    assert groups(run)["cls_token"] == (pytest.approx(0.75**25), 0)
    assert groups(run)["blocks.23.attn.qkv.weight"] == (pytest.approx(0.75), 0.05)
    assert drop_paths(run.model) == pytest.approx([0.1 * block / 23 for block in range(24)])
    assert hasattr(run.model, "fc_norm")  # --global_pool is on
    options = run.train_one_epoch.keywords
    assert run.train_one_epoch.func is engine_finetune.train_one_epoch
    assert type(options["criterion"]) is torch.nn.CrossEntropyLoss
    assert options["criterion"].label_smoothing == 0.1
    assert options["mixup"] is None
    assert_erases(options["erase"], 0.25, 1, per_pixel=True)
    assert_same_transform(training_samples(run).transform, timms_transform())
    assert (run.loss_tag, run.evaluates, run.trained) == ("loss", True, None)
    assert run.batches.order.batch_size == 64
    assert (len(run.batches), run.batches.order.seed, run.batches.batches.num_workers) == (2, 0, 10)
    assert training_samples(run).seed == 0
    assert training_samples(run).on_bad_image == "error"
    assert run.settings["classes"] == ["ant", "bee", "cat"]
    assert (run.settings["nb_classes"], run.settings["mean"], run.settings["std"]) == (3, None, None)
    assert {name: run.settings[name] for name in ("eval_every", "save_every", "keep_last", "save_minutes", "clip_grad",
                                                  "on_nonfinite", "accum_iter", "compile")} == {
        "eval_every": 1, "save_every": 1, "keep_last": None, "save_minutes": 15, "clip_grad": None,
        "on_nonfinite": "abort", "accum_iter": 1, "compile": False,
    }  # fmt: skip
    assert run.prepared == [{"output_dir": tmp_path / "run", "resume": ""}]
    assert [call["split"] for call in run.opened] == ["train", "val"]
    assert {call["data_path"] for call in run.opened} == {str(data)}


def assert_erases(erase, probability, max_count, per_pixel=False, rand_color=False):
    assert type(erase) is RandomErasing
    assert (erase.probability, erase.min_count, erase.max_count) == (probability, 1, max_count)
    assert (erase.per_pixel, erase.rand_color, erase.device) == (per_pixel, rand_color, "cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_published_one(captured, name):
    model, depth, epochs, lr, layer_decay, drop_path = RECIPES[name]
    run = captured(config=ROOT / "recipes" / f"finetune_{name}.yaml")
    settings = run.settings
    assert settings["model"] == model
    assert (settings["epochs"], settings["warmup_epochs"], settings["min_lr"]) == (epochs, 5, 1e-6)
    assert lr_sched.scaled_lr(settings["lr"], settings["blr"], 1024) == pytest.approx(lr)
    assert len(run.model.blocks) == depth
    assert groups(run) == published_groups(run.model, depth, layer_decay, 0.05)
    assert drop_paths(run.model) == pytest.approx([drop_path * block / (depth - 1) for block in range(depth)])
    options = run.train_one_epoch.keywords
    assert type(options["criterion"]) is SoftTargetCrossEntropy
    assert vars(options["mixup"]) == vars(Mixup(0.8, 1.0, None, 1.0, 0.5, "batch", True, 0.1, 3))
    assert_erases(options["erase"], 0.25, 1, per_pixel=True)
    side = 448 if name == "vit_huge_448" else 224
    assert_same_transform(training_samples(run).transform, timms_transform((side, side)), seeds=2)
    assert run.evaluation[0]["samples"].transform(photo()).shape == (3, side, side)
    assert settings["global_pool"]


def test_the_recipe_of_the_demo(captured):
    run = captured(config=ROOT / "recipes/finetune_fashion_mnist.yaml")
    settings = {"model": "vit_mini_patch4", "patch_size": 7, "input_size": 28, "in_chans": 1, "mean": [0.286],
                "std": [0.353], "crop_scale": [0.7, 1.0], "crop_pct": 1.0, "batch_size": 32, "epochs": 60, "lr": 1e-3,
                "warmup_epochs": 5, "eval_every": 60, "mixup": 0.8, "cutmix": 1.0, "aa": "none", "reprob": 0,
                "layer_decay": 0.75, "drop_path": 0.1, "smoothing": 0.1}  # fmt: skip
    assert {name: run.settings[name] for name in settings} == settings
    assert run.train_one_epoch.keywords["erase"] is None
    expected = timms_transform((28, 28), auto_augment=None, scale=(0.7, 1.0))
    assert_same_transform(training_samples(run).transform, expected)
    assert run.train_one_epoch.keywords["normalize"](torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).flatten()[
        0
    ].item() == pytest.approx((1 - 0.286) / 0.353)


def test_every_flag_reaches_its_place(captured, tmp_path):
    run = captured(
        model="vit_mini_patch4", input_size="24 32", patch_size=8, batch_size=8, accum_iter=3, seed=7, num_workers=4,
        weight_decay=0.2, layer_decay=0.5, drop_path=0.3, cls_token=True, smoothing=0.2, reprob=0.6, remode="rand",
        recount=3, mixup=0.3, cutmix=0.4, mixup_prob=0.9, mixup_switch_prob=0.2, mixup_mode="elem", aa="none",
        color_jitter=0.4, crop_scale="0.5 0.9", hflip=0.8, crop_pct=0.9, on_bad_image="skip", amp="bf16",
        mean="0.1 0.2 0.3", std="0.4 0.5 0.6", train_per_class=20, dist_url="tcp://x", dist_timeout=9,
        dist_backend="gloo", resume="auto", grad_checkpointing=True, log_dir=tmp_path / "log",
    )  # fmt: skip
    assert groups(run) == published_groups(run.model, 4, 0.5, 0.2)
    assert drop_paths(run.model) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert hasattr(run.model, "norm") and not hasattr(run.model, "fc_norm")
    assert (run.model.patch_embed.img_size, run.model.patch_embed.patch_size) == ((24, 32), (8, 8))
    assert all(block.grad_checkpointing for block in run.model.blocks)
    options = run.train_one_epoch.keywords
    assert vars(options["mixup"]) == vars(Mixup(0.3, 0.4, None, 0.9, 0.2, "elem", True, 0.2, 3))
    assert_erases(options["erase"], 0.6, 3, rand_color=True)
    crop = tv.RandomResizedCrop((24, 32), (0.5, 0.9), (1, 16 / 9), interpolation=tv.InterpolationMode.BICUBIC)
    jitter = tv.ColorJitter(0.4, 0.4, 0.4)
    expected = tv.Compose([crop, tv.RandomHorizontalFlip(0.8), jitter, tv.PILToTensor()])
    assert_same_transform(training_samples(run).transform, expected)
    white = options["normalize"](torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert white.tolist() == pytest.approx([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])
    assert run.settings["mean"] == [0.1, 0.2, 0.3] and run.settings["std"] == [0.4, 0.5, 0.6]
    samples = training_samples(run)
    assert (len(samples), samples.seed, samples.on_bad_image) == (60, 7, "skip")
    order = run.batches.order
    assert (order.batch_size, order.seed, len(order), run.batches.batches.num_workers) == (8, 7, 6, 4)
    (evaluation,) = run.evaluation
    assert (evaluation["batch_size"], evaluation["num_workers"], evaluation["pin_memory"]) == (8, 4, False)
    assert (len(evaluation["samples"]), evaluation["samples"].on_bad_image) == (8, None)
    picture = photo(40, 30).resize((30, 40))
    scaled = tv.functional.resize(picture, [round(40 * 35 / 30), 35], interpolation=tv.InterpolationMode.BICUBIC)
    center = tv.functional.pil_to_tensor(tv.functional.center_crop(scaled, [24, 32]))
    assert torch.equal(evaluation["samples"].transform(picture), center)
    assert {(call["amp"], str(call["device"])) for call in run.precisions} == {("bf16", "cpu")}
    assert run.precision.dtype is torch.bfloat16
    assert run.joined == [{"device_name": "cpu", "dist_url": "tcp://x", "timeout": 9, "backend": "gloo"}]
    assert run.prepared[0]["resume"] == "auto"
    seed_all(7)
    expected = VisionTransformer(img_size=(24, 32), patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=3)
    assert torch.equal(run.model.blocks[0].mlp.fc1.weight, expected.blocks[0].mlp.fc1.weight)


def test_flags_reach_the_loop(monkeypatch, data, tmp_path):
    call = loop_arguments(
        monkeypatch, main_finetune, data_path=data, output_dir=tmp_path / "run", model="vit_mini_patch4", input_size=16,
        batch_size=10, accum_iter=3, epochs=1, warmup_epochs=2, lr=0.5, clip_grad=2.5, on_nonfinite="skip",
    )  # fmt: skip
    assert (call["epoch"], call["first_iteration"], call["accum_iter"], call["clip_grad"]) == (0, 0, 3, 2.5)
    assert (call["guard"].policy, call["guard"].overflow_is_normal) == ("skip", False)
    assert call["schedule"](1.0) == pytest.approx(0.25)
    assert call["optimizer"].param_groups[0]["lr"] == pytest.approx(0.25 * 0.75**5)


@pytest.mark.parametrize(("size", "scaled"), [(32, 32), (224, 256), (240, 240)])
def test_evaluation_uses_the_published_crop(captured, size, scaled):
    run = captured(model="vit_mini_patch4", input_size=size, patch_size=8)
    expected = tv.Compose([tv.Resize(scaled, tv.InterpolationMode.BICUBIC), tv.CenterCrop(size), tv.PILToTensor()])
    assert torch.equal(run.evaluation[0]["samples"].transform(photo()), expected(photo()))


@pytest.mark.parametrize(
    ("flags", "criterion"),
    [
        ({"smoothing": 0}, lambda logits, labels: F.cross_entropy(logits, labels)),
        ({"smoothing": 0.3}, lambda logits, labels: smoothed(logits, labels, 0.3)),
        ({}, lambda logits, labels: smoothed(logits, labels, 0.1)),
    ],
    ids=["none", "0.3", "default"],
)
def test_smoothing_without_mixup(captured, flags, criterion):
    run = captured(model="vit_mini_patch4", input_size=16, **flags)
    logits, labels = torch.randn(8, 3), torch.randint(0, 3, (8,))
    torch.testing.assert_close(run.train_one_epoch.keywords["criterion"](logits, labels), criterion(logits, labels))


def smoothed(logits, labels, amount):
    """The formula of LabelSmoothingCrossEntropy."""
    logs = logits.log_softmax(dim=1)
    return ((1 - amount) * -logs.gather(1, labels[:, None])[:, 0] - amount * logs.mean(dim=1)).mean()


@pytest.mark.parametrize("flag", [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": "0.2 0.8"}])
def test_a_batch_is_normalized_then_erased_then_mixed(captured, monkeypatch, flag):
    run = captured(model="vit_mini_patch4", input_size=16, reprob=1, **flag)
    inputs, logits = [], torch.randn(8, 3)
    compute_loss = loss_function(monkeypatch, run, lambda images: inputs.append(images.clone()) or logits)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(8) % 3
    seed_all(5)
    loss = compute_loss([images.clone(), labels, torch.rand(8, 0)])
    seed_all(5)
    minmax = (0.2, 0.8) if "cutmix_minmax" in flag else None
    mixup = Mixup(flag.get("mixup", 0), flag.get("cutmix", 0), minmax, 1.0, 0.5, "batch", True, 0.1, 3)
    erased = RandomErasing(1.0, mode="pixel", max_count=1, device="cpu")(normalized(images))
    expected, targets = mixup(erased, labels)
    torch.testing.assert_close(inputs[0], expected)
    assert not torch.equal(expected, normalized(images))
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_a_new_head_is_small_and_the_encoder_is_loaded(captured, tmp_path):
    seed_all(9)  # another seed than that of the run
    encoder = VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=0)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    flags = {"model": "vit_mini_patch4", "input_size": 16, "finetune": tmp_path / "encoder.pth"}
    run = captured(**flags)
    assert run.model.head.weight.detach().std().item() == pytest.approx(2e-5, rel=0.2)
    assert torch.equal(run.model.cls_token, encoder.cls_token)
    gray = captured(**flags, in_chans=1, adapt_input="mean").model.patch_embed.proj.weight
    torch.testing.assert_close(gray, encoder.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    partly = captured(**flags, unfreeze_blocks=1)
    trained = {name.rsplit(".", 1)[0] for name in groups(partly)}
    assert {name.split(".")[0] for name in trained} == {"blocks", "head", "fc_norm"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"3"}
    assert groups(partly)["blocks.3.mlp.fc1.weight"] == (0.75, 0.05)


def test_an_epochs_evaluation(captured, data, tmp_path):
    """All predictions are "bee", and 2 of 8 images are bees."""
    run = captured(model="vit_mini_patch4", input_size=16, num_workers=0, unfreeze_blocks=0,
                   report=tmp_path / "report")  # fmt: skip
    constant_head(run.model.head, 1)
    inputs = []
    run.model.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    entries = run.after_epoch(0, None)
    assert entries["test_acc1"] == 25.0
    likely = 0.75 * 9 + np.log1p(2 * np.exp(-9))  # mean of -log softmax
    assert entries["test_loss"] == pytest.approx(likely)
    assert entries["n_parameters"] == 128 * 3 + 3 + 2 * 128  # the head and fc_norm
    rows = (tmp_path / "report" / "classes.csv").read_text().splitlines()
    assert rows[1:] == ["ant,5,0,0.0000,bee", "bee,2,2,1.0000,", "cat,1,0,0.0000,bee"]
    torch.testing.assert_close(inputs[0][:1], center_crop(data / "val/ant/0.png"))


def test_wrong_settings_are_errors(captured, data):
    with pytest.raises(ValueError, match="the data has 3 classes, and --nb_classes is 4"):
        captured(nb_classes=4)
    with pytest.raises(ValueError, match="--cutmix_minmax: give the smaller fraction first"):
        captured(model="vit_mini_patch4", input_size=16, cutmix_minmax="0.8 0.2")


def test_eval_evaluates_a_file(captured, data, tmp_path):
    model = VisionTransformer(16, 4, 3, 3, 128, 4, 4, global_pool=True)
    constant_head(model.head, 0)
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    flags = {"model": "vit_mini_patch4", "input_size": 16, "data_path": data, "device": "cpu", "num_workers": 0}
    scores = main_finetune.main(parse(main_finetune, eval=True, resume=tmp_path / "tuned.pth", **flags))
    assert (scores.acc1, scores.num_in_top) == (62.5, None)
    repeated = main_finetune.main(
        parse(main_finetune, eval=True, resume="auto", finetune=tmp_path / "tuned.pth", **flags)
    )
    assert repeated.loss == scores.loss
    assert scores.labels.tolist() == [0] * 5 + [1] * 2 + [2]
