"""Images with masks: their sources, the values of masks, and masks that can't be used."""

import random
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from segments import LAYOUTS, make_scenes
from test_decode import npy, saved
from test_decode import png as raw_png

from mae.data import transforms
from mae.data.decode import BadImage, to_tensor
from mae.data.item import Item
from mae.data.samples import Samples
from mae.data.segmentation_masks import IGNORED, VOC, MaskFormat, default_colors, open_pairs, read_palette

THREE = MaskFormat(3)
CLASSES = ["ground", "tree", "water"]


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
    of_colors = MaskFormat(3, colors=colors)
    for masks, data in (
        (THREE, png(values)), (THREE, png(values, "P", table.tobytes())),
        (of_colors, png(table[values])),  # (99, 99, 99) is ignored
    ):  # fmt: skip
        assert torch.equal(masks.decode(data), torch.from_numpy(values))


def test_an_indexed_mask_with_the_colors_of_the_palette_is_decoded_by_color():
    """Optimizers of PNG files number colors in any order. The index 255 of VOC's masks is ignored, as by index."""
    colors = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    of_colors = MaskFormat(3, colors=colors)
    indices = [[0, 0, 1], [2, 1, 0]]
    optimized = [channel for number in (2, 1, 0) for channel in colors[number]]
    assert of_colors.decode(png(indices, "P", optimized)).tolist() == [[2, 2, 1], [0, 1, 2]]
    assert THREE.decode(png(indices, "P", optimized)).tolist() == indices
    voc = np.array([[0, 1, 20, 255]])
    table = list(np.array(default_colors(256)).ravel())
    white_is_a_class = [*default_colors(20), (224, 224, 192)]  # the color of the index 255
    for classes in (default_colors(21), [(9, 9, 9), (8, 8, 8), *default_colors(23)[4:]]):
        assert MaskFormat(len(classes), colors=classes).decode(png(voc[:, :2], "P", table)).tolist() == [[0, 1]]
    assert MaskFormat(21, colors=default_colors(21)).decode(png(voc, "P", table)).tolist() == voc.tolist()
    assert MaskFormat(21, colors=white_is_a_class).decode(png(voc[:, [0, 1, 3]], "P", table)).tolist() == [[0, 1, 255]]
    other = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert MaskFormat(3, colors=other).decode(png(indices, "P", optimized)).tolist() == indices
    with pytest.raises(BadImage, match=r"palette .*index 2"):
        MaskFormat(2, colors=[(255, 0, 0), (0, 255, 0)]).decode(png(indices, "P", optimized))


@pytest.mark.parametrize("suffix", ["PNG", "PPM"])
def test_a_mask_of_1_bit_has_two_classes(suffix):
    assert MaskFormat(2).decode(saved(Image.fromarray(np.array([[True, False]])), suffix)).tolist() == [[1, 0]]


def test_a_mask_of_other_colors_than_those_of_the_palette_is_an_error():
    """Pixels of a single such color are ignored."""
    of_colors = MaskFormat(2, colors=[(10, 20, 30), (200, 0, 0)])
    with pytest.raises(BadImage, match=r"1 2 3, .*`palette`"):
        of_colors.decode(png([[[1, 2, 3], [4, 5, 6]]]))
    with pytest.raises(BadImage, match=r"1 2 3, .*`palette`"):
        of_colors.decode(png([[[200, 0, 0], [1, 2, 3], [4, 5, 6]]]))
    assert of_colors.decode(png([[[1, 2, 3], [1, 2, 3]]])).tolist() == [[255, 255]]
    assert of_colors.decode(png([[[1, 2, 3], [200, 0, 0]]])).tolist() == [[255, 1]]


def test_reduce_zero_label_ignores_zero_and_counts_from_one():
    decoded = MaskFormat(3, reduce_zero_label=True).decode(png([[0, 1, 3, 255]]))
    assert decoded.tolist() == [[255, 0, 2, 255]]
    assert decoded.dtype == torch.uint8
    colors = [(0, 255, 0), (255, 0, 0), (0, 0, 255)]  # a program numbered red, green and blue in its own order
    of_colors, optimized = MaskFormat(3, True, colors), [255, 0, 0, 0, 255, 0, 0, 0, 255]
    for indices in ([[0, 1, 2]], [[0, 1]], [[0, 0]]):
        expected = [[[1, 0, 2][index] for index in row] for row in indices]
        assert of_colors.decode(png(indices, "P", optimized)).tolist() == expected
    of_indices = [9, 9, 9, *np.ravel(colors).tolist()]  # 0 is no class
    assert of_colors.decode(png([[0, 1, 3]], "P", of_indices)).tolist() == [[255, 0, 2]]
    with pytest.raises(BadImage, match=r"value 4, .*1 to 3 \(255 .*: correct `nb_classes`"):
        MaskFormat(3, reduce_zero_label=True).decode(png([[4, 0]]))


@pytest.mark.parametrize(("data", "reason"), [
    (png([[0, 3]]), r"it has the value 3, and the 3 classes are 0 to 2 \(255 is ignored\)"),
    (png([[[1, 2, 3]]]), "it is a color image: give `palette` with the colors of the classes"),
    (b"\xff\xd8\xff\xe0", "it is a JPEG file, whose compression changes the values: give masks as PNG files"),
    (b"no image", "not an image of a known format"),
    (npy(np.zeros((4, 5, 3), dtype=np.uint8)), "neither an indexed nor a gray image of one channel"),
    (saved(np.array([[1, 2]], dtype=np.uint16), "PNG"), "neither an indexed nor a gray"),
    # The largest value of 2 bits is 3 for some programs, and 255 for others.
    (saved(np.array([[True, False]]), "PPM"), "8 bits"),
    *((raw_png(np.full((1, 1, 1), 0xF0), bits, 0), "8 bits") for bits in (2, 4)),
])  # fmt: skip
def test_values_that_are_no_classes_are_errors(data, reason):
    with pytest.raises(BadImage, match=reason):
        THREE.decode(data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", ["", "zip", "tar"])
def test_layouts_of_known_datasets(tmp_path, layout, packed):
    root = make_scenes(tmp_path / "scenes", layout)
    path = shutil.make_archive(str(root), packed, tmp_path, "scenes") if packed else str(root)
    folders, suffix = LAYOUTS[layout]
    for split, count in (("train", 12), ("val", 5)):
        pairs = open_pairs(split, CLASSES, THREE, data_path=path)
        assert (len(pairs), pairs.classes) == (count, CLASSES)
        assert (pairs.labels == -1).all()
        for number, (data, mask, *_) in enumerate(pairs):
            image, own = (root / folder / f"{number:02}" for folder in folders[split])
            image = image.with_suffix(f".{suffix}")
            assert pairs.name(number).endswith(str(image.relative_to(root)))
            assert data == image.read_bytes()
            assert torch.equal(mask, to_tensor(Image.open(own.with_suffix(".png")))[0])


def test_files_of_a_layout_that_are_not_used_are_named(tmp_path, caplog):
    """Masks whose image is missing, and folders with other names. The images of a test set need no masks."""
    make_scenes(tmp_path)
    (tmp_path / "images/training/03.jpg").rename(tmp_path / "images/training/x3.jpeg.part")
    shutil.copytree(tmp_path / "images/validation", tmp_path / "images/test")
    shutil.copytree(tmp_path / "images/validation", tmp_path / "extra/validation")
    assert len(open_pairs("train", CLASSES, THREE, data_path=str(tmp_path))) == 11
    unused = [message for message in caplog.messages if "are not read" not in message]
    assert [message[:2] for message in unused] == ["5 ", "1 "]
    assert "extra/validation/00" in unused[0] and ": 03" in unused[1]


def test_two_folders_and_a_csv_file_have_the_same_pairs(tmp_path):
    make_scenes(tmp_path)
    (tmp_path / "images/training").rename(tmp_path / "photos")
    (tmp_path / "annotations/training").rename(tmp_path / "truth")
    rows = [f"photos/{n:02}.jpg,truth/{n:02}.png" for n in range(12)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask", *rows]))
    (tmp_path / "plain.csv").write_text("\n".join(rows))
    by_folder, *others = (open_pairs("train", CLASSES, THREE, **options) for options in (
        {"folders": [str(tmp_path / "photos"), str(tmp_path / "truth")]},
        {"data_path": str(tmp_path), "folders": ["photos", "truth"]},
        {"file_list": str(tmp_path / "pairs.csv")}, {"file_list": str(tmp_path / "plain.csv")},
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
    for split, names in (("train", ["b", "a"]), ("val", ["c"])):
        for number, name in enumerate(names):
            Image.new("RGB", (20, 10), (9 * number, 0, 0)).save(root / "JPEGImages" / f"{name}.jpg")
            mask = png(np.full((10, 20), 20 - number), "P", bytes(range(256)) * 3)
            (root / "SegmentationClass" / f"{name}.png").write_bytes(mask)
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names))
    train, val = (open_pairs(split, list(VOC), MaskFormat(21), data_path=str(tmp_path), dataset="VOCSegmentation")
                  for split in ("train", "val"))  # fmt: skip
    assert [train.name(index).rpartition("/")[2] for index in range(2)] == ["b.jpg", "a.jpg"]
    assert [int(mask.unique()) for _, mask, *_ in train] == [20, 19]
    assert val.masks.name(val.places[0, 1]).endswith("SegmentationClass/c.png")
    sample = samples_of(val)[0, 0].item
    assert (sample.image.shape, sample.label.shape) == ((3, 10, 20), (10, 20))


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
        ("1 2 300 a", r"line 1: '1 2 300 a' is not R G B NAME"),
        ("1 2 3 a\n4 5", r"line 2: '4 5' is not R G B NAME"),
        ("", "has 0 classes: give 1 to 255"),
        ("1 2 3 a\n4 5 6 a", "with different names"),
        ("1 2 3 a\n1 2 3 b", "with different names and colors"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_palette(file)


def test_unusable_masks_are_one_line_that_names_the_file(tmp_path):
    make_scenes(tmp_path, train=3)
    place = tmp_path / "annotations/training"
    (place / "01.png").write_bytes(png(np.full((24, 30), 7)))
    (place / "02.png").write_bytes(png(np.zeros((5, 6))))
    samples = samples_of(open_pairs("train", CLASSES, THREE, data_path=str(tmp_path)))
    for index, reason in (
        (1, f"its mask {place / '01.png'}: it has the value 7, and the 3 classes are 0 to 2"),
        (2, "its mask has the shape (5, 6), and the image (24, 30)"),
    ):
        with pytest.raises(BadImage) as error:
            samples[0, index]
        assert f"images/training/0{index}.jpg: {reason}" in str(error.value)
        assert "\n" not in str(error.value)
    (place / "01.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images have no mask .*/01.jpg"):
        open_pairs("train", CLASSES, THREE, data_path=str(tmp_path))
    folders = ["images/training", "annotations/training"]
    with pytest.raises(ValueError, match=r"no mask .*annotations/training, .*01.jpg: .*\(`train_list`\)$"):
        open_pairs("train", CLASSES, THREE, data_path=str(tmp_path), folders=folders)
    rows = [f"images/training/0{n}.jpg,annotations/training/0{n}.png" for n in (0, 1)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    listed = samples_of(open_pairs("train", CLASSES, THREE, file_list=str(tmp_path / "list.csv")))
    with pytest.raises(BadImage, match=r"01.jpg: .*01.png: No such file or directory$"):
        listed[0, 1]
    sample = samples_of(listed.source, on_bad_image="skip")[0, 1]
    reason = f"its mask {listed.source.masks.name(1)}: No such file or directory"
    assert sample.bad[0] == (listed.source.name(1), reason)
    assert torch.equal(sample.item.label, listed[0, 0].item.label)


def test_sources_that_do_not_exist_are_errors(tmp_path):
    for folder in ("images", "empty"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images/x.png")
    (tmp_path / "bad.csv").write_text("image,mask\nnone.jpg,none.png")
    (tmp_path / "short.csv").write_text("a.jpg,b.png\nc.jpg,")
    images, empty, *lists = (str(tmp_path / name) for name in ("images", "empty", "none.csv", "bad.csv", "short.csv"))
    for options, problem in (
        ({}, r"`data_path` is needed: .* \(or give `val_folders`, `val_list` or `dataset`\)"),
        ({"data_path": "none"}, "No such file or directory"),
        ({"data_path": images}, r"there are no images for val in it \(looked for images/training and"),
        ({"folders": ["a", "b"]}, "No such file or directory: 'a'"),
        ({"folders": [images, empty]}, "empty: there are no images in it"),
        ({"file_list": lists[0]}, "No such file or directory"),
        ({"file_list": lists[1]}, "its first file, .*none.jpg, does not exist"),
        ({"file_list": lists[2]}, "1 of its 2 rows have an image and a mask, separated by a comma"),
        ({"file_list": "a", "dataset": "VOCSegmentation"}, "exclude each other"),
    ):
        with pytest.raises((ValueError, OSError), match=problem):
            open_pairs("val", CLASSES, THREE, **options)


def test_the_first_folder_with_the_name_of_a_split_counts(tmp_path):
    make_scenes(tmp_path)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split / "train").mkdir()
            for file in [*(tmp_path / kind / split).glob("*.*")]:
                file.rename(file.parent / "train" / file.name)
    for split, name, count in (("train", "training", 12), ("val", "validation", 5)):
        pairs = open_pairs(split, CLASSES, THREE, data_path=str(tmp_path))
        assert len(pairs) == count
        assert all(f"images/{name}/train/" in pairs.name(index) for index in range(count))


def test_files_of_the_same_name_except_for_the_suffix_are_an_error(tmp_path):
    make_scenes(tmp_path)
    for place, suffix in (("images/training", "png"), ("annotations/training", "tif")):
        extra = tmp_path / place / f"03.{suffix}"
        Image.new("L", (30, 24)).save(extra)
        for options in ({}, {"folders": ["images/training", "annotations/training"]}):
            with pytest.raises(ValueError, match=rf"{place}/03.\w+ and .*{place}/03.\w+ .*\(`train_list`\)"):
                open_pairs("train", CLASSES, THREE, data_path=str(tmp_path), **options)
        extra.unlink()
    assert len(open_pairs("train", CLASSES, THREE, data_path=str(tmp_path))) == 12


def test_an_archive_of_one_split_and_a_list_beside_it(tmp_path):
    make_scenes(tmp_path, "loveda")
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "Val")
    pairs = open_pairs("val", CLASSES, THREE, data_path=archive)
    assert [pairs.name(index) for index in range(5)] == [f"{archive}: Val/Urban/images_png/0{n}.png" for n in range(5)]
    with pytest.raises(ValueError, match="there are no images for train in it"):
        open_pairs("train", CLASSES, THREE, data_path=archive)
    (tmp_path / "list.csv").write_text("Val/Urban/images_png/02.png,Val/Urban/masks_png/02.png")
    listed = open_pairs("val", CLASSES, THREE, data_path=archive, file_list=str(tmp_path / "list.csv"))
    assert listed[0][0] == pairs[2][0]


def test_an_image_and_its_mask_are_augmented_together(tmp_path):
    """The image has the values of its mask, so that both remain equal up to the interpolation at edges."""
    values = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 16))).astype(np.uint8)
    picture, mask = Image.fromarray(20 * values), torch.from_numpy(values)
    transform = transforms.segmentation_transform((32, 40), 48, (0.5, 2.0), 0.5, [0.8])
    padded = flipped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        random.seed(seed)
        image, classes, *_ = transform(Item(picture, mask))
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
        classes = transform(Item(picture, mask)).label
        valid = classes != IGNORED
        sizes.append((int(valid[:, 0].sum()), int(valid[0].sum())))
        evaluated, same, *_ = transforms.scaled_transform(short_side)(Item(picture, mask))
        assert evaluated.shape[1:] == ((short_side, 2 * short_side) if short_side else (30, 60))
        assert same is mask
    assert sizes == [(45, 90), (60, 120), (10, 20)]
    mask = torch.randint(0, 3, (30, 60), dtype=torch.uint8)
    classes = transforms.segmentation_transform((17, 34), 17, (1, 1), 0, [0.5])(Item(picture, mask)).label
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
    pairs = open_pairs("train", CLASSES, THREE, data_path=str(tmp_path))
    for transform, scaled in (
        (transforms.scaled_transform(224), "134400 x 224"),
        (transforms.segmentation_transform(8, 20, (0.1, 2), 0, [0.5] * 3), "24000 x 40"),
    ):
        samples = Samples(pairs, transform, in_chans=3, seed=0)
        with pytest.raises(BadImage, match=rf"train/images/strip.png: its 6000 x 10 pixels .* {scaled}, .* 13,377"):
            samples[0, 0]
        assert samples[0, 1].item.image.shape[0] == 3
    save("strip", (20_000, 800))
    assert samples_of(pairs)[0, 0].item.image.shape[2] == 20_000  # not enlarged


def test_images_of_any_channels_are_augmented():
    picture, mask = torch.rand(5, 20, 30), torch.zeros(20, 30, dtype=torch.uint8)
    transform = transforms.segmentation_transform(24, 24, (0.5, 0.6), 0, [0.1, 0.2, 0.3, 0.4, 0.5])
    image, classes, *_ = transform(Item(picture, mask))
    assert (image.shape, image.dtype) == ((5, 24, 24), torch.float32)
    assert image[:, -1, -1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert classes[-1, -1] == IGNORED
