"""`rae train-decoder` and `rae train-diffusion`."""

from typing import Annotated

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, NnodesOpt, NodeRankOpt, OverridesArg, RdzvOpt, TimeoutOpt

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]


def train_decoder(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 600.0,
    dry_run: DryRunOpt = False,
) -> None:
    """Train a decoder that turns latents back into images. The same command again resumes.

    Examples:

      rae train-decoder recipes/decoder_xl_dinov2b.yaml images=imagenet/train

      rae train-decoder digits/decoder duration="200 steps" output=runs/short
    """
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import load_recipe
    from raecli.recipe.recipes import TrainDecoderRecipe
    from raecli.recipe.shipped import find_recipe
    from raecli.store.tracking import check_tracking

    spec = load_recipe(TrainDecoderRecipe, find_recipe(recipe), overrides or ())
    if not (dry_run and is_absent(spec.cache)):
        from raecli.store.manifest import read_manifest
        from raecli.store.resolve import check_decoder

        spec = check_decoder(spec, read_manifest(spec.cache))
    check_tracking(spec.tracking)
    start("train-decoder", spec, LaunchOptions(devices, nnodes, node_rank, rdzv, timeout), dry_run=dry_run)


def train_diffusion(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 600.0,
    dry_run: DryRunOpt = False,
) -> None:
    """Train a diffusion transformer on cached latents. The same command again resumes.

    Examples:

      rae train-diffusion recipes/dith_xl.yaml --devices 8

      rae train-diffusion recipes/dith_s.yaml cache=latents/mine batch_size=256 output=runs/mine
    """
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import load_recipe
    from raecli.recipe.recipes import TrainDiffusionRecipe
    from raecli.recipe.shipped import find_recipe
    from raecli.store.tracking import check_tracking

    spec = load_recipe(TrainDiffusionRecipe, find_recipe(recipe), overrides or ())
    if not (dry_run and is_absent(spec.cache)):
        from raecli.store.manifest import read_manifest
        from raecli.store.resolve import resolve_diffusion

        manifest = read_manifest(spec.cache)
        spec = resolve_diffusion(spec, manifest)
        if spec.evaluation is not None:
            from raecli.sampling.online import check_generation

            check_generation(spec, manifest)
    check_tracking(spec.tracking)
    start("train-diffusion", spec, LaunchOptions(devices, nnodes, node_rank, rdzv, timeout), dry_run=dry_run)


def is_absent(cache: str) -> bool:
    """Whether the cache is yet to be made: a plan may be looked at before. Told on stderr."""
    from pathlib import Path

    if Path(cache).exists():
        return False
    typer.echo(f"plan: {cache} is not there yet, so the recipe is shown without what the cache would tell", err=True)
    return True
