"""`rae encode-cache`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt, TimeoutOpt

EPILOG = """Examples:\n
  rae encode-cache --encoder dinov2-b imagenet/train latents/imagenet256\n
  rae encode-cache --encoder dinov2-b --views center+flip shards/ latents/\n
  rae encode-cache --encoder ./my-hf-folder --image-size 512 photos/ out/\n
  rae encode-cache --encoder sdvae:sd-vae-ft-mse imagenet/train latents/sd\n
Started again, it makes only what is missing."""


def encode_cache(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Class folders, a flat folder, or tars of images.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the latent cache.")],
    encoder: Annotated[
        str, typer.Option("--encoder", help="dinov2-b, siglip2-b, ..., timm:NAME, a folder, pixels, or sdvae:FOLDER.")
    ],
    weights: Annotated[str | None, typer.Option("--weights", help="The encoder's safetensors, if not cached.")] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Pixels a side [default: 256, digits 32].", min=1)
    ] = None,
    input_size: Annotated[int | None, typer.Option("--input-size", help="Pixels a side the encoder sees.")] = None,
    layers: Annotated[str, typer.Option(help="last; or sum:K, the sum of the last K blocks.")] = "last",
    views: Annotated[Literal["center", "center+flip"], typer.Option(help="What is stored of an image.")] = "center",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "int8"],
        typer.Option(help="Of the latents on disk; int8 has a scale a channel of each image."),
    ] = "bf16",
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of the encoder [default: bf16 on a GPU, fp32 on a CPU].")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Images a forward on one rank.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the samples' order in the cache.")] = 0,
    on_bad_image: Annotated[
        Literal["fail", "skip"], typer.Option(help="What to do with an unreadable image.")
    ] = "fail",
    join: Annotated[
        bool, typer.Option("--join", help="Share the work with other jobs of this very command, on any machine.")
    ] = False,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    timeout: TimeoutOpt = 3600.0,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Encode images with a frozen encoder into a latent cache."""
    from raecli.errors import InputError
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EncodeCacheRecipe
    from raecli.store.encoders import EMBEDDED, resolve_encoder

    if not Path(source).exists():
        raise InputError(f"{source}: no such folder of images (class folders, a flat folder, or WebDataset tars)")
    size = image_size if image_size is not None else (32 if encoder == EMBEDDED else 256)
    spec = resolve_encoder(encoder, image_size=size, weights=weights, input_size=input_size, layers=layers)
    recipe = recipe_from_options(
        EncodeCacheRecipe,
        {
            "stage": "encode-cache",
            "encoder": spec.model_dump(),
            "source": source,
            "output": output,
            "image_size": size,
            "views": views,
            "dtype": dtype,
            "precision": precision or ("bf16" if Path("/dev/nvidia0").exists() else "fp32"),
            "samples_per_shard": samples_per_shard,
            "batch_size": batch_size,
            "seed": seed,
            "on_bad_image": on_bad_image,
            "join": join,
        },
    )
    start(
        "encode-cache",
        recipe,
        LaunchOptions(devices, nnodes, node_rank, rdzv, timeout),
        dry_run=dry_run,
        as_json=as_json,
    )


encode_cache.__doc__ = f"{encode_cache.__doc__}\n\n{EPILOG}"
