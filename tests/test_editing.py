"""Changes of the method take effect: in the file, in a subclass, in a submodule."""

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from mains import lines, small_run
from test_models_mae import build
from torch import nn
from torch.nn import functional as F

import models_vit
from examples.hog_target import HOGTarget
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import get_model
from mae.weights import loading, model_settings
from models_mae import MaskedAutoencoderViT

SETTINGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "decoder_embed_dim": 16,
            "decoder_depth": 1, "decoder_num_heads": 2}  # fmt: skip


@pytest.fixture
def train(pretrain):
    """Trains a class by the script; returns the losses of the epochs."""

    def run(kind: type, name: str = "", **flags) -> list[float]:
        out = pretrain(name or kind.__name__, of_main={"model_class": kind}, **{"vis_every": 1} | flags)
        return [line["train_loss"] for line in lines(out)]

    return run


NEW_SIZE = """
import sys
import main_finetune, main_pretrain, models_vit
from mae import inference
from mae.cli import entry_point
entry_point.run(main_pretrain.main, main_pretrain.get_args_parser())
model = inference.get_model("run/checkpoint-1.pth")
assert model.blocks[0].attn.num_heads == 8
sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in (model.blocks, model.decoder_blocks)]
assert 0 < sizes[1] < sizes[0] / 2  # the decoder is that of a small encoder
assert inference.get_model("vit_heads8_patch4", "run/checkpoint-1.pth", nb_classes=0).blocks[0].attn.num_heads == 8
assert models_vit.MODELS["vit_heads8_patch4"]().blocks[0].attn.num_heads == 8
entry_point.parse(main_finetune.get_args_parser(), ["--model", "vit_heads8_patch4"])
"""


@pytest.mark.slow
def test_a_new_size_needs_one_entry(pictures, tmp_path):
    """It trains by its name, and checkpoints restore its number of heads, which no shape records."""
    mini = '    "mini_patch4": {'
    heads = '    "heads8_patch4": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 8},\n'
    for path in [*ROOT.glob("*.py"), ROOT / "util", ROOT / "mae"]:
        (tmp_path / path.name).symlink_to(path)
    source = (ROOT / "models_vit.py").read_text()
    assert source.count(mini) == 1
    (tmp_path / "models_vit.py").unlink()
    (tmp_path / "models_vit.py").write_text(source.replace(mini, heads + mini))
    argv = small_run(pictures, "run", "--model", "mae_vit_heads8_patch4", "--batch_size", 4, "--epochs", 2)
    subprocess.run([sys.executable, "-c", NEW_SIZE, *argv], cwd=tmp_path, check=True)


class FirstPatches(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio, **context):
        return super().random_masking(x, mask_ratio, torch.arange(16.0).expand(len(x), -1))


class LargerLatent(MaskedAutoencoderViT):
    def forward_encoder(self, imgs, mask_ratio, **context):
        latent, mask, ids_restore = super().forward_encoder(imgs, mask_ratio, **context)
        return 2 * latent, mask, ids_restore


class ShiftedPrediction(MaskedAutoencoderViT):
    def forward_decoder(self, latent, ids_restore, **context):
        return super().forward_decoder(latent, ids_restore, **context) + 1


class AbsoluteError(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, **context):
        loss = (pred - self.patchify(imgs)).abs().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


class MeanColor(MaskedAutoencoderViT):
    target_dim = 3

    def target(self, imgs, **context):
        return self.patchify(imgs).unflatten(2, (-1, 3)).mean(dim=2)


SUBCLASSES = [FirstPatches, LargerLatent, ShiftedPrediction, AbsoluteError, MeanColor]


# The published signatures, as scripts of their own have them.
class PublishedMasking(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x, mask_ratio, torch.arange(16.0).expand(len(x), -1))


class PublishedEncoder(MaskedAutoencoderViT):
    def forward_encoder(self, imgs, mask_ratio):
        latent, mask, ids_restore = super().forward_encoder(imgs, mask_ratio)
        return 2 * latent, mask, ids_restore


class PublishedLoss(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        loss = (pred - self.patchify(imgs)).abs().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


class PublishedForward(MaskedAutoencoderViT):
    def forward(self, imgs, mask_ratio=0.75):
        return super().forward(imgs, mask_ratio)


PUBLISHED = {PublishedMasking: FirstPatches, PublishedEncoder: LargerLatent, PublishedLoss: AbsoluteError,
             PublishedForward: MaskedAutoencoderViT}  # fmt: skip


def expected_loss(kind: type, imgs: torch.Tensor, noise: torch.Tensor, model: MaskedAutoencoderViT) -> torch.Tensor:
    """The loss of an overridden model, from the published steps."""
    base = MaskedAutoencoderViT
    if kind is FirstPatches:
        noise = torch.arange(16.0).expand(len(imgs), -1)
    x, mask, ids_restore = base.random_masking(model, model.patch_embed(imgs) + model.pos_embed[:, 1:], 0.75, noise)
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(imgs), -1, -1)
    latent = model.norm(model.blocks[0](torch.cat([cls_token, x], dim=1)))
    pred = base.forward_decoder(model, 2 * latent if kind is LargerLatent else latent, ids_restore)
    pred = pred + 1 if kind is ShiftedPrediction else pred
    error = pred - (kind.target if kind is MeanColor else base.target)(model, imgs)
    error = error.abs() if kind is AbsoluteError else error.square()
    return (error.mean(dim=-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("kind", "graph"), [*itertools.product(SUBCLASSES, [False, True]), *itertools.product(PUBLISHED, [False])]
)
def test_an_override_takes_effect(kind, graph):
    """With the published signature, in a script that passes no noise."""
    model, imgs, noise = kind(**SETTINGS), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    options = {"noise": noise}
    if kind in PUBLISHED:  # it draws its masks
        torch.manual_seed(3)
        noise, options = torch.rand(2, 16), {}
    expected = expected_loss(PUBLISHED.get(kind, kind), imgs, noise, model)
    torch.manual_seed(3)
    if graph:  # --compile records the same graph
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    loss = model(imgs, 0.75, **options)[0]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_subclasses_train_by_the_script(train):
    published = train(MaskedAutoencoderViT)
    for kind in SUBCLASSES:
        own = train(kind)
        assert own[1] < own[0], kind
        assert own[0] != pytest.approx(published[0], rel=1e-3), kind


@pytest.mark.parametrize(("kind", "lacking"), [
    (PublishedMasking, "def random_masking(self, x, mask_ratio, **context)"),
    (PublishedEncoder, "forward_encoder(self, imgs, mask_ratio, **context)"),
    (PublishedLoss, "def forward_loss(self, imgs, pred, mask, **context)"),
    (PublishedForward, "def forward(self, imgs, mask_ratio, **context)"),
])  # fmt: skip
def test_the_script_refuses_an_override_without_the_context(kind, lacking, train, tmp_path):
    """The masks would depend on the number of processes."""
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{re.escape(lacking)}"):
        train(kind, "run")
    assert not (tmp_path / "run/log.txt").exists()


def test_the_example_of_a_target_by_hand():
    columns = torch.arange(16.0).expand(1, 3, 16, 16)  # the gradient is horizontal everywhere
    found = HOGTarget(**SETTINGS).target(columns)
    assert torch.equal(found, F.one_hot(torch.zeros(1, 16, dtype=torch.long), 9).float())


@pytest.mark.parametrize("dim", [1, 48])
def test_a_target_of_another_shape_is_an_error_and_not_broadcast(dim):
    shapes = rf"the target is \(2, 16, 3\) and the prediction \(2, 16, {dim}\): .* is {dim}$"
    with pytest.raises(ValueError, match=shapes):
        type("Wrong", (MeanColor,), {"target_dim": dim})(**SETTINGS)(torch.randn(2, 3, 16, 16))


class Gradients(MaskedAutoencoderViT):
    """A target that is not pixels and has as many values as a patch."""

    def target(self, imgs, **context):
        return self.patchify(imgs.diff(dim=2, append=imgs[:, :, -1:]))


@pytest.mark.parametrize("kind", [MeanColor, Gradients])
def test_a_file_of_another_target_gives_its_encoder(kind, train, tmp_path):
    """Shapes do not show that the target of the second one is not pixels."""
    train(kind, epochs=1)
    file, model, imgs = tmp_path / kind.__name__ / "checkpoint-0.pth", kind(**WIDE).eval(), torch.randn(2, 3, 16, 16)
    encoder = get_model(file)
    assert type(encoder).__name__ == "Classifier"
    model.load_state_dict(torch.load(file)["model"])
    torch.testing.assert_close(encoder.extract_feat(imgs, "tokens"), model.forward_features(imgs))


class OwnHead(MaskedAutoencoderViT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decoder_pred = nn.Linear(16, 9)


class LogsParts(MaskedAutoencoderViT):
    def forward(self, imgs, mask_ratio=0.75, **context):
        return *super().forward(imgs, mask_ratio, **context), {"pixels": 1.0}


class IgnoredNoise(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio, **context):
        return super().random_masking(x, mask_ratio, torch.rand(x.shape[:2]))


def test_reconstruct_fits_the_edited_model():
    imgs, mask = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, -1) % 4 > 0
    assert torch.equal(LogsParts(**SETTINGS).reconstruct(imgs, mask=mask).mask.bool(), mask)
    for kind in (OwnHead, MeanColor, Gradients):
        with pytest.raises(ValueError, match=rf"^{kind.__name__} .*pixels"):
            kind(**SETTINGS).reconstruct(imgs)
    for call in (IgnoredNoise(**SETTINGS), IgnoredNoise(**SETTINGS).reconstruct):
        with pytest.raises(ValueError, match=r"IgnoredNoise.random_masking"):
            call(imgs, mask=mask)
    with pytest.raises(TypeError, match="noise"):
        PublishedMasking(**SETTINGS).reconstruct(imgs, mask=mask)


class Distills(MaskedAutoencoderViT):
    """Has weights that only pre-training needs, a second decoder, and a name that foreign files have, too."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("kernel", torch.ones(3))
        self.register_tokens = nn.Parameter(torch.ones(1, 4, 128))
        self.projection = nn.Linear(128, 7)
        self.decoder_blocks_hog = nn.ModuleList([models_vit.Block(16, 2)])


WIDE = {**SETTINGS, "embed_dim": 128, "depth": 4, "decoder_embed_dim": 64}  # mini_patch4


def test_weights_of_a_subclass_are_left_out_elsewhere(train, tmp_path, capsys):
    train(Distills, decoder_depth=1, epochs=1)
    file = tmp_path / "Distills" / "checkpoint-0.pth"
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    weights = torch.load(file)["model"]
    trained = MaskedAutoencoderViT(**WIDE).eval()
    trained.load_state_dict(weights, strict=False)
    model = get_model(file)
    torch.testing.assert_close(model.reconstruct(imgs, noise=noise), trained.reconstruct(imgs, noise=noise))
    assert f"{file} was trained with the class Distills, and this model lacks" in capsys.readouterr().out
    encoder = models_vit.vit_mini_patch4(img_size=16, num_classes=0)
    loading.load_encoder(encoder, loading.read(file))
    torch.testing.assert_close(encoder.state_dict(), {name: weights[name] for name in encoder.state_dict()})
    assert "the class Distills: kernel, projection.bias, projection.weight" in capsys.readouterr().out

    same_name = type("MaskedAutoencoderViT", (MaskedAutoencoderViT,), {"__module__": "mine"})
    for kind, is_other in ((MaskedAutoencoderViT, True), (same_name, False)):
        torch.save({"model": weights, "args": {"model_class": "mine:MaskedAutoencoderViT"}}, tmp_path / "same.pth")
        loading.init_mae(kind(**WIDE), loading.read(tmp_path / "same.pth"))
        assert ("this model lacks" in capsys.readouterr().out) == is_other
    del weights["blocks.3.attn.qkv.weight"]
    torch.save({"model": weights, "args": {"model_class": "Distills"}}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"blocks.3.attn.qkv.weight"):
        loading.load_encoder(encoder, loading.read(tmp_path / "part.pth"))


def test_a_subclass_starts_from_weights_of_the_base_class(tmp_path, caplog):
    base, own = MaskedAutoencoderViT(**WIDE), Distills(**WIDE)
    initial = own.projection.weight.clone()
    torch.save({"model": base.state_dict()}, tmp_path / "m.pth")
    loading.init_mae(own, loading.read(tmp_path / "m.pth"))
    torch.testing.assert_close({name: own.state_dict()[name] for name in base.state_dict()}, dict(base.state_dict()))
    assert torch.equal(own.projection.weight, initial)
    assert "m.pth has no decoder_blocks_hog" in caplog.text and "keep their initial values" in caplog.text


def test_a_second_decoder_in_the_file_does_not_count(tmp_path):
    """As in an edit of models_mae.py, of which the file records nothing."""
    torch.save({"model": Distills(**WIDE).state_dict()}, tmp_path / "m.pth")
    file = loading.Weights(torch.load(tmp_path / "m.pth")["model"], {}, "full", "m.pth")
    assert model_settings.file_settings(file, "mae_vit_mini_patch4")["decoder_depth"] == 1


def test_a_call_does_not_affect_the_noise_of_later_calls():
    """A later call uses new random numbers and the grid of the model, also after an error."""
    model, imgs = build(), torch.randn(2, 3, 12, 28)
    with pytest.raises(ValueError, match="noise or mask"):
        model(imgs, noise=torch.rand(2, 20))
    model(imgs, noise=torch.arange(21.0).expand(2, -1))
    latent, mask, ids_restore = model.forward_encoder(torch.randn(2, 3, 16, 16), 0.75)
    assert not torch.equal(mask[0], mask[1])
    assert model.forward_decoder(latent, ids_restore).shape == (2, 16, 48)


def test_concurrent_calls_use_their_own_noise():
    """The web page serves two requests at once with one model."""
    model, imgs = build(depth=8), torch.randn(4, 3, 16, 16)
    noises = [torch.rand(4, 16) for _ in range(32)]
    expected = [model(imgs, noise=noise)[2] for noise in noises]
    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda noise: model(imgs, noise=noise)[2], noises))
    assert all(map(torch.equal, masks, expected))


def test_the_steps_of_a_wide_image_give_the_predictions_of_forward():
    """16 x 64 pixels have as many patches as the 32 x 32 pixels of the model."""
    model, imgs = MaskedAutoencoderViT(**{**SETTINGS, "img_size": 32}).eval(), torch.randn(2, 3, 16, 64)
    latent, _, ids_restore = model.forward_encoder(imgs, 0.0)
    torch.testing.assert_close(model.forward_decoder(latent, ids_restore, grid_size=(4, 16)), model(imgs, 0.0)[1])


class Patches(models_vit.PatchEmbed):
    def forward(self, imgs):
        return 2 * super().forward(imgs)


class Projection(nn.Module):
    """Wraps a layer like an adapter."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


class OwnBlock(models_vit.Block):
    def forward(self, x):
        return super().forward(x) + torch.arange(x.shape[2])


class OwnAttention(models_vit.Attention):
    def forward(self, x):
        return super().forward(x) + torch.arange(x.shape[2])


CHANGES = {
    "sequential": lambda model: setattr(model.patch_embed, "proj", nn.Sequential(model.patch_embed.proj)),
    "patch_embed": lambda model: setattr(model, "patch_embed", Patches(16, 4, 3, 32)),
    "proj": lambda model: setattr(model.patch_embed, "proj", Projection(model.patch_embed.proj)),
    "hook": lambda model: model.patch_embed.register_forward_hook(lambda *call: 2 * call[2]),
    "decoder_block": lambda model: model.decoder_blocks.__setitem__(1, OwnBlock(16, 2)),
    "decoder_attention": lambda model: setattr(model.decoder_blocks[1], "attn", OwnAttention(16, 2)),
    "no_block": lambda model: model.decoder_blocks.__setitem__(1, nn.Identity()),
    "block": lambda model: model.blocks.__setitem__(1, OwnBlock(32, 4)),
    "attention": lambda model: setattr(model.blocks[1], "attn", OwnAttention(32, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_part_takes_effect(change):
    model, imgs, noise = build().double(), torch.randn(2, 3, 16, 16).double(), torch.rand(2, 16)
    before = model(imgs, noise=noise)[0]
    CHANGES[change](model)
    after = model.double()(imgs, noise=noise)[0]
    assert after == before if change == "sequential" else abs(after - before) > 1e-4 * before
