"""Two digit classifiers of different seeds. Reads DATA/{train,test}; writes OUT/{loss,judge}.safetensors, judges.json.

`loss` is the perceptual loss of the decoder; `judge` only measures, so that no figure is its own training signal.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from raecli.errors import InputError, RaeError
from raecli.models.classifier import Classifier, save_classifier
from raecli.store.atomic import write_json

from data import random_affine

SEEDS = {"loss": 1, "judge": 2}
LABEL_SMOOTHING = 0.03  # keeps the features small: a Frechet distance of about 4 between test and training split


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Class folders of PNG: images float [N, 3, H, W] in [0, 1] and labels [N], in the order of sorted paths."""
    paths = sorted(folder.glob("?/*.png"))
    if not paths:
        raise InputError(f"{folder}: no class folders of PNG files; write them with shell/digits/data.py")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    return images.contiguous(), torch.tensor([int(path.parent.name) for path in paths])


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> Classifier:
    """Cross entropy on turned, moved and scaled images; AdamW, cosine to 0. The seed draws weights, batches, views."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(image_size=images.shape[-1], classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        scores = model(random_affine(images[rows], generator))
        loss = functional.cross_entropy(scores, labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measure_accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """The part of images whose highest score is their label's."""
    return (model(images).argmax(1) == labels).double().mean().item()


def train_judges(data: Path, out: Path, steps: int) -> dict:
    """Train and write both; the report is written last, so that its being there means that all is there."""
    images, labels = read_images(data / "train")
    test_images, test_labels = read_images(data / "test")
    out.mkdir(parents=True, exist_ok=True)
    report = {"steps": steps, "seeds": SEEDS, "test_accuracy": {}}
    for name, seed in SEEDS.items():
        start = time.process_time()
        model = train_classifier(images, labels, seed=seed, steps=steps)
        save_classifier(out / f"{name}.safetensors", model)
        accuracy = measure_accuracy(model, test_images, test_labels)
        report["test_accuracy"][name] = accuracy
        print(f"{name}.safetensors: test accuracy {accuracy:.2%}, {time.process_time() - start:.0f} s", flush=True)
    write_json(out / "judges.json", report)
    return report


def is_done(out: Path, steps: int) -> bool:
    """Whether OUT holds what the same command wrote before."""
    if not all((out / name).is_file() for name in ("judges.json", "loss.safetensors", "judge.safetensors")):
        return False
    report = json.loads((out / "judges.json").read_text())
    return report["steps"] == steps and report["seeds"] == SEEDS


def main(arguments: list[str] | None = None) -> int:
    """Command line: train_judges.py DATA OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if is_done(options.out, options.steps):
        print(f"{options.out}: both judges are there already")
        return 0
    try:
        train_judges(options.data, options.out, options.steps)
    except RaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
