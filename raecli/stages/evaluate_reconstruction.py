"""`rae eval reconstruction`: reads images and their reconstructions; prints figures, and writes them as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from raecli import __version__
from raecli.evaluation.reconstruction import PairFigures, PairShape, load_judges, whole_groups
from raecli.evaluation.reconstruction_pairs import PairSet, open_pairs, pair_size
from raecli.recipe.recipes import EvaluateReconstructionRecipe
from raecli.store.atomic import write_json
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress


def run(recipe: EvaluateReconstructionRecipe, ranks: Ranks) -> None:
    """Measure every pair once; rank 0 tells."""
    size = ranks.main_first(lambda: pair_size(open_pairs(recipe.images, recipe.reconstructions), decode_threads()))
    pairs = open_pairs(recipe.images, recipe.reconstructions)
    judges = load_judges(
        recipe.metrics,
        PairShape(Path(recipe.reconstructions), size[::-1]),
        ranks.device,
        lpips_weights=recipe.lpips_weights,
        inception=recipe.inception,
        features=recipe.features,
    )
    figures = measured(pairs, PairFigures(judges, ranks.device), whole_groups(recipe.batch_size), ranks)
    if ranks.is_main:
        warnings = warnings_of(pairs, judges.descriptions)
        report = {
            "stage": "eval",
            "kind": "reconstruction",
            "rae": __version__,
            **figures,
            "size": list(size),
            "images_path": recipe.images,
            "reconstructions_path": recipe.reconstructions,
            "sources": pairs.sources,
            "metrics": judges.descriptions,
            "world": ranks.world,
            "warnings": warnings,
            "protocol": pairs.protocol,
        }
        tell(report, recipe)


def measured(pairs: PairSet, figures: PairFigures, batch_size: int, ranks: Ranks) -> dict[str, Any]:
    """This rank's batches, then all ranks' figures as one."""
    starts = range(ranks.rank * batch_size, len(pairs), ranks.world * batch_size)
    share = sum(min(batch_size, len(pairs) - start) for start in starts)
    progress = Progress(share, "pairs", "reconstruction", shown=ranks.is_main)
    for positions, images, reconstructions in pairs.batches(batch_size, ranks.rank, ranks.world, decode_threads()):
        names = [pairs.keys[position] for position in positions]
        figures.update(positions, images, reconstructions, names)
        progress.advance(len(names))
    progress.close()
    return figures.means(len(pairs), ranks)


def warnings_of(pairs: PairSet, metrics: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    warnings = []
    for name, told in metrics.items():
        if not told.get("network", {}).get("published_weights", True):
            warnings.append(f"{name}: its network's weights are not the published ones: compare it with no other")
    width = metrics.get("rfid", {}).get("network", {}).get("width", 0)
    if width and len(pairs) <= width:
        warnings.append(f"rfid: {len(pairs)} pairs for {width} features: biased upwards, compare at equal counts only")
    if not pairs.protocol:
        warnings.append("no reconstructions.json: nothing says what made the reconstructions, nor how to crop images")
    elif not pairs.are_saved_crops and pairs.sources["images"]["list_sha256"] != pairs.protocol["source_sha256"]:
        warnings.append("the images' files are not those that the reconstructions were made of: matched by name alone")
    return warnings


def tell(report: dict[str, Any], recipe: EvaluateReconstructionRecipe) -> None:
    """Figures on stdout, warnings on stderr, everything in the recipe's output."""
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if recipe.output is not None:
        write_json(Path(recipe.output), report)
    print(json.dumps(report, indent=2) if recipe.print_json else table(report), flush=True)


def table(report: dict[str, Any]) -> str:
    """The figures for the eye: a name and a value a line."""
    rows = {}
    if "rfid" in report:
        parts = report["rfid_parts"]
        network = report["metrics"]["rfid"]["network"]
        told = f"means {parts['mean_part']:.4f} + covariances {parts['trace_part']:.4f}"
        rows["rfid"] = f"{report['rfid']:.4f}  ({told}; {network['name']}, sha256 {str(network['sha256'])[:8]})"
    rows |= {name: f"{report[name]:.4f}{unit}" for name, unit in UNITS.items() if name in report}
    rows["pairs"] = f"{report['pairs']} of {report['size'][0]} x {report['size'][1]} pixels"
    return "\n".join(f"{name:<6} {value}" for name, value in rows.items())


UNITS = {"psnr": " dB", "ssim": "", "lpips": ""}
