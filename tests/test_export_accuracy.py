"""An exported classifier keeps its accuracy: read back by our script, and in the library that the export is for."""

import json

import forks
import numpy as np
import onnxruntime
import pytest
import timm
import timm.data
import torch
import transformers
from mains import parse
from PIL import Image

import main_finetune
from mae.inference import export, get_model

CLASSES = ["ant", "bee", "cat", "dog"]
FORMATS = {"reference": "r.pth", "safetensors": "s.safetensors", "timm": "timm", "transformers": "hf"}
# Where 3, 7, ... pixels remain beside the crop, transformers' crop begins one pixel before torchvision's.
SHAPES = [(32, 48), (30, 40), (40, 30), (36, 24), (24, 25), (48, 48)]
# Evaluates files in a fresh process, without a flag that describes the model.
EVALUATE = """
import json, sys
import main_finetune
from mae.cli import entry_point
for file in sys.argv[2:]:
    flags = ["--eval", "--resume", file, "--data_path", sys.argv[1], "--num_workers", "0", "--device", "cpu"]
    scores = main_finetune.main(entry_point.parse(main_finetune.get_args_parser(), flags))
    print("scores", json.dumps(scores.stats()))
"""


def make_images(folder, count, seed):
    """A faint color for each class, below noise, on pictures of several shapes. The edges have another's color."""
    generator = np.random.default_rng(seed)
    colors = np.array([[12, 0, 0], [0, 12, 0], [0, 0, 12], [-8, -8, -8]])
    for number in range(count):
        label = number % 4
        height, width = SHAPES[generator.integers(len(SHAPES))]
        pixels = generator.normal(110, 30, size=(height, width, 3)) + colors[(label + 1) % 4]
        pixels[3:-3, 3:-3] += colors[label] - colors[(label + 1) % 4]
        path = folder / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    make_images(folder / "train", 160, seed=0)
    make_images(folder / "val", 200, seed=1)
    return folder


@pytest.fixture(scope="module", params=["token", "pooled"])
def trained(request, data, tmp_path_factory):
    """A run with its own statistics and crop, its exports, and the evaluation of its checkpoint and of each export."""
    out = tmp_path_factory.mktemp(request.param)
    flags = {"data_path": data, "output_dir": out, "model": "vit_mini_patch4", "input_size": 24, "crop_pct": 1,
             "mean": "0.4 0.5 0.3", "std": "0.1 0.2 0.15", "epochs": 4, "warmup_epochs": 1, "batch_size": 16,
             "lr": 1e-3, "aa": "none", "reprob": 0, "drop_path": 0, "layer_decay": 1, "num_workers": 0,
             "device": "cpu"}  # fmt: skip
    main_finetune.main(parse(main_finetune, **flags, **({"cls_token": True} if request.param == "token" else {})))
    model = get_model(out / "checkpoint-3.pth")
    formats = [to for to in FORMATS if to != "transformers" or request.param == "token"]
    for to in formats:
        export.export(model, to, out / FORMATS[to])
    files = [out / "checkpoint-3.pth", *(out / FORMATS[to] for to in formats)]
    output = forks.run_code(EVALUATE, out, data, *files)
    scores = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("scores ")]
    return out, model, dict(zip(["checkpoint", *formats], scores, strict=True))


@pytest.mark.slow
def test_every_export_has_the_accuracy_of_its_checkpoint(trained):
    out, _, scores = trained
    expected = scores.pop("checkpoint")
    assert all(get_model(out / FORMATS[to]).classes == CLASSES for to in scores)
    assert expected["test_acc1"] > 40  # it has learned something that a wrong normalization would cost
    for found in scores.values():
        assert found["test_acc1"] == expected["test_acc1"]
        assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


def test_every_file_can_be_read_by_others(trained):
    """As far as the umask allows; safetensors writes files for their owner alone."""
    out, *_ = trained
    (out / "probe").touch()
    files = [out / name for name in FORMATS.values() if (out / name).is_file()]
    assert {file.stat().st_mode for file in files} == {(out / "probe").stat().st_mode}


def photographs(data):
    files = sorted((data / "val").rglob("*.png"))
    return files, [Image.open(file).convert("RGB") for file in files]


def assert_same_predictions(theirs, model, files):
    ours = np.stack([prediction["pred_scores"] for prediction in model.predict(list(map(str, files)))])
    assert len(ours) == 200
    assert np.array_equal(theirs.argmax(1), ours.argmax(1))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_timm_builds_the_model_and_its_transform_from_the_folder(trained, data):
    out, model, _ = trained
    theirs = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
    files, images = photographs(data)
    with torch.no_grad():
        scores = theirs(torch.stack([transform(image) for image in images])).softmax(1)
    assert_same_predictions(scores.numpy(), model, files)
    assert theirs.pretrained_cfg["label_names"] == CLASSES


def test_the_pipeline_of_transformers_predicts_the_same(trained, data):
    out, model, scores = trained
    if "transformers" not in scores:
        pytest.skip("its classifier has no pooled tokens")
    processor = transformers.AutoImageProcessor.from_pretrained(out / "hf", backend="pil")
    files, images = photographs(data)
    pipeline = transformers.pipeline("image-classification", model=str(out / "hf"), image_processor=processor, top_k=4)
    found = [{entry["label"]: entry["score"] for entry in entries} for entries in pipeline(images, batch_size=50)]
    assert_same_predictions(np.array([[entry[name] for name in CLASSES] for entry in found]), model, files)
    gray = images[0].convert("L")
    ours = model.predict(gray)
    assert pipeline(gray)[0] == {"label": ours["pred_class"], "score": pytest.approx(ours["pred_score"], abs=1e-5)}


@pytest.mark.slow
def test_onnxruntime_with_pixels_and_the_metadata_alone(trained, data):
    out, model, _ = trained
    export.export(model, "onnx", out / "model.onnx")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    meta = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (meta["classes"], meta["input_size"], meta["crop_pct"]) == (CLASSES, 24, 1.0)
    files, images = photographs(data)
    pixels = []
    for image in images:
        scale = meta["input_size"] / min(image.size)
        image = image.resize((max(24, int(image.width * scale)), max(24, int(image.height * scale))), Image.BICUBIC)
        left, top = round((image.width - 24) / 2), round((image.height - 24) / 2)
        pixels.append(np.asarray(image.crop((left, top, left + 24, top + 24))) / np.float32(255))
    batch = np.stack(pixels).transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {"images": batch})
    assert_same_predictions(torch.from_numpy(logits).softmax(1).numpy(), model, files)
