"""`rae overfit-toy`: Theorem 1 on one latent."""

import enum
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt
from raecli.errors import UsageError

if TYPE_CHECKING:
    from raecli.recipe.blocks import EncoderSpec
    from raecli.recipe.recipes import OverfitToyRecipe


class Preset(enum.StrEnum):
    """Sizes that were measured together."""

    TINY = "tiny"
    SMALL = "small"
    PAPER_CPU = "paper-cpu"
    PAPER = "paper"


EVERY_PRESET = {"stage": "overfit-toy", "batch_size": 32, "sample_steps": 25, "image_size": 56}  # App. G; 56: ours

# Learning rate 2e-4 (App. G) is right near width 768 only; narrower models need more, about as 1 / width.
PRESETS: dict[Preset, dict[str, Any]] = {
    Preset.TINY: {
        "widths": (32, 48, 56, 64, 72, 96),
        "depths": (2,),
        "heads": 2,
        "channels": (64,),
        "tokens": 4,
        "steps": 1000,
        "learning_rate": 6e-3,
        "final_learning_rate": 3e-4,
        "time_shift": 1.0,
        "evaluation_draws": 4096,
    },
    Preset.SMALL: {
        "widths": (128, 192, 256, 320),
        "depths": (2,),
        "heads": 4,
        "channels": (256,),
        "tokens": 4,
        "steps": 1200,
        "learning_rate": 1e-3,
        "final_learning_rate": 5e-5,
        "time_shift": 1.0,
        "evaluation_draws": 4096,
    },
    Preset.PAPER_CPU: {
        "widths": (384, 512, 640, 768, 896),
        "depths": (2,),
        "heads": None,
        "channels": (768,),
        "tokens": 4,
        "steps": 1200,
        "learning_rate": 2e-4,
        "final_learning_rate": None,
        "time_shift": 1.0,
        "evaluation_draws": 2048,
    },
    Preset.PAPER: {  # App. G, which swaps the words width and depth; heads as Table 13, where App. G says 4
        "widths": (384, 512, 640, 768, 896),
        "depths": (12,),
        "heads": None,
        "channels": (768,),
        "tokens": 256,
        "image_size": 256,
        "steps": 1200,
        "learning_rate": 2e-4,
        "final_learning_rate": None,
        "time_shift": (256 * 768 / 4096) ** 0.5,  # 6.93, Sec. 4.2
        "evaluation_draws": 2048,
    },
}
GRIDS = {  # widths and token dimensions of Table 3: S, B and L of Table 13; and smaller ones
    Preset.TINY: (32, 64, 96),
    Preset.SMALL: (128, 256, 384),
    Preset.PAPER_CPU: (384, 768, 1024),
    Preset.PAPER: (384, 768, 1024),
}
WIDTH_STEP = 128  # of A..B, the paper's
GPU_FLOPS = 15e12  # a second in float32, what an A100 reaches
MOST_VALUES = 64  # of one option: more is a slip of the keyboard
COLLECTIVE_SECONDS = 86400.0  # ranks meet once, at the end: one may wait there for the others' wider models


def overfit_toy(
    preset: Annotated[Preset | None, typer.Option("--preset", help="Sizes [default: by device and width].")] = None,
    width: Annotated[
        str | None,
        typer.Option("--width", metavar="WIDTHS", help="384 | 384..896 (steps of 128) | 32..96..16 | 32,64."),
    ] = None,
    depth: Annotated[str | None, typer.Option("--depth", metavar="DEPTHS", help="Blocks: 2 | 4,12 | 4..24..4.")] = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="WIDTHxDEPTH", help="A wide DDT head, such as 96x2: DiT-DH.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option("--channels", metavar="N", help="Channels n of a token, or a list of them.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Image to overfit; again for more [default: a photograph]."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", metavar="NAME", help="As encode-cache's; it tells n [default: random weights]."),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder", "-a", metavar="RUN", help="A trained decoder: overfit its latents, decode samples."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Runs of each.", min=1)] = 1,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Training steps.", min=1)] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Table 3: three widths against three token dimensions.")] = False,
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="Folder for report.json and the figures.")
    ] = "runs/toy",
    as_json: JsonOpt = False,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Show that a transformer narrower than a token cannot fit even one image (Theorem 1).

    Overfits the latent of one photograph with models of several widths d, and holds each loss against the bound
    (n - d)/n that no depth, learning rate or time distribution can pass. What is proved: docs/theory.md.

    Examples:

    \b
      rae overfit-toy                           six widths around n = 64, a minute
      rae overfit-toy --width 384..896          the paper's widths around n = 768
      rae overfit-toy --width 48 --depth 1,2,6  depth does not help
      rae overfit-toy --width 32 --head 96x2    a wide head does
      rae overfit-toy --grid                    Table 3, scaled down on a CPU
      rae overfit-toy --encoder dinov2-b --image a.jpg --image b.jpg --seeds 3"""
    from raecli.launch import LaunchOptions, start

    refuse_both({"--encoder": encoder, "--autoencoder": autoencoder, "--channels": channels})
    refuse_both({"--grid": grid, "--width": width, "--channels": channels, "--encoder": encoder, "--head": head})
    refuse_both({"--grid": grid, "--autoencoder": autoencoder})
    given: dict[str, Any] = {
        "widths": parse_numbers("--width", width, range_step=WIDTH_STEP) if width is not None else None,
        "depths": parse_numbers("--depth", depth, range_step=1) if depth is not None else None,
        "channels": parse_numbers("--channels", channels, range_step=WIDTH_STEP) if channels is not None else None,
        "head": parse_head(head) if head is not None else None,
        "steps": steps,
        "images": images_of(image, needed=bool(encoder or autoencoder)),
        **(latents_of_autoencoder(autoencoder) if autoencoder else {}),
    }
    spec = resolved_encoder(encoder) if encoder else None
    if spec:
        given["channels"] = (spec.width,)
    chosen, why = (preset, "as asked") if preset else choose_preset(given["widths"] or given["channels"])
    values = {**EVERY_PRESET, **PRESETS[chosen], "preset": chosen.value, "grid": grid}
    if grid:
        given |= {"widths": GRIDS[chosen], "channels": GRIDS[chosen]}
    elif given["channels"] and not given["widths"]:
        given["widths"] = scaled(values["widths"], given["channels"][-1], values["channels"][0])
    values |= {name: value for name, value in given.items() if value is not None}
    if spec:
        values["encoder"] = with_tokens(spec, values["tokens"])
    recipe = build_recipe(values | {"seeds": tuple(range(seeds)), "output": out, "print_json": as_json})
    print(f"preset {chosen.value}, {why}; {expected_time(recipe)}", file=sys.stderr)
    launch = LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS)
    start("overfit_toy", recipe, launch, dry_run=dry_run, as_json=recipe.print_json)


def refuse_both(options: dict[str, object]) -> None:
    """The first option given excludes the others."""
    given = [name for name, value in options.items() if value]
    if len(given) > 1 and given[0] == next(iter(options)):
        raise UsageError(f"{given[0]} and {given[1]} exclude one another: the first tells what the second would")


def images_of(paths: list[str] | None, *, needed: bool) -> tuple[str, ...]:
    """The images to overfit: as told, else scikit-learn's photograph of a Chinese temple, else none."""
    from importlib.util import find_spec

    from raecli.data.preprocess import decode_rgb
    from raecli.errors import InputError

    if paths:
        for path in paths:
            if not Path(path).is_file():
                raise InputError(f"--image {path}: no such file")
            decode_rgb(Path(path).read_bytes(), path)
        return tuple(dict.fromkeys(str(Path(path).absolute()) for path in paths))
    sklearn = find_spec("sklearn")
    for folder in (sklearn.submodule_search_locations or ()) if sklearn else ():
        if (photograph := Path(folder, "datasets", "images", "china.jpg")).is_file():
            return (str(photograph),)
    if needed:
        raise UsageError(
            "no image: give one with --image FILE (scikit-learn, whose photograph is the default, is missing)"
        )
    return ()


def resolved_encoder(name: str) -> "EncoderSpec":
    """The encoder, its weights found and hashed. The side of 224 is of no account: `with_tokens` sets another."""
    from raecli.store.encoder_baselines import is_baseline
    from raecli.store.encoders import resolve_encoder

    if is_baseline(name):
        raise UsageError(
            f"--encoder {name}: has no tokens of a transformer; give a vision transformer's name or folder"
        )
    return resolve_encoder(name, image_size=224)


def with_tokens(spec: "EncoderSpec", tokens: int) -> "EncoderSpec":
    """The same encoder on an input of so many patches."""
    return spec.model_copy(update={"input_size": math.isqrt(tokens) * spec.patch_size})


def latents_of_autoencoder(path: str) -> dict[str, Any]:
    """Token dimension, tokens and image size that a trained decoder's config.json tells."""
    from raecli.errors import CheckpointError
    from raecli.models.load import read_artifact

    folder, config, _ = read_artifact(path, "rae-decoder")
    try:
        latents = config["latents"]
        channels, high, wide = (int(size) for size in latents["shape"])
        image_size = int(latents["image_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config.json does not tell the latents' shape: {error}") from None
    return {"channels": (channels,), "tokens": high * wide, "image_size": image_size, "autoencoder": str(Path(path))}


def scaled(widths: tuple[int, ...], channels: int, of: int) -> tuple[int, ...]:
    """The preset's widths for another token dimension: as far above and below it, in multiples of 4."""
    return tuple(sorted({max(4, round(width * channels / of / 4) * 4) for width in widths}))


def parse_numbers(option: str, text: str, *, range_step: int) -> tuple[int, ...]:
    """Numbers out of a list of A, A..B and A..B..STEP, rising, each once."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9})(?:\.\.(\d{1,9}))?)?", part.strip(), re.ASCII)
        if not found:
            raise UsageError(
                f"{option} is {text!r}; expected a number (384), a range A..B in steps of {range_step}, "
                "a range A..B..STEP (32..96..16), or a list of these with commas"
            )
        first = int(found[1])
        last, step = int(found[2] or first), int(found[3] or range_step)
        numbers.update(checked_range(option, part.strip(), first, last, step))
    return tuple(sorted(numbers))


def checked_range(option: str, text: str, first: int, last: int, step: int) -> range:
    """The numbers from first to last, both among them."""
    if first < 1 or step < 1:
        raise UsageError(f"{option} {text}: numbers and steps are at least 1")
    if last < first:
        raise UsageError(f"{option} {text}: a range rises; did you mean {last}..{first}?")
    if (last - first) % step:
        below = last - (last - first) % step
        raise UsageError(
            f"{option} {text}: steps of {step} from {first} reach {below} and then {below + step}, not {last}; "
            f"write {first}..{below}..{step}, or another step"
        )
    if (last - first) // step >= MOST_VALUES:
        raise UsageError(
            f"{option} {text}: {(last - first) // step + 1} values; at most {MOST_VALUES}, take a larger step"
        )
    return range(first, last + 1, step)


def parse_head(text: str) -> tuple[int, int]:
    """WIDTHxDEPTH."""
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)
    if not found:
        raise UsageError(f"--head is {text!r}; expected WIDTHxDEPTH, such as 96x2")
    return int(found[1]), int(found[2])


def choose_preset(widths: tuple[int, ...] | None) -> tuple[Preset, str]:
    """The preset for this machine and these widths, and why."""
    from torch.cuda import is_available

    if is_available():
        return Preset.PAPER, "since there is a GPU"
    if widths is None:
        return Preset.TINY, "since there is no GPU and no --width"
    for preset, widest in ((Preset.TINY, 128), (Preset.SMALL, 320)):
        if widths[-1] <= widest:
            return preset, f"since there is no GPU and no width is above {widest}"
    return Preset.PAPER_CPU, "since there is no GPU and a width is above 320"


def build_recipe(values: dict[str, Any]) -> "OverfitToyRecipe":
    """The typed recipe; its refusals in words for the command line."""
    from pydantic import ValidationError

    from raecli.recipe.recipes import OverfitToyRecipe

    try:
        return OverfitToyRecipe(**values)
    except ValidationError as error:
        raise UsageError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


def expected_time(recipe: "OverfitToyRecipe") -> str:
    """What runs, and about how long: on one CPU core by a fit to runs at widths 32 to 896, on a GPU by arithmetic."""
    repeats = len(recipe.channels) * len(recipe.seeds) * max(1, len(recipe.images))
    squares = sum(width**2 * depth for width in recipe.widths for depth in recipe.depths)  # 12 weights of a token each
    jobs = len(recipe.widths) * len(recipe.depths)
    if recipe.head:
        squares += jobs * recipe.head[0] ** 2 * recipe.head[1]
    step_seconds = 0.0035 * jobs + squares * (58 + 28 * recipe.tokens) * 1e-9  # overhead; optimiser, and tokens
    flops = 6 * 12 * squares * recipe.tokens * recipe.batch_size  # a step, forward and backward
    steps = recipe.steps * repeats
    channels = ", ".join(str(n) for n in recipe.channels)
    text = f"n = {channels}; {recipe.tokens} tokens, {recipe.steps} steps: "
    text += f"about {in_words(steps * step_seconds)} on one CPU core"
    if recipe.preset == "paper":
        text += f", reckoned (not measured) {in_words(steps * flops / GPU_FLOPS)} on a GPU"
    return text


def in_words(seconds: float) -> str:
    """Minutes, or hours from two up."""
    return f"{max(1, round(seconds / 60))} min" if seconds < 7200 else f"{round(seconds / 3600)} hours"
