"""Fine-tuning: its files, exact resume, and an evaluation that counts every image once."""

import argparse
import csv
import re
import shutil

import forks
import numpy as np
import pytest
import torch
from mains import Stopped, assert_equal, fails, lines, stop_after, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.loss import LabelSmoothingCrossEntropy

import main_finetune
import main_knn
import main_linprobe
from inference import get_model
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4
from util.checkpoints import checkpoint
from util.checkpoints.checkpoint import CheckpointError
from util.cli import entry_point

PLAIN = {"aa": "none", "reprob": 0, "drop_path": 0, "lr": 0.003}


@pytest.fixture
def finetune(classify):
    return lambda name="run", **flags: classify(main_finetune, name, **flags)


def test_a_run_writes_the_files_of_the_published_code(finetune, capsys):
    out = finetune()
    names = {p.name.removeprefix("checkpoint-") for p in out.glob("*.pth")}
    assert names == {"0.pth", "1.pth", "best.pth", "last.pth"}  # the last is that of before the last evaluation
    state = checkpoint.read(out / "checkpoint-1.pth")
    assert state["args"]["classes"] == [f"kind{n}" for n in range(6)]
    assert state["args"]["nb_classes"] == 6
    assert {"fc_norm.weight", "head.weight"} < state["model"].keys()
    keys = {"train_lr", "train_loss", "test_acc1", "test_acc5", "test_loss", "epoch", "n_parameters"}
    assert all(keys <= line.keys() for line in lines(out))
    assert finetune(eval=True, resume=out / "checkpoint-0.pth").acc1 == lines(out)[0]["test_acc1"]  # the earlier one
    events = EventAccumulator(str(out)).Reload()
    assert {"loss", "lr", "perf/test_acc1", "perf/test_acc5", "perf/test_loss"} <= set(events.Tags()["scalars"])
    assert re.search(r"^\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}$", capsys.readouterr().out, re.MULTILINE)


def test_fine_tuning_reduces_the_loss(finetune):
    out = finetune(**PLAIN, epochs=25, warmup_epochs=2)
    assert lines(out)[-1]["test_acc1"] > 80
    assert lines(out)[-1]["test_loss"] < lines(out)[0]["test_loss"] / 2
    best = max(lines(out), key=lambda line: line["test_acc1"])
    assert checkpoint.read(out / "checkpoint-best.pth")["epoch"] == best["epoch"]


@pytest.mark.parametrize(
    "extra",
    [{"mixup": 0.8, "cutmix": 1.0}, {}, {"mixup": 0.8, "mixup_mode": "elem"}, {"vflip": 0.5, "rotate90": True}],
)
def test_stopped_and_resumed_equals_uninterrupted(finetune, monkeypatch, extra):
    """With drop path, RandAugment, erasing, mixup and cutmix: random numbers depend on the position in the run."""
    settings = {"save_minutes": 0, "epochs": 2, **extra}
    whole = finetune("whole", **settings)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        finetune("parts", **settings)
    assert_equal(weights(whole), weights(finetune("parts", **settings, resume="auto")))


def test_fine_tuning_starts_from_a_pretrained_encoder(finetune, pretrain, labelled):
    pretrained = pretrain("mae", data_path=labelled) / "checkpoint-1.pth"
    encoder = weights(pretrained.parent)
    out = finetune(finetune=pretrained, lr=0.0, epochs=1)
    tuned = weights(out, "checkpoint-0.pth")
    assert torch.equal(tuned["blocks.0.attn.qkv.weight"], encoder["blocks.0.attn.qkv.weight"])
    assert torch.equal(tuned["pos_embed"], encoder["pos_embed"])
    assert tuned["head.weight"].std() < 1e-4  # a new head of std 2e-5


def test_partial_fine_tuning(finetune, pretrain, labelled):
    pretrained = pretrain("mae", data_path=labelled) / "checkpoint-1.pth"
    out = finetune(finetune=pretrained, unfreeze_blocks=1, lr=0.1)
    before, after = weights(pretrained.parent), weights(out)
    block = sum(tensor.numel() for name, tensor in after.items() if name.startswith("blocks.3."))
    assert lines(out)[-1]["n_parameters"] == block + 128 * 6 + 6 + 2 * 128  # the head and fc_norm
    same = [f"blocks.{n}.mlp.fc1.weight" for n in range(3)] + ["pos_embed", "cls_token", "patch_embed.proj.weight"]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert not torch.equal(before["blocks.3.mlp.fc1.weight"], after["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize(("eval_every", "evaluated"), [(2, [1, 3, 4]), (9, [4])])
def test_eval_every_skips_evaluations(finetune, eval_every, evaluated):
    out = finetune(epochs=5, eval_every=eval_every)
    assert [line["epoch"] for line in lines(out) if "test_acc1" in line] == evaluated


def test_few_labels(finetune, capsys):
    finetune(train_per_class=4, epochs=1)
    assert "24 images of 6 classes" in capsys.readouterr().out


def test_smoothing_is_timms():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 5), torch.randint(0, 5, (9,))
    ours = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, targets)
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(0.1)(logits, targets))


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def tuned(finetune):
    return finetune("tuned", **PLAIN, epochs=4) / "checkpoint-3.pth"


def evaluated(capsys, run, **flags) -> str:
    capsys.readouterr()
    run("nothing", eval=True, **flags)
    (line,) = re.findall(r"^\* Acc@1 .*$", capsys.readouterr().out, re.MULTILINE)
    return line


def test_evaluation_equals_that_of_the_epoch(finetune, tuned, capsys, labelled, tmp_path):
    """Evaluates our file, a bare file and one that contains a Namespace; only val/ exists."""
    last = lines(tuned.parent)[-1]
    expected = f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"
    model = weights(tuned.parent, tuned.name)
    torch.save({"model": model}, tmp_path / "bare.pth")
    torch.save({"model": model, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "published.pth")
    shutil.copytree(labelled / "val", tmp_path / "only" / "val")
    assert evaluated(capsys, finetune, resume=tuned, data_path=tmp_path / "only") == expected
    for name in ("bare.pth", "published.pth"):  # they record no crop
        assert evaluated(capsys, finetune, resume=tmp_path / name, data_path=tmp_path / "only", crop_pct=1) == expected
    assert evaluated(capsys, finetune, finetune=tuned) == expected
    assert evaluated(capsys, finetune, resume="auto", finetune=tuned) == expected
    assert not (tmp_path / "nothing").exists()


TELLING = """
import main_finetune
from util import dist; from util.cli import entry_point
scores = main_finetune.main(entry_point.parse(main_finetune.get_args_parser()))
if dist.is_main():
    print("SCORES", sorted(zip(scores.labels.tolist(), scores.predictions.tolist())), scores.num_in_top, scores.loss)
dist.teardown()
"""


def test_batch_size_and_processes_have_no_effect(finetune, labelled, tuned, tmp_path):
    """The counts are equal, and the losses agree to 1e-6."""
    (tmp_path / "telling.py").write_text(TELLING)
    found = []
    for batch_size in (7, 64):
        alone = finetune(eval=True, resume=tuned, batch_size=batch_size)
        counts = f"SCORES {sorted(zip(alone.labels.tolist(), alone.predictions.tolist(), strict=True))}"
        found.append((f"{counts} {alone.num_in_top}", alone.loss))
        flags = ("--eval", "--resume", tuned, "--data_path", labelled, "--device", "cpu", "--model", "vit_mini_patch4",
                 "--input_size", 16, "--batch_size", batch_size, "--num_workers", 0)  # fmt: skip
        output = forks.run(tmp_path / "telling.py", flags, tmp_path / f"output{batch_size}", 2)
        (line,) = [line for line in output.splitlines() if line.startswith("SCORES")]
        counts, _, loss = line.rpartition(" ")
        found.append((counts, float(loss)))
    assert {counts for counts, _ in found} == {found[0][0]}
    assert all(loss == pytest.approx(found[0][1], rel=1e-6) for _, loss in found)


def test_evaluation_uses_the_recorded_statistics(finetune, capsys):
    """Recorded statistics are the defaults of an evaluation and of a further training."""
    strange = {"mean": "0.9 0.8 0.7", "std": "0.1 0.1 0.2"}
    out = finetune("strange", **PLAIN, epochs=3, **strange)
    last = lines(out)[-1]
    expected = f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"
    assert evaluated(capsys, finetune, resume=out / "checkpoint-2.pth") == expected
    tuned = finetune("next", finetune=out / "checkpoint-2.pth", epochs=1, lr=0.0, drop_path=0)
    assert f"loss {lines(tuned)[-1]['test_loss']:.3f}" in expected
    assert checkpoint.read(tuned / "checkpoint-0.pth")["args"]["mean"] == [0.9, 0.8, 0.7]
    capsys.readouterr()
    finetune("other", finetune=out / "checkpoint-2.pth", epochs=1, mean="0.5 0.5 0.5")
    assert f"warning: --mean 0.5 0.5 0.5 is used, and {out}/checkpoint-2.pth was made with --mean 0.9 0.8 0.7" in (
        capsys.readouterr().out
    )


def test_a_head_for_other_classes_is_not_loaded(finetune, tuned, labelled, tmp_path):
    shutil.copytree(labelled, tmp_path / "renamed")
    for split in ("train", "val"):
        for number in range(6):
            (tmp_path / "renamed" / split / f"kind{number}").rename(tmp_path / "renamed" / split / f"other{5 - number}")
    again = finetune("again", finetune=tuned, epochs=1, lr=0.0)
    other = finetune("other", finetune=tuned, epochs=1, lr=0.0, data_path=tmp_path / "renamed")
    assert torch.equal(
        weights(again, "checkpoint-0.pth")["head.weight"], weights(tuned.parent, tuned.name)["head.weight"]
    )
    assert weights(other, "checkpoint-0.pth")["head.weight"].std() < 1e-4
    with pytest.raises(ValueError, match="the resumed run had other classes"):
        finetune("tuned", **PLAIN, epochs=5, resume="auto", data_path=tmp_path / "renamed")


def test_a_resumed_run_has_the_statistics_of_its_encoder(finetune, tmp_path):
    """The first command names a file that records them, the second names other ones."""
    state = {"model": vit_mini_patch4(img_size=16, num_classes=0).state_dict(),
             "args": {"mean": [0.1, 0.2, 0.3], "std": [0.01, 0.01, 0.01]}}  # fmt: skip
    torch.save(state, tmp_path / "encoder.pth")
    finetune(**PLAIN, finetune=tmp_path / "encoder.pth", epochs=1, warmup_epochs=0)
    again = {**PLAIN, "epochs": 2, "warmup_epochs": 0, "resume": "auto"}
    with pytest.raises(CheckpointError) as raised:
        finetune(**again, mean="0.5 0.5 0.5")
    assert str(raised.value).endswith(": give --mean 0.1 0.2 0.3")
    assert len(lines(finetune(**again))) == 2


def test_an_epoch_is_saved_before_its_evaluation(finetune, labelled, tmp_path):
    shutil.copytree(labelled, tmp_path / "broken")
    whole = (tmp_path / "broken/val/kind1/01.png").read_bytes()
    (tmp_path / "broken/val/kind1/01.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"01.png: the file is empty"):
        finetune("run", data_path=tmp_path / "broken", epochs=2)
    position = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["progress"]
    assert (position["epoch"], position["images_done"]) == (0, 48)
    (tmp_path / "broken/val/kind1/01.png").write_bytes(whole)
    assert [
        line["epoch"] for line in lines(finetune("run", data_path=tmp_path / "broken", epochs=2, resume="auto"))
    ] == [0, 1]


def test_the_report(finetune, tuned, capsys, tmp_path):
    line = evaluated(capsys, finetune, resume=tuned, report=tmp_path / "report")
    with (tmp_path / "report" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [f"kind{n}" for n in range(6)]
    right, images = (sum(int(row[column]) for row in rows) for column in ("right", "images"))
    assert images == 23
    assert line.startswith(f"* Acc@1 {100 * right / 23:.3f} ")
    assert Image.open(tmp_path / "report" / "confusion.png").width > 100


def evaluated_in_full(capsys, script, *argv) -> str:
    """The output of a script with these flags only."""
    capsys.readouterr()
    script.main(entry_point.parse(script.get_args_parser(), [*map(str, argv), "--device", "cpu", "--num_workers", "0"]))
    return capsys.readouterr().out


def test_evaluation_uses_the_recorded_settings(finetune, capsys, labelled):
    """Recorded size, patch, channels, pooling, statistics and crop are the defaults."""
    shape = {"input_size": "20 16", "patch_size": 2, "in_chans": 1, "cls_token": True, "mean": 0.3, "std": 0.2}
    out = finetune("shaped", **PLAIN, **shape, crop_pct=1, epochs=6)
    last = lines(out)[-1]
    expected = f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"
    file = out / "checkpoint-5.pth"
    output = evaluated_in_full(capsys, main_finetune, "--eval", "--resume", file, "--data_path", labelled)
    assert expected in output
    assert "warning" not in output
    same = ["--patch_size", 2, 2, "--cls_token", "--mean", "0.3"]
    output = evaluated_in_full(capsys, main_finetune, "--eval", "--resume", file, "--data_path", labelled, *same)
    assert expected in output
    assert "warning" not in output
    other = ["--input_size", 40, 32, "--std", "0.4", "--crop_pct", "0.5"]
    output = evaluated_in_full(capsys, main_finetune, "--eval", "--resume", file, "--data_path", labelled, *other)
    assert "* Acc@1" in output and expected not in output
    assert [line for line in output.splitlines() if line.startswith("warning")] == [
        f"warning: --crop_pct 0.5 is used, and {file} was made with --crop_pct 1.0",
        f"warning: --input_size 40 32 is used, and {file} was made with --input_size 20 16",
        f"warning: --std 0.4 is used, and {file} was made with --std 0.2",
    ]


def test_whole_images_are_a_setting_of_the_checkpoint(finetune, capsys, labelled):
    """--crop none: evaluation, k-NN and predictions scale the whole image, as training did."""
    out = finetune("whole", **PLAIN, input_size="16 32", crop="none")
    file, photo = out / "checkpoint-1.pth", Image.open(next((labelled / "val").rglob("*.png")))
    pixels = get_model(str(file)).transform(photo.crop((0, 0, 10, 19)))
    expected = photo.crop((0, 0, 10, 19)).resize((32, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(expected))
    capsys.readouterr()
    output = evaluated_in_full(capsys, main_finetune, "--eval", "--resume", file, "--data_path", labelled)
    assert f"* Acc@1 {lines(out)[-1]['test_acc1']:.3f} " in output
    knn = ["--finetune", file, "--data_path", labelled, "--k", 3]
    output = evaluated_in_full(capsys, main_knn, *knn, "--crop", "random")
    assert "--crop random is used" in output
    assert "Acc@1" in evaluated_in_full(capsys, main_knn, *knn)


def test_the_crop_of_small_images_is_recorded_and_earlier_files_keep_theirs(tuned, finetune, capsys, tmp_path):
    state = checkpoint.read(tuned)
    assert state["args"]["crop_pct"] == 1.0
    stripes = Image.fromarray((np.arange(32) * 8).astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    assert (get_model(str(tuned)).transform(stripes)[0, 8].max() > 240).all()  # up to the right border
    state["args"]["crop_pct"] = None
    torch.save(state, tmp_path / "earlier.pth")
    capsys.readouterr()
    assert (get_model(str(tmp_path / "earlier.pth")).transform(stripes)[0, 8].max() < 235).all()
    evaluated(capsys, finetune, resume=tmp_path / "earlier.pth")


def test_a_file_without_a_crop_says_once_which_one_it_uses(tuned, labelled, capsys, tmp_path):
    state = checkpoint.read(tuned)
    state["args"]["crop_pct"] = None
    torch.save(state, tmp_path / "earlier.pth")
    flags = ["--eval", "--resume", tmp_path / "earlier.pth", "--data_path", labelled]
    output = evaluated_in_full(capsys, main_finetune, *flags)
    assert output.count("0.875") == 1
    assert "0.875" not in evaluated_in_full(capsys, main_finetune, *flags, "--crop_pct", 1)


def test_the_crop_of_a_file_without_one_follows_the_input_size(finetune, labelled, capsys, tmp_path):
    """The published rule: above 224 pixels, nothing is cropped."""
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", nb_classes=6, patch_size=32, input_size=224)
    torch.nn.init.normal_(model.head.weight)
    classes = [f"kind{number}" for number in range(6)]
    args = {"model": "vit_mini_patch4", "input_size": 224, "patch_size": 32, "in_chans": 3, "global_pool": True}
    torch.save({"model": model.state_dict(), "args": args | {"classes": classes}}, tmp_path / "earlier.pth")
    for size, crop_pct in ((256, 1), (224, 0.875)):
        assert get_model(str(tmp_path / "earlier.pth"), input_size=size).settings["crop_pct"] == crop_pct
        flags = ["--eval", "--resume", tmp_path / "earlier.pth", "--data_path", labelled, "--input_size", size]
        default, same, other = (
            re.search(r"loss ([\d.]+)", evaluated_in_full(capsys, main_finetune, *flags, *more))[1]
            for more in ([], ["--crop_pct", crop_pct], ["--crop_pct", 0.5])
        )
        assert default == same != other


@pytest.mark.parametrize("script", [main_finetune, main_linprobe])
def test_runs_from_an_encoder_of_whole_images_use_whole_images(script, classify, pretrain, labelled, capsys):
    encoder = pretrain("mae", data_path=labelled, crop="none") / "checkpoint-1.pth"
    out = classify(script, "default", finetune=encoder)
    assert "--crop none" in capsys.readouterr().out
    assert checkpoint.read(out / "checkpoint-1.pth")["args"]["crop"] == "none"
    resumed = classify(script, "default", finetune=encoder, resume="auto", epochs=3)
    assert checkpoint.read(resumed / "checkpoint-2.pth")["args"]["crop"] == "none"
    capsys.readouterr()
    out = classify(script, "explicit", finetune=encoder, crop="random")
    assert "--crop random is used" in capsys.readouterr().out
    assert checkpoint.read(out / "checkpoint-1.pth")["args"]["crop"] == "random"


def test_flags_of_crops_without_crops_are_named(finetune, capsys):
    finetune(crop="none", crop_scale="0.5 1", crop_pct=0.9, epochs=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "no effect" in line)
    assert "--crop_scale" in line
    assert "--crop_pct" in line
    with pytest.raises(ValueError, match=r"None.* random or none"):
        get_model("vit_mini_patch4", crop="None")


def test_values_of_a_recipe_count_as_explicit(tuned, capsys, labelled, tmp_path):
    (tmp_path / "recipe.yaml").write_text("input_size: 32\n")
    flags = ["--eval", "--resume", tuned, "--data_path", labelled, "--config", tmp_path / "recipe.yaml"]
    output = evaluated_in_full(capsys, main_finetune, *flags)
    assert f"warning: --input_size 32 is used, and {tuned} was made with --input_size 16" in output


def test_files_of_other_libraries_use_the_flags(finetune, tuned, capsys, tmp_path):
    torch.save({"model": weights(tuned.parent, tuned.name)}, tmp_path / "bare.pth")
    capsys.readouterr()
    finetune("nothing", eval=True, resume=tmp_path / "bare.pth", input_size=32)
    output = capsys.readouterr().out
    assert "bare.pth is for images of 16 patches, and these have 64: positions are interpolated" in output


def test_a_subset_of_the_classes_keeps_their_numbers(finetune, tuned, capsys, labelled, tmp_path):
    for name in ("kind1", "kind4"):
        shutil.copytree(labelled / "val" / name, tmp_path / "some" / "val" / name)
    whole = evaluated(capsys, finetune, resume=tuned, report=tmp_path / "whole")
    assert whole
    evaluated(capsys, finetune, resume=tuned, data_path=tmp_path / "some", report=tmp_path / "part")
    rows = {}
    for part in ("whole", "part"):
        with (tmp_path / part / "classes.csv").open(newline="") as file:
            rows[part] = {row["class"]: row for row in csv.DictReader(file)}
    for name in ("kind1", "kind4"):
        assert rows["part"][name] == rows["whole"][name]
    assert rows["part"]["kind0"]["images"] == "0"


# ------------------------------------------------------------------------------------------------------ wrong inputs


def test_invalid_inputs_are_one_line_errors(tuned, labelled, pictures, tmp_path, capsys, monkeypatch):
    here = ["--data_path", labelled, "--model", "vit_mini_patch4", "--input_size", "16", "--batch_size", "8",
            "--num_workers", "0", "--output_dir", tmp_path / "wrong"]  # fmt: skip

    def error_of(*argv):
        return fails(capsys, monkeypatch, main_finetune, "--device", "cpu", *here, *argv)

    torch.save({"model": mae_vit_mini_patch4(img_size=16).state_dict()}, tmp_path / "mae.pth")
    assert "contains an encoder and decoder, which has no classification head" in error_of(
        "--eval", "--resume", tmp_path / "mae.pth"
    )
    assert "--eval needs --resume or --finetune" in error_of("--eval")
    torch.save(
        {"model": vit_mini_patch4(img_size=16, num_classes=9, global_pool=True).state_dict()}, tmp_path / "9.pth"
    )
    assert "has 9 classes, and the validation set has 6" in error_of("--eval", "--resume", tmp_path / "9.pth")
    assert "has 6 classes, and --nb_classes is 7" in error_of("--eval", "--resume", tuned, "--nb_classes", "7")
    assert "the data has 6 classes, and --nb_classes is 1000" in error_of("--nb_classes", "1000")
    assert "give --model" in error_of("--eval", "--resume", tuned, "--model", "vit_tiny_patch16")

    shutil.copytree(labelled, tmp_path / "unknown")
    (tmp_path / "unknown/val/kind5").rename(tmp_path / "unknown/val/kind7")
    unknown = ["--data_path", tmp_path / "unknown"]
    assert "1 of the 6 classes of the images are not among the model's 6 classes: kind7" in error_of(
        *unknown, "--eval", "--resume", tuned
    )
    assert "different classes: only train: kind5; only val: kind7" in error_of(*unknown)
    assert "there is no folder val/ in it: add this folder, or give --val_list FILE" in error_of(
        "--data_path", pictures
    )
    assert "--batch_size 7: --mixup and --cutmix mix pairs" in error_of("--batch_size", "7", "--mixup", "0.8")
    assert "--cutmix_minmax: give the smaller fraction first" in error_of("--cutmix_minmax", "0.8", "0.2")
    assert "--unfreeze_blocks 5: the model has 4 blocks" in error_of("--unfreeze_blocks", "5")
    assert "--aa abc: timm has no such policy" in error_of("--aa", "abc")
    assert "no published weights named mae_pretrained_base; did you mean" in error_of(
        "--finetune", "mae_pretrained_base"
    )
    assert "choose --adapt_input mean" in error_of("--finetune", tuned, "--in_chans", "1")


def test_every_split_of_the_effective_batch_trains_equally(finetune, labelled, tmp_path):
    """48 images are 4 updates of 10, which leave out 8. No random numbers depend on the batch here."""
    one = finetune("one", batch_size=10, **PLAIN)
    assert checkpoint.read(one / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 8
    accumulated = finetune("accumulated", batch_size=2, accum_iter=5, **PLAIN)
    flags = {"data_path": labelled, "model": "vit_mini_patch4", "input_size": 16, "num_workers": 0, "epochs": 2,
             "warmup_epochs": 1, "device": "cpu", "amp": "off", "batch_size": 1, "accum_iter": 5,
             "output_dir": tmp_path / "two"}  # fmt: skip
    argv = [str(part) for name, value in (flags | PLAIN).items() for part in (f"--{name}", value)]
    forks.run("main_finetune.py", argv, tmp_path / "output", 2)
    for other in (accumulated, tmp_path / "two"):
        assert [line["train_loss"] for line in lines(other)] == pytest.approx(
            [line["train_loss"] for line in lines(one)], rel=1e-6
        )
        ours, theirs = weights(one), weights(other)
        for name in ours:
            if not name.endswith("qkv.bias"):  # the gradient of keys' biases is zero but for rounding
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)


def test_imbalanced_classes_have_a_balanced_accuracy_and_one_warning(finetune, imbalanced, capsys, tmp_path):
    """A class of one image, and a set whose classes differ by more than five times."""
    capsys.readouterr()
    out = finetune("run", **PLAIN, data_path=imbalanced, epochs=1)
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("warning") and "kind3" in line]
    assert " 1 " in line and " 8 " in line
    flags = {"resume": out / "checkpoint-0.pth", "report": tmp_path / "report"}
    text = evaluated(capsys, finetune, data_path=imbalanced, **flags)
    with (tmp_path / "report/classes.csv").open(newline="") as file:
        recalls = [int(row["right"]) / int(row["images"]) for row in csv.DictReader(file) if int(row["images"])]
    assert f"balanced accuracy {100 * np.mean(recalls):.3f}" in text
    assert lines(out)[0]["test_balanced_acc"] == pytest.approx(100 * np.mean(recalls))
    assert "balanced" not in evaluated(capsys, finetune, resume=out / "checkpoint-0.pth")
