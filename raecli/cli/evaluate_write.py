"""`rae eval features` and `rae eval statistics`: pay for extraction once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, NnodesOpt, NodeRankOpt, RdzvOpt

COLLECTIVE_SECONDS = 3600.0  # ranks meet once at the end; slices are equal, disks may not be

ImagesArg = Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of PNG or JPEG images, .npz, .npy, or tars.")]
OutArg = Annotated[str, typer.Argument(metavar="OUT.npz", help="The file to write.")]
InceptionOpt = Annotated[
    str | None,
    typer.Option("--inception", metavar="FILE", help="Its weights [default: $RAE_INCEPTION, torch hub's cache]."),
]
Dinov2Opt = Annotated[
    str | None, typer.Option("--dinov2", metavar="FILE", help="ViT-L/14's weights: write what fdd needs too.")
]
PurposeOpt = Annotated[
    Literal["generation", "reconstruction"],
    typer.Option("--for", help="What the file is a reference for; eval refuses the other kind of samples."),
]
BatchSizeOpt = Annotated[int, typer.Option("--batch-size", help="Images a forward on one rank.", min=1)]


def features(
    images: ImagesArg,
    output: OutArg,
    inception: InceptionOpt = None,
    dinov2: Dinov2Opt = None,
    purpose: PurposeOpt = "generation",
    batch_size: BatchSizeOpt = 64,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Write Inception's features of every image: pool [N, 2048], spatial [N, 2023], logits [N, 1008], float32.

    The file stands for the images in every metric but accuracy. 20 kB an image.

    \b
    rae eval features samples/ sample_features.npz
    rae eval all sample_features.npz --ref adm_ref.npz
    """
    arguments = (inception, dinov2, purpose, batch_size, devices, nnodes, node_rank, rdzv, dry_run)
    write("features", images, output, *arguments)


def statistics(
    images: ImagesArg,
    output: OutArg,
    inception: InceptionOpt = None,
    dinov2: Dinov2Opt = None,
    purpose: PurposeOpt = "generation",
    batch_size: BatchSizeOpt = 64,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Write mean and covariance of Inception's features, with ADM's names: mu, sigma, mu_s, sigma_s.

    A reference for fid and sfid; precision, recall and kid need images or features.

    \b
    rae eval statistics imagenet/train/ train_statistics.npz --devices 8
    rae eval fid samples/ --ref train_statistics.npz
    """
    arguments = (inception, dinov2, purpose, batch_size, devices, nnodes, node_rank, rdzv, dry_run)
    write("statistics", images, output, *arguments)


def write(
    what: Literal["features", "statistics"],
    images: str,
    output: str,
    inception: str | None,
    dinov2: str | None,
    purpose: Literal["generation", "reconstruction"],
    batch_size: int,
    devices: int | None,
    nnodes: int,
    node_rank: int,
    rdzv: str | None,
    dry_run: bool,
) -> None:
    """Check what can be checked here, and start the stage."""
    from raecli.errors import InputError, UsageError
    from raecli.launch import LaunchOptions, start
    from raecli.metrics.inception_file import find_inception
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EvaluateRecipe

    if not Path(images).exists():
        raise InputError(f"{images}: no such file or folder")
    if not output.endswith(".npz"):
        raise UsageError(f"{output}: its name has to end in .npz")
    if not Path(output).absolute().parent.is_dir():
        raise UsageError(f"{output}: no such folder to write in; make it first")
    find_inception(inception)
    recipe = recipe_from_options(
        EvaluateRecipe,
        {
            "stage": "eval",
            "metrics": (),
            "write": what,
            "kind": purpose,
            "samples": images,
            "inception": inception,
            "dinov2": dinov2,
            "batch_size": batch_size,
            "output": output,
        },
    )
    start("eval", recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS), dry_run=dry_run)
