"""`rae verify`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import DevicesOpt, JsonOpt, TimeoutOpt

EPILOG = """Examples:\n
  rae verify latents/\n
  rae verify latents/ --fast\n
  rae verify latents/ --repair --source imagenet/train\n
Ends with 0 if all is well, else with 3, every bad file named."""


def verify(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="A latent cache.")],
    fast: Annotated[bool, typer.Option("--fast", help="Sizes and headers of shards only, not every byte.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode bad shards anew; they come out as they were.")
    ] = False,
    source: Annotated[str | None, typer.Option("--source", help="The images that the cache was made of.")] = None,
    devices: DevicesOpt = None,
    timeout: TimeoutOpt = 3600.0,
    json_out: JsonOpt = False,
) -> None:
    """Hold a latent cache against its manifest: counts, bytes, digests, index and statistics."""
    import json

    from raecli.errors import UsageError
    from raecli.store.latent_cache import cache_problems, damaged
    from raecli.store.manifest import read_manifest

    if repair and source is None:
        raise UsageError("--repair needs --source, the images that the cache was made of")
    manifest = read_manifest(latents)
    problems = cache_problems(latents, manifest, fast=fast)
    if problems and repair:
        for name, problem in problems:
            typer.echo(f"{name}: {problem}; made anew", err=True)
        with stdout_to_stderr():  # stdout has one result, which is ours
            encode_again(latents, source or "", devices, timeout)
    if json_out:
        print(json.dumps({"cache": str(latents), "shards": len(manifest.shards), "problems": dict(problems)}))
    if problems and not repair:
        raise damaged(latents, [f"{name}: {problem}" for name, problem in problems])
    if not json_out:
        how = "sizes and headers" if fast else "every byte"
        print(f"{latents}: {manifest.samples} samples in {len(manifest.shards)} shards; {how} as written")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What this process and those that it starts write to stdout goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def encode_again(latents: Path, source: str, devices: int | None, timeout: float) -> None:
    """Start encode-cache with the manifest's own settings: it makes what is missing or bad, and checks the digests."""
    from raecli.launch import LaunchOptions, start
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EncodeCacheRecipe
    from raecli.store.manifest import read_manifest

    manifest = read_manifest(latents)
    same = ("image_size", "views", "dtype", "precision", "samples_per_shard", "seed")
    options = {name: getattr(manifest, name) for name in same} | {
        "stage": "encode-cache",
        "encoder": manifest.encoder.model_dump(),
        "source": source,
        "output": str(latents),
        "on_bad_image": "skip" if manifest.skipped else "fail",
    }
    if manifest.batch_size is not None:
        options["batch_size"] = manifest.batch_size
    recipe = recipe_from_options(EncodeCacheRecipe, options)
    start("encode-cache", recipe, LaunchOptions(devices, 1, 0, None, timeout), dry_run=False)


verify.__doc__ = f"{verify.__doc__}\n\n{EPILOG}"
