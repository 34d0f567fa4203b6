"""A folder of reconstructions: reconstructions/KEY.png, originals/KEY.png, sheet.png, reconstructions.json last.

KEY is the image's name in its source as WebDataset writes one: class folders stay, endings go.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raecli.errors import InputError
from raecli.store.atomic import sweep_scratch, write_json
from raecli.store.json_file import read_json
from raecli.store.manifest import differing_fields
from raecli.store.samples import UNFINISHED, write_grid

PROTOCOL, RECONSTRUCTIONS, ORIGINALS, SHEET = "reconstructions.json", "reconstructions", "originals", "sheet.png"
FORMAT = "rae-reconstructions"
LEAST_SIDE = 64  # pixels of an image on the sheet; smaller ones are magnified without blur


def begin_reconstructions(folder: Path, protocol: dict[str, Any]) -> None:
    """Start or go on in a folder. Raises InputError if it holds reconstructions of another protocol, or others."""
    for place in (folder, *sub_folders(folder / RECONSTRUCTIONS), *sub_folders(folder / ORIGINALS)):
        sweep_scratch(place)
    for name in (PROTOCOL, UNFINISHED):
        if (folder / name).exists():
            found = read_protocol(folder / name)
            fields = differing_fields({key: found.get(key) for key in protocol}, protocol)
            if fields:
                lines = "".join(f"\n  {field}" for field in fields)
                raise InputError(f"{folder}: holds reconstructions made otherwise; choose another folder{lines}")
            return
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if foreign:
        raise InputError(f"{folder}: holds {foreign[0]} and nothing that says what made it; choose another folder")
    write_json(folder / UNFINISHED, protocol)


def sub_folders(folder: Path) -> list[Path]:
    """A folder and all folders below it; none if it is not there."""
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())] if folder.is_dir() else []


def finish_reconstructions(folder: Path, protocol: dict[str, Any]) -> None:
    """reconstructions.json, and nothing of the unfinished state. A finished folder is left as it is."""
    if not (folder / PROTOCOL).exists():
        write_json(folder / PROTOCOL, protocol)
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_protocol(path: Path) -> dict[str, Any]:
    """reconstructions.json, or what it is while the folder is not finished."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise InputError(f"{path}: says nothing of reconstructions; choose another folder")
    return found


def locate_reconstructions(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder with the images, and its protocol; {} where another program made them.

    path: what `rae reconstruct` wrote, the reconstructions in it, or any folder of images.
    """
    root = path if (path / PROTOCOL).exists() or (path / UNFINISHED).exists() else path.parent
    inside = path == root or path.name == RECONSTRUCTIONS
    if inside and (root / PROTOCOL).is_file():
        return root / RECONSTRUCTIONS, read_protocol(root / PROTOCOL)
    if inside and (root / UNFINISHED).is_file():
        raise InputError(f"{root}: not all of its images are made yet; run the same rae reconstruct again")
    return path, {}


def write_sheet(path: Path, originals: Sequence[np.ndarray], reconstructions: Iterable[np.ndarray]) -> None:
    """Each image [H, W, 3] with its reconstruction at its right, pair by pair; complete or absent."""
    pairs = [np.concatenate(pair, axis=1) for pair in zip(originals, reconstructions, strict=True)]
    factor = max(1, LEAST_SIDE // pairs[0].shape[0])
    write_grid(path, [pair.repeat(factor, axis=0).repeat(factor, axis=1) for pair in pairs], gap=2 * factor)
