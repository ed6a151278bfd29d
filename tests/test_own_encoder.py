"""Encoders of the user's code: --encoder module:Class, get_model(encoder=Class), --model_class."""

import re
import sys
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from mains import assert_equal, call, fails, lines, parse, run_section, stop_and_resume, weights
from PIL import Image
from segments import make_scenes
from timm.models.vision_transformer import Block as TimmBlock

import mae.build
import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_segment
from examples import reconstructions
from examples.channel_groups import ChannelGroups, Groups
from examples.lead_embeddings import LeadEmbeddings
from examples.tubes import Tubes
from examples.wide_decoder import WideDecoder
from mae.checkpoints import checkpoint
from mae.encoders import ENCODERS
from mae.inference import export, features, get_model, maps, predict, reconstruct
from mae.inference.classes import Segmenter
from mae.inference.model import with_encoder
from mae.training.optimizers import param_groups_lrd
from mae.weights import loading, model_zoo, reading
from models_dino import DINOv3
from models_mae import MaskedAutoencoderViT
from models_segment import Segmenter as PlainSegmenter
from models_vit import Block, Encoder, VisionTransformer

SMALL = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 4, "num_heads": 2}
GROUPS = {"encoder": "examples.channel_groups:ChannelGroups", "encoder_args": "groups=3"}
EXAMPLES = {"channel_groups": (ChannelGroups, {"encoder_args": "groups=3"}, "group_embed"),
            "lead_embeddings": (LeadEmbeddings, {}, "lead_embed"),
            "tubes": (Tubes, {"encoder_args": "tube=1 masks=true"}, "patch_embed.proj.weight"),
            "dinov3": (DINOv3, {"num_cls_tokens": 3, "encoder_args": "swiglu=true"}, "blocks.0.ls1.gamma")}  # fmt: skip
LEADS = """
import torch
from torch import nn
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder
class Leads(Encoder):
    def __init__(self, *, rows: int, scale: float = 1.0, **arguments):
        super().__init__(**arguments)
        self.lead_embed = nn.Parameter(torch.full((rows, 1, self.cls_token.shape[2]), float(scale)))
    def tokenize(self, imgs, **context):
        tokens = super().tokenize(imgs, **context).unflatten(1, (len(self.lead_embed), -1))
        return (tokens + self.lead_embed).flatten(1, 2)
class Brighter(MaskedAutoencoderViT):
    def target(self, imgs, **context):
        return super().target(imgs, **context) + 10
class Scaled(MaskedAutoencoderViT):
    def __init__(self, *, scale=1, **arguments):
        super().__init__(**arguments)
"""


@pytest.fixture
def leads(own_module):
    return own_module("leads", LEADS)


class Shifted(Encoder):
    def tokenize(self, imgs, **context):
        return 2 * super().tokenize(imgs, **context)


MODELS = {"autoencoder": (MaskedAutoencoderViT, {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}),
          "classifier": (VisionTransformer, {"num_classes": 5}),
          "segmenter": (PlainSegmenter, {"num_classes": 5})}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_method_changes_the_tokens_of_all_models(name):
    kind, own = MODELS[name]
    plain, shifted = kind(**SMALL, **own), mae.build.combined(Shifted, kind)(**SMALL, **own)
    shifted.load_state_dict(plain.state_dict())
    imgs = torch.rand(2, 3, 16, 16)
    ours, theirs = shifted.embed(imgs), plain.embed(imgs)
    torch.testing.assert_close(ours[:, 1:], 2 * theirs[:, 1:])
    assert torch.equal(ours[:, :1], theirs[:, :1])
    outputs = [model.eval()(imgs) for model in (plain, shifted)]
    first, second = (output[1] if isinstance(output, tuple) else output for output in outputs)
    assert (first - second).abs().max() > 1e-3
    if name == "autoencoder":  # also of visible patches
        noise = torch.rand(2, 16)
        latents = [model.forward_encoder(imgs, 0.75, noise=noise)[0] for model in (plain, shifted)]
        assert (latents[0] - latents[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_timm_are_those_of_all_models(name):
    class WithTimm(Encoder):
        block = TimmBlock

    kind, own = MODELS[name]
    plain, timm = kind(**SMALL, **own).eval(), mae.build.combined(WithTimm, kind)(**SMALL, **own).eval()
    assert type(timm.blocks[0]) is TimmBlock
    timm.load_state_dict(plain.state_dict())
    imgs = torch.rand(2, 3, 16, 16)
    ours, theirs = (model.get_intermediate_layers(imgs)[0] for model in (plain, timm))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if name == "autoencoder":
        assert type(timm.decoder_blocks[0]) is TimmBlock
    with pytest.raises(AttributeError, match="maps"):
        timm.get_intermediate_layers(imgs, return_attention=True)


class AdaptedBlock(Block):
    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.down, self.up = torch.nn.Linear(dim, 4), torch.nn.Linear(4, dim)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.ones_(self.up.bias)

    def compute(self, x, *inputs):
        return super().compute(x, *inputs) + self.up(self.down(x)) - 1


class Adapters(Encoder):
    block = AdaptedBlock


@pytest.mark.parametrize("name", MODELS)
def test_adapters_start_as_their_blocks_set_them(name, caplog):
    """An adapter of zeros changes nothing, also with weights of a file that has no adapters."""
    kind, own = MODELS[name]
    plain, adapted = kind(**SMALL, **own).eval(), mae.build.combined(Adapters, kind)(**SMALL, **own).eval()
    tensors = {name: value for name, value in plain.state_dict().items() if "head" not in name}
    file = reading.Weights(tensors, {"input_size": 16}, model_zoo.FULL, "file")
    (loading.init_mae if name == "autoencoder" else loading.load_encoder)(adapted, file)
    assert "has no blocks.0.down.bias" in caplog.text
    imgs = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(adapted.get_intermediate_layers(imgs)[0], plain.get_intermediate_layers(imgs)[0])


@pytest.mark.parametrize("name", MODELS)
def test_an_override_that_adds_tokens_is_an_error(name):
    """The decoder, and the mean of the patches, would take them for patches."""

    class Registers(Encoder):
        def with_class_tokens(self, patches, grid):
            return torch.cat([super().with_class_tokens(patches, grid), patches[:, :2]], dim=1)

    kind, own = MODELS[name]
    with pytest.raises(ValueError, match=r"with_class_tokens .*num_prefix_tokens"):
        mae.build.combined(Registers, kind)(**SMALL, **own)(torch.rand(1, 3, 16, 16))


def test_weights_of_a_mix_in_have_the_rate_of_the_embeddings():
    class Late(Shifted):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.first, self.last = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))

        def layer_id(self, name):
            return len(self.blocks) + 1 if name == "last" else super().layer_id(name)

    model = mae.build.combined(Late, VisionTransformer)(**SMALL, num_classes=5)
    rates = {id(p): group["lr_scale"] for group in param_groups_lrd(model, layer_decay=0.5) for p in group["params"]}
    assert rates[id(model.first)] == rates[id(model.cls_token)] == 0.5**5
    assert rates[id(model.last)] == rates[id(model.head.weight)] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_trained_resumed_and_evaluated(name, pretrain, classify, tmp_path, monkeypatch):
    kind, own, weight = EXAMPLES[name]
    is_whole, flags = name == "channel_groups", {"num_workers": 1}
    name = name if name in ENCODERS else f"examples.{name}:{kind.__name__}"
    whole = pretrain("whole", **flags, encoder=name, **own)
    assert_equal(weights(whole), weights(stop_and_resume(monkeypatch, pretrain, 3, **flags, encoder=name, **own)))
    file = whole / "checkpoint-1.pth"
    recorded = checkpoint.read(file)["args"]
    arguments = own["encoder_args"].split() if "encoder_args" in own else None
    assert (recorded["encoder"], recorded["encoder_args"]) == (name, arguments)
    given = {"finetune": file, "encoder": name}  # the file has the arguments
    assert classify(main_knn, k=3, **given)[3, 0.07] > 50
    tuned = classify(main_finetune, "tuned", **given, epochs=1)
    adapted = weights(tuned, "checkpoint-0.pth")[weight]
    assert not torch.equal(adapted, weights(whole)[weight])
    torch.testing.assert_close(adapted, weights(whole)[weight], atol=0.05, rtol=0)
    scores = classify(main_finetune, eval=True, resume=tuned / "checkpoint-0.pth", encoder=name)
    assert scores.acc1 == pytest.approx(lines(tuned)[-1]["test_acc1"])
    if is_whole:
        assert_equal(weights(whole), weights(pretrain("python", of_main={"encoder": kind}, **own)))
        classify(main_linprobe, "probe", **given, probe="attentive", num_queries=4, blr=1)
    scenes, out = make_scenes(tmp_path / "scenes"), tmp_path / "segmented"
    main_segment.main(parse(main_segment, data_path=scenes, nb_classes=3, model="vit_mini_patch4",
        input_size=16, patch_size=4, in_chans=3, epochs=1, batch_size=4, num_workers=0, device="cpu", amp="off",
        output_dir=out, log_dir=out, **given))  # fmt: skip
    segmenter = get_model(out / "checkpoint-0.pth", encoder=kind)
    assert isinstance(segmenter, Segmenter) and segmenter(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_features_of_a_checkpoint_and_its_exports(pretrain, tmp_path):
    file = pretrain(**GROUPS, epochs=1) / "checkpoint-0.pth"
    with pytest.raises(ValueError, match=f"encoder={GROUPS['encoder']}"):
        get_model(file)
    model = get_model(file, encoder=ChannelGroups)
    pixels = torch.rand(2, 3, 16, 16)
    imgs = model.normalize(pixels)
    state = checkpoint.read(file)["model"]
    plain = with_encoder(type(model).__mro__[1], ChannelGroups)(model.settings)
    plain.load_state_dict(state)
    expected = model.compute_features(imgs)
    assert torch.equal(expected, plain.compute_features(imgs))
    assert torch.equal(model.reconstruct(imgs).original, imgs)
    for to, suffix in (("safetensors", ".safetensors"), ("torch_export", ".pt2"), ("onnx", ".onnx")):
        out = tmp_path / f"model{suffix}"
        flags = {"model": file, "to": to, "out": out, "encoder": GROUPS["encoder"], "encoder_only": True}
        export.main(parse(export, **flags))
        if to == "safetensors":
            found = get_model(out, encoder=ChannelGroups).compute_features(imgs)
        elif to == "torch_export":
            found = torch.export.load(out).module()(pixels)
        else:
            (found,) = onnxruntime.InferenceSession(out).run(None, {"images": pixels.numpy()})
            found = torch.from_numpy(found)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for to, suffix in (("timm", ""), ("transformers", ""), ("reference", ".pth")):
        with pytest.raises(ValueError, match=f"to={to}.*ChannelGroups"):
            export.export(model, to, tmp_path / f"other{suffix}")


@pytest.mark.slow
def test_the_section_of_the_page_runs(tmp_path):
    assert "10-NN Acc@1" in run_section("docs/method.md", "## Your encoder", tmp_path)


@pytest.mark.slow
def test_a_comparison_has_encoders_with_and_without_a_mix_in(forked, leads, pretrain, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{leads}:{ROOT}")
    plain = pretrain("plain", epochs=1) / "checkpoint-0.pth"
    own = pretrain("own", epochs=1, encoder="leads:Leads", encoder_args="rows=4") / "checkpoint-0.pth"
    flags = {"encoders": f"plain={plain} own={own}", "protocols": "knn", "data_path": labelled, "num_workers": 0,
             "device": "cpu", "output_dir": tmp_path / "compared"}  # fmt: skip
    with pytest.raises(ValueError, match="encoder=leads:Leads"):
        main_compare.main(parse(main_compare, **flags))
    table = main_compare.main(parse(main_compare, **flags, encoder="leads:Leads"))
    assert "plain" in table and "own" in table


def test_plain_weights_start_a_model_with_a_mix_in(leads, pretrain, classify, capsys):
    file = pretrain(epochs=1) / "checkpoint-0.pth"
    own = {"finetune": file, "encoder": "leads:Leads"}
    out = classify(main_finetune, "tuned", **own, encoder_args="rows=4 scale=.5", epochs=1)
    assert "lead_embed" in capsys.readouterr().out
    torch.testing.assert_close(weights(out, "checkpoint-0.pth")["lead_embed"].mean().item(), 0.5, rtol=0, atol=0.1)
    assert classify(main_knn, **own, encoder_args="rows=6", input_size=24, k=3)


def test_maps_of_several_tokens_per_patch_are_those_of_the_image(monkeypatch):
    """Without attention, a patch depends on its own pixels only, in all groups of channels."""
    images = torch.rand(1, 3, 24, 16)
    changed = images.clone()
    changed[:, :, 8:12, 4:8] += 1  # patch (2, 1)
    own = {"encoder": ChannelGroups, "encoder_args": ["groups=3"]}
    model = get_model("vit_mini_patch4", input_size=[24, 16], nb_classes=0, **own).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    difference = (maps.dense(model, images) - maps.dense(model, changed)).abs().sum(dim=1)[0]
    assert difference.nonzero().tolist() == [[2, 1]]
    weights_of_head = maps.attention(model, images)
    assert weights_of_head.shape[2:] == (6, 4)
    monkeypatch.delattr(Groups, "patch_maps")
    with pytest.raises(RuntimeError, match="72"):
        maps.dense(model, images)


def test_leads_of_other_images_are_an_error():
    model = get_model("vit_mini_patch4", input_size=[16, 24], nb_classes=0, encoder=LeadEmbeddings)
    assert model.extract_feat(torch.rand(1, 3, 16, 32)).shape == (1, 128)
    with pytest.raises(ValueError, match="leads"):
        model.extract_feat(torch.rand(1, 3, 8, 24))


def test_the_figure_of_reconstructions_has_an_encoder(labelled, tmp_path):
    """With embeddings of zeros, it is that of the model without the encoder."""
    own = get_model("mae_vit_mini_patch4", input_size=16, encoder=LeadEmbeddings)
    torch.nn.init.normal_(own.decoder_pred.weight)  # visible differences
    plain = get_model("mae_vit_mini_patch4", input_size=16)
    plain.load_state_dict(own.state_dict(), strict=False)

    def drawn(model, name, **flags):
        export.export(model, "safetensors", tmp_path / f"{name}.safetensors")
        figure = tmp_path / f"{name}.png"
        call(reconstructions, model=tmp_path / f"{name}.safetensors", data_path=labelled, out=figure, **flags)
        return np.asarray(Image.open(figure))

    pictures = [drawn(plain, "plain")]
    for std in (0.0, 1.0):
        torch.nn.init.normal_(own.lead_embed, std=std)
        pictures.append(drawn(own, f"own{std}", encoder="examples.lead_embeddings:LeadEmbeddings"))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_arguments_of_the_same_name_are_an_error(leads, pretrain):
    flags = {"encoder": "leads:Leads", "encoder_args": "rows=4", "model_class": "leads:Scaled"}
    with pytest.raises(ValueError, match="scale"):
        pretrain(**flags, model_args="scale=2")


def test_arguments_of_a_base_class_and_numbers_as_in_other_flags(leads, pretrain):
    (leads / "leads.py").write_text(
        LEADS
        + """
class Shifted(Leads):
    def __init__(self, *, shift: float, site: str = "010", country: str = "no", **arguments):
        super().__init__(rows=4, **arguments)
        assert (site, country) == ("010", "no")  # YAML 1.1: 8 and False
        torch.nn.init.constant_(self.cls_token, shift)
"""
    )
    own = {"encoder": "leads:Shifted", "encoder_args": "shift=1e-3 scale=2.5e+1 site=010 country=no"}
    found = weights(pretrain("run", epochs=1, lr=0, **own), "checkpoint-0.pth")
    assert (found["lead_embed"] == 25).all()
    assert found["cls_token"].float().mean().item() == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(ValueError, match="wrong=1"):
        pretrain("wrong", **own | {"encoder_args": "wrong=1"})


def test_a_model_class_is_trained_by_its_flag(leads, pretrain):
    plain = pretrain("plain", epochs=1)
    own = pretrain("own", epochs=1, model_class="leads:Brighter")
    assert lines(own)[0]["train_loss"] > 50 > lines(plain)[0]["train_loss"]
    both = pretrain("both", epochs=1, model_class="leads:Brighter", encoder="leads:Leads", encoder_args="rows=4")
    assert lines(both)[0]["train_loss"] > 50
    assert "lead_embed" in weights(both, "checkpoint-0.pth")
    recorded = checkpoint.read(both / "checkpoint-0.pth")["args"]
    assert (recorded["model_class"], recorded["encoder"]) == ("leads:Brighter", "leads:Leads")
    flags = {"model_class": "leads:Brighter", "encoder": "leads:Leads"}  # the checkpoint has the arguments
    for flag, name in flags.items():
        with pytest.raises(ValueError, match=f"{flag}={name}"):
            pretrain("both", resume="auto", **{other: flags[other] for other in flags if other != flag})
    pretrain("both", resume="auto", **flags)
    assert len(lines(both)) == 2


def test_arguments_of_a_class_in_python(pretrain):
    """By --model_args or by a partial. A partial can't have arguments that the run determines."""
    for number, own in enumerate(({"model_args": "width=96"}, {})):
        kind = WideDecoder if own else partial(WideDecoder, width=96)
        out = pretrain(f"wide{number}", epochs=1, of_main={"model_class": kind}, **own)
        assert weights(out, "checkpoint-0.pth")["mask_token"].shape[-1] == 96
    pretrain("explicit", epochs=1, of_main={"model_class": Explicit})
    with pytest.raises(ValueError, match="norm_pix_loss"):
        pretrain("fixed", of_main={"model_class": partial(WideDecoder, norm_pix_loss=True)})


def test_a_run_that_resumes_with_a_different_class_warns(pretrain, capsys):
    for kind in (Explicit, type("Other", (Explicit,), {})):
        pretrain("own", epochs=1, resume="auto", of_main={"model_class": kind})
    assert re.search(r"`model_class` .*Explicit .*Other", capsys.readouterr().out)


class Explicit(MaskedAutoencoderViT):
    def __init__(self, *, embed_dim, **arguments):
        super().__init__(embed_dim=embed_dim, **arguments)


def test_a_file_imports_no_code(leads, pretrain, labelled, tmp_path, capsys, monkeypatch):
    """The error of every command names the flag. The module would write a file."""
    file = pretrain(epochs=1, encoder="leads:Leads", encoder_args="rows=4") / "checkpoint-0.pth"
    (leads / "leads.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n" + LEADS)
    del sys.modules["leads"]
    picture, scenes = next(labelled.rglob("*.png")), make_scenes(tmp_path / "scenes")
    tunes = ("--finetune", file, "--model", "vit_mini_patch4", "--device", "cpu")
    out, images = ("--output_dir", tmp_path / "out"), ("--data_path", labelled)
    for script, *flags in (
        (main_finetune, *tunes, *images, *out), (main_linprobe, *tunes, *images, *out), (main_knn, *tunes, *images),
        (main_segment, *tunes, "--data_path", scenes, "--nb_classes", 3, "--input_size", 16, *out),
        (predict, picture, "--model", file), (reconstruct, picture, "--model", file, "--out", tmp_path / "a.png"),
        (features, labelled, "--model", file, "--out", tmp_path / "a.npz"),
        (export, "--model", file, "--to", "onnx", "--out", tmp_path / "a.onnx"),
    ):  # fmt: skip
        assert fails(capsys, monkeypatch, script, *flags).endswith("give encoder=leads:Leads")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(("flags", "message"), [
    ({"encoder": "nowhere:Leads"}, "nowhere"), ({"encoder": "leads:Brighter"}, "encoder=leads:Brighter"),
    ({"encoder": "os:getcwd"}, "encoder=os:getcwd"), ({"encoder": "leads:Leads", "encoder_args": "row=4"}, "row=4"),
    ({"encoder_args": "rows=4"}, "`encoder`"), ({"model_class": "leads:Leads"}, "model_class=leads:Leads"),
])  # fmt: skip
def test_mistakes_are_errors_in_one_line(flags, message, leads, pretrain):
    with pytest.raises(ValueError, match=message):
        pretrain(**flags)


class Located(Encoder):
    def tokenize(self, imgs, place, **context):
        return super().tokenize(imgs, **context) * (1 + place[:, None, None])

    def random_masking(self, x, mask_ratio, noise=None, saliency=None, **context):
        return super().random_masking(x, mask_ratio, noise=saliency)


def test_extra_inputs_reach_the_steps_that_name_them():
    imgs, place, saliency = torch.rand(2, 3, 16, 16), torch.tensor([0.0, 1.0]), torch.rand(2, 16)
    classifier = mae.build.combined(Located, VisionTransformer)(**SMALL, num_classes=5).eval()
    plain = VisionTransformer(**SMALL, num_classes=5).eval()
    plain.load_state_dict(classifier.state_dict())
    outputs = classifier(imgs, place=place, saliency=saliency), plain(imgs)
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert (outputs[0][1] - outputs[1][1]).abs().max() > 1e-4
    autoencoder = mae.build.combined(Located, MaskedAutoencoderViT)(**SMALL, decoder_embed_dim=32, decoder_depth=1,
                                                               decoder_num_heads=2)  # fmt: skip
    mask = autoencoder(imgs, place=place, saliency=saliency)[2]
    assert torch.equal(mask.bool(), saliency > saliency.sort(dim=1).values[:, 3:4])
    for model in (autoencoder, classifier):
        with pytest.raises(ValueError, match="lat"):
            model(imgs, place=place, lat=place)
