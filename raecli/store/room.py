"""Room on a disk: what is told of it, and asked for before work starts. No torch."""

import os
import shutil
from pathlib import Path

from raecli.errors import StorageError


def check_free(folder: Path, needed: int, what: str, advice: str) -> None:
    """Refuse what plainly has no room: StorageError with the bytes that `what` needs. The folder may be yet to be made.

    advice: what the user can do beside freeing space.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        raise StorageError(f"{folder}: {needed} bytes are needed for {what}, {free} are free; free space, {advice}")


def check_output(output: str | Path) -> None:
    """Refuse an output that this user cannot write, before any work is done for it. Errors of check_writable."""
    path = Path(output)
    check_writable(path if os.path.isdir(path) else path.parent, path)  # noqa: PTH112 - is_dir() raises where it may not look


def check_writable(folder: Path, output: Path) -> None:
    """Refuse a folder that this user cannot write to, or cannot make: StorageError telling what is in the way."""
    there = nearest_folder(folder)
    within = "" if there == output else f" in {there}"
    if not there.is_dir():
        raise StorageError(f"{output}: cannot be written: {there} is no folder; choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(
            f"{output}: no permission to write{within}: choose another output, or change its permissions"
        )


def nearest_folder(path: Path) -> Path:
    """What is there of a path that may be yet to be made."""
    candidates = [path, *path.parents, path.absolute(), *path.absolute().parents]
    return next(there for there in candidates if os.path.exists(there))  # noqa: PTH110 - exists() raises, see above


def bytes_told(count: int) -> str:
    """A size as one reads it, in powers of 1000: 61 kB, 3.4 MB, 504.1 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
