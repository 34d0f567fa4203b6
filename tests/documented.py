"""What README, docs/ and the help texts tell a reader to type, found in their blocks and held against the parser."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from raecli.cli.app import command_line
from tests.conftest import REPOSITORY

SYNOPSIS = ("MissingParameter", "BadParameter", "BadOptionUsage")  # what a line of running text may leave out
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each block of a page: fenced, or indented by four blanks after an empty line."""
    language, block, before = None, [], ""
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("```"):
            if language is not None:
                yield language, "\n".join(block)
            language, block = (line[3:].strip() if language is None else None), []
        elif language is not None:
            block.append(line)
        elif line.startswith("    ") and (block or not before.strip()):
            block.append(line[4:])
        elif block:
            yield "", "\n".join(block)
            block = []
        before = line


def commands_of(page: Path) -> list[list[str]]:
    """The words of every line that begins with `rae` in a block, comments off, continued lines joined."""
    lines = [
        line
        for language, text in blocks_of(page)
        if language != "python"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines if line.startswith("rae ")]


def snippets_of(page: Path) -> list[str]:
    """The blocks of Python of a page."""
    return [text for language, text in blocks_of(page) if language == "python"]


def spans_of(page: Path) -> list[list[str]]:
    """The words of every `rae VERB ...` in running text and tables; `...` and brackets of a synopsis are left out."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    found = [" ".join(span.split()) for span in re.findall(r"`(rae [a-z][^`]*)`", text)]
    return [[word for word in shlex.split(span)[1:] if word[0] not in ".[|"] for span in found]


def verbs() -> dict[str, Any]:
    """Every command by its words: `sample`, `eval fid`."""
    found = {}
    for name, command in get_command(command_line()).commands.items():
        if hasattr(command, "commands"):
            found |= {f"{name} {inner}": one for inner, one in command.commands.items()}
        else:
            found[name] = command
    return found


def examples_of(command: Any) -> list[list[str]]:
    """The examples in a command's help; what stands behind two blanks explains them."""
    lines = [line.strip() for line in inspect.cleandoc(command.help or "").splitlines()]
    return [shlex.split(re.split(r"\s{2,}| > ", line)[0])[1:] for line in lines if line.startswith("rae ")]


def parsed(words: list[str], *, whole: bool = True) -> tuple[Any, dict[str, Any]]:
    """The command that words mean, and its parameters. Raises click's UsageError for what the parser refuses.

    whole=False: values may be missing or a choice be written a|b, as in running text.
    """
    command: Any = get_command(command_line())
    words = list(words)
    context = None
    while hasattr(command, "commands") and words:
        name = words.pop(0)
        if name not in command.commands:
            raise LookupError(f"no verb {name!r} in {command.name}")
        context = typer.Context(command, info_name=command.name, parent=context)
        command = command.commands[name]
    if hasattr(command, "commands"):
        return command, {}
    try:
        return command, command.make_context(command.name, words, parent=context).params
    except Exception as error:
        if whole or type(error).__name__ not in SYNOPSIS:  # options are looked up before all of these
            raise
        return command, {}
