"""Improved precision and recall: which samples lie inside the other set's balls of third neighbours.

Kynkaanniemi et al. (2019), with the conventions of ADM's evaluator: squared distances, k = 3 without the point itself,
`<=`. Distances come in tiles, so 50,000 x 10,000 features take no more memory than the features and a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raecli.metrics.feature_file import Rows

NEIGHBOUR = 3  # the radius of a point's ball: its third neighbour, the point itself not counted
ADM_BLOCK = 10_000  # rows and columns of ADM's blocks of distances
TILE = 1250  # rows and columns of ours; no tile crosses a border of ADM's blocks
HALF_MAX = 65504.0
PrPrecision = Literal["exact", "adm"]
Share = tuple[int, int]  # rank, world: which of the tiles are this rank's


class Distances:
    """Squared distances between two sets of features [N, D] and [M, D], by the rule of `precision`, tile by tile.

    exact: float32 throughout. adm: as ADM's evaluator on a GPU: float16 features, products summed in float32, norms,
    products and their sum rounded to float16; a 10000 x 10000 block with an entry that is not finite is computed in
    float32 as a whole. An entry near 300 has a half's step of 0.25, so ties appear and `<=` counts them.
    """

    def __init__(self, rows: Rows, columns: Rows, precision: PrPrecision) -> None:
        """rows, columns: float32; they may stay in a file."""
        self.rows, self.columns, self.precision = rows, columns, precision
        self.norms = (norms(rows, half=False), norms(columns, half=False))
        self.half_norms = (norms(rows, half=True), norms(columns, half=True)) if precision == "adm" else self.norms
        self.fits: dict[tuple[int, int], bool] = {}

    def parts(self, top: int, left: int, half: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """|u|^2 [R], u . v [R, S] and |v|^2 [S] of one tile, for `combined`. half: None asks the tile's block."""
        if half is None:
            half = self.precision == "adm" and self.fits_half(top // ADM_BLOCK, left // ADM_BLOCK)
        row_norms, column_norms = self.half_norms if half else self.norms
        rows, columns = self.rows[top : top + TILE], self.columns[left : left + TILE]
        return row_norms[top : top + TILE], products(rows, columns, half), column_norms[left : left + TILE]

    def fits_half(self, row: int, column: int) -> bool:
        """Whether every distance of a block of ADM's grid is finite in float16."""
        if (row, column) not in self.fits:
            self.fits[row, column] = self.is_small(row, column) or all(
                bool(combined(*self.parts(top, left, half=True)).isfinite().all())
                for top in block_range(row, len(self.rows))
                for left in block_range(column, len(self.columns))
            )
        return self.fits[row, column]

    def is_small(self, row: int, column: int) -> bool:
        """Whether norms alone tell that no |u|^2 + 2 |u| |v| + |v|^2 of a block reaches the largest half."""
        rows = self.half_norms[0][row * ADM_BLOCK : (row + 1) * ADM_BLOCK]
        columns = self.half_norms[1][column * ADM_BLOCK : (column + 1) * ADM_BLOCK]
        return max(rows.max().item(), columns.max().item()) < HALF_MAX / 4.1


def block_range(block: int, size: int) -> range:
    """Where the tiles of a block of ADM's grid begin."""
    return range(block * ADM_BLOCK, min((block + 1) * ADM_BLOCK, size), TILE)


def norms(features: Rows, half: bool) -> Tensor:
    """|u|^2 [N] of features [N, D]; where `half`, of float16 features and rounded to float16."""
    found = torch.empty(len(features), dtype=torch.float16 if half else torch.float32, device=features.device)
    for start in range(0, len(features), TILE):  # into one array: small results between large ones fragment memory
        part = features[start : start + TILE]
        found[start : start + TILE] = part.half().square().float().sum(1) if half else part.square().sum(1)
    return found


def products(rows: Tensor, columns: Tensor, half: bool) -> Tensor:
    """u . v [R, S], summed in float32; where `half`, of float16 features and rounded to float16."""
    if not half:
        return rows @ columns.T
    return (rows.half().float() @ columns.half().float().T).half()


def combined(norms_u: Tensor, product: Tensor, norms_v: Tensor) -> Tensor:
    """max(|u|^2 - 2 u.v + |v|^2, 0) [R, S], each step rounded to the operands' type; float32."""
    return (norms_u[:, None] - 2 * product + norms_v).clamp_min_(0).float()


def nearest_distances(features: Rows, precision: PrPrecision, share: Share = (0, 1)) -> Tensor:
    """The 4 least squared distances [N, 4] from each point of a set to the set, itself included.

    Of this rank's tiles alone; infinity where they have fewer. A tile above the diagonal serves its rows and, mirrored,
    its columns.
    """
    distances = Distances(features, features, precision)
    best = torch.full((len(features), NEIGHBOUR + 1), torch.inf, device=features.device)
    for top, left in shared(upper_tiles(len(features)), share):
        row_norms, product, column_norms = distances.parts(top, left)
        keep_least(best[top : top + TILE], combined(row_norms, product, column_norms))
        if left > top:
            keep_least(best[left : left + TILE], combined(column_norms, product.T, row_norms))
    return best


def keep_least(best: Tensor, found: Tensor) -> None:
    """Merge distances [R, S] into the 4 least [R, 4], in place."""
    least = found.topk(min(NEIGHBOUR + 1, found.shape[1]), largest=False).values
    best.copy_(torch.cat([best, least], 1).topk(NEIGHBOUR + 1, largest=False).values)


def radii(nearest: Tensor) -> Tensor:
    """Squared radius [N] of each point's ball, of the 4 least distances [W, N, 4] that W ranks found."""
    return nearest.transpose(0, 1).flatten(1).sort(1).values[:, NEIGHBOUR]


@dataclass(frozen=True)
class Covered:
    """Which samples lie in a ball of the reference [N], and which reference points in one of the samples' [M]."""

    samples: Tensor
    reference: Tensor


def covered(
    samples: Rows,
    reference: Rows,
    sample_radii: Tensor,
    reference_radii: Tensor,
    precision: PrPrecision,
    share: Share = (0, 1),
) -> Covered:
    """Compare each distance from reference to sample with both radii, `<=`; of this rank's tiles alone.

    Precision is the mean of `samples`, recall that of `reference`, after a logical or over ranks.
    """
    distances = Distances(reference, samples, precision)
    found = Covered(*(torch.zeros(len(side), dtype=torch.bool, device=side.device) for side in (samples, reference)))
    places = [(top, left) for top in range(0, len(reference), TILE) for left in range(0, len(samples), TILE)]
    for top, left in shared(places, share):
        tile = combined(*distances.parts(top, left))
        found.samples[left : left + TILE] |= (tile <= reference_radii[top : top + TILE, None]).any(0)
        found.reference[top : top + TILE] |= (tile <= sample_radii[left : left + TILE]).any(1)
    return found


def upper_tiles(size: int) -> list[tuple[int, int]]:
    """First row and column of the tiles on and above the diagonal."""
    return [(top, left) for top in range(0, size, TILE) for left in range(top, size, TILE)]


def shared(places: list[tuple[int, int]], share: Share) -> Iterator[tuple[int, int]]:
    """This rank's tiles."""
    rank, world = share
    yield from places[rank::world]
