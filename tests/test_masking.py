"""Explicit masks, and masking strategies."""

import pytest
import torch
from mains import in_processes, lines

from mae.masking import (
    block_mask,
    check_ratio,
    grid_mask,
    noise_from_mask,
    num_visible,
    random_block_noise,
    ratio_of,
    ratio_of_patches,
    sampler,
    shuffle,
)
from models_mae import MaskedAutoencoderViT, mae_vit_mini_patch4


def test_every_form_of_a_mask_is_equivalent():
    patches = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 1]])
    pixels = patches.reshape(2, 2, 3).repeat_interleave(4, dim=1).repeat_interleave(2, dim=2)
    for mask in (patches, patches.bool(), patches.float(), patches.reshape(2, 2, 3), pixels):
        noise, ratio = noise_from_mask(mask, (2, 3), (4, 2))
        assert torch.equal(noise, patches.float())
        assert num_visible(6, ratio) == 3
    one_pixel = torch.zeros(2, 8, 6, dtype=torch.bool)
    one_pixel[:, 5, 3] = True
    assert noise_from_mask(one_pixel, (2, 3), (4, 2))[0].nonzero().tolist() == [[0, 4], [1, 4]]


@pytest.mark.parametrize(("mask", "message"), [
    (torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]), r"\[1, 2\]"),
    (torch.zeros(2, 5), r"\(2, 5\)")
])  # fmt: skip
def test_invalid_masks_are_errors(mask, message):
    with pytest.raises(ValueError, match=message):
        noise_from_mask(mask, (2, 2), (4, 4))


def test_a_number_of_visible_patches_has_a_ratio():
    for num_patches in range(1, 1501):
        ratios = [ratio_of(visible, num_patches) for visible in range(num_patches + 1)]
        assert min(ratios) >= 0 and max(ratios) < 1
        assert [num_visible(num_patches, ratio) for ratio in ratios] == [*range(num_patches + 1)]


class Rows(MaskedAutoencoderViT):
    """A strategy that shows whole rows, as many as the mask ratio allows."""

    def random_masking(self, x, mask_ratio, noise=None, **context):
        rows, columns = self.grid_size
        ranks = noise.unflatten(1, (rows, columns))[..., 0].argsort(dim=1).argsort(dim=1)
        visible = num_visible(rows, mask_ratio) * columns
        return super().random_masking(
            x, ratio_of(visible, x.shape[1]), ranks.repeat_interleave(columns, dim=1), **context
        )


def test_a_strategy_of_rows_shows_whole_rows():
    """4 of 24 rows of 40 patches. A fifth of the patches, 191, would split a row."""
    model = Rows(img_size=(24, 40), patch_size=1, in_chans=1, embed_dim=8, depth=1, num_heads=1, decoder_embed_dim=8,
                 decoder_depth=1, decoder_num_heads=1)  # fmt: skip
    mask = model(torch.rand(3, 1, 24, 40), 0.8, noise=torch.rand(3, 960))[2].view(3, 24, 40)
    assert ((mask == 0).sum(dim=(1, 2)) == 160).all()
    assert set(mask.mean(dim=2).flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_blocks_mask_the_ratio_in_every_image(ratio):
    masks = block_mask(200, (14, 12), ratio, torch.Generator().manual_seed(0))
    assert masks.dtype == torch.bool
    assert set((~masks).flatten(1).sum(dim=1).tolist()) == {int(168 * (1 - ratio))}
    assert len(torch.unique(masks.flatten(1), dim=0)) > 190
    assert torch.equal(block_mask(200, (14, 12), ratio, torch.Generator().manual_seed(0)), masks)
    often = masks.float().mean(dim=0)
    assert min(often.amax(dim=0).min(), often.amax(dim=1).min()) > 0.1  # blocks reach every column and row


def test_grid_masking_leaves_one_of_four_patches_visible():
    masks = grid_mask(2, (4, 6))
    assert masks.shape == (2, 4, 6)
    assert (~masks[1]).nonzero().tolist() == [[0, 0], [0, 2], [0, 4], [2, 0], [2, 2], [2, 4]]


def test_blocks_have_at_least_16_patches():
    """With 32 of 16 x 16 patches masked, the first rectangle has at least 16 patches."""
    masks = block_mask(200, (16, 16), 1 - 224 / 256, torch.Generator().manual_seed(0))
    assert set(masks.flatten(1).sum(dim=1).tolist()) == {32}
    largest = [max(rectangles(mask)) for mask in masks]
    assert min(largest) >= 12  # 3 x 4 and 2 x 7 are what rounding leaves of 16


def rectangles(mask):
    """Areas of the rectangles that are masked as one."""
    rows, columns = mask.shape
    summed = torch.zeros(rows + 1, columns + 1, dtype=torch.int64)
    summed[1:, 1:] = mask.long().cumsum(0).cumsum(1)
    for height in range(1, rows + 1):
        for width in range(1, columns + 1):
            sums = summed[height:, width:] - summed[:-height, width:] - summed[height:, :-width]
            if ((sums + summed[:-height, :-width]) == height * width).any():
                yield height * width


def test_blocks_of_a_wide_grid_lie_in_it():
    """In a grid of 2 x 40 patches, blocks have up to 2 rows and more columns than rows."""
    masks = block_mask(100, (2, 40), 0.5, torch.Generator().manual_seed(0))
    both = (masks[:, 0] & masks[:, 1]).sum(dim=1).float().mean()
    assert both > 15  # of the 20 columns that a mask of full height would have
    row = torch.nn.functional.pad(masks[:, 0].int(), (1, 0))
    assert (row.diff() == 1).sum() / 100 < 4  # runs: blocks as narrow as the grid is high would make 6


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_random_patches_replace_visible_ones_without_valid_pixels(masking):
    """The first masked patches would be visible in nearly every image."""
    draw_noise, mask_ratio = sampler(masking, (8, 8), 0.75)
    valid = torch.ones(200, 32, 32, dtype=torch.bool)
    valid[:, 16:] = False
    noise = []
    for seed in range(200):
        torch.manual_seed(seed)
        noise.append(draw_noise())
    model = mae_vit_mini_patch4(img_size=32)
    masks = model(torch.rand(200, 3, 32, 32), mask_ratio, noise=torch.stack(noise), valid=valid)[2]
    visible = 1 - masks.unflatten(1, (8, 8)).mean(dim=0)
    assert (visible[4:] == 0).all()
    rates = visible[:4].mean(dim=1)
    assert rates.sum() == pytest.approx(2, abs=0.01)  # half of the valid patches are visible
    assert (rates > 0.3).all()
    assert (rates < 0.8).all()


@pytest.mark.parametrize("masking", ["block", "grid"])
@pytest.mark.parametrize("grid_size", [(14, 14), (7, 7), (8, 4)])
def test_training_uses_the_masks_of_the_sampler(masking, grid_size):
    """test_updates.py has random masks."""
    draw_noise, mask_ratio = sampler(masking, grid_size, 0.75)
    model = mae_vit_mini_patch4(img_size=(4 * grid_size[0], 4 * grid_size[1]))
    torch.manual_seed(3)
    noise = torch.stack([draw_noise() for _ in range(5)])
    masks = model(torch.rand(5, 3, 4 * grid_size[0], 4 * grid_size[1]), mask_ratio, noise=noise)[2]
    masks = masks.unflatten(1, grid_size).bool()
    torch.manual_seed(3)
    for mask in masks:
        assert torch.equal(mask, (block_mask(1, grid_size, 0.75) if masking == "block" else grid_mask(1, grid_size))[0])


@pytest.mark.parametrize(
    ("grid_size", "ratio", "side", "visible"),
    [((16, 16), 0.75, 4, 4), ((16, 16), 0.8, 4, 3), ((28, 28), 0.75, 4, 12), ((4, 6), 0.75, 2, 1), ((8, 4), 0.5, 4, 1)],
)
def test_random_blocks_are_visible_as_a_whole(grid_size, ratio, side, visible):
    """Every sample has int(blocks * (1 - ratio)) visible blocks; tokens are sorted by block, then row-major."""
    draw_noise, mask_ratio = sampler("random", grid_size, ratio, side)
    noise = torch.stack([draw_noise() for _ in range(50)])
    ids, count = shuffle(torch.zeros(50, grid_size[0] * grid_size[1], 1), mask_ratio, noise)
    assert count == visible * side**2
    columns = grid_size[1]
    for order in ids[:, :count].tolist():
        for start in range(0, count, side**2):
            top, left = divmod(order[start], columns)
            assert top % side == left % side == 0
            block = [(top + i) * columns + left + j for i in range(side) for j in range(side)]
            assert order[start : start + side**2] == block


def test_incomplete_blocks_of_any_grid():
    """A grid of 5 x 7 patches has 2 x 2 blocks of up to 4 x 4 patches; one or two of them are visible."""
    sizes = set()
    for seed in range(40):
        noise = random_block_noise((5, 7), 4, torch.Generator().manual_seed(seed))
        assert torch.equal(noise, random_block_noise((5, 7), 4, torch.Generator().manual_seed(seed)))
        blocks = noise.unflatten(0, (5, 7))
        for part in (blocks[:4, :4], blocks[:4, 4:], blocks[4:, :4], blocks[4:, 4:]):
            assert len(part.unique()) == 1
        ids, count = shuffle(torch.zeros(1, 35, 1), ratio_of_patches(noise, 0.75), noise[None])
        visible = torch.zeros(35, dtype=torch.bool)
        visible[ids[0, :count]] = True
        assert torch.equal(visible, noise == 0)
        sizes.add(count)
        assert num_visible(35, ratio_of_patches(noise, 0.5)) == int((noise < 2).sum())
    assert sizes == {16, 12, 4, 3}
    with pytest.raises(ValueError, match="mask_ratio"):
        shuffle(torch.zeros(1, 35, 1), ratio_of_patches(noise, 0.8), noise[None])


def test_random_blocks_are_uniform():
    """Chi-square of the counts of the 16 blocks; 4 of them are visible in each sample, without replacement."""
    draw_noise, _ = sampler("random", (16, 16), 0.75, 4)
    noise = torch.stack([draw_noise() for _ in range(4000)]).reshape(4000, 4, 4, 4, 4)[:, :, 0, :, 0].flatten(1)
    counts = (noise < 4).sum(dim=0)
    assert counts.sum() == 4 * 4000
    statistic = ((counts - 1000) ** 2 / 1000).sum() / (1 - 4 / 16) * 15 / 16
    assert 4.6 < statistic < 32.8  # .5 % on both sides, for 15 degrees of freedom


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("random", (14, 14), 0.75, 4), "mask_block=4"),
        (("random", (7, 7), 0.75, 2), "mask_block=2"),
        (("block", (16, 16), 0.75, 4), "mask_block=4"),
        (("random", (4, 4), 0.75, 4), "mask_ratio=0.75"),
        (("random", (4, 8), 0.75, 4), "mask_ratio=0.75"),
        (("grid", (14, 14), 0.5), "mask_ratio=0.5"),
        (("grid", (1, 16), 0.75), "1 x 16"),
        (("nonsense", (4, 4), 0.75), "masking=nonsense"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(*settings)


@pytest.mark.parametrize(("num_patches", "ratio", "visible"), [
    (1, 0.75, 0), (1, 0.0, 1), (2, 0.0, 2), (16, 0.0, 16), (196, 0.999, 0),
])  # fmt: skip
def test_ratios_without_masked_or_visible_patches(num_patches, ratio, visible):
    with pytest.raises(ValueError, match=f"mask_ratio={ratio:g} .*{visible} of {num_patches}"):
        check_ratio(num_patches, ratio)


def test_masks_of_runs_do_not_depend_on_workers_and_processes(pretrain, pictures, tmp_path):
    def losses(out):
        return [line["train_loss"] for line in lines(out)]

    kinds = [{"masking": "random"}, {"masking": "block"}, {"masking": "grid"}, {"mask_block": 2}]
    settings = {"warmup_epochs": 0, "epochs": 1}
    one = [losses(pretrain(f"one{n}", **kind, **settings)) for n, kind in enumerate(kinds)]
    assert len({loss for (loss,) in one}) == 4
    for n in (1, 3):
        assert losses(pretrain(f"workers{n}", **kinds[n], **settings, num_workers=2)) == one[n]
    flags = ("--mask_block", 2, "--warmup_epochs", 0, "--batch_size", 2, "--epochs", 1)
    in_processes(2, pictures, tmp_path / "processes", *flags)
    assert losses(tmp_path / "processes") == pytest.approx(one[3], rel=1e-5)


def test_high_and_wide_blocks_are_equally_frequent():
    masks = block_mask(1000, (16, 16), 1 - 240.5 / 256, torch.Generator().manual_seed(0))
    rows, columns = masks.any(dim=2).sum(dim=1), masks.any(dim=1).sum(dim=1)
    assert 0.7 < int((rows > columns).sum()) / int((columns > rows).sum()) < 1.4
