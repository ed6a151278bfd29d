"""Segmentation heads: known shapes, and transformers' DPT as an oracle."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mae.build
import models_segment
from engine_segment import pixel_loss
from mae.probes import probe_head
from mae.settings import specs
from models_segment import DPTHead, Segmenter
from models_vit import Encoder, VisionTransformer

MINI = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4}
SETTINGS = {"model": "vit_mini_patch4", "input_size": 16, "patch_size": None, "in_chans": 1, "nb_classes": 5}


@pytest.mark.parametrize("head", models_segment.HEADS)
def test_the_output_has_the_size_of_the_image(head):
    model = Segmenter(5, head, **MINI).eval()
    for size in ((16, 16), (24, 40)):
        assert model(torch.rand(2, 1, *size)).shape == (2, 5, *size)
    encoder = VisionTransformer(num_classes=0, **MINI).state_dict()
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert own == {name: value.shape for name, value in encoder.items()}


@pytest.mark.parametrize(("head", "takes_classes"), [("linear", True), ("dpt", False)])
def test_heads_take_the_class_token_of_the_encoder_and_patch_tokens(head, takes_classes):
    """Of several class tokens, those that `class_features` takes. Tokens do not attend to each other here."""
    kind = mae.build.combined(FirstClassToken, Segmenter)
    images = torch.rand(2, 1, 16, 24)

    def output(shifted):
        torch.manual_seed(0)
        model = kind(5, head, num_cls_tokens=3, **MINI).eval()
        for block in model.blocks:
            nn.init.zeros_(block.attn.proj.weight)
        with torch.no_grad():
            model.cls_token[:, shifted] += torch.randn(32)
            return model(images)

    assert torch.equal(output([]), output([1, 2]))
    assert torch.equal(output([]), output([0])) != takes_classes
    assert output([]).shape == (2, 5, 16, 24)


class FirstClassToken(Encoder):
    def class_features(self, tokens):
        return tokens[:, 0]


def test_the_linear_head_by_hand():
    """Batch norm and a matrix on each patch token beside the class token, then bilinear scaling."""
    torch.manual_seed(0)
    model = Segmenter(5, "linear", **MINI).eval()
    norm = model.head.norm
    assert isinstance(norm, nn.BatchNorm2d)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    model.head.classifier.weight.data.normal_()
    model.head.classifier.bias.data.normal_()
    images = torch.rand(2, 1, 12, 20)
    tokens = model.get_intermediate_layers(images)[0]
    both = torch.cat([tokens[:, 1:], tokens[:, :1].repeat(1, 15, 1)], dim=2)
    scaled = (both - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    logits = scaled @ model.head.classifier.weight[:, :, 0, 0].T + model.head.classifier.bias
    maps = logits.transpose(1, 2).reshape(2, 5, 3, 5)
    expected = F.interpolate(maps, (12, 20), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(("depth", "layers"), [(4, [0, 1, 2, 3]), (12, [2, 5, 8, 11]), (24, [5, 11, 17, 23])])
def test_dpt_takes_evenly_spaced_blocks(depth, layers):
    with torch.device("meta"):
        model = Segmenter(2, "dpt", **MINI | {"depth": depth})
    assert model.layers == layers
    with pytest.raises(ValueError, match="dpt"):
        Segmenter(2, "dpt", **MINI | {"depth": 3})


def test_blocks_are_chosen_by_index():
    model = VisionTransformer(num_classes=0, **MINI).eval()
    images = torch.rand(1, 1, 16, 16)
    every = model.get_intermediate_layers(images, 4)
    for indices in ([0, 2], [-4, -2], [2, -4]):  # negative indices as in Python; the order is that of the blocks
        chosen = model.get_intermediate_layers(images, indices)
        assert [torch.equal(a, b) for a, b in zip(chosen, (every[0], every[2]), strict=True)] == [True, True]
    assert len(model.get_intermediate_layers(images, 9)) == 4
    for index in (4, -5):
        with pytest.raises(ValueError, match=f"block {index}"):
            model.get_intermediate_layers(images, [0, index])


def test_the_neck_of_dpt_is_that_of_transformers():
    from transformers import DepthAnythingConfig, Dinov2Config
    from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingNeck

    torch.manual_seed(0)
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4),
        reassemble_hidden_size=32, patch_size=4, reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=list(models_segment.DPT_CHANNELS), fusion_hidden_size=models_segment.DPT_FEATURES,
    )  # fmt: skip
    theirs, ours = DepthAnythingNeck(config).eval(), DPTHead(32, 3).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.5 / parameter[0].numel() ** 0.5)
    copies = {}
    for n in range(4):
        stage = f"reassemble_stage.layers.{n}"
        copies |= {f"projects.{n}": f"{stage}.projection", f"convs.{n}": f"convs.{n}"}
        copies |= {f"resizes.{n}": f"{stage}.resize"} if n != 2 else {}
        fusion = f"fusion_stage.layers.{n}"
        copies[f"fusions.{n}.project"] = f"{fusion}.projection"
        for unit, number in (("skip", 1), ("unit", 2)) if n else (("unit", 2),):
            for conv in (1, 2):
                copies[f"fusions.{n}.{unit}.conv{conv}"] = f"{fusion}.residual_layer{number}.convolution{conv}"
    weights = theirs.state_dict()
    state = {f"{name}.{part}": weights[f"{source}.{part}"] for name, source in copies.items()
             for part in ("weight", "bias") if f"{source}.{part}" in weights}  # fmt: skip
    missing = ours.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert all(name.startswith(("output.", "classifier.")) for name in missing.missing_keys)
    features = []
    ours.output.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    layers = [torch.randn(2, 1 + 3 * 5, 32) for _ in range(4)]
    with torch.no_grad():
        maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 5)) for tokens in layers]
        logits = ours(maps, layers[-1][:, 0])
        expected = theirs(layers, 3, 5)[-1]
    assert features[0].shape == (2, 256, 24, 40)
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 3, 24, 40)


@pytest.mark.parametrize("blocks", [0, 1, 2, "all"])
def test_trained_parts_of_the_encoder(blocks):
    """Exactly these have gradients."""
    for head in models_segment.HEADS:
        model = mae.build.segmenter(*specs({**SETTINGS, "head": head, "unfreeze_blocks": blocks})).train()
        model(torch.rand(2, 1, 16, 16)).square().mean().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        parts = {re.match(r"blocks\.\d|\w+", name)[0] for name in trained}
        expected = {"head"} | ({"norm"} if blocks else set())
        expected |= {f"blocks.{n}" for n in range(0 if blocks == "all" else 4 - blocks, 4)}
        assert parts == expected | ({"cls_token", "pos_embed", "patch_embed"} if blocks == "all" else set())
        assert (model.blocks[0].training, model.head.training) == (bool(blocks), True)


@pytest.mark.parametrize("head", [*models_segment.HEADS, "probe"])
def test_the_gradient_depends_on_the_split_of_a_batch_by_batch_norm_alone(head):
    torch.manual_seed(0)
    if head == "probe":
        model: Any = VisionTransformer(num_classes=0, **MINI)
        model.head = probe_head(32, 5)
    else:
        model = Segmenter(5, head, **MINI)
    images, masks = torch.rand(4, 1, 16, 16), torch.randint(5, (4, 16, 16))
    images = images * torch.arange(1.0, 5)[:, None, None, None]
    masks[0, :8] = 255

    def gradient(*parts):
        model.zero_grad()
        for part in parts:
            outputs = model(images[part])
            loss = F.cross_entropy(outputs, masks[part, 8, 8]) if head == "probe" else pixel_loss(outputs, masks[part])
            (loss / len(parts)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.head.parameters()])

    def difference():
        whole, halves = gradient(slice(4)), gradient(slice(2), slice(2, 4))
        return float((halves - whole).norm() / whole.norm())

    assert difference() > 0.03
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert difference() < 1e-5
