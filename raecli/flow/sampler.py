"""Solvers of the flow's equation from noise (t = 1) to latents (t = 0). App. F: Euler, 50 steps; App. I: the SDE."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from raecli.flow.guidance import guided_velocity, in_interval
from raecli.flow.time import time_grid as make_time_grid

VelocityAt = Callable[[Tensor, float, Tensor], Tensor]  # (noisy [B, C, H, W], t, labels [B]) -> [B, C, H, W]
StepNoise = Callable[[int], Tensor]  # step -> standard normal [B, C, H, W]
# (step, t, state at t, the latents that the model expects from there): a picture of the way, before each step.
Watch = Callable[[int, float, Tensor, Tensor], None]


def steps_of(times: Tensor) -> Iterator[tuple[int, float, float]]:
    """(step, now, after) of a falling grid of times."""
    pairs = zip(times[:-1].tolist(), times[1:].tolist(), strict=True)
    return ((step, now, after) for step, (now, after) in enumerate(pairs))


def euler(velocity: VelocityAt, noise: Tensor, labels: Tensor, times: Tensor, watch: Watch | None = None) -> Tensor:
    """Euler's method: one evaluation a step. times: [steps + 1], falling. Exact on straight paths."""
    state = noise
    for step, now, after in steps_of(times):
        slope = velocity(state, now, labels).float()
        if watch:
            watch(step, now, state, state - now * slope)
        state = state + (after - now) * slope
    return state


def heun(velocity: VelocityAt, noise: Tensor, labels: Tensor, times: Tensor, watch: Watch | None = None) -> Tensor:
    """Heun's method, second order: two evaluations a step, one in a last step to t = 0."""
    state = noise
    for step, now, after in steps_of(times):
        slope = velocity(state, now, labels).float()
        if watch:
            watch(step, now, state, state - now * slope)
        if after > 0:
            ahead = state + (after - now) * slope
            slope = (slope + velocity(ahead, after, labels).float()) / 2
        state = state + (after - now) * slope
    return state


def euler_maruyama(
    velocity: VelocityAt,
    noise: Tensor,
    labels: Tensor,
    times: Tensor,
    watch: Watch | None = None,
    *,
    step_noise: StepNoise,
    diffusion: float,
) -> Tensor:
    """The reverse SDE dx = v dt - w/2 s dt + sqrt(w) dW by Euler and Maruyama: one evaluation a step. App. I.

    w_t = diffusion x t ("sigma" in SiT, Ma et al. 2024), and the score is s = -(x + (1 - t) v) / t, so that w s =
    -diffusion (x + (1 - t) v) has no pole at t = 0. The last step draws no noise and follows v alone: on a grid that
    ends in 0 it lands on the posterior mean x - t v (SiT's last step "Euler"). diffusion 0 is Euler's method, bit for
    bit. step_noise: standard normal draws [B, C, H, W] of a step.
    """
    state, last = noise, len(times) - 2
    for step, now, after in steps_of(times):
        slope = velocity(state, now, labels).float()
        if watch:
            watch(step, now, state, state - now * slope)
        if diffusion == 0 or step == last:
            state = state + (after - now) * slope
            continue
        drift = slope + diffusion / 2 * (state + (1 - now) * slope)  # v - w/2 s
        state = state + (after - now) * drift + math.sqrt(diffusion * now * (now - after)) * step_noise(step)
    return state


SOLVERS = {"euler": euler, "heun": heun}  # and "sde", which asks for noise


def evaluation_times(times: Tensor, solver: str) -> list[float]:
    """The times at which a solver needs a velocity: no solver of its kind can do with fewer."""
    if solver != "heun":
        return [now for _, now, _ in steps_of(times)]
    return [t for _, now, after in steps_of(times) for t in ((now, after) if after > 0 else (now,))]


def evaluation_counts(
    times: Tensor, *, solver: str, guidance_scale: float = 1.0, guidance_interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[int, int]:
    """The least evaluations an image takes: of the model, and second ones (null label or guide), for guidance."""
    visited = evaluation_times(times, solver)
    inside = sum(in_interval(t, guidance_interval) for t in visited)
    return len(visited), 0 if guidance_scale == 1 else inside


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
    diffusion: float = 1.0,
    step_noise: StepNoise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Generate normalised latents [B, C, H, W], float32, from noise of the same shape and labels [B].

    model: (noisy, t, labels) -> velocity, as raecli.load_diffusion gives it; its `time_shift` and `null_label` are
    used. steps, solver ("euler", "heun", "sde") and time_grid ("paper", "released"): flow.time. guidance_interval is
    in shifted time. guide: the weaker model of AutoGuidance; without one, classifier-free guidance. diffusion and
    step_noise (step -> normal draws [B, C, H, W]): of "sde" alone. One state is kept, in float32.
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
    if solver != "sde":
        return SOLVERS[solver](velocity, noise.float(), labels, times, watch)
    if step_noise is None:
        raise ValueError('solver "sde" needs step_noise: step -> standard normal draws of the noise\'s shape')
    return euler_maruyama(
        velocity, noise.float(), labels, times, watch, step_noise=step_noise, diffusion=float(diffusion)
    )
