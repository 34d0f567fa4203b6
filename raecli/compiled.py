"""C sources of ours, compiled once by the machine's compiler; where there is none, their callers do without."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SCRATCH = "compiling-"
SECONDS = 60.0  # that a compiler may take


@functools.lru_cache(maxsize=8)
def library_of(source: Path) -> ctypes.CDLL | None:
    """A C file as a library, whose calls let go of Python's lock; None without a compiler (`cc`, $CC) or room."""
    try:
        return ctypes.CDLL(str(built(source)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # no home; a $CC that no shell reads
        return None


def sweep(folder: Path) -> None:
    """Remove what compilers left that were killed."""
    for left in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # of a compiler that has just ended
            if time.time() - left.stat().st_mtime > 2 * SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def built(source: Path) -> Path:
    """A source, compiled: once for each version of it and kind of machine, under the user's cache folder."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (told if told.is_absolute() else Path.home() / ".cache") / "rae"  # the standard ignores relative ones
    library = folder / f"{source.stem}-{platform.machine()}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            made = Path(scratch) / library.name
            compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
            command = [*compiler, "-O3", "-shared", "-fPIC", "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(library)
    return library
