"""scikit-learn's handwritten digits as PNG class folders. Reads that package; writes OUT/{train,test}/{0..9}/*.png."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from raecli.errors import InputError, RaeError
from raecli.store.atomic import atomic_folder, sweep_scratch

IMAGE_SIZE = 32
TEST_IMAGES = 360
SPLIT_SEED = 0


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits, 8x8 resized bicubic: uint8 [1797, 32, 32], 0 is paper, and their classes int64 [1797]."""
    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the package counts 0..16
    large = [Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), digits.target.astype(np.int64)


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Sorted indices of the 1437 training and 360 test images, each class in its share of both."""
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    return {"train": np.sort(train), "test": np.sort(test)}


def split_tensors(name: str) -> tuple[Tensor, Tensor]:
    """One split, `train` or `test`: images float [N, 3, 32, 32] in [0, 1], grey repeated, and labels [N]."""
    images, labels = digit_images()
    chosen = split_indices(labels)[name]
    grey = torch.from_numpy(images[chosen]).float().div(255)[:, None]
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[chosen])


def random_affine(
    images: Tensor, generator: torch.Generator, *, degrees: float = 10, shift: float = 0.08, scale: float = 0.1
) -> Tensor:
    """Turn, move and scale each image by its own uniform draw; what comes into view is 0, as the paper is.

    images: [B, C, H, W]; shift is a part of the side, scale of the size; each goes both ways.
    """
    draws = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, zoom = draws[0] * math.radians(degrees), 1 + scale * draws[1]
    move = 2 * shift * draws[2:]  # the grid is 2 wide
    rows = [angle.cos() * zoom, -angle.sin() * zoom, move[0], angle.sin() * zoom, angle.cos() * zoom, move[1]]
    matrices = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def is_complete(folder: Path) -> bool:
    """Whether the folder holds every PNG file of both splits."""
    return len(list(folder.glob("train/?/*.png"))) + len(list(folder.glob("test/?/*.png"))) == 1797


def write_digits(folder: Path) -> None:
    """Both splits; the folder is there in full or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_scratch(folder.parent)
    images, labels = digit_images()
    with atomic_folder(folder) as scratch:
        for split, indices in split_indices(labels).items():
            for index in indices:
                path = scratch / split / str(labels[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(path)


def main(arguments: list[str] | None = None) -> int:
    """Command line: data.py OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args(arguments).out.absolute()
    try:
        if is_complete(out):
            print(f"{out}: 1797 digits are there already")
            return 0
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: holds something else than the 1797 digits; remove it, or name another folder")
        write_digits(out)
    except RaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{out}: wrote 1437 training and {TEST_IMAGES} test images of {IMAGE_SIZE}x{IMAGE_SIZE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
