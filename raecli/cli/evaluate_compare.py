"""`rae eval compare`: two reports beside each other."""

from typing import Annotated

import typer

from raecli.cli.options import JsonOpt


def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="A report of rae eval, by --out or --json.")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="Another.")],
    as_json: JsonOpt = False,
) -> None:
    """Show what differs between two reports: their protocols first, then their figures. Ends with 0 either way.

    Examples:

    \b
      rae eval compare monday.json tuesday.json
    """
    import json

    from raecli.evaluation.compare import comparison, comparison_table, read_report

    found = comparison(read_report(first), read_report(second))
    typer.echo(json.dumps(found, indent=2) if as_json else comparison_table(found, first, second))
