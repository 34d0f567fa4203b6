"""Pictures of `rae overfit-toy`, as the paper's Figure 3: losses against width and depth, curves, and samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raecli.evaluation.toy import ERRORS_ALLOWED, Row
from raecli.store.atomic import atomic_file

MOST_NAMED = 24  # curves in a legend
MARGIN = 12  # parts of the widths' range, free on either side


@dataclass(frozen=True)
class Generated:
    """What a model made, beside its target."""

    row: Row
    target: Tensor  # [N, n]
    samples: Tensor  # [M, N, n]
    images: Tensor | None  # target and samples decoded, [1 + M, 3, H, W] in [0, 1]; None: no decoder


def draw_figures(
    rows: Sequence[Row], generated: Sequence[Generated], head: tuple[int, int] | None, folder: Path
) -> str:
    """figure.png, samples.png, and depth.png where there are several depths. Returns what to say of them."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "; no figures: matplotlib is missing (pip install 'raecli[plots]')"
    draw(folder / "figure.png", 2, 5.6, lambda axes: (plot_losses(axes[0], rows, head), plot_curves(axes[1], rows)))
    names = ["figure.png"]
    if len({row.depth for row in rows}) > 1:
        narrow = [row for row in rows if row.bound > 0] or list(rows)
        draw(folder / "depth.png", 2, 5.6, lambda axes: (plot_depths(axes[0], narrow), plot_curves(axes[1], narrow)))
        names.append("depth.png")
    draw_samples(generated, folder / "samples.png")
    return "".join(f", {folder / name}" for name in [*names, "samples.png"])


def draw(path: Path, panels: int, height: float, fill: Callable[[Any], object]) -> None:
    """A row of panels, filled and written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * panels, height), layout="constrained")
    fill(figure.subplots(1, panels))
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def plot_losses(axis: Any, rows: Sequence[Row], head: tuple[int, int] | None) -> None:
    """Loss against width on a log axis, where a bound of 0 has no place: it falls off the axis at d = n."""
    lowest, highest = min(row.loss for row in rows) / 2, max(2.0, *(row.loss * 1.5 for row in rows))
    series = sorted({(row.channels, row.depth) for row in rows})  # of several n, colours as their bounds
    for number, (channels, depth) in enumerate(series):
        ours = [row for row in rows if (row.channels, row.depth) == (channels, depth)]
        errors = [ERRORS_ALLOWED * row.standard_error for row in ours]
        label = f"loss +- {ERRORS_ALLOWED} s.e., n = {channels}, depth {depth}"
        points = [row.width for row in ours], [row.loss for row in ours]
        axis.errorbar(*points, yerr=errors, fmt=f"C{number}o", capsize=3, label=label)
    certified = [row for row in rows if row.certificate > 0]
    points = [row.width for row in certified], [row.certificate for row in certified]
    axis.plot(*points, "kx", label="certificate of the trained output layer")
    plot_bounds(axis, rows, head, lowest / 10)
    axis.set(yscale="log", ylim=(lowest, highest), xlabel="width of the backbone" if head else "width d")
    axis.set(ylabel="mean squared error, fresh draws", title="Theorem 1: width decides")
    legend_below(axis)


def legend_below(axis: Any) -> None:
    """Under the axis, where it hides nothing."""
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def plot_bounds(axis: Any, rows: Sequence[Row], head: tuple[int, int] | None, lowest: float) -> None:
    """The floor of each token dimension over all widths."""
    widths = sorted({row.width for row in rows})
    margin = (widths[-1] - widths[0]) / MARGIN or widths[0] / 4
    begin, end = widths[0] - margin, widths[-1] + margin
    line = [begin + (end - begin) * k / 1000 for k in range(1001)]
    dimensions = sorted({row.channels for row in rows})
    for number, n in enumerate(dimensions):
        colour = "k" if len(dimensions) == 1 else f"C{number}"
        bounds = [max(lowest, 1 - (head[0] if head else width) / n) for width in line]
        axis.plot(line, bounds, "--", color=colour, linewidth=1, label=f"bound (n - d)/n, n = {n}")
        if len(dimensions) == 1:
            axis.fill_between(line, bounds, lowest, color="0.9", label="out of reach")
    axis.set(xlim=(begin, end), xticks=widths)


def plot_depths(axis: Any, rows: Sequence[Row]) -> None:
    """Loss against depth of models that are too narrow, with the bound that depth does not move."""
    for number, (n, width) in enumerate(sorted({(row.channels, row.width) for row in rows})):
        ours = [row for row in rows if (row.channels, row.width) == (n, width)]
        errors = [ERRORS_ALLOWED * row.standard_error for row in ours]
        points = [row.depth for row in ours], [row.loss for row in ours]
        axis.errorbar(*points, yerr=errors, fmt=f"C{number}o-", capsize=3, label=f"loss, n = {n}, width {width}")
        axis.axhline(ours[0].bound, color=f"C{number}", linestyle="--", linewidth=1, label=f"bound, width {width}")
    axis.set(ylim=(0, None), xlabel="depth", xticks=sorted({row.depth for row in rows}))
    axis.set(ylabel="mean squared error, fresh draws", title="Theorem 1: depth does not help")
    axis.legend(fontsize="small", loc="lower right")


def plot_curves(axis: Any, rows: Sequence[Row]) -> None:
    """Training losses over steps, window means, each with its bound in its colour."""
    several = len({row.channels for row in rows}) > 1
    for number, row in enumerate(rows):
        name = f"width {row.width}, depth {row.depth}" + (f", n = {row.channels}" if several else "")
        name += f", seed {row.seed}" if row.seed else ""
        axis.plot(*zip(*row.training_curve, strict=True), color=f"C{number % 10}", linewidth=1, label=name)
        if row.bound > 0:
            axis.axhline(row.bound, color=f"C{number % 10}", linewidth=0.8, linestyle="--")
    axis.set(yscale="log", xlabel="step", ylabel="training loss (window mean)", title="dashed: the bound")
    if len(rows) <= MOST_NAMED:
        legend_below(axis)


def draw_samples(generated: Sequence[Generated], path: Path) -> None:
    """Target against samples, a row a model: decoded, or principal components and errors of the tokens."""
    from matplotlib.figure import Figure

    columns = 1 + len(generated[0].samples) + (generated[0].images is None)
    figure = Figure(figsize=(1.7 * columns + 1.2, 1.75 * len(generated) + 0.8), layout="constrained")
    grid = figure.subplots(len(generated), columns, squeeze=False)
    for axes, made in zip(grid, generated, strict=True):
        for axis, (picture, title) in zip(axes, panels_of(made), strict=True):
            options = {"cmap": "inferno", "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
            axis.imshow(picture.numpy(), interpolation="nearest", **options)
            axis.set_title(title, fontsize="x-small")
            axis.set(xticks=[], yticks=[])
        n = f"\nn = {made.row.channels}, depth {made.row.depth}"
        axes[0].set_ylabel(f"width {made.row.width}{n}", fontsize="x-small")
    how = "decoded" if generated[0].images is not None else "three principal components of the target's tokens"
    figure.suptitle(f"What each model generates: {how}", fontsize="small")
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def panels_of(made: Generated) -> list[tuple[Tensor, str]]:
    """Pictures of one row, [H, W, 3] in [0, 1] or an error map [H, W], each with its title."""
    titles = ["target", *(f"sample {number}" for number in range(1, 1 + len(made.samples)))]
    if made.images is not None:
        return list(zip(made.images.cpu().permute(0, 2, 3, 1), titles, strict=True))
    side = int(len(made.target) ** 0.5)
    pictures = principal_colours(torch.cat([made.target[None], made.samples])).unflatten(1, (side, side))
    error = (made.samples - made.target).square().mean(dim=(0, 2)).view(side, side)
    return [*zip(pictures, titles, strict=True), (error, f"squared error {made.row.sample_error:.3f}\n(0 to 1)")]


def principal_colours(tokens: Tensor) -> Tensor:
    """[B, N, n] -> [B, N, 3] in [0, 1]: three principal components of the first map's tokens, red the first.

    A component outside these is not seen: a model too narrow keeps its noise just there, so the error map is shown too.
    """
    first = tokens[0].double()
    centre = first.mean(dim=0)
    axes = torch.linalg.svd(first - centre, full_matrices=False).Vh[:3]
    found = (tokens.double() - centre) @ axes.T
    found = torch.nn.functional.pad(found, (0, 3 - found.shape[-1]))
    reach = found[0].abs().amax(dim=0).clamp_min(1e-6)
    return (0.5 + 0.4 * found / reach).clamp(0, 1).float()
