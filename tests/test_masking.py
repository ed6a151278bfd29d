"""Masks given by callers."""

import pytest
import torch

from util.masking import noise_from_mask


def test_every_form_of_a_mask_means_the_same():
    patches = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 1]])
    pixels = patches.reshape(2, 2, 3).repeat_interleave(4, dim=1).repeat_interleave(2, dim=2)
    for mask in (patches, patches.bool(), patches.float(), patches.reshape(2, 2, 3), pixels):
        noise, kept = noise_from_mask(mask, (2, 3), (4, 2))
        assert torch.equal(noise, patches.float())
        assert kept == 3


def test_one_pixel_removes_its_patch():
    mask = torch.zeros(1, 8, 6)
    mask[0, 7, 0] = 1
    assert noise_from_mask(mask, (2, 3), (4, 2))[0].nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]), r"keep as many patches; these keep \[1, 2\]"),
        (torch.ones(2, 4), "keep at least one"),
        (torch.zeros(2, 5), r"must be \(B, 4\), \(B, 2, 2\) or \(B, 8, 8\); got \(2, 5\)"),
    ],
)
def test_impossible_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        noise_from_mask(mask, (2, 2), (4, 4))
