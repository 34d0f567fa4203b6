"""`rae flops`."""

import json
import math
from typing import Annotated, Any

import typer

from raecli.cli.options import JsonOpt, OverridesArg

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A training recipe's file, or a shipped one's name.")]
REMARKS = {  # what each figure is of; --json has the names alone
    "paper_gflops": "multiply-adds of a forward, as the paper counts",
    "executed_gflop_forward": "all that runs, two operations a multiply-add",
    "executed_gflop_training": "of one image: a backward is two forwards",
    "state_gib_a_rank": "weights, gradients, Adam, average",
    "training_images_per_second_at_peak": "if --peak were reached",
    "inference_images_per_second_at_peak": "forwards; a sample takes many",
    "latents_gb_per_second_at_that_bound": "to be read from the cache",
}
PeakOpt = Annotated[float, typer.Option("--peak", help="TFLOP/s of the device; assumed of an H200 in bf16.")]


def flops(recipe: RecipeArg, overrides: OverridesArg = None, peak: PeakOpt = 790.0, as_json: JsonOpt = False) -> None:
    """Count what a recipe's model costs: parameters, FLOPs in two conventions, memory, and bounds on speed.

    Where the recipe leaves sizes to a cache that is not there yet, those of DINOv2-B at 256 pixels are assumed (768
    channels, 16 x 16, 1000 classes), and it is said. A discriminator is counted beside its decoder.

    Examples:

      rae flops dith_xl

      rae flops mine.yaml model.width=768 --json
    """
    from raecli.errors import UsageError
    from raecli.plan import cost_of
    from raecli.recipe.load import load_recipe
    from raecli.recipe.shipped import find_recipe

    if not (math.isfinite(peak) and peak > 0):
        raise UsageError(f"--peak is {peak}; it is a number of TFLOP/s above 0")
    cost = cost_of(load_recipe(None, find_recipe(recipe), overrides or ()), peak)
    typer.echo(json.dumps(cost, indent=2) if as_json else table(cost))


def table(cost: dict[str, Any]) -> str:
    """The figures, a line each."""
    width = max(len(name) for name in cost)
    figures = max(len(shown(value)) for name, value in cost.items() if name in REMARKS)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {shown(value):<{figures}}  {REMARKS.get(name, '')}".rstrip()
        for name, value in cost.items()
    )


def shown(value: Any) -> str:
    """A number with at most two decimals, and thousands apart."""
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
