"""How far decoders' reconstructions are from their images, by a classifier's layers: DATA JUDGE DECODER [DECODER ...].

The judge has trained none of them. Distances are means over its three layers and over the test images, on images
rounded to 8 bits; beside them PSNR, which a discriminator is expected to cost.
"""

import sys
from pathlib import Path

import torch
from train_judges import read_images

import raecli
from raecli.losses.reconstruction import feature_loss
from raecli.models.classifier import load_classifier


@torch.inference_mode()
def measure(decoder: Path, images: torch.Tensor, judge: Path) -> tuple[float, float]:
    """Judge-feature distance and PSNR in dB of all images, [N, 3, H, W] in [0, 1]."""
    autoencoder = raecli.load_autoencoder(decoder)
    decoded = (autoencoder.decode(autoencoder.encode(images)) * 255).round() / 255
    error = (decoded - images).square().flatten(1).mean(dim=1)
    distance = feature_loss(load_classifier(judge).layers, decoded, images)
    return distance.item(), (-10 * error.log10()).mean().item()


if __name__ == "__main__":
    test_images, _ = read_images(Path(sys.argv[1]) / "test")
    for name in sys.argv[3:]:
        told, psnr = measure(Path(name), test_images, Path(sys.argv[2]))
        print(f"{name}: judge distance {told:.5f}, PSNR {psnr:.2f} dB")
