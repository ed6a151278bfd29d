"""--probe_every: scores of the encoder while it trains, and the environment of each start."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from mains import assert_equal, assert_same_run, call, in_processes, lines, open_source, stop_and_resume, weights
from PIL import Image

import main_knn
from mae.data.generators import seed_generators
from mae.inference import get_model
from mae.training.online_probe import effective_rank
from mae.uniformity import uniformity

NAMES = ("test_knn_acc1", "test_loss", "test_effective_rank", "test_uniformity")


@pytest.mark.slow
def test_the_accuracy_is_that_of_main_knn_and_training_stays_the_same(pretrain, labelled, monkeypatch, capsys):
    """Also for a run that is interrupted after the first epoch. The last line has its accuracy, and the highest one."""
    flags = {"data_path": labelled, "batch_size": 8, "save_every": 1, "epochs": 3}
    probed = {**flags, "probe_every": 2, "probe_path": labelled}
    without, run = pretrain("without", **flags), pretrain("with", **probed)
    assert_equal(weights(without, "checkpoint-2.pth"), weights(run, "checkpoint-2.pth"))
    assert [line.keys() >= set(NAMES) for line in lines(run)] == [False, True, True]
    assert not any(set(NAMES) & line.keys() for line in lines(without))
    for epoch in (1, 2):
        file = run / f"checkpoint-{epoch}.pth"
        found = call(main_knn, finetune=file, data_path=labelled, k=20, num_workers=0, device="cpu")
        assert lines(run)[epoch]["test_knn_acc1"] == pytest.approx(found[20, 0.07])
    capsys.readouterr()
    assert_same_run(run, stop_and_resume(monkeypatch, pretrain, 1, "save_epoch", **probed), "checkpoint-2.pth")
    last = capsys.readouterr().out.splitlines()[-1]
    entry = lines(run)[-1]
    assert last.startswith("3 epochs in 0:0") and "resumed (2 starts)" in last
    assert f"loss {entry['train_loss']:.4f}, {entry['train_explained']:.1%} explained" in last
    assert f"k-NN {entry['test_knn_acc1']:.1f} % (raw pixels {entry['test_knn_pixels']:.1f} %)" in last
    assert f"highest {max(line['test_knn_acc1'] for line in lines(run)[1:]):.1f} %" in last


def test_the_rank_is_that_of_the_features(pretrain, labelled):
    run = pretrain(data_path=labelled, probe_every=1, probe_path=labelled, epochs=1)
    model, source = get_model(run / "checkpoint-0.pth"), open_source("train", str(labelled))
    pictures = [model.transform(Image.open(source.name(number))) for number in range(len(source))]
    with torch.inference_mode():
        features = model.class_features(model.forward_features(model.normalize(torch.stack(pictures))))
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert lines(run)[0]["test_effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert effective_rank(torch.eye(5)) == pytest.approx(5, rel=1e-4)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1, rel=1e-4)


def test_the_loss_is_that_of_held_out_images_with_fixed_masks(pretrain, labelled):
    """The masks of an image are the same in each epoch: its noise is the first random number of (seed, 0, image)."""
    run = pretrain(data_path=labelled, probe_every=1, probe_path=labelled, epochs=2, seed=3, save_every=1)
    held_out = open_source("val", str(labelled))
    for epoch in (0, 1):
        model = get_model(run / f"checkpoint-{epoch}.pth")
        losses = []
        for number in range(len(held_out)):
            seed_generators(3, 0, number)
            noise = torch.rand(1, model.num_patches)
            imgs = model.normalize(model.transform(Image.open(held_out.name(number)))[None])
            losses.append(model(imgs, 0.75, noise=noise)[0].item())
        assert lines(run)[epoch]["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_uniformity_is_the_mean_squared_cosine():
    features = torch.randn(50, 6)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    assert uniformity(features).item() == pytest.approx(cosines.square().mean().item(), rel=1e-5)
    assert uniformity(torch.ones(7, 3)).item() == pytest.approx(1)
    assert uniformity(torch.eye(5)).item() == pytest.approx(1 / 5)


def test_the_images_of_the_run_are_the_default(pretrain, labelled, tmp_path):
    """Five of 48 labelled images are classified by the others. Images without labels have a rank only."""
    score = lines(pretrain("labelled", data_path=labelled, probe_every=2, cache_images=True))[1]["test_knn_acc1"]
    assert score in [pytest.approx(20 * right) for right in range(6)]
    (tmp_path / "flat").mkdir()
    for file in labelled.glob("train/*/*.png"):
        (tmp_path / "flat" / file.name).symlink_to(file)
    found = lines(pretrain("unlabelled", data_path=tmp_path / "flat", probe_every=2))[1]
    assert {"test_loss", "test_effective_rank"} <= found.keys()
    assert "test_knn_acc1" not in found


def test_two_processes_have_the_scores_of_one(labelled, tmp_path):
    flags = ("--epochs", 1, "--probe_every", 1, "--probe_path", labelled)
    in_processes(1, labelled, tmp_path / "one", *flags, "--batch_size", 8)
    text = in_processes(2, labelled, tmp_path / "two", *flags, "--batch_size", 4)
    one, two = (lines(tmp_path / name)[0] for name in ("one", "two"))
    for name in NAMES:
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    assert f"* 20-NN Acc@1 {two['test_knn_acc1']:.3f}" in text
    assert "20 nearest neighbors among 48 images classify 23 held-out images" in text


def test_a_probe_that_can_not_run_is_an_error_before_training(pretrain, labelled, tmp_path):
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as archive:
        for number, file in enumerate(sorted(labelled.glob("train/*/*.png"))):
            archive.add(file, f"{number}.png")
    streamed = {"data_path": None, "dataset": f"wds:{shard}"}
    for flags, message in (
        ({"probe_path": tmp_path / "nowhere"}, "^probe_path=.*nowhere: there"),
        (streamed, "probe_path=PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(probe_every=1, **flags)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        in_processes(2, labelled, tmp_path / "sharded", "--fsdp", "--probe_every", 1, "--batch_size", 4)
    assert "probe_every=1: `fsdp`" in raised.value.output
    assert not list(tmp_path.rglob("log.txt"))


def test_each_start_records_its_environment_and_its_settings(pretrain, capsys):
    """Their names and values are in the file, and no line of the output is longer than 300 characters."""
    run = pretrain(epochs=1)
    pretrain(epochs=2, resume="auto")
    first, second = (json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines())
    assert first.keys() == second.keys() and first["command"]
    assert first["torch"] == torch.__version__.split("+")[0]
    assert (first["processes"], first["device"].split()[0]) == (1, "cpu")
    assert [(line["settings"]["epochs"], line["settings"]["mask_ratio"]) for line in (first, second)] == [
        (1, 0.75), (2, 0.75),
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert str(run / "environment.jsonl") in output
    assert max(map(len, output.replace(str(run), "").splitlines())) < 300


def test_the_images_that_are_held_out_do_not_classify_themselves(pretrain, labelled, capsys):
    pretrain(data_path=labelled, probe_every=1, epochs=1)
    assert "20 nearest neighbors among 43 images classify 5 held-out images" in capsys.readouterr().out


def test_held_out_images_that_equal_others_are_counted(labelled, pretrain, tmp_path, capsys):
    """The features of their copies classify them."""
    copies = shutil.copytree(labelled, tmp_path / "copies")
    of_train, of_val = (sorted(copies.glob(f"{split}/kind0/*"))[:3] for split in ("train", "val"))
    for file, copy in zip(of_train, of_val, strict=True):
        shutil.copy(file, copy)
    pretrain("own", data_path=labelled, probe_every=1, probe_path=labelled, epochs=1)
    assert "equal training" not in capsys.readouterr().out
    pretrain("copied", data_path=labelled, probe_every=1, probe_path=copies, epochs=1)
    assert "3 of 23 held-out images equal training images, 0 with another label" in capsys.readouterr().out


def test_the_rank_of_both_poolings_is_that_of_the_class_token(pretrain, labelled):
    """`uniformity` trains it. Its features in both poolings have unit length."""
    run = pretrain(data_path=labelled, probe_every=1, probe_path=labelled, epochs=1, uniformity=0.1)
    model, source = get_model(run / "checkpoint-0.pth"), open_source("train", str(labelled))
    pictures = [model.transform(Image.open(source.name(number))) for number in range(len(source))]
    with torch.inference_mode():
        tokens = model.class_features(model.forward_features(model.normalize(torch.stack(pictures))))
    features = torch.nn.functional.normalize(tokens.double(), dim=1)
    shares = torch.linalg.svdvals(features)
    shares = (shares / shares.sum() + 1e-7).numpy()
    entry = lines(run)[0]
    assert entry["test_effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert entry["test_uniformity"] == pytest.approx(float(uniformity(features)), rel=1e-5)
