"""The share of the variance of masked patches that a model explains: 0 for their mean, 1 for the patches themselves."""

import pytest
import torch
from mains import in_processes, lines

import models_mae
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.training import explained

NORMALIZE = Normalize([0.3], [0.2])


def batches(count=6, valid=None):
    torch.manual_seed(0)
    images = torch.rand(count, 4, 1, 32, 32) ** 3 + torch.linspace(0, 1, 32)
    images /= images.max()
    return [Batch(part, torch.zeros(4), noise=torch.rand(4, 64), valid=valid) for part in images]


class Planted(models_mae.MaskedAutoencoderViT):
    """Predicts a constant, or the target."""

    constant = None

    def forward_decoder(self, latent, ids_restore, grid_size=None, **context):
        if self.constant is None:
            return self.target(self.images, **context)
        return self.constant.expand(*ids_restore.shape, -1)


def planted(norm_pix_loss, target_dim=None):
    return Planted(
        img_size=32, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=1, norm_pix_loss=norm_pix_loss,
    )  # fmt: skip


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("has_valid", [False, True])
def test_the_mean_explains_nothing_and_the_target_all(norm_pix_loss, has_valid):
    """The constant is the mean of the masked patches of all images, which is computed here from them."""
    model = planted(norm_pix_loss)
    valid = torch.rand(4, 32, 32) > 0.2 if has_valid else None
    data = batches(valid=valid)
    constants = explained.losses_of_constants(model, data, 16, NORMALIZE, torch.device("cpu"))
    constant = constants.best

    def loss_of_all():
        found = []
        for batch in data:
            model.images = batch.normalized(NORMALIZE)
            found.append(model(model.images, 0.75, noise=batch.noise, **batch.context)[0])
        return torch.stack(found).mean().item()

    assert explained.share({"train_loss": loss_of_all()}, constant)["train_explained"] == pytest.approx(1, abs=1e-6)
    model.constant = torch.zeros(16)
    assert loss_of_all() == pytest.approx(constants.zero, rel=1e-5)
    if has_valid:  # the best constant is found by descent
        model.constant = torch.zeros(16, requires_grad=True)
        for _ in range(200):
            total = sum(
                model(batch.normalized(NORMALIZE), 0.75, noise=batch.noise, **batch.context)[0] for batch in data
            )
            (gradient,) = torch.autograd.grad(total / len(data), model.constant)
            model.constant = (model.constant - 4 * gradient).detach().requires_grad_()
    else:
        masked = []
        for batch in data:
            target = model.target(batch.normalized(NORMALIZE))
            masked.append(target[batch.noise.argsort(dim=1).argsort(dim=1) >= 16])
        model.constant = torch.cat(masked).mean(dim=0)
    found = explained.share({"train_loss": loss_of_all()}, constant)["train_explained"]
    assert found == pytest.approx(0, abs=1e-3)
    model.constant = model.constant + 0.3
    assert explained.share({"train_loss": loss_of_all()}, constant)["train_explained"] < -0.01


def test_a_model_with_a_loss_of_its_own_has_no_constant():
    class Own(models_mae.MaskedAutoencoderViT):
        def forward_loss(self, imgs, pred, mask, **context):
            return pred.mean()

    assert not explained.has_constant(Own(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1))
    assert explained.share({"train_loss": 1.0}, None) == {}


def test_each_epoch_has_the_share_of_the_pixels_alone(pretrain, capsys):
    run = pretrain(uniformity=0.5, epochs=2, num_workers=1)
    for line in lines(run):
        constant = line["train_pixels"] / (1 - line["train_explained"])
        assert constant == pytest.approx(lines(run)[0]["train_pixels"] / (1 - lines(run)[0]["train_explained"]))
        assert 0.3 < constant < 3  # of normalized pixels
        assert f"{line['train_explained']:.1%} explained" in capsys.readouterr().out or line["epoch"]


def test_held_out_images_have_a_share_and_their_neighbors_those_of_raw_pixels(labelled, pretrain, capsys):
    """Without updates, both shares of an epoch are those of the same weights."""
    run = pretrain(data_path=labelled, probe_every=1, probe_path=labelled, epochs=2, lr=0)
    first, second = lines(run)
    assert first["test_explained"] == second["test_explained"]
    assert first["test_explained"] == pytest.approx(first["train_explained"], abs=0.3)
    assert 0 <= first["test_knn_pixels"] <= 100 and first["test_knn_pixels"] == second["test_knn_pixels"]
    assert f"(raw pixels {first['test_knn_pixels']:.3f})" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_have_the_constant_of_one(labelled, tmp_path):
    flags = ("--epochs", 1, "--probe_every", 1, "--probe_path", labelled)
    in_processes(1, labelled, tmp_path / "one", "--batch_size", 8, *flags)
    in_processes(2, labelled, tmp_path / "two", "--batch_size", 4, *flags)
    one, two = (lines(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("train_explained", "test_explained", "test_knn_pixels"):
        assert one[name] == pytest.approx(two[name], abs=1e-5)
