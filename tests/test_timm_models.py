"""Models of timm as frozen encoders: their features are those that timm computes from the same files."""

import json
import re
import shutil
from copy import deepcopy

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from mains import call, fails, lines
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score
from test_knn import predictions
from timm.data import create_transform, resolve_model_data_config

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, features, get_model, neighbors
from mae.weights import loading

# A class token; a register, and a pooling by attention; both, and rotary positions; maps; maps (B, h, w, D).
LARGE = ("vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224")
MODELS = ("test_vit", "test_vit3", "test_convnext", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the model of a name with random weights, their file as the commands take it, and the file."""
    folder, made = tmp_path_factory.mktemp("timm"), {}

    def save(name, **options):
        if (name, *options) not in made:
            torch.manual_seed(len(made))
            model, path = timm.create_model(name, **options).eval(), folder / f"{len(made)}.pth"
            torch.save(model.state_dict(), path)
            made[(name, *options)] = model, f"{path}#timm:{name}", path
        return made[(name, *options)]

    return save


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def mixed(labelled, tmp_path_factory):
    """`labelled` with half of the labels at random, for accuracies below 100 %."""
    root, generator = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(sorted((labelled / split).glob("*/*.png"))):
            kind = f"kind{generator.integers(6)}" if number % 2 else name.parent.name
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(name, root / split / kind / f"{number}.png")
    return root


def files(data, split):
    names = sorted((data / split).glob("*/*.png"))
    return names, torch.tensor([int(name.parent.name[-1]) for name in names])


@torch.no_grad()
def pooled(model, names):
    """The features that timm computes with its own transform."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.open(name).convert("RGB")) for name in names])
    return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"])
def test_the_other_activation_of_clip_has_a_warning(saved, name, caplog):
    """timm builds the weights of OpenAI's CLIP with GELU, unless the name of the model says otherwise."""
    get_model(saved(f"{name}.openai")[1])
    assert ("QuickGELU" in caplog.text) == ("quickgelu" not in name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["pit_ti_224", "volo_d1_224", "coat_lite_tiny"])
def test_a_class_token_that_timm_does_not_count_is_no_patch(saved, name):
    """timm returns the class token of pit only, and those of the others before the patches."""
    original, text, _ = saved(name)
    model, images = get_model(text), torch.rand(1, 3, 224, 224)
    with pytest.raises(ValueError, match="no tokens of one grid"):
        model.get_intermediate_layers(images)
    features = original.forward_head(original.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), features)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_timm(saved, name):
    ours, theirs = get_model(saved(name)[1]), saved(name)[0]
    images = torch.randn(2, *theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        found = theirs.forward_features(images)
        expected = theirs.forward_head(found, pre_logits=True)
    if found.ndim == 4:
        found = found.flatten(1, 2) if name.startswith("swin") else found.flatten(2).mT
    assert torch.equal(ours.extract_feat(images), expected)
    tokens = ours.extract_feat(images, "tokens")
    assert torch.equal(tokens, found)
    count = {"test_vit": 1, "test_vit3": 1, "vit_small_patch16_dinov3": 5}.get(name, 0)
    assert ours.num_patches == tokens.shape[1] - count
    torch.testing.assert_close(ours.extract_feat(images, "avg"), tokens[:, count:].mean(dim=1))
    if name in ("test_vit", "vit_small_patch16_dinov3"):
        assert torch.equal(ours.extract_feat(images, "cls"), tokens[:, 0])
    else:
        with pytest.raises(ValueError, match=f"pool=cls: timm:{name} has no class token; give pool=avg"):
            ours.extract_feat(images, "cls")


@pytest.mark.parametrize("flag", ["cls_token", "global_pool"])
def test_a_pooling_that_a_model_of_timm_does_not_have_is_an_error(saved, labelled, flag):
    with pytest.raises(ValueError, match="`global_pool`"):
        call(main_knn, data_path=labelled, finetune=saved("test_vit")[1], device="cpu", **{flag: True})


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_of_weights(saved, tmp_path, suffix):
    """As on the hub, and as of timm's train.py."""
    model, _, path = saved("test_vit")
    images, file = torch.randn(2, 3, 160, 160), tmp_path / f"model.{suffix}"
    if suffix == "pth":
        own = {f"module.{name}": value for name, value in model.state_dict().items()}
        torch.save({"state_dict": own, "epoch": 3, "arch": "test_vit"}, file)
    else:
        save_file(torch.load(path), file)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    ours = get_model(f"{file}#timm:test_vit")
    assert torch.equal(ours.extract_feat(images), expected)
    export.export(export.encoder_of(ours), "safetensors", tmp_path / "encoder.safetensors")
    assert torch.equal(get_model(tmp_path / "encoder.safetensors").extract_feat(images), expected)


@pytest.mark.slow
def test_a_model_with_another_width_of_pooled_features(saved, labelled, tmp_path):
    """MobileNetV3 pools before its last layer: 288 channels of a map, 1,024 features."""
    model, name, _ = saved("mobilenetv3_small_050")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(get_model(name).extract_feat(images), expected) and expected.shape == (2, 1024)
    for probe, width in (("linear", 1024), ("attentive", 288)):
        call(main_linprobe, data_path=labelled, finetune=name, probe=probe, epochs=1, warmup_epochs=0, batch_size=16,
             num_workers=0, device="cpu", cache_features=True, output_dir=tmp_path / probe)  # fmt: skip
        file = loading.read(tmp_path / probe / "checkpoint-0.pth")
        assert file.tensors["head.1.weight"].shape == (6, width)


@pytest.mark.slow
def test_the_preprocessing_is_that_of_timm(saved, tmp_path):
    """Scaling, crop, mean and std: bicubic, bilinear, and a scaling of the whole image to a square."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    kinds = {"test_vit": ("bicubic", "center"), "test_resnet": ("bilinear", "center"),
             "vit_small_patch16_lingbot": ("bilinear", "squash")}  # fmt: skip
    for name, (scaling, crop) in kinds.items():
        model, text, _ = saved(name)
        config = resolve_model_data_config(model)
        assert (config["interpolation"], config["crop_mode"]) == (scaling, crop)
        with Image.open(tmp_path / "a.png") as picture:
            expected = create_transform(**config, is_training=False)(picture)
        torch.testing.assert_close(get_model(text).prepare(tmp_path / "a.png")[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_are_adapted_to_other_channels_as_by_timm(saved, channels, caplog):
    """With the mean of the means of the colors."""
    _, name, path = saved("test_vit")
    overlay = {"state_dict": torch.load(path)}
    theirs = timm.create_model("test_vit", pretrained=True, in_chans=channels, pretrained_cfg_overlay=overlay).eval()
    ours = get_model(name, in_chans=channels)
    assert ours.settings["mean"] == ours.settings["std"] == [0.5] * channels
    assert f"timm:test_vit has weights for 3 channels, which are adapted to {channels}" in caplog.text
    images = torch.randn(2, channels, 160, 160)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.extract_feat(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext"])
def test_the_classifier_of_a_file_is_not_read(saved, name, tmp_path):
    """A file may have none, or one of other classes. Other tensors must be those of the model."""
    model, file, _ = saved(name)
    model, images = deepcopy(model), torch.randn(2, 3, 160, 160)
    expected = get_model(file).extract_feat(images)
    for number, classes in enumerate((0, 7)):
        model.reset_classifier(classes)
        torch.save(model.state_dict(), tmp_path / f"{number}.pth")
        assert torch.equal(get_model(f"{tmp_path / str(number)}.pth#timm:{name}").extract_feat(images), expected)
    state = model.state_dict()
    del state[next(key for key in state if key.endswith("norm.weight"))]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=f"those of timm's {name}"):
        get_model(f"{tmp_path / 'damaged.pth'}#timm:{name}")


def test_neighbors_are_those_of_the_features_of_timm(saved, mixed):
    model, name, _ = saved("test_vit")
    (train, truth), (val, labels) = files(mixed, "train"), files(mixed, "val")
    found = call(main_knn, data_path=mixed, finetune=name, k=5, num_workers=0, device="cpu")
    expected = predictions((pooled(model, train), truth), (pooled(model, val), labels), 5, 0.07)
    assert found == {(5, 0.07): pytest.approx(100 * accuracy_score(labels, expected))}


def test_gray_images_of_one_channel(saved, mixed):
    """Their mean and std are the means of those of the colors, which are not ImageNet's."""
    _, name, path = saved("test_vit")
    (train, truth), (val, labels) = files(mixed, "train"), files(mixed, "val")
    overlay = {"state_dict": torch.load(path)}
    model = timm.create_model("test_vit", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    transform = create_transform((1, 160, 160), mean=(0.5,), std=(0.5,), crop_pct=0.95, interpolation="bicubic")

    @torch.no_grad()
    def rows(names):
        images = torch.stack([transform(Image.open(one).convert("L")) for one in names])
        return model.forward_head(model.forward_features(images), pre_logits=True)

    found = call(main_knn, data_path=mixed, finetune=name, k=5, in_chans=1, num_workers=0, device="cpu")
    expected = predictions((rows(train), truth), (rows(val), labels), 5, 0.07)
    assert found == {(5, 0.07): pytest.approx(100 * accuracy_score(labels, expected))}


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_probes_train_on_the_features_of_timm(saved, mixed, tmp_path, probe, capsys):
    """A checkpoint predicts by timm's features; it is evaluated and exported, and a run resumes from it."""
    model, name, _ = saved("test_vit")
    flags = {"data_path": mixed, "probe": probe, "num_workers": 0, "device": "cpu", "warmup_epochs": 0, "blr": 5,
             "batch_size": 16, "cache_features": True, "output_dir": tmp_path / "run"}  # fmt: skip
    call(main_linprobe, finetune=name, epochs=1, **flags)
    call(main_linprobe, finetune=name, epochs=2, resume="auto", **flags)
    file, (val, labels) = tmp_path / "run/checkpoint-1.pth", files(mixed, "val")
    head = get_model(file).head
    with torch.no_grad():
        rows = pooled(model, val)
        if probe == "attentive":
            images = torch.stack([get_model(file).prepare(str(one))[0] for one in val])
            rows = model.forward_features(images)[:, 1:]
        logits = head.eval()(rows)
    found = get_model(file).predict([str(one) for one in val])
    np.testing.assert_allclose([one["pred_scores"] for one in found], logits.softmax(1).numpy(), rtol=1e-3, atol=1e-4)
    right = 100 * accuracy_score(labels, logits.argmax(1))
    assert lines(tmp_path / "run")[-1]["test_acc1"] == pytest.approx(right)
    capsys.readouterr()
    call(main_linprobe, eval=True, resume=file, data_path=mixed, num_workers=0, device="cpu", probe=probe)
    assert f"Acc@1 {right:.3f}" in capsys.readouterr().out
    export.export(get_model(file), "safetensors", tmp_path / "probe.safetensors")
    again = get_model(tmp_path / "probe.safetensors").predict(str(val[0]))
    assert again["pred_class"] == found[0]["pred_class"]
    flags = ["--encoders", f"again={file}", "--protocols", "knn", "--labels", "12", "--draws", 1]
    assert "| again (k-NN) |" in compared(mixed, tmp_path / "compare", *flags)
    with pytest.raises(ValueError, match="no model of timm"):
        export.export(get_model(file), "onnx", tmp_path / "probe.onnx")


def test_features_and_neighbors_take_a_model_of_timm(saved, labelled, tmp_path):
    model, name, _ = saved("test_vit")
    names, _ = files(labelled, "val")
    call(features, labelled, model=name, out=tmp_path / "f.npz", split="val", num_workers=0, device="cpu")
    expected = pooled(model, names)
    torch.testing.assert_close(torch.from_numpy(features.read(tmp_path / "f.npz")), expected, rtol=1e-4, atol=1e-5)
    found = call(neighbors, labelled, model=name, out=tmp_path / "n.png", split="val", num_workers=0, device="cpu")
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert Image.open(tmp_path / "n.png").width > 7 * 160


def compared(data, out, *words):
    return call(main_compare, "--data_path", data, "--num_workers", 0, "--device", "cpu", "--output_dir", out, *words)


@pytest.mark.slow
def test_a_comparison_of_models_of_timm(saved, mixed, tmp_path, capsys):
    """Flags about the architecture and the preprocessing are for the other encoders, and so is fine-tuning."""
    model, _, path = saved("test_vit")
    convnext = saved("test_convnext")[2]
    words = ["--encoders", "t=timm:test_vit", "timm:test_convnext", "scratch", "--timm_weights", f"test_vit={path}",
             f"test_convnext={convnext}", "--protocols", "knn", "finetune", "--labels", "all", "--budget", 1, "--model",
             "vit_mini_patch4", "--input_size", 16, "--patch_size", 8, "--mean", ".1", ".2", ".3", "--amp", "off",
             "--recipes", f"finetune={tmp_path / 'tuned.yaml'}"]  # fmt: skip
    (tmp_path / "tuned.yaml").write_text("model: vit_tiny_patch16\nbatch_size: 16\n")
    text = compared(mixed, tmp_path / "out", *words)
    (train, truth), (val, labels) = files(mixed, "train"), files(mixed, "val")
    k = int(re.search(r"\| t \(k-NN\) \|.*\(k (\d+), pooling of timm\)", text)[1])
    expected = predictions((pooled(model, train), truth), (pooled(model, val), labels), min(k, 48), 0.07)
    assert f"| t (k-NN) | {100 * accuracy_score(labels, expected):.1f}" in text.replace("**", "")
    rows = re.findall(r"^\| (\w+ \([\w-]+\))", text, re.MULTILINE)
    frozen = ["t (fine-tuned)", "test_convnext (fine-tuned)"]
    assert rows == ["t (k-NN)", "test_convnext (k-NN)", "scratch (k-NN)", "scratch (fine-tuned)", *frozen]
    printed = capsys.readouterr().out
    for row in frozen:
        assert f"{row} is left out: models of timm are frozen encoders" in text and f"{row} is left out" in printed
    costs = (tmp_path / "out/costs.md").read_text()
    found = dict(re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d,.]+ \|$", costs, re.MULTILINE))
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    assert found.keys() == {"t", "test_convnext", "scratch"} and found["t"] == f"{parameters:,}"
    assert compared(mixed, tmp_path / "out", *words) == text
    assert (tmp_path / "out/costs.md").read_text() == costs
    other = timm.create_model("test_vit")
    torch.save(other.state_dict(), path.with_name("other.pth"))
    again = [str(word).replace(f"test_vit={path}", f"test_vit={path.with_name('other.pth')}") for word in words]
    before = json.loads((tmp_path / "out/runs/t/knn/48/0/run.json").read_text())
    compared(mixed, tmp_path / "out", *again)
    assert json.loads((tmp_path / "out/runs/t/knn/48/0/run.json").read_text()) != before


def test_a_comparison_of_gray_images(saved, mixed, tmp_path, capsys):
    """With --in_chans, --mean and --std are for models of timm, too; a warning says that their weights are adapted."""
    name = saved("test_vit")[1]
    flags = ["--in_chans", 1, "--mean", ".2", "--std", ".6", "--protocols", "knn", "--labels", "all"]
    text = compared(mixed, tmp_path, "--encoders", f"t={name}", *flags)
    assert "adapted to 1" in capsys.readouterr().out
    k = int(re.search(r"\(k (\d+), pooling of timm\)", text)[1])
    (found,) = call(main_knn, *flags[:6], data_path=mixed, finetune=name, k=k, num_workers=0, device="cpu").values()
    assert f"| t (k-NN) | **{found:.1f}** (k {k}, pooling of timm) |" in text


@pytest.mark.parametrize(("words", "message"), [
    ("--finetune timm:test_vit", r"timm:test_vit: its weights can't be downloaded: give a file, FILE#timm:test_vit"),
    ("--finetune timm:test_vitt", r"timm:test_vitt: timm has no such model; did you mean test_vit"),
    ("--finetune timm:hf-hub:a/b", r"timm:hf-hub:a/b: timm has no such model"),
    ("--finetune {convnext}", r"its tensors are not those of timm's test_vit"),
    ("--finetune {missing}", r"missing.pth"),
    ("--finetune {file} --patch_size 8", r"patch_size. has no effect on timm:test_vit.*omit it"),
    ("--finetune {file} --global_pool", r"global_pool. has no effect on timm:test_vit"),
    ("--finetune {file} --input_size 224", r"input_size=224: timm:test_vit has 160 x 160 pixels; omit .input_size"),
])  # fmt: skip
def test_errors_are_one_line(saved, labelled, words, message, capsys, monkeypatch, tmp_path):
    names = {"file": saved("test_vit")[1], "missing": f"{tmp_path}/missing.pth#timm:test_vit",
             "convnext": f"{saved('test_convnext')[2]}#timm:test_vit"}  # fmt: skip
    flags = ["--data_path", labelled, "--num_workers", 0, "--device", "cpu", *words.format(**names).split()]
    assert re.search(message, fails(capsys, monkeypatch, main_knn, *flags))


@pytest.mark.parametrize(("words", "message"), [
    ("timm:test_vit", r"weights can't be downloaded.*timm_weights=.test_vit=FILE"),
    ("timm:test_vit --timm_weights test_vit", r"timm_weights=.*test_vit.*: give NAME=FILE"),
    ("timm:test_vit --timm_weights test_convnext={path}", r"timm_weights=.*test_convnext=.*: give NAME=FILE"),
    ("timm:test_vit --timm_weights test_vit={path} --protocols finetune", r"protocols=finetune: test_vit: .*frozen"),
])  # fmt: skip
def test_errors_of_a_comparison(saved, labelled, words, message, capsys, monkeypatch, tmp_path):
    words = words.format(path=saved("test_vit")[2]).split()
    flags = ["--data_path", labelled, "--device", "cpu", "--output_dir", tmp_path, "--encoders", *words]
    assert re.search(message, fails(capsys, monkeypatch, main_compare, *flags))


@pytest.mark.parametrize(("script", "words"), [
    (main_finetune, "--finetune {file}"), (main_pretrain, "--init_from {file} --model mae_vit_mini_patch4"),
    (main_knn, "--finetune {file} --model vit_mini_patch4"),
    (main_pretrain, "--init_from timm:test_vit"),  # it is not downloaded
])  # fmt: skip
def test_a_model_of_timm_is_not_trained(saved, labelled, script, words, capsys, monkeypatch, tmp_path):
    """Nor is it a model of this library, which --model names."""
    flags = ["--data_path", labelled, "--device", "cpu", "--num_workers", 0]
    flags += [] if script is main_knn else ["--output_dir", tmp_path]
    line = fails(capsys, monkeypatch, script, *flags, *words.format(file=saved("test_vit")[1]).split())
    assert re.search("timm:test_vit is a frozen encoder, .* without .model", line)
