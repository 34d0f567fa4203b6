"""`rae eval reconstruction`: how near reconstructions are to their images."""

from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt

COLLECTIVE_SECONDS = 3600.0  # ranks meet at the end; shares are equal, disks may not be
METRICS = "rfid,psnr,ssim,lpips"


def reconstruction(
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="What was reconstructed: folders, tars, or the saved crops.")
    ],
    reconstructions: Annotated[
        str, typer.Argument(metavar="RECONSTRUCTIONS", help="Of rae reconstruct; or any folder with the same names.")
    ],
    metrics: Annotated[str, typer.Option("--metrics", help="Some of these, with commas between.")] = METRICS,
    lpips_weights: Annotated[
        str | None,
        typer.Option("--lpips-weights", metavar="FILE", help="VGG16's weights [default: torch hub's cache]."),
    ] = None,
    inception: Annotated[
        str | None,
        typer.Option(
            "--inception", metavar="FILE", help="Inception's weights [default: $RAE_INCEPTION, torch hub's cache]."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="FILE",
            help="Instead of Inception: a classifier's file, or an encoder's name or folder.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs read at once on a rank.", min=1)] = 64,
    as_json: JsonOpt = False,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON.")
    ] = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Reconstruction quality on the saved 8-bit images: rFID, PSNR, SSIM, LPIPS.

    Pairs are matched by name; images are cropped as the reconstructions' protocol says. The figures depend on neither
    batch size, order nor number of devices.

    Examples:

    \b
      rae eval reconstruction imagenet/val recon/ --devices 8
      rae eval reconstruction test/ recon/ --metrics psnr,ssim
    """
    from raecli.errors import InputError, UsageError
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EvaluateReconstructionRecipe

    for path in (images, reconstructions):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder")
    wanted = chosen_metrics(metrics)
    if inception and features:
        raise UsageError("--inception and --features exclude one another: rFID is measured in one network")
    find_weights(wanted, lpips_weights, inception, features)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UsageError(f"--out {out}: no such folder to write in; make it first")
    recipe = recipe_from_options(
        EvaluateReconstructionRecipe,
        {
            "stage": "evaluate-reconstruction",
            "images": images,
            "reconstructions": reconstructions,
            "metrics": wanted,
            "lpips_weights": lpips_weights,
            "inception": inception,
            "features": features,
            "batch_size": batch_size,
            "print_json": as_json,
            "output": out,
        },
    )
    options = LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS)
    start("evaluate-reconstruction", recipe, options, dry_run=dry_run, as_json=as_json)


def chosen_metrics(text: str) -> tuple[str, ...]:
    """The metrics named, in the order of METRICS, each once."""
    from raecli.errors import UsageError

    told, known = {part.strip() for part in text.split(",")}, METRICS.split(",")
    if not told or not told <= set(known):
        raise UsageError(f"--metrics is {text!r}; it reads like psnr,ssim and knows {', '.join(known)}")
    return tuple(name for name in known if name in told)


def find_weights(metrics: tuple[str, ...], lpips: str | None, inception: str | None, features: str | None) -> None:
    """Refuse a metric whose network is not here before anything is started, naming the file to bring."""
    from raecli.errors import UsageError
    from raecli.metrics.inception_file import find_inception
    from raecli.metrics.lpips_file import find_lpips

    absent = []
    if "lpips" in metrics:
        try:
            find_lpips(lpips)
        except UsageError as error:
            absent.append(str(error))
    if "rfid" in metrics:
        try:
            if features is None:
                find_inception(inception)
            elif features.endswith(".safetensors") and not Path(features).is_file():
                raise UsageError(f"--features {features}: no such file")
        except UsageError as error:
            absent.append(str(error))
    if absent:
        raise UsageError("\n  ".join(["files are missing", *absent, "or leave them out: --metrics psnr,ssim"]))
