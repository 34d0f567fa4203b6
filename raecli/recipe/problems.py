"""What is wrong with a recipe, in words: where, what was found, what was meant, nothing of the validator's jargon."""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raecli.errors import UsageError
from raecli.recipe.spec import Spec
from raecli.recipe.strict_yaml import KeyPath, Problem, describe, show

MAX_SHOWN = 100  # problems in one message
MAX_KEY = 64  # characters of an unknown key that are compared with the known ones
ELSEWHERE = {  # other programs' words for our keys
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "steps": "duration",
    "max_steps": "duration",
    "epochs": "duration",
    "num_epochs": "duration",
    "out": "output",
    "output_dir": "output",
    "dtype": "precision",
    "grad_clip": "clip_norm",
}


@dataclass(frozen=True)
class Origin:
    """Where each value came from: a line of the file, or an override."""

    lines: Mapping[KeyPath, int]
    overrides: Mapping[KeyPath, str] = field(default_factory=dict)

    def locate(self, text: str, path: KeyPath) -> Problem:
        """A problem at the nearest place that the user wrote: here, in an override below, or above."""
        above = [path[:end] for end in range(len(path), -1, -1)]
        below = [p for p in self.overrides if path and p[: len(path)] == path and path not in self.lines]
        if by := next((p for p in [*above, *below] if p in self.overrides), None):
            return Problem(text, path, override=self.overrides[by])
        return Problem(text, path, next((self.lines[p] for p in above if p in self.lines), None))


def report(name: str, problems: Iterable[Problem]) -> UsageError:
    """One error out of all problems: by line, the overrides last."""
    found = sorted(problems, key=lambda problem: (problem.override is not None, problem.line or 0))
    lines = [f"{name} has {len(found)} problem{'s' if len(found) != 1 else ''}"]
    lines += [f"  {_one_line(problem)}" for problem in found[:MAX_SHOWN]]
    if len(found) > MAX_SHOWN:
        lines.append(f"  ... and {len(found) - MAX_SHOWN} more")
    return UsageError("\n".join(lines))


def _one_line(problem: Problem) -> str:
    if problem.override is not None:
        return f"override {show(problem.override, 120)}: {problem.text}"
    where = [f"line {problem.line}"] if problem.line else []
    where += [dotted(problem.path)] if problem.path else []
    return f"{', '.join(where)}: {problem.text}" if where else problem.text


def dotted(path: KeyPath) -> str:
    """The path as a user writes it: optimizer.betas[1]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{show(part)}"
    return text.removeprefix(".")


def explain(errors: Iterable[Any], recipe_class: type[Spec], origin: Origin) -> list[Problem]:
    """The validator's errors as problems; a missing key that is only misspelt is told once."""
    unknown, missing, others, short = [], [], [], {}
    for error in errors:
        path: KeyPath = tuple(error["loc"])
        if error["type"] == "extra_forbidden":
            unknown.append(path)
        elif error["type"] != "missing":
            others.append(_mistyped(error, path, origin))
        elif isinstance(path[-1], int):  # the last of these for a list names its last item
            text = f"must be a list of {path[-1] + 1} values, found {describe(error['input'])}"
            short[path[:-1]] = origin.locate(text, path[:-1])
        else:
            missing.append(path)
    known = known_paths(recipe_class)
    meant = {path: nearest_key(path, known) for path in unknown[:MAX_SHOWN]}
    problems = [origin.locate(_unknown_text(path, meant.get(path)), path) for path in unknown]
    problems += [origin.locate("missing", path) for path in missing if path not in meant.values()]
    return [*problems, *others, *short.values()]


def known_paths(recipe_class: type[Spec], above: KeyPath = ()) -> list[KeyPath]:
    """The path of every key of a recipe, blocks and their keys alike."""
    paths: list[KeyPath] = []
    for name, info in recipe_class.model_fields.items():
        paths.append((*above, name))
        for kind in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, Spec):
                paths += known_paths(kind, (*above, name))
    return paths


def nearest_key(path: KeyPath, known: list[KeyPath]) -> KeyPath | None:
    """The known key that was most likely meant: of this name elsewhere, else near it here, else near it elsewhere."""
    name = str(path[-1])[:MAX_KEY].replace("-", "_").lower()
    here = {str(p[-1]): p for p in known if p[:-1] == path[:-1]}
    anywhere = {str(p[-1]): p for p in reversed(known)}
    if name not in here:
        name = ELSEWHERE.get(name, name)
    if name not in here and name in anywhere:
        return anywhere[name]
    for names in (here, anywhere):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
            return names[near[0]]
    return None


def _unknown_text(path: KeyPath, meant: KeyPath | None) -> str:
    if meant is None:
        return "unknown key"
    is_here = meant[:-1] == path[:-1]
    return f"unknown key; did you mean {meant[-1] if is_here else dotted(meant)}?"


def _mistyped(error: Any, path: KeyPath, origin: Origin) -> Problem:
    """What a value must be and what was found."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        found = "" if isinstance(value, dict) else f", found {describe(value)}"
        return _broken_rule(f"{context['error']}{found}", path, origin)
    if kind == "too_long":
        return origin.locate(f"must be a list of {context['max_length']} values, found {describe(value)}", path)
    return origin.locate(
        f"must be {_wanted(kind, context)}, found {describe(value)}{_hint(kind, value, context)}", path
    )


def _broken_rule(text: str, path: KeyPath, origin: Origin) -> Problem:
    """A rule between keys, told at the key that its text starts with, where the user wrote that key."""
    named = re.match(r"[a-z_]+", text)
    key = (*path, named[0]) if named else path
    return origin.locate(text, key if key in origin.lines or key in origin.overrides else path)


def _wanted(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        choices = _choices(context)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return f"{words[bounds[kind]]} {context[bounds[kind]]:g}"
    return {
        "int_type": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_unicode": "valid Unicode text",
        "tuple_type": "a list",
        "model_type": "a block of keys",
        "finite_number": "a finite number",
    }.get(kind, f"valid ({kind.replace('_', ' ')})")


def _hint(kind: str, value: object, context: Mapping[str, Any]) -> str:
    """What to do about it, where that is plain."""
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value[:MAX_KEY], _choices(context), n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def _choices(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", "")))
