"""A report for the eye, and where it goes."""

import json
import sys
from pathlib import Path
from typing import Any

from raecli.store.atomic import write_json

NAMES = {  # of a figure in the report: its name in the table, its format, what it is multiplied by
    "fid": ("fid", ".4f", 1),
    "sfid": ("sfid", ".4f", 1),
    "inception_score": ("is", ".4f", 1),
    "precision": ("precision", ".4f", 1),
    "recall": ("recall", ".4f", 1),
    "kid": ("kid x1000", ".4f", 1000),
    "fdd": ("fdd", ".4f", 1),
    "accuracy": ("accuracy", ".4f", 1),
}


def tell(report: dict[str, Any], *, as_json: bool, output: str | None) -> None:
    """Figures on stdout, warnings on stderr, everything in the output file."""
    for warning in report.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    if output is not None:
        write_json(Path(output), report)
    print(json.dumps(report, indent=2) if as_json else table(report), flush=True)


def table(report: dict[str, Any]) -> str:
    """A name and a value a line: figures, what could not be had, then the two sides and the networks."""
    rows = {}
    for key, (name, form, factor) in NAMES.items():
        if key in report:
            rows[name] = f"{report[key] * factor:{form}}{remark(key, report)}"
    if "per_class" in report:
        rows["by class"] = "  ".join(f"{label}: {share:.3f}" for label, share in report["per_class"].items())
    rows |= {f"no {name}": reason for name, reason in report.get("unavailable", {}).items()}
    rows["samples"] = f"{counted(report['samples'])}, {report['samples_path']}"
    if report.get("reference_path"):
        rows["reference"] = f"{counted(report['reference_samples'])}, {report['reference_path']}"
    for key in ("features", "fdd_features"):
        if key in report:
            digest = report[key].get("sha256")
            rows[key.replace("_", " ")] = report[key]["name"] + (f", sha256 {digest[:8]}" if digest else "")
    width = max(10, *map(len, rows))
    return "\n".join(f"{name:<{width}} {value}" for name, value in rows.items())


def remark(key: str, report: dict[str, Any]) -> str:
    """What a figure's line says beside it."""
    if key == "fid":
        return f"  (means {report['mean_part']:.4f} + covariances {report['trace_part']:.4f})"
    if key == "inception_score":
        splits = len(report["inception_score_splits"])
        return f"  ({splits} consecutive split{'s' * (splits > 1)} of 5000, in the set's order)"
    if key in ("precision", "recall") and f"{key}_float32" in report and f"{key}_float16" in report:
        return f"  (float32; by ADM's float16 {report[f'{key}_float16']:.4f})"
    if key in ("precision", "recall"):
        return "  (float32)" if f"{key}_float32" in report else "  (ADM's float16)"
    if key == "kid":
        return f"  (+- {report['kid_deviation'] * 1000:.4f} over subsets)"
    return ""


def counted(count: int | None) -> str:
    """A number of images, where it is told."""
    return f"{count} images" if count else "an untold number of images"
