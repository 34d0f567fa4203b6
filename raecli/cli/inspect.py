"""`rae inspect`."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import JsonOpt, fact

FastOpt = Annotated[bool, typer.Option("--fast", help="Look at sizes alone, compute no digests.")]


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A cache, run, model, samples, a folder of these, a file.")
    ],
    fast: FastOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Tell what lies at PATH, what made it, and whether it is whole.

    Ends with 0 if it is whole, with 3 (data) or 4 (models) and a list of what is missing or changed if it is not.

    Examples:

      rae inspect latents/

      rae inspect runs/dith_xl --fast

      rae inspect samples/ --json
    """
    from raecli.inspection import error_of
    from raecli.inspection import inspect as look

    finding = look(Path(path), fast=fast)
    if as_json:
        told = {"kind": finding.kind, **finding.facts, "whole": finding.is_whole, "problems": finding.problems}
        typer.echo(json.dumps(told, indent=2, default=str))
    else:
        rows = finding.facts.get("holds") or {name.replace("_", " "): value for name, value in finding.facts.items()}
        width = 2 + max(map(len, rows), default=0)
        typer.echo(f"{path}: {finding.kind}, {'whole' if finding.is_whole else 'NOT whole'}")
        for name, value in rows.items():
            typer.echo(fact(f"  {name}", shown(value), width))
    if not finding.is_whole:
        raise error_of(path, finding)


def shown(value: object) -> str:
    """A value for a reader: a block in one line, of a digest its beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {shown(inner)}" for key, inner in value.items())
    return str(value)[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else str(value)
