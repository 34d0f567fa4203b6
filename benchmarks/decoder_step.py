"""The decoder's training step, all losses and the adversary's turn in it, against the bare work of its parts.

    python benchmarks/decoder_step.py [--batch 16] [--rounds 5] [--device cpu|cuda]

The other side is the forwards and backwards alone, of networks of the same sizes on tensors at hand: encoder once,
decoder forward and backward and a second forward for the fakes, perceptual network, discriminator through to the
images, frozen network twice, heads forward and backward. Both sides alternate in one process; CPU seconds, medians (on
a GPU seconds, synchronised). Random weights: their values cost nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from raecli.data.crops import Crops
from raecli.decoding.adversary import Adversary
from raecli.decoding.learner import Learner
from raecli.losses.reconstruction import l1_loss
from raecli.models.build import encoder_of
from raecli.models.classifier import Classifier
from raecli.models.decoder import Decoder
from raecli.models.discriminator import Backbone, Discriminator
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.stages.train_decoder import State, train_step
from raecli.store.encoders import resolve_encoder
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import make_optimizer

RECIPE = Path(__file__).parent.parent / "recipes" / "digits" / "decoder_gan.yaml"
TOLD = ("latents=encoder", "loss.perceptual=features", "loss.perceptual_weights=none", "loss.perceptual_weight=1.0")


def state_of(device: torch.device) -> State:
    """The digits' decoder four times as wide and deep, their encoder, a classifier, and a critic."""
    recipe = load_recipe(TrainDecoderRecipe, RECIPE, TOLD)
    encoder = encoder_of(resolve_encoder("digits-mae", image_size=32)).to(device)
    sizes = {"width": 256, "depth": 8, "heads": 4, "mlp_width": 1024, "patch_size": 8}
    model = Decoder(in_channels=32, tokens_side=4, **sizes).to(device)
    perceptual = Classifier(image_size=32, classes=10).to(device).requires_grad_(False)
    pixels = (torch.full((3, 1, 1), 0.5, device=device), torch.full((3, 1, 1), 0.25, device=device))
    ranks = Ranks(0, 1, device)
    learner = Learner(model, model, encoder, 32, perceptual, *pixels, recipe, ranks)
    network = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=8, num_heads=1, num_classes=0)
    discriminator = Discriminator(Backbone(network), norm="batch").to(device)
    discriminator.heads.eval()
    rates = {"learning_rate": 1e-4, "betas": (0.5, 0.9), "weight_decay": 0.0}
    adversary = Adversary(recipe.adversarial, discriminator, make_optimizer(discriminator.heads, **rates), 0, 0)
    return State(learner, Ema(model, 0.99), make_optimizer(model, **rates), adversary, 0, {}, 0)


def bare(state: State, images: torch.Tensor) -> None:
    """Forward and backward of the parts, their inputs at hand: no draws, augmentation, lambda, optimiser, average."""
    learner, discriminator = state.learner, state.adversary.discriminator
    with torch.no_grad():
        latents = learner.encoder(images)
    decoded = learner.model(latents)
    leaf = decoded.detach().requires_grad_()
    perceived = zip(learner.perceptual.layers(leaf), learner.perceptual.layers(images), strict=True)
    loss = l1_loss(leaf, images) + sum((ours - theirs).square().mean() for ours, theirs in perceived)
    gradient = torch.autograd.grad(loss, leaf)[0] + torch.autograd.grad(discriminator(leaf).mean(), leaf)[0]
    decoded.backward(gradient)
    with torch.no_grad():
        learner.model(latents)
        tokens = [discriminator.backbone(images) for _ in range(2)]
    for head, real, fake in zip(discriminator.heads, *tokens, strict=True):
        head.train()(torch.cat([real, fake])).mean().backward()
    discriminator.heads.eval()
    for network in (learner.model, discriminator.heads):
        network.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of a call; on a GPU seconds of the wall, synchronised."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, count = torch.device(options.device), options.batch
    state = state_of(device)
    names = [str(index) for index in range(count)]
    batch = Crops(range(count), names, torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), None)
    images = batch.images.to(device).float() / 255
    sides: dict[str, list[float]] = {"step": [], "parts": []}
    for _ in range(options.rounds + 1):  # the first is a warm-up
        sides["step"].append(
            seconds(lambda: train_step(state, batch, state.learner.recipe, state.learner.ranks), device)
        )
        sides["parts"].append(seconds(lambda: bare(state, images), device))
    step, parts = (statistics.median(values[1:]) for values in sides.values())
    figures = {
        "step_images_per_second": round(count / step, 1),
        "parts_images_per_second": round(count / parts, 1),
        "ratio": round(parts / step, 3),
    }
    print(json.dumps({"benchmark": "decoder_step", "device": device.type, "batch": count, **figures}))


if __name__ == "__main__":
    main()
