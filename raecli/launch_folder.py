"""A launcher's own folder among the system's temporary ones: its workers' recipe, and what they ended with."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raecli.store.lock import locked

PREFIX, HOST = "rae-launch-", "host"


@contextlib.contextmanager
def launch_folder() -> Iterator[Path]:
    """A folder that goes when this process is done with it. Those of launchers that were killed go now.

    The folder itself is locked: systemd-tmpfiles, which removes what is old, leaves a locked folder alone.
    """
    sweep_folders(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, opened_folder(Path(name)) as handle:
        with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps a folder that tells no host
            fcntl.flock(handle, fcntl.LOCK_EX)
            Path(name, HOST).write_bytes(this_host())  # locked before: whoever reads it finds it held
        yield Path(name)


def sweep_folders(temporary: Path) -> None:
    """Remove the folders whose launchers are gone: the system lets go of a lock when its process dies."""
    for folder in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), opened_folder(folder) as handle:  # another user's, or gone meanwhile
            if (folder / HOST).read_bytes() == this_host() and locked(handle, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """A handle of a folder, which can be locked."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def this_host() -> bytes:
    """This machine since it was started: a lock on a folder that several machines see may hold on one of them alone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname().encode() + b" " + (boot.read_bytes() if boot.exists() else b"unknown\n")
