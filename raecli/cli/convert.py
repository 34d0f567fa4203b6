"""`rae convert`: others' weights into our artifacts and back, in the door's own process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raecli.cli.options import DryOpt, JsonOpt

if TYPE_CHECKING:
    from raecli.convert.settings import Request

Kind = Literal["decoder", "autoencoder", "diffusion", "statistics", "discriminator"]


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .pt file, a diffusers folder, or an artifact.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new folder, or a file.")],
    kind: Annotated[Kind | None, typer.Option(help="What SRC is [default: told by its keys].")] = None,
    to: Annotated[Literal["rae", "official", "diffusers"], typer.Option(help="The layout that is written.")] = "rae",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="heads=4, image_size=512 ...")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="dinov2-b, timm:NAME, a Hugging Face folder, or an autoencoder artifact.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="The encoder's safetensors, if not cached.")] = None,
    statistics: Annotated[
        str | None, typer.Option(help="A decoder's stat.pt, a folder with statistics, or none.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies at OUT.")] = False,
    dry_run: DryOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Convert released or diffusers weights into an artifact, and back.

    Sizes are inferred from the tensors' shapes. A decoder needs --encoder and --statistics; with --kind autoencoder its
    encoder's weights are kept inside the artifact. --to official writes a flat .pt (of an artifact's statistics with
    --kind statistics), --to diffusers a folder for AutoencoderRAE.from_pretrained. Nothing in SRC is ever run.

    Keys of --set: heads, head_heads, head_depth, mlp_ratio, image_size, input_size, time_shift_dim, time_max,
    transformers.

    Examples:

      rae convert stage2_model.pt artifacts/dith-xl --encoder dinov2-b

      rae convert model.pt decoder/ --encoder dinov2-b --statistics stat.pt

      rae convert RAE-dinov2-wReg-base-ViTXL-n08/ artifacts/rae

      rae convert runs/decoder exported/ --to diffusers

      rae convert runs/decoder whole/ --kind autoencoder

      rae convert runs/dith_xl stage2_model.pt --to official

      rae convert model.pt dith/ --encoder dinov2-b --dry-run
    """
    from raecli.convert.settings import Request, parse_settings
    from raecli.errors import UsageError

    settings = parse_settings(set_ or [])
    if not Path(source).exists():
        raise UsageError(f"{source}: no such file or folder; rae fetch --list tells what can be downloaded")
    if Path(output).exists() and not force:
        raise UsageError(f"{output} is there already; give another name, or --force to replace it")
    request = Request(
        source=Path(source),
        output=Path(output),
        kind=kind,
        to=to,
        settings=settings,
        encoder=encoder,
        encoder_weights=weights,
        statistics=statistics,
        force=force,
        dry_run=dry_run,
    )
    if dry_run:
        show_plan(request, as_json)
        return
    from raecli.convert.conversion import convert as run

    show(run(request), as_json)


def show_plan(request: "Request", as_json: bool, before: Sequence[str] = ()) -> None:
    """What a conversion would make, and whether all that it needs is here. Of what is missing its checks are left."""
    from raecli.convert.conversion import convert as run
    from raecli.launch import how_to_run
    from raecli.store.encoder_weights import WeightsAbsent

    replaced = ", in place of what lies there" if request.output.exists() else ""
    plan = [*before, f"{request.output} would be written{replaced}"]
    try:
        report = run(request)
    except WeightsAbsent as absent:
        report = {"output": str(request.output), "kind": request.kind, "notes": []}
        plan.append(f"missing: {absent}; what depends on them is not checked")
    show(report, as_json, [*plan, how_to_run()])


def show(report: dict[str, Any], as_json: bool, plan: Sequence[str] = ()) -> None:
    """Print what was inferred and made, or would be; notes and a plan go to stderr unless they are in the JSON."""
    from raecli.launch import tell_plan

    if as_json:
        typer.echo(json.dumps(report | ({"plan": plan} if plan else {}), indent=2))
        return
    tell_plan(plan)
    for note in report["notes"]:
        typer.echo(f"note: {note}", err=True)
    kind = report["kind"] or "of a kind yet to be told"
    typer.echo(f"{report['output']}: {kind}{', ' + report['to'] if 'to' in report else ''}")
    for key, value in report.items():
        if key in ("output", "kind", "to", "notes") or value in (None, {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
        elif isinstance(value, list):
            value = " x ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        typer.echo(f"  {key.replace('_', ' ')}: {value}")
