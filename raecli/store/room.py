"""Room on a disk, asked for before work starts. No torch."""

import shutil
from pathlib import Path

from raecli.errors import StorageError


def check_free(folder: Path, needed: int, what: str, advice: str) -> None:
    """Refuse what plainly has no room: StorageError with the bytes that `what` needs. The folder may be yet to be made.

    advice: what the user can do beside freeing space.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(f"{folder}: {needed} bytes are needed for {what}, {free} are free; free space, {advice}")
