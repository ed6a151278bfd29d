"""Models from the settings of runs; heads of probes."""

import pytest
import torch

import models_build
from models_vit import VisionTransformer, vit_mini_patch4
from util.checkpoints.checkpoint import CheckpointError
from util.weights.loading import Weights
from util.weights.model_zoo import CLASSIFIER, FULL

MINI = {"model": "vit_mini_patch4", "input_size": 16, "patch_size": None, "in_chans": 3, "nb_classes": 5,
        "global_pool": True}  # fmt: skip
MAE = {"model": "mae_vit_mini_patch4", "input_size": 16, "patch_size": None, "in_chans": 3, "norm_pix_loss": True}


def test_every_setting_of_an_autoencoder():
    model = models_build.autoencoder(MAE)
    assert (model.grid_size, model.patch_embed.in_chans, model.norm_pix_loss) == ((4, 4), 3, True)
    assert (len(model.decoder_blocks), model.mask_token.shape[-1]) == (1, 64)
    other = {"input_size": [16, 24], "patch_size": 8, "in_chans": 1, "norm_pix_loss": False, "decoder_depth": 2}
    model = models_build.autoencoder(MAE | other)
    assert (model.grid_size, model.patch_embed.in_chans, model.norm_pix_loss) == ((2, 3), 1, False)
    assert len(model.decoder_blocks) == 2
    named = models_build.autoencoder_arguments(MAE | {"model": "mae_vit_base_patch16_dec512d8b", "decoder_depth": None})
    assert (named["embed_dim"], named["decoder_depth"], named["decoder_embed_dim"]) == (768, 8, 512)
    for model in ("vit_mini_patch4", "mae_vit_none"):
        with pytest.raises(ValueError, match=f"{model} is not a masked autoencoder"):
            models_build.autoencoder_arguments(MAE | {"model": model})


def test_every_setting_of_a_classifier():
    model = models_build.classifier(MINI | {"drop_path": 0.3})
    assert (model.head.out_features, model.global_pool, model.patch_embed.grid_size) == (5, True, (4, 4))
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    model = models_build.classifier(MINI | {"global_pool": False, "patch_size": 8, "in_chans": 1})
    assert (model.global_pool, model.patch_embed.patch_size, model.patch_embed.in_chans) == (False, (8, 8), 1)
    assert not any(hasattr(block.drop_path, "drop_prob") for block in model.blocks)
    with pytest.raises(ValueError, match="mae_vit_mini_patch4 is not a classifier"):
        models_build.classifier_arguments(MINI | {"model": "mae_vit_mini_patch4"})


@pytest.mark.parametrize("on", [True, False])
def test_grad_checkpointing_is_enabled_by_its_setting(on):
    for model in (models_build.autoencoder(MAE | {"grad_checkpointing": on}),
                  models_build.classifier(MINI | {"grad_checkpointing": on})):  # fmt: skip
        assert {block.grad_checkpointing for block in model.blocks} == {on}


def test_a_probe_trains_only_its_head():
    model = models_build.probe(MINI)
    norm, linear = model.head
    assert (norm.eps, norm.affine, norm.num_features) == (1e-6, False, 128)
    assert (linear.in_features, linear.out_features) == (128, 5)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not linear.bias.any()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.1.weight", "head.1.bias"
    ]  # fmt: skip
    model.train()
    assert norm.training
    assert not any(block.training for block in model.blocks)


@pytest.mark.parametrize("global_pool", [False, True])
def test_partial_fine_tuning(global_pool):
    last = {"fc_norm" if global_pool else "norm", "head"}
    for num_blocks in (0, 1, 4):
        model = vit_mini_patch4(img_size=16, global_pool=global_pool)
        models_build.freeze_below(model, num_blocks)
        trained = {name.rsplit(".", 1)[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        blocks = {name.split(".")[1] for name in trained if name.startswith("blocks.")}
        assert blocks == {str(number) for number in range(4 - num_blocks, 4)}
        assert {name for name in trained if not name.startswith("blocks.")} == last
        assert sum(name.startswith("blocks.") for name in trained) == 6 * num_blocks
    for num_blocks in (-1, 5):
        with pytest.raises(ValueError, match=f"--unfreeze_blocks {num_blocks}: the model has 4 blocks"):
            models_build.freeze_below(model, num_blocks)


def weights(settings, model, kind):
    return Weights(model.state_dict(), settings, kind, "file.pth")


def test_a_file_of_an_autoencoder_gives_the_settings_of_a_classifier():
    settings = MAE | {"mean": [0.1], "epochs": 3, "mask_ratio": 0.6}
    file = weights(settings, models_build.autoencoder(MAE), FULL)
    kept = {name: value for name, value in settings.items() if name != "epochs"}
    expected = kept | {"model": "vit_mini_patch4", "patch_size": 4, "decoder_depth": 1}
    assert models_build.classifier_settings(file) == expected
    named = models_build.classifier_settings(file._replace(settings={"model": "mae_vit_huge_patch14_dec512d8b"}))
    assert named["model"] == "vit_huge_patch14"


def test_a_file_without_settings_gives_those_of_its_shapes():
    model = vit_mini_patch4(img_size=16, num_classes=5, global_pool=True)
    file = weights({}, model, CLASSIFIER)
    expected = {"model": "vit_mini_patch4", "patch_size": 4, "in_chans": 3, "input_size": 16, "global_pool": True}
    assert models_build.classifier_settings(file).items() >= expected.items()
    other = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    assert models_build.classifier_settings(weights({}, other, CLASSIFIER)) == {}


def test_another_number_of_heads_is_refused():
    file = weights({"num_heads": 8}, vit_mini_patch4(img_size=16), CLASSIFIER)
    with pytest.raises(CheckpointError, match="has num_heads 8, and the model mini_patch4 has 4"):
        models_build.file_settings(file)
    file = weights({"decoder_num_heads": 8}, models_build.autoencoder(MAE), FULL)
    with pytest.raises(CheckpointError, match="has decoder_num_heads 8, and the model mini_patch4 has 2"):
        models_build.file_settings(file)


def test_parallel_heads_return_logits_in_order():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    features = torch.randn(4, 3)
    logits = models_build.ParallelHeads([first, second])(features)
    assert torch.equal(logits, torch.stack([first(features), second(features)]))
