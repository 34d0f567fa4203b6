"""A run as one HTML file that needs nothing beside it: the work of `rae report`. Every text in it is escaped."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from raecli import inspection
from raecli.cli import plot
from raecli.errors import InputError, RaeError, UsageError
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.recipe.spec import Spec
from raecli.store.artifact import checkpoint_folders, read_config
from raecli.store.json_file import read_json
from raecli.store.manifest import read_manifest
from raecli.store.run_folder import read_metrics

MAX_SIDE = 1600  # pixels of a picture in the report
MAX_SHEETS = 24  # of one run
HIGHER_IS_BETTER = ("psnr", "ssim", "inception_score", "precision", "recall", "accuracy")
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --faint: #6b6b70; --line: #d9d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --paper: #16161a; --faint: #9a9aa2; --line: #3a3a42; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: inherit; } nav a { margin-right: 1rem; } .faint, figcaption { color: var(--faint); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; } img { max-width: 100%; height: auto; background: #fff; }
figure { margin: 1rem 0; }
.past { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.past figure { margin: 0; } pre { overflow-x: auto; font-size: .85rem; }
@media print {
  body { max-width: none; padding: 0; } nav, .top { display: none; } img { max-height: 22cm; }
  h2, h3, summary { break-after: avoid; } figure, .scroll { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } pre { columns: 2; white-space: pre-wrap; }
}
"""


def write_report(runs: Sequence[str], out: Path, samples: Sequence[str], evaluations: Sequence[str]) -> None:
    """Write the report of runs, complete or not at all. Raises InputError for a path that is no run."""
    from raecli.store.atomic import write_text
    from raecli.store.room import check_output

    check_output(out)
    page = document(runs, samples, evaluations)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)


def document(runs: Sequence[str], samples: Sequence[str] = (), evaluations: Sequence[str] = ()) -> str:
    """The whole page."""
    labels = plot.labels_of(runs)
    recipes = [recipe_of(Path(run)) for run in runs]
    lines = {label: read_metrics(Path(run)) for label, run in zip(labels, runs, strict=True)}
    sections = [("curves", "Curves", curves(lines))]
    for number, (label, run, recipe) in enumerate(zip(labels, runs, recipes, strict=True), 1):
        sections.append((f"run-{number}", label, run_section(Path(run), recipe, lines[label])))
    extra = [sheets_of(Path(folder)) for folder in samples] + [evaluation(Path(file)) for file in evaluations]
    if extra:
        sections.append(("more", "Samples and evaluations", "".join(extra)))
    title = escape(f"rae report: {', '.join(labels)}")
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(head)}</h2>{text}</section>' for name, head, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f'<body id="top"><h1>{title}</h1><nav>{links}</nav>{body}'
        '<p class="top"><a href="#top">To the top</a></p></body></html>\n'
    )


def recipe_of(run: Path) -> Spec:
    """The resolved recipe of a training run. Raises InputError if there is none."""
    path = run / "recipe.yaml"
    recipe = load_recipe(None, str(path)) if path.is_file() else None
    if recipe is None or recipe.to_dict()["stage"] not in ("train-decoder", "train-diffusion"):
        why = "its recipe.yaml is of no training" if recipe else "no recipe.yaml in it"
        raise InputError(f"{run}: no training run ({why}); give the output of rae train-diffusion or train-decoder")
    return recipe


def curves(lines: dict[str, list[dict[str, Any]]]) -> str:
    """The panels of `rae plot` of all runs that have figures."""
    try:
        drawn = plot.drawn(plot.curves_of({label: told for label, told in lines.items() if told}, None))
    except ImportError:
        raise UsageError("report: matplotlib is missing; pip install 'raecli[plots]'") from None
    except UsageError:
        return "<p>No figures yet: metrics.jsonl is missing or empty.</p>"
    with io.BytesIO() as file:
        drawn.savefig(file, format="png", dpi=120)
        return figure(file.getvalue(), "png", "Curves of the run", "Thin: as logged. Thick: smoothed.")


def run_section(run: Path, recipe: Spec, lines: list[dict[str, Any]]) -> str:
    """What a run is, its samples, figures, checkpoints, environment and recipe."""
    parts: list[tuple[str, Callable[[], str]]] = [
        ("", lambda: table(summary(run, recipe, lines))),
        ("Samples over time", lambda: sheets(sorted((run / "samples").glob("step-*.png")))),
        ("Figures", lambda: best_and_last(lines)),
        ("Checkpoints", lambda: checkpoints(run)),
        ("Environment", lambda: environment(run)),
    ]
    told = "".join((f"<h3>{head}</h3>" if head else "") + make() for head, make in parts)
    return f"{told}<details><summary>The whole recipe</summary><pre>{escape(dump_recipe(recipe))}</pre></details>"


def summary(run: Path, recipe: Spec, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Name to value of what the run is and how far it came."""
    told = recipe.to_dict()
    step = max((line["step"] for line in lines), default=0)
    return {
        "paper": told["paper"],
        "stage": told["stage"],
        "state": state_of(run),
        "step": f"{step} logged, of {told['duration']}",
        "cache": told["cache"],
        "encoder": encoder_of(run, told["cache"]),
        "parameters": parameters_of(run),
        "folder": run,
    }


def state_of(run: Path) -> str:
    """Finished, or what is there of a run that is not. A folder does not tell a running process from a dead one."""
    if (run / "final" / "config.json").is_file():
        return "finished"
    newest = next(iter(checkpoint_folders(run)), None)
    running = ", being written or killed (it holds .lock)" if (run / ".lock").exists() else ", stopped"
    return f"unfinished{running}, newest checkpoint {newest.name if newest else 'none'}"


def encoder_of(run: Path, cache: str) -> str:
    """The encoder as the model's config.json tells it, else as the cache does."""
    try:
        for kind in ("rae-diffusion", "rae-decoder"):
            try:
                encoder = read_config(run, kind)["latents"]["encoder"]
                return f"{encoder['name']}, sha256 {str(encoder.get('weights_sha256'))[:12]}"
            except (RaeError, KeyError, TypeError):
                continue
        encoder = read_manifest(cache).encoder
        return f"{encoder.name}, sha256 {str(encoder.weights_sha256)[:12]}"
    except RaeError:
        return "not told: no model yet, and the cache is not there"


def parameters_of(run: Path) -> str:
    """Tensors and numbers of the newest whole weights."""
    for folder in (run / "final", *checkpoint_folders(run)):
        try:
            return inspection.tensors_told(folder / "model.safetensors")
        except InputError:
            continue
    return "no weights yet"


def best_and_last(lines: list[dict[str, Any]]) -> str:
    """Evaluation's figures: best and last, each with its step."""
    rows = []
    names = dict.fromkeys(key for line in lines for key in line)
    for key in names:
        name = key.removeprefix("validation_")
        if not (key == "fid" or key.startswith("validation_")) or name == "images":
            continue
        steps, values = plot.curve(lines, key)
        if values:
            best = (max if name in HIGHER_IS_BETTER else min)(range(len(values)), key=values.__getitem__)
            rows.append((key, f"{values[best]:.5g}", steps[best], f"{values[-1]:.5g}", steps[-1]))
    if not rows:
        return "<p>No evaluation or validation figures.</p>"
    return grid(("figure", "best", "at step", "last", "at step"), rows)


def checkpoints(run: Path) -> str:
    """Every checkpoint and final/, held against its digests."""
    rows = []
    for folder in [*reversed(checkpoint_folders(run)), *([run / "final"] if (run / "final").is_dir() else [])]:
        try:
            problems = inspection.model(folder, False).problems
        except RaeError as error:
            problems = [str(error)]
        rows.append((folder.name, "; ".join(problems) or "whole"))
    return grid(("folder", "whole?"), rows) if rows else "<p>No checkpoint.</p>"


def environment(run: Path) -> str:
    """environment.json as it stands."""
    try:
        return table(read_json(run / "environment.json"))
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"


def sheets(files: Sequence[Path]) -> str:
    """The newest sheet large, those before it small and in order."""
    if not files:
        return "<p>No sheets of samples.</p>"
    kept = list(files)
    if len(files) > MAX_SHEETS:  # evenly over time, first and last among them
        kept = [files[round(place * (len(files) - 1) / (MAX_SHEETS - 1))] for place in range(MAX_SHEETS)]
    left_out = f"<p>{len(files) - len(kept)} of {len(files)} sheets are left out.</p>" if len(files) > len(kept) else ""
    past = "".join(picture(file, 400) for file in kept[:-1])
    return f'{left_out}{picture(kept[-1], MAX_SIDE)}<div class="past">{past}</div>'


def sheets_of(folder: Path) -> str:
    """Sheets of a folder of samples or reconstructions."""
    names = ("grid.png", "sheet.png", "trajectory.png", "sweep.png")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder}: none of {', '.join(names)}; give a folder of rae sample or rae reconstruct")
    return f"<h3>{escape(str(folder))}</h3>" + "".join(picture(file, MAX_SIDE) for file in files)


def evaluation(file: Path) -> str:
    """Plain values of a report of rae eval."""
    told = {key: value for key, value in read_json(file).items() if isinstance(value, str | int | float)}
    return f"<h3>{escape(str(file))}</h3>{table(told)}"


def picture(file: Path, most: int) -> str:
    """A file's picture, made smaller where a side is over `most` pixels; a damaged one is told in words."""
    try:
        with Image.open(file) as opened, io.BytesIO() as data:
            image = opened.convert("RGB")
            image.thumbnail((most, most))
            image.save(data, format="PNG", optimize=True)
            return figure(data.getvalue(), "png", file.stem, file.name)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"<p>{escape(f'{file.name}: cannot be read ({error})')}</p>"


def figure(data: bytes, kind: str, alt: str, caption: str) -> str:
    """A picture inside the page."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<figure><img alt="{escape(alt)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(values: dict[str, Any]) -> str:
    """A name and a value a row."""
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(shown(value))}</td></tr>" for key, value in values.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a head."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def shown(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)
