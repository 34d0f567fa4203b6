"""Sets of images to be measured: image folders, and npz files as ADM's evaluator reads them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from raecli.errors import InputError
from raecli.metrics.array_stream import ArrayStream, members_of
from raecli.store.json_file import read_json

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
ARRAY_SUFFIXES = {".npz", ".npy"}
NOT_SAMPLES = {"grid.png", "picture.png", "trajectory.png"}  # pictures of many samples that lie beside them
IMAGES_KEY = "arr_0"
CARD = "samples.json"
RECONSTRUCTED = "reconstructions.json"  # in a folder of rae reconstruct
DECODERS = 4  # threads that decode images of a batch
EXPECTED = "expected a folder of PNG or JPEG images, or an .npz with uint8 arr_0 [N, H, W, 3]"


class FolderImages:
    """Images of a folder and its sub-folders, sorted by their path in it, all of one size."""

    def __init__(self, root: Path, files: tuple[str, ...]) -> None:
        """`files`: paths in `root`, in order; the first one's size is everyone's."""
        self.path = root
        self.files = files
        self.size = read_image(root / files[0]).shape[:2]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def names(self, start: int, stop: int) -> list[str]:
        """What to call images start to stop in a message."""
        return [str(self.path / file) for file in self.files[start:stop]]

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop: uint8 [B, 3, H, W]."""
        with ThreadPoolExecutor(DECODERS) as decoders:
            return torch.from_numpy(np.stack(list(decoders.map(self.read_one, self.files[start:stop]))))

    def read_one(self, file: str) -> np.ndarray:
        """One image: uint8 [3, H, W] of the set's size."""
        pixels = read_image(self.path / file)
        if pixels.shape[:2] != self.size:
            found, first = (f"{size[1]} x {size[0]}" for size in (pixels.shape, self.size))
            raise InputError(
                f"{self.path / file}: {found} pixels, but {self.files[0]} has {first}; a set's images have one size"
            )
        return pixels.transpose(2, 0, 1)

    def folder_classes(self) -> list[str] | None:
        """The class folder of each image, the first of its path; None if an image lies in the root itself."""
        if any("/" not in file for file in self.files):
            return None
        return [file.partition("/")[0] for file in self.files]


class ArrayImages:
    """Images of an .npz's arr_0 or of an .npy: streamed from the file, never whole in memory."""

    def __init__(self, path: Path) -> None:
        """Reads the header only."""
        self.path = path
        self.stream = ArrayStream(path, IMAGES_KEY, EXPECTED)
        shape, dtype = self.stream.shape, self.stream.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise InputError(f"{path}: its array is {dtype} of shape {list(shape)}; expected uint8 [N, H, W, 3]")
        self.count, self.size = shape[0], shape[1:3]

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    def names(self, start: int, stop: int) -> list[str]:
        """What to call images start to stop in a message."""
        return [f"{self.path}, image {index}" for index in range(start, stop)]

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop: uint8 [B, 3, H, W]. Reading forwards is cheap; backwards starts the file again."""
        return torch.from_numpy(self.stream.read(start, stop).transpose(0, 3, 1, 2).copy())

    def folder_classes(self) -> None:
        """An array has no folders."""
        return


class ImageSet(Protocol):
    """A set of images of one size, in a fixed order."""

    path: Path
    size: Any  # height and width in pixels

    def __len__(self) -> int:
        """Number of images."""

    def names(self, start: int, stop: int) -> list[str]:
        """What to call images start to stop in a message."""

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop: uint8 [B, 3, H, W]."""

    def folder_classes(self) -> list[str] | None:
        """The class folder of each image, where there are class folders."""


def locate_source(path: str) -> Path:
    """The folder or array file meant by `path`: a folder with nothing but one .npz of images means that file."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; {EXPECTED}")
    if not source.is_file() and not source.is_dir():  # a pipe would be waited for
        raise InputError(f"{source}: neither a file nor a folder, but a pipe or a device; {EXPECTED}")
    if (source / RECONSTRUCTED).is_file():  # with its originals beside them it would be a mixture of two sets
        raise InputError(
            f"{source}: holds reconstructions, which are measured against their own images: rae eval reconstruction "
            f"IMAGES {source}; or name one of its folders, {source}/reconstructions"
        )
    if source.is_dir() and not image_files(source):
        arrays = sorted(source.glob("*.npz"))
        if len(arrays) == 1:
            return arrays[0]
    return source


def holds_images(source: Path) -> bool:
    """False for an .npz without arr_0: stored statistics or features. Anything else is for `open_images` to judge."""
    members = members_of(source)
    return not members or IMAGES_KEY in members


def open_images(source: Path) -> ImageSet:
    """The images of a folder or array file, in their order."""
    if source.is_dir():
        files = image_files(source)
        if not files:
            raise InputError(f"{source}: no PNG or JPEG image in it; {EXPECTED}")
        return FolderImages(source, files)
    if source.suffix not in ARRAY_SUFFIXES:
        raise InputError(f"{source}: neither a folder nor an .npz; {EXPECTED}")
    return ArrayImages(source)


def image_files(root: Path) -> tuple[str, ...]:
    """Paths of the images under `root`, relative to it, sorted. Hidden ones and pictures of grids are no samples."""
    files = (file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    wanted = (file.relative_to(root) for file in files if file.name not in NOT_SAMPLES)
    return tuple(sorted(file.as_posix() for file in wanted if not any(part.startswith(".") for part in file.parts)))


def read_image(file: Path | IO[bytes], name: object = None) -> np.ndarray:
    """One image file as uint8 [H, W, 3]. name: what to call it in a message, if not by its path."""
    path = file if name is None else name
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{path}: pixels of mode {image.mode}, not 8 bits; save it as 8-bit RGB")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); remove it or make it again") from error


def rank_slice(count: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last of a rank's samples: every sample on exactly one rank, none padded, none twice."""
    return rank * count // world, (rank + 1) * count // world


def image_batches(images: ImageSet, start: int, stop: int, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 images [B, 3, H, W] from start to stop; one batch is read ahead of the caller."""
    waiting: deque[tuple[list[str], Any]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            waiting.append((images.names(first, last), reader.submit(images.read, first, last)))
            if len(waiting) > 1:
                names, batch = waiting.popleft()
                yield names, batch.result()
        for names, batch in waiting:
            yield names, batch.result()


def read_card(source: Path) -> dict[str, Any]:
    """The protocol in samples.json, in a folder of samples or beside an array file; {} where there is none."""
    card = (source if source.is_dir() else source.parent) / CARD
    if not card.is_file():
        return {}
    return read_json(card)
