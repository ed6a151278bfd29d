"""Low-rank updates: they start from the file, alone are trained, and are merged in exports."""

import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT
from mains import (
    assert_close,
    assert_equal,
    assert_same_run,
    call,
    in_processes,
    lines,
    parse,
    stop_and_resume,
    weights,
)
from test_dino import assert_same, images, of_transformers, random
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import mae.build
import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, get_model
from mae.lora import add_updates
from mae.user_code import plain_encoder
from models_dino import DINOv2
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder, VisionTransformer

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
OWN = {"lora": 4, "lora_alpha": 8}
FLAGS = tuple(word for name, value in OWN.items() for word in (f"--{name}", value))
ADAPTERS = ("lora_a", "lora_b")
SCRIPTS = (main_finetune, main_linprobe, main_pretrain)


@pytest.fixture(scope="module")
def plain(pretrain_once):
    """A checkpoint without updates."""
    return pretrain_once("plain", epochs=1) / "checkpoint-0.pth"


def with_updates(rank, alpha=None):
    model = VisionTransformer(**SMALL)
    add_updates(model, rank, alpha)
    return model


def changed(before, after):
    return {name for name in before if name in after and not torch.equal(before[name], after[name])}


def test_the_start_is_the_model_without_updates():
    lora = with_updates(4).eval()
    plain = VisionTransformer(**SMALL).eval()
    state = {name: value for name, value in lora.state_dict().items() if not name.endswith(ADAPTERS)}
    plain.load_state_dict(state)
    assert torch.equal(lora(images(16, 16)), plain(images(16, 16)))


def test_updates_are_low_rank_and_of_queries_and_values():
    lora = with_updates(4, 12)
    layer = lora.blocks[1].attn.qkv
    nn.init.normal_(layer.lora_b)
    q, k, v = (layer.merged() - layer.weight).chunk(3)
    for number, update in ((0, q), (1, v)):
        assert torch.linalg.matrix_rank(update) == 4
        torch.testing.assert_close(update, 3 * layer.lora_b[number] @ layer.lora_a[number])
    assert not k.any()
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(layer(x), x @ layer.merged().T + layer.bias)


@pytest.mark.parametrize("blocks", [None, 1])
def test_pre_training_changes_updates_decoder_and_last_blocks(blocks, plain, pretrain):
    own = {"unfreeze_blocks": blocks} if blocks else {}
    out = pretrain(init_from=plain, **OWN, **own)
    before, state = weights(plain.parent, "checkpoint-0.pth"), checkpoint.read(out / "checkpoint-1.pth")
    after = state["model"]
    encoder = {name for name in changed(before, after) if not name.startswith(("decoder_", "mask_token"))}
    last = {name for name in after if name.startswith("blocks.3.") and not name.endswith(ADAPTERS)}
    assert encoder == {"norm.weight", "norm.bias"} | (last if blocks else set())
    assert all(value.any() for name, value in after.items() if name.endswith("lora_b"))
    trained = {name for name in after if name.endswith(ADAPTERS) or name in encoder or name.startswith("decoder_")}
    trained = trained - {"decoder_pos_embed"} | {"mask_token"}
    assert len(state["optimizer"]["state"]) == len(trained)
    assert lines(out)[1]["train_loss"] < lines(out)[0]["train_loss"]


@pytest.mark.slow
def test_a_run_is_resumed_to_the_bit(plain, pretrain, classify, monkeypatch):
    own = {"init_from": plain, **OWN, "unfreeze_blocks": 1, "num_workers": 1}
    assert_same_run(pretrain("whole", **own), stop_and_resume(monkeypatch, pretrain, 3, **own))
    own = {"finetune": plain, **OWN, "drop_path": 0.1}

    def tune(name, **flags):
        return classify(main_finetune, name, **flags)

    assert_same_run(tune("tuned", **own), stop_and_resume(monkeypatch, tune, 3, name="tuned_parts", **own))


@pytest.mark.slow
@pytest.mark.parametrize("own", [(), ("--fsdp",)])
def test_two_processes_equal_one(own, plain, pictures, tmp_path):
    flags = (*FLAGS, "--init_from", plain, "--epochs", 2, "--unfreeze_blocks", 1)
    in_processes(1, pictures, tmp_path / "one", "--batch_size", 8, *flags)
    in_processes(2, pictures, tmp_path / "two", "--batch_size", 4, *flags, *own)
    if own:
        expected = [line["train_loss"] for line in lines(tmp_path / "one")]
        assert [line["train_loss"] for line in lines(tmp_path / "two")] == pytest.approx(expected, rel=1e-5)
        in_processes(2, pictures, tmp_path / "three", "--batch_size", 4, *FLAGS, "--unfreeze_blocks", 1, "--epochs", 2,
                     "--fsdp", "--resume", tmp_path / "two/checkpoint-1")  # fmt: skip
    else:
        assert_close(tmp_path / "one", tmp_path / "two")


def test_updates_of_another_rank_are_merged(plain, pretrain, classify):
    """All weights are trained with rank 0. The features at the start are those of the file, as those of an export."""
    file = pretrain(init_from=plain, **OWN, epochs=1) / "checkpoint-0.pth"
    assert checkpoint.read(file)["model"]["blocks.0.attn.qkv.lora_b"].any()
    expected = get_model(file).extract_feat(images(16, 16), "tokens")
    for name, flags in (("full", {"lora": 0}), ("other", {"lora": 2}), ("same", {"lora": 4})):
        out = classify(main_finetune, name, finetune=file, **flags, cls_token=True, lr=0, epochs=1)
        model = get_model(out / "checkpoint-0.pth")
        assert_same(model.extract_feat(images(16, 16), "tokens"), expected)
        assert any(key.endswith("lora_b") for key in model.state_dict()) is (name != "full")
        assert model.settings.get("lora_alpha") == {"full": None, "other": 2, "same": 8}[name]
        size = sum(value.numel() for value in weights(out, "checkpoint-0.pth").values())
        trained = size if name == "full" else 4 * 2 * 2 * flags["lora"] * 128 + 128 * 6 + 6 + 2 * 128
        assert lines(out)[0]["n_parameters"] == trained
    continued = pretrain("continued", init_from=file, lora=2, lr=0, epochs=1) / "checkpoint-0.pth"
    assert_same(get_model(continued).extract_feat(images(16, 16), "tokens"), expected)


def test_fine_tuning_trains_updates_head_and_norm(plain, classify):
    out = classify(main_finetune, finetune=plain, **OWN, epochs=1, blr=0.01, warmup_epochs=0)
    before, after = weights(plain.parent, "checkpoint-0.pth"), weights(out, "checkpoint-0.pth")
    assert {name for name in changed(before, after) if name.startswith(("blocks", "cls", "pos", "patch"))} == set()
    assert all(value.any() for name, value in after.items() if name.endswith("lora_b"))
    count = 4 * 2 * 2 * 4 * 128 + 128 * 6 + 6 + 2 * 128  # updates of 4 blocks, head, norm
    assert lines(out)[0]["n_parameters"] == count


def test_a_probe_and_neighbors_have_the_updates(plain, pretrain, classify):
    file = pretrain(init_from=plain, **OWN, epochs=1) / "checkpoint-0.pth"
    assert classify(main_knn, k=3, finetune=file)[3, 0.07] > 0
    out = classify(main_linprobe, "probe", finetune=file, epochs=1, blr=1)
    before, after = (weights(one, "checkpoint-0.pth") for one in (file.parent, out))
    assert {name for name in changed(before, after) if name.startswith("blocks")} == set()
    assert any(name.endswith("lora_b") for name in after)


@pytest.mark.parametrize(("own", "before"), [(OWN, 8), ({"lora": 4}, 4)])
def test_a_scale_that_differs_from_the_file_is_refused(own, before, plain, pretrain, classify):
    """Also that which the file left at its default: the start would not be the file's. Updates of rank 2 are new."""
    file = pretrain(init_from=plain, **own, epochs=1) / "checkpoint-0.pth"
    refused = pytest.raises(ValueError, match=f"lora_alpha=16: .*lora_alpha={before};")
    for start in (partial(classify, main_finetune, "tuned", finetune=file), partial(pretrain, "other", init_from=file)):
        with refused:
            start(lora_alpha=16, epochs=1)
    with refused:
        get_model(file, lora_alpha=16)
    classify(main_finetune, "same", finetune=file, lora_alpha=before, epochs=1)
    classify(main_finetune, "new", finetune=file, lora=2, lora_alpha=16, epochs=1)


class Teacher(MaskedAutoencoderViT):
    """The user's code updates a frozen module, such as an average of the encoder."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.teacher = nn.Linear(2, 2).requires_grad_(False)


def test_frozen_random_weights_have_a_warning(plain, pretrain, classify, capsys):
    """Of a run without a file, and of what a file does not have. A resumed run has its checkpoint."""

    def warnings(run, *args, **flags):
        capsys.readouterr()
        run(*args, **flags, epochs=1)
        return [line for line in capsys.readouterr().out.splitlines() if re.match(r"warning: .* frozen\b", line)]

    (line,) = warnings(classify, main_finetune, "random", **OWN)
    assert "`unfreeze_blocks`" in line
    (line,) = warnings(pretrain, "last", unfreeze_blocks=1)
    assert "`unfreeze_blocks`" in line
    assert warnings(pretrain, "teacher", of_main={"model_class": Teacher}) == []
    assert warnings(classify, main_finetune, "random", **OWN, resume="auto") == []
    assert warnings(classify, main_finetune, "tuned", finetune=plain, **OWN) == []
    (line,) = warnings(classify, main_finetune, "skipped", finetune=plain, **OWN, in_chans=1, adapt_input="skip")
    assert "patch_embed.proj.weight" in line


@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_run_with_other_updates_is_refused_by_their_name(rank, plain, pretrain):
    pretrain(init_from=plain, **OWN, epochs=1)
    with pytest.raises(CheckpointError, match=f"lora=4, and this run has lora={rank},"):
        pretrain(resume="auto", lora=rank)


def test_steps_that_an_export_would_lose_are_refused():
    class Step(Encoder):
        def class_features(self, tokens):
            return tokens[:, 1]

    class Adapted(Encoder):
        adapters = ("adapter",)

    class Own(Adapted):
        class_features = Step.class_features

    class OfDINO(Adapted, DINOv2):
        pass

    class Several(Adapted, DINOv2, Step):
        pass

    assert plain_encoder(OfDINO) is DINOv2 and plain_encoder(Adapted) is Encoder
    for kind, name in ((Own, "Own"), (Several, "Step")):
        with pytest.raises(ValueError, match=rf"{name}\.class_features"):
            plain_encoder(kind)


def test_exports_merge_the_updates(plain, classify, tmp_path):
    out = classify(main_finetune, finetune=plain, **OWN, epochs=1, blr=0.1, warmup_epochs=0)
    model = get_model(out / "checkpoint-0.pth")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    expected = model(images(16, 16))
    without = get_model(out / "checkpoint-0.pth")
    assert (expected - without(images(16, 16))).abs().max() > 1e-3
    for to, suffix in (("safetensors", ".safetensors"), ("onnx", ".onnx"), ("timm", ""), ("reference", ".pth")):
        export.export(model, to, tmp_path / f"model{suffix}")
    for suffix in (".safetensors", ".pth"):
        found = get_model(tmp_path / f"model{suffix}")
        assert not [name for name in found.state_dict() if "lora" in name]
        assert_same(found(images(16, 16)), expected)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert_same(theirs(images(16, 16)), expected)
    pixels = (images(16, 16) * model.normalize.std + model.normalize.mean).numpy()
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": pixels})
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-3, atol=1e-4)


def test_updates_of_dino(pretrain, own_module, tmp_path, capsys):
    """The file gives its sizes, and the command the rank. The export is a model of DINO. Only another encoder warns."""
    theirs = of_transformers("v2 registers", tmp_path / "file")
    own = {"lora": 2, "input_size": 32}
    out = pretrain(init_from=tmp_path / "file", **own, lr=0, epochs=1)
    assert "was made with" not in capsys.readouterr().out
    own_module("another", "from models_dino import DINOv2\nclass Another(DINOv2):\n    pass\n")
    pretrain("other", init_from=tmp_path / "file", encoder="another:Another", input_size=32, lr=0, epochs=1)
    assert "was made with encoder=dinov2" in capsys.readouterr().out
    ours = get_model(out / "checkpoint-0.pth")
    expected = theirs(images(32, 32)).last_hidden_state
    assert_same(ours.extract_feat(images(32, 32), "tokens"), expected)
    assert ours.settings["encoder"] == "dinov2" and ours.settings["lora"] == 2
    export.export(ours, "safetensors", tmp_path / "merged.safetensors")
    merged = get_model(tmp_path / "merged.safetensors")
    assert_same(merged.extract_feat(images(32, 32), "tokens"), expected)
    assert_equal(*({key: value for key, value in model.state_dict().items() if key.startswith("decoder")}
                   for model in (merged, ours)))  # fmt: skip
    trained = weights(pretrain("trained", init_from=tmp_path / "file", **own))
    assert trained["blocks.0.attn.qkv.lora_b"].any()


@pytest.mark.slow
def test_the_five_commands_of_the_page_run(labelled, tmp_path, monkeypatch):
    """With a small encoder whose patches have the size of DINOv2, for an epoch."""
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56, patch_size=14)
    random(Dinov2Model(config)).save_pretrained(tmp_path / "dinov2-small")
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0, "device": "cpu", "amp": "off"}
    page = (ROOT / "docs/start_from.md").read_text().replace("\\\n", "")
    done = []
    for command in "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines():
        words = shlex.split(command.replace("IMAGES", str(labelled)), comments=True)
        if words[1:2] == ["main_compare.py"]:
            assert "lora" in parse(main_compare, *words[2:]).comparison.protocols
        elif words[:1] == ["python"]:
            module = {script.__name__: script for script in SCRIPTS}[words[1].removesuffix(".py")]
            call(module, *words[2:], **small)
            done.append(Path(words[-1]))
    assert len(done) == 5
    assert all((tmp_path / out / "checkpoint-0.pth").exists() for out in done)
    assert get_model("runs/continued/checkpoint-0.pth").settings["input_size"] == 224
    assert get_model("runs/student/checkpoint-0.pth").settings.get("encoder") is None


def test_a_scale_without_updates_is_an_error(classify):
    with pytest.raises(ValueError, match="lora_alpha"):
        classify(main_finetune, lora_alpha=8)


@pytest.mark.parametrize("script", [main_knn, main_linprobe])
@pytest.mark.parametrize("has_file", [True, False])
def test_updates_of_a_frozen_encoder_are_those_of_its_file(script, has_file, plain, classify):
    """Others would stay zero."""
    own = {"finetune": plain} if has_file else {}
    with pytest.raises(ValueError, match="lora=4"):
        classify(script, **own, **OWN)


@pytest.mark.parametrize("blocks", [-1, 5])
def test_a_wrong_number_of_blocks_is_an_error(blocks):
    model = with_updates(8)
    with pytest.raises(ValueError, match=f"unfreeze_blocks={blocks}"):
        mae.build.freeze_below(model, blocks)
