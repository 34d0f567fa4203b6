"""The paper's mathematics, in float64."""

import math

import pytest
import torch
from pydantic import ValidationError

from raecli.flow.augmentation import augmented_latents, noise_scales
from raecli.flow.guidance import guided_velocity
from raecli.flow.path import flow_loss, noisy_latents, target_velocity
from raecli.flow.sampler import sample
from raecli.flow.time import logit_normal_time, shift_time, time_grid, training_time
from raecli.recipe.blocks import FlowSpec, GenerationSpec
from raecli.recipe.recipes import SampleRecipe

F64 = torch.float64


@pytest.mark.parametrize("alpha", [0.5, 1.0, 48**0.5])
def test_shift_adds_log_alpha_to_the_logit_of_time(alpha):
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    torch.testing.assert_close(shift_time(t, alpha).logit(), t.logit() + math.log(alpha))


@pytest.mark.parametrize("alpha", [0.5, 48**0.5])
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(alpha):
    t = torch.linspace(0, 1, 11, dtype=F64)
    shifted = shift_time(t, alpha)
    assert shifted[0] == 0 and shifted[-1] == 1
    torch.testing.assert_close(shift_time(shifted, 1 / alpha), t)


def test_time_shift_of_the_paper():
    assert FlowSpec(time_shift_dim=256 * 768).time_shift == pytest.approx(6.9282, abs=1e-4)  # 256 pixels
    assert FlowSpec(time_shift_dim=1024 * 768).time_shift == pytest.approx(13.8564, abs=1e-4)  # 512 pixels


def test_path_runs_from_latents_to_noise_with_the_target_as_its_slope():
    latents, noise = torch.randn(2, 3, 4, 4, 4, dtype=F64)
    ends = [noisy_latents(latents, noise, torch.full((3,), t, dtype=F64)) for t in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], latents)
    torch.testing.assert_close(ends[1], noise)
    halfway = noisy_latents(latents, noise, torch.full((3,), 0.5, dtype=F64))
    torch.testing.assert_close((halfway - latents) / 0.5, target_velocity(latents, noise))


def test_loss_is_zero_at_the_target_and_one_number_a_sample():
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    assert flow_loss(noise - latents, latents, noise).abs().max() == 0
    torch.testing.assert_close(flow_loss(noise - latents + 2, latents, noise), torch.full((3,), 4.0))


def test_logit_normal_time_has_a_normal_logit():
    uniform = (torch.arange(10000, dtype=F64) + 0.5) / 10000
    logit = logit_normal_time(uniform, mean=0.3, std=1.7).logit()
    assert logit.mean() == pytest.approx(0.3, abs=1e-3) and logit.std() == pytest.approx(1.7, abs=2e-3)


def test_release_times_have_the_release_means():
    uniform = (torch.arange(100000, dtype=F64) + 0.5) / 100000
    t = training_time(uniform, distribution="logit_normal", mean=0, std=1, maximum=0.999, time_shift=48**0.5)
    assert t.mean() == pytest.approx(0.8374, abs=5e-4)  # FACTS section 3
    assert t.median() == pytest.approx(0.874, abs=5e-4)


def test_uniform_times_fill_the_interval_up_to_the_maximum():
    t = training_time(torch.tensor([0.0, 0.5, 1.0]), distribution="uniform", mean=0, std=1, maximum=0.5, time_shift=1.0)
    torch.testing.assert_close(t, torch.tensor([0.0, 0.25, 0.5]))


def test_grids_of_paper_and_release():
    paper, released = (time_grid(50, kind=kind, time_shift=48**0.5) for kind in ("paper", "released"))
    assert len(paper) == 51 and paper[0] == 1 and paper[-1] == 0
    assert len(released) == 50 and released[-1] == pytest.approx(0.00689, abs=1e-5)
    assert time_grid(50, kind="released", time_shift=2 * 48**0.5)[-1] == pytest.approx(0.0137, abs=1e-4)
    assert (paper.diff() < 0).all() and (released.diff() < 0).all()


def test_a_grid_without_a_step_is_refused():
    """Else the images would be the decoded noise."""
    with pytest.raises(ValueError, match="none of 1"):
        time_grid(1, kind="released", time_shift=1.0)
    told = {"steps": 1, "time_grid": "released", "autoencoder": "pixels"}
    for make in (
        lambda: SampleRecipe(stage="sample", model="a", output="b", **told),
        lambda: GenerationSpec(every="1 epochs", num=4, **told),
    ):
        with pytest.raises(ValidationError, match="steps is at least 2"):
            make()
    assert time_grid(2, kind="released", time_shift=1.0).tolist() == pytest.approx([1, 0.001])


class PointMass(torch.nn.Module):
    """The exact velocity when all data is one point: (x - point) / t. Labels choose the point; counts its calls."""

    null_label, time_shift = 1, 3.0

    def __init__(self, points: torch.Tensor) -> None:
        super().__init__()
        self.points, self.calls, self.evaluated = points, 0, 0

    def forward(self, noisy, t, labels):
        self.calls, self.evaluated = self.calls + 1, self.evaluated + len(noisy)
        return (noisy - self.points[labels]) / t.view(-1, 1, 1, 1)


@pytest.fixture
def points():
    return torch.stack([torch.full((2, 2, 2), 0.7), torch.full((2, 2, 2), -0.2)])


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 6.9])
def test_a_straight_path_is_followed_exactly_for_any_steps_and_shift(points, solver, steps, alpha):
    noise = torch.randn(3, 2, 2, 2)
    end = sample(
        PointMass(points), noise, torch.zeros(3, dtype=torch.long), steps=steps, solver=solver, time_shift=alpha
    )
    torch.testing.assert_close(end, points[0].expand_as(end), atol=2e-5, rtol=0)  # fp32 over 50 steps


def test_evaluations_of_each_solver_and_grid(points):
    labels, noise = torch.zeros(1, dtype=torch.long), torch.randn(1, 2, 2, 2)
    counts = {}
    for solver in ("euler", "heun"):
        for grid in ("paper", "released"):
            model = PointMass(points)
            sample(model, noise, labels, steps=50, solver=solver, time_grid=grid)
            counts[solver, grid] = model.calls
    assert counts == {
        ("euler", "paper"): 50,
        ("euler", "released"): 49,
        ("heun", "paper"): 99,
        ("heun", "released"): 98,
    }


def test_heun_is_second_order_and_euler_first():
    class Curved(PointMass):
        def forward(self, noisy, t, labels):
            return noisy * t.view(-1, 1, 1, 1)  # x' = x t: x(0) = x(1) exp(-1/2)

    model, noise = Curved(torch.zeros(2, 2, 2, 2)), torch.ones(1, 2, 2, 2)
    errors = {}
    for solver in ("euler", "heun"):
        ends = [
            sample(model, noise, torch.zeros(1, dtype=torch.long), steps=n, solver=solver, time_shift=1.0)
            for n in (20, 40)
        ]
        errors[solver] = [abs(float(end.mean()) - math.exp(-0.5)) for end in ends]
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.1)
    assert errors["heun"][0] / errors["heun"][1] == pytest.approx(4, rel=0.2)


def test_the_ends_of_the_interval_are_inside_whatever_their_rounding(points):
    noisy, labels = torch.randn(1, 2, 2, 2), torch.zeros(1, dtype=torch.long)
    for end in (0.1, 0.3, 0.7, 0.9):  # in float32 some lie above, some below
        for interval in ((end, 1.0), (0.0, end)):
            guide = PointMass(points.flip(0))
            velocity = guided_velocity(PointMass(points), scale=2.0, interval=interval, guide=guide)
            velocity(noisy, float(torch.tensor(end)), labels)
            assert guide.calls == 1, (end, interval)


def test_guidance_of_scale_one_is_the_model_itself(points):
    noisy, labels, guide = torch.randn(2, 2, 2, 2), torch.zeros(2, dtype=torch.long), PointMass(points)
    found = guided_velocity(PointMass(points), scale=1.0, guide=guide)(noisy, 0.5, labels)
    assert torch.equal(found, PointMass(points)(noisy, torch.full((2,), 0.5), labels)) and guide.calls == 0


def test_guidance_extrapolates_away_from_the_weak_model(points):
    noisy, t, labels = torch.randn(2, 2, 2, 2), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.long)
    strong, weak = PointMass(points)(noisy, t, labels), PointMass(points)(noisy, t, labels + 1)
    free = guided_velocity(PointMass(points), scale=2.5, null_label=1)(noisy, 0.5, labels)
    torch.testing.assert_close(free, weak + 2.5 * (strong - weak))
    auto = guided_velocity(PointMass(points), scale=2.5, guide=PointMass(points.flip(0)))(noisy, 0.5, labels)
    torch.testing.assert_close(auto, free)


def test_classifier_free_guidance_without_a_null_label_is_refused(points):
    with pytest.raises(ValueError, match="null label"):
        guided_velocity(PointMass(points), scale=2.0)


def test_noise_of_decoding_follows_its_law():
    draws = torch.tensor([-2.0, 0.5])
    torch.testing.assert_close(noise_scales(draws, tau=0.8, law="halfnormal"), torch.tensor([1.6, 0.4]))
    with pytest.raises(ValueError, match="gauss"):
        noise_scales(draws, tau=0.8, law="gauss")
    latents, noise = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = augmented_latents(latents, noise, torch.tensor([0.0, 2.0]))
    assert noisy[0].abs().max() == 0
    torch.testing.assert_close(noisy[1], 2 * noise[1])
