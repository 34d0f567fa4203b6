"""PERFORMANCE row 9: FLOPs that guided sampling runs over the least possible. One JSON line a way of guiding.

Ours is what torch counts while a whole batch is solved (every matrix product that runs, whoever asked for it). The
least is worked out beside it: the times at which the solver needs a slope, once each; those in the interval twice; each
at the FLOPs of one forward of one image. No model of a size that matters is needed: the ratio is one of counts.
"""

import argparse
import json

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raecli.flow.sampler import sample
from raecli.models.dit import DiTDH

SIZES = {"in_channels": 32, "input_size": 4, "heads": 2, "head_width": 32, "head_heads": 2, "num_classes": 10}


def flop_of(work: object) -> int:
    """FLOPs that torch counts in work()."""
    with FlopCounterMode(display=False) as counter:
        work()  # type: ignore[operator]
    return counter.get_total_flops()


def least_flop(steps: int, solver: str, grid: str, interval: tuple[float, float], strong: int, weak: int) -> int:
    """FLOPs that no sampler of this solver, grid and interval can do without, an image."""
    line = [1 - i / steps for i in range(steps + 1)]
    if grid == "released":
        line = [1 - 0.999 * i / (steps - 1) for i in range(steps)]
    times = [6.93 * t / (1 + 5.93 * t) for t in line]
    asked = times[:-1] + ([t for t in times[1:] if t > 1e-9] if solver == "heun" else [])
    return len(asked) * strong + sum(interval[0] <= t <= interval[1] for t in asked) * weak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    told = parser.parse_args()
    torch.manual_seed(0)
    model, guide = DiTDH(width=32, depth=4, **SIZES).eval(), DiTDH(width=16, depth=2, **SIZES).eval()
    model.time_shift = 6.93
    noise, labels = torch.randn(told.batch, 32, 4, 4), torch.arange(told.batch)

    def forward(module: nn.Module) -> None:
        with torch.inference_mode():
            module(noise[:1], torch.full((1,), 0.5), labels[:1])

    strong, weak = flop_of(lambda: forward(model)), flop_of(lambda: forward(guide))
    for way, second, guided_by in (("cfg", strong, None), ("autoguidance", weak, guide)):
        for solver in ("euler", "heun", "sde"):
            for grid in ("paper", "released"):
                for interval in ((0.0, 1.0), (0.1, 0.9)):

                    def solve(solver=solver, grid=grid, interval=interval, guided_by=guided_by) -> None:
                        sample(
                            model,
                            noise,
                            labels,
                            steps=told.steps,
                            solver=solver,
                            time_grid=grid,
                            guidance_scale=1.42,
                            guidance_interval=interval,
                            guide=guided_by,
                            step_noise=lambda step: torch.zeros_like(noise),
                        )

                    ours = flop_of(solve) / told.batch
                    least = least_flop(told.steps, solver, grid, interval, strong, second)
                    line = {"row": 9, "way": way, "solver": solver, "grid": grid, "interval": interval}
                    print(
                        json.dumps({**line, "ours_flop": ours, "least_flop": least, "ratio": ours / least, "bar": 1.0})
                    )


if __name__ == "__main__":
    main()
