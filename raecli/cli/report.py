"""`rae report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import JsonOpt


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="HTML file [default: RUN/report.html, or ./report.html].")
    ] = None,
    samples: Annotated[
        list[str] | None, typer.Option("--samples", help="A folder of rae sample or rae reconstruct; may be repeated.")
    ] = None,
    evaluations: Annotated[
        list[str] | None, typer.Option("--eval", help="A report.json of rae eval; may be repeated.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write one HTML file about a run, or several: recipe, curves, samples over time, figures, checkpoints.

    It needs no other file and no network. Needs matplotlib: pip install 'raecli[plots]'.

    Examples:

      rae report runs/dith_xl

      rae report runs/dith_s runs/dith_xl --out both.html

      rae report runs/dith_xl --samples samples/ --eval report.json
    """
    from raecli.errors import UsageError
    from raecli.report import write_report

    path = Path(out) if out else (Path(runs[0]) if len(runs) == 1 else Path()) / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {path}: ends with .html")
    write_report(runs, path, samples or (), evaluations or ())
    size = path.stat().st_size
    told = json.dumps({"output": str(path), "bytes": size, "runs": runs}, indent=2)
    typer.echo(told if as_json else f"{path}: {size / 1e6:.2f} MB")
