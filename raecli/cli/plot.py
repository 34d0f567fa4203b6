"""`rae plot`: curves of runs, out of their metrics.jsonl. No torch."""

import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from raecli.cli.options import JsonOpt

KEYS = ("loss", "gradient_norm", "learning_rate", "images_per_second", "fid", "validation_rfid", "validation_psnr")
TITLES = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "images / s",
    "fid": "FID",
    "validation_rfid": "reconstruction FID",
    "validation_psnr": "PSNR of reconstructions, dB",
    "mfu": "MFU",
    "data_wait_share": "share of time waiting for data",
    "seconds_per_step": "seconds / step",
    "gpu_memory_peak_gib": "GPU memory peak, GiB",
}
FROM_ZERO = ("learning_rate", "images_per_second", "data_wait_share", "mfu", "seconds_per_step", "gpu_memory_peak_gib")
SMOOTHED_FROM = 20  # points; a curve of fewer is drawn as it is, with a mark at each
LOG_FROM = 5.0  # largest over smallest value from which an axis is logarithmic

Curve = tuple[list[int], list[float]]  # steps and values
Curves = dict[str, dict[str, Curve]]  # by key, then by the run's label


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="PNG, PDF or SVG [default: RUN/curves.png, or ./curves.png].")
    ] = None,
    keys: Annotated[str | None, typer.Option(help="Keys of metrics.jsonl, e.g. loss,fid [default: the usual].")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Draw the curves of one run, or of several beside each other: loss, learning rate, gradient norm, speed, FID.

    Thin: as logged. Thick: smoothed over a fiftieth of the run. Needs matplotlib: pip install 'raecli[plots]'.

    Examples:

      rae plot runs/dith_xl

      rae plot runs/dith_s runs/dith_xl --keys loss,fid --out curves.pdf
    """
    from raecli.errors import UsageError
    from raecli.store.room import check_output

    path = Path(out) if out else (Path(runs[0]) if len(runs) == 1 else Path()) / "curves.png"
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out {path}: ends with .png, .pdf or .svg")
    lines = read_runs(runs)
    check_output(path)
    curves = curves_of(lines, [key.strip() for key in keys.split(",")] if keys else None)
    try:
        picture = drawn(curves)
    except ImportError:
        raise UsageError("plot: matplotlib is missing; pip install 'raecli[plots]'") from None
    save(picture, path)
    told = {"output": str(path), "curves": list(curves), "runs": labels_of(runs)}
    line = f"{path}: {', '.join(curves)} of {', '.join(labels_of(runs))}"
    typer.echo(json.dumps(told, indent=2) if as_json else line)


def read_runs(runs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each run's metrics.jsonl, by the run's label."""
    from raecli.errors import InputError
    from raecli.store.run_folder import METRICS, read_metrics

    found = {}
    for label, run in zip(labels_of(runs), runs, strict=True):
        found[label] = read_metrics(Path(run))
        if not found[label]:
            why = f"no figures in {METRICS}" if Path(run).is_dir() else "no such folder"
            raise InputError(
                f"{run}: {why}; give the output folder of a rae train-diffusion or train-decoder, which writes its "
                "first line after log_every steps"
            )
    return found


def labels_of(runs: Sequence[str]) -> list[str]:
    """What to call each run: its folder's name, or the path as it was given where names are not unique."""
    names = [Path(os.path.realpath(run)).name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


def curves_of(lines: dict[str, list[dict[str, Any]]], keys: Sequence[str] | None) -> Curves:
    """The curves of the keys asked for, or of the usual ones that a run has. UsageError for one that none has."""
    from raecli.errors import UsageError

    known = sorted({name for run in lines.values() for line in run for name in line} - {"step"})
    for key in keys or ():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"--keys {key}: no run has it{hint} There are {', '.join(known)}")
    curves: Curves = {}
    for key in dict.fromkeys(keys or KEYS):
        told = {label: curve(run, key) for label, run in lines.items()}
        if found := {label: points for label, points in told.items() if points[0]}:
            curves[key] = found
    if not curves:
        raise UsageError(f"nothing to draw: the runs have {', '.join(known)}; choose with --keys")
    return curves


def curve(lines: Sequence[dict[str, Any]], key: str) -> Curve:
    """Steps and finite values of a key, by step."""
    points = sorted(
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    )
    return [step for step, _ in points], [value for _, value in points]


def drawn(curves: Curves) -> Any:
    """A matplotlib Figure with one panel a key; runs have one colour in all of them."""
    from matplotlib.figure import Figure

    columns = min(len(curves), 3 if len(curves) > 4 else 2)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = list(dict.fromkeys(label for found in curves.values() for label in found))
    colours = {label: f"C{index % 10}" for index, label in enumerate(labels)}
    for panel, (key, found) in zip(panels[: len(curves)], curves.items(), strict=True):
        draw_panel(panel, key, found, colours)
    last = max(step for found in curves.values() for steps, _ in found.values() for step in steps)
    for panel in panels[: len(curves)]:
        panel.set_xlim(-0.02 * last, 1.02 * last)  # the same steps in all of them
    for panel in panels[len(curves) :]:
        panel.remove()
    handles = [panels[0].plot([], [], color=colours[label], linewidth=1.8)[0] for label in labels]
    shown = [label.replace("$", r"\$") for label in labels]  # a folder's name, not mathematics
    figure.legend(handles, shown, loc="outside upper center", ncols=min(len(labels), 3), frameon=False)
    return figure


def draw_panel(panel: Any, key: str, found: dict[str, Curve], colours: dict[str, str]) -> None:
    """One key of all runs that have it."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    for label, (steps, values) in found.items():
        colour = colours[label]
        if len(steps) < SMOOTHED_FROM:
            panel.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5)
        elif key == "learning_rate":  # it has no noise
            panel.plot(steps, values, color=colour, linewidth=1.8)
        else:
            panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
            panel.plot(steps, smoothed(values), color=colour, linewidth=1.8)
    everything = [value for _, values in found.values() for value in values]
    panel.set_title(TITLES.get(key, key.replace("_", " ")), fontsize=11)
    panel.set_xlabel("step", fontsize=9)
    panel.tick_params(labelsize=8, which="both")
    panel.grid(alpha=0.25, which="both", linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 30k
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    if key in FROM_ZERO and min(everything) >= 0:
        panel.set_ylim(bottom=0)
    elif min(everything) > 0 and max(everything) / min(everything) >= LOG_FROM:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred Gaussian mean, its standard deviation a hundredth of the points.

    At the left end, where a loss falls steeply, it narrows so that it bends no straight line; at the right end, where
    figures are noise, it looks back as far as everywhere.
    """
    import numpy as np

    count, deviation = len(values), max(1.0, len(values) / 100)
    most = math.ceil(3 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-most, most + 1) / deviation) ** 2)
    array, means = np.asarray(values, dtype=np.float64), []
    for index in range(count):
        before = min(most, index)
        after = min(before, count - 1 - index)
        weights = kernel[most - before : most + after + 1]
        means.append(float(weights @ array[index - before : index + after + 1] / weights.sum()))
    return means


def save(picture: Any, path: Path) -> None:
    """Write the figure in the format of its name, complete or not at all."""
    from raecli.store.atomic import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        picture.savefig(scratch, format=path.suffix[1:], dpi=160)
