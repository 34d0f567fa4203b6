"""Guidance scales and intervals tried one after another, each measured by its Frechet distance. App. D."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raecli.evaluation.moments import measured_moments, reference_moments
from raecli.evaluation.networks import FeatureNetwork, chosen_network
from raecli.flow.sampler import evaluation_counts
from raecli.flow.time import time_grid
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.reference import locate_source, open_images
from raecli.metrics.statistics import Moments
from raecli.recipe.recipes import SampleRecipe, SweepSpec
from raecli.store.atomic import atomic_file, sha256_of
from raecli.training.distributed import Ranks


@dataclass(frozen=True)
class Trial:
    """One guidance: the recipe of its samples, and what an image of it costs."""

    recipe: SampleRecipe
    evaluations: int
    second_evaluations: int  # of the guide or the null label

    def row(self) -> dict[str, Any]:
        """What the table says before anything is measured."""
        low, high = self.recipe.guidance_interval
        return {
            "scale": self.recipe.guidance_scale,
            "low": low,
            "high": high,
            "folder": Path(self.recipe.output).name,
            "images": self.recipe.num,
            "evaluations": self.evaluations,
            "second_evaluations": self.second_evaluations,
        }


def sweep_trials(recipe: SampleRecipe, told: SweepSpec, time_shift: float) -> list[Trial]:
    """Every scale in every interval. Where no step is guided all samples are alike: they are made once, unguided."""
    times = time_grid(recipe.steps, kind=recipe.time_grid, time_shift=time_shift)
    trials: dict[str, Trial] = {}
    for interval in told.intervals:
        for scale in told.scales:
            counts = evaluation_counts(times, solver=recipe.solver, guidance_scale=scale, guidance_interval=interval)
            guided = counts[1] > 0
            name = f"scale-{scale:g}_interval-{interval[0]:g}-{interval[1]:g}" if guided else "unguided"
            update = {
                "guidance_scale": scale if guided else 1.0,
                "guidance_interval": interval if guided else (0.0, 1.0),
                "output": str(Path(recipe.output) / name),
                "sweep": None,
            }
            trials.setdefault(name, Trial(recipe.model_copy(update=update), *counts))
    return sorted(trials.values(), key=lambda trial: trial.second_evaluations > 0)


@dataclass(frozen=True)
class Judge:
    """A feature network and the reference's Gaussian in it."""

    network: FeatureNetwork
    reference: Moments
    identity: dict[str, Any]  # what two rows have to share to be compared

    def measure(self, samples: Path, ranks: Ranks) -> dict[str, float]:
        """The Frechet distance of a folder of samples to the reference."""
        images = open_images(locate_source(str(samples)))
        ours = measured_moments(images, self.network, 64, ranks, samples.name)
        sides = (ours.mean, ours.covariance, self.reference.mean, self.reference.covariance)
        distance = frechet_distance(*(side.to(ranks.device) for side in sides))
        return {"fid": distance.value}


def judge_of(told: SweepSpec, samples: Path, ranks: Ranks) -> Judge:
    """The network that the sweep names, and the reference in it."""
    images = open_images(locate_source(str(samples)))
    network = chosen_network(told.features, told.inception, images, ranks.device)
    reference, source = reference_moments(told.reference, network, 64, ranks), locate_source(told.reference)
    identity = {
        "reference": str(source),
        "reference_sha256": sha256_of(source) if source.is_file() else None,
        "reference_images": reference.samples,
        "features": network.description["name"],
        "features_sha256": network.description["sha256"],
    }
    return Judge(network, reference, identity)


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """A line a guidance, the best one marked."""
    best = min(row["fid"] for row in rows)
    lines = [f"{'scale':>6}  {'interval':>13}  {'evaluations':>12}  {'fid':>9}"]
    for row in rows:
        interval = f"{row['low']:g} to {row['high']:g}" if row["second_evaluations"] else "-"
        cost = f"{row['evaluations']} + {row['second_evaluations']}"
        mark = "  best" if row["fid"] == best else ""
        lines.append(f"{row['scale']:>6g}  {interval:>13}  {cost:>12}  {row['fid']:>9.4f}{mark}")
    return "\n".join(lines)


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """FID against scale, a line an interval; told on stderr where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is missing (pip install 'raecli[plots]')", file=sys.stderr)
        return
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    unguided = [row for row in rows if not row["second_evaluations"]]
    for interval in dict.fromkeys((row["low"], row["high"]) for row in rows if row["second_evaluations"]):
        of_it = [row for row in rows if row["second_evaluations"] and (row["low"], row["high"]) == interval]
        points = sorted((row["scale"], row["fid"]) for row in of_it + unguided)
        axis.plot(*zip(*points, strict=True), "o-", label=f"guided in [{interval[0]:g}, {interval[1]:g}]")
    for row in unguided:
        axis.axhline(row["fid"], color="grey", linestyle=":", label="unguided")
    axis.set(xlabel="guidance scale", ylabel=f"Frechet distance, {rows[0]['images']} images")
    axis.legend()
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
