"""A folder of samples: 000000.png ..., samples.npz, grid.png, and samples.json with the whole protocol, last."""

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raecli.errors import InputError
from raecli.store.atomic import atomic_file, scratch_of, sweep_scratch, write_json
from raecli.store.manifest import differing_fields

PROTOCOL, UNFINISHED, NPZ, GRID = "samples.json", "unfinished.json", "samples.npz", "grid.png"
PNG_END = b"IEND\xaeB`\x82"


def image_file(folder: Path, index: int) -> Path:
    """000042.png"""
    return folder / f"{index:06d}.png"


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there and has its end."""
    if not path.is_file() or path.stat().st_size < len(PNG_END):
        return False
    with path.open("rb") as file:
        file.seek(-len(PNG_END), 2)
        return file.read() == PNG_END


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] aside, then rename. Not flushed one by one: a cut file is known by its missing end."""
    scratch = scratch_of(path)
    try:
        Image.fromarray(pixels).save(scratch, format="PNG", compress_level=1)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def begin_samples(folder: Path, protocol: dict[str, Any]) -> None:
    """Start or go on in a folder. Raises InputError if it holds samples of another protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep_scratch(folder)
    for name in (PROTOCOL, UNFINISHED):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            fields = differing_fields({key: found.get(key) for key in protocol}, protocol)
            if fields:
                lines = "".join(f"\n  {field}" for field in fields)
                raise InputError(f"{folder}: holds samples made otherwise; choose another folder or delete it{lines}")
            return
    foreign = sorted(path.name for path in folder.glob("[0-9]*.png"))
    if foreign:
        raise InputError(f"{folder}: holds {foreign[0]} and nothing that says what made it; choose another folder")
    write_json(folder / UNFINISHED, protocol)


def finish_samples(folder: Path, protocol: dict[str, Any]) -> None:
    """samples.json, and nothing of the unfinished state."""
    write_json(folder / PROTOCOL, protocol)
    (folder / UNFINISHED).unlink(missing_ok=True)


def write_npz(folder: Path, count: int) -> Path:
    """Stream the folder's images into `arr_0`, uint8 NHWC, as ADM's evaluator reads it; one image at a time."""
    height, width, channels = read_png(image_file(folder, 0)).shape
    with atomic_file(folder / NPZ) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))  # no clock in the bytes
        with archive.open(entry, "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(count):
                file.write(read_png(image_file(folder, index)).tobytes())
    return folder / NPZ


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_grid(path: Path, images: Sequence[np.ndarray], gap: int = 2) -> None:
    """Images [H, W, 3] of one size on a nearly square sheet, row by row; small ones are magnified without blur."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for place, pixels in enumerate(images):
        top, left = gap + place // columns * (height + gap), gap + place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels
    factor = max(1, 64 // max(height, width))
    picture = Image.fromarray(sheet).resize(
        (sheet.shape[1] * factor, sheet.shape[0] * factor), Image.Resampling.NEAREST
    )
    with atomic_file(path) as scratch:
        picture.save(scratch, format="PNG")


def by_label(labels: Iterable[int], count: int) -> list[int]:
    """The first `count` image indices, those of one class beside each other."""
    chosen = list(enumerate(labels))[:count]
    return [index for index, label in sorted(chosen, key=lambda pair: (pair[1], pair[0]))]
