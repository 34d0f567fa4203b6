"""`rae fetch`: published artefacts from the Hugging Face hub, converted on arrival."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import JsonOpt


def fetch(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A short name of --list.")] = None,
    output: Annotated[str | None, typer.Argument(metavar="[OUT]", help="Where to [default: artifacts/NAME].")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List what is published, and leave.")] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Of a decoder or DiT: another encoder than the published one's name.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="The encoder's safetensors, if not cached.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies at OUT.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Download a published artefact and convert it.

    Files come from the Hugging Face cache where they are there, are resumed where they were cut, and are held against
    the hub's digest. HF_HUB_OFFLINE=1 uses the cache alone.

    Examples:

      rae fetch --list

      rae fetch rae-dinov2-b

      rae fetch dith-xl-256 models/dith --encoder artifacts/rae-dinov2-b
    """
    from raecli.errors import UsageError
    from raecli.store.published import PUBLISHED, download, find_published

    if listed:
        if as_json:
            typer.echo(json.dumps({key: asdict(entry) for key, entry in PUBLISHED.items()}, indent=2))
            return
        for key, entry in PUBLISHED.items():
            typer.echo(f"{key:<23} {entry.kind:<13} {entry.about}")
        return
    if name is None:
        raise UsageError("a name is missing; rae fetch --list tells what is published")
    entry = find_published(name)
    suffix = ".safetensors" if entry.kind in ("statistics", "discriminator") else ""
    target = Path(output or f"artifacts/{name}{suffix}")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; give another OUT, or --force to replace it")
    files = download(name, entry, str(target))

    from raecli.cli.convert import show
    from raecli.convert.settings import Request, parse_settings

    request = Request(
        source=files[0].parent if entry.kind == "autoencoder" else files[0],
        output=target,
        kind=entry.kind,
        settings=parse_settings(entry.settings),
        encoder=encoder or entry.encoder,
        encoder_weights=weights,
        repository=entry.repository,
        statistics=str(files[1]) if entry.kind == "decoder" else None,
        force=force,
    )
    from raecli.convert.conversion import convert

    show(convert(request), as_json)
