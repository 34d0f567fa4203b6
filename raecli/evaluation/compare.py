"""Two reports of `rae eval` beside each other: what differs in protocol, then in figures. No torch."""

import json
from pathlib import Path
from typing import Any

from raecli.errors import InputError
from raecli.store.json_file import read_json

FIGURES = (  # what a report measured; everything else in it is how
    "fid",
    "mean_part",
    "trace_part",
    "sfid",
    "fdd",
    "inception_score",
    "precision",
    "recall",
    "kid",
    "accuracy",
    "psnr",
    "ssim",
    "lpips",
    "rfid",
    "per_class",
)
NOT_FIGURES = ("_rule", "_points", "_method", "_features", "_samples", "_path")
ABSENT = "(not told)"


def read_report(file: str) -> dict[str, Any]:
    """A report, or an InputError."""
    try:
        return read_json(Path(file))
    except InputError as error:
        raise InputError(f"{error}; give a report of rae eval, by --out or --json") from None


def comparison(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Fields that differ, as `protocol`, and all figures, as `figures`, each with both values."""
    one, other = flattened(first), flattened(second)
    names = list(dict.fromkeys([*one, *other]))
    protocol = [
        {"field": name, "a": one.get(name), "b": other.get(name)}
        for name in names
        if not is_figure(name) and one.get(name) != other.get(name)
    ]
    figures = [figure(name, one.get(name), other.get(name)) for name in names if is_figure(name)]
    return {"protocol": protocol, "figures": figures}


def flattened(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots; lists as they are."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flattened(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat


def is_figure(name: str) -> bool:
    """Whether a field is something measured."""
    top = name.partition(".")[0]
    measured = any(top == figure or top.startswith(f"{figure}_") for figure in FIGURES)
    return measured and not top.endswith(NOT_FIGURES)


def figure(name: str, a: Any, b: Any) -> dict[str, Any]:
    """Both values of a figure, and b - a where both are numbers."""
    both = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return {"name": name, "a": a, "b": b, "difference": b - a if both else None}


def comparison_table(found: dict[str, list[dict[str, Any]]], first: str, second: str) -> str:
    """For the eye: A and B of each field that differs, then of each figure with the difference."""
    lines = [f"A: {first}", f"B: {second}", ""]
    lines.append("protocol differs in:" if found["protocol"] else "protocol: no difference")
    for row in found["protocol"]:
        lines += [f"  {row['field']}", f"    A: {shown(row['a'])}", f"    B: {shown(row['b'])}"]
    rows = [row for row in found["figures"] if not isinstance(row["a"], list) and not isinstance(row["b"], list)]
    width = max([len(row["name"]) for row in rows], default=0)
    lines += ["", f"{'figure':<{width + 2}}{'A':>14}{'B':>14}{'B - A':>14}" if rows else "no figures"]
    for row in rows:
        values = "".join(f"{number(row[key]):>14}" for key in ("a", "b", "difference"))
        lines.append(f"{row['name']:<{width + 2}}{values}")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A protocol's value on one line."""
    return ABSENT if value is None else json.dumps(value, ensure_ascii=False)


def number(value: Any) -> str:
    """A figure for the table."""
    return "-" if value is None else f"{value:.6g}" if isinstance(value, int | float) else str(value)
