"""Pre-training that starts from the files of the other scripts: the encoder is that of the file, the rest is new."""

from pathlib import Path

import pytest
import torch
from mains import call, weights
from segments import make_scenes

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import models_mae
import models_segment
import models_vit
from mae.checkpoints import checkpoint
from mae.inference import export, get_model
from mae.weights import model_zoo

LORA = {"lora": 2}
FILES = {  # script, its settings, the settings of the pre-training
    "tuned_patches": (main_finetune, {"global_pool": True}, {}),
    "tuned_class_token": (main_finetune, {"cls_token": True}, {}),
    "linear": (main_linprobe, {"blr": 1}, {}),
    "linear_patches": (main_linprobe, {"blr": 1, "global_pool": True}, {}),
    "several_linear": (main_linprobe, {"blr": "0.1 1"}, {}),
    "attentive": (main_linprobe, {"blr": 1, "probe": "attentive", "num_queries": 4}, {}),
    "lora_patches": (main_finetune, {"global_pool": True, **LORA}, {}),
    "lora_class_token": (main_finetune, {"cls_token": True, **LORA}, {}),
    "lora_linear": (main_linprobe, {"blr": 1, "finetune": "lora_class_token"}, {}),
}
NORM = {"norm.weight": 1, "norm.bias": 0}  # the values of a new norm


def require_start(out, file, text):
    """The run, with a rate of 0, has the encoder of the file. Its log names all other weights."""
    found, own = weights(out, "checkpoint-0.pth"), checkpoint.read(file)["model"]
    encoder = {name for name in own if not name.startswith(("head.", "fc_norm."))}
    assert encoder > {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.mlp.fc2.bias"}
    assert [name for name in encoder if not torch.equal(found[name], own[name])] == []
    new = {name for name in found.keys() - encoder if not name.startswith(("decoder_", "mask_token"))}
    assert new == (NORM.keys() if "fc_norm.weight" in own else set())
    assert all((found[name] == NORM[name]).all() and name in text for name in new)
    assert "decoder" in text and "head" in text and ("fc_norm" in text or not new)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_classifier_starts_a_pre_training(name, classify_once, pretrain, capsys):
    script, settings, own = FILES[name]
    if start := settings.get("finetune"):
        of_start, flags, _ = FILES[start]
        folder = classify_once(of_start, f"{start}_of_{name}", **flags, epochs=1, warmup_epochs=0)
        settings = settings | {"finetune": folder / "checkpoint-0.pth"}
    out = classify_once(script, name, **settings, epochs=1, warmup_epochs=0)
    for file in [out / "checkpoint-0.pth", *out.glob("probe.pth")]:
        capsys.readouterr()
        require_start(pretrain(file.stem, init_from=file, **own, lr=0, epochs=1), file, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_a_segmentation_model_starts_a_pre_training(head, pretrain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models_segment, "DPT_CHANNELS", (16, 16, 16, 16))  # of 27 million parameters
    monkeypatch.setattr(models_segment, "DPT_FEATURES", 16)
    call(main_segment, data_path=make_scenes(tmp_path / "scenes"), output_dir=tmp_path / "segmented", nb_classes=3,
         head=head, model="vit_mini_patch4", input_size=16, epochs=1, batch_size=4, num_workers=0, device="cpu",
         amp="off")  # fmt: skip
    file = tmp_path / "segmented/checkpoint-0.pth"
    capsys.readouterr()
    require_start(pretrain(init_from=file, lr=0, epochs=1), file, capsys.readouterr().out)


def test_a_published_classifier_starts_a_pre_training_by_its_name(pictures, tmp_path, monkeypatch, capsys):
    """The file records no settings. Its shapes say which model it has."""
    row = model_zoo.TABLE["mae_finetuned_vit_base"]._replace(model="vit_mini_patch4", digest=None)
    monkeypatch.setitem(model_zoo.TABLE, "mae_finetuned_vit_base", row)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints/mae_finetuned_vit_base.pth"
    file.parent.mkdir()
    torch.save({"model": models_vit.vit_mini_patch4(global_pool=True).state_dict()}, file)
    call(main_pretrain, init_from="mae_finetuned_vit_base", data_path=pictures, output_dir=tmp_path / "run", lr=0,
         input_size=32, epochs=1, batch_size=8, num_workers=0, device="cpu", amp="off", vis_every=0)  # fmt: skip
    require_start(tmp_path / "run", file, capsys.readouterr().out)


def test_a_published_decoder_goes_on_with_the_targets_of_its_training(pretrain, tmp_path, capsys):
    """Published files record nothing: a name of the table tells them. Of other names, a warning says so."""
    state = {"model": models_mae.mae_vit_mini_patch4(img_size=16, patch_size=8).state_dict()}
    file = Path(model_zoo.TABLE["mae_pretrain_vit_base_full"].url).name
    flags = {"input_size": 16, "patch_size": 8, "model": "mae_vit_mini_patch4", "lr": 0, "epochs": 1}
    (tmp_path / "files").mkdir()
    for name, is_known in ((file, True), ("mine.pth", False)):
        torch.save(state, tmp_path / "files" / name)
        out = pretrain(name, init_from=tmp_path / "files" / name, **flags)
        assert checkpoint.read(out / "checkpoint-0.pth")["args"]["norm_pix_loss"] == is_known
        assert ("does not record norm_pix_loss" in capsys.readouterr().out) != is_known


def test_an_exported_classifier_starts_a_pre_training(classify, pretrain, tmp_path, capsys):
    """The export of the features alone has the norm of the pooled patches, and no head."""
    file = classify(main_finetune, "tuned", epochs=1, warmup_epochs=0) / "checkpoint-0.pth"
    export.export(get_model(file), "safetensors", tmp_path / "model.safetensors")
    out = pretrain(init_from=tmp_path / "model.safetensors", lr=0, epochs=1)
    require_start(out, file, capsys.readouterr().out)


def test_the_head_of_a_method_is_that_of_its_own_files(own_module, classify, pretrain):
    """A method may have a module `head`, as a classifier has. Only a file of the method has its weights."""
    own_module("method", "from torch import nn\nfrom models_mae import MaskedAutoencoderViT\n"
               "class Method(MaskedAutoencoderViT):\n"
               "    def __init__(self, **arguments):\n"
               "        super().__init__(**arguments)\n"
               "        self.head = nn.Linear(128, 6)\n"
               "        nn.init.constant_(self.head.weight, 3)\n")  # fmt: skip
    own = {"model_class": "method:Method", "lr": 0, "epochs": 1}
    tuned = classify(main_finetune, "tuned", epochs=1, warmup_epochs=0) / "checkpoint-0.pth"
    started = pretrain("started", init_from=tuned, **own)
    assert (weights(started, "checkpoint-0.pth")["head.weight"] == 3).all()
    file = started / "checkpoint-0.pth"
    state = checkpoint.read(file)
    state["model"]["head.weight"].fill_(5)
    torch.save(state, started / "changed.pth")
    again = pretrain("again", init_from=started / "changed.pth", **own)
    assert (weights(again, "checkpoint-0.pth")["head.weight"] == 5).all()
