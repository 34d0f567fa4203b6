"""`rae sample`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt, TimeoutOpt

if TYPE_CHECKING:
    from raecli.recipe.recipes import SampleRecipe

INTERVAL = re.compile(r"([0-9.]+):([0-9.]+)")

# An option that is not given leaves the recipe's value, or its default, which recipe/recipes.py alone knows.
ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE", help="A diffusion run, its final/, a checkpoint; or a recipe of stage sample."
    ),
]
RestArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OUT] [KEY=VALUE]...", help="Folder of the images; a recipe's values to change."),
]
AutoencoderOpt = Annotated[
    str | None,
    typer.Option("--autoencoder", "-a", help="A decoder run, its final/, a checkpoint; pixels; sdvae:FOLDER."),
]
ClassesOpt = Annotated[
    str | None, typer.Option("--classes", help="Numbers or names, e.g. 3,7,n01443537,goldfish [default: all].")
]
FeaturesOpt = Annotated[
    str | None, typer.Option("--features", help="Of a sweep, instead of Inception: a classifier's file, an encoder.")
]


def sample(
    model: ModelArg,
    rest: RestArg = None,
    autoencoder: AutoencoderOpt = None,
    num: Annotated[int | None, typer.Option("--num", "-n", help="How many images [default: 64].")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i depends on (seed, i) [default: 0].")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver [default: 50].")] = None,
    solver: Annotated[
        Literal["euler", "heun", "sde"] | None,
        typer.Option(help="heun: two evaluations a step; sde: Euler-Maruyama [default: euler]."),
    ] = None,
    sde_diffusion: Annotated[
        float | None, typer.Option(help="w = this x t, of --solver sde; 0: the ODE [default: 1].")
    ] = None,
    time_grid: Annotated[
        Literal["paper", "released"] | None, typer.Option(help="To t = 0, or as the release [default: paper].")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "-g", help="1: none [default: 1].")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Low and high shifted time [default: 0 1].")
    ] = None,
    guide: Annotated[str | None, typer.Option(help="A weaker model: AutoGuidance instead of CFG.")] = None,
    classes: ClassesOpt = None,
    unconditional: Annotated[
        bool | None, typer.Option("--unconditional", help="The null label alone, whatever the model knows.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at once on a rank [default: 64].")] = None,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of matrix products; the state is fp32 [default: fp32].")
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="torch.compile, a block at a time.")] = None,
    format: Annotated[
        Literal["png", "npz", "both"] | None, typer.Option(help="What is written [default: png].")
    ] = None,
    pixel_rounding: Annotated[
        Literal["round", "floor"] | None, typer.Option(help="floor: as the release [default: round].")
    ] = None,
    grid: Annotated[int | None, typer.Option(help="Images in grid.png; 0: none [default: 100].")] = None,
    trajectory: Annotated[
        int | None, typer.Option(help="Images in trajectory.png, from noise on [default: 0].")
    ] = None,
    guidance_sweep: Annotated[
        str | None, typer.Option(help="Try scales, e.g. 1.0,1.2,1.5, and measure each against --ref.")
    ] = None,
    interval_sweep: Annotated[str | None, typer.Option(help="Of a sweep: intervals, e.g. 0:1,0.1:0.9.")] = None,
    ref: Annotated[str | None, typer.Option("--ref", metavar="REF", help="Of a sweep: as of rae eval fid.")] = None,
    features: FeaturesOpt = None,
    inception: Annotated[str | None, typer.Option(metavar="FILE", help="Of a sweep: Inception's weights.")] = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 3600.0,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Generate images. Started again, it makes only what is missing.

    Examples:

      rae sample runs/dith_xl samples/ -a runs/decoder --num 50000 --format npz

      rae sample sample_dith_xl_256_autoguidance --devices 8

      rae sample runs/a sweep/ -a runs/b --guidance-sweep 1,1.2,1.5 --ref r.npz
    """
    from raecli.launch import LaunchOptions, start

    options: dict[str, Any] = {
        "autoencoder": autoencoder,
        "num": num,
        "seed": seed,
        "steps": steps,
        "solver": solver,
        "sde_diffusion": sde_diffusion,
        "time_grid": time_grid,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "guide": guide,
        "classes": None if classes is None else class_words(classes),
        "unconditional": unconditional,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "format": format,
        "pixel_rounding": pixel_rounding,
        "grid": grid,
        "trajectory": trajectory,
    }
    sweep = {
        "scales": numbers(guidance_sweep, "--guidance-sweep"),
        "intervals": intervals(interval_sweep),
        "reference": ref,
        "features": features,
        "inception": inception,
    }
    recipe = recipe_of(model, rest or [], given(options), given(sweep))
    recipe = checked(recipe, dry_run)
    start("sample", recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, timeout), dry_run=dry_run, as_json=as_json)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were told."""
    return {key: value for key, value in options.items() if value is not None}


def class_words(text: str) -> tuple[int | str, ...]:
    """3,goldfish -> (3, "goldfish")."""
    words = [word.strip() for word in text.split(",")]
    return tuple(int(word) if word.isdecimal() and word.isascii() else word for word in words)


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """1.0,1.2,1.5."""
    from raecli.errors import UsageError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} is {text!r}; it reads like 1.0,1.2,1.5") from None


def intervals(text: str | None) -> tuple[tuple[float, float], ...] | None:
    """0:1,0.1:0.9."""
    from raecli.errors import UsageError

    if text is None:
        return None
    found = [INTERVAL.fullmatch(part.strip()) for part in text.split(",")]
    try:
        return tuple((float(match[1]), float(match[2])) for match in found)  # type: ignore[index]
    except (TypeError, ValueError):
        raise UsageError(f"--interval-sweep is {text!r}; it reads like 0:1,0.1:0.9") from None


def recipe_of(first: str, rest: list[str], options: dict[str, Any], sweep: dict[str, Any]) -> "SampleRecipe":
    """The recipe that the command line means: a file's with options and overrides over it, or options alone."""
    from raecli.recipe.load import load_recipe, override_of, recipe_from_options
    from raecli.recipe.recipes import SampleRecipe
    from raecli.recipe.shipped import find_recipe

    overrides = [word for word in rest if "=" in word and not Path(word).exists()]
    outputs = [word for word in rest if word not in overrides]
    if is_recipe(first, "autoencoder" in options):
        check_words(outputs, overrides, most_outputs=1)
        told = options | {f"sweep.{key}": value for key, value in sweep.items()}
        told |= {"output": outputs[0]} if outputs else {}
        return load_recipe(
            SampleRecipe, find_recipe(first), [*overrides, *(override_of(key, value) for key, value in told.items())]
        )
    check_words(outputs, overrides, most_outputs=1, of_model=True)
    check_sweep(sweep, "autoencoder" in options)
    blocks = {"sweep": sweep} if sweep else {}
    return recipe_from_options(
        SampleRecipe, {"stage": "sample", "model": first, "output": outputs[0]} | options | blocks
    )


def is_recipe(word: str, with_autoencoder: bool) -> bool:
    """Whether the first word is a recipe: a file, a shipped name, or nothing that could be a model."""
    from raecli.recipe.shipped import shipped_files

    path = Path(word)
    if path.is_dir():
        return False
    short = word.removeprefix("recipes/").removesuffix(".yaml")
    return path.is_file() or path.suffix in (".yaml", ".yml") or short in shipped_files() or not with_autoencoder


def check_words(outputs: list[str], overrides: list[str], *, most_outputs: int, of_model: bool = False) -> None:
    """Refuse words that mean nothing here."""
    from raecli.errors import UsageError

    if len(outputs) > most_outputs:
        raise UsageError(f"one folder OUT is asked for, found {' and '.join(outputs)}")
    if of_model and overrides:
        raise UsageError(f"{overrides[0]}: key=value changes a recipe; with a MODEL use the options")
    if of_model and not outputs:
        raise UsageError("MODEL needs OUT, the folder of the images: rae sample MODEL OUT --autoencoder DECODER")


def check_sweep(sweep: dict[str, Any], with_autoencoder: bool) -> None:
    """A sweep has scales and a reference; without one its options mean nothing."""
    from raecli.errors import UsageError

    if not with_autoencoder:
        raise UsageError("--autoencoder is missing: a decoder run, its final/, a checkpoint; pixels; sdvae:FOLDER")
    if sweep and "scales" not in sweep:
        raise UsageError("--interval-sweep, --ref, --features and --inception belong to --guidance-sweep")
    if sweep and "reference" not in sweep:
        raise UsageError("--guidance-sweep measures what it makes: give --ref REF, a folder of images or an .npz")


def checked(recipe: "SampleRecipe", dry_run: bool) -> "SampleRecipe":
    """The recipe held against the models it names: class names become numbers. No torch."""
    from raecli.store.model_cards import (
        check_guide,
        check_null_label,
        check_same_latents,
        is_there,
        read_autoencoder_card,
        read_diffusion_card,
    )

    check_reference(recipe, dry_run)
    absent = [path for path in (recipe.model, recipe.autoencoder, recipe.guide) if path and not is_there(path)]
    if dry_run and absent:
        typer.echo(f"plan: {absent[0]} is not there yet, so the recipe is shown without what it would tell", err=True)
        return recipe
    model = read_diffusion_card(recipe.model)
    autoencoder = read_autoencoder_card(recipe.autoencoder, model)
    if autoencoder.latents:
        check_same_latents(model.latents, autoencoder.latents, f"{recipe.model} and {recipe.autoencoder}")
    if recipe.guide:
        check_guide(model, read_diffusion_card(recipe.guide))
    elif any(scale != 1 for scale in (recipe.guidance_scale, *(recipe.sweep.scales if recipe.sweep else ()))):
        check_null_label(model)
    if not dry_run:
        check_room(recipe, autoencoder.image_size)
    return with_class_numbers(recipe, model.names, model.num_classes)


def check_reference(recipe: "SampleRecipe", dry_run: bool) -> None:
    """What a sweep is measured by is there, before hours of sampling."""
    from raecli.errors import InputError
    from raecli.metrics.inception_file import find_inception

    if recipe.sweep is None or dry_run:
        return
    files = [recipe.sweep.reference]
    if recipe.sweep.features and recipe.sweep.features.endswith(".safetensors"):
        files.append(recipe.sweep.features)
    for file in files:
        if not Path(file).exists():
            raise InputError(f"{file}: no such file or folder")
    if not recipe.sweep.features:
        find_inception(recipe.sweep.inception)


def check_room(recipe: "SampleRecipe", side: int) -> None:
    """Refuse more images than the disk has room for; those that are there already count no more."""
    from raecli.store.samples import check_space

    folder = Path(recipe.output)
    there = sum(1 for _ in folder.glob("[0-9]*.png")) if folder.is_dir() else 0
    check_space(folder, images=max(0, recipe.num - there), side=side, format=recipe.format)


def with_class_numbers(recipe: "SampleRecipe", names: tuple[str, ...], num_classes: int) -> "SampleRecipe":
    """Names of classes as numbers."""
    from raecli.errors import UsageError
    from raecli.store.class_names import class_numbers

    if recipe.classes is None:
        return recipe
    if num_classes == 0:
        raise UsageError(f"--classes: {recipe.model} was trained without classes; leave it out")
    return recipe.model_copy(update={"classes": class_numbers(recipe.classes, names, num_classes)})
