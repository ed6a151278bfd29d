"""Extra inputs of images: from datasets of the user's code and from columns of lists, to the model."""

import io
import json
import os
from inspect import signature

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import assert_equal, fails, in_processes, lines, open_source, parse, stop_and_resume, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_decode import saved
from torchvision import tv_tensors

import mae.build
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from examples.ground_positions import GroundPositions
from mae.context import RESERVED, STEPS
from mae.data import loader, transforms
from mae.data.decode import decode
from mae.data.item import Item
from mae.data.pixels import BadImage
from mae.data.samples import Samples
from mae.data.source import versions
from mae.inference import export, features, get_model
from mae.position_tables import get_2d_sincos_pos_embed
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder, VisionTransformer

# The pixels are noise. The target, and the class, is determined by the extra input `level` alone.
CODE = """
import numpy as np
import torch
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder
class Level(Encoder):
    def tokenize(self, imgs, level, **context):
        return super().tokenize(imgs, **context) + 3 * level[:, None, None] * self.cls_token.detach().sign()
class LevelTarget(MaskedAutoencoderViT):
    target_dim = 1
    def target(self, imgs, level=None, **context):
        return level[:, None, None].expand(-1, self.num_patches, 1)
class DecoderLevel(LevelTarget):
    def decoder_positions(self, grid, *, level, **context):
        positions = super().decoder_positions(grid, **context)
        return positions + 3 * level[:, None, None] * self.mask_token.detach().sign()
class Painted(MaskedAutoencoderViT):
    def forward_decoder(self, latent, ids_restore, grid_size=None, *, level, **context):
        return 0 * super().forward_decoder(latent, ids_restore, grid_size, **context) + 9 * level[:, None, None]
def open_dataset(split, data_path):
    return Noise(split)
def open_without(split, data_path):
    return [(Noise(split)[index]["image"], index % 2) for index in range(8)]
class Noise:
    def __init__(self, split):
        self.split = split
        self.labels = [number % 2 for number in range(len(self))]
    def __len__(self):
        return 32
    def __getitem__(self, index):
        generator = np.random.default_rng([index, self.split == "val"])
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return {"image": pixels, "label": index % 2, "level": float(2 * (index % 2) - 1)}
"""
DATASET = "py:levels:open_dataset"
BLACK = np.zeros((16, 16, 3), np.uint8)
OWN = {"encoder": "levels:Level", "model_class": "levels:LevelTarget"}
TRAIN = {"dataset": DATASET, "epochs": 12, "batch_size": 8, "blr": 0.1, "num_workers": 1}


@pytest.fixture
def levels(own_module):
    return own_module("levels", CODE)


def whole_and_resumed(pretrain, monkeypatch, **flags):
    """Checks that an interrupted run resumes to the bit; returns the loss of the whole run."""
    flags = TRAIN | flags
    whole, parts = pretrain("whole", **flags), stop_and_resume(monkeypatch, pretrain, 10, **flags)
    assert_equal(weights(whole, "checkpoint-11.pth"), weights(parts, "checkpoint-11.pth"))
    return lines(whole)[-1]["train_loss"]


def opened(items):
    return open_source("train", dataset="py:any:any", function=lambda split, data_path: items)


@pytest.mark.slow
def test_a_target_that_only_the_extra_determines_is_learned_with_it_only(levels, pretrain, monkeypatch):
    """The loss of a constant prediction is 1."""
    assert whole_and_resumed(pretrain, monkeypatch, **OWN) < 0.05
    blind = pretrain("blind", **TRAIN, model_class=OWN["model_class"])
    assert lines(blind)[-1]["train_loss"] > 0.8


@pytest.mark.slow
def test_a_target_that_only_the_extra_determines_is_learned_by_a_decoder_that_takes_it(levels, pretrain, monkeypatch):
    assert whole_and_resumed(pretrain, monkeypatch, model_class="levels:DecoderLevel") < 0.05


@pytest.mark.slow
def test_a_decoder_has_the_extra_in_two_processes_and_in_pictures(levels, pictures, tmp_path):
    """The prediction of an image is its extra input: black or white."""
    flags = ("--dataset", DATASET, "--model_class", "levels:Painted", "--epochs", 1, "--vis_every", 1)
    for count in (1, 2):
        in_processes(count, pictures, tmp_path / str(count), *flags, "--batch_size", 8 // count,
                     environment={"PYTHONPATH": str(levels)})  # fmt: skip
    one, two = (lines(tmp_path / name)[0]["train_loss"] for name in "12")
    assert one == pytest.approx(two, rel=1e-4)
    (shown,) = EventAccumulator(str(tmp_path / "2")).Reload().Images("reconstruction")
    picture = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)).convert("L"))
    column = picture[18:-18, -3 * 80 - 40 - 2 * 2 :][:, 80 + 40 + 2]  # the third of four columns
    assert set(column.tolist()) == {0, 255}


@pytest.mark.parametrize(("flags", "dataset"), [
    ({"model_class": "levels:DecoderLevel"}, "levels:open_without"),
    ({"model_class": "levels:Painted"}, "levels:open_without"),
    ({"encoder": "levels:Level", "model_class": "levels:LevelTarget"}, "levels:open_without"),  # one has a default
])  # fmt: skip
def test_an_input_of_any_step_that_no_image_has_stops_before_the_first_update(flags, dataset, levels, pretrain):
    with pytest.raises(ValueError, match=r"needs the extra input level .*extras=level"):
        pretrain(dataset=f"py:{dataset}", **flags)


def test_held_out_images_without_an_input_of_the_decoder_stop_before_the_first_update(levels, labelled, pretrain):
    with pytest.raises(ValueError, match="level"):
        pretrain(dataset=DATASET, model_class="levels:Painted", probe_every=1, probe_path=labelled)


@pytest.mark.slow
def test_classifiers_and_probes_use_the_extra(levels, tmp_path, classify):
    flags = {"dataset": DATASET, "encoder": OWN["encoder"], "batch_size": 8}
    tuned = classify(main_finetune, "tuned", **flags, epochs=8, blr=0.05, mixup=0, cutmix=0, aa="none", reprob=0,
                     drop_path=0)  # fmt: skip
    assert lines(tuned)[-1]["test_acc1"] == 100
    evaluated = classify(main_finetune, **flags, eval=True, resume=tuned / "checkpoint-7.pth")
    assert evaluated.acc1 == 100
    assert classify(main_knn, **flags, k=3, finetune=tuned / "checkpoint-7.pth", global_pool=True)[3, 0.07] == 100
    probed = classify(main_linprobe, "probed", **flags, finetune=tuned / "checkpoint-7.pth", global_pool=True, epochs=3)
    assert lines(probed)[-1]["test_acc1"] > 50
    from levels import Level

    model = get_model(tuned / "checkpoint-7.pth", encoder=Level)
    assert [model.predict(BLACK, level=level)["pred_label"] for level in (-1.0, 1.0)] == [0, 1]
    assert [one["pred_label"] for one in model.predict([BLACK] * 3, level=[1.0, -1.0, 1.0])] == [1, 0, 1]
    low, high = (model.extract_feat(BLACK, level=level) for level in (-1.0, 1.0))
    assert (low - high).abs().max() > 0.1
    with pytest.raises(ValueError, match="level"):
        model.predict(BLACK)
    with pytest.raises(ValueError, match="3 images"):
        model.predict([BLACK] * 3, level=[1.0, -1.0])


def write_list(folder, level):
    folder.mkdir(exist_ok=True)
    rows = ["path,label,level", *(f"{number}.png,{number % 2},{level(number)}" for number in range(16))]
    for number in range(16):
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(folder / f"{number}.png")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder / "list.csv"


def test_two_processes_train_as_one_with_a_column_of_a_list(levels, tmp_path):
    listed = write_list(tmp_path / "images", lambda number: 2 * (number % 2) - 1)
    flags = ("--train_list", listed, "--extras", "level", "--encoder", "levels:Level", "--epochs", 1)
    for count in (1, 2):
        in_processes(count, listed.parent, tmp_path / str(count), *flags, "--batch_size", 4 // count,
                     environment={"PYTHONPATH": str(levels)})  # fmt: skip
    one, two = (lines(tmp_path / name)[0]["train_loss"] for name in "12")
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize(("cell", "said"), [
    ("", "empty"), ("far", "far"), ("nan", "nan"), (20240131, "20240131"), (2460310.8271, "2460310.8271"),
])  # fmt: skip
def test_a_missing_number_of_a_list_names_the_image(cell, said, tmp_path):
    listed = write_list(tmp_path / "images", lambda number: cell if number == 3 else 1)
    for column, message in (
        ("level", rf"level .*3.png .*{said}"),
        ("depth", "depth .*`extras`"),
        ("noise", "noise"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("train", file_list=str(listed), extras=[column])


def test_stored_features_depend_on_the_extra_inputs(tmp_path):
    """Stored features are computed again when the versions of the samples change."""
    found = []
    for level in (1, 2):
        listed = write_list(tmp_path / "images", lambda number, level=level: level)
        for file in listed.parent.glob("*.png"):
            os.utime(file, (0, 0))
        found.append(versions(open_source("train", file_list=str(listed), extras=["level"])))
    assert not set(found[0]) & set(found[1])


@pytest.mark.parametrize(("extras", "message"), [
    ({"site": "north"}, "item 0 .*site"),
    ({"site": float("nan")}, "item 0 .*site"),
    ({"site": 1e300}, "item 0 .*site"),
    ({"site": 20240131}, "item 0 .*site"),  # fp32 changes it
    ({"site": [0.5, 1700000012.25]}, "item 0 .*site"),
    ({"latent": 1.0}, "latent"),
])  # fmt: skip
def test_wrong_extras_are_errors_in_one_line(extras, message):
    with pytest.raises(ValueError, match=message):
        opened([(BLACK, 0, extras)])[0]


@pytest.mark.parametrize("value", [0.1, -1013.25, 101325.7, 384400.1, 16_777_216])
def test_measurements_are_extra_inputs(value, tmp_path):
    listed = write_list(tmp_path / "images", lambda number: value)
    (item,) = opened([(BLACK, 0, {"level": value})])
    for found in (item, open_source("train", file_list=str(listed), extras=["level"])[0]):
        assert found.inputs["level"] == torch.tensor(value, dtype=torch.float32)


def test_samples_with_other_extras_are_named():
    source = opened([(BLACK, 0, {"gsd": 1.0}), (BLACK, 0, {}), (BLACK, 0, {"gsd": [1.0, 2.0]})])
    assert source[0].inputs == {"gsd": torch.tensor(1.0)}
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"item {index} "):
            source[index]


@pytest.mark.parametrize(("flags", "message"), [
    (["--dataset", DATASET], "level"),
    (["--data_path", "IMAGES", "--encoder", "levels:Level"], "extras=level"),
])  # fmt: skip
def test_a_model_and_data_that_do_not_fit_stop_before_the_first_update(
    flags, message, levels, pictures, tmp_path, capsys, monkeypatch
):
    argv = ["--model", "mae_vit_mini_patch4", "--input_size", 16, "--device", "cpu", "--output_dir", tmp_path / "out",
            *(pictures if part == "IMAGES" else part for part in flags)]  # fmt: skip
    assert message in fails(capsys, monkeypatch, main_pretrain, *argv)
    log = tmp_path / "out/log.txt"
    assert not log.exists() or not json.loads(log.read_text() or "{}")


class Added(MaskedAutoencoderViT):
    """Adds an entry to the context, as a parameter of `prepare_masking` or to its result."""

    before = after = ""

    def prepare_masking(self, imgs, mask_ratio, mask=None, **context):
        if self.before:
            context[self.before] = 1
        imgs, mask_ratio, context = super().prepare_masking(imgs, mask_ratio, mask, **context)
        return imgs, mask_ratio, context | ({self.after: 1} if self.after else {})


@pytest.mark.parametrize(("own", "name"), [({"after": "latent"}, "latent"), ({"after": "mask"}, "mask"),
                                           ({"before": "grid_size"}, "grid_size")])  # fmt: skip
def test_an_entry_of_the_context_with_the_name_of_a_parameter_is_refused(own, name, pretrain):
    kind = type("Added", (Added,), own)
    with pytest.raises(ValueError, match=f"^Added: .*{name} .*ids_restore"):
        pretrain(of_main={"model_class": kind})


def test_all_parameters_of_the_steps_are_reserved_and_listed():
    steps = [getattr(MaskedAutoencoderViT, name) for name in (*STEPS, "prepare_masking", "with_terms")]
    names = {one.name for step in steps for one in signature(step).parameters.values()} - {"context"}
    assert names <= set(RESERVED)
    page = (ROOT / "docs/method.md").read_text()
    assert [name for name in RESERVED if f"`{name}`" not in page] == []


class Mapped(list):
    """Float images of several sizes, the channels of which are also maps."""

    maps, wrong = ("red", "green"), None

    def __getitem__(self, index):
        image = np.random.default_rng(index).random((20 + index, 30, 2)).astype(np.float32)
        red = image[:-1, :, 0] if index == self.wrong else image[..., 0]
        return {"image": image, "label": 0, "red": red, "green": image[..., 1]}


def mapped_samples(transform, wrong=None):
    items = Mapped(range(12))
    items.wrong = wrong
    return Samples(opened(items), transform, in_chans=2, seed=0)


@pytest.mark.parametrize("transform", [
    transforms.pretrain_transform(16, vflip=0.5, rotate90=True), transforms.eval_transform(16),
    transforms.pretrain_transform(16, crop="none"),
], ids=["pre-training", "evaluation", "no crop"])  # fmt: skip
def test_maps_follow_the_crops_and_flips_of_the_image(transform):
    samples = mapped_samples(transform)
    batches = list(loader.TrainLoader(samples, batch_size=4, seed=0, num_workers=2, pin_memory=False))
    assert len(batches) == 3
    for batch in batches:
        assert batch.images.shape == (4, 2, 16, 16)
        assert torch.equal(batch.images, torch.stack([batch.inputs["red"], batch.inputs["green"]], dim=1))


def test_maps_in_python_follow_the_transform_of_the_picture():
    """The features are those of a dataset with these maps."""

    class Sum(Encoder):
        def tokenize(self, imgs, *, red):
            return super().tokenize(imgs + red[:, None])

    model = get_model("vit_mini_patch4", input_size=16, in_chans=2, nb_classes=0, encoder=Sum)
    items, samples = Mapped(range(3)), mapped_samples(transforms.eval_transform(16))
    for number in range(3):
        image, red = items[number]["image"].transpose(2, 0, 1), items[number]["red"]
        sample = samples[0, number].item
        expected = model.compute_features(model.normalize(sample.image[None]), red=sample.inputs["red"][None])
        torch.testing.assert_close(model.extract_feat([image], red=[red]), expected)
        torch.testing.assert_close(model.extract_feat(image, red=red), expected)
        inputs = model.normalize(sample.image[None])  # of the size of the model, as their maps
        torch.testing.assert_close(model.extract_feat(inputs, red=sample.inputs["red"][None]), expected)


def test_maps_of_other_shapes_are_named():
    samples = mapped_samples(transforms.eval_transform(16), wrong=3)
    with pytest.raises(BadImage, match=r"item 3 .*red"):
        samples[0, 3]


@pytest.mark.parametrize("value", [np.zeros((2, 16, 16)), None])
def test_a_declared_map_has_one_channel(value):
    item = {"image": BLACK, "label": 0} | ({} if value is None else {"depth": value})
    dataset = type("Maps", (list,), {"maps": ("depth",)})([item])
    with pytest.raises(ValueError, match=r"item 0 .*depth"):
        opened(dataset)[0]


def test_a_policy_of_bytes_does_not_leave_a_map_behind():
    transform = transforms.finetune_transform(16, [0.5] * 3, "rand-m9-mstd0.5-inc1")
    depth = tv_tensors.Image(torch.zeros(16, 16))
    with pytest.raises(ValueError, match="aa=none"):
        transform(Item(Image.fromarray(BLACK), 0, inputs={"depth": depth}))
    large = decode(saved(Image.new("RGB", (100, 100)), "JPEG"), 3, fast_jpeg=True)
    assert transform(Item(large)).image.shape == (3, 16, 16)


@pytest.mark.parametrize("encoded", [False, True])
def test_an_undeclared_map_is_named(encoded, caplog):
    """It would not follow the crops of the image. A declared map, a number and a matrix of another size are silent."""
    image = saved(Image.new("RGB", (30, 20)), "PNG") if encoded else np.zeros((20, 30, 3), np.uint8)
    size = np.zeros((20, 30), np.float32)
    item = {"image": image, "label": 0, "slope": size, "bands": size[None], "depth": size, "gsd": 1.0, "camera": size.T}
    assert opened(type("Maps", (list,), {"maps": ("depth",)})([item])).input_shapes["depth"] == "(H, W)"
    named = [record.getMessage() for record in caplog.records if "maps = " in record.getMessage()]
    assert [[name for name in item if f"input {name} " in message] for message in named] == [["slope"], ["bands"]]


def test_positions_on_the_ground_are_those_of_the_grid_at_a_meter_per_pixel():
    """The encoding of Scale-MAE: the sine-cosine table of the patch index times the meters of a pixel."""
    arguments = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = mae.build.combined(GroundPositions, VisionTransformer)(**arguments, num_classes=2)
    imgs, (north, east) = torch.rand(1, 3, 16, 16), torch.meshgrid(*[torch.arange(16.0)] * 2, indexing="ij")
    tokens = [model.tokenize(imgs, gsd * east[None], gsd * north[None]) - model.patch_embed(imgs) for gsd in (1, 2)]
    table = torch.from_numpy(get_2d_sincos_pos_embed(32, 4)).float()
    torch.testing.assert_close(tokens[0][0], table, rtol=1e-4, atol=1e-5)
    double = torch.from_numpy(get_2d_sincos_pos_embed(32, 7)).float().view(7, 7, 32)[::2, ::2].flatten(0, 1)
    torch.testing.assert_close(tokens[1][0], double, rtol=1e-4, atol=1e-5)
    autoencoder = mae.build.combined(GroundPositions, MaskedAutoencoderViT)(
        **arguments, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
    )
    found = autoencoder.decoder_positions((4, 4), east[None], north[None])
    torch.testing.assert_close(found, autoencoder.decoder_pos_embed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_learns_from_maps_and_resumes(levels, pretrain, monkeypatch):
    """The pixels are noise, and the target is the mean of a map in the patch."""
    (levels / "levels.py").write_text(CODE + MAPS)
    flags = TRAIN | {"dataset": "py:levels:open_maps", "model_class": "levels:MapTarget", "num_workers": 2}
    blind = pretrain("blind", **flags)
    seeing = whole_and_resumed(pretrain, monkeypatch, **flags, encoder="levels:MapTokens")
    assert seeing < 0.5 * lines(blind)[-1]["train_loss"]


def test_the_statistics_of_bytes_are_refused_beside_maps(levels, pretrain):
    """The images are floats then, and would be normalized without a word."""
    (levels / "levels.py").write_text(CODE + MAPS)
    with pytest.raises(ValueError, match=r"mean=.124"):
        pretrain(dataset="py:levels:open_maps", encoder="levels:MapTokens", mean="124 116 104", std="58 57 57")


MAPS = """
from torch.nn.functional import avg_pool2d
class MapTokens(Encoder):
    def tokenize(self, imgs, level, **context):
        return super().tokenize(imgs, **context) + 3 * patches(level) * self.cls_token.detach().sign()
class MapTarget(LevelTarget):
    def target(self, imgs, level=None, **context):
        return patches(level).mean(dim=1, keepdim=True).expand(-1, self.num_patches, 1)
def patches(level):
    return avg_pool2d(level[:, None], 4).flatten(2).transpose(1, 2)
class MapNoise(Noise):
    maps = ("level",)
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"level": np.full((16, 16), item["level"], np.float32)}
def open_maps(split, data_path):
    return MapNoise(split)
"""


def constant(of_train, of_val):
    """Returns a function that opens datasets of black images with the given extras."""
    extras = {"train": of_train, "val": of_val}
    return lambda split, data_path: [(BLACK, number % 2, extras[split]) for number in range(8)]


@pytest.mark.parametrize("script", [main_finetune, main_linprobe, main_knn])
@pytest.mark.parametrize(("of_val", "said"), [(None, "none"), ({"gsd": [1.0]}, r"gsd \(1,\)")])
def test_a_validation_set_with_other_extras_stops_before_the_first_update(script, of_val, said, classify):
    with pytest.raises(ValueError, match=rf"gsd .*{said}"):
        classify(script, of_main={"source": constant({"gsd": 1.0}, of_val), "encoder": Gsd})


def test_a_missing_extra_with_a_default_warns(capsys, classify):
    """In training and in an evaluation, whose images lack what the model was trained with."""
    said = "warning: the images have no extra input gsd"
    having, lacking = ({"source": constant(extras, extras), "encoder": OptionalGsd} for extras in ({"gsd": 1.0}, None))
    out = classify(main_finetune, of_main=having, epochs=1, mixup=0, cutmix=0)
    assert said not in capsys.readouterr().out
    classify(main_finetune, of_main=lacking, eval=True, resume=out / "checkpoint-0.pth")
    assert said in capsys.readouterr().out


def test_images_with_extras_are_not_cached_and_a_warning_says_so(capsys, classify):
    of_main = {"source": constant({"gsd": 1.0}, {"gsd": 2}), "encoder": Gsd}
    classify(main_finetune, of_main=of_main, epochs=1, num_workers=1, cache_images=True)
    assert "`cache_images` has no effect with extra inputs" in capsys.readouterr().out


def test_the_first_image_need_not_be_readable():
    class Broken(list):
        def __getitem__(self, index):
            if not index:
                raise BadImage("broken")
            return super().__getitem__(index)

    assert opened(Broken([(BLACK, 0, {"gsd": 1.0})] * 3)).input_shapes == {"gsd": "()"}


class Gsd(Encoder):
    def tokenize(self, imgs, gsd):
        return super().tokenize(imgs) * gsd[:, None, None]


class OptionalGsd(Encoder):
    def tokenize(self, pictures, gsd=None):  # the first parameter may have any name
        return super().tokenize(pictures) * (1 if gsd is None else gsd[:, None, None])


def test_features_of_a_dataset_and_exports(levels, tmp_path, classify):
    file = classify(main_finetune, "tuned", dataset=DATASET, encoder=OWN["encoder"], epochs=1, mixup=0,
                    cutmix=0) / "checkpoint-0.pth"  # fmt: skip
    out = tmp_path / "features.npz"
    features.main(parse(features, model=file, encoder=OWN["encoder"], dataset=DATASET, split="val", out=out))
    rows = np.load(out)["features"]
    from levels import Level, Noise

    model, items = get_model(file, encoder=Level), [Noise("val")[index] for index in range(32)]
    expected = model.extract_feat([item["image"] for item in items], level=[item["level"] for item in items])
    np.testing.assert_allclose(rows, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"to=onnx: .*level"):
        export.export(model, "onnx", tmp_path / "model.onnx")
    export.export(model, "safetensors", tmp_path / "model.safetensors")
    again = get_model(tmp_path / "model.safetensors", encoder=Level).extract_feat(items[0]["image"], level=1)
    torch.testing.assert_close(again, model.extract_feat(items[0]["image"], level=1.0))
    for wrong in (float("nan"), "north"):
        with pytest.raises(ValueError, match="level="):
            model.predict(items[0]["image"], level=wrong)


@pytest.mark.slow
def test_segmentation_with_extras(levels, classify):
    """The class of all pixels is determined by the extra input alone."""
    (levels / "levels.py").write_text(CODE + MASKS)
    out = classify(main_segment, dataset="py:levels:open_masks", encoder=OWN["encoder"], nb_classes=2, epochs=4,
                   warmup_epochs=0, lr=0.003, unfreeze_blocks="all", num_workers=1)  # fmt: skip
    from levels import Level

    model = get_model(out / "checkpoint-3.pth", encoder=Level)
    image = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    assert (model.segment(image, level=1.0) == 1).mean() > 0.9
    zeros, ones = model.segment([image, image[:16]], level=[-1.0, 1.0])
    assert (zeros == 0).mean() > 0.9 and (ones == 1).mean() > 0.9


MASKS = """
def open_masks(split, data_path):
    return MaskedNoise(split)
class MaskedNoise(Noise):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"label": np.full((16, 16), item["label"], np.uint8)}
"""


@pytest.mark.parametrize("label", [[0.0, 1.0], 0.5])
def test_pretraining_ignores_labels_that_are_no_classes(label, pretrain):
    out = pretrain(of_main={"source": lambda split, data_path: [(BLACK, label)] * 8}, epochs=1, num_workers=1)
    assert (out / "checkpoint-0.pth").exists()


GUIDED = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from models_mae import MaskedAutoencoderViT
class Guided(MaskedAutoencoderViT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decoder_kinds = nn.Linear(self.cls_token.shape[2], 2)
    def random_masking(self, x, mask_ratio, noise=None, *, hidden, **context):
        is_hidden = F.max_pool2d(hidden[:, None], self.patch_embed.patch_size).flatten(1) > 0
        assert is_hidden.sum() == 4 * len(x)
        found = super().random_masking(x, mask_ratio, noise + is_hidden, **context)
        assert found[1][is_hidden].all() and not found[1].all()
        return found
    def forward(self, imgs, mask_ratio=.75, *, kind, **context):
        imgs, mask_ratio, context = self.prepare_masking(imgs, mask_ratio, **context)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **context)
        pred = self.forward_decoder(latent, ids_restore, **context)
        kinds = F.cross_entropy(self.decoder_kinds(latent[:, 0]), kind.long(), ignore_index=-1)
        return {"pixels": self.forward_loss(imgs, pred, mask, **context), "kinds": kinds}, pred, mask
class Items:
    maps = ("hidden",)
    def __len__(self):
        return 32
    def __getitem__(self, index):
        hidden = np.zeros((16, 16), np.float32)
        hidden[:, 4 * (index % 4) :][:, :4] = 1
        image = np.full((16, 16, 3), 200 * (index % 2), np.uint8)
        return {"image": image, "label": 0, "kind": float(index % 2 if index % 4 < 3 else -1), "hidden": hidden}
def open_dataset(split, data_path):
    return Items()
"""


def test_labels_and_masks_of_files_reach_a_model_as_an_extra_input_and_a_map(own_module, pretrain):
    """Three quarters of the images have a label, which their brightness determines; a map hides 4 of 16 patches."""
    own_module("guided", GUIDED)
    flags = {"dataset": "py:guided:open_dataset", "model_class": "guided:Guided", "crop": "none", "hflip": 0}
    first, *_, last = lines(pretrain(**TRAIN | flags))
    assert last["train_kinds"] < 0.2 * first["train_kinds"]
    assert last["train_pixels"] + last["train_kinds"] == pytest.approx(last["train_loss"], rel=1e-5)
