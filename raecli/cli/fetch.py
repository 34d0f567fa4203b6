"""`rae fetch`: published artefacts from the Hugging Face hub, converted on arrival."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raecli.cli.options import DryOpt, JsonOpt

if TYPE_CHECKING:
    from raecli.convert.settings import Request
    from raecli.store.published import Published


def fetch(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A short name of --list.")] = None,
    output: Annotated[str | None, typer.Argument(metavar="[OUT]", help="Where to [default: artifacts/NAME].")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List what is published, and leave.")] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Of a decoder or DiT: another encoder than the published one's name.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="The encoder's safetensors, if not cached.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies at OUT.")] = False,
    dry_run: DryOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Download a published artefact and convert it.

    Files come from the Hugging Face cache where they are there, are resumed where they were cut, and are held against
    the hub's digest. HF_HUB_OFFLINE=1 uses the cache alone.

    Examples:

      rae fetch --list

      rae fetch rae-dinov2-b --dry-run

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
    options = {"encoder": encoder or entry.encoder, "encoder_weights": weights, "force": force}
    if dry_run:
        show_plan(name, entry, target, options, as_json)
        return
    from raecli.cli.convert import show
    from raecli.convert.conversion import convert

    files = download(name, entry, str(target))
    show(convert(request_for(entry, files, target, options)), as_json)


def request_for(entry: "Published", files: list[Path], target: Path, options: dict[str, Any]) -> "Request":
    """What is asked of `rae convert` for the files of an entry."""
    from raecli.convert.settings import Request, parse_settings

    return Request(
        source=files[0].parent if entry.kind == "autoencoder" else files[0],
        output=target,
        kind=entry.kind,
        settings=parse_settings(entry.settings),
        repository=entry.repository,
        statistics=str(files[1]) if entry.kind == "decoder" else None,
        **options,
    )


def show_plan(name: str, entry: "Published", target: Path, options: dict[str, Any], as_json: bool) -> None:
    """What would be downloaded; and where all is here already, what would be made of it."""
    from raecli.cli import convert
    from raecli.launch import how_to_run
    from raecli.store.published import download_plan
    from raecli.store.room import check_writable

    check_writable(target.parent, target)
    files, plan = download_plan(name, entry, str(target))
    if len(files) == len(entry.files):
        convert.show_plan(request_for(entry, files, target, options | {"dry_run": True}), as_json, plan)
        return
    plan += [f"{target} would be written out of {'them' if len(entry.files) > 1 else 'it'}", how_to_run()]
    convert.show({"output": str(target), "kind": entry.kind, "notes": []}, as_json, plan)
