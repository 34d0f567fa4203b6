"""What a conversion writes: a file or a folder that is complete or absent, and never in place of another unasked."""

import contextlib
import glob
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raecli.convert.settings import Request
from raecli.errors import UsageError
from raecli.store.atomic import SCRATCH, atomic_file, atomic_folder, sha256_of, write_json
from raecli.store.checkpoint import CONFIG, MODEL, contiguous
from raecli.store.statistics import STATISTICS, LatentStatistics
from raecli.store.tensors import save_tensors

Report = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """What was found in a source, all of it checked, and how it is written: nothing is before `write`."""

    report: Report
    write: Callable[[Path], None]  # into a scratch folder that is there, or to a scratch file
    is_folder: bool = True


def refuse_existing(path: Path, force: bool) -> None:
    """UsageError if something lies where the output goes, and it was not said to replace it."""
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; give another name, or --force to replace it")


def refuse_own_source(request: Request) -> None:
    """UsageError if the output would replace what is converted, or a folder around it."""
    if request.source.resolve().is_relative_to(request.output.resolve()):
        raise UsageError(f"{request.output} is what is converted, or holds it; give another name to write to")


def begin(path: Path, force: bool) -> None:
    """Make way for an output: its parent folder is there, and what a killed conversion to it left is gone.

    The folder may be shared with other work, so the scratch of nobody else is touched.
    """
    refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{SCRATCH}*-{glob.escape(path.name)}"):
        process = left.name.removeprefix(SCRATCH).partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def refuse_other_kind(path: Path, *, is_folder: bool) -> None:
    """UsageError if a folder would replace a file, or a file a folder."""
    if is_folder and path.is_file():
        raise UsageError(f"{path} is a file; the output is a folder")
    if not is_folder and path.is_dir():
        raise UsageError(f"{path} is a folder; the output is one file")


@contextlib.contextmanager
def new_output(path: Path, force: bool, *, is_folder: bool) -> Iterator[Path]:
    """Yield a scratch folder or file that becomes `path`; what was there is removed when the new one is whole."""
    begin(path, force)
    refuse_other_kind(path, is_folder=is_folder)
    with atomic_folder(path) if is_folder else atomic_file(path) as scratch:
        yield scratch


def finish_artifact(
    scratch: Path,
    *,
    weights: dict[str, Tensor],
    statistics: LatentStatistics | None,
    config: dict[str, Any],
    card: str,
) -> None:
    """Weights, statistics and card of an artifact, and last its configuration with their digests."""
    save_tensors(contiguous(weights), scratch / MODEL)
    if statistics is not None:
        statistics.save(scratch / STATISTICS)
    (scratch / "README.md").write_text(card, encoding="utf-8")
    files = [name for name in (MODEL, STATISTICS) if (scratch / name).is_file()]
    write_json(scratch / CONFIG, config | {"sha256": {name: sha256_of(scratch / name) for name in files}})


def provenance(request: Request, path: Path, entry: str, layout: str) -> dict[str, Any]:
    """Where converted weights came from: the layout, the repository if known, the file's name and digest."""
    told = {"from": layout, "repository": request.repository, "file": path.name}
    return told | {"sha256": sha256_of(path), "weights": entry}
