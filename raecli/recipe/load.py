"""Reads a recipe file into its typed spec, and writes one back. All that is wrong with a file is told at once."""

import difflib
import os
from collections.abc import Sequence
from typing import Any, TypeVar, overload

from pydantic import ValidationError

from raecli.errors import UsageError
from raecli.recipe.problems import Origin, dotted, explain, report
from raecli.recipe.recipes import RECIPES
from raecli.recipe.shipped import find_recipe, read_recipe
from raecli.recipe.spec import Spec
from raecli.recipe.strict_yaml import Document, KeyPath, Problem, Value, describe, parse_value, show, write_scalar

AnySpec = TypeVar("AnySpec", bound=Spec)
FilePath = str | os.PathLike[str]


@overload
def load_recipe(recipe_class: type[AnySpec], path: FilePath, overrides: Sequence[str] = ()) -> AnySpec: ...
@overload
def load_recipe(recipe_class: None, path: FilePath, overrides: Sequence[str] = ()) -> Spec: ...
def load_recipe(recipe_class: type[Spec] | None, path: FilePath, overrides: Sequence[str] = ()) -> Spec:
    """The recipe in a file, or the shipped one of that name, with `key.sub=value` overrides.

    `recipe_class` None: the file's `stage` decides. An override may set a key that the file lacks; of two for one key
    the later holds, as on any command line. UsageError with every problem, its line and the nearest known key.
    """
    file = find_recipe(os.fspath(path))
    document = read_recipe(file)
    problems = list(document.problems)
    spec = None
    if document.values is not None:
        written, bad_overrides = apply_overrides(document.values, overrides)
        spec, invalid = _validate(recipe_class, document, Origin(document.lines, written))
        problems += bad_overrides + invalid
    if spec is None or problems:
        raise report(show(str(file), 200), problems)
    return spec


def _validate(asked: type[Spec] | None, document: Document, origin: Origin) -> tuple[Spec | None, list[Problem]]:
    """The spec, or what the schema has against the values; nothing about values that were refused already."""
    values = document.values or {}
    chosen = choose_class(asked, values.get("stage"))
    if chosen is None:
        already = ("stage",) in document.refused
        return None, [] if already else [_stage_problem(asked, values, origin)]
    try:
        return chosen.model_validate(as_tuples(values)), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
        return None, explain([e for e in errors if not _is_within(e["loc"], document.refused)], chosen, origin)


def choose_class(asked: type[Spec] | None, stage: Value) -> type[Spec] | None:
    """The class to hold a recipe against. None: no stage is told, or it is another stage than was asked for."""
    named = RECIPES.get(stage) if isinstance(stage, str) else None
    if named is not None:
        return named if asked in (None, named) else None
    if asked is not None:
        return asked
    near = difflib.get_close_matches(str(stage)[:64], RECIPES, n=1, cutoff=0.7)
    return RECIPES[near[0]] if near else None


def _stage_problem(asked: type[Spec] | None, values: dict[str, Value], origin: Origin) -> Problem:
    """Why `stage` leads to no class."""
    if "stage" not in values:
        text = f"missing; it is one of {', '.join(RECIPES)}"
    elif asked is None:
        text = f"must be one of {', '.join(RECIPES)}, found {describe(values['stage'])}"
    else:
        wanted = next(name for name, kind in RECIPES.items() if kind is asked)
        text = f"this is a recipe for {values['stage']}; give one for {wanted}"
    return origin.locate(text, ("stage",))


def apply_overrides(values: dict[str, Value], overrides: Sequence[str]) -> tuple[dict[KeyPath, str], list[Problem]]:
    """Set each key.sub=value in `values`. Returns which override wrote which path, and the overrides that cannot be."""
    written: dict[KeyPath, str] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        try:
            if not equals or not all(path):
                raise ValueError('an override reads key=value or block.key=value; with a space, "duration=20 steps"')
            _set(values, path, parse_value(text))
        except ValueError as error:
            problems.append(Problem(str(error), path, override=override))
        else:
            written = {p: o for p, o in written.items() if p[: len(path)] != path} | {path: override}
    return written, problems


def _set(values: dict[str, Value], path: tuple[str, ...], value: Value) -> None:
    """Set one nested key, making the blocks above it where the file has none."""
    block = values
    for i, part in enumerate(path[:-1]):
        if block.get(part) is None:
            block[part] = {}
        inner = block[part]
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path[: i + 1])} is {describe(inner)}, not a block of keys")
        block = inner
    block[path[-1]] = value


def as_tuples(value: Value) -> Any:
    """The same value with every list a tuple, as frozen specs hold them."""
    if isinstance(value, dict):
        return {key: as_tuples(inner) for key, inner in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def _is_within(path: tuple[int | str, ...], refused: set[KeyPath]) -> bool:
    return any(path[:end] in refused for end in range(len(path) + 1))


def recipe_from_options(recipe_class: type[AnySpec], values: dict[str, Any]) -> AnySpec:
    """A recipe out of a command's options, each named as its key. UsageError tells every bad one by its flag."""
    try:
        return recipe_class.model_validate(values)
    except ValidationError as error:
        problems = explain(error.errors(include_url=False), recipe_class, Origin({}))
    told = [f"--{dotted(p.path).replace('_', '-')}: {p.text}" if p.path else p.text for p in problems]
    raise UsageError("; ".join(told))


def override_of(key: str, value: Any) -> str:
    """`key=value` that sets a recipe's key to exactly this plain value, tuples as lists."""
    return f"{key}={_write_value(value)}"


def dump_recipe(spec: Spec) -> str:
    """YAML that `load_recipe` reads back as an equal spec: `stage` first, then the keys in the schema's order."""
    values = spec.to_dict()
    first = {"stage": values["stage"]} if "stage" in values else {}
    return "".join(f"{line}\n" for line in _write_block({**first, **values}, indent=""))


def _write_block(values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_write_block(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_write_value(value)}")
    return lines


def _write_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_write_value(item) for item in value)}]"
    return write_scalar(value)
