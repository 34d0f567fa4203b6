"""Images and their reconstructions on disk, matched by key; anything that does not match is refused with its name."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from raecli.data.center_crops import center_crops, whole_images
from raecli.data.feed import ahead, pooled
from raecli.data.images import ImageItem, open_images, unique_keys
from raecli.data.preprocess import UNREADABLE
from raecli.errors import InputError
from raecli.store.reconstructions import ORIGINALS, PROTOCOL, locate_reconstructions
from raecli.store.samples import PROTOCOL as SAMPLES_PROTOCOL

LISTED = 20  # names in a message
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class PairSet:
    """Images and reconstructions with the same keys, in the keys' order."""

    keys: list[str]
    images: list[ImageItem]
    reconstructions: list[ImageItem]
    protocol: dict[str, Any]  # reconstructions.json; {} where another program made them
    sources: dict[str, Any]  # path and fingerprint of both sides

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.keys)

    @property
    def side(self) -> int | None:
        """Pixels a side that the images are cropped to; None: nothing says, so they are taken as they are."""
        return self.protocol.get("output_size")

    @property
    def are_saved_crops(self) -> bool:
        """Whether the images are the crops that `rae reconstruct --save-originals` wrote beside the reconstructions."""
        images, made = (os.path.realpath(self.sources[side]["path"]) for side in ("images", "reconstructions"))
        return Path(images) == Path(made).parent / ORIGINALS

    def batches(self, batch_size: int, rank: int, world: int, workers: int) -> Iterator[tuple[range, Tensor, Tensor]]:
        """This rank's batches: positions, images and reconstructions uint8 [B, 3, H, W]. The same for any world."""
        starts = range(rank * batch_size, len(self), world * batch_size)

        def read(start: int) -> tuple[range, Tensor, Tensor]:
            part = slice(start, start + batch_size)
            images, side = self.images[part], self.side
            crops = center_crops(images, side, workers) if side else whole_images(images, workers)
            positions = range(start, start + len(images))
            return positions, crops, whole_images(self.reconstructions[part], workers)

        return ahead(read, starts)


def open_pairs(images: str, reconstructions: str) -> PairSet:
    """List both sides and match them. Raises InputError listing the keys that only one side has."""
    if (Path(images) / PROTOCOL).is_file():
        raise InputError(
            f"{images}: holds reconstructions; the first argument is the images that they were made of, or their saved "
            f"crops in {Path(images) / ORIGINALS}"
        )
    folder, protocol = locate_reconstructions(Path(reconstructions))
    if (folder / SAMPLES_PROTOCOL).is_file():
        raise InputError(f"{folder}: holds generated samples, which have no image of their own: use rae eval fid")
    ours, theirs = open_images(images), open_images(folder)
    originals, made = (dict(zip(keys_of(side.items), side.items, strict=True)) for side in (ours, theirs))
    problems = [f"{key}: not in {folder}" for key in originals if key not in made]
    problems += [f"{key}: not in {images}" for key in made if key not in originals]
    if problems:
        counts = f"{len(originals)} images, {len(made)} reconstructions, {len(problems)} without a partner"
        raise InputError(f"{images} and {folder} are not the same images: {counts}{listed(problems)}")
    keys = sorted(originals)
    sources = {
        "images": {"path": images, "list_sha256": ours.fingerprint()},
        "reconstructions": {"path": str(folder), "list_sha256": theirs.fingerprint()},
    }
    return PairSet(keys, [originals[key] for key in keys], [made[key] for key in keys], protocol, sources)


def keys_of(items: Sequence[ImageItem]) -> list[str]:
    """The name that a pair shares, as `rae reconstruct` gives it."""
    return unique_keys(item.name for item in items)


def pair_size(pairs: PairSet, workers: int) -> Size:
    """The one size of all pairs. Raises InputError listing those of another; reads the files' headers alone."""
    made = pooled(size_of, pairs.reconstructions, workers)
    side = pairs.side
    wanted = (side, side) if side else made[0]
    problems = [
        f"{item.name}: {told(size)}, expected {told(wanted)}"
        for item, size in zip(pairs.reconstructions, made, strict=True)
        if size != wanted
    ]
    if not side:  # made by another program: nothing says how to crop the images
        problems += [
            f"{item.name}: {told(size)}, its reconstruction {told(other)}"
            for item, size, other in zip(pairs.images, pooled(size_of, pairs.images, workers), made, strict=True)
            if size != other
        ]
    if problems:
        where = f"{pairs.sources['images']['path']} and {pairs.sources['reconstructions']['path']}"
        raise InputError(f"{where}: {len(problems)} sizes differ{listed(problems)}")
    return wanted


def size_of(item: ImageItem) -> Size:
    """Width and height out of a file's header."""
    try:
        with Image.open(item.file if item.offset is None else io.BytesIO(item.read())) as image:
            return image.size
    except UNREADABLE as error:
        raise InputError(f"{item.name}: not a readable image: {error}") from None


def told(size: Size) -> str:
    """256 x 256"""
    return f"{size[0]} x {size[1]}"


def listed(problems: list[str]) -> str:
    """One problem a line, the first of many."""
    rest = [] if len(problems) <= LISTED else [f"and {len(problems) - LISTED} more"]
    return "".join(f"\n  {line}" for line in [*problems[:LISTED], *rest])
