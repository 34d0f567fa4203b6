"""`rae doctor`."""

import json

import typer

from raecli.cli.options import JsonOpt, fact


def doctor(as_json: JsonOpt = False) -> None:
    """Look at this machine: PyTorch, GPUs, memory, disk, limits, optional packages, cached weights.

    Changes nothing and asks nothing of the network. What wants your attention is marked with `!`.

    Examples:

      rae doctor

      rae doctor --json > machine.json
    """
    from raecli.doctor import examine

    findings = list(examine())
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
        return
    width = 2 + max(len(finding.name) for finding in findings)
    for finding in findings:
        typer.echo(fact(f"{'!' if finding.remark else ' '} {finding.name}", finding.value, width))
        if finding.remark:
            typer.echo(fact("", f"-> {finding.remark}", width))
