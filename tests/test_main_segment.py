"""Segmentation: training, exact evaluation and resume, datasets of several layouts, checkpoints that need no flags."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import forks
import numpy as np
import pytest
import torch
from mains import Stopped, argv_of, assert_same_run, call, lines, parse, stop_after, stop_and_resume, weights
from PIL import Image
from segments import make_scenes

import engine_segment
import mae.build
import main_finetune
import main_segment
import models_segment
import models_vit
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import get_model
from mae.inference import segment as inference_segment
from models_mae import mae_vit_mini_patch4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve images for training, and five for validation."""
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def segment(scenes, tmp_path):
    """Runs main_segment.py in this process with small settings; returns the output directory, or the scores."""

    def run(name="run", **flags):
        out = tmp_path / name
        settings = {
            "data_path": scenes, "output_dir": out, "nb_classes": 3, "model": "vit_mini_patch4", "input_size": 16,
            "batch_size": 4, "epochs": 2, "lr": 0.01, "num_workers": 0, "device": "cpu", "amp": "off",
        } | flags  # fmt: skip
        scores = call(main_segment, **{name: value for name, value in settings.items() if value is not None})
        return out if scores is None else scores

    return run


@pytest.fixture
def encoder(tmp_path):
    """A file of main_pretrain.py."""
    torch.manual_seed(3)
    model = mae_vit_mini_patch4(img_size=16)
    args = {"model": "mae_vit_mini_patch4", "input_size": 16, "in_chans": 3, "mean": [0.4, 0.3, 0.2], "std": [0.2] * 3}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_only_the_head_learns_and_its_file_needs_no_flags(
    segment, scenes, encoder, capsys, tmp_path, head, monkeypatch
):
    monkeypatch.setattr(models_segment, "DPT_CHANNELS", (16, 16, 16, 16))  # of 27 million parameters
    monkeypatch.setattr(models_segment, "DPT_FEATURES", 16)
    report = tmp_path / "report"
    out = segment(finetune=encoder, epochs=4, head=head, input_size=20, short_side=18, hflip=0, report=report)
    last, before = lines(out)[-1], checkpoint.read(encoder)["model"]
    assert last["test_miou"] > 40 and last["test_pixel_acc"] > 60
    assert lines(out)[0]["train_loss"] > last["train_loss"]
    state = checkpoint.read(out / "checkpoint-3.pth")
    own = {name: value for name, value in state["model"].items() if not name.startswith("head.")}
    assert all(torch.equal(value, before[name]) for name, value in own.items() if name != "pos_embed")
    assert state["args"]["classes"] == ["0", "1", "2"]
    assert (state["args"]["short_side"], state["args"]["mean"]) == (18, [0.4, 0.3, 0.2])
    names = {file.name.removeprefix("checkpoint-") for file in out.glob("*.pth")}
    assert names == {"0.pth", "1.pth", "2.pth", "3.pth", "best.pth", "last.pth"}
    best = max(lines(out), key=lambda line: line["test_miou"])
    assert checkpoint.read(out / "checkpoint-best.pth")["epoch"] == best["epoch"]

    output = capsys.readouterr().out
    assert {int(count) for count in re.findall(r"(\d+) images(?! and masks|/s)", output)} == {12, 5}
    assert "untrained encoder" not in output
    scores = call(main_segment, eval=True, resume=out / "checkpoint-3.pth", data_path=scenes, num_workers=0,
                  device="cpu", report=tmp_path / "other")  # fmt: skip
    printed = capsys.readouterr().out
    assert f"* mIoU {last['test_miou']:.3f} pixel accuracy {last['test_pixel_acc']:.3f}" in printed
    assert re.search(r"shorter side of 18 pixels.* 20 x 20 pixels", printed) and "warning" not in printed
    assert scores.stats() == {name: last[name] for name in ("test_miou", "test_pixel_acc")}
    for folder in ("report", "other"):
        with (tmp_path / folder / "classes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["iou"]) for row in rows] == pytest.approx(scores.iou / 100, abs=1e-4)
        assert [int(row["pixels"]) for row in rows] == scores.matrix.sum(axis=1).tolist()
        assert Image.open(tmp_path / folder / "confusion.png").width > 300


def test_a_resumed_run_with_other_masks_or_sizes_is_an_error(segment):
    """The default of --short_side is recorded as the number of pixels."""
    out = segment(epochs=1)
    assert get_model(out / "checkpoint-0.pth", input_size=32).short_side == 16
    for changed, named in (({"short_side": 24}, "short_side=16"), ({"reduce_zero_label": True}, "reduce_zero_label="),
                           ({"nb_classes": 4}, "classes")):  # fmt: skip
        with pytest.raises(CheckpointError, match=named):
            segment(**{"short_side": 16, "resume": "auto", **changed})
    assert len(lines(segment(short_side=16, resume="auto"))) == 2


@pytest.mark.parametrize(("training", "validation", "noticed"), [
    ((0, 255), (0, 255), ["training", "validation"]), ((0, 255), (0, 1), ["training"]), ((0, 1), (0, 1), []),
    ((0, 1), (255, 255), ["validation"]), ((255, 255), (0, 1), ["training"]),
])  # fmt: skip
def test_masks_of_one_class_or_none_are_noticed(segment, tmp_path, capsys, training, validation, noticed):
    """The usual values of two classes are 0 and 255, and 255 is ignored: the score would be 100 %."""
    scenes = make_scenes(tmp_path / "binary", train=4, val=2)
    for folder, values in (("training", training), ("validation", validation)):
        for path in (scenes / "annotations" / folder).iterdir():
            mask = np.asarray(Image.open(path))
            Image.fromarray(np.array(values, np.uint8)[(mask > 0).astype(int)]).save(path)
    out = segment(data_path=scenes, nb_classes=2, epochs=1, report=tmp_path / "report")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ") and "255" in line]
    assert [next(name for name in ("training", "validation") if name in line) for line in warnings] == noticed
    score = lines(out)[0]["test_miou"]
    assert score is None if validation == (255, 255) else 0 <= score <= 100


@pytest.mark.parametrize(("unfreeze", "calls"), [("0", 2), ("all", 5)])
def test_a_resumed_run_equals_an_uninterrupted_run(segment, encoder, monkeypatch, unfreeze, calls):
    """With worker processes, drop path and batch norm; the second run is killed within an epoch."""
    settings = {
        "finetune": encoder, "num_workers": 1, "unfreeze_blocks": unfreeze, "drop_path": 0.2, "batch_size": 2,
        "accum_iter": 2,
    }  # fmt: skip
    complete = segment("complete", **settings)

    def without_initial_weights(name, **flags):
        if "resume" in flags:
            flags["finetune"].unlink()
        return segment(name, **flags)

    assert_same_run(complete, stop_and_resume(monkeypatch, without_initial_weights, calls, **settings))


def test_settings_of_a_frozen_encoder_are_named(segment, encoder, capsys):
    segment(finetune=encoder, epochs=1, layer_decay=0.5, drop_path=0.1)
    output = capsys.readouterr().out
    assert "`drop_path` has no effect" in output and "`layer_decay` has no effect" in output


def test_all_parameters_train_with_layer_wise_decay(segment, encoder):
    out = segment(finetune=encoder, unfreeze_blocks="all", epochs=1, layer_decay=0.5)
    before, after = checkpoint.read(encoder)["model"], weights(out, "checkpoint-0.pth")
    assert not any(torch.equal(after[name], before[name]) for name in ("cls_token", "blocks.0.mlp.fc1.weight"))
    groups = checkpoint.read(out / "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {
        (0.5**layer, decay) for layer in range(6) for decay in (0, 0.01)
    }
    assert all(group["betas"] == (0.9, 0.999) and group["fused"] for group in groups)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_processes(scenes, encoder, tmp_path):
    """Five images in one and three processes, and the scores of the last epoch of two processes."""
    data = {"data_path": scenes, "num_workers": 0, "device": "cpu"}
    flags = {**data, "nb_classes": 3, "model": "vit_mini_patch4", "input_size": 16, "epochs": 2, "batch_size": 2,
             "lr": 0.01, "finetune": encoder, "output_dir": tmp_path / "run", "unfreeze_blocks": 1}  # fmt: skip
    forks.run("main_segment.py", argv_of(flags), tmp_path / "output.txt", 2)
    last = lines(tmp_path / "run")[-1]
    for processes in (1, 3):
        report = tmp_path / f"report{processes}"
        flags = {**data, "eval": True, "resume": tmp_path / "run/checkpoint-1.pth", "report": report}
        output = forks.run("main_segment.py", argv_of(flags), tmp_path / f"{processes}.txt", processes)
        printed = re.findall(r"^\* mIoU.*", output, re.MULTILINE)
        # Rank 0 evaluates with the statistics of batch norm that it saves.
        assert printed == [f"* mIoU {last['test_miou']:.3f} pixel accuracy {last['test_pixel_acc']:.3f}"]
        assert (report / "confusion.csv").read_text() == (tmp_path / "report1" / "confusion.csv").read_text()


def test_the_loss_is_that_of_the_pixels_that_are_not_ignored():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, requires_grad=True)
    masks = torch.randint(0, 3, (4, 5, 6), dtype=torch.uint8)
    masks[0] = 255
    masks[1, :2] = 255
    loss = engine_segment.pixel_loss(logits, masks)
    log_probabilities = logits.log_softmax(dim=1)
    total = sum(
        -log_probabilities[b, masks[b, i, j].long(), i, j]
        for b in range(4) for i in range(5) for j in range(6) if masks[b, i, j] != 255
    )  # fmt: skip
    torch.testing.assert_close(loss, total / masks.numel())
    halves = [engine_segment.pixel_loss(logits[part], masks[part]) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, loss)  # whatever is ignored
    assert engine_segment.pixel_loss(logits[:1], masks[:1]) == 0


@pytest.mark.parametrize("layout", ["ade20k", "parts"])
def test_datasets_without_the_value_zero(tmp_path, segment, layout):
    root = make_scenes(tmp_path / layout, layout, zero_label=True)
    out = segment(data_path=root, reduce_zero_label=True, epochs=1)
    scores = segment("nothing", eval=True, resume=out / "checkpoint-0.pth", data_path=root, nb_classes=None)
    assert scores.miou == lines(out)[-1]["test_miou"]
    assert scores.matrix.sum() == 5 * (24 * 30 - 4)  # four pixels are ignored


def test_a_palette_decodes_masks_and_names_classes(tmp_path, segment):
    root = make_scenes(tmp_path / "scenes", "splits")
    colors = np.full((256, 3), 7, dtype=np.uint8)
    colors[:3] = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    for file in root.glob("*/masks/*.png"):
        Image.fromarray(colors[np.asarray(Image.open(file))]).save(file)
    (tmp_path / "palette.txt").write_text("1 2 3 sky\n4 5 6 sea\n7 8 9 sand\n")
    out = segment(data_path=root, palette=tmp_path / "palette.txt", nb_classes=None, epochs=1)
    args = checkpoint.read(out / "checkpoint-0.pth")["args"]
    assert (args["classes"], args["colors"]) == (["sky", "sea", "sand"], [1, 2, 3, 4, 5, 6, 7, 8, 9])
    scores = segment("nothing", eval=True, resume=out / "checkpoint-0.pth", data_path=root, nb_classes=None)
    assert scores.miou == lines(out)[-1]["test_miou"]
    assert scores.matrix.sum() == 5 * (24 * 30 - 4)
    (tmp_path / "other.txt").write_text("4 5 6 sea\n1 2 3 sky\n7 8 9 sand\n")
    with pytest.raises(ValueError, match="sky, sea, sand"):
        segment("nothing", eval=True, resume=out / "checkpoint-0.pth", data_path=root, nb_classes=None,
                palette=tmp_path / "other.txt")  # fmt: skip


def test_errors_name_the_remedy(segment, encoder, tmp_path, classify, capsys):
    (tmp_path / "palette.txt").write_text("1 2 3 sky\n")
    own = segment(epochs=1) / "checkpoint-0.pth"
    assert "no `finetune`: the features are from an untrained encoder" in capsys.readouterr().out
    segment("all", epochs=1, unfreeze_blocks="all")
    assert "no `finetune`" not in capsys.readouterr().out
    for flags, message in (
        ({"name": "new", "nb_classes": None}, "nb_classes.*palette="),
        ({"name": "new", "palette": tmp_path / "palette.txt"}, "nb_classes=3.*palette="),
        ({"name": "new", "nb_classes": 256}, "nb_classes=256"),
        ({"eval": True}, "`eval` .*`resume` .*`finetune`"),
        ({"eval": True, "resume": encoder}, "encoder.pth"),
        ({"eval": True, "resume": own, "nb_classes": 7}, "nb_classes=7.*checkpoint-0.pth"),
        ({"eval": True, "resume": own, "nb_classes": None, "palette": tmp_path / "palette.txt"},
         "palette=.*checkpoint-0.pth"),
        ({"eval": True, "resume": own, "head": "dpt"}, "head=linear"),
        ({"head": "dpt", "resume": "auto"}, "head=linear"),
        ({"name": "fresh", "resume": encoder}, "encoder.pth"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            segment(**flags)
    with pytest.raises(CheckpointError, match=r"checkpoint-0.pth"):
        classify(main_finetune, eval=True, resume=own)
    classify(main_finetune, "tuned", finetune=own, epochs=1, cls_token=True, batch_size=8)
    bad = make_scenes(tmp_path / "bad", train=4, val=2)
    Image.fromarray(np.full((24, 30), 9, dtype=np.uint8)).save(bad / "annotations/validation/01.png")
    with pytest.raises(ValueError, match=r"01.jpg: .*01.png: .*value 9"):
        segment("bad", data_path=bad, epochs=1)


@pytest.mark.parametrize("name", ["ade20k_vit_huge", "voc_vit_huge", "loveda_vit_huge", "ade20k_vit_base_finetune"])
def test_recipes_build_their_models(name, tmp_path, monkeypatch):
    """By their names, in any folder; one of them names a palette of recipes/."""
    monkeypatch.chdir(tmp_path)
    run = parse(main_segment, config=f"segment_{name}")
    size, classes = run.images.input_size, {"ade": 150, "voc": 21, "lov": 7}[name[:3]]
    with torch.device("meta"):
        facts = main_segment.pair_settings(run.model, run.images, run.data.dataset)
        model = mae.build.segmenter(replace(run.model, nb_classes=facts["nb_classes"]), run.images)
        assert model(torch.zeros(1, 3, size, size)).shape == (1, classes, size, size)
    assert (len(model.blocks), model.frozen) == ((32, True) if "huge" in name else (12, False))
    assert "voc" not in name or facts["classes"][:2] == ["background", "aeroplane"]


def test_the_class_tokens_are_those_of_the_file(segment, tmp_path):
    model = mae_vit_mini_patch4(img_size=16, num_cls_tokens=3, learned_pos_embed=True)
    torch.save({"model": model.state_dict()}, tmp_path / "several.pth")
    out = segment(finetune=tmp_path / "several.pth", epochs=1)
    loaded = get_model(out / "checkpoint-0.pth")
    assert loaded.num_prefix_tokens == 3
    assert torch.equal(loaded.cls_token, model.cls_token)
    segment(eval=True, resume=out / "checkpoint-0.pth")


def test_adapters_of_a_frozen_encoder_learn(segment, encoder):
    out = segment(finetune=encoder, lora=2, epochs=1)
    state, before = checkpoint.read(out / "checkpoint-0.pth")["model"], checkpoint.read(encoder)["model"]
    assert all(value.any() for name, value in state.items() if name.endswith("lora_b"))
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("pooled", [True, False])
def test_a_classifier_is_an_encoder(segment, tmp_path, pooled):
    """The norm after pooling becomes that of the tokens; the head of the classifier is not used."""
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", input_size=16, nb_classes=3, global_pool=pooled)
    norm = model.fc_norm if pooled else model.norm
    torch.nn.init.normal_(norm.weight)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "classifier.pth")
    state = weights(segment(finetune=tmp_path / "classifier.pth", epochs=1), "checkpoint-0.pth")
    assert torch.equal(state["norm.weight"], norm.weight)
    assert torch.equal(state["blocks.3.mlp.fc2.weight"], model.blocks[3].mlp.fc2.weight)
    assert "fc_norm.weight" not in state


def test_the_log_has_a_polynomial_rate(segment):
    """Of each update, as PyTorch computes it."""
    out = segment(epochs=4, poly_power=0.7)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=12, power=0.7)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    expected = [sum(rates[3 * n : 3 * n + 3]) / 3 for n in range(4)]
    assert [line["train_lr"] for line in lines(out)] == pytest.approx(expected)
    assert json.loads((out / "log.txt").read_text().splitlines()[0])["n_parameters"] == 2 * 256 + 3 * 256 + 3


def test_numbered_classes_have_the_same_names_in_all_outputs(segment, scenes, tmp_path, capsys):
    out = segment(epochs=1, report=tmp_path / "report")
    argv = [str(scenes / "images/validation/00.jpg"), "--model", str(out / "checkpoint-0.pth")]
    capsys.readouterr()
    inference_segment.main(inference_segment.get_args_parser().parse_args(argv))
    printed = {line.split("%")[1].strip() for line in capsys.readouterr().out.splitlines() if "%" in line}
    header, *rows = csv.reader((tmp_path / "report/confusion.csv").read_text().splitlines())
    assert [row[0] for row in rows] == header[1:]
    assert printed <= set(header[1:])


def test_masks_in_an_archive_do_not_count_as_images(segment, scenes, tmp_path, capsys):
    segment(epochs=1, data_path=shutil.make_archive(str(tmp_path / "scenes"), "zip", scenes))
    counts = {int(count) for count in re.findall(r"(\d+) images(?! and masks|/s)", capsys.readouterr().out)}
    assert counts == {12, 5}


@pytest.mark.slow
def test_compiled_evaluation_of_images_with_many_numbers_of_windows(tmp_path, monkeypatch):
    """A graph for each number would exceed the limit of graphs. They are not compiled to C++, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setitem(models_vit.SIZES, "mini_patch4", models_vit.SIZES["mini_patch4"] | {"depth": 1})
    torch.compiler.reset()
    make_scenes(tmp_path / "scenes", train=1, val=1, size=(16, 16))
    for number in range(1, 11):
        name = f"validation/{number:02}"
        Image.new("RGB", (8 + 5 * number, 8)).save(tmp_path / f"scenes/images/{name}.jpg")
        Image.new("L", (8 + 5 * number, 8)).save(tmp_path / f"scenes/annotations/{name}.png")
    flags = {"data_path": tmp_path / "scenes", "nb_classes": 3, "model": "vit_mini_patch4", "input_size": 8,
             "short_side": 8, "num_workers": 0, "device": "cpu", "output_dir": tmp_path}  # fmt: skip
    main_segment.main(parse(main_segment, **flags, epochs=1, batch_size=1))
    flags |= {"eval": True, "resume": tmp_path / "checkpoint-0.pth", "batch_size": 16}
    eager, compiled = (main_segment.main(parse(main_segment, **flags, **how)) for how in ({}, {"compile": True}))
    assert np.array_equal(compiled.matrix, eager.matrix)


def test_an_epoch_is_not_resumed_with_exchanged_masks(segment, scenes, tmp_path, monkeypatch):
    images, masks = (sorted(scenes.glob(f"{name}/training/*")) for name in ("images", "annotations"))
    flags = {"train_list": tmp_path / "pairs.csv"}

    def write(pairs):
        with flags["train_list"].open("w", newline="") as file:
            csv.writer(file).writerows([("image", "mask"), *pairs])

    write(zip(images, masks, strict=True))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 2)
        segment("parts", **flags, save_minutes=0)
    write(zip(images, masks[::-1], strict=True))
    with pytest.raises(CheckpointError, match="names"):
        segment("parts", **flags, resume="auto")
