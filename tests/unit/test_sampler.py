"""Solvers: how often they ask the models, what they keep, and where the SDE lands."""

import functools
import gc
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from raecli.data.order import normals
from raecli.flow.sampler import evaluation_counts, sample
from raecli.flow.time import time_grid

INTERVALS = [(0.0, 1.0), (0.25, 0.75), (0.0, 0.5), (0.999, 1.0), (0.4, 0.4001)]


class Counted(nn.Module):
    """A smooth velocity that depends on the label; remembers (samples, time, labels) of every call."""

    null_label, time_shift = 3, 6.93

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength, self.calls = strength, []

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((len(noisy), float(t[0]), labels.tolist()))
        assert len({*t.tolist()}) == 1 and noisy.dtype == torch.float32
        pull = self.strength * (1 + labels).view(-1, 1, 1, 1)
        return torch.tanh(noisy * pull) + t.view(-1, 1, 1, 1) * noisy

    @property
    def evaluated(self) -> int:
        return sum(samples for samples, _, _ in self.calls)


def least(steps: int, solver: str, grid: str, interval: tuple[float, float]) -> tuple[int, int]:
    """By hand: the times where a slope is needed, and how many of them lie in the interval."""
    points = (
        [i / steps for i in range(steps + 1)] if grid == "paper" else [0.999 * i / (steps - 1) for i in range(steps)]
    )
    times = [6.93 * (1 - p) / (1 + 5.93 * (1 - p)) for p in points]
    visited = list(times[:-1])
    if solver == "heun":
        visited += [t for t in times[1:] if t > 1e-9]
    return len(visited), sum(interval[0] <= t <= interval[1] for t in visited)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("grid", ["paper", "released"])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize("way", ["cfg", "autoguidance", "none"])
def test_a_guided_run_evaluates_no_model_more_often_than_it_must(solver, grid, way, interval):
    batch, steps = 3, 20
    noise, labels = torch.randn(batch, 2, 2, 2), torch.arange(batch)
    model, guide = Counted(0.3), Counted(0.1) if way == "autoguidance" else None
    scale = 1.0 if way == "none" else 2.0
    sample(
        model,
        noise,
        labels,
        steps=steps,
        solver=solver,
        time_grid=grid,
        guidance_scale=scale,
        guidance_interval=interval,
        guide=guide,
        step_noise=lambda step: torch.zeros_like(noise),
    )
    first, second = least(steps, solver, grid, interval)
    second = 0 if way == "none" else second
    counted = evaluation_counts(
        time_grid(steps, kind=grid, time_shift=6.93), solver=solver, guidance_scale=scale, guidance_interval=interval
    )
    assert counted == (first, second)
    if way == "autoguidance":
        assert (model.evaluated, guide.evaluated) == (batch * first, batch * second)
        assert {samples for samples, _, _ in guide.calls} <= {batch}  # never on a doubled batch
        assert all(given == labels.tolist() for _, _, given in guide.calls + model.calls)
    else:
        assert model.evaluated == batch * (first + second)
        assert len(model.calls) == first  # the null half rides along in the same call
        doubled = [given for samples, _, given in model.calls if samples == 2 * batch]
        assert len(doubled) == second and all(given == [0, 1, 2, 3, 3, 3] for given in doubled)


def test_leaving_evaluations_out_changes_no_image():
    """Against the release's way: both halves always, on a doubled batch, and thrown away where not wanted."""
    noise, labels, interval = torch.randn(3, 2, 2, 2), torch.arange(3), (0.3, 0.8)
    times = time_grid(20, kind="paper", time_shift=6.93).tolist()
    for guide in (None, Counted(0.1)):
        ours = sample(
            Counted(0.3), noise, labels, steps=20, guidance_scale=1.8, guidance_interval=interval, guide=guide
        )
        state, model = noise, Counted(0.3)
        for now, after in itertools.pairwise(times):
            t, both = torch.full((6,), now), torch.cat([labels, torch.full_like(labels, 3)])
            strong, null = model(torch.cat([state, state]), t, both).chunk(2)
            weak = null if guide is None else guide(torch.cat([state, state]), t, torch.cat([labels, labels]))[:3]
            steered = weak + 1.8 * (strong - weak)
            state = state + (after - now) * (steered if interval[0] <= now <= interval[1] else strong)
        torch.testing.assert_close(ours, state, atol=1e-6, rtol=0)  # float32 over 20 steps


def test_one_state_is_kept():
    shape, most = (4, 3, 5, 7), []

    class Watched(Counted):
        def forward(self, noisy, t, labels):
            tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
            alive = [thing for thing in tensors if thing.shape == shape]
            most.append(len({thing.data_ptr() for thing in alive}))
            return super().forward(noisy, t, labels)

    sample(Watched(0.3), torch.randn(shape), torch.zeros(4, dtype=torch.long), steps=6)
    assert len(most) == 6 and min(most) >= 1 and max(most) <= 3  # the noise given, the state, and the slope of a step


def test_the_state_is_float32_whatever_the_model_returns():
    class Half(Counted):
        def forward(self, noisy, t, labels):
            return super().forward(noisy, t, labels).bfloat16()

    states = []
    labels = torch.zeros(2, dtype=torch.long)
    end = sample(
        Half(0.3), torch.randn(2, 2, 2, 2), labels, steps=5, watch=lambda step, t, state, seen: states.append(state)
    )
    assert end.dtype == torch.float32 and {state.dtype for state in states} == {torch.float32} and len(states) == 5


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_the_watcher_sees_noise_first_and_the_expected_latents_beside_the_state(solver):
    noise, labels, seen = torch.randn(2, 2, 2, 2), torch.zeros(2, dtype=torch.long), []
    model = Counted(0.3)

    def watch(step, t, state, expected):
        seen.append((step, t))
        if step == 0:
            torch.testing.assert_close(state, noise)
        torch.testing.assert_close(expected, state - t * model(state, torch.full((2,), t), labels))

    zeros = torch.zeros_like(noise)
    sample(model, noise, labels, steps=6, solver=solver, watch=watch, step_noise=lambda step: zeros)
    times = time_grid(6, kind="paper", time_shift=6.93).tolist()
    assert seen == list(enumerate(times[:-1]))


class Gaussian(nn.Module):
    """The exact velocity for data ~ N(mean, deviation^2): E[noise - x | x_t], linear in x_t."""

    time_shift, null_label = 1.0, 0

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, deviation**2

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1).double()
        total = (1 - t) ** 2 * self.variance + t**2  # Var x_t
        slope = (t - (1 - t) * self.variance) / total  # Cov(noise - x, x_t) / Var x_t
        return -self.mean + slope * (noisy.double() - (1 - t) * self.mean)


def keyed_noise(shape: tuple[int, ...], batch: range):
    return lambda step: normals(shape, 0, f"sde/{step}", batch, "cpu")


@functools.cache
def gaussian_ends(diffusion: float, steps: int) -> Tensor:
    shape, batch = (2, 50, 50), range(4)  # 20000 draws
    noise = normals(shape, 0, "sample", batch, "cpu")
    labels = torch.zeros(len(batch), dtype=torch.long)
    return sample(
        Gaussian(0.7, 0.4),
        noise,
        labels,
        steps=steps,
        solver="sde",
        diffusion=diffusion,
        step_noise=keyed_noise(shape, batch),
    )


@pytest.mark.parametrize("diffusion", [0.25, 1.0, 4.0])
def test_the_sde_keeps_the_data_distributions_mean_and_variance(diffusion):
    ends = gaussian_ends(diffusion, 400)
    # Standard errors of 20000 draws: .4/sqrt(20000) = .0028 and .4/sqrt(40000) = .002; Euler's own error is O(1/steps).
    assert float(ends.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(ends.std()) == pytest.approx(0.4, abs=0.01)


def test_the_error_of_the_sdes_variance_falls_with_the_steps():
    errors = [abs(float(gaussian_ends(4.0, steps).std()) - 0.4) for steps in (10, 40, 400)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_more_diffusion_forgets_the_starting_noise():
    shape, batch = (2, 50, 50), range(4)
    noise = normals(shape, 0, "sample", batch, "cpu")
    correlations = [
        float(torch.corrcoef(torch.stack([noise.flatten(), gaussian_ends(diffusion, 400).flatten()]))[0, 1])
        for diffusion in (0.25, 1.0, 4.0)
    ]
    assert correlations == sorted(correlations, reverse=True)
    assert correlations[0] > 0.8 and correlations[2] < 0.5


@pytest.mark.parametrize("grid", ["paper", "released"])
def test_without_diffusion_the_sde_is_the_ode_bit_for_bit(grid):
    noise, labels = torch.randn(3, 2, 2, 2), torch.arange(3)
    kept = {"steps": 17, "time_grid": grid, "guidance_scale": 1.7, "guidance_interval": (0.2, 0.9)}
    ode = sample(Counted(0.3), noise, labels, **kept)
    sde = sample(
        Counted(0.3), noise, labels, solver="sde", diffusion=0.0, step_noise=lambda step: 1 / 0, **kept
    )  # draws nothing
    assert torch.equal(ode, sde)


def test_the_sdes_drift_is_the_velocity_less_half_the_diffusion_times_the_score():
    """One step of it, written out as App. I has it: s = -E[noise | x_t] / t."""
    noise, labels, model = torch.randn(2, 2, 2, 2), torch.zeros(2, dtype=torch.long), Gaussian(0.7, 0.4)
    first = torch.randn_like(noise)
    seen = []
    sample(
        model,
        noise,
        labels,
        steps=4,
        solver="sde",
        diffusion=0.6,
        step_noise=lambda step: first,
        watch=lambda step, t, state, expected: seen.append((t, state)),
    )
    (now, state), (after, found) = seen[1:3]
    velocity = model(state, torch.full((2,), now), labels).float()
    expected_noise = state + (1 - now) * velocity  # x_t = (1 - t) x + t e and v = e - x: e = x_t + (1 - t) v
    score, w, h = -expected_noise / now, 0.6 * now, now - after
    by_hand = state - h * (velocity - w / 2 * score) + math.sqrt(w * h) * first
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=0)


def test_the_sdes_last_step_lands_on_the_posterior_mean():
    drawn = []
    noise, labels, model = torch.randn(2, 2, 2, 2), torch.zeros(2, dtype=torch.long), Counted(0.3)
    last = []

    def step_noise(step):
        drawn.append(step)
        return torch.ones_like(noise)

    end = sample(
        model,
        noise,
        labels,
        steps=5,
        solver="sde",
        step_noise=step_noise,
        watch=lambda step, t, state, expected: last.append(expected),
    )
    assert drawn == [0, 1, 2, 3]
    torch.testing.assert_close(end, last[-1])


def test_the_sde_asks_for_its_noise():
    with pytest.raises(ValueError, match="step_noise"):
        sample(Counted(0.3), torch.randn(1, 2, 2, 2), torch.zeros(1, dtype=torch.long), solver="sde")
