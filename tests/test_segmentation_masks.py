"""Images with masks: their sources, the values of masks, and masks that can't be used."""

import contextlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from mains import open_source
from PIL import Image
from segments import LAYOUTS, make_scenes
from test_decode import npy, saved
from test_decode import png as raw_png

from mae.data import transforms
from mae.data.item import Item
from mae.data.pixels import BadImage, to_tensor
from mae.data.samples import Samples
from mae.data.segmentation_masks import IGNORED, VOC, MaskFormat, as_mask, default_colors, read_palette

CLASSES = ["ground", "tree", "water"]
THREE = MaskFormat(CLASSES)


def masks_of(count, *options, **named):
    return MaskFormat([str(number) for number in range(count)], *options, **named)


def png(array, mode=None, palette=None):
    picture = Image.fromarray(np.asarray(array, dtype=np.uint8), mode)
    if palette:
        picture.putpalette(palette)
    return saved(picture, "PNG")


def samples_of(pairs, **options):
    return Samples(pairs, transforms.scaled_transform(0), in_chans=3, seed=0, **options)


def test_indexed_gray_and_color_masks_have_the_same_values():
    values = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
    colors = [(10, 20, 30), (200, 0, 0), (0, 0, 200)]
    table = np.full((256, 3), 99, dtype=np.uint8)
    table[:3] = colors
    of_colors = masks_of(3, colors=colors)
    for masks, data in (
        (THREE, png(values)), (THREE, png(values, "P", table.tobytes())),
        (of_colors, png(table[values])),  # (99, 99, 99) is ignored
    ):  # fmt: skip
        assert torch.equal(masks.decode(data), torch.from_numpy(values))


def test_the_indices_of_an_indexed_mask_are_the_classes():
    """Optimizers of PNG files number colors in any order: with the colors of the palette at other indices, a mask is
    refused. The index 255 of VOC's masks is ignored."""
    colors, voc = [(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.array([[0, 1, 20, 255]])
    table, optimized = list(np.array(default_colors(256)).ravel()), np.ravel(colors[::-1]).tolist()
    white_is_a_class = [*default_colors(20), (224, 224, 192)]  # the color of the index 255
    others = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    for masks, mask, palette, reads in (
        (THREE, [[0, 1, 2]], optimized, True), (masks_of(3, colors=others), [[0, 1, 2]], optimized, True),
        (masks_of(21, colors=default_colors(21)), voc, table, True),
        (masks_of(21, colors=white_is_a_class), voc[:, [0, 1, 3]], table, True),
        (masks_of(3, colors=colors), [[0, 1, 2]], optimized, False),
        (masks_of(3, colors=colors), [[1]], optimized, True),
        (masks_of(2, colors=colors[1:]), [[0, 1]], optimized, False),
        (masks_of(3, True, colors), [[1, 2, 3]], [9, 9, 9, *np.ravel(colors).tolist()], True),
        (masks_of(3, True, colors), [[0, 1]], np.ravel(colors).tolist(), False),  # 0 is no class
    ):  # fmt: skip
        data = png(mask, "P", palette)
        if reads:
            assert masks.decode(data).tolist() == masks_of(255, masks.reduce_zero_label).decode(png(mask)).tolist()
        else:
            with pytest.raises(BadImage, match="palette"):
                masks.decode(data)


@pytest.mark.parametrize("suffix", ["PNG", "PPM"])
def test_a_mask_of_1_bit_has_two_classes(suffix):
    assert masks_of(2).decode(saved(Image.fromarray(np.array([[True, False]])), suffix)).tolist() == [[1, 0]]


def test_files_whose_values_change_when_they_are_read_are_refused():
    """Pillow scales PGM files of another maximum to 255, and inverts TIFF files whose 0 is white."""
    values = np.array([[1, 2], [3, 4]], np.uint8)
    format = masks_of(150)
    assert format.decode(b"P5 # a comment\n2 2\n255\n" + values.tobytes()).tolist() == values.tolist()
    assert format.decode(saved(Image.fromarray(values), "TIFF")).tolist() == values.tolist()
    inverted = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    for data in (b"P5\n2 2\n# of classes\n100\n" + values.tobytes(), inverted):
        with pytest.raises(BadImage, match="its values change when it is read"):
            format.decode(data)


def test_a_single_color_that_is_not_in_the_palette_is_ignored():
    of_colors = masks_of(2, colors=[(10, 20, 30), (200, 0, 0)])
    for pixels, classes in (
        ([[1, 2, 3], [1, 2, 3]], [255, 255]), ([[1, 2, 3], [200, 0, 0]], [255, 1]), ([[1, 2, 3], [4, 5, 6]], None),
        ([[200, 0, 0], [1, 2, 3], [4, 5, 6]], None),
    ):  # fmt: skip
        with pytest.raises(BadImage, match="`palette`") if classes is None else contextlib.nullcontext():
            assert of_colors.decode(png([pixels])).tolist() == [classes]


def test_reduce_zero_label_ignores_zero_and_counts_from_one():
    decoded = masks_of(3, reduce_zero_label=True).decode(png([[0, 1, 3, 255]]))
    assert decoded.tolist() == [[255, 0, 2, 255]]
    assert decoded.dtype == torch.uint8
    with pytest.raises(BadImage, match=r"value 4.*`nb_classes`"):
        masks_of(3, reduce_zero_label=True).decode(png([[4, 0]]))
    of_colors = MaskFormat(("a", "b"), reduce_zero_label=True, colors=((0, 0, 0), (9, 9, 9)))
    with pytest.raises(BadImage, match="`reduce_zero_label`"):
        of_colors.decode(png([[[0, 0, 0], [9, 9, 9]]]))


@pytest.mark.parametrize(("data", "reason"), [
    (png([[0, 3]]), "value 3"), (png([[[1, 2, 3]]]), "`palette`"), (b"\xff\xd8\xff\xe0", "JPEG"),
    (b"no image", "image"), (npy(np.zeros((4, 5, 3), dtype=np.uint8)), "indexed"),
    (saved(np.array([[1, 2]], dtype=np.uint16), "PNG"), "indexed"),
    # The largest value of 2 bits is 3 for some programs, and 255 for others.
    (saved(np.array([[True, False]]), "PPM"), "8 bits"),
    *((raw_png(np.full((1, 1, 1), 0xF0), bits, 0), "8 bits") for bits in (2, 4)),
])  # fmt: skip
def test_values_that_are_no_classes_are_errors(data, reason):
    with pytest.raises(BadImage, match=reason):
        THREE.decode(data)


@pytest.mark.parametrize("layout", ["ade20k", "splits", "parts"])
@pytest.mark.parametrize("packed", ["", "zip", "tar"])
def test_layouts(tmp_path, layout, packed):
    root = make_scenes(tmp_path / "scenes", layout)
    path = shutil.make_archive(str(root), packed, tmp_path, "scenes") if packed else str(root)
    folders, suffix = LAYOUTS[layout]
    for split, count in (("train", 12), ("val", 5)):
        pairs = open_source(split, masks=THREE, data_path=path)
        assert (len(pairs), pairs.classes) == (count, CLASSES)
        assert (pairs.labels == -1).all()
        for number, (data, mask, *_) in enumerate(pairs):
            image, own = (root / folder / f"{number:02}" for folder in folders[split])
            image = image.with_suffix(f".{suffix}")
            assert pairs.name(number).endswith(str(image.relative_to(root)))
            assert data == image.read_bytes()
            assert torch.equal(mask, to_tensor(Image.open(own.with_suffix(".png")))[0])


def test_files_of_a_layout_that_are_not_used_are_named(tmp_path, caplog):
    """Masks whose image is missing, and folders with other names."""
    make_scenes(tmp_path)
    (tmp_path / "images/training/03.jpg").rename(tmp_path / "images/training/x3.jpeg.part")
    shutil.copytree(tmp_path / "images/validation", tmp_path / "images/test")
    shutil.copytree(tmp_path / "images/validation", tmp_path / "extra/validation")
    assert len(open_source("train", masks=THREE, data_path=str(tmp_path))) == 11
    unused = [message for message in caplog.messages if "are not read" not in message]
    assert [message[:2] for message in unused] == ["10", "1 "]
    assert "extra/validation/00" in unused[0] and "/03" in unused[1]


def test_two_folders_and_a_csv_file_have_the_same_pairs(tmp_path):
    make_scenes(tmp_path)
    (tmp_path / "images/training").rename(tmp_path / "photos")
    (tmp_path / "annotations/training").rename(tmp_path / "truth")
    rows = [f"photos/{n:02}.jpg,truth/{n:02}.png" for n in range(12)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask", *rows]))
    swapped = [f"1,{mask},{image}" for image, mask in (row.split(",") for row in rows)]
    (tmp_path / "others.csv").write_text("\n".join(["set,annotation,file", *swapped]))
    by_folder, *others = (open_source("train", masks=THREE, **options) for options in (
        {"train_folders": [str(tmp_path / "photos"), str(tmp_path / "truth")]},
        {"data_path": str(tmp_path), "train_folders": ["photos", "truth"]},
        {"file_list": str(tmp_path / "pairs.csv")}, {"file_list": str(tmp_path / "others.csv")},
    ))  # fmt: skip
    for pairs in others:
        assert len(pairs) == 12
        for (data, mask, *_), (other, other_mask, *_) in zip(pairs, by_folder, strict=True):
            assert data == other
            assert torch.equal(mask, other_mask)


def test_voc_comes_from_torchvision(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, names in (("train", ["b", "a"]), ("val", ["c"]), ("trainval", ["b", "a", "c"])):
        for number, name in enumerate(names):
            Image.new("RGB", (20, 10), (9 * number, 0, 0)).save(root / "JPEGImages" / f"{name}.jpg")
            mask = png(np.full((10, 20), 20 - number), "P", bytes(range(256)) * 3)
            (root / "SegmentationClass" / f"{name}.png").write_bytes(mask)
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names))
    train, val = (open_source(split, masks=MaskFormat(VOC), data_path=str(tmp_path), dataset="VOCSegmentation")
                  for split in ("train", "val"))  # fmt: skip
    assert [train.name(index).rpartition("/")[2] for index in range(2)] == ["b.jpg", "a.jpg"]
    assert [int(mask.unique()) for _, mask, *_ in train] == [20, 19]
    assert val.masks.files.name(0).endswith("SegmentationClass/c.png")
    sample = samples_of(val)[0, 0].item
    assert (sample.image.shape, sample.label.shape) == ((3, 10, 20), (10, 20))

    def opened(split, part):
        return open_source(split, masks=MaskFormat(VOC), data_path=str(tmp_path), dataset=f"VOCSegmentation:{part}")

    assert [len(opened("train", "trainval")), len(opened("val", "val"))] == [3, 1]
    for split, part in (("val", "trainval"), ("train", "val")):  # the same images
        with pytest.raises(ValueError, match=f"VOCSegmentation:{part}: .*give dataset=VOCSegmentation$"):
            opened(split, part)


def test_classes_and_colors_of_voc():
    """The first and the last color of VOC's 21 classes, and the color of ignored pixels."""
    named = torchvision.models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert list(VOC)[1:] == named[1:]
    colors = default_colors(256)
    assert colors[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert (colors[15], colors[20], colors[255]) == ((192, 128, 128), (0, 64, 128), (224, 224, 192))
    assert len(set(colors)) == 256


def test_a_palette_names_and_colors_classes(tmp_path):
    file = tmp_path / "palette.txt"
    file.write_text("# LoveDA\n255 255 255 background\n255, 0, 0, a building\n\n")
    assert read_palette(file) == (["background", "a building"], [(255, 255, 255), (255, 0, 0)])
    for text, problem in (
        ("1 2 300 a", "line 1"), ("1 2 3 a\n4 5", "line 2"), ("", "0 classes"), ("1 2 3 a\n4 5 6 a", "names"),
        ("1 2 3 a\n1 2 3 b", "colors"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_palette(file)


def test_unusable_masks_are_one_line_that_names_the_file(tmp_path):
    make_scenes(tmp_path, train=3)
    place = tmp_path / "annotations/training"
    (place / "01.png").write_bytes(png(np.full((24, 30), 7)))
    (place / "02.png").write_bytes(png(np.zeros((5, 6))))
    samples = samples_of(open_source("train", masks=THREE, data_path=str(tmp_path)))
    for index, reason in ((1, f"{place / '01.png'}: .*value 7"), (2, r"mask .*\(5, 6\)")):
        with pytest.raises(BadImage, match=f"images/training/0{index}.jpg: .*{reason}"):
            samples[0, index]
    (place / "01.png").unlink()
    with pytest.raises(ValueError, match=r"/01.jpg"):
        open_source("train", masks=THREE, data_path=str(tmp_path))
    folders = ["images/training", "annotations/training"]
    with pytest.raises(ValueError, match=r"01.jpg"):
        open_source("train", masks=THREE, data_path=str(tmp_path), train_folders=folders)
    rows = [f"images/training/0{n}.jpg,annotations/training/0{n}.png" for n in (0, 1)]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask", *rows]))
    listed = samples_of(open_source("train", masks=THREE, file_list=str(tmp_path / "list.csv")))
    with pytest.raises(BadImage, match=r"01.jpg: .*01.png"):
        listed[0, 1]
    sample = samples_of(listed.source, on_bad_image="skip")[0, 1]
    reason = f"its mask {place / '01.png'}: No such file or directory"
    assert sample.bad[0] == (listed.source.name(1), reason)
    assert torch.equal(sample.item.label, listed[0, 0].item.label)


def test_sources_that_do_not_exist_are_errors(tmp_path):
    for folder in ("images", "empty"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images/x.png")
    (tmp_path / "bad.csv").write_text("image,mask\nnone.jpg,none.png")
    texts = {"short": "image,mask\na.jpg,b.png\nc.jpg,", "plain": "a.jpg,b.png", "one": "image\na.jpg"}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    lists = [str(tmp_path / f"{name}.csv") for name in ("none", "bad", "short", "plain", "one")]
    images, empty = str(tmp_path / "images"), str(tmp_path / "empty")
    for options, problem in (
        ({}, "`data_path`"), ({"data_path": images}, "images/validation"), ({"val_folders": [images, empty]}, empty),
        ({"file_list": lists[1]}, "none.jpg"), ({"file_list": lists[2]}, "1 of its 2 rows"),
        ({"file_list": lists[3]}, "header"), ({"file_list": lists[4]}, "0 of its 1 rows"),
        ({"file_list": "a", "dataset": "VOCSegmentation"}, "dataset"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            open_source("val", masks=THREE, **options)


def test_the_page_moves_the_folders_of_loveda_to_a_layout(tmp_path, monkeypatch):
    make_scenes(tmp_path / "LOVEDA", "loveda")
    with pytest.raises(ValueError, match="LOVEDA"):
        open_source("train", masks=THREE, data_path=str(tmp_path / "LOVEDA"))
    page = (Path(__file__).parents[1] / "docs/segmentation.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(next(code for code in page.split("```python\n")[1:] if "LOVEDA" in code).partition("```")[0], {})
    for split, folder, count in (("train", "Rural", 12), ("val", "Urban", 5)):
        pairs = open_source(split, masks=THREE, data_path=str(tmp_path / "LOVEDA"))
        assert [pairs.name(0), len(pairs)] == [str(tmp_path / f"LOVEDA/{split}/images/{folder}/00.png"), count]


def test_the_first_folder_with_the_name_of_a_split_counts(tmp_path):
    make_scenes(tmp_path)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split / "train").mkdir()
            for file in [*(tmp_path / kind / split).glob("*.*")]:
                file.rename(file.parent / "train" / file.name)
    for split, name, count in (("train", "training", 12), ("val", "validation", 5)):
        pairs = open_source(split, masks=THREE, data_path=str(tmp_path))
        assert len(pairs) == count
        assert all(f"images/{name}/train/" in pairs.name(index) for index in range(count))


def test_files_of_the_same_name_except_for_the_suffix_are_an_error(tmp_path):
    make_scenes(tmp_path)
    for place, suffix in (("images/training", "png"), ("annotations/training", "tif")):
        extra = tmp_path / place / f"03.{suffix}"
        Image.new("L", (30, 24)).save(extra)
        for options in ({}, {"train_folders": ["images/training", "annotations/training"]}):
            with pytest.raises(ValueError, match=f"{place}/03.*{place}/03"):
                open_source("train", masks=THREE, data_path=str(tmp_path), **options)
        extra.unlink()
    assert len(open_source("train", masks=THREE, data_path=str(tmp_path))) == 12


def test_an_archive_of_one_split_and_a_list_beside_it(tmp_path):
    make_scenes(tmp_path, "parts")
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "val")
    with pytest.raises(ValueError, match=r"set.zip"):
        open_source("train", masks=THREE, data_path=archive)
    pairs = open_source("val", masks=THREE, data_path=archive)
    (tmp_path / "list.csv").write_text("image,mask\nval/images/Urban/02.png,val/masks/Urban/02.png")
    listed = open_source("val", masks=THREE, data_path=archive, file_list=str(tmp_path / "list.csv"))
    assert (pairs.name(2), pairs[2][0]) == (f"{archive}: val/images/Urban/02.png", listed[0][0])


def test_an_image_and_its_mask_are_augmented_together(tmp_path):
    """The image has the values of its mask, so that both remain equal up to the interpolation at edges."""
    values = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 16))).astype(np.uint8)
    picture, mask = Image.fromarray(20 * values), torch.from_numpy(values)
    transform = transforms.segmentation_transform((32, 40), 48, (0.5, 2.0), 0.5, [0.8])
    padded = flipped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        random.seed(seed)
        image, classes, *_ = transform(Item(picture, as_mask(mask)))
        assert (image.shape, classes.shape) == ((1, 32, 40), (32, 40))
        assert (image.dtype, classes.dtype) == (torch.uint8, torch.uint8)
        ignored = classes == IGNORED
        assert (image[0][ignored] == 204).all()  # the mean
        assert ignored.float().mean() < 0.75
        assert ((image[0].int() - 20 * classes.int()).abs() <= 1)[~ignored].float().mean() > 0.6
        padded += bool(ignored.any())
        rows = classes[0][~ignored[0]].int()
        flipped += bool((rows.diff() < 0).any() and not (rows.diff() > 0).any())
    assert 5 < flipped < 35
    assert 0 < padded < 25


def test_scales_are_relative_to_the_short_side():
    picture, mask = Image.new("L", (60, 30)), torch.zeros(30, 60, dtype=torch.uint8)
    sizes = []
    for short_side, scale in ((45, 1), (0, 2), (20, 0.5)):
        transform = transforms.segmentation_transform((200, 200), short_side, (scale, scale), 0, [0.5])
        classes = transform(Item(picture, as_mask(mask))).label
        valid = classes != IGNORED
        sizes.append((int(valid[:, 0].sum()), int(valid[0].sum())))
        evaluated, same, *_ = transforms.scaled_transform(short_side)(Item(picture, as_mask(mask)))
        assert evaluated.shape[1:] == ((short_side, 2 * short_side) if short_side else (30, 60))
        assert torch.equal(same, mask)
    assert sizes == [(45, 90), (60, 120), (10, 20)]
    mask = torch.randint(0, 3, (30, 60), dtype=torch.uint8)
    classes = transforms.segmentation_transform((17, 34), 17, (1, 1), 0, [0.5])(Item(picture, as_mask(mask))).label
    nearest = Image.fromarray(mask.numpy()).resize((34, 17), Image.Resampling.NEAREST)
    assert torch.equal(classes, to_tensor(nearest)[0])
    with pytest.raises(ValueError, match=r"scale=\[2, 1\]"):
        transforms.segmentation_transform(8, 0, (2, 1), 0, [0.5])


def test_narrow_strips_are_not_enlarged_without_limit(tmp_path):
    """The random scale does not decide whether an image is an error."""

    def save(name, size):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            Image.new("L", size).save(tmp_path / "train" / kind / f"{name}.png")

    save("strip", (6000, 10))
    save("wide", (1000, 100))
    pairs = open_source("train", masks=THREE, data_path=str(tmp_path))
    for transform, scaled in (
        (transforms.scaled_transform(224), "134400 x 224"),
        (transforms.segmentation_transform(8, 20, (0.1, 2), 0, [0.5] * 3), "24000 x 40"),
    ):
        samples = Samples(pairs, transform, in_chans=3, seed=0)
        with pytest.raises(BadImage, match=f"strip.png: .*{scaled}"):
            samples[0, 0]
        assert samples[0, 1].item.image.shape[0] == 3
    save("strip", (20_000, 800))
    assert samples_of(pairs)[0, 0].item.image.shape[2] == 20_000  # not enlarged


def test_images_of_any_channels_are_augmented():
    picture, mask = torch.rand(5, 20, 30), torch.zeros(20, 30, dtype=torch.uint8)
    transform = transforms.segmentation_transform(24, 24, (0.5, 0.6), 0, [0.1, 0.2, 0.3, 0.4, 0.5])
    image, classes, *_ = transform(Item(picture, as_mask(mask)))
    assert (image.shape, image.dtype) == ((5, 24, 24), torch.float32)
    assert image[:, -1, -1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert classes[-1, -1] == IGNORED
