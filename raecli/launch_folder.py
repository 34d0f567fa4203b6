"""A launcher's own folder among the system's temporary ones: its workers' recipe, and what they ended with."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raecli.store.lock import locked

PREFIX, LOCK = "rae-launch-", "lock"


@contextlib.contextmanager
def launch_folder() -> Iterator[Path]:
    """A folder that goes when this process is done with it. Those of launchers that were killed go now."""
    sweep_folders(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, (Path(name) / "new").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(file.name).rename(Path(name) / LOCK)  # whoever sees a lock finds it held
        yield Path(name)


def sweep_folders(temporary: Path) -> None:
    """Remove the folders whose launchers are gone: the system lets go of a lock when its process dies."""
    for folder in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r+") as file:  # another user's, or gone meanwhile
            if locked(file, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
