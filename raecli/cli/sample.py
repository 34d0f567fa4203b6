"""`rae sample`."""

from typing import Annotated, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, NnodesOpt, NodeRankOpt, RdzvOpt, TimeoutOpt


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusion run, its final/, or a checkpoint.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the images.")],
    autoencoder: Annotated[
        str, typer.Option("--autoencoder", "-a", help="A decoder run, its final/, a checkpoint; pixels; sdvae:FOLDER.")
    ],
    num: Annotated[int, typer.Option("--num", "-n", help="How many images.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i).")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the solver.", min=1)] = 50,
    solver: Annotated[Literal["euler", "heun"], typer.Option(help="Heun costs two evaluations a step.")] = "euler",
    time_grid: Annotated[Literal["paper", "released"], typer.Option(help="To t = 0, or as the release.")] = "paper",
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", "-g", help="1: none.")] = 1.0,
    guidance_interval: Annotated[tuple[float, float], typer.Option(help="Low and high shifted time.")] = (0.0, 1.0),
    guide: Annotated[str | None, typer.Option(help="A weaker model: AutoGuidance instead of CFG.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class numbers, e.g. 3,7,9 [default: all].")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once on a rank.", min=1)] = 64,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of matrix products; the state is fp32.")] = "fp32",
    format: Annotated[Literal["png", "npz", "both"], typer.Option(help="What is written.")] = "png",
    pixel_rounding: Annotated[Literal["round", "floor"], typer.Option(help="floor: as the release.")] = "round",
    grid: Annotated[int, typer.Option(help="Images on the sheet grid.png; 0: no sheet.", min=0)] = 100,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 3600.0,
    dry_run: DryRunOpt = False,
) -> None:
    """Generate images. Started again, it makes only what is missing.

    Examples:

      rae sample runs/dith_xl samples/ --autoencoder runs/decoder_xl_dinov2b --num 50000 --format npz

      rae sample runs/dith_xl samples/ -a runs/decoder -n 64 -g 1.42 --guide runs/dith_s
    """
    from raecli.errors import UsageError
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import SampleRecipe

    numbers = None
    if classes is not None:
        parts = classes.split(",")
        if not all(part.strip().isdecimal() and part.isascii() for part in parts):
            raise UsageError(f"--classes is {classes!r}; it reads like 3,7,9")
        numbers = tuple(int(part) for part in parts)
    recipe = recipe_from_options(
        SampleRecipe,
        {
            "stage": "sample",
            "model": model,
            "autoencoder": autoencoder,
            "output": output,
            "num": num,
            "seed": seed,
            "steps": steps,
            "solver": solver,
            "time_grid": time_grid,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guide": guide,
            "classes": numbers,
            "batch_size": batch_size,
            "precision": precision,
            "format": format,
            "pixel_rounding": pixel_rounding,
            "grid": grid,
        },
    )
    start("sample", recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, timeout), dry_run=dry_run)
