"""Arguments of linear probing, and the selection of a head on held-out images."""

import math
import random

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
from torch import nn
from torch.nn import functional as F
from torchvision import transforms as tv

import engine_finetune
import main_linprobe
from models_vit import VisionTransformer
from util import lr_sched
from util.checkpoints import checkpoint
from util.data import loader
from util.lars import LARS

# The published defaults, --nb_classes, --data_path and --device excepted; --blr takes several values.
DEFAULTS = {
    "batch_size": 512, "epochs": 90, "accum_iter": 1, "model": "vit_large_patch16", "weight_decay": 0, "lr": None,
    "blr": [0.1], "min_lr": 0, "warmup_epochs": 10, "finetune": "", "global_pool": False, "eval": False,
    "dist_eval": False, "input_size": 224, "output_dir": "./output_dir", "log_dir": "./output_dir", "seed": 0,
    "resume": "", "start_epoch": 0, "num_workers": 10, "pin_mem": True, "world_size": 1, "local_rank": -1,
    "dist_on_itp": False, "dist_url": "env://", "save_every": 1, "nb_classes": None, "probe": "linear",
    "num_queries": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Most training images are bees, and most test images ants."""
    folder = tmp_path_factory.mktemp("probe")
    return make_images(folder, train={"ant": 60, "bee": 400, "cat": 60}, val={"ant": 5, "bee": 2, "cat": 1})


@pytest.fixture
def captured(monkeypatch, data, tmp_path):
    def run(**flags):
        paths = {"data_path": data, "output_dir": tmp_path / "run", "num_workers": 0}
        return capture(monkeypatch, main_linprobe, **(paths | flags))

    return run


def mini(**flags):
    return {"model": "vit_mini_patch4", "input_size": 16, **flags}


def test_the_defaults_are_the_published_ones():
    args = vars(parse(main_linprobe))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_the_defaults_reach_the_run(captured, data, tmp_path):
    run = captured(num_workers=10, data_path=data)
    assert len(run.model.blocks) == 24
    assert hasattr(run.model, "norm")  # the class token, normalized
    assert_probe(run)
    assert run.train_one_epoch.func is engine_finetune.train_one_epoch
    options = run.train_one_epoch.keywords
    assert {name for name, value in options.items() if value is not None} == {"criterion", "normalize"}
    assert (run.loss_tag, run.evaluates, run.trained) == ("loss", False, None)
    order = run.batches.order
    assert (order.batch_size, order.seed, len(order), run.batches.batches.num_workers) == (512, 0, 1, 10)
    samples = run.batches.batches.dataset
    assert (len(samples), samples.seed, samples.on_bad_image) == (520, 0, "error")
    assert run.settings["classes"] == ["ant", "bee", "cat"]
    assert (run.settings["nb_classes"], run.settings["blr"]) == (3, 0.1)
    assert (run.settings["save_every"], run.settings["eval_every"], run.settings["warmup_epochs"]) == (1, 1, 10)
    assert run.prepared == [{"output_dir": tmp_path / "run", "resume": ""}]
    (test_set,) = run.evaluation
    assert (len(test_set["samples"]), test_set["batch_size"], test_set["num_workers"]) == (8, 512, 10)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(options["normalize"](images), normalized(images))


def assert_probe(run, width=16):
    """The encoder is frozen, and only the published head is trained."""
    normalization, linear = run.model.head
    assert type(normalization) is nn.BatchNorm1d and type(linear) is nn.Linear
    assert (normalization.eps, normalization.affine, normalization.num_features) == (1e-6, False, width)
    assert linear.weight.detach().std().item() == pytest.approx(0.01, rel=0.3)
    assert linear.bias.abs().max() == 0
    assert type(run.optimizer) is LARS
    (group,) = run.optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(linear.weight), id(linear.bias)]
    assert (group["momentum"], group["trust_coefficient"], group["weight_decay"]) == (0.9, 0.001, 0)
    assert group["lr_scale"] == 1
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert trained == ["head.1.weight", "head.1.bias"]


@pytest.mark.parametrize(
    ("size", "depth", "epochs"), [("base_patch16", 12, 90), ("large_patch16", 24, 50), ("huge_patch14", 32, 50)]
)
def test_a_recipe_is_the_published_one(captured, size, depth, epochs):
    run = captured(config=ROOT / "recipes" / f"linprobe_vit_{size.split('_')[0]}.yaml")
    assert run.settings["model"] == f"vit_{size}"
    assert (run.settings["epochs"], run.settings["warmup_epochs"]) == (epochs, 10)
    assert (run.settings["min_lr"], run.settings["global_pool"]) == (0, False)
    assert lr_sched.scaled_lr(run.settings["lr"], run.settings["blr"], 16384) == pytest.approx(6.4)
    assert len(run.model.blocks) == depth
    assert_probe(run)


@pytest.mark.parametrize(("size", "depth"), [("base", 12), ("large", 24)])
def test_an_attentive_recipe_is_the_published_one(captured, size, depth):
    run = captured(config=ROOT / "recipes" / f"linprobe_attentive_vit_{size}.yaml", num_queries=8)
    assert (run.settings["epochs"], run.settings["warmup_epochs"], run.settings["min_lr"]) == (90, 10, 0)
    assert lr_sched.scaled_lr(run.settings["lr"], run.settings["blr"], 4096) == pytest.approx(1.6)
    assert (len(run.model.blocks), run.model.head.pool.queries.shape) == (depth, (8, 16))
    assert (type(run.optimizer), run.evaluates, run.trained) == (LARS, True, None)
    (group,) = run.optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(own) for own in run.model.head.parameters()]
    assert group["weight_decay"] == 0
    recipe = parse(main_linprobe, config=ROOT / "recipes" / f"linprobe_attentive_vit_{size}.yaml")
    assert (recipe.probe, recipe.num_queries, recipe.model) == ("attentive", 32, f"vit_{size}_patch16")


def test_an_attentive_probe_is_evaluated_on_new_or_stored_tokens(captured, monkeypatch):
    """The head that answers "ant" is correct for 5 of 8 test images."""
    for cached in (False, True):
        flags = {"cache_features": True} if cached else {}
        run = captured(**mini(probe="attentive", batch_size=100, epochs=1, accum_iter=2), **flags)
        constant_head(run.model.head[2], 0)
        assert run.after_epoch(0, None)["test_acc1"] == 62.5
        assert (run.evaluates, run.trained) == ((False, run.model.head) if cached else (True, None))
    batch = next(iter(run.batches))
    assert (batch[0].dtype, batch[0].shape) == (torch.float16, (100, 16, 128))
    inputs = []
    loss_function(monkeypatch, run, lambda tokens: inputs.append(tokens) or run.model.head(tokens))(batch)
    assert inputs[0].dtype is torch.float32


def crop_once(picture):
    """The published crop: area uniform from .08 to 1, logarithm of the ratio uniform, clipped to the picture."""
    width, height = picture.size
    area = width * height * random.uniform(0.08, 1.0)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    cut_height, cut_width = (min(round(math.sqrt(area * r)), side) for r, side in ((1 / ratio, height), (ratio, width)))
    top, left = random.randint(0, height - cut_height), random.randint(0, width - cut_width)
    return picture.crop((left, top, left + cut_width, top + cut_height))


def test_training_crops_once_and_flips(captured):
    transform = captured().batches.batches.dataset.transform
    flips = 0
    for seed in range(40):
        image = seeded(transform, photo(), seed)
        random.seed(seed)
        size, bicubic = [224, 224], tv.InterpolationMode.BICUBIC
        expected = tv.functional.pil_to_tensor(tv.functional.resize(crop_once(photo()), size, bicubic))
        flipped = torch.equal(image, expected.flip(-1))
        assert flipped or torch.equal(image, expected), seed
        flips += flipped
    assert 10 <= flips <= 30


def test_evaluation_uses_the_published_crop(captured):
    expected = tv.Compose([tv.Resize(256, tv.InterpolationMode.BICUBIC), tv.CenterCrop(224), tv.PILToTensor()])
    assert torch.equal(captured().evaluation[0]["samples"].transform(photo()), expected(photo()))


def test_every_flag_reaches_its_place(captured, tmp_path):
    run = captured(
        **mini(patch_size=8, batch_size=35, accum_iter=3, seed=7, num_workers=4, weight_decay=0.2, global_pool=True),
        crop_pct=1, on_bad_image="skip", amp="bf16", mean="0.1 0.2 0.3", std="0.4 0.5 0.6", train_per_class=50,
        dist_url="tcp://x", dist_timeout=9, dist_backend="gloo", resume="auto", blr="0.7",
    )  # fmt: skip
    assert hasattr(run.model, "fc_norm")
    assert run.model.patch_embed.patch_size == (8, 8)
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.2
    order, samples = run.batches.order, run.batches.batches.dataset
    assert (order.batch_size, order.seed, len(order), run.batches.batches.num_workers) == (35, 7, 3, 4)
    assert (len(samples), samples.seed, samples.on_bad_image) == (150, 7, "skip")
    (test_set,) = run.evaluation
    assert (test_set["batch_size"], test_set["num_workers"]) == (35, 4)
    expected = tv.Compose([tv.Resize(16, tv.InterpolationMode.BICUBIC), tv.CenterCrop(16), tv.PILToTensor()])
    assert torch.equal(test_set["samples"].transform(photo()), expected(photo()))
    white = run.train_one_epoch.keywords["normalize"](torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert white.tolist() == pytest.approx([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])
    assert (run.settings["blr"], run.settings["mean"], run.settings["std"]) == (0.7, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert run.precision.dtype is torch.bfloat16
    assert run.joined == [{"device_name": "cpu", "dist_url": "tcp://x", "timeout": 9, "backend": "gloo"}]
    assert run.prepared[0]["resume"] == "auto"
    seed_all(7)
    expected = VisionTransformer(img_size=16, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0)
    assert torch.equal(run.model.blocks[0].mlp.fc1.weight, expected.blocks[0].mlp.fc1.weight)


def test_flags_reach_the_loop(monkeypatch, data, tmp_path):
    call = loop_arguments(
        monkeypatch, main_linprobe, data_path=data, output_dir=tmp_path / "run", batch_size=100, accum_iter=2, epochs=2,
        warmup_epochs=1, blr="1.28 0.64", clip_grad=2.5, on_nonfinite="skip", **mini(),
    )  # fmt: skip
    assert (call["epoch"], call["first_iteration"], call["accum_iter"], call["clip_grad"]) == (0, 0, 2, 2.5)
    assert call["guard"].policy == "skip"
    assert call["schedule"](0.5) == pytest.approx(0.5)  # half of 1.28 x 200 / 256
    assert [group["lr"] for group in call["optimizer"].param_groups] == pytest.approx([0.5, 0.25])


def test_the_encoder_is_loaded_from_the_file(captured, tmp_path):
    seed_all(9)  # another seed than that of the run
    encoder = VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=0)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    run = captured(**mini(finetune=tmp_path / "encoder.pth"))
    assert torch.equal(run.model.cls_token, encoder.cls_token)
    resumed = captured(**mini(resume=tmp_path / "encoder.pth"))
    assert torch.equal(resumed.model.cls_token, encoder.cls_token)
    gray = captured(**mini(finetune=tmp_path / "encoder.pth", in_chans=1, adapt_input="mean"))
    expected = encoder.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gray.model.patch_embed.proj.weight, expected)


# ----------------------------------------------------------------------------------------------------- several rates


def test_the_head_is_selected_on_held_out_images(captured, capsys, tmp_path):
    """The head for "ant" is the best one on the test set, and the head for "bee" is the best one on held-out images."""
    run = captured(**mini(blr="0.2 0.1 0.4", batch_size=100, report=tmp_path / "report", epochs=1))
    first, second, third = run.model.head
    assert [group["lr_scale"] for group in run.optimizer.param_groups] == pytest.approx([0.5, 0.25, 1])
    for head, group in zip(run.model.head, run.optimizer.param_groups, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(head[1].weight), id(head[1].bias)]
        assert torch.equal(head[1].weight, first[1].weight)  # all heads start with equal weights
    assert run.settings["blr"] == [0.2, 0.1, 0.4]
    held_out, test_set = (call["samples"] for call in run.evaluation)
    assert (len(held_out), len(test_set)) == (52, 8)
    assert {held_out.source.source.name(0).split("/")[-3], test_set.source.name(0).split("/")[-3]} == {"train", "val"}
    training = run.batches.batches.dataset.source
    names = [training.name(index) for index in range(len(training))]
    assert len(names) == 468
    assert not {held_out.source.name(index) for index in range(52)} & set(names)

    for head, label in ((first, 0), (second, 1), (third, 2)):
        constant_head(head[1], label)
    logits, labels = torch.randn(3, 6, 3), torch.arange(6) % 3
    run.train_one_epoch.keywords["criterion"](logits, labels)
    run.callbacks[0].after_update(run.model, 1.0)
    entries = run.after_epoch(0, None)
    assert entries["train_loss"] == pytest.approx(F.cross_entropy(logits[1], labels).item())  # of the chosen head
    assert "--blr 0.1, the smallest value, is the best; give --blr 0.033 0.1 0.2 0.4" in capsys.readouterr().out
    assert entries["chosen_blr"] == 0.1
    assert entries["test_acc1"] == 25.0  # of 8 test images 2 are bees; 5 are ants
    assert entries["n_parameters"] == 128 * 3 + 3
    saved = checkpoint.read(tmp_path / "run" / "probe.pth")
    assert saved["model"]["head.1.bias"].tolist() == [0, 9, 0]
    assert {name for name in saved["model"] if name.startswith("head.")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert (saved["args"]["blr"], saved["epoch"]) == (0.1, 0)
    assert torch.equal(saved["model"]["cls_token"], run.model.cls_token)
    assert (tmp_path / "report" / "classes.csv").exists()


def test_held_out_images_depend_on_the_fraction_and_the_seed(captured):
    def held_out(**flags):
        run = captured(**mini(blr="0.2 0.1", batch_size=100), **flags)
        source = run.evaluation[0]["samples"].source
        return {source.name(index) for index in range(len(source))}

    assert len(held_out(held_out=0.25)) == 130
    assert held_out(seed=1) != held_out(seed=2)
    assert captured(**mini(batch_size=520)).evaluation[0]["batch_size"] == 512  # the features of more take memory
    with pytest.raises(ValueError, match="--lr 1 sets a single rate, and --blr has 2 values; omit --lr"):
        captured(**mini(blr="0.2 0.1", lr=1))


def test_the_loss_is_the_mean_of_heads_and_gradients_are_independent(captured, monkeypatch):
    run = captured(**mini(blr="0.2 0.1 0.4", batch_size=100))
    inputs, logits = [], torch.randn(3, 6, 3, requires_grad=True)
    compute_loss = loss_function(monkeypatch, run, lambda images: inputs.append(images) or logits)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(6) % 3
    loss = compute_loss([images, labels, None])
    torch.testing.assert_close(inputs[0], normalized(images))
    losses = [F.cross_entropy(head_logits, labels) for head_logits in logits]
    assert loss.item() == pytest.approx(sum(losses).item() / 3)
    loss.backward()
    expected = (logits.softmax(dim=2) - F.one_hot(labels, 3)) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_cached_features_are_those_of_the_evaluation(captured, data):
    run = captured(**mini(cache_features=True, batch_size=100, seed=3, accum_iter=2))
    assert type(run.batches) is loader.FeatureBatches
    assert (run.batches.batch_size, run.batches.seed, len(run.batches)) == (100, 3, 4)
    assert run.trained is run.model.head
    assert run.train_one_epoch.keywords["normalize"](torch.ones(1).half()).dtype is torch.float32
    assert run.batches.labels.tolist() == [0] * 60 + [1] * 400 + [2] * 60
    with torch.no_grad():
        expected = run.model.eval().forward_features(center_crop(data / "train/ant/0.png"))
    torch.testing.assert_close(run.batches.features[:1], expected)
    assert len(run.batches.features.unique(dim=0)) <= 6  # three pictures, but for rounding
    several = captured(**mini(cache_features=True, batch_size=100, blr="0.2 0.1"))
    assert len(several.batches.labels) == 468
    assert several.trained is several.model.head


def test_eval_evaluates_a_file(data, tmp_path, capsys):
    model = VisionTransformer(16, 4, 3, 0, 128, 4, 4)
    model.head = nn.Sequential(nn.BatchNorm1d(128, affine=False, eps=1e-6), nn.Linear(128, 3))
    constant_head(model.head[1], 0)
    torch.save({"model": model.state_dict()}, tmp_path / "probe.pth")
    flags = {"data_path": data, "device": "cpu", "num_workers": 0, "report": tmp_path / "report"}
    main_linprobe.main(parse(main_linprobe, eval=True, resume=tmp_path / "probe.pth", **mini(**flags)))
    assert "* Acc@1 62.500 loss" in capsys.readouterr().out
    assert (tmp_path / "report" / "classes.csv").exists()
