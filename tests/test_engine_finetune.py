"""Evaluation: every sample counts once, and the loss is a mean over samples for all batch sizes."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_samples
from mains import call, lines, open_source, parse
from PIL import Image
from sklearn.metrics import log_loss, top_k_accuracy_score

import main_finetune
import main_knn
import main_linprobe
from engine_finetune import evaluate_model
from mae import parallel
from mae.checkpoints.checkpoint import CheckpointError
from mae.data import loader, transforms
from mae.data.item import Item
from mae.data.labels import Subset
from mae.data.run_data import RunData
from mae.data.source import NumberedItems
from mae.evaluate.tasks import Classification
from mae.inference import features
from mae.settings import DataSpec, ImageSpec
from mae.training import feature_files
from mae.training.frozen_features import encode_images
from mae.training.precision import Precision
from models_vit import vit_mini_patch4


def test_evaluation_equals_scikit_learn(pictures):
    normalize = transforms.Normalize(*transforms.channel_statistics(3))
    model = vit_mini_patch4(img_size=16, num_classes=7, drop_path_rate=0.9)  # in training alone
    torch.nn.init.normal_(model.head.weight, std=0.1)
    batches = loader.eval_loader(make_samples(pictures), 7, 0, False)
    scores = evaluate_model(model, batches, normalize=normalize, precision=Precision("off", torch.device("cpu")))
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(normalize(images)) for images, *_ in batches]).double()
    labels = np.concatenate([labels for _, labels, *_ in batches])
    assert scores.loss == pytest.approx(log_loss(labels, logits.softmax(1), labels=range(7)), rel=1e-6)
    assert scores.acc1 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=range(7)))
    found = scores.stats()["test_acc5"]
    assert found == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert np.array_equal(scores.labels, labels)


@pytest.mark.slow
def test_a_compiled_evaluation_has_one_graph(classify, labelled, tmp_path, monkeypatch):
    """The last batch, which is smaller, is no other graph. It is not compiled to C++, which takes long."""
    file = classify(main_finetune, epochs=1) / "checkpoint-0.pth"
    expected = classify(main_finetune, eval=True, finetune=file, batch_size=16)
    rows = {"model": file, "out": tmp_path / "rows.npz", "num_workers": 0, "device": "cpu", "batch_size": 32}
    call(features, labelled, **rows)
    of_eager = np.load(tmp_path / "rows.npz")["features"]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = classify(main_finetune, eval=True, finetune=file, batch_size=16, compile=True)
        call(features, labelled, "--compile", **rows)
    assert found.stats() == pytest.approx(expected.stats(), rel=1e-5)
    assert np.array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npz")["features"], of_eager, rtol=1e-4, atol=1e-6)


def test_features_are_those_of_evaluation_mode(labelled):
    run = parse(main_knn, data_path=labelled, input_size=16)
    device = torch.device("cpu")
    data = RunData(run.images, run.data, device)
    precision = Precision("off", device)
    model = vit_mini_patch4(img_size=16, num_classes=7, drop_path_rate=0.9).train()
    source, _ = data.open_val()
    encode_set = partial(encode_images, data, model=model, batch_size=7, precision=precision)
    features, labels = feature_files.extract(encode_set, source)
    with torch.no_grad():
        batches = data.eval_batches(source, 7)
        expected = torch.cat([model.eval().forward_features(data.normalize(images)) for images, *_ in batches])
    torch.testing.assert_close(features, expected)
    assert labels.tolist() == source.labels.tolist()


def test_a_process_without_images_has_features_of_the_same_width(labelled, monkeypatch):
    """Nearest neighbors compare the features of all processes."""
    source = Subset(open_source("val", str(labelled)), np.arange(1))
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda mine: [(5,), mine])
    features, labels = feature_files.extract(lambda rest: [], source)
    assert (features.shape, features.dtype, labels.tolist()) == ((0, 5), torch.float32, [])


@pytest.mark.parametrize("main", [main_finetune, main_linprobe, main_knn])
@pytest.mark.parametrize("layout", ["train", "flat", "list"])
def test_val_fraction_needs_no_validation_set(main, layout, classify, labelled, tmp_path, capsys):
    """The result is that of a dataset which has one. --eval holds out the images that the training has held out."""
    if layout == "train":
        data = {"data_path": shutil.copytree(labelled / "train", tmp_path / "images/train").parent}
    elif layout == "flat":
        data = {"data_path": shutil.copytree(labelled / "train", tmp_path / "images")}
    else:
        files = sorted((labelled / "train").glob("*/*.png"))
        (tmp_path / "train.txt").write_text("".join(f"{file} {file.parent.name}\n" for file in files))
        data = {"data_path": labelled / "train", "train_list": tmp_path / "train.txt"}
    flags = {"val_fraction": 0.25, "seed": 3, **({"k": 1} if main is main_knn else {"epochs": 1, "warmup_epochs": 0})}

    def result(name, **more):
        out = classify(main, name, **flags, **more)
        return out if main is main_knn else lines(out)[-1]["test_loss"]

    assert result("with") == result("without", **data)
    assert capsys.readouterr().out.count("val_fraction=0.25: 12 of 48 training images are held out") == 2
    if main is not main_knn:
        file = tmp_path / "without/checkpoint-0.pth"
        scores = classify(main, "eval", val_fraction=0.25, **data, eval=True, resume=file)
        loss = float(capsys.readouterr().out.split()[-1])
        assert loss == pytest.approx(lines(tmp_path / "without")[-1]["test_loss"], abs=1e-3)
        assert main is main_linprobe or len(scores.labels) == 12


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_changed_images_do_not_move_between_the_parts_unnoticed(main, classify, labelled, tmp_path, capsys):
    """A file more changes the split, and images that were trained on are held out."""
    shutil.copytree(labelled / "train", tmp_path / "images")
    flags = {"val_fraction": 0.25, "data_path": tmp_path / "images"}
    file = classify(main, "run", **flags, epochs=1, warmup_epochs=0) / "checkpoint-0.pth"
    classify(main, "eval", **flags, eval=True, resume=file)
    shutil.copytree(tmp_path / "images", tmp_path / "elsewhere")  # the same images
    classify(main, "eval", **flags | {"data_path": tmp_path / "elsewhere"}, eval=True, resume=file)
    assert "may be among them" not in capsys.readouterr().out
    shutil.copy(tmp_path / "images/kind1/01.png", tmp_path / "images/kind1/00.png")
    classify(main, "eval", **flags, eval=True, resume=file)
    assert "may be among them" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="held out"):
        classify(main, "run", **flags, resume="auto")


def test_a_fifth_that_a_file_was_trained_on_is_not_evaluated_unnoticed(classify, labelled, tmp_path, capsys):
    """Training with val/, and an evaluation of the same images without it."""
    file = classify(main_finetune, "run", data_path=labelled, epochs=1, warmup_epochs=0) / "checkpoint-0.pth"
    shutil.copytree(labelled / "train", tmp_path / "images")
    assert "may be among them" not in capsys.readouterr().out
    classify(main_finetune, "eval", data_path=tmp_path / "images", eval=True, resume=file)
    assert "may be among them" in capsys.readouterr().out


@pytest.mark.parametrize(("main", "own"), [(main_finetune, {"train_per_class": 3}),
                                           (main_linprobe, {"blr": "0.1 1", "held_out": 0.25})])  # fmt: skip
def test_a_resumed_run_trains_on_the_same_images(main, own, classify, labelled, tmp_path):
    """A changed folder changes which of its images are chosen."""
    flags = {"data_path": shutil.copytree(labelled, tmp_path / "images"), **own}
    classify(main, "run", **flags, epochs=1, warmup_epochs=0)
    for kind in (tmp_path / "images/train").iterdir():
        first, *_ = sorted(kind.iterdir())
        first.rename(first.with_name("zz.png"))
    with pytest.raises(CheckpointError, match="train images"):
        classify(main, "run", **flags, resume="auto")


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
@pytest.mark.parametrize("seed", [3, 16])  # 16 holds out the damaged image, one of 5
def test_images_that_cannot_be_read_do_not_change_the_held_out_images(
    main, seed, classify, labelled, tmp_path, capsys
):  # fmt: skip
    shutil.copytree(labelled / "train", tmp_path / "images")
    (tmp_path / "images/kind1/01.png").write_bytes(b"")
    flags = {"val_fraction": 0.1, "data_path": tmp_path / "images"}
    out = classify(main, "run", **flags, seed=seed, epochs=1, warmup_epochs=0, on_bad_image="skip")
    assert ("it is excluded" in capsys.readouterr().out) == (seed == 16)
    skip = {"on_bad_image": "skip"} if seed == 16 else {}
    classify(main, "eval", **flags, **skip, eval=True, resume=out / "checkpoint-0.pth")
    loss = float(capsys.readouterr().out.split()[-1])
    assert loss == pytest.approx(lines(out)[-1]["test_loss"], abs=1e-3)


def deep_images(root, pixels_of):
    """Writes eight arrays for training and eight for validation, of two classes."""
    for number in range(16):
        folder = root / ("train", "val")[number % 2] / f"kind{number // 2 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", pixels_of(np.random.default_rng(number)))
    return {"data_path": root, "in_chans": 1, "k": 1}


@pytest.mark.parametrize(("highest", "flags"), [(65535, {}), (4000, {"value_range": "0 4000"})])
def test_statistics_in_the_units_of_the_files_are_refused(highest, flags, classify, tmp_path):
    """The suggested values are those of the scaled pixels."""
    settings = flags | deep_images(tmp_path / "deep", lambda draw: draw.normal(1500, 200, (16, 16)).astype(np.uint16))
    with pytest.raises(ValueError, match=r"^mean=\[1500\]: .* from 0 to 1 .*; 8 images suggest mean=") as raised:
        classify(main_knn, **settings, mean=1500, std=200)
    mean, std = re.findall(r"mean=\[(\S+)\] std=\[(\S+)\]$", str(raised.value))[0]
    assert [float(mean) * highest, float(std) * highest] == [pytest.approx(1500, rel=0.05), pytest.approx(200, rel=0.1)]
    assert classify(main_knn, **settings, mean=mean, std=std)


@pytest.mark.parametrize(("low", "high", "mean"), [(-4, 1, -1.5), (0, 3, 1.5), (0, 0, 3)])
def test_floats_have_their_own_units(low, high, mean, classify, tmp_path):
    """The last images are empty, as some maps of rain are."""
    settings = deep_images(tmp_path / "own", lambda draw: draw.uniform(low, high, (16, 16)).astype(np.float32))
    assert classify(main_knn, **settings, mean=mean, std=1)


def test_statistics_of_deep_images_are_suggested_once_unless_both_are_given(classify, tmp_path, capsys):
    for number in range(16):
        folder = tmp_path / "deep" / ("train", "val")[number % 2] / f"kind{number // 2 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 4000 * number, np.uint16)).save(folder / f"{number}.png")
    for given in ({}, {"mean": 0.5}, {"std": 0.5}, {"mean": 0.5, "std": 0.5}):
        classify(main_knn, data_path=tmp_path / "deep", in_chans=1, k=1, **given)
        assert capsys.readouterr().out.count("more than 8 bits") == (len(given) < 2)


def test_reading_images_for_their_statistics_draws_no_random_numbers():
    """Only the first process reads them. The weights that are drawn next are the same in all."""

    class Noisy(NumberedItems):
        title = "noise"
        classes = ()
        labels = np.full(8, -1)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return Item(torch.rand(3, 16, 16))

    before = torch.get_rng_state()
    RunData(ImageSpec(16), DataSpec(num_workers=0), torch.device("cpu")).check_statistics(Noisy())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("classes", "has_top"), [(4, False), (5, True), (6, True)])
def test_there_is_a_top_5_accuracy_from_five_classes_on(classes, has_top):
    columns = Classification().columns(torch.randn(9, classes), torch.randint(0, classes, (9,)))
    scores = Classification().evaluation([column.numpy() for column in columns], classes).scores()
    assert ("acc5" in scores) is has_top
