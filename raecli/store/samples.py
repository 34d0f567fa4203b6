"""A folder of samples: 000000.png ..., samples.npz, grid.png, trajectory.png, and samples.json, the protocol, last."""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from raecli.errors import InputError
from raecli.store.atomic import atomic_file, scratch_of, sweep_scratch, write_json
from raecli.store.json_file import read_json
from raecli.store.manifest import differing_fields
from raecli.store.room import check_free

PROTOCOL, UNFINISHED, NPZ = "samples.json", "unfinished.json", "samples.npz"
GRID, TRAJECTORY = "grid.png", "trajectory.png"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
BLOCK = 4096  # bytes that the smallest file takes on a disk
PNG_SHARE = 0.1  # of the pixels' bytes: no natural image is packed tighter


def image_file(folder: Path, index: int) -> Path:
    """000042.png"""
    return folder / f"{index:06d}.png"


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there, from its first byte to its last: every chunk's CRC is computed anew."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    if not data.startswith(PNG_START):
        return False
    place = len(PNG_START)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data) or zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return False
        if data[place + 4 : place + 8] == PNG_END:
            return end == len(data)
        place = end
    return False


def check_space(folder: Path, *, images: int, side: int, format: str) -> None:
    """Refuse what plainly has no room. images: still to be made; side: pixels. Raises StorageError."""
    pixels = 3 * side**2
    needed = int(images * max(BLOCK, PNG_SHARE * pixels)) + (images * pixels if format != "png" else 0)
    check_free(folder, needed, f"{images} images at least", "choose another folder, or fewer images")


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
            found = read_protocol(folder / name)
            fields = differing_fields({key: found.get(key) for key in protocol}, protocol)
            if fields:
                lines = "".join(f"\n  {field}" for field in map(shortened, fields))
                raise InputError(f"{folder}: holds samples made otherwise; choose another folder or delete it{lines}")
            return
    foreign = sorted(path.name for path in folder.glob("[0-9]*.png"))
    if foreign:
        raise InputError(f"{folder}: holds {foreign[0]} and nothing that says what made it; choose another folder")
    write_json(folder / UNFINISHED, protocol)


def shortened(text: str, most: int = 300) -> str:
    """A line for the screen: a list of all labels is none."""
    return text if len(text) <= most else f"{text[:most]} ..."


def read_protocol(path: Path) -> dict[str, Any]:
    """samples.json or unfinished.json. Raises InputError if it is damaged."""
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(f"{error}; delete its folder, or choose another one") from None


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
    write_picture(path, sheet_of(images, columns, gap))


def write_trajectory(path: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], gap: int = 2) -> None:
    """Rows of images [H, W, 3] of one size, a title above each column."""
    columns = len(titles)
    sheet = sheet_of([image for row in rows for image in row], columns, gap)
    head = Image.new("RGB", (sheet.width, 16), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(head).text((column * (sheet.width - gap) // columns + gap, 2), title, fill="black")
    picture = Image.new("RGB", (sheet.width, head.height + sheet.height), "white")
    picture.paste(head, (0, 0))
    picture.paste(sheet, (0, head.height))
    write_picture(path, picture)


def sheet_of(images: Sequence[np.ndarray], columns: int, gap: int) -> Image.Image:
    """Images row by row on white; small ones are magnified without blur, to 64 pixels at least."""
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for place, pixels in enumerate(images):
        top, left = gap + place // columns * (height + gap), gap + place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels
    factor = max(1, math.ceil(64 / max(height, width)))
    return Image.fromarray(sheet).resize((sheet.shape[1] * factor, sheet.shape[0] * factor), Image.Resampling.NEAREST)


def write_picture(path: Path, picture: Image.Image) -> None:
    """A PNG, atomically."""
    with atomic_file(path) as scratch:
        picture.save(scratch, format="PNG")


def by_label(labels: Iterable[int], count: int) -> list[int]:
    """The first `count` image indices, those of one class beside each other."""
    chosen = list(enumerate(labels))[:count]
    return [index for index, label in sorted(chosen, key=lambda pair: (pair[1], pair[0]))]
