"""The share of the variance of masked patches that a model explains: 0 for their mean, 1 for the patches themselves."""

import numpy as np
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


def built(kind, **arguments):
    return kind(
        img_size=32, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=1, **arguments,
    )  # fmt: skip


def mean_of(model, data):
    return explained.loss_of_mean(model, data, 0.75, NORMALIZE, torch.device("cpu"))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("has_valid", [False, True])
def test_the_mean_explains_nothing_and_the_target_all(norm_pix_loss, has_valid):
    """The constant is the mean of the masked patches of all images, which is computed here from them."""
    model = built(Planted, norm_pix_loss=norm_pix_loss)
    model.constant = torch.zeros(16)
    valid = torch.rand(4, 32, 32) > 0.2 if has_valid else None
    data = batches(valid=valid)
    constant = mean_of(model, data)

    model.constant = None

    def loss_of_all():
        found = []
        for batch in data:
            model.images = batch.normalized(NORMALIZE)
            found.append(model(model.images, 0.75, noise=batch.noise, **batch.context)[0])
        return torch.stack(found).mean().item()

    assert explained.share({"train_loss": loss_of_all()}, constant)["train_explained"] == pytest.approx(1, abs=1e-6)
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


def of_all_patches(self, imgs, pred, mask, **context):
    """The masked patches count twice."""
    return ((pred - self.target(imgs)).square().mean(dim=-1) * (1 + mask)).mean()


def test_the_share_is_that_of_the_loss_that_an_edit_in_place_has(monkeypatch):
    data = batches()
    targets = torch.cat([built(Planted).patchify(NORMALIZE(batch.images)) for batch in data]).numpy()
    ranks = torch.cat([batch.noise for batch in data]).numpy().argsort(axis=1).argsort(axis=1)
    weight = np.where(ranks >= 16, 2, 1)[..., None]
    mean = (weight * targets).sum(axis=(0, 1)) / weight.sum()
    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "forward_loss", of_all_patches)
    expected = (weight * (targets - mean) ** 2).mean()
    assert mean_of(built(models_mae.MaskedAutoencoderViT), data) == pytest.approx(expected, rel=1e-6)


class Absolute(models_mae.MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        return ((pred - self.target(imgs)).abs().mean(dim=-1) * mask).sum() / mask.sum()


class Unbounded(models_mae.MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        return pred.mean()


class WithTerm(models_mae.MaskedAutoencoderViT):
    def forward(self, imgs, mask_ratio=0.75, **context):
        loss, pred, mask = super().forward(imgs, mask_ratio, **context)
        return loss + 0.1 * self.cls_token.square().mean() + 0.1, pred, mask


class WithLatent(models_mae.MaskedAutoencoderViT):
    def forward_encoder(self, imgs, mask_ratio, **context):
        found = super().forward_encoder(imgs, mask_ratio, **context)
        self.latent = found[0]
        return found

    def forward_loss(self, imgs, pred, mask, **context):
        return super().forward_loss(imgs, pred, mask, **context) + self.latent.square()[:, 0, 0].mean()


class Failing(models_mae.MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, weight, **context):
        return weight * super().forward_loss(imgs, pred, mask, **context)


@pytest.mark.parametrize("kind", [Absolute, Unbounded, WithTerm, WithLatent, Failing])
def test_a_loss_without_a_known_mean_has_no_share_and_a_line(kind, caplog):
    """The line is logged once: of training and of held-out images."""
    caplog.set_level("INFO")
    model = built(kind)
    assert mean_of(model, batches(2)) is None and mean_of(model, batches(2)) is None
    assert sum(kind.__name__ in record.message for record in caplog.records) == 1
    assert explained.share({"train_loss": 1.0}, None) == {}


class Drawing(models_mae.MaskedAutoencoderViT):
    """Draws random numbers, and counts its calls."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("calls", torch.zeros(()))

    def random_masking(self, x, mask_ratio, noise=None, **context):
        self.calls += 1
        return super().random_masking(x, mask_ratio, torch.rand_like(noise), **context)


def test_random_numbers_and_buffers_stay():
    model, data = built(Drawing, drop_path_rate=0.1), batches(2)
    before = torch.get_rng_state()
    assert mean_of(model, data) > 0
    assert torch.equal(torch.get_rng_state(), before) and model.calls == 0


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
