"""One writer a folder: the second is refused, and told who the first is."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from raecli.errors import UsageError

LOCK = ".lock"


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    Raises UsageError naming the holder's host and process if another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError  # the holder before us has just removed this very file
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder}: another rae is writing here ({file.read().strip() or 'unknown'}); wait, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
