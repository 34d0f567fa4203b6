"""`rae eval features` and `rae eval statistics`: pay for extraction once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt

COLLECTIVE_SECONDS = 3600.0  # ranks meet once at the end; slices are equal, disks may not be

ImagesArg = Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of PNG or JPEG images, .npz, .npy, or tars.")]
OutArg = Annotated[str, typer.Argument(metavar="OUT.npz", help="The file to write.")]
InceptionOpt = Annotated[
    str | None,
    typer.Option(
        "--inception", metavar="FILE", help="Inception's weights [default: $RAE_INCEPTION, torch hub's cache]."
    ),
]
Dinov2Opt = Annotated[
    str | None, typer.Option("--dinov2", metavar="FILE", help="ViT-L/14's weights: write what fdd needs too.")
]
PurposeOpt = Annotated[
    Literal["generation", "reconstruction"],
    typer.Option("--for", help="What the file is a reference for; eval refuses the other kind of samples."),
]
BatchSizeOpt = Annotated[int, typer.Option("--batch-size", help="Images a forward on one rank.", min=1)]


HELP: dict[Literal["features", "statistics"], str] = {
    "features": """Write Inception's features of every image: pool [N, 2048], spatial [N, 2023], logits [N, 1008].

    float32, 20 kB an image. The file stands for the images in every metric but accuracy.

    Examples:

    \b
      rae eval features samples/ sample_features.npz
      rae eval all sample_features.npz --ref adm_ref.npz
    """,
    "statistics": """Write mean and covariance of Inception's features, with ADM's names: mu, sigma, mu_s, sigma_s.

    A reference for fid and sfid; precision, recall and kid need images or features.

    Examples:

    \b
      rae eval statistics imagenet/train/ train_statistics.npz --devices 8
      rae eval fid samples/ --ref train_statistics.npz
    """,
}


def writing(what: Literal["features", "statistics"]) -> Callable[..., None]:
    """The command that writes one or the other: both have one signature."""

    def command(
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
        as_json: JsonOpt = False,
    ) -> None:
        from raecli.launch import LaunchOptions, start
        from raecli.metrics.inception_file import find_inception
        from raecli.recipe.load import recipe_from_options
        from raecli.recipe.recipes import EvaluateRecipe

        check_paths(images, output)
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
        options = LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS)
        start("eval", recipe, options, dry_run=dry_run, as_json=as_json)

    return command


def check_paths(images: str, output: str) -> None:
    """Refuse images that are not there, and a file that cannot be written."""
    from raecli.errors import InputError, UsageError

    if not Path(images).exists():
        raise InputError(f"{images}: no such file or folder")
    if not output.endswith(".npz"):
        raise UsageError(f"{output}: its name has to end in .npz")
    if not Path(output).absolute().parent.is_dir():
        raise UsageError(f"{output}: no such folder to write in; make it first")
