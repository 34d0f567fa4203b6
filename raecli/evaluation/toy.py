"""What `rae overfit-toy` found, row by row: the table, its means, Table 3's grid, and whether the theorem held."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from raecli.errors import ExitCode, RaeError

NEAR = 0.07  # excess of a trained model; .066 is the most seen, at d = n = 32: d = n is the slowest case
ERRORS_ALLOWED = 4  # standard errors: by chance 1 mean in 30,000 lies further below its expectation
ROUNDING = 1e-6  # of the certificate: a float32 layer in float64 algebra
TIME_EDGES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of `loss_by_time`


@dataclass(frozen=True)
class Row:
    """What was found for one model. Losses and errors are a channel's mean square."""

    width: int
    depth: int
    channels: int  # n
    image: str | None  # None: tokens drawn at random
    seed: int
    output_width: int  # d, what the bound knows of the model: the head's width where there is a head
    bound: float  # (n - d) / n
    tail_bound: float  # the sharper one, for many tokens
    certificate: float  # the floor under this trained output layer
    loss: float  # of fresh draws after training
    standard_error: float
    excess: float  # loss - bound
    loss_by_time: list[float | None]  # mean loss of draws with t in 0-.1, .1-.3, .3-.5, .5-.7, .7-.9, .9-1
    sample_error: float  # mean ||z_0 - x||^2 / n
    unremoved_noise: float  # the part of it outside the output layer's reach
    verdict: str
    parameters: int
    seconds: float
    training_curve: list[tuple[int, float]]  # (step, mean training loss since the last point): never held to the bound


def verdict_of(floor: float, loss: float) -> str:
    """What the reader may conclude."""
    if loss - floor > NEAR:
        return "not converged yet"
    return "cannot be trained away" if floor > 0 else "converged"


def breaches(rows: Sequence[Row]) -> list[str]:
    """Rows that contradict the theorem, each with its evidence: our bug, if there is one."""
    found = []
    for row in rows:
        who = f"width {row.width} (output {row.output_width}), n {row.channels}, depth {row.depth}, seed {row.seed}"
        floor = max(row.bound, row.tail_bound)
        if not row.certificate >= floor - ROUNDING:
            found.append(f"{who}: certificate {row.certificate:.9f} is below the bound {floor:.9f}")
        if not row.loss + ERRORS_ALLOWED * row.standard_error >= floor:
            loss = f"{row.loss:.6f} +- {row.standard_error:.6f}"
            found.append(f"{who}: loss {loss} is over {ERRORS_ALLOWED} s.e. below the bound {floor:.6f}")
    return found


def check(rows: Sequence[Row]) -> None:
    """Fail, as a bug, where the theorem is contradicted."""
    found = breaches(rows)
    if found:
        error = RaeError(
            "\n  ".join(["Theorem 1 is contradicted, so this program has a bug; please report it", *found])
        )
        error.exit_code = ExitCode.BUG
        raise error


COLUMNS = ("width", "depth", "n", "image", "seed", "d", "bound", "certificate", "loss +- s.e.", "excess")
COLUMNS += ("sample error", "verdict")
SIZES = (5, 5, 4, 5, 4, 4, 7, 11, 18, 7, 12, 0)


def table_line(row: Row, number: int, hidden: frozenset[str] = frozenset()) -> str:
    """One row of the table. number: of its image, from 1."""
    loss = f"{row.loss:.4f} +- {row.standard_error:.5f}"
    numbers = [f"{row.bound:.4f}", f"{row.certificate:.4f}", loss, f"{row.excess:.4f}", f"{row.sample_error:.4f}"]
    sizes = [str(value) for value in (row.width, row.depth, row.channels, number, row.seed, row.output_width)]
    return aligned((*sizes, *numbers, row.verdict), hidden)


def aligned(cells: tuple[str, ...], hidden: frozenset[str] = frozenset()) -> str:
    """Cells to the right of their columns, but for the hidden ones."""
    rows = zip(COLUMNS, cells, SIZES, strict=True)
    return "  ".join(cell.rjust(size) for name, cell, size in rows if name not in hidden)


def means(rows: Sequence[Row]) -> list[dict[str, float | int | None]]:
    """Mean loss over images and seeds, and its standard deviation between them, for each size. App. G: three images."""
    groups: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.channels, row.depth, row.width), []).append(row)
    return [
        {
            "channels": channels,
            "depth": depth,
            "width": width,
            "bound": group[0].bound,
            "runs": len(group),
            "loss": fmean(row.loss for row in group),
            "deviation": stdev(row.loss for row in group) if len(group) > 1 else None,
        }
        for (channels, depth, width), group in groups.items()
    ]


def mean_lines(rows: Sequence[Row]) -> list[str]:
    """The means for a person, where there is more than one run of a size."""
    return [
        f"width {mean['width']}, depth {mean['depth']}, n = {mean['channels']}: mean loss {mean['loss']:.4f} "
        f"of {mean['runs']} runs (standard deviation {mean['deviation']:.4f}; bound {mean['bound']:.4f})"
        for mean in means(rows)
        if mean["deviation"] is not None
    ]


SIZES_OF_TABLE_13 = {384: "S", 768: "B", 1024: "L"}  # of DiT, and of DINOv2's tokens


def grid_lines(rows: Sequence[Row]) -> list[str]:
    """Table 3: mean loss of each width (across) for each token dimension (down); x: it cannot converge, d < n."""
    widths, channels = (sorted({getattr(row, key) for row in rows}) for key in ("width", "channels"))
    found = {(mean["channels"], mean["width"]): mean for mean in means(rows)}
    lines = ["", " " * 16 + "".join(f"{size_name('DiT', width, 'd'):>18}" for width in widths)]
    for n in channels:
        cells = (found[n, width] for width in widths)
        told = (f"{mean['loss']:.1e} {'x' if (mean['bound'] or 0) > 0 else 'v'}" for mean in cells)
        lines.append(f"{size_name('DINOv2', n, 'n'):>16}" + "".join(f"{cell:>18}" for cell in told))
    return [*lines, "v: d >= n; x: d < n, where no training brings the loss below (n - d)/n", ""]


def size_name(family: str, value: int, letter: str) -> str:
    """DiT-S d=384, or d=32 where the paper has no such size."""
    name = SIZES_OF_TABLE_13.get(value)
    return f"{family}-{name} {letter}={value}" if name else f"{letter}={value}"
