"""PERFORMANCE row 13: encode-cache end to end over the bare encoder on batches in memory, wall.

A random ViT-S/16 at 224 pixels (timm) on JPEGs of 500 x 375. Both sides alternate, batch against cache; set
OMP_NUM_THREADS to the cores that the encoder may have. One JSON line.

    python benchmarks/encode_cache.py [--images 256] [--model vit_small_patch16_224]
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from raecli.models.build import encoder_of
from raecli.recipe.recipes import EncodeCacheRecipe
from raecli.stages import encode_cache
from raecli.store.encoders import resolve_encoder
from raecli.training.distributed import Ranks


def make_inputs(folder: Path, images: int, model: str) -> None:
    """Photograph-like JPEGs in one class folder, and random weights."""
    generator = np.random.default_rng(0)
    (folder / "images" / "a").mkdir(parents=True)
    for index in range(images):
        noise = Image.fromarray(generator.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "images" / "a" / f"{index}.jpg", quality=92)
    torch.manual_seed(0)
    save_file(timm.create_model(model, num_classes=0).state_dict(), folder / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vit_small_patch16_224")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.images, options.model)
        spec = resolve_encoder(f"timm:{options.model}", image_size=224, weights=str(folder / "weights.safetensors"))
        encoder = encoder_of(spec).to(device)
        batch = torch.randint(0, 256, (options.batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
        whole, bare = [], []
        for repeat in range(options.repeats):
            recipe = EncodeCacheRecipe(
                stage="encode-cache", encoder=spec, source=str(folder / "images"), output=str(folder / f"out{repeat}"),
                image_size=224, precision="fp32", batch_size=options.batch_size, samples_per_shard=64,
            )  # fmt: skip
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                encode_cache.run(recipe, Ranks(0, 1, device))
            whole.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            with torch.inference_mode():
                for _ in range(options.images // options.batch_size):
                    encoder(batch.float() / 255).float().sum().item()
            bare.append(time.perf_counter() - begin)
    seconds = statistics.median(whole), statistics.median(bare)
    line = {"row": 13, "encode_cache_s": seconds[0], "bare_encoder_s": seconds[1], "ratio": seconds[1] / seconds[0]}
    load = os.getloadavg()[0]
    print(json.dumps({**line, "images": options.images, "device": device.type, "load": load, "bar": ">= 0.97"}))


if __name__ == "__main__":
    main()
