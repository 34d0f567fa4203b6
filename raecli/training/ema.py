"""Exponential moving average of a model's weights, float32, one pass over memory. App. F."""

import torch
from torch import Tensor, nn

from raecli.errors import CheckpointError
from raecli.store.tensors import as_sharded, is_sharded, whole

ALIGNMENT = 64  # elements: every weight in the flat buffer begins where vector loads like it


class Ema:
    """Averaged copies of a model's parameters. `weights()`: a state dict of averages and the model's own buffers.

    The parameters move into one flat buffer a dtype, of which they become views, so that an update is one operation
    instead of one a tensor. Made after the model is on its device. Sharded parameters (FSDP) stay where they are; the
    averages are sharded alike.
    """

    def __init__(self, model: nn.Module, decay: float, *, ramp: bool = False) -> None:
        self.model, self.decay, self.ramp = model, decay, ramp
        parameters = dict(model.named_parameters())
        assert len(parameters) == len(list(model.named_parameters(remove_duplicate=False))), "weights that are tied"
        if any(is_sharded(parameter) for parameter in parameters.values()):
            self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            self.sources = [parameter.detach().to_local() for parameter in parameters.values()]
            self.targets = [average.to_local() for average in self.averages.values()]
            return
        self.sources, self.targets, self.averages = [], [], {}
        for dtype in {parameter.dtype for parameter in parameters.values()}:
            alike = {name: parameter for name, parameter in parameters.items() if parameter.dtype == dtype}
            source = flatten(list(alike.values()))
            target = source.clone()
            self.sources.append(source)
            self.targets.append(target)
            self.averages |= dict(zip(alike, views_of(target, list(alike.values())), strict=True))

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Take in the weights after optimiser step `step`, from 0. Ramped: min(decay, (1 + step) / (10 + step)).

        finite: a scalar, 0 where the step was not taken: then nothing changes.
        """
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        if finite is None:
            torch._foreach_lerp_(self.targets, self.sources, 1 - decay)
            return
        weight = (1 - decay) * finite
        for target, source in zip(self.targets, self.sources, strict=True):
            target.lerp_(source, weight)  # _foreach_lerp_ would ask the device for its number

    def state(self) -> dict[str, Tensor]:
        """Averages and buffers by their names in the model; sharded where the model is."""
        return {name: self.averages.get(name, value) for name, value in self.model.state_dict().items()}

    def weights(self) -> dict[str, Tensor]:
        """What the averaged model loads, whole: where the model is sharded, a call that all ranks make together."""
        return {name: whole(value) for name, value in self.state().items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from saved averages, which are whole. Raises CheckpointError where they are of another model."""
        if wrong := [name for name, average in self.averages.items() if not alike(weights.get(name), average)]:
            raise CheckpointError(f"averages of another model than the recipe's: {', '.join(wrong[:3])}")
        for name, average in self.averages.items():
            average.copy_(as_sharded(weights[name], average))


def alike(value: Tensor | None, average: Tensor) -> bool:
    """Whether a saved average is of this one's shape."""
    return value is not None and value.shape == average.shape


def flatten(parameters: list[nn.Parameter]) -> Tensor:
    """Move parameters of one dtype into one buffer, of which each becomes a view; returns the buffer."""
    size = sum(padded(parameter) for parameter in parameters)
    flat = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, view in zip(parameters, views_of(flat, parameters), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return flat


def views_of(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Where each parameter lies in a flat buffer, in its shape."""
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += padded(parameter)
    return views


def padded(parameter: nn.Parameter) -> int:
    """Elements that a parameter takes in the flat buffer."""
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
