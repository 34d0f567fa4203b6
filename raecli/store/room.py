"""Room on a disk, asked for before work starts. No torch."""

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


def check_writable(folder: Path) -> None:
    """Refuse a folder that this user cannot write to, or cannot make: StorageError with the path that is in the way."""
    there = nearest_folder(folder)
    if not there.is_dir():
        raise StorageError(f"{there}: is no folder, so nothing can be written below it: choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{there}: no permission to write there: choose another output, or change its permissions")


def nearest_folder(path: Path) -> Path:
    """What is there of a path that may be yet to be made."""
    return next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())
