"""How a training run begins or goes on: rank 0 looks, all ranks do as it found."""

import sys
from pathlib import Path
from typing import Any

from torch import nn

from raecli.errors import CheckpointError
from raecli.recipe.recipes import TrainingRecipe
from raecli.store.atomic import sweep_scratch
from raecli.store.checkpoint import CONFIG, EMA, MODEL, Checkpoint, newest_checkpoint, read_checkpoint
from raecli.store.json_file import read_json
from raecli.store.resolve import check_same_latents_as_before
from raecli.store.run_folder import prepare_run
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema


def begin_run(recipe: TrainingRecipe, ranks: Ranks) -> None:
    """Prepare the run's folder. Raises InputError, on all ranks, if it holds a run of another recipe."""
    run = Path(recipe.output)

    def prepare() -> None:
        for folder in (run, run / "checkpoints"):
            sweep_scratch(folder)
        prepare_run(run, recipe, ranks.world)

    ranks.main_first(prepare)


def resumed_from(
    recipe: TrainingRecipe, latents: dict[str, Any], total_steps: int, ranks: Ranks, model: nn.Module, ema: Ema
) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank, or None for a fresh start. Weights and averages are read
    to where they belong if they are whole and on the host; `load_weights` and `Ema.load` bring them there in any case.

    latents: `config["latents"]` of the cache as it is now. Raises, on all ranks together, what is wrong: another
    cache than before, checkpoints that cannot be used.
    """
    run, found = Path(recipe.output), None
    into = {MODEL: model.state_dict(keep_vars=True), EMA: ema.averages}
    mapped = ranks.device.type != "cpu"  # else each rank would hold all of it in the host's memory

    def look() -> str | None:
        nonlocal found
        found = newest_checkpoint(run, into, mapped=mapped)
        if found is None:
            check_nothing_is_lost(run, total_steps)
            return None
        if not isinstance(before := found.config.get("latents"), dict):
            raise CheckpointError(f"{found.path / CONFIG}: does not tell which latents this run is of")
        check_same_latents_as_before(before, latents, str(run))
        last = ", its last" if found.step >= total_steps else ""
        print(f"resuming {run} at step {found.step}{last}", file=sys.stderr)
        return str(found.path)

    path = ranks.main_first(look)
    return found or (read_checkpoint(Path(path), into, mapped=mapped) if path else None)


def check_nothing_is_lost(run: Path, total_steps: int) -> None:
    """Refuse to train a finished model anew because its checkpoints were deleted."""
    config = run / "final" / CONFIG
    if total_steps and config.is_file():
        step = read_json(config, CheckpointError).get("step")
        raise CheckpointError(
            f"{run}: final/ holds a model of step {step}, and there is no checkpoint to go on from; delete final/ to "
            "train from the start, or give output=ANOTHER_FOLDER"
        )
