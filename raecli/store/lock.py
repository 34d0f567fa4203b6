"""One writer a folder: the second is refused, and told who the first is."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from raecli.errors import UsageError

LOCK = ".lock"
JOIN_SECONDS = 10.0  # how long one who joins waits for another who is just beginning


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


@contextlib.contextmanager
def share_folder(folder: Path, begin: Callable[[bool], None]) -> Iterator[None]:
    """Hold a folder together with others that share it; `begin(alone)` comes first, with nobody else inside if alone.

    Raises UsageError if one is at work there who does not share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+") as file:
        alone = locked(file, fcntl.LOCK_EX)
        if not alone and not locked(file, fcntl.LOCK_SH, JOIN_SECONDS):
            raise UsageError(f"{folder}: another rae is writing here without --join; wait, or stop it")
        begin(alone)
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            if locked(file, fcntl.LOCK_EX):  # the last one
                path.unlink(missing_ok=True)


def locked(file: IO[str] | int, kind: int, seconds: float = 0.0) -> bool:
    """Try to lock a file or an open folder, for some seconds; whether it is locked now."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)


class Claims:
    """Pieces of work in a shared folder, each taken by one process: a file that is locked while it is at work.

    The system lets go of a claim when its process dies. On a network folder that takes a file system whose `flock`
    reaches across machines: NFS from Linux 2.6.12 on, Lustre mounted with -o flock, GPFS, CephFS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, IO[str]] = {}

    def take(self, name: str) -> bool:
        """Claim a piece of work, if nobody has it."""
        file = self.path(name).open("a+")
        if locked(file, fcntl.LOCK_EX) and self.is_current(name, file):
            self.held[name] = file
            return True
        file.close()
        return False

    def is_current(self, name: str, file: IO[str]) -> bool:
        """Whether the file that was locked still has its name: who held it before removes it."""
        try:
            return self.path(name).stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def release(self, name: str) -> None:
        """Let go of it."""
        if file := self.held.pop(name, None):
            self.path(name).unlink(missing_ok=True)
            file.close()

    def path(self, name: str) -> Path:
        """Where it is claimed."""
        return self.folder / f"{name}.claim"


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for a lock on a file of any name, and hold it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
