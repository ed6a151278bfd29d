"""Detection: the file for ViTDet of detectron2, and torchvision's Mask R-CNN on an encoder."""

import pytest
import torch
from mains import call
from transformers import VitDetConfig, VitDetModel

from examples.detector import SimplePyramid, build_detector
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


@pytest.mark.parametrize(("patch", "stride"), [(4, 4), (7, 8), (14, 16), (16, 16)])
def test_the_pyramid_has_four_strides(patch, stride):
    encoder = get_model("vit_mini_patch4", input_size=8 * patch, patch_size=patch, in_chans=1, global_pool=False)
    pyramid = SimplePyramid(encoder).eval()
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


@pytest.mark.slow
def test_a_detector_learns_bright_squares():
    """On the encoder of an autoencoder, whose mean and standard deviation it uses."""
    torch.manual_seed(0)
    encoder = get_model("vit_mini_patch4", input_size=48, in_chans=1, global_pool=False, mean=[0.1], std=[0.2])
    detector = build_detector(encoder, 2).train()
    assert detector.transform.image_mean + detector.transform.image_std == pytest.approx([0.1, 0.2])
    optimizer, losses = torch.optim.AdamW(detector.parameters(), lr=3e-4), []
    for left, top in torch.randint(0, 32, (5, 2)).tolist():
        mask = torch.zeros(1, 48, 48, dtype=torch.uint8)
        mask[0, top : top + 16, left : left + 16] = 1
        picture = 0.1 * torch.rand(1, 48, 48) + 0.8 * mask
        box = torch.tensor([[left, top, left + 16, top + 16]], dtype=torch.float32)
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask}
        loss = torch.stack([*detector([picture], [target]).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-2:]) < 0.85 * losses[0]
    detector.roi_heads.detections_per_img = 10
    with torch.inference_mode():
        (found,) = detector.eval()([picture])
    assert found["masks"].shape[1:] == (1, 48, 48)
