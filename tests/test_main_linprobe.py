"""Linear probing: the encoder is frozen, heads train independently, and the test set selects nothing."""

import math
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import forks
import mains
import numpy as np
import pytest
import torch
from mains import Stopped, assert_same_run, lines, parse, printed, scores_of, stop_and_resume, weights
from PIL import Image
from torch.nn import functional as F

import main_finetune
import main_linprobe
import models_vit
from engine_linprobe import make_heads
from mae import build, parallel
from mae.checkpoints import checkpoint, run_directory
from mae.checkpoints.checkpoint import CheckpointError
from mae.data.pixels import BadImage
from mae.data.run_data import RunData
from mae.inference import get_model
from mae.settings import specs
from mae.training import feature_files, frozen_features, lr_sched
from mae.training.frozen_features import FrozenFeatures
from mae.training.precision import Precision


@pytest.fixture
def probe(classify):
    return lambda name="run", **flags: classify(main_linprobe, name, **flags)


@pytest.fixture
def evaluated(capsys, labelled):
    """Evaluates a file with the settings that it records; returns the output."""
    return lambda file, **flags: printed(capsys, main_linprobe, eval=True, resume=file, data_path=labelled, **flags)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file with a random encoder, whose tokens have a norm."""
    torch.manual_seed(5)
    model = build.classifier(*specs({"model": "vit_mini_patch4", "input_size": 16}))
    file = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


CACHED = pytest.mark.parametrize("cached", [{}, {"cache_features": True}], ids=["images", "cached"])


@pytest.fixture(scope="module")
def tuned(classify_once):
    """The run directory of a fine-tuned encoder."""
    return classify_once(main_finetune, "tuned", aa="none", reprob=0, lr=0.003, epochs=20, cls_token=True, drop_path=0,
                         save_every=19, eval_every=20)  # fmt: skip


@CACHED
def test_only_the_head_learns(probe, tuned, cached):
    encoder = checkpoint.read(tuned / "checkpoint-19.pth")["model"]
    out = probe(finetune=tuned / "checkpoint-19.pth", epochs=12, lr=5, **cached)
    state = weights(out, "checkpoint-11.pth")
    assert {name for name in state if name.startswith("head.")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert all(torch.equal(state[name], encoder[name]) for name in state if not name.startswith("head."))
    assert lines(out)[-1]["test_acc1"] > 70
    assert lines(out)[-1]["n_parameters"] == 6 * 128 + 6


def test_an_attentive_probe_refuses_a_classifier_that_pools_patches_at_once(probe, tmp_path):
    pooling = models_vit.vit_mini_patch4(img_size=16, num_classes=3, global_pool=True)
    torch.save({"model": pooling.state_dict()}, tmp_path / "pooling.pth")
    with pytest.raises(ValueError, match="global_pool"):
        probe(finetune=tmp_path / "pooling.pth", probe="attentive", epochs=1)


@pytest.mark.parametrize(("epochs", "warns"), [(2, True), (15, False)])
def test_few_updates_warn(epochs, warns, probe, capsys):
    probe(epochs=epochs, cache_features=True, hflip=0.2)
    output = capsys.readouterr().out
    warnings = re.findall(r"^warning.* updates are few.*batch_size=8.*epochs.*$", output, re.M)
    assert bool(warnings) == warns
    assert output.count("warning: no `finetune`: the features are from an untrained encoder") == 1
    assert output.count("warning: hflip=0.2 has no effect with `cache_features`") == 1  # nothing is flipped


def test_the_trunk_is_in_evaluation_mode():
    model = build.probe(*specs({"model": "vit_mini_patch4", "input_size": 16, "nb_classes": 3})).train()
    assert model.training and model.head[0].training
    assert not any(module.training for module in model.blocks.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert not model.forward_features(torch.rand(2, 3, 16, 16)).requires_grad


def test_a_probe_does_not_start_from_the_head_of_another(probe, pretrained):
    trained = probe("trained", finetune=pretrained, epochs=1, blr=9, warmup_epochs=0) / "checkpoint-0.pth"
    fresh, again = (weights(probe(file.parent.name + "2", finetune=file, epochs=1, lr=0), "checkpoint-0.pth")
                    for file in (pretrained, trained))  # fmt: skip
    assert torch.equal(fresh["head.1.weight"], again["head.1.weight"])


@CACHED
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_the_best_of_several_rates_is_selected(probe, tuned, pretrained, evaluated, cached, kind, capsys):
    """Its probe is saved, and its rate and loss are logged."""
    encoder = tuned / "checkpoint-19.pth" if kind == "linear" else pretrained
    out = probe(probe=kind, blr="1 30 100", finetune=encoder, epochs=3, **cached)
    output, last = capsys.readouterr().out, lines(out)[-1]
    loss, written = f"{last['train_loss']:.4f}", checkpoint.read(out / "probe.pth")
    assert re.search(rf"blr={last['chosen_blr']:g}, held-out Acc@1 .*, training loss {loss}\n", output)
    assert f"loss {loss}," in output[output.index(" 2 done in") :]
    assert written["args"]["blr"] == last["chosen_blr"]
    number, all_heads = [1, 30, 100].index(last["chosen_blr"]), weights(out, "checkpoint-2.pth")
    head = {name.removeprefix("head."): value for name, value in written["model"].items() if name.startswith("head.")}
    assert head["1.weight" if kind == "linear" else "pool.queries"].shape == (6 if kind == "linear" else 32, 128)
    assert all(torch.equal(all_heads[f"head.{number}.{name}"], value) for name, value in head.items())
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5" in evaluated(out / "probe.pth")
    for read in (lambda file: probe("nothing", eval=True, resume=file), get_model):
        with pytest.raises(CheckpointError, match=r"checkpoint-2.pth .*probe.pth"):
            read(out / "checkpoint-2.pth")


def test_the_test_set_selects_nothing(probe, labelled, tmp_path, capsys):
    """The head for "ant" is the best one on the test set, and the head for "bee" is the best one on held-out images."""
    for split, (ants, bees) in (("train", (10, 30)), ("val", (5, 2))):
        for name, count in (("ant", ants), ("bee", bees)):
            for number in range(count):
                copy = tmp_path / "data" / split / name / f"{number:02}.png"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(labelled / "train" / f"kind{name == 'bee':d}" / f"{name == 'bee':02d}.png", copy)
    flags = {"data_path": tmp_path / "data", "held_out": 0.25, "warmup_epochs": 0, "blr": "2e-9 1e-9 4e-9"}
    out = probe(epochs=1, **flags)
    state = checkpoint.read(out / "checkpoint-0.pth")
    for head, label in enumerate((0, 1, 0)):
        state["model"][f"head.{head}.1.weight"].zero_()
        state["model"][f"head.{head}.1.bias"] = torch.eye(2)[label] * 9
    checkpoint.write(state, out / "checkpoint-0.pth")
    (out / "checkpoint-best.pth").unlink()
    probe(epochs=2, **flags, resume="auto", report=tmp_path / "report")
    last = lines(out)[-1]
    assert (last["chosen_blr"], last["test_acc1"]) == (1e-9, pytest.approx(100 * 2 / 7))
    assert "blr=1e-09, the smallest value, is the best" in capsys.readouterr().out
    assert checkpoint.read(out / "probe.pth")["model"]["head.1.bias"].tolist() == pytest.approx([0, 9], abs=1e-6)
    assert (tmp_path / "report/classes.csv").read_text().splitlines()[1:] == ["ant,5,0,0.0000,bee", "bee,2,2,1.0000,"]


def test_flags_of_another_probe_are_named(probe, tuned, evaluated, capsys):
    with pytest.raises(ValueError, match="num_queries=16 is for an attentive probe"):
        probe("queries", num_queries=16)
    out = probe("one", finetune=tuned / "checkpoint-19.pth", blr=0.1, held_out=0.25, epochs=1, warmup_epochs=0)
    assert "`held_out` has no effect" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"pool=avg: .* is a probe of the class token"):
        evaluated(out / "checkpoint-0.pth", pool="avg")
    with pytest.raises(ValueError, match="regression_loss=huber"):
        probe("loss", regression_loss="huber")


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_script_that_evaluates_another_kind_of_file_names_the_right_one(kind, probe, pretrained, classify, tmp_path):
    """Also without recorded settings."""
    options = {"probe": kind, **({"num_queries": 4} if kind == "attentive" else {})}
    out = probe(finetune=pretrained, blr=0.1, epochs=1, warmup_epochs=0, **options)
    torch.save({"model": weights(out, "checkpoint-0.pth")}, tmp_path / "bare.pth")
    for file in (out / "checkpoint-0.pth", tmp_path / "bare.pth"):
        with pytest.raises(CheckpointError, match=f"{file} is a {kind} probe: main_linprobe"):
            classify(main_finetune, "wrong", finetune=file, eval=True)
    torch.save({"model": models_vit.vit_mini_patch4(img_size=16, num_classes=6).state_dict()}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit\.pth is a classifier: main_finetune\.py"):
        probe("wrong", finetune=tmp_path / "vit.pth", eval=True)
    with pytest.raises(CheckpointError, match=r"encoder.pth has no head.*main_linprobe.py"):
        probe("wrong", finetune=pretrained, eval=True)


class Augmented:
    """Noise that is new in each epoch, or fixed."""

    classes = ("a", "b")
    labels = np.arange(24) % 2

    def __init__(self, is_fixed):
        self.is_fixed = is_fixed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        draw = np.random.default_rng(index if self.is_fixed else np.random.randint(1 << 30))
        return draw.integers(0, 255, (16, 16, 3), dtype=np.uint8), int(self.labels[index])


def fixed(split, path):
    return Augmented(is_fixed=True)


def augmented(split, path):
    return Augmented(is_fixed=split == "val")


def test_features_of_one_augmentation_are_named(classify, capsys):
    flags = {"data_path": None, "epochs": 1, "warmup_epochs": 0, "blr": 0.1}
    for name, stored, is_named in (("fixed", True, False), ("augmented", False, False), ("augmented", True, True)):
        dataset = f"py:test_main_linprobe:{name}"
        cached = {"cache_features": True} if stored else {}
        classify(main_linprobe, f"{name}{stored}", dataset=dataset, **cached, **flags)
        assert ("one augmentation" in capsys.readouterr().out) is is_named


def test_a_single_rate_and_several_exclude_each_other(probe):
    for flag in ("lr", "clip_grad", "min_lr"):
        with pytest.raises(ValueError, match=f"{flag}=1 .*blr"):
            probe(blr="0.2 0.1", **{flag: 1})


def test_batches_of_one_image_are_refused_by_the_name_of_the_flag(probe):
    """Batch norm needs two values."""
    with pytest.raises(ValueError, match="batch_size=1: "):
        probe(batch_size=1)


def test_the_loss_is_that_of_the_best_head_and_each_head_records_its_own():
    """Of the last epoch. A head whose loss is not finite does not count."""
    criterion, logits, targets = main_linprobe.HeadLosses(), torch.randn(3, 2, 5, 4), torch.randint(0, 4, (5,))
    own = [[float(F.cross_entropy(head, targets)) for head in batch] for batch in logits]
    logits[2, 1] *= float("nan")
    for batch, losses, epoch in zip(logits, [*own[:2], own[2][:1]], (1, 1.5, 2), strict=True):
        assert float(criterion(batch, targets)) == pytest.approx(min(losses))
        criterion.after_update(None, epoch)
    means, shares = criterion.means()
    assert means == pytest.approx([(own[1][0] + own[2][0]) / 2, own[1][1]])
    assert shares == [1, 0.5]
    for batch, parts in ((logits[0], 1), (logits[1], 5)):  # an update in five batches counts as much as one in a batch
        for part in range(parts):
            criterion(batch[:, part::parts], targets[part::parts])
        criterion.after_update(None, 3)
    assert criterion.means()[0] == pytest.approx([(own[0][head] + own[1][head]) / 2 for head in (0, 1)])
    assert not math.isfinite(criterion(logits[2, 1:].repeat(2, 1, 1), targets))
    assert main_linprobe.HeadLosses().means() == ([], [])


def test_heads_train_independently(probe, tuned, capsys):
    """The head of a rate does not depend on the number of other rates, and on whether they diverge."""
    heads = {}
    for name, rates in (("diverges", "1 1e36"), ("finite", "1 2 4")):
        out = probe(name, blr=rates, finetune=tuned / "checkpoint-19.pth", epochs=3, cache_features=True)
        heads[name] = weights(out, "checkpoint-2.pth")["head.0.1.weight"]
        assert ("blr=1e+36: " in capsys.readouterr().out) == (name == "diverges")
        assert math.isfinite(lines(out)[-1]["train_loss"])
    assert lines(out.parent / "diverges")[-1]["chosen_blr"] == 1
    torch.testing.assert_close(heads["diverges"], heads["finite"])


def test_the_logged_loss_is_that_of_a_head_that_learns(probe, tuned):
    """A second rate that is too large has a loss above 10. The second epoch is not evaluated."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 3, "cache_features": True}
    alone = lines(probe("alone", blr=1, **flags))
    both = lines(probe("both", blr="1 1e4", eval_every=3, held_out=0.1, **flags))
    assert [line["train_loss"] for line in both] == [pytest.approx(line["train_loss"], rel=0.3) for line in alone]


@pytest.mark.slow
@CACHED
def test_the_loss_of_the_selected_rate_counts_the_epoch_before_a_resume(probe, tuned, monkeypatch, cached):
    """The second run is killed after two of five updates of its second epoch."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 2, "blr": "1 30",
             "on_nonfinite": "skip", **cached}  # fmt: skip
    whole = probe("whole", **flags)
    for calls in (2, 7 + (not cached)):  # a probe on images is saved before it is evaluated
        assert_same_run(whole, stop_and_resume(monkeypatch, probe, calls, name=f"parts{calls}", **flags))


@pytest.mark.parametrize(("best", "warned"), [(0, ["the smallest"]), (1, []), (2, ["the largest"])], ids=str)
def test_a_selected_rate_at_the_limit_warns(caplog, best, warned):
    rates, losses, scores = [0.1, 1.0, 10.0], [3.0, 2.0, 1.0], (best, "Acc@1", [50.0 + (n == best) for n in range(3)])
    main_linprobe.report_best_rate(rates, *scores, [], [], is_last=False)
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    entries = main_linprobe.report_best_rate(rates, *scores, losses, [1, 1, 1], is_last=True)
    assert entries == {"chosen_blr": rates[best], "train_loss": losses[best]}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split(", ")[1].removesuffix(" value") for message in warnings] == warned


@pytest.mark.slow
@CACHED
def test_an_attentive_probe_learns_and_its_file_needs_no_flags(probe, pretrained, labelled, evaluated, capsys, cached):
    out = probe(finetune=pretrained, probe="attentive", num_queries=8, epochs=12, lr=3, num_workers=1, **cached)
    output, last = capsys.readouterr().out, lines(out)[-1]
    assert ("the tokens of 71 images take 0 MB in " in output) == bool(cached)
    assert last["test_acc1"] > 70
    assert last["n_parameters"] == 8 * 128 + 128 * 128 + 6 * 128 + 6
    file = out / "checkpoint-11.pth"
    state, encoder = checkpoint.read(file)["model"], checkpoint.read(pretrained)["model"]
    assert all(torch.equal(state[name], encoder[name]) for name in encoder)
    output = evaluated(file)
    assert scores_of(out).rpartition(" ")[0] in output and "warning" not in output
    assert float(output.split()[-1]) == pytest.approx(last["test_loss"], abs=2e-3 if cached else 1e-3)
    model, images = get_model(file), sorted((labelled / "val").glob("*/*.png"))
    correct = [
        found["pred_class"] == path.parent.name for found, path in zip(model.predict(images), images, strict=True)
    ]
    assert 100 * sum(correct) / len(images) == pytest.approx(last["test_acc1"])
    pooled = model.extract_feat(images[:2])
    torch.testing.assert_close(model.head[2](model.head[1](pooled)), model(model.prepare(images[:2])))


@pytest.mark.parametrize("resume", ["auto", ""])
def test_tokens_are_those_of_the_present_images(probe, pretrained, labelled, tmp_path, resume):
    """Images that are replaced under their names get new tokens. A run without --resume does not use existing ones."""
    folder = shutil.copytree(labelled, tmp_path / "images")
    flags = {"data_path": folder, "finetune": pretrained, "probe": "attentive", "epochs": 1, "cache_features": True}
    out = probe("run", **flags)
    for name in ("checkpoint-0.pth", "checkpoint-best.pth", "log.txt"):
        (out / name).unlink()  # as if the run had been killed while it stored tokens
    if resume:
        for file in sorted((folder / "train").glob("*/*.png"))[:10]:
            Image.new("RGB", (20, 20)).save(file)
    else:
        tokens = out / "tokens/train-0-of-1/features.f16"
        tokens.write_bytes(bytes(tokens.stat().st_size))
    probe("run", **flags, **({"resume": resume} if resume else {}))
    fresh = probe("fresh", **flags)
    for split in ("train", "val"):
        ours, expected = ((run / f"tokens/{split}-0-of-1/features.f16").read_bytes() for run in (out, fresh))
        assert ours == expected


def test_each_process_stores_its_own_tokens_and_resumes(pretrained, labelled, tmp_path, monkeypatch):
    """The second of two processes is interrupted after two batches."""
    run = parse(main_linprobe, data_path=labelled, model="vit_mini_patch4", input_size=16, probe="attentive",
                cache_features=True, batch_size=4, num_workers=0, output_dir=tmp_path)  # fmt: skip
    data = RunData(run.images, run.data, torch.device("cpu"))
    model = build.probe(replace(run.model, nb_classes=6), run.images)
    train, *_ = data.open_pair()
    features = FrozenFeatures(
        run.model, data, model, Precision("off", torch.device("cpu")), {"train": train}, run.optim.batch_size, tmp_path
    )
    tokens, numbers = features.load("train")
    (expected,) = (model.forward_features(data.normalize(images)) for images, *_ in data.eval_batches(train, 48))
    assert (tokens.shape, tokens.dtype) == ((48, 16, 128), torch.float16)
    torch.testing.assert_close(tokens.float(), expected, rtol=1e-3, atol=1e-3)
    assert numbers.tolist() == list(train.labels)

    encode, batches = feature_files.encode, []

    def encode_and_stop(*args, **options):
        for batch in encode(*args, **options):
            if len(batches) == 2:
                batches.append(None)
                raise Stopped
            batches.append(batch)
            yield batch

    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, mine])
    monkeypatch.setattr(feature_files, "encode", encode_and_stop)
    monkeypatch.setattr(feature_files, "SAVE_EVERY", 1)
    with pytest.raises(Stopped):
        features.load("train")
    own, own_numbers = (part.clone() for part in features.load("train"))
    assert len(batches) == 3 + 4  # the rest of 24 images
    torch.testing.assert_close(own.float(), tokens[1::2].float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(own_numbers, numbers[1::2])
    model.cls_token.data.add_(1)
    other, _ = features.load("train")
    assert not torch.equal(other, own)  # other weights, other tokens


def test_a_disk_without_space_for_tokens_is_an_error_before_they_are_computed(probe, pretrained, monkeypatch, tmp_path):
    flags = {"finetune": pretrained, "probe": "attentive", "epochs": 1, "cache_features": True}

    def free(size):
        monkeypatch.setattr(frozen_features.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    free(290_000)
    with pytest.raises(ValueError, match=r"`cache_features`.*`output_dir`"):
        probe(**flags)
    assert not list((tmp_path / "run").glob("tokens/*/features.*"))
    free(71 * 16 * 128 * 2)
    out = probe(**flags)
    free(0)
    probe(**flags, resume="auto")
    assert (out / "tokens/val-0-of-1/features.f16").stat().st_size == 23 * 16 * 128 * 2


def test_stored_features_resume_within_an_epoch_in_as_many_processes(probe, tuned, labelled, tmp_path, monkeypatch):
    """Each process permutes its own features: the rest of an epoch of one process is not that of two."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "lr": 5, "cache_features": True}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        mains.stop_after(patch, "save", 9)  # of 6 updates per epoch
        probe("run", **flags, batch_size=4, accum_iter=2, save_minutes=0)
    out = tmp_path / "run"
    assert checkpoint.read(out / "checkpoint-last.pth")["progress"]["images_done"] % 48
    two = mains.argv_of({
        **flags, "data_path": labelled, "output_dir": out, "model": "vit_mini_patch4", "input_size": 16,
        "batch_size": 4, "accum_iter": 1, "epochs": 2, "warmup_epochs": 1, "num_workers": 0, "device": "cpu",
    })  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError) as failed:
        forks.run("main_linprobe.py", (*two, "--resume", "auto"), tmp_path / "output", 2)
    assert "start 1 process, and not 2" in failed.value.output
    shutil.copytree(out, tmp_path / "one")
    assert len(lines(probe("one", **flags, accum_iter=1, save_minutes=0, resume="auto"))) == 2
    new = ("--resume", out / "checkpoint-0.pth", "--output_dir", tmp_path / "new")
    forks.run("main_linprobe.py", (*two, *new), tmp_path / "output", 2)
    assert [line["epoch"] for line in lines(tmp_path / "new")] == [1]


@pytest.fixture
def damaged(labelled, tmp_path):
    """The pictures of six classes, one of them damaged."""
    shutil.copytree(labelled, tmp_path / "damaged")
    (tmp_path / "damaged/train/kind1/01.png").write_bytes(b"")
    return tmp_path / "damaged"


@pytest.mark.parametrize("flags", [{"cache_features": True}, {"cache_features": True, "probe": "attentive"},
                                   {"blr": "1 10", "held_out": 0.5}])  # fmt: skip
def test_bad_training_images_are_excluded_before_their_features(probe, pretrained, damaged, capsys, flags):
    """A bad validation image is an error."""
    cached, held_out = "cache_features" in flags, 24  # of 47
    flags = {"finetune": pretrained, "data_path": damaged, "epochs": 1, "warmup_epochs": 0, **flags}
    if cached:
        with pytest.raises(BadImage, match=r"01.png: .*on_bad_image=skip"):
            probe("error", **flags)
    out = probe("skip", **flags, on_bad_image="skip")
    assert checkpoint.read(out / "checkpoint-0.pth")["progress"]["num_images"] == 47 - (not cached) * held_out
    assert capsys.readouterr().out.count("01.png: ") == 1
    for number in (7, 13, 19, 25):  # with 01.png, more than a tenth of the images
        (damaged / f"train/kind1/{number:02}.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"5 of 48 .*01.png"):
        probe("many", **flags, on_bad_image="skip")
    if cached:
        shutil.copy(min(damaged.glob("train/kind0/*")), damaged / "train/kind1/01.png")
        (damaged / "val/kind1/01.png").write_bytes(b"")
        with pytest.raises(BadImage, match=r"val/kind1/01.png"):
            probe("validation", **flags, on_bad_image="skip")


def test_evaluation_uses_the_recorded_settings(tuned, evaluated, labelled, tmp_path):
    """In training, each of two processes has its own statistics of batch norm."""
    flags = {"data_path": labelled, "output_dir": tmp_path / "run", "model": "vit_mini_patch4", "input_size": 16,
             "batch_size": 4, "epochs": 3, "warmup_epochs": 1, "lr": 3, "num_workers": 0, "device": "cpu",
             "finetune": tuned / "checkpoint-19.pth", "crop_pct": 1, "mean": "0.4 0.4 0.4"}  # fmt: skip
    forks.run("main_linprobe.py", mains.argv_of(flags), tmp_path / "output", 2)
    output = evaluated(tmp_path / "run/checkpoint-2.pth", compile=True)
    assert scores_of(tmp_path / "run") in output
    (warning,) = re.findall(r"warning.*", output)
    assert "`compile` has no effect" in warning


@pytest.mark.parametrize("flags", [{}, {"cache_features": True}, {"probe": "attentive", "cache_features": True}])
def test_a_resumed_run_has_the_encoder_of_its_checkpoint(probe, tuned, capsys, tmp_path, flags):
    """Also if --finetune is omitted. Another file is an error, because it would have no effect."""
    run = {"lr": 5, "epochs": 4} | flags
    whole = probe("whole", finetune=tuned / "checkpoint-19.pth", **run)
    parts = shutil.copytree(whole, tmp_path / "parts")
    for name in ("checkpoint-3.pth", "checkpoint-best.pth"):
        (parts / name).unlink()
    (parts / "checkpoint-2.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="finetune"):
        probe("parts", **run, finetune=tuned / "checkpoint-0.pth", resume="auto")
    capsys.readouterr()
    probe("parts", **run, resume="auto")
    output = capsys.readouterr().out
    assert "untrained encoder" not in output
    assert ("after 48 of 48 images" in output) == (run.keys() >= {"probe", "cache_features"})  # of complete files
    assert_same_run(whole, parts, "checkpoint-3.pth")


def test_a_resumed_run_with_another_probe_is_an_error(probe, pretrained):
    probe(finetune=pretrained, probe="attentive", epochs=1, warmup_epochs=0)
    for changed, right in (({"probe": "linear"}, "probe=attentive"), ({"num_queries": 16}, "num_queries=32")):
        with pytest.raises(CheckpointError, match=right):
            probe(**{"probe": "attentive", **changed}, resume="auto")


def test_the_run_directory_is_locked_while_features_are_stored(probe, pretrained, monkeypatch):
    """A second run would write to the files of the first."""
    out = probe("run", finetune=pretrained, probe="attentive", epochs=1, cache_features=True)
    monkeypatch.setattr(feature_files, "extract", None)  # is not called
    with run_directory.locked(out), pytest.raises(ValueError, match=str(out)):
        probe("run", finetune=pretrained, probe="attentive", epochs=2, cache_features=True, resume="auto")


@pytest.mark.parametrize("rates", [[0.1, 0.3, 3.0], [3.0, 0.3, 0.1], [0.3, 3.0, 0.1]], ids=str)
def test_the_rates_of_the_heads_do_not_depend_on_their_order(rates):
    _, optimizer = make_heads(torch.nn.ModuleDict({"head": torch.nn.Linear(2, 3)}), rates, 0.0)
    optim = SimpleNamespace(lr=lr_sched.scaled_lr(None, rates, 256), min_lr=0, warmup_epochs=0, epochs=1)
    lr_sched.adjust_learning_rate(optimizer, 0, optim)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
