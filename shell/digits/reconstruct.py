"""Images through an autoencoder and back, with rae's Python API: reconstruct.py DECODER IMAGES OUT."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import raecli


def reconstruct(decoder: Path, images: Path, out: Path) -> int:
    """Write the reconstruction of every PNG below `images` to OUT under the same name; returns how many."""
    autoencoder = raecli.load_autoencoder(decoder)
    files = sorted(images.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    decoded = autoencoder.decode(autoencoder.encode(batch))
    for file, image in zip(files, (decoded * 255).round().byte().permute(0, 2, 3, 1).numpy(), strict=True):
        target = out / file.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target)
    mse = (decoded - batch).square().flatten(1).mean(dim=1)
    print(f"{out}: {len(files)} images reconstructed, PSNR {(-10 * mse.log10()).mean():.2f} dB")
    return len(files)


if __name__ == "__main__":
    reconstruct(*map(Path, sys.argv[1:4]))
