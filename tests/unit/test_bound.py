"""Theorem 1's floor, its sharper form and the certificate, held against losses worked out by linear algebra."""

import math

import pytest
import torch

from raecli.flow.bound import certificate, complement, tail_bound, unremoved_noise, width_bound
from raecli.flow.sampler import euler, heun
from raecli.flow.time import time_grid

N_CHANNELS, N_TOKENS = 12, 5
EXACT = 1e-10  # float64 linear algebra of 12 x 12 matrices


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubature(channels):
    """2n noise vectors with mean exactly 0 and covariance exactly I: quadratic means over them are expectations."""
    axes = channels**0.5 * torch.eye(channels, dtype=torch.float64)
    return torch.cat([axes, -axes])


def best_loss(weight, bias, tokens):
    """The least expected loss of weight h + bias over all h that know the noise: by least squares, a draw each."""
    losses = []
    for token in tokens:
        target = cubature(len(token)) - token  # [2n, n]
        h = torch.linalg.lstsq(weight, (target - bias).T).solution
        losses.append(((weight @ h).T + bias - target).square().sum(dim=1).mean() / len(token))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(("channels", "width", "bound"), [(768, 384, 0.5), (768, 576, 0.25), (64, 64, 0), (64, 96, 0)])
def test_width_bound_is_the_missing_share_of_channels(channels, width, bound):
    assert width_bound(channels, width) == bound


@pytest.mark.parametrize("width", [1, 4, 7, 11])
def test_bounds_rise_to_the_certificate_which_is_the_least_loss_of_that_layer(width):
    weight, bias, tokens = normal(N_CHANNELS, width), normal(N_CHANNELS, seed=1), normal(N_TOKENS, N_CHANNELS, seed=2)
    certified = certificate(weight, bias, tokens)
    assert width_bound(N_CHANNELS, width) <= tail_bound(tokens, width) + EXACT
    assert tail_bound(tokens, width) < certified  # a random layer is not the best one
    assert certified == pytest.approx(best_loss(weight, bias, tokens), abs=EXACT)


@pytest.mark.parametrize("width", [2, 6, 9])
def test_any_trunk_loses_at_least_the_certificate(width):
    weight, bias, tokens = normal(N_CHANNELS, width), normal(N_CHANNELS, seed=1), normal(N_TOKENS, N_CHANNELS, seed=2)
    certified = certificate(weight, bias, tokens)
    noise = cubature(N_CHANNELS)
    for seed in range(5):
        h = torch.tanh(noise @ normal(N_CHANNELS, width, seed=seed))  # some trunk
        out = h @ weight.T + bias
        loss = (out[:, None] - (noise[:, None] - tokens)).square().mean()
        assert loss > certified


@pytest.mark.parametrize("width", [1, 3, 8])
def test_tail_bound_is_the_least_certificate_over_all_layers(width):
    tokens = normal(N_TOKENS, N_CHANNELS)
    centre = tokens.mean(dim=0)
    directions = torch.linalg.svd(tokens - centre).Vh[:width].T  # the principal ones, [n, d]
    assert certificate(directions, -centre, tokens) == pytest.approx(tail_bound(tokens, width), abs=EXACT)
    for seed in range(20):
        other = certificate(directions + 0.1 * normal(N_CHANNELS, width, seed=seed), -centre, tokens)
        assert other > tail_bound(tokens, width)


@pytest.mark.parametrize(("tokens", "width", "equal"), [(1, 3, True), (4, 3, True), (5, 3, False), (50, 11, False)])
def test_tail_bound_is_the_width_bound_while_the_tokens_have_at_most_width_directions(tokens, width, equal):
    sharper = tail_bound(normal(tokens, N_CHANNELS), width)
    if equal:
        assert sharper == pytest.approx(width_bound(N_CHANNELS, width), abs=EXACT)
    else:
        assert sharper > width_bound(N_CHANNELS, width) + 1e-4  # .07 and .03 here


@pytest.mark.parametrize("width", [12, 20])
def test_a_layer_as_wide_as_a_token_has_no_floor(width):
    weight, bias, tokens = normal(N_CHANNELS, width), normal(N_CHANNELS, seed=1), normal(N_TOKENS, N_CHANNELS, seed=2)
    assert tail_bound(tokens, width) == 0
    assert certificate(weight, bias, tokens) == 0


def test_an_untrained_output_layer_of_zeros_is_certified_at_its_own_loss():
    tokens = normal(N_TOKENS, N_CHANNELS)
    zeros = torch.zeros(N_CHANNELS, 3)
    expected = float(1 + tokens.square().mean())  # E ||noise - x||^2 / n
    assert certificate(zeros, torch.zeros(N_CHANNELS), tokens) == pytest.approx(expected, abs=EXACT)


def test_a_redundant_column_does_not_lower_the_certificate():
    weight, bias, tokens = normal(N_CHANNELS, 4), normal(N_CHANNELS, seed=1), normal(N_TOKENS, N_CHANNELS, seed=2)
    repeated = torch.cat([weight, weight[:, :1] * 3], dim=1)  # width 5, rank 4
    assert certificate(repeated, bias, tokens) == pytest.approx(certificate(weight, bias, tokens), abs=EXACT)


@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_a_network_of_the_papers_family_reaches_the_width_bound_at_each_time(t):
    width, x = 4, normal(N_CHANNELS)
    basis = torch.linalg.qr(torch.cat([x[:, None], normal(N_CHANNELS, width - 1, seed=1)], dim=1)).Q  # x in its span
    noise = cubature(N_CHANNELS)
    seen = ((1 - t) * x + t * noise) @ basis  # A x_t with A = B^T: all that the network is shown
    velocity = (seen - x @ basis) / t @ basis.T
    loss = (velocity - (noise - x)).square().mean()
    assert float(loss) == pytest.approx(width_bound(N_CHANNELS, width), abs=EXACT)
    assert certificate(basis, torch.zeros(N_CHANNELS), x[None]) == pytest.approx(float(loss), abs=EXACT)


def test_the_complement_is_orthonormal_and_out_of_the_layers_reach():
    weight = normal(N_CHANNELS, 7)
    outside = complement(weight)
    torch.testing.assert_close(outside.T @ outside, torch.eye(5, dtype=torch.float64))
    assert float((weight.T @ outside).abs().max()) < EXACT


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 1.0), (25, 6.93)])
def test_no_sampler_removes_the_noise_outside_of_the_output_layer(solver, steps, shift):
    width, side, samples = 5, 2, 6
    weight, bias = normal(N_CHANNELS, width), normal(N_CHANNELS, seed=1)
    trunk = normal(N_CHANNELS, width, seed=2)
    tokens, noise = normal(side**2, N_CHANNELS, seed=3), normal(samples, N_CHANNELS, side, side, seed=4)

    def velocity(noisy, t, labels):  # double, where the solvers call .float(): their rounding is the tolerance below
        h = torch.sin(noisy.double().flatten(2).transpose(1, 2) @ trunk) * (1 + t)
        return (h @ weight.T + bias).transpose(1, 2).unflatten(2, (side, side))

    times = time_grid(steps, kind="paper", time_shift=shift)
    ends = solver(velocity, noise, torch.zeros(samples), times).flatten(2).transpose(1, 2)
    starts = noise.flatten(2).transpose(1, 2)
    found = unremoved_noise(weight, tokens, ends)
    assert found == pytest.approx(unremoved_noise(weight, tokens, starts - bias), rel=1e-5)  # float32 velocities
    assert found <= float((ends - tokens).square().mean())


def test_the_noise_that_stays_is_the_certificate_on_average():
    weight, bias, tokens = normal(N_CHANNELS, 5), normal(N_CHANNELS, seed=1), normal(N_TOKENS, N_CHANNELS, seed=2)
    ends = cubature(N_CHANNELS)[:, None] - bias + torch.zeros_like(tokens)  # a trunk of zeros: z_0 = z_1 - b
    assert unremoved_noise(weight, tokens, ends) == pytest.approx(certificate(weight, bias, tokens), abs=EXACT)


def test_the_printed_theorem_2_has_a_counterexample():
    """docs/theory.md: x ~ N(0, I), f* = c(t) x with |c| <= 1, g = P f* of the paper's family: both flows agree."""
    width, steps = 4, 4000
    basis = torch.linalg.qr(normal(N_CHANNELS, width)).Q

    def best(state, t, labels):
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * state

    def narrow(state, t, labels):
        return best(state, t, labels) @ basis @ basis.T

    times = time_grid(steps, kind="paper", time_shift=1.0)
    noise = normal(8, N_CHANNELS, seed=1)
    exact, found = (heun(velocity, noise, torch.zeros(8), times) for velocity in (best, narrow))
    claimed = (1 - math.exp(-1)) * 2 * (N_CHANNELS - width)  # (1 - e^-L) / L * sum of lambda_i = 2, with L = 1
    assert float((exact - noise).norm(dim=1).max()) < 1e-4
    assert float((exact - found).norm(dim=1).max()) < 1e-4 < claimed
