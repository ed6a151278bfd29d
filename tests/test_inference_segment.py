"""Use of a segmentation model: the classes of photographs of any size, pictures and masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mains import parse
from PIL import Image
from segments import make_scenes

import mae.build
import main_segment
from mae.evaluate.segmentation import Scores, confusion_matrix
from mae.inference import export, get_model, segment
from mae.inference.model import Segmenter
from mae.settings import specs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data and the run directory of a segmentation model."""
    root = tmp_path_factory.mktemp("trained")
    make_scenes(root / "scenes", train=24, val=6, size=(40, 52))
    (root / "palette.txt").write_text("10 20 30 ground\n200 0 0 tree\n0 0 200 water\n")
    flags = {
        "data_path": root / "scenes", "palette": root / "palette.txt", "model": "vit_mini_patch4", "input_size": 24,
        "short_side": 30, "batch_size": 4, "epochs": 6, "lr": 0.01, "num_workers": 0, "device": "cpu", "eval_every": 6,
        "mean": "0.3 0.2 0.2", "output_dir": root / "run",
    }  # fmt: skip
    main_segment.main(parse(main_segment, **flags))
    paths = sorted((root / "scenes/images/validation").glob("*.jpg"))
    return SimpleNamespace(root=root, file=root / "run" / "checkpoint-best.pth", paths=paths)


def run(*argv):
    return segment.main(segment.get_args_parser().parse_args([*map(str, argv), "--device", "cpu"]))


def test_a_file_segments_as_in_its_evaluation(trained):
    model = get_model(trained.file)
    assert isinstance(model, Segmenter)
    assert (model.classes, model.short_side, model.window) == (["ground", "tree", "water"], 30, (24, 24))
    assert model.colors.tolist() == [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
    matrix, scenes = torch.zeros(3, 3, dtype=torch.int64), trained.root / "scenes"
    for path, classes in zip(trained.paths, model.segment(trained.paths), strict=True):
        assert (classes.shape, classes.dtype) == ((40, 52), np.uint8)
        truth = np.asarray(Image.open(scenes / "annotations/validation" / f"{path.stem}.png"))
        matrix += confusion_matrix(torch.tensor(truth), torch.from_numpy(classes).long(), 3)
    flags = {"eval": True, "resume": trained.file, "data_path": scenes, "num_workers": 0, "device": "cpu"}
    scores = main_segment.main(parse(main_segment, **flags))
    assert np.array_equal(scores.matrix, matrix.numpy())
    assert Scores(matrix.numpy()).miou > 40


def test_images_of_any_kind_and_size(trained):
    model, picture = get_model(trained.file), Image.open(trained.paths[0])
    classes = model.segment(picture)
    assert np.array_equal(model.segment(np.asarray(picture)), classes)
    tall, small = model.segment([picture.resize((20, 90)), picture.resize((9, 7))])
    assert (tall.shape, small.shape) == ((90, 20), (7, 9))
    scaled = model.normalize(torch.from_numpy(np.asarray(picture.resize((39, 30), 2))).permute(2, 0, 1)[None])
    assert model.segment(scaled[0]).shape == (30, 39)
    assert model.extract_feat(picture).shape == (1, 128)
    with pytest.raises(ValueError, match="vit_mini_patch4"):
        model.predict(picture)


def test_amp_changes_few_classes_of_pixels(trained, tmp_path):
    """The default on a CPU is fp32. A random head has pixels of all classes."""
    model, file = get_model(trained.file), tmp_path / "random.safetensors"
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    export.export(model, "safetensors", file)
    flags = ([], ["--amp", "off"], ["--amp", "bf16"])
    found, expected, rounded = (np.array(run(*trained.paths, "--model", file, *amp)) for amp in flags)
    assert np.array_equal(found, expected)
    assert 0 < np.mean(rounded != expected) < 0.05


def test_the_command_prints_shares_and_writes_pictures(trained, tmp_path, capsys):
    paths, out = trained.paths[:2], tmp_path / "overlay.png"
    results = run(*paths, "--model", trained.file, "--out", out, "--masks", tmp_path / "masks")
    assert f"{paths[0]}\n  {(results[0] == 0).mean():7.2%}  ground\n" in capsys.readouterr().out
    assert Image.open(out).width == 1000
    for path, classes in zip(paths, results, strict=True):
        mask = Image.open(tmp_path / "masks" / f"{path.stem}.png")
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), classes)
        assert np.array_equal(np.asarray(mask.convert("RGB")), get_model(trained.file).colors[classes])


def test_the_picture_has_images_of_more_bits_and_channels(trained, tmp_path):
    model = Segmenter({**get_model(trained.file).settings, "in_chans": 5, "mean": None, "std": None})
    export.export(model, "safetensors", tmp_path / "five.safetensors")
    np.save(tmp_path / "five.npy", np.random.default_rng(0).random((40, 52, 5), dtype=np.float32))
    Image.fromarray(np.full((40, 52), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for image, file in (("deep.png", trained.file), ("five.npy", tmp_path / "five.safetensors")):
        run(tmp_path / image, "--model", file, "--out", tmp_path / f"{image}.png")
        assert Image.open(tmp_path / f"{image}.png").width == 1000


def test_the_first_class_without_a_palette_does_not_hide_the_photograph(tmp_path):
    """The color of the class 0 is black: the middle panel has the gray levels of the photograph."""
    settings = {"model": "vit_mini_patch4", "input_size": 32, "patch_size": 8, "in_chans": 3, "nb_classes": 2,
                "head": "linear", "short_side": 0, "classes": ["0", "1"]}  # fmt: skip
    own = mae.build.segmenter(*specs(settings))
    torch.nn.init.zeros_(own.head.classifier.weight)
    own.head.classifier.bias.data = torch.tensor([1.0, 0.0])  # every pixel has the class 0
    torch.save({"model": own.state_dict(), "args": settings}, tmp_path / "zero.pth")
    Image.new("RGB", (32, 32), (200, 200, 200)).save(tmp_path / "gray.png")
    out = tmp_path / "overlay.png"
    (classes,) = run(tmp_path / "gray.png", "--model", tmp_path / "zero.pth", "--out", out)
    assert not classes.any()
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert (picture[picture.shape[0] // 2, 450:750] == 200).mean() > 0.9
    image, colors = np.full((1, 2, 3), 100, dtype=np.uint8), np.array([[0, 0, 0], [200, 100, 0]], dtype=np.uint8)
    assert segment.overlay(image, np.array([[0, 1]]), colors, 0.25).tolist() == [[[100, 100, 100], [125, 100, 75]]]


def test_the_legend_has_the_most_frequent_classes():
    colors = np.random.default_rng(0).integers(0, 256, (150, 3), dtype=np.uint8)
    names = [f"a class with the number {label}" for label in range(149)] + ["7"]
    model = SimpleNamespace(num_classes=150, classes=names, colors=colors)
    classes = np.repeat(np.arange(20, dtype=np.uint8), np.arange(20) + 1)[None]  # 210 pixels
    texts, swatches = segment.legend(classes, model)
    assert texts[0] == f"a class with the num… {20 / 210:.1%}"
    assert texts[-1] == f"4 other classes {10 / 210:.1%}"  # 1 + 2 + 3 + 4 pixels
    assert len(texts) == len(swatches) == 17
    assert np.array_equal(swatches[:-1], colors[19:3:-1] / 255)
    assert segment.legend(np.full((2, 2), 149, dtype=np.uint8), model)[0] == ["class 7 100.0%"]


def test_errors_name_the_flag(trained, tmp_path):
    images = [tmp_path / folder / "same.png" for folder in ("a", "b")]
    for image in images:
        image.parent.mkdir()
        Image.new("RGB", (30, 30)).save(image)
    model = get_model("vit_mini_patch4", nb_classes=3)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "classifier.pth")
    for argv, problem in (
        ([*images, "--model", trained.file, "--masks", tmp_path / "m"], "masks=.*: 2 images have the mask same.png"),
        ([images[0], "--model", trained.file, "--masks", images[0]], "masks=.*same.png is within .*same.png"),
        ([images[0], "--model", trained.file, "--masks", images[0].parent], "masks=.*same.png is within .*same.png"),
        ([images[0], "--model", trained.file, "--out", images[0]], "out=.*same.png is within .*same.png"),
        ([images[0], "--model", tmp_path / "classifier.pth"], "model=.*classifier.pth has no segmentation head"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=problem):
            run(*argv)
    for tensor in (torch.zeros(20, 20), torch.zeros(1, 20, 20)):
        with pytest.raises(ValueError, match="20, 20"):
            get_model(trained.file).segment(tensor)


def test_an_export_keeps_the_head_and_the_settings(trained, tmp_path):
    model, path = get_model(trained.file), trained.paths[0]
    export.export(model, "safetensors", tmp_path / "model.safetensors")
    other = get_model(tmp_path / "model.safetensors")
    assert np.array_equal(other.segment(path), model.segment(path))
    assert (other.classes, other.short_side) == (model.classes, model.short_side)
    assert other.colors.tolist() == model.colors.tolist()
    with pytest.raises(ValueError, match="to=timm: "):
        export.export(model, "timm", tmp_path / "timm")
    torch.testing.assert_close(export.encoder_of(model).extract_feat(path), model.extract_feat(path))
