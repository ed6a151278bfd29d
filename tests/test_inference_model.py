"""Models from names and files."""

import re
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from mains import assert_equal, call, randomized, weights
from PIL import Image, ImageOps
from skimage import data as photographs

import mae.build
import models_mae
import models_vit
from mae.checkpoints.checkpoint import CheckpointError
from mae.data.pixels import BadImage
from mae.inference import export, features, get_model, inference_model, list_models, maps, reconstruct
from mae.inference.model import Autoencoder, Classifier, Segmenter
from mae.settings import specs
from mae.weights import loading, model_zoo

MMPRETRAIN = "vit-base-p16_mae-1600e-pre_8xb128-coslr-100e_in1k"


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return get_model("vit_mini_patch4", nb_classes=3, classes=["cat", "dog", "owl"])


def test_a_checkpoint_rebuilds_its_model(pretrain):
    out = pretrain(norm_pix_loss=True, in_chans=1, input_size="16 24", mean="0.3", std="0.2", mask_ratio=0.5,
                   decoder_depth=3)  # fmt: skip
    model = get_model(out / "checkpoint-1.pth")
    assert isinstance(model, Autoencoder)
    assert model.grid_size == (4, 6)
    assert model.norm_pix_loss and not model.training
    assert (model.settings["mask_ratio"], len(model.decoder_blocks)) == (0.5, 3)
    assert (model.normalize.mean.item(), model.normalize.std.item()) == pytest.approx((0.3, 0.2))
    assert_equal(model.state_dict(), weights(out))


def saved(model, path, /, **settings):
    torch.save({"model": model.state_dict(), **({"args": settings} if settings else {})}, path)
    return path


def test_recorded_settings_take_precedence_over_inferred_ones(tmp_path, capsys):
    """Images with 16 patches may have 8 x 32 pixels. Without recorded settings, images are assumed to be square."""
    mae = get_model("mae_vit_mini_patch4", input_size=16)
    wide = get_model("mae_vit_mini_patch4", input_size=[8, 32])
    bare = get_model(saved(mae, tmp_path / "bare.pth"))
    assert (bare.settings["input_size"], bare.norm_pix_loss) == (16, True)
    assert "bare.pth does not record norm_pix_loss" in capsys.readouterr().out
    file = saved(wide, tmp_path / "wide.pth", input_size=[8, 32], norm_pix_loss=False, mean=[0.1, 0.2, 0.3])
    recorded = get_model(file)
    assert (recorded.grid_size, recorded.norm_pix_loss) == ((2, 8), False)
    assert "norm_pix_loss" not in capsys.readouterr().out
    assert get_model(file, mean=[0.5, 0.5, 0.5]).normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_the_model_of_a_bare_file_is_inferred_from_its_tensors(tmp_path):
    mini_mae = get_model("mae_vit_mini_patch4", input_size=16)
    model = get_model(saved(mini_mae, tmp_path / "full.pth"))
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert model.settings["input_size"] == 16
    torch.testing.assert_close(model(imgs, noise=noise)[1], mini_mae(imgs, noise=noise)[1])
    encoder = {k: v for k, v in mini_mae.state_dict().items() if not k.startswith("decoder_") and k != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    model = get_model(tmp_path / "encoder.pth")
    assert isinstance(model, Classifier)
    torch.testing.assert_close(model.extract_feat(imgs, "tokens"), mini_mae.forward_features(imgs))
    with pytest.raises(ValueError, match="vit_mini_patch4"):
        model.predict(imgs)
    with pytest.raises(CheckpointError, match="decoder"):
        get_model("mae_vit_mini_patch4", tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="mae_vit_mini_patch4"):
        get_model(tmp_path / "full.pth").predict(imgs)


def test_unknown_sizes_are_errors(tmp_path, classifier):
    weights = {k: v for k, v in classifier.state_dict().items() if not k.startswith("blocks.3.")}
    torch.save({"model": weights}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="128 wide"):
        get_model(tmp_path / "file.pth")


def test_names():
    assert {"vit_base_patch16", "mae_vit_huge_patch14", "mae_visualize_vit_large", MMPRETRAIN} <= set(list_models())
    assert (len(list_models("*_in1k*")), list_models("vit_mini*")) == (24, ["vit_mini_patch4"])
    assert list_models("*dec512d8b") == [f"mae_vit_{size}_dec512d8b" for size in
                                         ("base_patch16", "huge_patch14", "large_patch16")]  # fmt: skip
    assert isinstance(get_model("mae_vit-base-p16_8xb512-amp-coslr-300e_in1k"), Autoencoder)
    with pytest.raises(ValueError, match="did you mean vit_bas"):
        get_model("vit_bas_patch16")
    with pytest.raises(ValueError, match="vit_mini_patch4"):
        get_model("vit_mini_patch4", pretrained=True)
    with pytest.raises(ValueError, match="vit-base-p16_mae-1600e-pre_8xb128"):
        get_model("vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k", pretrained=True)
    with pytest.raises(ValueError, match="num_classes"):
        get_model("vit_mini_patch4", num_classes=10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [
    (MMPRETRAIN, "vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21.pth"),
    ("vit_base_patch16", "mae_finetuned_vit_base.pth")
])  # fmt: skip
def test_published_names_of_other_libraries_are_accepted(tmp_path, monkeypatch, name, file):
    """The cache of torch.hub has a file with the published shapes; another test checks digests."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without_digests = {name: row._replace(digest=None) for name, row in model_zoo.TABLE.items()}
    monkeypatch.setattr(model_zoo, "TABLE", without_digests)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    theirs = get_model("vit_base_patch16")
    torch.save({"model": theirs.state_dict()}, tmp_path / "hub" / "checkpoints" / file)
    Image.fromarray(photographs.astronaut()).save(tmp_path / "photo.jpg")
    result = inference_model(name if name == MMPRETRAIN else get_model(name, pretrained=True), tmp_path / "photo.jpg")
    scores = theirs(theirs.prepare(tmp_path / "photo.jpg")).detach().softmax(dim=1)[0]
    assert result["pred_label"] == int(scores.argmax())
    assert result["pred_score"] == pytest.approx(float(scores.max()))
    np.testing.assert_allclose(result["pred_scores"], scores.numpy(), rtol=1e-5)
    assert result["pred_class"] == theirs.classes[result["pred_label"]]
    assert theirs.classes[281] == "tabby, tabby cat"


def test_published_weights_have_the_settings_of_their_row(monkeypatch):
    row = model_zoo.TABLE["mae_visualize_vit_large"]
    monkeypatch.setitem(model_zoo.TABLE, "mini", row._replace(input_size=16, norm_pix_loss=False))
    state = models_mae.mae_vit_mini_patch4(img_size=16).state_dict()
    monkeypatch.setattr(loading, "read", lambda source: loading.Weights(state, {}, model_zoo.FULL, source))
    assert not get_model("mae_vit_mini_patch4", pretrained="mini").norm_pix_loss
    assert get_model("mae_vit_mini_patch4", pretrained="file.pth").norm_pix_loss
    assert not get_model(
        "mae_vit_mini_patch4", pretrained="folder/mae_visualize_vit_large.pth", input_size=16
    ).norm_pix_loss


def test_published_weights_are_those_of_the_architecture(monkeypatch):
    """The published ViT-H has patches of 14 pixels. A model of pre-training has pooled features with any settings."""
    for name in ("vit_huge_patch16", "mae_vit_huge_patch16"):
        with pytest.raises(ValueError, match=name):
            get_model(name, pretrained=True)
    model = get_model("mae_vit_mini_patch4", input_size=16, global_pool=True)
    assert model.extract_feat(torch.rand(2, 3, 16, 16)).shape == (2, 128)


def test_kinds_of_images(tmp_path, classifier):
    pixels = photographs.chelsea()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "cat.png")
    wanted = classifier.prepare(tmp_path / "cat.png")
    assert wanted.shape == (1, 3, 32, 32)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (str(tmp_path / "cat.png"), picture, pixels, pixels.transpose(2, 0, 1), tensor, tensor[None], wanted,
                  wanted[0], [picture], (pixels,)):  # fmt: skip
        assert torch.equal(classifier.prepare(image), wanted)
    assert torch.equal(classifier.prepare([picture, tensor, pixels]), wanted.expand(3, -1, -1, -1))
    sideways = picture.rotate(90, expand=True)
    sideways.getexif()[0x0112] = 6  # turned a quarter clockwise when shown
    sideways.save(tmp_path / "sideways.png", exif=sideways.getexif())
    assert torch.equal(classifier.prepare(tmp_path / "sideways.png"), wanted)
    assert classifier.prepare(picture.convert("L")).shape == wanted.shape
    assert classifier.prepare(Image.new("RGB", (1, 1))).shape == wanted.shape


def test_lists_of_two_kinds_and_images_of_other_channels_are_errors(classifier):
    pixels = photographs.chelsea()
    for images in ([], (), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(ValueError, match="empty"):
            classifier.predict(images)
    for images in ([pixels, torch.zeros(3, 32, 32)], [torch.zeros(3, 32, 32), torch.zeros(3, 32, 32).byte()]):
        with pytest.raises(ValueError, match="float tensors"):
            classifier.predict(images)
    with pytest.raises(BadImage, match="in_chans=3"):
        classifier.predict(np.zeros((8, 8, 5), dtype=np.uint8))


def test_predictions(classifier):
    images = [photographs.chelsea(), photographs.coffee()]
    both = classifier.predict(images)
    one = classifier.predict(images[0], topk=2)
    np.testing.assert_allclose(one["pred_scores"], both[0]["pred_scores"], rtol=1e-5)
    assert one["pred_scores"].sum() == pytest.approx(1)
    assert one["pred_class"] == ["cat", "dog", "owl"][one["pred_label"]]
    assert one["top"][0][0] == one["pred_class"]
    assert dict(zip(one["classes"], one["pred_scores"], strict=True)) == pytest.approx(dict(both[0]["top"]))
    assert (len(both), len(one["top"]), len(both[0]["top"]), len(classifier.predict(images[:1]))) == (2, 2, 3, 1)


def test_features(classifier):
    imgs = torch.randn(2, 3, 32, 32)
    tokens = classifier.extract_feat(imgs, "tokens")
    assert tokens.shape == (2, 65, 128)
    torch.testing.assert_close(classifier.extract_feat(imgs), classifier.forward_features(imgs))
    torch.testing.assert_close(classifier.extract_feat(imgs, "avg"), classifier.fc_norm(tokens[:, 1:].mean(dim=1)))
    mae = get_model("mae_vit_mini_patch4")
    tokens = mae.forward_features(imgs)
    torch.testing.assert_close(mae.extract_feat(imgs), tokens[:, 0])
    torch.testing.assert_close(mae.extract_feat(imgs, "avg"), tokens[:, 1:].mean(dim=1))
    with pytest.raises(ValueError, match="cls, avg, both or tokens"):
        mae.extract_feat(imgs, "max")


@pytest.mark.parametrize("kind", ["probe", "segmenter", "autoencoder", "attentive"])
def test_inference_is_independent_of_the_training_mode_and_changes_nothing(tmp_path, kind):
    """Also with batch norm in the head, and with dropout, or without evaluation mode, in some modules only."""
    name = "mae_vit_mini_patch4" if kind == "autoencoder" else "vit_mini_patch4"
    settings = {"input_size": 32, "nb_classes": 3, "global_pool": False, "in_chans": 3, "head": "dpt", "model": name}
    settings |= {"probe": "attentive" if kind == "attentive" else "linear"}
    model = {"segmenter": Segmenter, "autoencoder": Autoencoder}.get(kind, Classifier)(settings)
    model.blocks[1].drop_path = torch.nn.Dropout(0.5)
    model.eval()
    images = [photographs.chelsea()[:40, :40], photographs.coffee()[:40, :40]]
    uses = {
        "features": lambda: model.extract_feat(images),
        "patches": lambda: maps.dense(model, images, layers=2),
        "attention": lambda: maps.attention(model, images),
        "components": lambda: maps.components(model, images),
        **{
            "probe": {"predict": lambda: model.predict(images)[0]["pred_scores"]},
            "attentive": {"queries": lambda: maps.query_attention(model, images)},
            "segmenter": {"segment": lambda: model.segment(images[0])},
            "autoencoder": {"reconstruct": lambda: reconstruct.reconstruct(model, images[0]).pasted},
        }[kind],
    }
    expected = {name: use() for name, use in uses.items()}
    model.train().blocks[0].eval()
    modes, before = [module.training for module in model.modules()], deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    for name, use in uses.items():
        found = use()
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected[name]), err_msg=name)  # has no graph
    export.export(model, "safetensors", tmp_path / "model.safetensors")
    assert [module.training for module in model.modules()] == modes
    assert_equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_features_have_gradients_if_asked(classifier):
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    assert not classifier.extract_feat(images).requires_grad
    features = classifier.extract_feat(images, requires_grad=True)
    (found,) = torch.autograd.grad(features.square().sum(), images)
    (expected,) = torch.autograd.grad(classifier.forward_features(images).square().sum(), images)
    torch.testing.assert_close(found, expected)
    torch.nn.Linear(128, 1)(classifier.extract_feat(images)).sum().backward()  # a head can be trained on the features


def test_float_images_of_another_range_have_one_warning(caplog):
    """Arrays and files of 0 to 255, and float tensors, the input of the model, that are not normalized."""
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", nb_classes=3, crop_pct=1.0)
    pixels = photographs.chelsea()[:32, :32]
    pixels[0, :2] = [[0], [255]]
    floats, tensor = pixels.astype(np.float32), torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    right = model.extract_feat(pixels)

    def ends(image):
        caplog.clear()
        new = deepcopy(model)
        found = new.extract_feat(image)
        new.predict(image[0] if image.ndim == 4 else image)
        matches = [re.search(r"from (\S+) to (\S+), and mean", record.getMessage()) for record in caplog.records]
        assert bool(matches) != np.allclose(found, right, atol=1e-4)  # a warning, or the right features
        return [match.groups() for match in matches]

    assert [ends(image) for image in (pixels, floats / 255, model.normalize(tensor / 255))] == [[], [], []]
    assert ends(floats) == ends(tensor) == [("0", "255")]
    assert ends(tensor / 255) == [("0", "1")]
    own = get_model("vit_mini_patch4", crop_pct=1.0, mean=[127.0] * 3, std=[73.0] * 3)
    own.extract_feat(floats)
    assert not [record for record in caplog.records if "from 0 to 255" in record.getMessage()]


def test_attention_is_what_the_blocks_compute(classifier):
    imgs = torch.randn(2, 3, 32, 32)
    layers, maps = classifier.get_intermediate_layers(imgs, n=2, norm=False, return_attention=True)
    assert [m.shape for m in maps] == [(2, 4, 65, 65)] * 2
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 4, 65))
    block = classifier.blocks[3]
    x = block.norm1(layers[0])
    value = block.attn.qkv(x).reshape(2, 65, 3, 4, 32)[:, :, 2].transpose(1, 2)
    mixed = (maps[1] @ value).transpose(1, 2).reshape(2, 65, 128)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(x))


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path, classifier):
    classifier.save_pretrained(tmp_path / "folder")
    for again in (Classifier.from_pretrained(tmp_path / "folder"), get_model(tmp_path / "folder")):
        assert again.classes == ["cat", "dog", "owl"]
        assert not again.training
        assert_equal(again.state_dict(), classifier.state_dict())


def test_bytes_are_refused_where_the_mean_is_of_other_values():
    """Also beside float images, with which they would be floats."""
    model = get_model("vit_mini_patch4", input_size=16, in_chans=1, nb_classes=2, mean=[1200], std=[300])
    deep, image = np.full((16, 16), 1300, np.float32), np.full((16, 16), 99, np.uint8)
    assert model.prepare([deep, deep]).mean() > 0.3
    for images in (image, [deep, image]):
        with pytest.raises(ValueError, match="8-bit"):
            model.prepare(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_predict_as_those_of_full_precision(dtype):
    """In bf16, the mean 4005 would be 4000."""
    settings = {"in_chans": 1, "input_size": 16, "mean": [4005], "std": [2]}
    model = randomized(get_model("vit_mini_patch4", nb_classes=3, **settings), 0.05)
    values = np.random.default_rng(0).normal(4005, 2, (2, 16, 16)).astype(np.float32)
    scores = [one["pred_scores"] for one in model.predict(list(values))]
    features = model.extract_feat(list(values))
    assert model.to(dtype).extract_feat(list(values)).dtype == dtype
    np.testing.assert_allclose([one["pred_scores"] for one in model.predict(list(values))], scores, atol=0.01)
    torch.testing.assert_close(model.extract_feat(list(values)).float(), features, atol=0.05, rtol=0)


def test_amp_changes_results_by_rounding_only():
    image = photographs.chelsea()[:40, :40]
    classifier = randomized(get_model("vit_mini_patch4", nb_classes=3, input_size=32), 0.05)
    mae = randomized(get_model("mae_vit_mini_patch4", input_size=32), 0.05)
    uses = (
        lambda **amp: torch.from_numpy(classifier.predict(image, **amp)["pred_scores"]),
        lambda **amp: classifier.extract_feat(image, **amp),
        lambda **amp: reconstruct.reconstruct(mae, image, **amp).pasted,
    )
    for use in uses:
        expected, rounded = use(), use(amp="bf16")
        assert torch.equal(use(amp="off"), expected) and torch.equal(use(amp="auto"), expected)
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, expected)
        assert (rounded - expected).norm() / expected.norm() < 0.02
        with pytest.raises(KeyError, match="fp8"):
            use(amp="fp8")


@pytest.mark.filterwarnings("ignore")  # deprecated, and shapes become constants
def test_a_trace_equals_the_classifier():
    model = get_model("vit_mini_patch4", nb_classes=3, input_size=16)
    images = torch.randn(3, 3, 16, 16)
    traced = torch.jit.trace(model, images[:2])
    torch.testing.assert_close(traced(images), model(images), atol=1e-6, rtol=1e-6)


def test_from_pretrained_requires_the_weights_of_its_class(tmp_path, classifier):
    """A head with random weights predicts classes, too."""
    classifier.head = torch.nn.Identity()
    classifier.save_pretrained(tmp_path / "folder")
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        Classifier.from_pretrained(tmp_path / "folder")


def test_an_encoder_of_a_checkpoint_under_a_new_head(pretrain):
    file = pretrain() / "checkpoint-1.pth"
    model = get_model("vit_mini_patch4", file, nb_classes=7)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 7)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, get_model(file).blocks[0].mlp.fc1.weight)


def test_results_of_random_weights_have_one_warning(tmp_path, caplog, classifier):
    """Also those of a new head. Weights that were loaded or trained since have none."""
    image, file = photographs.chelsea(), tmp_path / "model.safetensors"

    def warnings(model, *uses):
        caplog.clear()
        for use in uses:
            if use == "export":
                export.export(model, "safetensors", file)
            elif use == "reconstruct":
                reconstruct.reconstruct(model, image)
            else:
                getattr(model, use)(image)
        return sum("random" in record.getMessage() for record in caplog.records)

    all_uses = ("extract_feat", "predict", "predict", "export")
    assert warnings(classifier, *all_uses) == 1
    assert warnings(get_model("vit_mini_patch4", nb_classes=3), "export") == 1
    later = get_model("vit_mini_patch4", nb_classes=3)
    later.load_state_dict(classifier.state_dict())
    for loaded in (get_model(file), later):
        assert warnings(loaded, *all_uses) == 0
    trained, tuned = (get_model(file, nb_classes=5) for _ in range(2))
    assert (warnings(tuned, "extract_feat"), warnings(tuned, "predict")) == (0, 1)
    trained(torch.randn(2, 3, 32, 32)).square().sum().backward()
    torch.optim.AdamW(trained.head.parameters(), lr=1e-2).step()
    assert warnings(trained, "predict") == 0
    mae = get_model("mae_vit_mini_patch4")
    assert (warnings(export.encoder_of(mae), "export"), warnings(mae, "reconstruct")) == (1, 1)


def test_a_new_head_does_not_use_the_recorded_class_names(tmp_path, classifier):
    """Class names of a run, or of the config.json of transformers, do not fit another number of classes."""
    names, others = ["cat", "dog", "owl"], ["a", "b", "c"]
    for recorded in ({"classes": names}, {"label_names": names}, {"classes": names, "label_names": others}):
        file = saved(classifier, tmp_path / "file.pth", **recorded)
        assert get_model(file).classes == get_model(file, nb_classes=3).classes == names
        other = get_model(file, nb_classes=5)
        assert other.classes is None
        found = {name for name, _ in other.predict(photographs.chelsea())["top"]}
        assert found == {f"class {label}" for label in range(5)}


def test_the_recorded_model_takes_precedence_over_shapes(tmp_path, monkeypatch):
    """Two sizes that differ only in the number of heads have equal shapes and different predictions."""
    heads8 = {**models_vit.SIZES["mini_patch4"], "num_heads": 8}
    monkeypatch.setitem(models_vit.SIZES, "heads8_patch4", heads8)
    monkeypatch.setitem(models_vit.MODELS, "vit_heads8_patch4", partial(models_vit.VisionTransformer, **heads8))
    settings = {"input_size": 32, "patch_size": None, "in_chans": 3, "global_pool": True, "nb_classes": 5}
    imgs = torch.randn(2, 3, 32, 32)
    for name, heads in (("vit_heads8_patch4", 8), ("vit_mini_patch4", 4)):
        model = mae.build.classifier(*specs({**settings, "model": name})).eval()
        again = get_model(saved(model, tmp_path / f"{name}.pth", **settings, model=name))
        assert again.blocks[0].attn.num_heads == heads
        assert torch.equal(again(imgs), model(imgs))
    saved(model, tmp_path / "bare.pth")
    remedy = f'use get_model("vit_mini_patch4", pretrained="{tmp_path}/bare.pth"), or another'
    with pytest.raises(CheckpointError, match="mini_patch4 and heads8_patch4") as error:
        get_model(tmp_path / "bare.pth")
    assert remedy in str(error.value)
    assert torch.equal(get_model("vit_mini_patch4", pretrained=tmp_path / "bare.pth", nb_classes=5)(imgs), model(imgs))
    flat = mae.build.classifier(*specs({**settings, "model": "vit_mini_patch4", "input_size": [32, 20]}))
    with pytest.raises(CheckpointError, match="input_size="):
        get_model(saved(flat, tmp_path / "flat.pth"))


@pytest.mark.parametrize("fast", [[], ["--fast_jpeg"]])
@pytest.mark.parametrize(("recorded", "flags", "turned"), [
    (None, [], False), (None, ["--exif"], True), (True, [], True), (False, [], False), (True, ["--no_exif"], False),
])  # fmt: skip
def test_the_orientation_in_a_dataset(recorded, flags, turned, fast, tmp_path):
    """Datasets are turned by a choice, which a file records. Single photographs are, unless a file says no."""
    exif = Image.Exif()
    exif[274] = 6
    folder = tmp_path / "images/train/photos"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif)
    file = tmp_path / "model.safetensors"
    model = get_model("vit_mini_patch4", **({} if recorded is None else {"exif": recorded}))
    export.export(model, "safetensors", file)
    call(features, tmp_path / "images", *flags, *fast, model=file, out=tmp_path / "f.npz", num_workers=0)
    stored = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    with Image.open(folder / "a.jpg") as picture:
        upright = {True: ImageOps.exif_transpose(picture), False: picture.copy()}
    torch.testing.assert_close(stored, model.extract_feat(upright[turned]), rtol=1e-3, atol=1e-3)
    alone = get_model(file).extract_feat(folder / "a.jpg")
    torch.testing.assert_close(alone, model.extract_feat(upright[recorded is not False]), rtol=1e-3, atol=1e-3)
