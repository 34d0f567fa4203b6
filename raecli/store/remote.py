"""A latent cache that lies elsewhere: shards come over when they are needed, into a local folder of bounded size.

https:// and http:// are read with Python's own client; s3://, gs:// and the like through fsspec, with the package that
each of them asks for. No shell, no pipe. What has arrived is held against the manifest's digest before it is used.
"""

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raecli.errors import InputError, StorageError, UsageError
from raecli.store.atomic import sha256_of, write_json
from raecli.store.json_file import read_json
from raecli.store.lock import one_at_a_time

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
TABLES = ("index.safetensors", "statistics.safetensors", "manifest.json")
PLACE = "remote.json"  # in the local folder: where the rest of it is
CHUNK = 1 << 22
SECONDS = 60.0  # a server that says nothing for so long is given up


def is_url(cache: str | Path) -> bool:
    """Whether a cache is told by a URL."""
    return isinstance(cache, str) and URL.match(cache) is not None


def local_folder(cache: str | Path) -> Path:
    """The folder of a cache; of one at a URL its local copy, with its manifest and tables in it.

    Raises InputError if there is none at the URL, UsageError if its protocol's package is missing.
    """
    if not is_url(cache):
        return Path(cache)
    url = str(cache).rstrip("/")
    with opened(f"{url}/manifest.json", 0)[0] as stream:
        manifest = stream.read()
    digest = hashlib.sha256(url.encode() + manifest).hexdigest()[:24]  # another manifest is another cache
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae" / "latents" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: the local copy of {url} cannot be made there ({error.strerror}): set XDG_CACHE_HOME to a "
            "folder with room"
        ) from None
    with one_at_a_time(folder / "tables.lock"):
        for name in TABLES:  # the manifest last
            if not (folder / name).is_file():
                (folder / f"{name}.part").unlink(missing_ok=True)
                download(f"{url}/{name}", folder / f"{name}.part")
                (folder / f"{name}.part").replace(folder / name)
        write_json(folder / PLACE, {"url": url})
    return folder


@dataclass
class RemoteShards:
    """The shards of a cache at a URL, and the room that their local copies may take."""

    url: str
    folder: Path
    limit_bytes: float

    def fetch(self, name: str, size: int, sha256: str, let_go: Callable[[], None]) -> None:
        """Have a shard here, whole. Raises InputError if what arrives is not what the manifest tells.

        let_go: called once others were removed for it and before it comes, so that their room is free by then.
        """
        path, part = self.folder / name, self.folder / f"{name}.part"
        with one_at_a_time(self.folder / f"{name}.lock"):  # other ranks of this machine want it too
            if path.is_file():
                os.utime(path)
                return
            self.make_room(size)
            let_go()
            download(f"{self.url}/{name}", part)
            if sha256_of(part) != sha256:
                found = part.stat().st_size
                part.unlink()
                raise InputError(f"{self.url}/{name}: not what the manifest tells ({found} bytes, {size} expected)")
            part.replace(path)

    def make_room(self, size: int) -> None:
        """Remove the shards that were asked for longest ago, until another one fits."""
        if size > self.limit_bytes:
            raise UsageError(
                f"{self.url}: a shard takes {size / 1e9:.3f} GB, remote_cache_gb allows {self.limit_bytes / 1e9:.3f}: "
                "raise it"
            )
        shards = sorted(self.folder.glob("shard-*.tar"), key=lambda path: path.stat().st_mtime)
        room = self.limit_bytes - size - sum(path.stat().st_size for path in shards)
        for path in shards:
            if room >= 0:
                return
            room += path.stat().st_size
            path.unlink(missing_ok=True)


def remote_of(folder: Path, limit_gb: float) -> RemoteShards | None:
    """Where the shards of a folder come from; None: they lie in it."""
    place = folder / PLACE
    if not place.is_file():
        return None
    return RemoteShards(read_json(place)["url"], folder, limit_gb * 1e9)


def download(url: str, part: Path) -> None:
    """Bring a file over, on from where an earlier try was cut off. Raises InputError if it cannot be had."""
    stream, start = opened(url, part.stat().st_size if part.exists() else 0)
    try:
        with stream, part.open("r+b" if part.exists() else "wb") as file:
            file.seek(start)
            file.truncate()
            while chunk := stream.read(CHUNK):
                file.write(chunk)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(f"{url}: cut off ({error}); run the same command again, it goes on from there") from None


def opened(url: str, offset: int) -> tuple[IO[bytes], int]:
    """A file at a URL as a stream, and the byte it begins with: `offset`, or 0 if the server knows no ranges."""
    if url.startswith(("http://", "https://")):
        return opened_by_http(url, offset)
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        stream: Any = system.open(path, "rb")
        stream.seek(offset)
    except ImportError as error:
        raise UsageError(f"{url}: its protocol needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from None
    except OSError as error:
        raise InputError(f"{url}: cannot be read: {error.strerror or error}") from None
    return stream, offset


def opened_by_http(url: str, offset: int) -> tuple[IO[bytes], int]:
    """The same by Python's own client."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left beyond the offset
            return opened_by_http(url, 0)
        raise InputError(f"{url}: the server says {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError) as error:
        raise InputError(f"{url}: cannot be read: {error}") from None
    return response, offset if response.status == 206 else 0
