"""Detection: the file for ViTDet of detectron2, and torchvision's Mask R-CNN on an encoder."""

import re

import forks
import numpy as np
import pytest
import torch
from mains import call
from transformers import VitDetConfig, VitDetModel

from demo import detection, segmentation
from mae.inference import export, get_model


@pytest.mark.parametrize(("source", "size"), [("mae", (56, 56)), ("encoder", (40, 96)), ("classifier", (56, 56))])
def test_an_exported_encoder_has_the_layout_and_features_of_vitdet(tmp_path, source, size):
    """The command of docs/segmentation.md, for a checkpoint of pre-training, an encoder and a classifier.

    VitDet of transformers is a port of detectron2's backbone, and interpolates positions itself.
    """
    settings = {} if source == "mae" else {"nb_classes": 3 * (source == "classifier"), "global_pool": False}
    model = get_model("mae_vit_mini_patch4" if source == "mae" else "vit_mini_patch4", input_size=56, **settings)
    torch.nn.init.normal_(model.pos_embed)
    torch.save({"model": model.state_dict(), "args": model.settings, "epoch": 3}, tmp_path / "checkpoint-3.pth")
    call(export, model=tmp_path / "checkpoint-3.pth", encoder_only=True, to="reference", out=tmp_path / "file.pth")
    tensors = torch.load(tmp_path / "file.pth", weights_only=True)["model"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tensors.items())
    theirs = VitDetModel(VitDetConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=56, pretrain_image_size=56,
        patch_size=4, layer_norm_eps=1e-6, window_block_indices=[], use_relative_position_embeddings=False,
    )).eval()  # fmt: skip
    names = {"blocks.": "encoder.layer.", ".attn.": ".attention.", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.projection"}  # fmt: skip
    state = {}
    for key, value in tensors.items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        state[key] = value
    result = theirs.load_state_dict(state, strict=False)
    assert (result.missing_keys, set(result.unexpected_keys)) == ([], {"cls_token", "norm.weight", "norm.bias"})
    images = torch.randn(2, 3, *size)
    grid = model.patch_embed.grid_of(*size)
    with torch.no_grad():
        tokens = model.patch_tokens(model.embed(images))  # ViTDet drops the class token
        for block in model.blocks:
            tokens = block(tokens)
        features = theirs(images).last_hidden_state
    torch.testing.assert_close(features.permute(0, 2, 3, 1), tokens.unflatten(1, grid), rtol=1e-4, atol=1e-4)


def test_pictures_have_boxes_and_masks_of_their_garments():
    pictures, targets = detection.make_scenes(6, seed=2)
    garments, classes = segmentation.make_pictures("train", 18, 2)
    assert pictures.shape == (6, 1, 84, 84) and len(targets) == 6
    assert pictures.min() >= 0 and 0.5 < pictures.max() <= 1
    for number, target in enumerate(targets):
        for index, (box, label, mask) in enumerate(zip(*target.values(), strict=True)):
            garment, own = garments[3 * number + index], classes[3 * number + index]
            assert label == own.max()
            left, top, right, bottom = box.int().tolist()
            inside = torch.zeros_like(mask)
            inside[top:bottom, left:right] = 1
            assert mask.sum() == (own > 0).sum() == (mask * inside).sum()
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
            pixels = (255 * pictures[number, 0][mask.bool()]).round().numpy()
            assert np.array_equal(pixels, garment[own > 0])
    assert {int(label) for target in targets for label in target["labels"]} > {1, 2}
    assert sum(int(target["masks"].sum(dim=0).max()) for target in targets) == 6  # no garment covers another


@pytest.mark.parametrize(("patch", "stride"), [(4, 4), (7, 8), (14, 16), (16, 16)])
def test_the_pyramid_has_four_strides(patch, stride):
    encoder = get_model("vit_mini_patch4", input_size=8 * patch, patch_size=patch, in_chans=1, global_pool=False)
    pyramid = detection.SimplePyramid(encoder).eval()
    assert pyramid.stride == stride
    tokens = []
    pyramid.levels[2][0].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    pictures = torch.zeros(1, 1, 4 * stride, 6 * stride)
    maps = pyramid(pictures)
    x = encoder.embed(torch.zeros(1, 1, 4 * patch, 6 * patch))
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(tokens[0].flatten(2).transpose(1, 2), x[:, 1:])  # without the final norm
    assert [tuple(level.shape) for level in maps.values()] == [
        (1, 256, 16, 24), (1, 256, 8, 12), (1, 256, 4, 6), (1, 256, 2, 3)
    ]  # fmt: skip
    changed = pictures.clone()
    changed[:, :, 2 * stride : 3 * stride, 4 * stride : 5 * stride] = 5.0
    distances = [(a - b).norm(dim=1)[0] for a, b in zip(maps.values(), pyramid(changed).values(), strict=True)]
    for distance, scale in zip(distances, (4, 2, 1, 0.5), strict=True):
        row, column = divmod(int(distance.argmax()), distance.shape[1])
        assert abs((row + 0.5) / scale - 2.5) <= 1.5 and abs((column + 0.5) / scale - 4.5) <= 1.5


def test_the_command_trains_and_detects(tmp_path):
    """As users run it, with the encoder of a small autoencoder like that of ./run demo."""
    model = get_model("mae_vit_mini_patch4", input_size=28, patch_size=7, in_chans=1)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "checkpoint-0.pth")
    argv = ["--model", tmp_path / "checkpoint-0.pth", "--updates", 6, "--device", "cpu"]
    printed = forks.run("demo/detection.py", argv, tmp_path / "output.txt")
    losses = [float(loss) for loss in re.findall(r"^update \d+: loss ([\d.]+) \(", printed, flags=re.MULTILINE)]
    assert len(losses) == 6
    assert max(losses[-2:]) < 0.85 * losses[0]
    names = "|".join(re.escape(name) for name in np.load(segmentation.ARCHIVE)["classes"])
    box = rf"({names}) at \(\d+ \d+ \d+ \d+\)"
    assert re.search(rf"^detected: {box}, score 0\.\d\d; true: {box}, {box}, {box}$", printed, flags=re.MULTILINE)
