"""C sources of ours, compiled once by the machine's compiler; where there is none, their callers do without."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path


@functools.lru_cache(maxsize=8)
def library_of(source: Path) -> ctypes.CDLL | None:
    """A C file as a library, whose calls let go of Python's lock; None without a compiler (`cc`, $CC) or room."""
    try:
        return ctypes.CDLL(str(built(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: nobody knows where home is
        return None


def built(source: Path) -> Path:
    """A source, compiled: once for each version of it and kind of machine, under the user's cache folder."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae"
    library = folder / f"{source.stem}-{platform.machine()}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            made.replace(library)
    return library
