"""Where images come from: class folders, a flat folder, or WebDataset tars. Listed in a fixed order, read by index."""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raecli.errors import InputError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
KEY_LENGTH = 80  # a tar's name has room for 100, with the ending


@dataclass(frozen=True)
class ImageItem:
    """One image: its name in the source, its label, its size, and where its bytes lie."""

    name: str
    label: int
    size: int
    file: Path
    offset: int | None = None  # inside a tar

    def read(self) -> bytes:
        """The encoded image. Raises InputError naming it if it cannot be read."""
        if self.offset is None and not self.file.is_file():  # a pipe would be waited for, a device never ends
            raise InputError(f"{self.name}: not a readable file: a pipe, a device, or a link to nothing")
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset or 0)
                return file.read() if self.offset is None else file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.name}: not a readable file: {error.strerror}") from None


@dataclass(frozen=True)
class ImageSource:
    """All images of a source, sorted by name, and the names of their classes (none for a flat folder)."""

    path: Path
    items: tuple[ImageItem, ...]
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """sha256 of names, labels and sizes: tells a changed source without reading its images."""
        lines = "".join(f"{item.name}\t{item.label}\t{item.size}\n" for item in self.items)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def open_images(source: str | Path) -> ImageSource:
    """List a source. Raises InputError if it is missing or holds no image."""
    path = Path(source)
    if not str(source):
        raise InputError("the name of the images' folder is empty")
    one_tar = path.is_file() and path.suffix == ".tar"
    if not one_tar and not path.is_dir():
        raise InputError(f"{path}: no such folder of images (class folders, a flat folder, or WebDataset tars)")
    tars = [path] if one_tar else sorted(file for file in path.glob("*.tar") if file.is_file())
    beside = files_below(path) if tars and not one_tar else iter(())
    loose = next((file for file in beside if file.suffix.lower() in EXTENSIONS), None)
    if loose:
        raise InputError(
            f"{path}: holds tars ({tars[0].name}) and images beside them ({loose.relative_to(path)}); "
            "move one of both away, or name the tar"
        )
    result = tar_source(path, tars) if tars else folder_source(path)
    unsayable = [item.name for item in result.items if not is_utf8(item.name)]
    if unsayable:
        raise InputError(f"{path}: {unsayable[0]!r} is no UTF-8 name, which a manifest could not hold; rename it")
    if not result.items:
        raise InputError(
            f"{path}: no images in it; known endings: {', '.join(sorted(EXTENSIONS))}, or .tar files of them"
        )
    return result


def folder_source(path: Path) -> ImageSource:
    """Class folders, where the first folder of a file's path names its class; or a flat folder without classes."""
    files = sorted(file for file in files_below(path) if file.suffix.lower() in EXTENSIONS)
    names = [file.relative_to(path).as_posix() for file in files]
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise InputError(f"{path}: {flat[0]} lies beside class folders; move it into one, or use a flat folder")
    classes = () if flat else tuple(sorted({name.partition("/")[0] for name in names}))
    labels = {name: label for label, name in enumerate(classes)}
    items = tuple(
        ImageItem(name, labels.get(name.partition("/")[0], 0) if classes else 0, size_of(file), file)
        for name, file in zip(names, files, strict=True)
    )
    return ImageSource(path, items, classes)


def size_of(file: Path) -> int:
    """Bytes of a file; 0 of a link to nothing, which is told when it is read."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def is_utf8(name: str) -> bool:
    """Whether a file's name is text."""
    return "\udcff" not in name and name.encode("utf-8", "ignore").decode() == name


def files_below(root: Path) -> Iterator[Path]:
    """All files that are not hidden, through links to folders too, none twice around a loop.

    Raises InputError for a folder that cannot be read: its images would be missing without a word.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def refuse_folder(error: OSError) -> None:
    """What os.walk could not list; a disk's own lost+found is nobody's images."""
    if Path(error.filename).name != "lost+found":
        raise InputError(f"{error.filename}: this folder cannot be read: {error.strerror}; change its permissions")


def tar_source(path: Path, tars: list[Path]) -> ImageSource:
    """WebDataset tars: images with a `.cls` member of the same key, or without classes."""
    items, labelled = [], 0
    for tar in tars:
        images, labels = scan_tar(tar)
        for key, member in images.items():
            name = f"{tar.stem}/{member.name}"
            items.append(ImageItem(name, labels.get(key, 0), member.size, tar, member.offset_data))
            labelled += key in labels
    if labelled not in (0, len(items)):
        raise InputError(
            f"{path}: {len(items) - labelled} of {len(items)} images have no .cls member; give all or none a label"
        )
    count = max(item.label for item in items) + 1 if labelled else 0
    return ImageSource(path, tuple(items), tuple(str(label) for label in range(count)))


def scan_tar(tar: Path) -> tuple[dict[str, tarfile.TarInfo], dict[str, int]]:
    """Image members and labels of a tar, by key; only headers and labels are read."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, ending = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if not member.isfile():
                    continue
                if f".{ending.rpartition('.')[2].lower()}" in EXTENSIONS:
                    if key in images:
                        raise InputError(f"{tar}: {images[key].name} and {member.name} have one key; keep one of them")
                    images[key] = member
                elif ending == "cls":
                    labels[key] = label_of(archive, member, tar)
            end = archive.offset
    except tarfile.TarError as error:
        raise InputError(f"{tar}: not a readable tar: {error}") from None
    with tar.open("rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):  # tarfile stops quietly at a damaged header, or at a cut between members
            raise InputError(f"{tar}: damaged or cut off at byte {end}: no end of archive there; copy the file again")
    cut = [member.name for member in images.values() if member.offset_data + member.size > tar.stat().st_size]
    if cut:
        raise InputError(f"{tar}: cut off inside {cut[0]}; copy the file again")
    return images, labels


def label_of(archive: tarfile.TarFile, member: tarfile.TarInfo, tar: Path) -> int:
    """A .cls member's number."""
    file = archive.extractfile(member)
    text = file.read(20).decode("ascii", "replace").strip() if file else ""
    if not (text.isdecimal() and text.isascii() and len(text) <= 5):
        raise InputError(f"{tar}: {member.name} holds {text!r}, not a class number below 100 000")
    return int(text)


def unique_keys(names: Iterable[str]) -> list[str]:
    """A WebDataset key for each image name: ASCII, no dot, at most 80 characters, no two alike."""
    keys: list[str] = []
    taken: set[str] = set()
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = file.rpartition(".")[0] or file
        plain = re.sub(r"[^A-Za-z0-9_/-]", "_", f"{folder}/{stem}" if folder else stem)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        key = plain if len(plain) <= KEY_LENGTH else f"{plain[: KEY_LENGTH - 13]}-{digest}"
        if key in taken:
            key = f"{key[: KEY_LENGTH - 13]}-{digest}"
        taken.add(key)
        keys.append(key)
    return keys
