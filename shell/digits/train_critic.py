"""A small vision transformer that tells digits apart: the frozen half of the digits' discriminator. In DINO's stead.

Reads DATA/train; writes OUT, a safetensors file in timm's layout, as adversarial.backbone reads it. The classifiers
that measure (train_judges.py) are other networks, so that no figure is its own training signal.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional
from train_judges import read_images

from raecli.errors import RaeError
from raecli.store.atomic import atomic_file

from data import random_affine

SEED = 3
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 1, "mlp_ratio": 4.0}


def train_critic(images: Tensor, labels: Tensor, steps: int, batch_size: int = 64) -> VisionTransformer:
    """Cross entropy on turned, moved and scaled images; AdamW, cosine to 0."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = VisionTransformer(**SIZES, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).view(2, 1, 3, 1, 1)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        scores = model((random_affine(images[rows], generator) - mean) / std)
        loss = functional.cross_entropy(scores, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    """Command line: train_critic.py DATA OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.out.is_file():
        print(f"{options.out}: is there already")
        return 0
    try:
        model = train_critic(*read_images(options.data / "train"), options.steps)
    except RaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out) as scratch:
        scratch.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    print(f"{options.out}: {sum(value.numel() for value in model.parameters())} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
