"""What several verbs share: options, and how their help and their facts are laid out."""

import inspect
import re
import shutil
import textwrap
from typing import Annotated, Any

import typer
import typer.core

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def fact(name: str, value: object, width: int) -> str:
    """A name, padded to `width`, and its value, wrapped where the terminal ends; in a file, at 80 columns."""
    columns = max(60, min(shutil.get_terminal_size().columns, CONTEXT["max_content_width"]))
    first, rest = f"{name:<{width}}  ", " " * (width + 2)
    return (
        textwrap.fill(
            str(value),
            columns,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        or first.rstrip()
    )


class Verb(typer.core.TyperCommand):
    """A command that answers an unknown option with key=value, where it takes a recipe's keys so."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever; typer's own click, which raises NoSuchOption, is private."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            takes_keys = any(parameter.name == "overrides" for parameter in self.params)
            if takes_keys and hasattr(error, "option_name") and not getattr(error, "possibilities", True):
                key = error.option_name.lstrip("-").replace("-", "_")
                error.message += f" (a recipe's value is changed as {key}=VALUE)"  # type: ignore[attr-defined]
            raise


def list_whole_sentences(app: typer.Typer) -> None:
    """Have an app's list of commands show the first sentence of each whole; click cuts what is longer than a line."""
    for command in app.registered_commands:
        text = inspect.cleandoc(command.help or inspect.getdoc(command.callback) or "")
        paragraph = " ".join(text.partition("\n\n")[0].split())
        command.short_help = re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


DevicesOpt = Annotated[
    int | None, typer.Option("--devices", help="Processes on this machine [default: every GPU, or 1 on a CPU].")
]
NnodesOpt = Annotated[int, typer.Option("--nnodes", help="Machines in the job.")]
NodeRankOpt = Annotated[int, typer.Option("--node-rank", help="Which of them this is, from 0.")]
RdzvOpt = Annotated[str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Address of machine 0.")]
TimeoutOpt = Annotated[float, typer.Option("--timeout", help="Seconds that a collective may wait for a rank.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Check everything, print recipe and plan, start nothing.")]
DryOpt = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
OverridesArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help='Recipe values to change: model.depth=12 "duration=20 steps"'),
]
