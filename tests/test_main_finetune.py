"""Fine-tuning: its files, exact resume, and an evaluation that counts every image once."""

import argparse
import csv
import re
import shutil

import forks
import numpy as np
import pytest
import torch
from mains import argv_of, assert_close, assert_same_run, fails, lines, printed, scores_of, stop_and_resume, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint, run_directory
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import get_model
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4

PLAIN = {"aa": "none", "reprob": 0, "drop_path": 0, "lr": 0.003}


@pytest.fixture
def finetune(classify):
    return lambda name="run", **flags: classify(main_finetune, name, **flags)


@pytest.fixture(scope="module")
def tuned(classify_once):
    return classify_once(main_finetune, "tuned", **PLAIN, epochs=4) / "checkpoint-3.pth"


@pytest.fixture(scope="module")
def encoder(pretrain_once, labelled):
    return pretrain_once("mae", data_path=labelled, epochs=1) / "checkpoint-0.pth"


@pytest.mark.parametrize("changes", [False, True])
def test_other_validation_images_select_the_best_state_anew(changes, labelled, finetune, tmp_path, capsys):
    """Their accuracies can't be compared. The training images may stay the same."""
    out = finetune(**PLAIN, epochs=1)
    for path in out.glob("*.pth"):
        state = checkpoint.read(path)
        checkpoint.write(state | {"progress": {**state["progress"], "best_accuracy": 101.0}}, path)
    images = shutil.copytree(labelled, tmp_path / "changed")
    if changes:
        next(images.glob("val/*/*")).unlink()
    capsys.readouterr()
    finetune(**PLAIN, epochs=2, resume="auto", data_path=images)
    assert ("validation images" in capsys.readouterr().out) == changes
    assert checkpoint.read(out / "checkpoint-best.pth")["epoch"] == int(changes)


def test_a_run_that_resumes_refuses_another_encoder(encoder, finetune, labelled, tmp_path):
    """It would have no effect, and the run would record it."""
    finetune(**PLAIN, epochs=1, finetune=encoder)
    finetune(**PLAIN, epochs=2, finetune=encoder, resume="auto")
    other = shutil.copy(encoder, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"finetune=.*other.pth has no effect on a run that resumes"):
        finetune(**PLAIN, epochs=3, finetune=other, resume="auto")


def test_a_run_writes_the_files_of_the_published_code(finetune, capsys):
    out = finetune(color_jitter=0.4)
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
    assert re.search(r"^\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}$", output := capsys.readouterr().out, re.M)
    assert "warning: color_jitter=0.4 has no effect with aa=rand-m9-mstd0.5-inc1" in output


@pytest.mark.parametrize("extra", [{"mixup": 0.8, "cutmix": 1.0, "vflip": 0.5, "rotate90": True},
                                   {"mixup": 0.8, "mixup_mode": "elem"}])  # fmt: skip
def test_stopped_and_resumed_equals_uninterrupted(finetune, monkeypatch, extra):
    """With drop path, RandAugment, erasing, mixup and cutmix: random numbers depend on the position in the run."""
    assert_same_run(finetune("whole", **extra), stop_and_resume(monkeypatch, finetune, 3, **extra))


def test_fine_tuning_starts_from_a_pretrained_encoder(finetune, encoder):
    """All of it is trained, or the last block."""
    before = weights(encoder.parent, "checkpoint-0.pth")
    first = weights(finetune("first", finetune=encoder, lr=0.0, epochs=1), "checkpoint-0.pth")
    assert first["head.weight"].std() < 1e-4  # a new head of std 2e-5
    assert [name for name in first.keys() & before.keys() - {"norm.weight", "norm.bias"}
            if not torch.equal(first[name], before[name])] == []  # fmt: skip
    found = {name: finetune(name, finetune=encoder, lr=0.1, epochs=1, warmup_epochs=0, **flags)
             for name, flags in (("all", {}), ("part", {"unfreeze_blocks": 1}))}  # fmt: skip
    for name, out in found.items():
        after = weights(out, "checkpoint-0.pth")
        same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
        block = {name for name in after if name.startswith("blocks.3.")}
        frozen = {name for name in before.keys() & after.keys() if not name.startswith("norm.")} - block
        assert same == (set() if name == "all" else frozen)
    trained = sum(after[name].numel() for name in block) + 128 * 6 + 6 + 2 * 128
    assert lines(out)[-1]["n_parameters"] == trained


def test_a_resumed_run_does_not_need_its_initial_weights(finetune, encoder, tmp_path, monkeypatch):
    copied = shutil.copy(encoder, tmp_path / "encoder.pth")

    def run(name, **flags):
        if "resume" in flags:
            copied.unlink()
        return finetune(name, **flags)

    assert_same_run(finetune("whole", finetune=encoder), stop_and_resume(monkeypatch, run, 3, finetune=copied))


def test_eval_every_skips_evaluations(finetune):
    out = finetune(epochs=5, eval_every=2)
    assert [line["epoch"] for line in lines(out) if "test_acc1" in line] == [1, 3, 4]


def evaluated(capsys, run, **flags) -> str:
    """The line of the scores of an evaluation."""
    capsys.readouterr()
    run("nothing", eval=True, **flags)
    (line,) = re.findall(r"^\* Acc@1 .*$", capsys.readouterr().out, re.MULTILINE)
    return line


def classes_of(report) -> dict[str, dict[str, str]]:
    with (report / "classes.csv").open(newline="") as file:
        return {row["class"]: row for row in csv.DictReader(file)}


def test_evaluation_equals_that_of_the_epoch(finetune, tuned, capsys, labelled, tmp_path):
    """Evaluates our file, a bare file and one that contains a Namespace; only val/ exists."""
    expected, model = scores_of(tuned.parent), weights(tuned.parent, tuned.name)
    torch.save({"model": model}, tmp_path / "bare.pth")
    torch.save({"model": model, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "published.pth")
    shutil.copytree(labelled / "val", tmp_path / "only" / "val")
    assert evaluated(capsys, finetune, resume=tuned, data_path=tmp_path / "only") == expected
    for name in ("bare.pth", "published.pth"):  # they record no crop
        assert evaluated(capsys, finetune, resume=tmp_path / name, data_path=tmp_path / "only", crop_pct=1) == expected
    assert evaluated(capsys, finetune, finetune=tuned) == expected
    assert evaluated(capsys, finetune, resume="auto", finetune=tuned) == expected
    other = finetune("other", **{**PLAIN, "lr": 0.0}, epochs=1) / "checkpoint-0.pth"
    assert evaluated(capsys, finetune, resume=other) != expected
    assert evaluated(capsys, finetune, resume="auto", output_dir=tuned.parent, finetune=other) == expected
    assert not (tmp_path / "nothing").exists()
    finetune("nothing", eval=True, resume=tmp_path / "bare.pth", input_size=32)
    assert re.search(r"bare.pth records no input_size, .* interpolated to the 64 patches", capsys.readouterr().out)


TELLING = """
import main_finetune
from mae import parallel; from mae.cli import entry_point
scores = main_finetune.main(entry_point.parse(main_finetune.get_args_parser()))
if parallel.is_main():
    print("SCORES", sorted(zip(scores.labels.tolist(), scores.predictions.tolist())), scores.num_in_top, scores.loss)
parallel.teardown()
"""


@pytest.mark.slow
def test_batch_size_and_processes_have_no_effect(finetune, labelled, tuned, tmp_path):
    """The counts are equal, and the losses agree to 1e-6."""
    (tmp_path / "telling.py").write_text(TELLING)
    found = []
    for batch_size in (7, 64):
        alone = finetune(eval=True, resume=tuned, batch_size=batch_size)
        counts = f"SCORES {sorted(zip(alone.labels.tolist(), alone.predictions.tolist(), strict=True))}"
        found.append((f"{counts} {alone.num_in_top}", alone.loss))
        flags = {"eval": True, "resume": tuned, "data_path": labelled, "device": "cpu", "batch_size": batch_size,
                 "num_workers": 0}  # fmt: skip
        output = forks.run(tmp_path / "telling.py", argv_of(flags), tmp_path / f"output{batch_size}", 2)
        counts, loss = re.search(r"^(SCORES .*) (\S+)$", output, re.MULTILINE).groups()
        found.append((counts, float(loss)))
    assert {counts for counts, _ in found} == {found[0][0]}
    assert all(loss == pytest.approx(found[0][1], rel=1e-6) for _, loss in found)


@pytest.mark.slow
def test_a_head_for_other_classes_or_of_other_features_is_not_loaded(finetune, tuned, labelled, tmp_path):
    for split in ("train", "val"):
        for number in range(6):
            shutil.copytree(labelled / split / f"kind{number}", tmp_path / "renamed" / split / f"other{5 - number}")
    of_class_token = finetune("cls", **PLAIN, cls_token=True, epochs=1) / "checkpoint-0.pth"
    heads = []
    for name, flags in (("again", {}), ("other", {"data_path": tmp_path / "renamed"}), ("pooled", {})):
        file = of_class_token if name == "pooled" else tuned
        out = finetune(name, finetune=file, epochs=1, lr=0.0, **flags)
        heads.append(weights(out, "checkpoint-0.pth")["head.weight"])
    assert torch.equal(heads[0], weights(tuned.parent, tuned.name)["head.weight"])
    assert max(heads[1].std(), heads[2].std()) < 1e-4
    with pytest.raises(ValueError, match="classes"):
        finetune(**PLAIN, output_dir=tuned.parent, epochs=5, resume="auto", data_path=tmp_path / "renamed")


@pytest.mark.slow
def test_a_resumed_run_has_the_statistics_of_its_encoder(finetune, tmp_path):
    """The first command names a file that records them, the second names other ones."""
    state = {"model": vit_mini_patch4(img_size=16, num_classes=0).state_dict(),
             "args": {"mean": [0.1, 0.2, 0.3], "std": [0.01, 0.01, 0.01]}}  # fmt: skip
    torch.save(state, tmp_path / "encoder.pth")
    finetune(**PLAIN, finetune=tmp_path / "encoder.pth", epochs=1, warmup_epochs=0)
    again = {**PLAIN, "epochs": 2, "warmup_epochs": 0, "resume": "auto"}
    for changed in ({"mean": "0.5 0.5 0.5"}, {"crop_pct": 0.5}):
        with pytest.raises(CheckpointError, match=f"give {min(changed)}="):
            finetune(**again, **changed)
    assert len(lines(finetune(**again))) == 2


def test_an_epoch_is_saved_before_its_evaluation(finetune, labelled, tmp_path):
    bad = shutil.copytree(labelled, tmp_path / "broken") / "val/kind1/01.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"01.png"):
        finetune(data_path=tmp_path / "broken", epochs=2)
    assert run_directory.position(tmp_path / "run" / "checkpoint-last.pth") == (0, 48)
    bad.write_bytes(whole)
    assert [line["epoch"] for line in lines(finetune(data_path=tmp_path / "broken", epochs=2, resume="auto"))] == [0, 1]


def test_evaluation_uses_the_recorded_settings(finetune, capsys, labelled, tmp_path):
    """Recorded size, patch, channels, pooling, statistics and crop are the defaults."""
    shape = {"input_size": "20 16", "patch_size": 2, "in_chans": 1, "cls_token": True, "mean": 0.3, "std": 0.2}
    out = finetune("shaped", **PLAIN, **shape, crop_pct=1)
    file = out / "checkpoint-1.pth"
    flags = {"eval": True, "resume": file, "data_path": labelled}
    for same in ({}, {"patch_size": "2 2", "cls_token": True, "mean": 0.3}):
        output = printed(capsys, main_finetune, **flags, **same)
        assert scores_of(out) in output and "warning" not in output
    (tmp_path / "recipe.yaml").write_text("input_size: [40, 32]\n")
    output = printed(capsys, main_finetune, **flags, config=tmp_path / "recipe.yaml", std=0.4, crop_pct=0.5)
    assert "* Acc@1" in output and scores_of(out) not in output
    assert [line for line in output.splitlines() if line.startswith("warning")] == [
        f"warning: crop_pct=0.5 is used, and {file} was made with crop_pct=1.0",
        f"warning: input_size=[40, 32] is used, and {file} was made with input_size=[20, 16]",
        f"warning: std=0.4 is used, and {file} was made with std=0.2",
    ]


def test_whole_images_are_a_setting_of_the_checkpoint(finetune, capsys, labelled):
    """--crop none: evaluation, k-NN and predictions scale the whole image, as training did."""
    out = finetune("whole", **PLAIN, input_size="16 32", crop="none")
    file, photo = out / "checkpoint-1.pth", Image.open(next((labelled / "val").rglob("*.png"))).crop((0, 0, 10, 19))
    pixels = get_model(str(file)).transform(photo)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(photo.resize((32, 16), Image.Resampling.BICUBIC)))
    output = printed(capsys, main_finetune, eval=True, resume=file, data_path=labelled)
    assert scores_of(out) in output
    knn = {"finetune": file, "data_path": labelled, "k": 3}
    assert "crop=random is used" in printed(capsys, main_knn, **knn, crop="random")
    assert "Acc@1" in printed(capsys, main_knn, **knn)


def test_the_crop_of_small_images_is_recorded_and_earlier_files_keep_theirs(tuned, labelled, capsys, tmp_path):
    """An evaluation says once which crop it uses for a file that records none."""
    state, earlier = checkpoint.read(tuned), tmp_path / "earlier.pth"
    assert state["args"]["crop_pct"] == 1.0
    stripes = Image.fromarray((np.arange(32) * 8).astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    assert (get_model(str(tuned)).transform(stripes)[0, 8].max() > 240).all()  # up to the right border
    state["args"]["crop_pct"] = None
    torch.save(state, earlier)
    for own, count in (({}, 1), ({"crop_pct": 1}, 0)):
        output = printed(capsys, main_finetune, eval=True, resume=earlier, data_path=labelled, **own)
        assert output.count("0.875") == count
    assert (get_model(str(earlier)).transform(stripes)[0, 8].max() < 235).all()


def test_the_crop_of_a_file_without_one_follows_the_input_size(labelled, capsys, tmp_path):
    """The published rule: above 224 pixels, nothing is cropped."""
    model, file = get_model("vit_mini_patch4", nb_classes=6, patch_size=32, input_size=224), tmp_path / "earlier.pth"
    torch.nn.init.normal_(model.head.weight)
    args = {**model.settings, "crop_pct": None, "classes": [f"kind{number}" for number in range(6)]}
    torch.save({"model": model.state_dict(), "args": args}, file)
    for size, crop_pct in ((256, 1), (224, 0.875)):
        assert get_model(str(file), input_size=size).settings["crop_pct"] == crop_pct
        flags = {"eval": True, "resume": file, "data_path": labelled, "input_size": size}
        default, same, other = (re.search(r"loss ([\d.]+)", printed(capsys, main_finetune, **flags, **more))[1]
                                for more in ({}, {"crop_pct": crop_pct}, {"crop_pct": 0.5}))  # fmt: skip
        assert default == same != other


@pytest.mark.slow
@pytest.mark.parametrize("script", [main_finetune, main_linprobe])
def test_runs_from_an_encoder_of_whole_images_use_whole_images(script, classify, pretrain, labelled, capsys):
    encoder = pretrain("mae", data_path=labelled, crop="none", epochs=1) / "checkpoint-0.pth"
    for name, flags, epochs, said, crop in (
        ("default", {}, 1, "crop=none", "none"), ("default", {"resume": "auto"}, 2, "crop=none", "none"),
        ("explicit", {"crop": "random"}, 1, "crop=random", "random"),
    ):  # fmt: skip
        capsys.readouterr()
        out = classify(script, name, finetune=encoder, epochs=epochs, **flags)
        assert said in capsys.readouterr().out or "resume" in flags
        assert checkpoint.read(out / f"checkpoint-{epochs - 1}.pth")["args"]["crop"] == crop


def test_flags_of_crops_without_crops_are_named(finetune, capsys):
    finetune(crop="none", crop_scale="0.5 1", crop_pct=0.9, epochs=1)
    (line,) = re.findall(".*no effect.*", capsys.readouterr().out)
    assert "crop_scale" in line and "crop_pct" in line
    with pytest.raises(ValueError, match="crop"):
        get_model("vit_mini_patch4", crop="None")


def test_the_report_of_a_subset_of_the_classes(finetune, tuned, capsys, labelled, tmp_path):
    """They keep their numbers."""
    for name in ("kind1", "kind4"):
        shutil.copytree(labelled / "val" / name, tmp_path / "some" / "val" / name)
    line = evaluated(capsys, finetune, resume=tuned, report=tmp_path / "whole")
    evaluated(capsys, finetune, resume=tuned, data_path=tmp_path / "some", report=tmp_path / "part")
    whole, part = (classes_of(tmp_path / name) for name in ("whole", "part"))
    assert list(whole) == [f"kind{n}" for n in range(6)]
    assert sum(int(row["images"]) for row in whole.values()) == 23
    assert line.startswith(f"* Acc@1 {100 * sum(int(row['right']) for row in whole.values()) / 23:.3f} ")
    assert Image.open(tmp_path / "whole" / "confusion.png").width > 100
    assert [part[name] for name in ("kind1", "kind4")] == [whole[name] for name in ("kind1", "kind4")]
    assert part["kind0"]["images"] == "0"


def test_invalid_inputs_are_one_line_errors(tuned, labelled, pictures, tmp_path, capsys, monkeypatch):
    here = ["--data_path", labelled, "--model", "vit_mini_patch4", "--input_size", "16", "--batch_size", "8",
            "--num_workers", "0", "--output_dir", tmp_path / "wrong"]  # fmt: skip
    nine = vit_mini_patch4(img_size=16, num_classes=9, global_pool=True)
    torch.save({"model": mae_vit_mini_patch4(img_size=16).state_dict()}, tmp_path / "mae.pth")
    torch.save({"model": nine.state_dict()}, tmp_path / "9.pth")
    unknown = shutil.copytree(labelled, tmp_path / "unknown")
    (unknown / "val/kind5").rename(unknown / "val/kind7")
    misnamed = shutil.copytree(labelled, tmp_path / "misnamed")
    (misnamed / "val").rename(misnamed / "test")
    for flags, message in (
        (f"--eval --resume {tmp_path}/mae.pth", "mae.pth"),
        ("--eval", "resume"),
        (f"--eval --resume {tmp_path}/9.pth", "9 classes.* 6"),
        (f"--eval --resume {tuned} --nb_classes 7", "nb_classes"),
        ("--nb_classes 1000", "6 classes.*nb_classes"),
        (f"--eval --resume {tuned} --model vit_tiny_patch16", "give model="),
        (f"--data_path {unknown} --eval --resume {tuned}", "kind7"),
        (f"--data_path {unknown}", "kind7"),
        (f"--data_path {misnamed}", "rename test/ to val/"),
        ("--batch_size 7 --mixup 0.8", "batch_size=7"),
        ("--cutmix_minmax 0.8 0.2", "cutmix_minmax"),
    ):
        error = fails(capsys, monkeypatch, main_finetune, "--device", "cpu", *here, *flags.split())
        assert re.search(message, error), flags


def test_every_split_of_the_effective_batch_trains_equally(finetune, labelled, tmp_path):
    """48 images are 4 updates of 10, which leave out 8. No random numbers depend on the batch here."""
    one = finetune("one", batch_size=10, **PLAIN)
    assert checkpoint.read(one / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 8
    assert_close(one, finetune("accumulated", batch_size=2, accum_iter=5, **PLAIN))
    flags = {"data_path": labelled, "model": "vit_mini_patch4", "input_size": 16, "num_workers": 0, "epochs": 2,
             "warmup_epochs": 1, "device": "cpu", "amp": "off", "batch_size": 1, "accum_iter": 5,
             "output_dir": tmp_path / "two"}  # fmt: skip
    forks.run("main_finetune.py", argv_of(flags | PLAIN), tmp_path / "output", 2)
    assert_close(one, tmp_path / "two")


def test_imbalanced_classes_have_a_balanced_accuracy_and_one_warning(finetune, imbalanced, capsys, tmp_path):
    """A class of one image, and a set whose classes differ by more than five times."""
    out = finetune(**PLAIN, data_path=imbalanced, epochs=1)
    (line,) = re.findall(r"^warning.*kind3.*", capsys.readouterr().out, re.MULTILINE)
    assert " 1 " in line and " 8 " in line
    flags = {"resume": out / "checkpoint-0.pth", "report": tmp_path / "report"}
    text = evaluated(capsys, finetune, data_path=imbalanced, **flags)
    rows = classes_of(tmp_path / "report").values()
    recalls = [int(row["right"]) / int(row["images"]) for row in rows if int(row["images"])]
    assert f"balanced accuracy {100 * np.mean(recalls):.3f}" in text
    assert lines(out)[0]["test_balanced_acc"] == pytest.approx(100 * np.mean(recalls))
    assert "balanced" not in evaluated(capsys, finetune, resume=out / "checkpoint-0.pth")
