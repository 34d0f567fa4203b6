"""AdamW, the learning rate over a run, and the norm of gradients. App. F, Table 12."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raecli.recipe.blocks import OptimizerSpec, ScheduleSpec
from raecli.recipe.recipes import TrainingRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.tensors import whole


def make_optimizer(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over all trained parameters; fused, one kernel for all."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def optimizer_of(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """AdamW as the recipe tells."""
    spec = recipe.optimizer
    return make_optimizer(model, learning_rate=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay)


def learning_rate(
    step: int,
    *,
    maximum: float,
    kind: str,
    warmup_steps: int,
    hold_steps: int,
    total_steps: int,
    final: float | None,
) -> float:
    """The rate of optimiser step `step`, counted from 0.

    Linear from maximum / warmup_steps over the warm-up; then `hold_steps` at the maximum; then, for kind "linear" or
    "cosine", down to `final`, reached at the last step (step total_steps - 1).
    """
    if step < warmup_steps:
        return maximum * (step + 1) / warmup_steps
    start = warmup_steps + hold_steps
    if kind == "constant" or final is None or step < start:
        return maximum
    done = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    if kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return maximum + (final - maximum) * done


def rate_at(step: int, total: int, samples: int, recipe: TrainingRecipe) -> float:
    """The learning rate of optimiser step `step` of `total`, as the recipe's schedule has it over `samples` images."""
    return scheduled_rate(step, total, samples, recipe.batch_size, recipe.optimizer, recipe.schedule)


def scheduled_rate(
    step: int, total: int, samples: int, batch_size: int, optimizer: OptimizerSpec, schedule: ScheduleSpec
) -> float:
    """The learning rate of step `step` of `total`, for an optimiser of its own."""
    return learning_rate(
        step,
        maximum=optimizer.learning_rate,
        kind=schedule.kind,
        warmup_steps=duration_in_steps(schedule.warmup, samples, batch_size),
        hold_steps=duration_in_steps(schedule.hold, samples, batch_size),
        total_steps=total,
        final=schedule.final_learning_rate,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients to a total norm of at most `limit`; returns the norm before, a scalar. None: only measured."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


def take_step(model: nn.Module, optimizer: torch.optim.AdamW, limit: float | None) -> tuple[Tensor, Tensor]:
    """Clip to a total norm of at most `limit` (None: not) and step, unless the norm is NaN or infinite.

    Decided on the device, without a word to the host; the fused optimiser scales gradients as it reads them. Returns
    the norm before clipping and 1 where the step was taken, else 0: scalars on the device.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))  # over all shards, where gradients are sharded
    finite = norm.isfinite()
    if limit is not None:
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # gradients are divided by it
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite.float()
