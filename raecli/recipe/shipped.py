"""The recipes that come with rae: where they lie, and how a name finds one."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from raecli.errors import UsageError
from raecli.recipe.strict_yaml import MAX_BYTES, Document, parse_yaml, show

PACKAGE = Path(__file__).resolve().parents[1]
MAX_NAME = 64  # characters of a mistyped name that are compared
MAX_COMPARED = 1000  # files of a folder that are compared with it


class ShippedRecipe(NamedTuple):
    """A line of `rae recipes ls`."""

    name: str  # without its suffix: dith_xl, digits/decoder
    stage: str
    paper: str


def recipes_folder() -> Path | None:
    """The folder of shipped recipes: inside the wheel, or beside the package in a checkout."""
    for folder in (PACKAGE / "_recipes", PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    return None


def shipped_files() -> dict[str, Path]:
    """Name to file of every shipped recipe, the paper's before those in folders."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml")) if folder else []
    named = [(file.relative_to(folder).with_suffix("").as_posix(), file) for file in files if folder]
    return dict(sorted(named, key=lambda pair: ("/" in pair[0], pair[0])))


def find_shipped(name: str) -> Path:
    """The shipped recipe of this name; `recipes/dith_xl.yaml`, `dith_xl.yaml` and `dith_xl` are one."""
    short = _short_name(name)
    files = shipped_files()
    if short not in files:
        raise UsageError(f"no shipped recipe {show(name, 200)}; {_hint(short, files)}")
    return files[short]


def find_recipe(name: str) -> Path:
    """The file of a recipe: an existing file, else the shipped recipe of that name."""
    path, denied = Path(name), False
    try:
        if path.is_file():
            return path
        is_there, is_folder = os.path.lexists(path), path.is_dir()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL byte
        is_there, is_folder, denied = False, False, isinstance(error, PermissionError)
    files = shipped_files()
    short = _short_name(name)
    if short in files:
        return files[short]
    if denied:
        raise UsageError(f"recipe {show(name, 200)} cannot be read: no permission to look into its folder")
    if is_there:
        what = "a folder; give a file in it" if is_folder else "no regular file"
        raise UsageError(f"recipe {show(name, 200)} is {what}")
    hint = _hint(short, files, _beside(path))
    raise UsageError(f"no recipe {show(name, 200)}: neither a file nor a shipped recipe; {hint}")


def _short_name(name: str) -> str:
    short = name.strip().removeprefix("./").removeprefix("recipes/")
    return short.removesuffix(".yaml").removesuffix(".yml")


def _beside(path: Path) -> list[Path]:
    """The YAML files of a folder that a mistyped path names."""
    try:
        return [file for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")][:MAX_COMPARED]
    except (OSError, ValueError):
        return []


def _hint(name: str, files: Iterable[str], beside: Iterable[Path] = ()) -> str:
    """The nearest names, shipped or in the folder named; else where to look."""
    names = {known.rpartition("/")[2]: known for known in files}
    names |= {known: known for known in names.values()} | {file.stem: str(file) for file in beside}
    for written in (name, name.rpartition("/")[2]):
        if near := difflib.get_close_matches(written[-MAX_NAME:], names, n=3, cutoff=0.6):
            meant = dict.fromkeys(show(names[found], 200) for found in near)
            return f"did you mean {' or '.join(meant)}?"
    return "`rae recipes ls` lists the shipped ones"


def read_recipe(path: Path) -> Document:
    """A recipe file's values, lines and problems. UsageError only where the file cannot be read at all."""
    try:
        with path.open("rb") as file:
            return parse_yaml(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise UsageError(f"recipe {show(str(path), 200)} cannot be read: {error.strerror}") from None


def list_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe with its stage and the row of the paper it reproduces."""
    rows = []
    for name, path in shipped_files().items():
        values = read_recipe(path).values or {}
        rows.append(ShippedRecipe(name, str(values.get("stage", "")), str(values.get("paper", ""))))
    return rows


def read_text(path: Path) -> str:
    """A recipe file's own text, comments included. UsageError where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"recipe {show(str(path), 200)} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"recipe {show(str(path), 200)} cannot be read: {error.strerror}") from None
