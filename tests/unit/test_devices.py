"""Steps on a GPU that is not there: fake tensors know shapes and devices, and refuse to mix the latter.

Not the backward pass, whose engine asks for a real device, and not autocast, which is off without one.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raecli.flow.guidance import steered_velocity
from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.stages.train_diffusion import make_batch
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import make_optimizer, take_step

SIZES = {"in_channels": 8, "input_size": 4, "width": 64, "depth": 2, "heads": 4, "num_classes": 10}
HEAD = {"head_width": 128, "head_depth": 1, "head_heads": 4}
CUDA = torch.device("cuda", 0)


def model_of(kind: str) -> nn.Module:
    """A small diffusion transformer."""
    return DiT(**SIZES) if kind == "dit" else DiTDH(**SIZES, **HEAD)


@pytest.mark.parametrize("kind", ["dit", "dith"])
def test_a_diffusion_step_stays_on_its_gpu(kind):
    with FakeTensorMode(), CUDA:
        model = model_of(kind)
        ema, optimizer = Ema(model, 0.99), make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0)
        inputs = torch.randn(2, 8, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.long)
        velocity = model(*inputs)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm, finite = take_step(model, optimizer, 1.0)
        ema.update(0, finite)
        state = [value for entries in optimizer.state.values() for value in entries.values()]
        assert len(state) == 3 * len(list(model.parameters()))
        found = [velocity, norm, finite, *state, *ema.weights().values()]
    assert {tensor.device for tensor in found} == {CUDA}


def test_a_guided_velocity_stays_on_its_gpu():
    with FakeTensorMode(), CUDA:
        model = model_of("dith").eval()
        noise, labels = torch.randn(2, 8, 4, 4), torch.zeros(2, dtype=torch.long)
        steered = steered_velocity(model, scale=1.5, null_label=model.null_label)
        found = steered(noise, noise.new_full((2,), 0.5), labels)
    assert (found.device, found.shape) == (CUDA, noise.shape)


def test_a_decoder_stays_on_its_gpu():
    with FakeTensorMode(), CUDA:
        decoder = Decoder(in_channels=8, tokens_side=4, width=64, depth=2, heads=4, mlp_width=128, patch_size=4)
        pixels = decoder(torch.randn(2, 8, 4, 4))
    assert (pixels.device, tuple(pixels.shape)) == (CUDA, (2, 3, 16, 16))


@pytest.mark.parametrize(("device", "pinned"), [("cpu", 0), ("cuda", 2)])
def test_times_and_labels_for_a_gpu_are_pinned(device, pinned, monkeypatch):
    sizes = ("model.in_channels=3", "model.input_size=2", "model.num_classes=10", "batch_size=4")
    recipe, asked = load_recipe(TrainDiffusionRecipe, "digits/diffusion", sizes), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor) or tensor)
    cache = SimpleNamespace(labels=torch.full((4,), 4), keys=[""] * 4)
    feed = SimpleNamespace(cache=cache, batch=lambda step: (np.arange(4), torch.zeros(4, 1)))
    batch = make_batch(feed, 0, recipe, Ranks(0, 1, torch.device(device)))
    assert len(asked) == pinned
    assert all(tensor is batch.t or tensor is batch.labels for tensor in asked)
