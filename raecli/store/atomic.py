"""Files and folders that are complete or absent: written aside, flushed, renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raecli.errors import InputError, RaeError, StorageError

SCRATCH = ".partial-"  # private names start with this, then the process
UMASK = os.umask(0)
os.umask(UMASK)


def scratch_of(path: Path) -> Path:
    """A private name beside `path`, told by this process's id."""
    return path.with_name(f"{SCRATCH}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path; on success it becomes `path`, on failure it is gone. Never replaces a device or a pipe."""
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: is no regular file; give another name to write to")
    scratch = scratch_of(path)
    try:
        yield scratch
        scratch.chmod(0o666 & ~UMASK)  # safetensors writes files for their owner alone
        flush_to_disk(scratch)
        scratch.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        name_file(error, path, scratch)
        raise
    finally:
        with contextlib.suppress(PermissionError, NotADirectoryError):  # where nothing could be made, nothing is left
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a scratch folder; on success it becomes `path`, in place of one that is there; on failure it is gone."""
    scratch = scratch_of(path)
    shutil.rmtree(scratch, ignore_errors=True)  # of a dead process with our number
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path_inside in scratch.rglob("*"):
            if path_inside.is_file():
                path_inside.chmod(0o666 & ~UMASK)
            flush_to_disk(path_inside)
        flush_to_disk(scratch)
        if path.exists():
            remove_folder(path)
        scratch.rename(path)
        flush_to_disk(path.parent)
    except OSError as error:
        name_file(error, path, scratch)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def name_file(error: OSError, path: Path, scratch: Path) -> None:
    """Have an error name the file that was asked for: a failed write knows none, a user no scratch."""
    if error.filename is None or os.fspath(error.filename) == str(scratch):
        error.filename = str(path)


def remove_folder(path: Path) -> None:
    """Take a folder away: first its name, so that nothing half-deleted is ever found under it."""
    grave = scratch_of(path.with_name(f"old-{path.name}"))
    shutil.rmtree(grave, ignore_errors=True)
    path.rename(grave)
    shutil.rmtree(grave)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")  # half characters of foreign JSON


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted nothing, two spaces, a last newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep_scratch(folder: Path) -> None:
    """Remove what dead processes left half-written. For who holds the folder (store/lock.py), before others write."""
    for path in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told_error(error: OSError) -> RaeError:
    """An operating system's refusal, in words of the user's: InputError of what may not be read, else StorageError."""
    where = error.filename or "(unnamed file)"
    if error.errno == errno.EACCES and error.filename and (barrier := barrier_to(Path(os.fsdecode(where)))):
        within = "" if str(barrier) == str(where) else f" to look into {barrier}"
        return InputError(f"{where}: cannot be read: no permission{within}; change its permissions, or name another")
    hints = {
        errno.ENOSPC: "the disk is full: free space, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free space, then run the same command again",
        errno.EACCES: "no permission: choose another output, or change its permissions",
        errno.EROFS: "the file system is read-only: choose another output",
    }
    return StorageError(f"{where}: {hints.get(error.errno or 0, error.strerror or error)}")


def barrier_to(path: Path) -> Path | None:
    """What keeps this user from reading a path: a folder above it that may not be entered, or itself; or None."""
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return folder
    return path if os.path.lexists(path) and not os.access(path, os.R_OK) else None
