"""Small datasets of segmentation, in the layouts of known datasets."""

import numpy as np
from PIL import Image

# The folders of images and masks of each split, and the suffix of the images.
LAYOUTS = {
    "ade20k": ({"train": ("images/training", "annotations/training"),
                "val": ("images/validation", "annotations/validation")}, "jpg"),
    "splits": ({"train": ("train/images", "train/masks"), "val": ("val/images", "val/masks")}, "png"),
    "parts": ({"train": ("train/images/Rural", "train/masks/Rural"),
               "val": ("val/images/Urban", "val/masks/Urban")}, "png"),
    "loveda": ({"train": ("Train/Rural/images_png", "Train/Rural/masks_png"),
                "val": ("Val/Urban/images_png", "Val/Urban/masks_png")}, "png"),
}  # fmt: skip
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def scene(generator, size=(24, 30), classes=3):
    """An image of colored rectangles with noise, and its classes: (H, W, 3) and (H, W)."""
    mask = np.zeros(size, dtype=np.uint8)
    for label in range(1, classes):
        top, left = (int(generator.integers(0, side - 8)) for side in size)
        mask[top : top + 8 + label, left : left + 8 + label] = label
    pixels = np.array(COLORS)[mask] + generator.integers(0, 30, size=(*size, 3))
    return pixels.astype(np.uint8), mask


def make_scenes(root, layout="ade20k", train=12, val=5, zero_label=False, size=(24, 30), seed=0):
    """Writes a dataset; with `zero_label`, masks have 0 for ignored pixels, and the classes start at 1."""
    generator = np.random.default_rng(seed)
    folders, suffix = LAYOUTS[layout]
    for split, count in (("train", train), ("val", val)):
        images, masks = (root / folder for folder in folders[split])
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            pixels, mask = scene(generator, size)
            Image.fromarray(pixels).save(images / f"{number:02}.{suffix}")
            mask += np.uint8(zero_label)
            mask[0, :4] = 0 if zero_label else 255
            Image.fromarray(mask).save(masks / f"{number:02}.png")
    return root
