"""`rae train-decoder` and `rae train-diffusion`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, OverridesArg, RdzvOpt, TimeoutOpt

if TYPE_CHECKING:
    from raecli.recipe.recipes import TrainDecoderRecipe

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]

WITHOUT = "loss.perceptual=none trains without a perceptual loss"


def train_decoder(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 600.0,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a decoder that turns latents back into images. The same command again resumes.

    Examples:

      rae train-decoder decoder_xl_dinov2b images=imagenet/train --devices 8

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
    check_networks(spec, dry_run)
    check_tracking(spec.tracking)
    start(
        "train-decoder",
        spec,
        LaunchOptions(devices, nnodes, node_rank, rdzv, timeout),
        dry_run=dry_run,
        as_json=as_json,
    )


def train_diffusion(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 600.0,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a diffusion transformer on cached latents. The same command again resumes.

    Examples:

      rae train-diffusion dith_xl --devices 8

      rae train-diffusion dith_s cache=latents/mine output=runs/mine
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
    start(
        "train-diffusion",
        spec,
        LaunchOptions(devices, nnodes, node_rank, rdzv, timeout),
        dry_run=dry_run,
        as_json=as_json,
    )


def is_absent(cache: str) -> bool:
    """Whether the cache is yet to be made: a plan may be looked at before. Told on stderr."""
    from raecli.store.remote import is_url

    if is_url(cache) or Path(cache).exists():
        return False
    typer.echo(f"plan: {cache} is not there yet, so the recipe is shown without what the cache would tell", err=True)
    return True


def check_networks(recipe: "TrainDecoderRecipe", dry_run: bool) -> None:
    """Refuse frozen networks whose files are not on this machine, all in one message; of a plan they are told alone."""
    from raecli.errors import UsageError

    absent = []
    for find in networks_of(recipe):
        try:
            find()
        except UsageError as error:
            absent.append(str(error))
    if absent and not dry_run:
        raise UsageError("\n  ".join(["files are missing", *absent]) if len(absent) > 1 else absent[0])
    for text in absent:
        typer.echo(f"plan: missing: {text}", err=True)


def networks_of(recipe: "TrainDecoderRecipe") -> list[Callable[[], object]]:
    """What looks for the file of each frozen network that the recipe names, and raises where it is not."""
    from raecli.metrics.inception_file import find_inception
    from raecli.metrics.lpips_file import locate_vgg
    from raecli.models.discriminator_file import find_backbone

    loss, adversarial, validation = recipe.loss, recipe.adversarial, recipe.validation
    found: list[Callable[[], object]] = []
    if loss.perceptual == "lpips":
        found.append(lambda: locate_vgg(loss.perceptual_weights, f"loss.perceptual_weights; {WITHOUT}"))
    if loss.perceptual == "features":
        found.append(lambda: require_file("loss.perceptual_weights", loss.perceptual_weights, f"; {WITHOUT}"))
    if adversarial is not None:
        found.append(lambda: find_backbone(adversarial.backbone))
    if validation is None:
        return found
    told = validation.metrics or ()  # without them, what is here is measured
    if "lpips" in told or validation.lpips_weights:
        found.append(lambda: locate_vgg(validation.lpips_weights, "validation.lpips_weights"))
    if validation.features and validation.features.endswith(".safetensors"):
        found.append(lambda: require_file("validation.features", validation.features))
    elif not validation.features and ("rfid" in told or validation.inception):
        found.append(lambda: find_inception(validation.inception))
    return found


def require_file(key: str, path: str | None, or_else: str = "") -> None:
    """Refuse a file that a key names and that is not there."""
    from raecli.errors import UsageError

    if path is None or not Path(path).is_file():
        raise UsageError(f"{key}: {path} is not there; bring the file, or name another{or_else}")
