"""`rae recipes`: list, show, copy and check recipes. Touches no device and starts nothing."""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from raecli.cli.options import CONTEXT, JsonOpt, list_whole_sentences

app = typer.Typer(
    name="recipes",
    help="List, show, copy and check recipes.\n\n"
    "Examples:\n\n  rae recipes ls\n\n  rae recipes cp dith_s mine.yaml\n\n"
    "  rae recipes validate mine.yaml cache=latents/mine",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe: dith_xl, digits/decoder.")]


@app.command("ls")
def list_shipped(as_json: JsonOpt = False) -> None:
    """List the shipped recipes: name, stage, row of the paper.

    Examples:

      rae recipes ls

      rae recipes ls --json
    """
    from raecli.recipe.shipped import list_recipes

    rows = list_recipes()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    name_width = max((len(row.name) for row in rows), default=0)
    stage_width = max((len(row.stage) for row in rows), default=0)
    wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # a line each where a program reads
    for row in rows:
        line = f"{row.name:<{name_width}}  {row.stage:<{stage_width}}  {row.paper}"
        typer.echo(textwrap.fill(line, max(wide, 80), subsequent_indent=" " * (name_width + stage_width + 4)))


@app.command("show")
def show(name: NameArgument, as_json: JsonOpt = False) -> None:
    """Print a recipe as it is written, comments included; with --json its values.

    Examples:

      rae recipes show dith_xl

      rae recipes show dith_xl --json
    """
    from raecli.recipe.shipped import find_shipped, read_recipe, read_text

    file = find_shipped(name)
    if as_json:
        typer.echo(json.dumps({"file": str(file), "recipe": read_recipe(file).values}, indent=2))
    else:
        typer.echo(read_text(file), nl=False)


@app.command("cp")
def copy(
    name: NameArgument,
    destination: Annotated[
        str, typer.Argument(metavar="[DEST]", help="A file or a folder [default: here].", show_default=False)
    ] = ".",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Copy a shipped recipe here, or to DEST, to edit it.

    Examples:

      rae recipes cp dith_s

      rae recipes cp digits/diffusion mine.yaml
    """
    from raecli.errors import UsageError
    from raecli.recipe.shipped import find_shipped, read_text
    from raecli.store.atomic import write_text

    source = find_shipped(name)
    target = Path(destination)
    if target.is_dir():
        target = target / source.name
    elif destination.endswith("/") or not target.parent.is_dir():
        raise UsageError(f"no folder to copy to: {destination}; make it first")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; give another name, or --force to overwrite it")
    write_text(target, read_text(source))
    typer.echo(json.dumps({"file": str(source), "output": str(target)}, indent=2) if as_json else target)


@app.command("validate")
def validate(
    paths_and_overrides: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Files or shipped names; overrides.")
    ],
    as_json: JsonOpt = False,
) -> None:
    """Check recipes and tell all that is wrong with them.

    The KEY=VALUE overrides hold for every one.

    Examples:

      rae recipes validate mine.yaml

      rae recipes validate dith_s dith_xl batch_size=256
    """
    from raecli.errors import UsageError
    from raecli.recipe.load import load_recipe

    overrides = [word for word in paths_and_overrides if is_override(word)]
    paths = [word for word in paths_and_overrides if not is_override(word)]
    if not paths:
        raise UsageError("no recipe to check: give a file or the name of a shipped recipe before key=value")
    complaints, good = [], {}
    for path in paths:
        try:
            spec = load_recipe(None, path, overrides)
        except UsageError as error:
            complaints.append(str(error))
        else:
            good[path] = spec.to_dict()["stage"]
            if not as_json:
                typer.echo(f"{path}: ok, {good[path]}")
    if as_json:
        typer.echo(json.dumps({"ok": good, "problems": complaints}, indent=2))
    if complaints:
        raise UsageError("\n".join(complaints))


def is_override(word: str) -> bool:
    """key=value, unless a file of that very name is there."""
    return "=" in word and not Path(word).exists()


list_whole_sentences(app)
