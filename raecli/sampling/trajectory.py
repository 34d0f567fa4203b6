"""A picture of the way from noise to images: what the solver holds, and what the model expects, at some steps."""

import numpy as np
from torch import Tensor

from raecli.recipe.recipes import SampleRecipe
from raecli.sampling.images import decode, solve, to_bytes
from raecli.sampling.models import Models
from raecli.training.distributed import Ranks

COLUMNS = 8  # and the finished image


def shown_steps(steps: int, columns: int = COLUMNS) -> list[int]:
    """Evenly spaced steps, the first and the last among them."""
    count = min(steps, columns)
    return sorted({round(place * (steps - 1) / max(count - 1, 1)) for place in range(count)})


def trajectory_rows(
    recipe: SampleRecipe, models: Models, labels: list[int], ranks: Ranks
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Two rows an image, uint8 [H, W, 3], and a title a column: the state x_t decoded; x_t - t v, what it will become.

    The first `recipe.trajectory` images are solved again for it: recipe.steps more evaluations each.
    """
    batch = range(min(recipe.trajectory, recipe.num))
    wanted = set(shown_steps(recipe.steps - (recipe.time_grid == "released")))
    states: list[tuple[float, Tensor, Tensor]] = []

    def watch(step: int, t: float, state: Tensor, expected: Tensor) -> None:
        if step in wanted:
            states.append((t, state, expected))

    end = solve(recipe, models, labels, batch, ranks, watch)
    states.append((0.0, end, end))
    pairs = [
        [to_bytes(decode(recipe, models, latents, batch), recipe.pixel_rounding) for latents in column]
        for _, *column in states
    ]
    rows = [[pair[kind][index] for pair in pairs] for index in batch for kind in (0, 1)]
    return rows, [*(f"t = {t:.3f}" for t, _, _ in states[:-1]), "end"]
