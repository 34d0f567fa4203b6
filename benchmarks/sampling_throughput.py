"""PERFORMANCE row 14: images a second, noise to PNG on disk, over peak FLOP/s / FLOPs an image. One JSON line.

On a GPU the model is DiT-DH-XL (AutoGuidance by DiT-DH-S with --guided) with a ViT-XL decoder, random weights, in bf16
and compiled, and the peak is --peak TFLOP/s (H100, H200: 790 in bf16). On a CPU the model is tiny and in fp32, and the
peak is that of one large float32 matrix product on the same threads, run alternately with it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from raecli.models.autoencoder import Autoencoder
from raecli.models.decoder import Decoder
from raecli.models.dit import DiTDH
from raecli.models.flops import decoder_macs, diffusion_macs
from raecli.recipe.recipes import SampleRecipe
from raecli.sampling.images import make_images
from raecli.sampling.models import Models, compile_blocks, halve_trunks
from raecli.training.distributed import Ranks

HEAD = {"head_width": 2048, "head_depth": 2}
LARGE = {
    "latents": {"in_channels": 768, "input_size": 16},
    "model": {"width": 1152, "depth": 28, **HEAD},
    "guide": {"width": 384, "depth": 12, **HEAD},
    "decoder": {"width": 1152, "depth": 28, "mlp_width": 4096, "patch_size": 16},
    "heads": {"model": 16, "guide": 6, "head": 16, "decoder": 16},
}
TINY = {
    "latents": {"in_channels": 64, "input_size": 8},
    "model": {"width": 128, "depth": 4, "head_width": 256, "head_depth": 2},
    "guide": {"width": 64, "depth": 2, "head_width": 256, "head_depth": 2},
    "decoder": {"width": 128, "depth": 2, "mlp_width": 512, "patch_size": 8},
    "heads": {"model": 4, "guide": 2, "head": 4, "decoder": 4},
}
ALPHA = 48**0.5


def dit(sizes: dict[str, Any], name: str, device: torch.device) -> DiTDH:
    """A DiT-DH of random weights, as load_diffusion would give it."""
    heads = {"heads": sizes["heads"][name], "head_heads": sizes["heads"]["head"]}
    model = DiTDH(**sizes["latents"], **sizes[name], **heads, num_classes=1000)
    channels, side = sizes["latents"].values()
    model.time_shift, model.latent_shape = ALPHA, (channels, side, side)
    return model.to(device).eval().requires_grad_(False)


def models_of(sizes: dict[str, Any], guided: bool, device: torch.device) -> Models:
    """Model, guide and decoder."""
    channels, side = sizes["latents"].values()
    decoder = Decoder(in_channels=channels, tokens_side=side, heads=sizes["heads"]["decoder"], **sizes["decoder"])
    half = torch.full((3,), 0.5)
    autoencoder = Autoencoder(None, decoder, None, torch.ones(channels, side, side), (half, half)).to(device).eval()
    return Models(dit(sizes, "model", device), dit(sizes, "guide", device) if guided else None, autoencoder)


def image_flop(sizes: dict[str, Any], steps: int, guided: bool) -> int:
    """FLOPs an image takes: every evaluation, and the decoder."""
    model, guide = (2 * diffusion_macs(**sizes["latents"], **sizes[name]).executed for name in ("model", "guide"))
    channels, side = sizes["latents"].values()
    decoder = 2 * decoder_macs(in_channels=channels, tokens_side=side, **sizes["decoder"]).executed
    return steps * (model + guide * guided) + decoder


def product_flops(device: torch.device, side: int = 1536) -> float:
    """FLOP/s of one float32 matrix product."""
    left = torch.randn(side, side, device=device)
    begin = time.process_time()
    left @ left
    return 2 * side**3 / (time.process_time() - begin)


def rate(recipe: SampleRecipe, models: Models, ranks: Ranks, seconds: Any) -> float:
    """Images a second of two batches, from noise to files."""
    with tempfile.TemporaryDirectory() as folder:
        size = recipe.batch_size
        batches = {range(i, i + size): list(range(i, i + size)) for i in range(0, recipe.num, size)}
        begin = seconds()
        make_images(recipe, models, [i % 1000 for i in range(recipe.num)], batches, Path(folder), ranks)
        return recipe.num / (seconds() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guided", action="store_true", help="AutoGuidance of scale 1.42")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, help="images at once [default: 128 on a GPU, 8 on a CPU]")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of the GPU in bf16")
    told = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    sizes, size = LARGE if on_gpu else TINY, told.batch_size or (128 if on_gpu else 8)
    recipe = SampleRecipe(
        stage="sample",
        model="-",
        autoencoder="-",
        output="-",
        num=size * told.batches,
        steps=told.steps,
        batch_size=size,
        guidance_scale=1.42 if told.guided else 1.0,
        precision="bf16" if on_gpu else "fp32",
    )
    models, ranks = models_of(sizes, told.guided, device), Ranks(0, 1, device)
    if on_gpu:
        halve_trunks(models)
        compile_blocks(models)
    flop = image_flop(sizes, told.steps, told.guided)
    seconds = time.perf_counter if on_gpu else time.process_time
    rate(recipe, models, ranks, seconds)  # compiles, and warms up
    pairs = [
        (rate(recipe, models, ranks, seconds), told.peak * 1e12 if on_gpu else product_flops(device)) for _ in range(3)
    ]
    found, peak = (statistics.median(side) for side in zip(*pairs, strict=True))
    line = {"row": 14, "device": torch.cuda.get_device_name() if on_gpu else "cpu", "guided": told.guided}
    bound = peak / flop
    line |= {"gflop_an_image": flop / 1e9, "images_per_second": found, "peak_images_per_second": bound}
    print(json.dumps({**line, "ratio": found / bound, "bar": ">= 0.60 on a GPU"}))


if __name__ == "__main__":
    main()
