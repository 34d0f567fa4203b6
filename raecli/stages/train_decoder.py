"""`rae train-decoder`: reads images, and a cache for its encoder and statistics; writes a run folder with a decoder.

The encoder is frozen and runs on the crops as they come. The adversarial term of the paper is not in this stage yet.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.data.feed import ahead, pooled
from raecli.data.images import ImageSource, open_images
from raecli.data.order import normal, normals, stream_slice, uniforms
from raecli.data.preprocess import center_crop, decode_rgb, random_crop
from raecli.errors import NonFiniteError
from raecli.flow.augmentation import augmented_latents, noise_scales
from raecli.losses.reconstruction import feature_loss, find_vgg, l1_loss, load_lpips, lpips_loss
from raecli.models.build import decoder_of, encoder_of
from raecli.models.classifier import load_classifier
from raecli.models.encoder import Encoder
from raecli.models.flops import decoder_macs
from raecli.models.load import located
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint, save_final
from raecli.store.latent_cache import LatentCache, check_cache, open_cache
from raecli.store.resolve import latents_config
from raecli.store.statistics import LatentStatistics
from raecli.training.beginning import begin_run
from raecli.training.distributed import Ranks, check_batch, data_parallel, decode_threads
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import clip_gradients, optimizer_of, rate_at, set_learning_rate
from raecli.training.stopping import StopRequest


@dataclass
class State:
    """The decoder in training, and what it is trained against."""

    model: nn.Module
    forward: nn.Module  # the model, under DDP where there are several ranks
    ema: Ema
    optimizer: torch.optim.Optimizer
    encoder: Encoder
    perceptual: nn.Module | None
    step: int


@dataclass(frozen=True)
class Crops:
    """One rank's share of an optimiser step."""

    positions: range  # in the endless stream of images
    names: list[str]
    images: Tensor  # uint8 [B, 3, S, S], S the decoder's output side


def run(recipe: TrainDecoderRecipe, ranks: Ranks) -> None:
    """Train until the recipe's end, from where the run stands."""
    check_batch(recipe.batch_size, ranks.world)
    with ranks.holding(Path(recipe.output)):
        ranks.main_first(lambda: check_inputs(recipe))  # what is wrong with them is told once
        source, cache = open_images(recipe.images), open_cache(recipe.cache)
        total = duration_in_steps(recipe.duration, len(source.items), recipe.batch_size)
        state = begin_or_resume(recipe, latents_of(cache, source), cache, total, ranks)
        train(state, source, cache, total, recipe, ranks)
        if ranks.is_main:
            finish(state, recipe, latents_of(cache, source), cache.statistics)
        ranks.barrier()


def train(
    state: State, source: ImageSource, cache: LatentCache, total: int, recipe: TrainDecoderRecipe, ranks: Ranks
) -> None:
    """The loop: crops, rate, step, figures, checkpoint."""
    stop, samples = StopRequest(ranks), len(source.items)
    save_every = duration_in_steps(recipe.save_every, samples, recipe.batch_size)
    side = cache.manifest.encoder.tokens_side * recipe.decoder.patch_size
    flops = training_flops(recipe, cache)
    with Meter(recipe, ranks, first_step=state.step, total_steps=total, samples=samples, training_flops=flops) as meter:
        batches = ahead(lambda step: make_crops(source, step, side, recipe, ranks), range(state.step, total))
        for crops in meter.timed(batches):
            rate = rate_at(state.step, total, samples, recipe)
            set_learning_rate(state.optimizer, rate)
            losses, norm = train_step(state, crops, cache.manifest.image_size, recipe, ranks)
            state.step += 1
            stopping = stop.agreed()
            figures = {**losses, "gradient_norm": norm}
            meter.record(state.step, figures, learning_rate=rate, last=stopping or state.step == total)
            if state.step % save_every == 0 or state.step == total or stopping:
                with meter.aside("save"):
                    save(state, recipe, latents_of(cache, source), cache.statistics, ranks)
            if stopping and state.step < total:
                raise stop.error()


def training_flops(recipe: TrainDecoderRecipe, cache: LatentCache) -> float:
    """FLOPs of one image's forward and backward in the decoder alone; frozen networks are not counted."""
    channels, side, _ = cache.manifest.latent_shape
    sizes = recipe.decoder.model_dump(exclude={"heads"})
    return 3 * 2 * decoder_macs(in_channels=channels, tokens_side=side, **sizes).executed


def check_inputs(recipe: TrainDecoderRecipe) -> None:
    """Open all that the recipe names; raises what is wrong with it."""
    open_images(recipe.images)
    check_cache(recipe.cache)
    perceptual_network(recipe)


def latents_of(cache: LatentCache, source: ImageSource) -> dict[str, Any]:
    """What the decoder has to remember: the latents, and the images it learned from, which fix the order."""
    return latents_config(cache.manifest) | {"images_sha256": source.fingerprint()}


def begin_or_resume(
    recipe: TrainDecoderRecipe, latents: dict[str, Any], cache: LatentCache, total: int, ranks: Ranks
) -> State:
    """Decoder, average and optimiser: fresh from the seed, or as the newest whole checkpoint has them."""
    checkpoint = begin_run(recipe, latents, total, ranks)
    encoder = located(cache.manifest.encoder, cache.manifest.image_size)
    torch.manual_seed(recipe.seed)
    model = decoder_of(recipe.decoder, encoder).to(ranks.device)
    ema = Ema(model, recipe.ema_decay, ramp=recipe.ema_ramp)
    optimizer = optimizer_of(model, recipe)
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        ema.load(checkpoint.ema)
        load_optimizer(model, optimizer, checkpoint.optimizer)
    if recipe.compile:
        for block in model.blocks:
            block.compile()
    forward = data_parallel(model, ranks)
    perceptual = perceptual_network(recipe)
    return State(
        model,
        forward,
        ema,
        optimizer,
        encoder_of(encoder).to(ranks.device),
        perceptual.to(ranks.device) if perceptual else None,
        checkpoint.step if checkpoint else 0,
    )


def perceptual_network(recipe: TrainDecoderRecipe) -> nn.Module | None:
    """The network behind the perceptual term, frozen."""
    loss = recipe.loss
    if loss.perceptual == "lpips":
        return load_lpips(find_vgg(loss.perceptual_weights))
    if loss.perceptual == "features" and loss.perceptual_weights:
        return load_classifier(Path(loss.perceptual_weights))
    return None


def make_crops(source: ImageSource, step: int, side: int, recipe: TrainDecoderRecipe, ranks: Ranks) -> Crops:
    """This rank's slice of positions [step B, (step + 1) B), decoded and cropped."""
    share = recipe.batch_size // ranks.world
    first = step * recipe.batch_size + ranks.rank * share
    positions = range(first, first + share)
    indices = stream_slice(recipe.seed, len(source.items), first, share).tolist()
    across, down = uniforms(recipe.seed, "crop across", positions), uniforms(recipe.seed, "crop down", positions)
    mirrored = uniforms(recipe.seed, "flip", positions) < (0.5 if recipe.augmentation.horizontal_flip else 0.0)

    def crop(row: int) -> np.ndarray:
        item = source.items[indices[row]]
        image = decode_rgb(item.read(), item.name)
        if recipe.augmentation.crop == "random":
            pixels = random_crop(image, recipe.augmentation.resize, side, float(across[row]), float(down[row]))
        else:
            pixels = center_crop(image, side)
        return pixels[:, ::-1] if mirrored[row] else pixels

    pixels = np.stack(pooled(crop, range(share), decode_threads()))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Crops(positions, [source.items[index].name for index in indices], images)


def train_step(
    state: State, crops: Crops, encoder_side: int, recipe: TrainDecoderRecipe, ranks: Ranks
) -> tuple[dict[str, Tensor], float]:
    """One optimiser step, in micro-batches; returns this rank's mean losses and the gradient's norm."""
    share = len(crops.positions)
    micro = recipe.micro_batch_size or share
    totals: dict[str, Tensor] = {}
    for start in range(0, share, micro):
        part = slice(start, start + micro)
        hold = contextlib.nullcontext() if start + micro >= share or ranks.world == 1 else state.forward.no_sync()
        with hold:
            losses = part_losses(state, crops, part, encoder_side, recipe, ranks)
            weight = len(crops.positions[part]) / share
            (losses["loss"] * weight).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() * weight
    norm = clip_gradients(state.model.parameters(), recipe.optimizer.clip_norm).item()
    if not math.isfinite(norm):  # before the optimiser and the average are touched
        raise NonFiniteError(
            f"step {state.step}: the gradient is NaN or infinite (images {', '.join(crops.names[:8])}, ...); the last "
            "checkpoint is finite: lower the learning rate and resume"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.step)
    return totals, norm


def part_losses(
    state: State, crops: Crops, part: slice, encoder_side: int, recipe: TrainDecoderRecipe, ranks: Ranks
) -> dict[str, Tensor]:
    """Encode, add noise, decode, compare: the losses of one micro-batch, means over its images."""
    images = crops.images[part].to(ranks.device, non_blocking=True).float() / 255
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        with torch.no_grad():
            latents = noisy_latents_of(state.encoder, images, encoder_side, recipe, crops.positions[part])
        pixels = state.forward(latents)
    spec = state.encoder
    reconstructions = pixels.float() * spec.std.view(3, 1, 1) + spec.mean.view(3, 1, 1)
    weights, loss = recipe.loss, {"l1": l1_loss(reconstructions, images)}
    total = weights.l1_weight * loss["l1"]
    if state.perceptual is not None:
        if weights.perceptual == "lpips":
            loss["perceptual"] = lpips_loss(state.perceptual, reconstructions, images)
        else:
            loss["perceptual"] = feature_loss(state.perceptual.layers, reconstructions, images)
        total = total + weights.perceptual_weight * loss["perceptual"]
    return {"loss": total, **loss}


def noisy_latents_of(
    encoder: Encoder, images: Tensor, encoder_side: int, recipe: TrainDecoderRecipe, positions: range
) -> Tensor:
    """Un-normalised latents of the crops with the noise of Sec. 4.3. For upsampling the encoder sees smaller crops."""
    if images.shape[-1] != encoder_side:
        images = F.interpolate(images, (encoder_side, encoder_side), mode="bicubic", antialias=True).clamp(0, 1)
    latents = encoder(images).float()
    if recipe.noise_tau == 0:
        return latents
    if recipe.noise_sigma == "halfnormal":
        draws = torch.stack([normal((), recipe.seed, "noise sigma", position) for position in positions])
    else:
        draws = uniforms(recipe.seed, "noise sigma", positions).float()
    scales = noise_scales(draws, tau=recipe.noise_tau, law=recipe.noise_sigma).to(latents.device)
    noise = normals(tuple(latents.shape[1:]), recipe.seed, "latent noise", positions, latents.device)
    return augmented_latents(latents, noise, scales)


def config_of(state: State, recipe: TrainDecoderRecipe, latents: dict[str, Any]) -> dict[str, Any]:
    """What a lone decoder has to say of itself."""
    return {
        "format": "rae-decoder",
        "version": 1,
        "step": state.step,
        "samples_consumed": state.step * recipe.batch_size,
        "recipe": recipe.to_dict(),
        "latents": latents,
    }


def save(
    state: State, recipe: TrainDecoderRecipe, latents: dict[str, Any], statistics: LatentStatistics, ranks: Ranks
) -> None:
    """Write a checkpoint, by the main rank; the others wait."""
    if ranks.is_main:
        save_checkpoint(
            Path(recipe.output),
            state.step,
            model=state.model.state_dict(),
            ema=state.ema.weights(),
            optimizer=optimizer_tensors(state.model, state.optimizer),
            statistics=statistics,
            state={"samples_consumed": state.step * recipe.batch_size},
            config=config_of(state, recipe, latents),
            keep=recipe.keep_checkpoints,
        )
    ranks.barrier()


def finish(state: State, recipe: TrainDecoderRecipe, latents: dict[str, Any], statistics: LatentStatistics) -> None:
    """Write final/: the averaged decoder, its encoder's identity, the statistics."""
    run_folder = Path(recipe.output)
    count = sum(parameter.numel() for parameter in state.model.parameters())
    card = (
        f"# {run_folder.name}\n\nA ViT decoder with {count:,} parameters for latents of {latents['encoder']['name']}, "
        f"trained by rae for {state.step} steps of {recipe.batch_size} images, noise tau {recipe.noise_tau}.\n\n"
        f"{recipe.paper}\n"
    )
    config, weights = config_of(state, recipe, latents), state.ema.weights()
    folder = save_final(run_folder, weights=weights, statistics=statistics, config=config, card=card)
    print(f"{folder}: {count} parameters, {state.step} steps")
