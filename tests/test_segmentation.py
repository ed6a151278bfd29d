"""Features of patches, and the example of segmentation: its pictures, its runs and its table."""

import numpy as np
import pytest
import torch
from mains import call
from PIL import Image

from demo import segmentation
from mae.checkpoints import checkpoint
from mae.compare import store
from mae.data.segmentation_masks import read_palette
from mae.inference import get_model, maps


@pytest.mark.parametrize(("size", "grid"), [((33, 47), (8, 12)), ((5, 70), (1, 18)), ((1, 2), (1, 1))])
@pytest.mark.parametrize("name", ["mae_vit_mini_patch4", "vit_mini_patch4"])
def test_images_that_the_patch_does_not_divide_are_scaled(name, size, grid):
    torch.manual_seed(0)
    model = get_model(name, input_size=[32, 48])
    images = torch.randn(1, 3, *size)
    features = maps.dense(model, images)
    assert features.shape == (1, 4 * 128, *grid)
    sides = [4 * side for side in grid]
    scaled = torch.nn.functional.interpolate(images, sides, mode="bicubic", antialias=True)
    torch.testing.assert_close(features, maps.dense(model, scaled))
    for layers in (0, 5):
        with pytest.raises(ValueError, match=f"layers={layers}"):
            maps.dense(model, images, layers)


def test_pictures_compose_garments_on_textures():
    pictures, masks = segmentation.make_pictures("train", 30, seed=3)
    assert pictures.shape == masks.shape == (30, 28, 28)
    assert pictures.dtype == masks.dtype == np.uint8
    archive = np.load(segmentation.ARCHIVE)
    chosen = np.random.default_rng(3).integers(len(archive["train_images"]), size=30)
    shifts = set()
    for picture, mask, index in zip(pictures, masks, chosen, strict=True):
        garment = np.pad(archive["train_images"][index], 4)
        cuts = {(top, left): garment[top : top + 28, left : left + 28] for top in range(9) for left in range(9)}
        matches = [shift for shift, cut in cuts.items() if np.array_equal(cut > 30, mask > 0)
                   and np.array_equal(cut[mask > 0], picture[mask > 0])]  # fmt: skip
        assert matches
        assert set(np.unique(mask)) <= {0, 1 + archive["train_labels"][index]}
        shifts |= set(matches)
    assert len(shifts) > 12
    backgrounds = [picture[mask == 0].astype(float) for picture, mask in zip(pictures, masks, strict=True)]
    assert np.mean([background.std() for background in backgrounds]) > 5
    assert max(background.max() for background in backgrounds) < 121
    assert np.array_equal(segmentation.make_pictures("train", 30, seed=3)[0], pictures)


def saved(folder, **settings):
    torch.manual_seed(1)
    model = get_model("mae_vit_mini_patch4", **settings)
    torch.save({"model": model.state_dict(), "args": model.settings}, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.slow
def test_the_command_compares_three_runs_of_each_seed(tmp_path, capsys, monkeypatch):
    calls, run = {}, store.run_once

    def run_an_epoch(folder, script, flags, read):
        calls[folder.name] = flags
        return run(folder, script, {**flags, "epochs": 1, "num_workers": 0}, read)

    monkeypatch.setattr(store, "run_once", run_an_epoch)
    monkeypatch.setattr(segmentation, "VALIDATION", 9)
    encoder = saved(tmp_path, input_size=28, patch_size=7, in_chans=1)
    scores = call(segmentation, model=encoder, pictures=40, seeds=2, out=tmp_path / "out", device="cpu")
    output = capsys.readouterr().out
    assert list(scores) == list(segmentation.RUNS)
    for title, values in scores.items():
        assert len(values) == 2
        assert f"| {title} | {np.mean(values):.1f}% ± {np.std(values, ddof=1):.1f} |" in output
    assert Image.open(tmp_path / "out/segmentation.png").width > 900
    data = tmp_path / "out/pictures_40"
    assert len(list(data.glob("images/training/*.png"))) == 40
    assert len(list(data.glob("annotations/validation/*.png"))) == 9
    assert read_palette(data / "palette.txt").names[:2] == ["texture", "T-shirt/top"]
    flags = calls["pre-trained_encoder_fine-tuned_1"]
    assert (flags["seed"], flags["unfreeze_blocks"], flags["finetune"]) == (1, "all", encoder)
    assert calls["untrained_encoder_frozen_0"]["finetune"] == tmp_path / "out" / "untrained_0.pth"
    runs = (f"{name}_encoder_frozen_{seed}" for name, seed in (("untrained", 0), ("untrained", 1), ("pre-trained", 0)))
    files = [*(tmp_path / "out" / run / "checkpoint-0.pth" for run in runs), encoder]
    frozen, other, trained, given = (checkpoint.read(file)["model"]["blocks.0.mlp.fc1.weight"] for file in files)
    assert torch.equal(trained, given)
    assert not torch.equal(frozen, other) and not torch.equal(trained, frozen)


def test_the_command_needs_an_encoder_of_garments(tmp_path):
    with pytest.raises(ValueError, match="28 x 28"):
        call(segmentation, model=saved(tmp_path, input_size=32), out=tmp_path)
