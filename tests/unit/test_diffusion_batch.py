"""What a diffusion step draws and what its loss is: labels, times and noise, by the paper's formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raecli.data.order import normals
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.stages.train_diffusion import Batch, backward, make_batch, samples_of
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 20_000
RESOLVED = ("model.in_channels=3", "model.input_size=2", "model.num_classes=10", "precision=fp32")


def recipe_of(*overrides: str) -> TrainDiffusionRecipe:
    return load_recipe(TrainDiffusionRecipe, "digits/diffusion", (*RESOLVED, f"batch_size={COUNT}", *overrides))


def batch_of(*overrides: str) -> Batch:
    """One step's draws for COUNT samples, all of class 4. The stand-in for the feed has no latents to give."""
    cache = SimpleNamespace(labels=torch.full((COUNT,), 4), keys=[""] * COUNT)
    feed = SimpleNamespace(cache=cache, batch=lambda step: (np.arange(COUNT), torch.zeros(COUNT, 1)))
    return make_batch(feed, 0, recipe_of(*overrides), ONE)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_the_labels_is_dropped_to_the_null_label(share):
    batch = batch_of(f"label_dropout={share}")
    dropped = batch.labels == 10
    assert set(batch.labels.tolist()) <= {4, 10}
    # Four standard errors of a share of .1 of 20000: .0085.
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.0085 if share == 0.1 else 0)
    if share == 0.1:  # whichever the time: .05 is seven standard errors of a correlation
        assert abs(np.corrcoef(dropped.numpy(), batch.t.numpy())[0, 1]) < 0.05


def test_an_unconditional_model_sees_the_null_label_alone():
    assert set(batch_of("model.class_conditional=false", "model.num_classes=0").labels.tolist()) == {0}


@pytest.mark.parametrize(("base", "alpha"), [(512, 1.0), (128, 2.0), (32, 4.0)])
def test_times_are_logit_normal_and_shifted(base, alpha):
    t = batch_of("flow.time_shift_dim=512", f"flow.time_shift_base={base}").t.double()
    logit = t.logit() - math.log(alpha)  # the shift adds log(alpha) to the logit: Sec. 4.2
    assert float(logit.mean()) == pytest.approx(0, abs=0.03) and float(logit.std()) == pytest.approx(1, abs=0.02)
    assert logit.max() > 3.2  # uncut: of 20000 draws 14 are expected above it


def test_times_of_the_release_end_before_the_maximum_and_uniform_ones_are_even():
    shift = ("flow.time_shift_dim=512", "flow.time_shift_base=128")
    t = batch_of(*shift, "flow.time_max=0.8").t.double()
    assert 0.78 < float((t / (2 - t)).max()) <= 0.8 + 1e-6  # before the shift of 2
    even = batch_of(*shift, "flow.time_distribution=uniform").t.double()
    even = (even / (2 - even)).sort().values
    torch.testing.assert_close(even, (torch.arange(COUNT).double() + 0.5) / COUNT, atol=0.015, rtol=0)


class Views(list):
    """A cache of COUNT samples, with or without mirrored views."""

    def __init__(self, has_flips: bool) -> None:
        super().__init__(range(COUNT))
        self.has_flips = has_flips


def test_half_of_the_samples_are_mirrored_where_that_is_asked_for_and_there():
    indices, flips = samples_of(Views(True), 1, recipe_of("horizontal_flip=true"), ONE)
    assert sorted(indices.tolist()) == list(range(COUNT))  # step 1 is the second epoch, each sample once
    assert np.mean(flips) == pytest.approx(0.5, abs=0.015)  # four standard errors
    assert samples_of(Views(True), 1, recipe_of("horizontal_flip=false"), ONE)[1] is None
    assert samples_of(Views(False), 1, recipe_of("horizontal_flip=true"), ONE)[1] is None


class Recorded(nn.Module):
    """Says the same velocity everywhere; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(0.25))

    def forward(self, noisy, t, labels):
        self.asked = noisy, t, labels
        return self.velocity.expand_as(noisy)


def test_the_loss_is_that_of_normalised_latents_and_of_noise_keyed_by_position():
    recipe, model = recipe_of("batch_size=6", "seed=3"), Recorded()
    latents, mean, variance = torch.randn(6, 3, 2, 2) * 2 + 5, torch.rand(3, 2, 2), torch.rand(3, 2, 2)
    statistics = LatentStatistics(mean, variance).channels_last()
    batch = Batch(range(30, 36), [""] * 6, latents.bfloat16(), torch.arange(6), torch.rand(6))
    losses = [
        backward(model, batch, part, statistics, recipe, ONE, synchronise=True) for part in (slice(0, 4), slice(4, 6))
    ]
    clean = (latents.bfloat16().float() - mean) / (variance + 1e-5).sqrt()
    noise = normals((3, 2, 2), 3, "noise", range(30, 36), "cpu")
    t = batch.t.view(-1, 1, 1, 1)
    noisy, asked_t, labels = model.asked  # of the second micro-batch
    torch.testing.assert_close(noisy, ((1 - t) * clean + t * noise)[4:])
    assert torch.equal(asked_t, batch.t[4:]) and torch.equal(labels, batch.labels[4:])
    expected = (0.25 - (noise - clean)).square().mean(dim=(1, 2, 3))  # the target is noise - latents: Sec. 4
    torch.testing.assert_close(torch.cat(losses), expected)
    torch.testing.assert_close(model.velocity.grad, 2 * (0.25 - (noise - clean)).mean())  # of all six alike
