"""Solvers of the flow's equation from noise (t = 1) to latents (t = 0). App. F: Euler, 50 steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raecli.flow.guidance import Velocity, guided_velocity
from raecli.flow.time import time_grid as make_time_grid

Watch = Callable[[int, float, Tensor], None]  # (step, t, state), for pictures of the way


def euler(velocity: Velocity, noise: Tensor, labels: Tensor, times: Tensor, watch: Watch | None = None) -> Tensor:
    """Euler's method: one evaluation a step. times: [steps + 1], falling. Exact on straight paths."""
    state = noise
    for step, (now, after) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        state = state + (after - now) * velocity(state, state.new_full((len(state),), now), labels).float()
        if watch:
            watch(step, after, state)
    return state


def heun(velocity: Velocity, noise: Tensor, labels: Tensor, times: Tensor, watch: Watch | None = None) -> Tensor:
    """Heun's method, second order: two evaluations a step, one in a last step to t = 0."""
    state = noise
    for step, (now, after) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        slope = velocity(state, state.new_full((len(state),), now), labels).float()
        ahead = state + (after - now) * slope
        if after > 0:
            slope = (slope + velocity(ahead, state.new_full((len(state),), after), labels).float()) / 2
            ahead = state + (after - now) * slope
        state = ahead
        if watch:
            watch(step, after, state)
    return state


SOLVERS = {"euler": euler, "heun": heun}


@torch.inference_mode()
def sample(
    model: nn.Module,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    solver: str = "euler",
    time_grid: str = "paper",
    time_shift: float | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guide: nn.Module | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Generate normalised latents [B, C, H, W], float32, from noise of the same shape and labels [B].

    model: (noisy, t, labels) -> velocity, as raecli.load_diffusion gives it; its `time_shift` and `null_label` are
    used. steps, solver ("euler", "heun") and time_grid ("paper", "released"): flow.time. guidance_interval is in
    shifted time. guide: the weaker model of AutoGuidance; without one, classifier-free guidance.
    """
    alpha = time_shift if time_shift is not None else model.time_shift
    times = make_time_grid(steps, kind=time_grid, time_shift=float(alpha))
    velocity = guided_velocity(
        model,
        scale=guidance_scale,
        interval=guidance_interval,
        guide=guide,
        null_label=getattr(model, "null_label", None),
    )
    return SOLVERS[solver](velocity, noise.float(), labels, times, watch)
