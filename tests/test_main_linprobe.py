"""Linear probing: the encoder is frozen, heads train independently, and the test set selects nothing."""

import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from mains import Stopped, assert_equal, lines, parse, stop_after, weights
from PIL import Image
from torch.nn import functional as F

import main_finetune
import main_linprobe
import models_build
import models_vit
from inference import get_model
from models_build import ParallelHeads, probe_head
from util import dist
from util.checkpoints import checkpoint, run_directory
from util.checkpoints.checkpoint import CheckpointError
from util.cli import entry_point
from util.data.decode import BadImage
from util.data.run_data import RunData
from util.settings import DataSpec, ImageSpec, specs
from util.training import feature_files
from util.training.precision import Precision


@pytest.fixture
def probe(classify):
    return lambda name="run", **flags: classify(main_linprobe, name, **flags)


@pytest.fixture(scope="module")
def tuned(labelled, tmp_path_factory):
    """The run directory of a fine-tuned encoder."""
    out = tmp_path_factory.mktemp("tuned")
    flags = {"data_path": labelled, "model": "vit_mini_patch4", "input_size": 16, "batch_size": 8, "num_workers": 0,
             "device": "cpu", "output_dir": out, "warmup_epochs": 1, "aa": "none", "reprob": 0, "lr": 0.003,
             "epochs": 20, "cls_token": True, "drop_path": 0}  # fmt: skip
    main_finetune.main(parse(main_finetune, **flags))
    return out


@pytest.mark.parametrize("cached", [False, True])
def test_only_the_head_learns(probe, tuned, cached):
    encoder = checkpoint.read(tuned / "checkpoint-19.pth")["model"]
    flags = {"cache_features": True} if cached else {}
    out = probe(finetune=tuned / "checkpoint-19.pth", epochs=12, lr=5, **flags)
    state = checkpoint.read(out / "checkpoint-11.pth")["model"]
    assert {name for name in state if name.startswith("head.")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert all(torch.equal(state[name], encoder[name]) for name in state if not name.startswith("head."))
    assert lines(out)[-1]["test_acc1"] > 70
    assert lines(out)[-1]["n_parameters"] == 6 * 128 + 6


def test_an_attentive_probe_refuses_a_classifier_that_pools_patches_at_once(probe, tmp_path):
    pooling = models_vit.vit_mini_patch4(img_size=16, num_classes=3, global_pool=True)
    torch.save({"model": pooling.state_dict()}, tmp_path / "pooling.pth")
    with pytest.raises(ValueError, match=r"--probe linear --global_pool$"):
        probe(finetune=tmp_path / "pooling.pth", probe="attentive", epochs=1)


def test_a_resumed_probe_with_another_crop_is_an_error(probe):
    probe(epochs=1, warmup_epochs=0, crop_pct=0.5)
    with pytest.raises(CheckpointError) as raised:
        probe(epochs=2, warmup_epochs=0, crop_pct=1, resume="auto")
    assert str(raised.value).endswith(": give --crop_pct 0.5")
    assert len(lines(probe(epochs=2, warmup_epochs=0, crop_pct=0.5, resume="auto"))) == 2


@pytest.mark.parametrize(("epochs", "warns"), [(2, True), (15, False)])
def test_few_updates_warn(epochs, warns, probe, capsys):
    probe(epochs=epochs, cache_features=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "updates are few" in line]
    assert bool(warnings) == warns
    assert not warns or ("--batch_size 8" in warnings[0] and "--epochs" in warnings[0])


def test_the_trunk_is_in_evaluation_mode():
    settings = {"model": "vit_mini_patch4", "input_size": 16, "in_chans": 1, "patch_size": None, "nb_classes": 3,
                "global_pool": False}  # fmt: skip
    model = models_build.probe(*specs(settings)).train()
    assert model.training
    assert model.head[0].training
    assert not any(module.training for module in model.blocks.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert not model.forward_features(torch.rand(2, 1, 16, 16)).requires_grad


def test_heads_train_independently():
    """The gradient of each head equals that of a single head."""
    torch.manual_seed(0)
    features, targets = torch.randn(16, 8), torch.randint(0, 3, (16,))
    first, second = probe_head(8, 3), probe_head(8, 3)
    for head in (first, second):
        main_linprobe.HeadLosses()(head(features), targets).backward()
    alone = [head[1].weight.grad.clone() for head in (first, second)]
    together = ParallelHeads([first, second])
    together.zero_grad()
    main_linprobe.HeadLosses()(together(features), targets).backward()
    for head, gradient in zip(together, alone, strict=True):
        torch.testing.assert_close(head[1].weight.grad, gradient)


def test_accuracies_of_several_heads_are_those_of_evaluation_mode():
    features, targets = torch.randn(50, 8), torch.randint(0, 3, (50,))
    heads = [probe_head(8, 3).train(), probe_head(8, 3).train()]
    for head in heads:
        head[0].running_mean.normal_()
        head[1].weight.data.normal_()
    batches = [[features[part].half(), targets[part], targets[part]] for part in (slice(30), slice(30, 50))]
    precision = Precision("off", torch.device("cpu"))
    found = [
        scores.acc1
        for scores in main_linprobe.evaluate_heads(heads, batches, normalize=torch.Tensor.float, precision=precision)
    ]
    with torch.no_grad():
        predictions = [head.eval()(features.half().float()).argmax(dim=1) for head in heads]
    assert found == pytest.approx([100 * float((own == targets).float().mean()) for own in predictions])


@pytest.mark.parametrize("cached", [False, True])
def test_the_best_of_several_rates_is_selected(probe, tuned, cached):
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 3, **({"cache_features": True} if cached else {})}
    out = probe("several", blr="1 30 100", **flags)
    chosen = lines(out)[-1]["chosen_blr"]
    assert chosen in (1, 30, 100)
    written = checkpoint.read(out / "probe.pth")
    assert written["args"]["blr"] == chosen
    assert written["model"]["head.1.weight"].shape == (6, 128)
    all_heads = checkpoint.read(out / "checkpoint-2.pth")["model"]
    number = [1, 30, 100].index(chosen)
    assert torch.equal(all_heads[f"head.{number}.1.weight"], written["model"]["head.1.weight"])


def test_every_reader_of_a_classifier_names_the_file_with_the_best_head(probe, mae, labelled):
    out = probe(blr="1 30", finetune=mae, epochs=1, warmup_epochs=0)
    image = min(labelled.glob("val/*/*.png"))
    with pytest.raises(ValueError) as error:
        get_model(out / "checkpoint-best.pth")
    message = re.search(r"(\S+) has several heads; give (\S+) in the same folder", str(error.value))
    assert message[1] == f"{out}/checkpoint-best.pth"
    assert len(get_model(out / message[2]).predict(image)["top"]) == 5


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
    assert "--blr 1e-09, the smallest value, is the best" in capsys.readouterr().out
    assert checkpoint.read(out / "probe.pth")["model"]["head.1.bias"].tolist() == pytest.approx([0, 9], abs=1e-6)
    assert (tmp_path / "report/classes.csv").read_text().splitlines()[1:] == ["ant,5,0,0.0000,bee", "bee,2,2,1.0000,"]


def test_a_single_rate_and_several_exclude_each_other(probe):
    with pytest.raises(ValueError, match=r"--lr 1 .*--blr"):
        probe(blr="0.2 0.1", lr=1)


def test_the_loss_is_the_mean_and_each_head_records_its_own():
    torch.manual_seed(0)
    criterion, logits, targets = main_linprobe.HeadLosses(), torch.randn(3, 2, 5, 4), torch.randint(0, 4, (5,))
    own = [[float(F.cross_entropy(head, targets)) for head in batch] for batch in logits]
    for batch, losses, epoch in zip(logits, own, (1, 1.5, 2), strict=True):
        assert float(criterion(batch, targets)) == pytest.approx(sum(losses) / 2)
        criterion.after_update(None, epoch)
    means, shares = criterion.means()
    assert means == pytest.approx([(own[1][n] + own[2][n]) / 2 for n in range(2)])  # of the last epoch
    assert shares == [1, 1]
    assert main_linprobe.HeadLosses().means() == ([], [])


def test_the_loss_is_over_the_heads_that_are_finite():
    torch.manual_seed(0)
    criterion, logits, targets = main_linprobe.HeadLosses(), torch.randn(2, 2, 5, 4), torch.randint(0, 4, (5,))
    own = [[float(F.cross_entropy(head, targets)) for head in batch] for batch in logits]
    criterion(logits[0], targets)
    logits[1, 1] *= float("nan")
    assert float(criterion(logits[1], targets)) == pytest.approx(own[1][0])
    criterion.after_update(None, 0.5)
    means, shares = criterion.means()
    assert means == pytest.approx([(own[0][0] + own[1][0]) / 2, own[0][1]])
    assert shares == [1, 0.5]
    assert math.isnan(float(criterion(logits[:1, 1:].repeat(1, 2, 1, 1)[0] * float("nan"), targets)))


def test_a_rate_that_diverges_does_not_end_the_others(probe, tuned, capsys):
    """The head of the other rate has the weights that it has alone."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 3, "cache_features": True}
    heads = {}
    for name, rates in (("diverges", "1 1e36"), ("finite", "1 2")):
        out = probe(name, blr=rates, **flags)
        heads[name] = checkpoint.read(out / "checkpoint-2.pth")["model"]["head.0.1.weight"]
        assert ("--blr 1e+36: " in capsys.readouterr().out) == (name == "diverges")
        assert math.isfinite(lines(out)[-1]["train_loss"])
    assert lines(out.parent / "diverges")[-1]["chosen_blr"] == 1
    torch.testing.assert_close(heads["diverges"], heads["finite"])


def test_the_selected_rate_and_its_loss_are_logged(probe, tuned, capsys):
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 2, "cache_features": True}
    out = probe("several", blr="1 30 100", **flags)
    output, last = capsys.readouterr().out, lines(out)[-1]
    loss = f"{last['train_loss']:.4f}"
    assert f"best of 3 rates: --blr {last['chosen_blr']:g}, held-out Acc@1 " in output
    assert f", training loss {loss}\n" in output
    assert f"loss {loss}," in output[output.index("epoch 1 done in") :]


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_of_the_selected_rate_counts_the_epoch_before_a_resume(probe, tuned, monkeypatch, cached):
    """The second run is killed after two of five updates of its second epoch."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "epochs": 2, "blr": "1 30", "save_minutes": 0,
             "on_nonfinite": "skip", **({"cache_features": True} if cached else {})}  # fmt: skip
    whole = probe("whole", **flags)
    for calls in (2, 7 + (not cached)):  # a probe on images is saved before it is evaluated
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, "save", calls)
            probe(f"parts{calls}", **flags)
        parts = probe(f"parts{calls}", **flags, resume="auto")
        assert [line["train_loss"] for line in lines(parts)] == [line["train_loss"] for line in lines(whole)]


def test_a_probe_of_an_earlier_version_with_several_rates_resumes(probe, tuned):
    """Its checkpoints have no sums of the losses."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "blr": "1 30", "cache_features": True, "epochs": 2}
    whole = probe("whole", **flags)
    state = checkpoint.read(whole / "checkpoint-0.pth")
    del state["callbacks"]
    (whole.parent / "earlier").mkdir()
    torch.save(state, whole.parent / "earlier/checkpoint-0.pth")
    earlier = probe("earlier", **flags, resume="auto")
    assert_equal(weights(earlier), weights(whole))
    assert lines(earlier)[-1]["train_loss"] == lines(whole)[-1]["train_loss"]


@pytest.mark.parametrize(
    ("best", "warned"), [(0, ["the smallest"]), (1, []), (2, ["the largest"])], ids=["smallest", "inner", "largest"]
)
def test_a_selected_rate_at_the_limit_warns(caplog, best, warned):
    accuracies = [50.0 + (number == best) for number in range(3)]
    rates, scores = [0.1, 1.0, 10.0], (best, "Acc@1", accuracies)
    entries = main_linprobe.report_best_rate(rates, *scores, [3.0, 2.0, 1.0], [1, 1, 1], is_last=True)
    assert entries == {"chosen_blr": [0.1, 1.0, 10.0][best], "train_loss": [3.0, 2.0, 1.0][best]}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split(", ")[1].removesuffix(" value") for message in warnings] == warned
    caplog.clear()
    main_linprobe.report_best_rate(rates, *scores, [], [], is_last=False)
    assert not any(record.levelname == "WARNING" for record in caplog.records)


def test_two_processes_evaluate_the_saved_probe(tuned, labelled, tmp_path, capsys, probe):
    """In training, each process has its own statistics of batch norm."""
    flags = ("--data_path", labelled, "--output_dir", tmp_path / "two", "--model", "vit_mini_patch4",
             "--input_size", 16, "--batch_size", 4, "--epochs", 3, "--warmup_epochs", 1, "--lr", 3, "--num_workers", 0,
             "--device", "cpu", "--finetune", tuned / "checkpoint-19.pth")  # fmt: skip
    forks.run("main_linprobe.py", flags, tmp_path / "output", 2)
    last = lines(tmp_path / "two")[-1]
    capsys.readouterr()
    probe("nothing", eval=True, resume=tmp_path / "two" / "checkpoint-2.pth")
    output = capsys.readouterr().out
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in output


def test_the_saved_probe_gives_equal_results(probe, tuned, capsys):
    out = probe("several", blr="1 100", finetune=tuned / "checkpoint-19.pth", epochs=3)
    last = lines(out)[-1]
    capsys.readouterr()
    probe("nothing", eval=True, resume=out / "probe.pth")
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5" in capsys.readouterr().out


@pytest.fixture
def mae(tmp_path, labelled):
    """A file with a random encoder, whose tokens have a norm."""
    torch.manual_seed(5)
    model = models_build.classifier(*specs({"model": "vit_mini_patch4", "input_size": 16}))
    torch.save({"model": model.state_dict()}, tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


@pytest.mark.parametrize("cached", [False, True])
def test_an_attentive_probe_learns_and_its_file_needs_no_flags(probe, mae, labelled, capsys, cached):
    flags = {"cache_features": True} if cached else {}
    out = probe(finetune=mae, probe="attentive", num_queries=8, epochs=12, lr=3, num_workers=1, **flags)
    output, last = capsys.readouterr().out, lines(out)[-1]
    assert ("the tokens of 71 images take 0 MB in " in output) == cached
    assert last["test_acc1"] > 70
    assert last["n_parameters"] == 8 * 128 + 128 * 128 + 6 * 128 + 6
    file = out / "checkpoint-11.pth"
    state, encoder = checkpoint.read(file)["model"], checkpoint.read(mae)["model"]
    assert all(torch.equal(state[name], encoder[name]) for name in encoder)

    flags = ["--eval", "--resume", file, "--data_path", labelled, "--num_workers", 0]
    main_linprobe.main(entry_point.parse(main_linprobe.get_args_parser(), [*map(str, flags), "--device", "cpu"]))
    output = capsys.readouterr().out
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss " in output
    assert float(output.split()[-1]) == pytest.approx(last["test_loss"], abs=2e-3 if cached else 1e-3)
    assert "warning" not in output

    model = get_model(file)
    images = sorted((labelled / "val").glob("*/*.png"))
    predictions = model.predict(images)
    correct = [
        prediction["pred_class"] == path.parent.name for prediction, path in zip(predictions, images, strict=True)
    ]
    assert 100 * sum(correct) / len(correct) == pytest.approx(last["test_acc1"])
    pooled = model.extract_feat(images[:2])
    torch.testing.assert_close(model.head[2](model.head[1](pooled)), model(model.prepare(images[:2])))


@pytest.mark.parametrize("cached", [False, True])
def test_an_attentive_probe_resumes_exactly(probe, mae, cached, capsys):
    flags = {
        "finetune": mae,
        "probe": "attentive",
        "lr": 3,
        "epochs": 3,
        **({"cache_features": True} if cached else {}),
    }
    whole, parts = probe("whole", **flags), probe("parts", **flags)
    for name in ("checkpoint-2.pth", "checkpoint-best.pth"):
        (parts / name).unlink()
    capsys.readouterr()
    probe("parts", **flags, resume="auto")
    assert ("after 48 of 48 images" in capsys.readouterr().out) == cached  # the files of tokens are complete
    a, b = (checkpoint.read(out / "checkpoint-2.pth") for out in (whole, parts))
    assert [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])] == []
    assert torch.equal(a["optimizer"]["state"][0]["momentum"], b["optimizer"]["state"][0]["momentum"])
    for changed in ({"probe": "linear"}, {"num_queries": 16}):
        (parts / "checkpoint-2.pth").unlink(missing_ok=True)
        with pytest.raises(CheckpointError) as error:
            probe("parts", **flags | changed, resume="auto")
        assert "another architecture" in str(error.value)
        expected = "give --probe attentive" if "probe" in changed else "give --num_queries 32"
        assert str(error.value).endswith(expected)


def test_several_attentive_probes_train_at_once(probe, mae, capsys):
    flags = {"finetune": mae, "probe": "attentive", "epochs": 3, "cache_features": True}
    out = probe("several", **flags, blr="1 30 100")
    last = lines(out)[-1]
    shapes = {name: tuple(value.shape) for name, value in checkpoint.read(out / "probe.pth")["model"].items()}
    assert shapes["head.pool.queries"] == (32, 128)
    all_heads = checkpoint.read(out / "checkpoint-2.pth")["model"]
    assert {f"head.{number}.pool.value.weight" for number in range(3)} < all_heads.keys()
    capsys.readouterr()
    probe("nothing", eval=True, resume=out / "probe.pth")
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"give probe\.pth"):
        probe("nothing", eval=True, resume=out / "checkpoint-2.pth")


def test_stored_tokens_are_those_of_the_encoder_in_fp16(probe, mae, labelled):
    out = probe(finetune=mae, probe="attentive", epochs=1, cache_features=True)
    model = get_model(mae, input_size=16)
    for split, count in (("train", 48), ("val", 23)):
        (file,) = (out / "tokens" / f"{split}-0-of-1").glob("features.f16")
        tokens = torch.from_numpy(np.fromfile(file, np.float16)).view(count, 16, 128)
        expected = model.extract_feat(sorted((labelled / split).glob("*/*.png")), "tokens")[:, 1:]
        torch.testing.assert_close(tokens.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("resume", ["auto", ""])
def test_tokens_are_those_of_the_present_images(probe, mae, labelled, tmp_path, resume):
    """Images that are replaced under their names get new tokens. A run without --resume does not use existing ones."""
    folder = shutil.copytree(labelled, tmp_path / "images")
    flags = {"data_path": folder, "finetune": mae, "probe": "attentive", "epochs": 1, "cache_features": True}
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


def test_each_process_stores_its_own_tokens_and_resumes(mae, labelled, tmp_path, monkeypatch):
    """The second of two processes is interrupted after two batches."""
    args = parse(main_linprobe, data_path=labelled, model="vit_mini_patch4", input_size=16, probe="attentive",
                 cache_features=True, batch_size=4, num_workers=0, output_dir=tmp_path)  # fmt: skip
    data = RunData(ImageSpec.of(vars(args)), DataSpec.of(vars(args)), torch.device("cpu"))
    model = models_build.probe(*specs({**vars(args), "nb_classes": 6}))
    train, _ = data.open_pair()
    features = main_linprobe.Features(args, data, model, Precision("off", torch.device("cpu")), {"train": train})
    tokens, numbers = features.load("train")
    assert (tokens.shape, tokens.dtype) == ((48, 16, 128), torch.float16)
    assert numbers.tolist() == list(train.labels)

    encode, batches = feature_files.encode, []

    def encode_and_stop(*args, **options):
        for batch in encode(*args, **options):
            if len(batches) == 2:
                batches.append(None)
                raise Stopped
            batches.append(batch)
            yield batch

    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather", lambda mine: [mine, mine])
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


def test_a_disk_without_space_for_tokens_is_an_error_before_they_are_computed(probe, mae, monkeypatch, tmp_path):
    monkeypatch.setattr(main_linprobe.shutil, "disk_usage", lambda path: SimpleNamespace(free=290_000))
    with pytest.raises(ValueError) as error:
        probe(finetune=mae, probe="attentive", epochs=1, cache_features=True)
    assert "--cache_features: the tokens of 71 images take 0 MB in " in str(error.value)
    assert "where 0 MB are free: free space, give another --output_dir, or omit --cache_features" in str(error.value)
    assert not list((tmp_path / "run").glob("tokens/*/features.*"))
    monkeypatch.setattr(main_linprobe.shutil, "disk_usage", lambda path: SimpleNamespace(free=71 * 16 * 128 * 2))
    out = probe(finetune=mae, probe="attentive", epochs=1, cache_features=True)
    monkeypatch.setattr(main_linprobe.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    probe(finetune=mae, probe="attentive", epochs=1, cache_features=True, resume="auto")
    assert (out / "tokens/val-0-of-1/features.f16").stat().st_size == 23 * 16 * 128 * 2


def test_resumes_exactly(probe, tuned):
    flags = {"finetune": tuned / "checkpoint-19.pth", "lr": 5}
    whole = probe("whole", **flags, epochs=4)
    probe("parts", **flags, epochs=4)
    (whole.parent / "parts" / "checkpoint-3.pth").unlink()
    (whole.parent / "parts" / "checkpoint-best.pth").unlink()
    parts = probe("parts", **flags, epochs=4, resume="auto")
    a, b = (checkpoint.read(out / "checkpoint-3.pth") for out in (whole, parts))
    assert torch.equal(a["model"]["head.1.weight"], b["model"]["head.1.weight"])
    assert torch.equal(a["optimizer"]["state"][0]["momentum"], b["optimizer"]["state"][0]["momentum"])


def test_stored_features_resume_within_an_epoch_in_as_many_processes(probe, tuned, labelled, tmp_path, monkeypatch):
    """Each process permutes its own features: the rest of an epoch of one process is not that of two."""
    flags = {"finetune": tuned / "checkpoint-19.pth", "lr": 5, "cache_features": True, "save_minutes": 0}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 9)  # of 6 updates per epoch
        probe("run", **flags, batch_size=4, accum_iter=2)
    out = tmp_path / "run"
    assert checkpoint.read(out / "checkpoint-last.pth")["progress"]["images_done"] % 48
    two = ("--data_path", labelled, "--output_dir", out, "--model", "vit_mini_patch4", "--input_size", 16,
           "--batch_size", 4, "--accum_iter", 1, "--epochs", 2, "--warmup_epochs", 1, "--lr", 5, "--num_workers", 0,
           "--device", "cpu", "--finetune", tuned / "checkpoint-19.pth", "--cache_features", "--resume")  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError) as failed:
        forks.run("main_linprobe.py", (*two, "auto"), tmp_path / "output", 2)
    assert "there were 1 processes and are 2 now: start 1, or resume from the checkpoint of a" in failed.value.output
    shutil.copytree(out, tmp_path / "one")
    assert len(lines(probe("one", **flags, accum_iter=1, resume="auto"))) == 2
    new = ("--output_dir", tmp_path / "new")
    forks.run("main_linprobe.py", (*two, out / "checkpoint-0.pth", *new), tmp_path / "output", 2)
    assert [line["epoch"] for line in lines(tmp_path / "new")] == [1]


@pytest.fixture
def damaged(labelled, tmp_path):
    """The pictures of six classes, one of them damaged."""
    shutil.copytree(labelled, tmp_path / "damaged")
    (tmp_path / "damaged/train/kind1/01.png").write_bytes(b"")
    return tmp_path / "damaged"


@pytest.mark.parametrize("flags", [{"cache_features": True}, {"cache_features": True, "probe": "attentive"},
                                   {"blr": "1 10", "held_out": 0.5}, {"val_fraction": 0.5}])  # fmt: skip
def test_bad_training_images_are_excluded_before_their_features(probe, mae, damaged, capsys, flags):
    flags = {"finetune": mae, "data_path": damaged, "epochs": 1, "warmup_epochs": 0, **flags}
    if "cache_features" in flags:
        with pytest.raises(BadImage, match=r"01.png: .*\(--on_bad_image skip"):
            probe("error", **flags)
    out = probe("skip", **flags, on_bad_image="skip")
    num_images = checkpoint.read(out / "checkpoint-0.pth")["progress"]["num_images"]
    held_out = {"blr": 24, "val_fraction": 24}  # of 47
    assert num_images == 47 - next((held_out[name] for name in held_out if name in flags), 0)
    assert capsys.readouterr().out.count("01.png: the file is empty; it is excluded") == 1
    for number in (7, 13, 19, 25):  # with 01.png, more than a tenth of the images
        (damaged / f"train/kind1/{number:02}.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"5 of 48 images .* 10%; .*01.png"):
        probe("many", **flags, on_bad_image="skip")


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_bad_validation_image_is_an_error(probe, mae, labelled, tmp_path, kind):
    shutil.copytree(labelled, tmp_path / "damaged")
    (tmp_path / "damaged/val/kind1/01.png").write_bytes(b"")
    flags = {"finetune": mae, "data_path": tmp_path / "damaged", "probe": kind, "cache_features": True}
    with pytest.raises(BadImage, match=r"01.png: the file is empty$"):
        probe(**flags, on_bad_image="skip")


def test_evaluation_uses_the_recorded_settings(probe, tuned, capsys, labelled):
    out = probe("run", finetune=tuned / "checkpoint-19.pth", lr=5, epochs=3, crop_pct=1, mean="0.4 0.4 0.4")
    last = lines(out)[-1]
    capsys.readouterr()
    flags = ["--eval", "--resume", out / "checkpoint-2.pth", "--data_path", labelled, "--num_workers", 0]
    main_linprobe.main(entry_point.parse(main_linprobe.get_args_parser(), [*map(str, flags), "--device", "cpu"]))
    output = capsys.readouterr().out
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in output
    assert "warning" not in output


def test_without_finetune_features_are_random_or_of_the_checkpoint(probe, tuned, capsys):
    """The checkpoint of a probe contains the encoder, which computes the features, with or without --finetune."""
    flags = {"lr": 5, "epochs": 4}
    probe("random", **flags)
    assert capsys.readouterr().out.count("warning: no --finetune: the features are from an untrained encoder") == 1
    whole = probe("whole", finetune=tuned / "checkpoint-19.pth", **flags)
    capsys.readouterr()
    again = probe("again", resume=whole / "checkpoint-1.pth", **flags)
    assert "untrained encoder" not in capsys.readouterr().out
    assert lines(again)[-1]["test_acc1"] == lines(whole)[-1]["test_acc1"]
    assert lines(again)[-1]["test_loss"] == lines(whole)[-1]["test_loss"]


@pytest.mark.parametrize("flags", [{}, {"cache_features": True}, {"finetune": "other"}])
def test_a_resumed_run_has_the_encoder_of_its_checkpoint(probe, tuned, capsys, flags):
    """Also if --finetune is omitted, or names another file."""
    run = {"lr": 5, "epochs": 4, **{name: value for name, value in flags.items() if name == "cache_features"}}
    whole = probe("whole", finetune=tuned / "checkpoint-19.pth", **run)
    parts = probe("parts", finetune=tuned / "checkpoint-19.pth", **run)
    for name in ("checkpoint-3.pth", "checkpoint-best.pth"):
        (parts / name).unlink()
    (parts / "checkpoint-2.pth").write_bytes(b"damaged")
    capsys.readouterr()
    probe("parts", **run, resume="auto", **({"finetune": tuned / "checkpoint-0.pth"} if "finetune" in flags else {}))
    assert "untrained encoder" not in capsys.readouterr().out
    assert lines(parts)[-1]["test_loss"] == lines(whole)[-1]["test_loss"]
    a, b = (checkpoint.read(out / "checkpoint-3.pth")["model"] for out in (whole, parts))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_the_run_directory_is_locked_while_features_are_stored(probe, mae, monkeypatch):
    """A second run would write to the files of the first."""
    out = probe("run", finetune=mae, probe="attentive", epochs=1, cache_features=True)
    monkeypatch.setattr(feature_files, "extract", None)  # is not called
    with run_directory.locked(out), pytest.raises(ValueError, match="is being written to by another run"):
        probe("run", finetune=mae, probe="attentive", epochs=2, cache_features=True, resume="auto")


def test_compile_has_no_effect_in_evaluation(probe, tuned, labelled, capsys):
    out = probe("run", finetune=tuned / "checkpoint-19.pth", lr=5, epochs=1)
    flags = ["--eval", "--resume", out / "checkpoint-0.pth", "--data_path", labelled, "--num_workers", 0, "--compile"]
    main_linprobe.main(entry_point.parse(main_linprobe.get_args_parser(), [*map(str, flags), "--device", "cpu"]))
    assert "warning: --compile has no effect with --eval" in capsys.readouterr().out
