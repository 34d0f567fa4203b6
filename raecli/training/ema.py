"""Exponential moving average of a model's weights, float32, one fused update. App. F."""

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copies of a model's parameters. `weights()`: a state dict of averages and the model's own buffers."""

    def __init__(self, model: nn.Module, decay: float, *, ramp: bool = False) -> None:
        self.model, self.decay, self.ramp = model, decay, ramp
        self.averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, from 0. Ramped: min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """What the averaged model loads."""
        return {name: self.averages.get(name, value) for name, value in self.model.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, average in self.averages.items():
            average.copy_(weights[name])
