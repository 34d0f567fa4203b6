"""`rae sample`: reads a diffusion model and an autoencoder; writes images and the protocol that made them.

Image i is a function of (seed, i), of its label and of the models; batches are the same whatever the number of ranks,
and a restart makes only those that are not whole yet. A sweep does so for each guidance, in folders below.
"""

from pathlib import Path
from typing import Any

from raecli.errors import InputError, StorageError
from raecli.recipe.recipes import SampleRecipe, SweepSpec
from raecli.sampling.images import make_images
from raecli.sampling.models import Models, load_models
from raecli.sampling.protocol import balanced_labels, protocol_of
from raecli.sampling.sweep import judge_of, plot_sweep, sweep_table, sweep_trials
from raecli.sampling.trajectory import trajectory_rows
from raecli.store.atomic import sha256_of, write_json
from raecli.store.json_file import read_json
from raecli.store.samples import (
    GRID,
    NPZ,
    PROTOCOL,
    TRAJECTORY,
    begin_samples,
    by_label,
    finish_samples,
    image_file,
    is_whole_png,
    read_png,
    write_grid,
    write_npz,
    write_trajectory,
)
from raecli.training.distributed import Ranks
from raecli.training.result import tell_result

SWEEP, SWEEP_PLOT = "sweep.json", "sweep.png"


def run(recipe: SampleRecipe, ranks: Ranks) -> None:
    """One set of samples, or a sweep of them."""
    models = load_models(recipe, ranks)
    if recipe.sweep:
        sweep(recipe, recipe.sweep, models, ranks)
        return
    make_samples(recipe, models, ranks)
    if ranks.is_main:
        told = f"{recipe.num} images, {recipe.steps} steps of {recipe.solver}, guidance {recipe.guidance_scale}"
        protocol = read_json(Path(recipe.output) / PROTOCOL)
        facts = {name: value for name, value in protocol.items() if name != "labels"}
        tell_result(f"{recipe.output}: {told}", {"output": recipe.output, **facts})


def make_samples(recipe: SampleRecipe, models: Models, ranks: Ranks) -> None:
    """Make the images that are missing, then the pictures, the npz and the protocol."""
    folder, labels = Path(recipe.output), balanced_labels(recipe, num_classes=models.model.num_classes)
    with ranks.holding(folder):
        protocol = ranks.main_first(lambda: begun_protocol(folder, recipe, models, labels))
        if ranks.main_first(lambda: is_finished(folder, recipe)):
            return
        make_images(recipe, models, labels, missing_of_rank(recipe, folder, ranks), folder, ranks)
        ranks.barrier()
        if recipe.trajectory and ranks.is_main:
            write_trajectory(folder / TRAJECTORY, *trajectory_rows(recipe, models, labels, ranks))
        ranks.main_first(lambda: finish(recipe, folder, protocol, labels))


def begun_protocol(folder: Path, recipe: SampleRecipe, models: Models, labels: list[int]) -> dict[str, Any]:
    """The protocol, which the folder now holds."""
    protocol = protocol_of(recipe, models, labels)
    begin_samples(folder, protocol)
    return protocol


def is_finished(folder: Path, recipe: SampleRecipe) -> bool:
    """Whether an .npz without its images is there, whole: it is renamed into place, and the protocol after it."""
    return recipe.format == "npz" and (folder / PROTOCOL).is_file() and (folder / NPZ).is_file()


def missing_of_rank(recipe: SampleRecipe, folder: Path, ranks: Ranks) -> dict[range, list[int]]:
    """This rank's batches, by index alone, each with the images that are not whole yet; whole batches are left out."""
    own = range(ranks.rank * recipe.batch_size, recipe.num, ranks.world * recipe.batch_size)
    batches = [range(start, min(start + recipe.batch_size, recipe.num)) for start in own]
    missing = {batch: [index for index in batch if not is_whole_png(image_file(folder, index))] for batch in batches}
    return {batch: indices for batch, indices in missing.items() if indices}


def finish(recipe: SampleRecipe, folder: Path, protocol: dict[str, Any], labels: list[int]) -> None:
    """Sheet, npz, and last samples.json."""
    missing = [index for index in range(recipe.num) if not image_file(folder, index).is_file()]
    if missing:
        raise StorageError(f"{image_file(folder, missing[0])}: {len(missing)} images are missing; run the same command")
    if recipe.grid:
        shown = by_label(labels, min(recipe.grid, recipe.num))
        write_grid(folder / GRID, [read_png(image_file(folder, index)) for index in shown])
    if recipe.format != "png":
        write_npz(folder, recipe.num)
    finish_samples(folder, protocol)
    if recipe.format == "npz":
        for index in range(recipe.num):
            image_file(folder, index).unlink()


def sweep(recipe: SampleRecipe, told: SweepSpec, models: Models, ranks: Ranks) -> None:
    """Samples and their Frechet distance for each guidance; a table, sweep.json and sweep.png."""
    folder, judge, rows = Path(recipe.output), None, []
    with ranks.holding(folder):
        before = ranks.main_first(lambda: read_rows(folder / SWEEP))
        for trial in sweep_trials(recipe, told, models.model.time_shift):
            one = trial.recipe
            make_samples(one, models, ranks)
            judge = judge or judge_of(told, Path(one.output), ranks)
            row = trial.row() | judge.identity | {"samples_sha256": sha256_of(Path(one.output) / PROTOCOL)}
            rows.append(measured_before(row, before) or row | judge.measure(Path(one.output), ranks))
            if ranks.is_main:
                write_json(folder / SWEEP, {"format": "rae-sweep", "version": 1, "rows": rows})
            ranks.barrier()
        if ranks.is_main:
            tell_result(sweep_table(rows), {"rows": rows}, as_json=told.print_json)
            plot_sweep(rows, folder / SWEEP_PLOT)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that an earlier run measured; a damaged file has none, and is measured again."""
    try:
        rows = read_json(path)["rows"]
        return [row for row in rows if isinstance(row, dict)]
    except (InputError, KeyError, TypeError):
        return []


def measured_before(row: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The same row with its figures, where the same samples were measured against the same reference."""
    return next((old for old in before if "fid" in old and {**old, **row} == old), None)
