"""Mean and covariance of features, accumulated in float64: the same for any batch size, and exact over ranks."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError
from raecli.store.atomic import atomic_file
from raecli.store.foreign import ARRAYS
from raecli.store.json_file import parse_json


@dataclass(frozen=True)
class Moments:
    """A Gaussian fitted to features: what a Frechet distance compares.

    mean: [D], covariance: [D, D] divided by samples - 1; both float64. samples: None where a file does not tell.
    provenance: where they came from, plain JSON values.
    """

    mean: Tensor
    covariance: Tensor
    samples: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


class FeatureStatistics:
    """Running count, mean [D] and scatter [D, D] = sum of (x - mean)(x - mean)^T, in float64.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). Sums of
    outer products would lose all digits where the mean is large beside the spread; this does not.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """Nothing seen yet. `dim`: D, channels of a feature."""
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor, names: Sequence[str] = ()) -> None:
        """Take in features [B, D] of any float type. `names`: the samples', for the message if one is not finite."""
        if len(features) == 0:
            return
        features = features.to(self.mean)
        check_finite(features, names, self.count)
        batch = type(self)(self.mean.numel(), self.mean.device)
        batch.count = len(features)
        batch.mean = features.mean(0)
        centred = features - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: Self) -> None:
        """Take in what another has seen. Chan et al. (1979), eq. 2.1 for vectors."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(delta, delta, alpha=self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def packed(self) -> Tensor:
        """The whole state as one float64 vector [1 + D + D * D], to send it to another rank."""
        count = torch.full((1,), self.count, dtype=torch.float64, device=self.mean.device)
        return torch.cat([count, self.mean, self.scatter.flatten()])

    @classmethod
    def unpacked(cls, packed: Tensor, dim: int) -> Self:
        """The state that `packed` was taken of."""
        statistics = cls(dim, packed.device)
        count, statistics.mean, scatter = packed.split([1, dim, dim * dim])
        statistics.count, statistics.scatter = int(count), scatter.view(dim, dim)
        return statistics

    def covariance(self) -> Tensor:
        """[D, D], unbiased: divided by count - 1, as numpy.cov and ADM's evaluator do."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples, found {self.count}")
        return self.scatter / (self.count - 1)

    def moments(self, provenance: dict[str, Any] | None = None) -> Moments:
        """The Gaussian fitted to everything seen."""
        return Moments(self.mean, self.covariance(), self.count, provenance or {})


def merge_in_order(states: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """All states as one. Sums are taken in the order given: with ranks in rank order every run has the same bits."""
    merged: FeatureStatistics | None = None
    for state in states:
        if merged is None:
            merged = FeatureStatistics(state.mean.numel(), state.mean.device)
        merged.merge(state)
    assert merged is not None, "a job has at least one rank"
    return merged


def check_finite(features: Tensor, names: Sequence[str], start: int) -> None:
    """Refuse NaN and infinity, naming the first sample that has one. `start`: samples seen before this batch."""
    finite = features.isfinite().all(1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    name = names[row] if row < len(names) else f"sample {start + row}"
    raise NonFiniteError(f"{name}: its features hold NaN or infinity; look at the image and at the feature network")


MOST_BYTES = 2**28  # of one array: a float64 covariance of 5,792 features; the widest encoder has 4,096
SEMI_DEFINITE = 1e-5  # of the trace: an eigenvalue below minus this is no rounding, not even of float32 statistics
SUFFIXES = {"pool": "", "spatial": "_s", "dinov2": "_d"}  # of mu and sigma in an npz, by layer; the first two are ADM's


def save_statistics(path: Path, layers: dict[str, Moments], provenance: dict[str, Any]) -> None:
    """Write several layers' Gaussians of one set of images: n, mu, sigma, mu_s ..., provenance; complete or absent."""
    arrays = {}
    for layer, moments in layers.items():
        arrays[f"mu{SUFFIXES[layer]}"] = moments.mean.cpu().numpy()
        arrays[f"sigma{SUFFIXES[layer]}"] = moments.covariance.cpu().numpy()
        if moments.samples is not None:
            arrays["n"] = np.array(moments.samples, dtype=np.int64)
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, provenance=np.array(json.dumps(provenance)), **arrays)


def load_moments(path: Path, suffix: str = "") -> Moments | None:
    """Stored statistics of an npz: keys mu, sigma and, in ours, n and provenance. None if it stores none.

    suffix: "" for the pooled features, "_s" for ADM's spatial ones. Reads no other array of the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if f"mu{suffix}" not in file or f"sigma{suffix}" not in file:
                return None
            check_room(path, file.zip)
            mean, covariance = file[f"mu{suffix}"], file[f"sigma{suffix}"]
            samples = int(file["n"]) if "n" in file else None
            text = str(file["provenance"]) if "provenance" in file else "{}"
    except ARRAYS as error:
        raise InputError(f"{path}: its statistics cannot be read ({error}); make or download the file again") from error
    return checked_moments(path, mean, covariance, samples, parse_json(text, f"{path}: its provenance"))


def check_room(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse statistics that would unpack to more than those of any network take."""
    for entry in archive.infolist():
        if entry.filename.startswith(("mu", "sigma")) and entry.file_size > MOST_BYTES:
            raise InputError(f"{path}: {entry.filename} takes {entry.file_size} bytes; no network's statistics do")


def checked_moments(
    path: Path, mean: np.ndarray, covariance: np.ndarray, samples: int | None, provenance: dict[str, Any]
) -> Moments:
    """Stored arrays as Moments in float64, or an InputError that says what is wrong with them."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: mu has shape {list(mean.shape)} and sigma {list(covariance.shape)}; expected [D] and [D, D]"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"{path}: mu is {mean.dtype} and sigma {covariance.dtype}; expected floats")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: mu or sigma hold NaN or infinity; make the statistics again")
    if samples is not None and samples < 1:
        raise InputError(f"{path}: n is {samples}; make the statistics again")
    found = Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), samples, provenance)
    if not is_covariance(found.covariance):
        raise InputError(f"{path}: sigma is no covariance (not symmetric, or of negative variance); make it again")
    return found


def is_covariance(matrix: Tensor) -> bool:
    """Whether a finite [D, D] is symmetric and positive semi-definite within rounding: one Cholesky, D^3 / 3."""
    slack = SEMI_DEFINITE * matrix.diagonal().abs().sum()
    if (matrix - matrix.T).abs().max() > slack:
        return False
    lifted = (matrix + matrix.T) / 2
    lifted.diagonal().add_(slack + torch.finfo(torch.float64).tiny)
    return int(torch.linalg.cholesky_ex(lifted).info) == 0
