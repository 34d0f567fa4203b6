"""`rae reconstruct`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt, TimeoutOpt


def reconstruct(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Class folders, a flat folder, or tars of images.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the reconstructions.")],
    autoencoder: Annotated[
        str, typer.Option("--autoencoder", "-a", help="A decoder run, its final/, a checkpoint; pixels; sdvae:FOLDER.")
    ],
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side, for pixels and sdvae:FOLDER [default: 256].", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once on a rank.", min=1)] = 64,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of matrix products.")] = "fp32",
    pixel_rounding: Annotated[Literal["round", "floor"], typer.Option(help="floor: as the release.")] = "round",
    save_originals: Annotated[
        bool, typer.Option("--save-originals", help="Write the images' crops too, into OUT/originals.")
    ] = False,
    sheet: Annotated[int, typer.Option(help="Pairs on sheet.png, image left of its copy; 0: no sheet.", min=0)] = 32,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 3600.0,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Encode images and decode them again, without noise. Started again, it makes only what is missing.

    Images are cropped as encode-cache crops them; names and class folders are kept in OUT/reconstructions.

    Examples:

      rae reconstruct imagenet/val recon/ --autoencoder runs/decoder --devices 8

      rae reconstruct imagenet/val recon/ --autoencoder sdvae:sd-vae-ft-mse

      rae eval reconstruction imagenet/val recon/
    """
    from raecli.errors import InputError
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import ReconstructRecipe

    if not Path(images).exists():
        raise InputError(f"{images}: no such folder of images (class folders, a flat folder, or WebDataset tars)")
    recipe = recipe_from_options(
        ReconstructRecipe,
        {
            "stage": "reconstruct",
            "source": images,
            "output": output,
            "autoencoder": autoencoder,
            "image_size": image_size,
            "batch_size": batch_size,
            "precision": precision,
            "pixel_rounding": pixel_rounding,
            "save_originals": save_originals,
            "sheet": sheet,
        },
    )
    start(
        "reconstruct",
        recipe,
        LaunchOptions(devices, nnodes, node_rank, rdzv, timeout),
        dry_run=dry_run,
        as_json=as_json,
    )
