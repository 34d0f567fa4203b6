"""`rae verify`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raecli.cli.options import DevicesOpt, DryOpt, JsonOpt, TimeoutOpt

if TYPE_CHECKING:
    from raecli.recipe.recipes import EncodeCacheRecipe
    from raecli.store.manifest import Manifest

EPILOG = """Examples:\n
  rae verify latents/\n
  rae verify latents/ --fast\n
  rae verify latents/ --repair --source imagenet/train --dry-run\n
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
    dry_run: DryOpt = False,
    json_out: JsonOpt = False,
) -> None:
    """Hold a latent cache against its manifest: counts, bytes, digests, index and statistics."""
    import json

    from raecli.errors import UsageError, counted
    from raecli.launch import LaunchOptions, check_options, plan_of, start
    from raecli.store.latent_cache import cache_problems, damaged
    from raecli.store.manifest import read_manifest

    if repair and source is None:
        raise UsageError("--repair needs --source, the images that the cache was made of")
    if dry_run and not repair:
        raise UsageError("--dry-run tells what --repair would do; without it verify changes nothing anyway")
    launch = LaunchOptions(devices, 1, 0, None, timeout)
    check_options(launch)
    manifest = read_manifest(latents)
    problems = cache_problems(latents, manifest, fast=fast)
    told = {"cache": str(latents), "shards": len(manifest.shards), "problems": dict(problems)}
    if problems and not repair:
        if json_out:
            print(json.dumps(told))
        raise damaged(latents, [f"{name}: {problem}" for name, problem in problems])
    if problems:
        recipe, plan = repair_of(latents, manifest, str(source), problems, offline=dry_run)
        if dry_run:
            plan += plan_of("encode-cache", recipe, launch)
            show_plan(recipe, plan, told if json_out else None)
            return
        for line in plan:
            typer.echo(line, err=True)
        with stdout_to_stderr():  # stdout has one result, which is ours
            start("encode-cache", recipe, launch)
    if json_out:
        print(json.dumps(told | ({"plan": ["nothing to repair"]} if dry_run else {})))
    else:
        how = "sizes and headers" if fast else "every byte"
        samples, shards = counted(manifest.samples, "sample"), counted(len(manifest.shards), "shard")
        print(f"{latents}: {samples} in {shards}; {how} as written")


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


def repair_of(
    latents: Path, manifest: "Manifest", source: str, problems: list[tuple[str, str]], *, offline: bool
) -> tuple["EncodeCacheRecipe", list[str]]:
    """encode-cache with the manifest's own settings, which makes what is bad and checks the digests; a line on each.

    Refuses other images than the cache was made of, another encoder, a folder that is read-only. offline: weights that
    would be downloaded are told.
    """
    from raecli.data.encoding_job import belongs_to, make_job
    from raecli.models.load import located
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EncodeCacheRecipe
    from raecli.store.encoder_weights import WeightsAbsent
    from raecli.store.room import check_output

    encoder, lines = manifest.encoder, [f"{name}: {problem}; made anew" for name, problem in problems]
    if {name for name, _ in problems} & {record.name for record in manifest.shards}:  # tables alone need no encoder
        try:
            encoder = located(encoder, manifest.image_size, offline=offline)
        except WeightsAbsent as absent:
            if not offline:
                raise
            lines.append(f"missing: {absent}")
    same = ("image_size", "views", "dtype", "precision", "samples_per_shard", "seed")
    options = {name: getattr(manifest, name) for name in same} | {
        "stage": "encode-cache",
        "encoder": encoder.model_dump(),
        "source": source,
        "output": str(latents),
        "on_bad_image": "skip" if manifest.skipped else "fail",
    }
    if manifest.batch_size is not None:
        options["batch_size"] = manifest.batch_size
    recipe = recipe_from_options(EncodeCacheRecipe, options)
    belongs_to(make_job(recipe))
    check_output(latents)
    return recipe, lines


def show_plan(recipe: "EncodeCacheRecipe", plan: list[str], told: dict[str, Any] | None) -> None:
    """The recipe of a repair and its plan. told: the result beside which they go, as JSON."""
    import json

    from raecli.launch import tell_plan
    from raecli.recipe.load import dump_recipe

    if told is not None:
        print(json.dumps(told | {"recipe": recipe.to_dict(), "plan": plan}))
        return
    print(dump_recipe(recipe), end="")
    tell_plan(plan)


verify.__doc__ = f"{verify.__doc__}\n\n{EPILOG}"
