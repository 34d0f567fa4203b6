"""Hinge loss, adaptive weight and DiffAug: values, ranges, gradients in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from raecli.losses.adversarial import adaptive_weight, generator_loss, hinge_loss
from raecli.losses.augment import DRAWS, diff_augment


def test_the_hinge_loss_is_half_the_sum_and_is_zero_beyond_the_margin():
    real, fake = torch.tensor([[0.5, 3.0]]), torch.tensor([[-0.25, 1.0]])
    assert hinge_loss(real, fake).item() == pytest.approx((0.25 + (0.75 + 2.0) / 2) / 2)
    assert hinge_loss(real * 0 + 1, fake * 0 - 1) == 0
    assert generator_loss(fake).item() == pytest.approx(-0.375)


def test_the_adaptive_weight_is_the_ratio_clamped_and_without_gradient():
    norms = torch.tensor([2.0, 4.0], requires_grad=True)
    found = adaptive_weight(norms[0], norms[1])
    assert found.item() == pytest.approx(0.5, rel=1e-6) and not found.requires_grad
    assert adaptive_weight(torch.tensor(1.0), torch.tensor(0.0)).item() == 1e4
    assert adaptive_weight(torch.tensor(0.0), torch.tensor(1.0)).item() == 0


def test_gradients_in_float64():
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: hinge_loss(s[0], s[1]), (scores,))
    assert gradcheck(generator_loss, (scores,))
    images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    assert gradcheck(lambda x: diff_augment(x, torch.rand(2, DRAWS, generator=seeded()), cutout=0.5), (images,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def still(count: int) -> torch.Tensor:
    """Draws that change nothing: no move, brightness + 0, saturation 1, contrast 1."""
    return torch.full((count, DRAWS), 0.5)


def test_draws_in_the_middle_change_nothing_but_the_cutout():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(diff_augment(images, still(2), cutout=0), images)
    cut = diff_augment(images, still(2), cutout=0.5)
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    assert (cut[:, :, hole] == 0).all()
    torch.testing.assert_close(cut[:, :, ~hole], images[:, :, ~hole])


@pytest.mark.parametrize(("draw", "pixels"), [(0.0, -2), (0.999, 2)])
def test_translation_moves_up_to_an_eighth_and_what_comes_in_is_zero(draw, pixels):
    images, draws = torch.rand(1, 3, 16, 16) + 1, still(1)
    draws[0, 0] = draw  # down
    moved = diff_augment(images, draws, cutout=0)
    if pixels > 0:
        torch.testing.assert_close(moved[:, :, pixels:], images[:, :, :-pixels])
        assert (moved[:, :, :pixels] == 0).all()
    else:
        torch.testing.assert_close(moved[:, :, :pixels], images[:, :, -pixels:])
        assert (moved[:, :, pixels:] == 0).all()


def test_colours_have_the_ranges_of_facts_section_4():
    images = torch.rand(1, 3, 8, 8)
    grey, level = images.mean(1, keepdim=True), images.mean(dim=(1, 2, 3), keepdim=True)
    for column, draw, expected in [
        (2, 0.0, images - 0.5),
        (2, 1.0, images + 0.5),
        (3, 0.0, grey.expand_as(images)),
        (3, 1.0, 2 * images - grey),
        (4, 0.0, (images + level) / 2),
        (4, 1.0, 1.5 * images - 0.5 * level),
    ]:
        draws = still(1)
        draws[0, column] = draw
        torch.testing.assert_close(diff_augment(images, draws, cutout=0), expected)


def test_an_images_augmentation_is_its_own():
    images, draws = torch.rand(4, 3, 8, 8), torch.rand(4, DRAWS)
    together = diff_augment(images, draws, cutout=0.5)
    torch.testing.assert_close(diff_augment(images[2:], draws[2:], cutout=0.5), together[2:])


def test_the_square_stays_a_square_wherever_its_centre_falls():
    draws = torch.rand(200, DRAWS, generator=seeded())
    zeros = diff_augment(torch.ones(200, 3, 10, 10), torch.cat([still(200)[:, :5], draws[:, 5:]], 1), cutout=0.4) == 0
    holes = zeros[:, 0].sum(dim=(1, 2))
    assert holes.max() == 16 and holes.min() >= 4  # a centre at the edge leaves a quarter
