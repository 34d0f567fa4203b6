"""`rae train-diffusion`: reads a latent cache; writes a run folder with checkpoints and a final model.

Everything random is a function of (seed, position in the stream of samples): the same on one rank and on many, and
after a restart.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raecli.data.feed import LatentFeed, Samples, ahead
from raecli.data.order import normals, stream_slice, uniforms
from raecli.errors import InputError, NonFiniteError
from raecli.flow.path import flow_loss, noisy_latents
from raecli.flow.time import training_time
from raecli.models.build import diffusion_of
from raecli.models.dit import parameter_count
from raecli.models.layers import Block
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint, save_final
from raecli.store.latent_cache import LatentCache, check_cache, damaged, open_cache
from raecli.store.manifest import MANIFEST
from raecli.store.resolve import latents_config
from raecli.store.run_folder import MetricsLog
from raecli.store.statistics import LatentStatistics
from raecli.training.beginning import begin_run
from raecli.training.distributed import Ranks, check_batch, data_parallel
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import clip_gradients, optimizer_of, rate_at, set_learning_rate
from raecli.training.progress import Progress
from raecli.training.stopping import StopRequest

VERIFY_BYTES = 32e9  # caches up to this size are held against their digests before training


@dataclass
class State:
    """All that training changes."""

    model: nn.Module
    forward: nn.Module  # the model, under DDP where there are several ranks
    ema: Ema
    optimizer: torch.optim.Optimizer
    step: int


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimiser step."""

    positions: range  # in the endless stream of samples
    keys: list[str]
    latents: Tensor  # [B, C, H, W], un-normalised, in the cache's dtype
    labels: Tensor  # [B], some dropped to the null label
    t: Tensor  # [B], shifted


def run(recipe: TrainDiffusionRecipe, ranks: Ranks) -> None:
    """Train until the recipe's end, from where the run stands."""
    check_batch(recipe.batch_size, ranks.world)
    with ranks.holding(Path(recipe.output)):
        cache = open_verified(recipe, ranks)
        total = duration_in_steps(recipe.duration, len(cache), recipe.batch_size)
        state = begin_or_resume(recipe, cache, total, ranks)
        train(state, cache, total, recipe, ranks)
        if ranks.is_main:
            finish(state, recipe, cache)
        ranks.barrier()


def train(state: State, cache: LatentCache, total: int, recipe: TrainDiffusionRecipe, ranks: Ranks) -> None:
    """The loop: batch, rate, step, figures, checkpoint."""
    stop, statistics = StopRequest(ranks), cache.statistics.to(ranks.device)
    save_every = duration_in_steps(recipe.save_every, len(cache), recipe.batch_size)
    log = MetricsLog(Path(recipe.output), state.step) if ranks.is_main else None
    meter = Meter(log, ranks, log_every=recipe.log_every, batch_size=recipe.batch_size)
    progress = Progress(total, "steps", "train-diffusion", shown=ranks.is_main, done=state.step)
    feed = LatentFeed(
        cache, lambda step: samples_of(cache, step, recipe, ranks), recipe.batch_size // ranks.world, ranks.device
    )
    for batch in ahead(lambda step: make_batch(feed, step, recipe, ranks), range(state.step, total)):
        set_learning_rate(state.optimizer, rate_at(state.step, total, len(cache), recipe))
        loss, norm = train_step(state, batch, statistics, recipe, ranks)
        state.step += 1
        stopping = stop.agreed()
        figures = {"gradient_norm": norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
        meter.record(state.step, {"loss": loss}, figures, progress, last=stopping or state.step == total)
        if state.step % save_every == 0 or state.step == total or stopping:
            save(state, recipe, cache, ranks)
        if stopping and state.step < total:
            raise stop.error()
    progress.close()


def open_verified(recipe: TrainDiffusionRecipe, ranks: Ranks) -> LatentCache:
    """The cache, its shards' digests checked: each rank takes its share. Larger caches: each shard at its first use."""
    ranks.main_first(lambda: check_cache(recipe.cache))  # what is wrong with it is told once
    cache = open_cache(recipe.cache, recipe.remote_cache_gb)
    numbers = range(ranks.rank, len(cache.manifest.shards), ranks.world)
    small = sum(shard.bytes for shard in cache.manifest.shards) <= VERIFY_BYTES
    cache.verify_at_first_use = not small
    problems = [problem for part in ranks.gather(cache.bad_shards(numbers) if small else []) for problem in part]
    if problems:
        raise damaged(cache.folder, problems)
    if len(cache) == 0:
        raise InputError(f"{cache.folder / MANIFEST}: the cache is empty")
    return cache


def begin_or_resume(recipe: TrainDiffusionRecipe, cache: LatentCache, total: int, ranks: Ranks) -> State:
    """Model, average and optimiser: fresh from the seed, or as the newest whole checkpoint has them."""
    checkpoint = begin_run(recipe, latents_config(cache.manifest), total, ranks)
    torch.manual_seed(recipe.seed)
    model = diffusion_of(recipe.model).to(ranks.device)
    ema = Ema(model, recipe.ema_decay, ramp=recipe.ema_ramp)
    optimizer = optimizer_of(model, recipe)
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        ema.load(checkpoint.ema)
        load_optimizer(model, optimizer, checkpoint.optimizer)
    if recipe.compile:
        for block in model.modules():
            if isinstance(block, Block):
                block.compile()
    return State(model, data_parallel(model, ranks), ema, optimizer, checkpoint.step if checkpoint else 0)


def positions_of(step: int, recipe: TrainDiffusionRecipe, ranks: Ranks) -> range:
    """This rank's share of positions [step B, (step + 1) B) in the stream of samples."""
    share = recipe.batch_size // ranks.world
    first = step * recipe.batch_size + ranks.rank * share
    return range(first, first + share)


def samples_of(cache: LatentCache, step: int, recipe: TrainDiffusionRecipe, ranks: Ranks) -> Samples:
    """The samples that lie there, and which of them are mirrored."""
    positions = positions_of(step, recipe, ranks)
    block = recipe.shuffle_block if recipe.shuffle == "block" else None
    indices = stream_slice(recipe.seed, len(cache), positions.start, len(positions), block)
    flips = None
    if recipe.horizontal_flip and cache.has_flips:
        flips = (uniforms(recipe.seed, "flip", positions) < 0.5).tolist()
    return indices, flips


def make_batch(feed: LatentFeed, step: int, recipe: TrainDiffusionRecipe, ranks: Ranks) -> Batch:
    """This rank's share of a step, and all that is drawn for it but the noise."""
    positions, cache = positions_of(step, recipe, ranks), feed.cache
    indices, latents = feed.batch(step)
    null_label = recipe.model.num_classes or 0  # without classes it is the only label
    dropped = uniforms(recipe.seed, "label", positions) < (recipe.label_dropout if null_label else 1.0)
    labels = cache.labels[torch.from_numpy(indices)].masked_fill(dropped, null_label)
    flow = recipe.flow
    t = training_time(
        uniforms(recipe.seed, "time", positions),
        distribution=flow.time_distribution,
        mean=flow.time_mean,
        std=flow.time_std,
        maximum=flow.time_max,
        time_shift=flow.time_shift,
    ).float()
    return Batch(positions, [cache.keys[index] for index in indices], latents, labels, t)


def train_step(
    state: State, batch: Batch, statistics: LatentStatistics, recipe: TrainDiffusionRecipe, ranks: Ranks
) -> tuple[Tensor, float]:
    """One optimiser step over the batch, in micro-batches; returns this rank's mean loss and the gradient's norm."""
    micro = recipe.micro_batch_size or len(batch.positions)
    losses = []
    for start in range(0, len(batch.positions), micro):
        part = slice(start, start + micro)
        last = start + micro >= len(batch.positions)
        losses.append(backward(state.forward, batch, part, statistics, recipe, ranks, synchronise=last))
    per_sample = torch.cat(losses)
    norm = clip_gradients(state.model.parameters(), recipe.optimizer.clip_norm).item()
    if not math.isfinite(norm):  # before the optimiser and the average are touched
        raise not_finite(state.step, batch, per_sample)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.step)
    return per_sample.mean(), norm


def not_finite(step: int, batch: Batch, losses: Tensor) -> NonFiniteError:
    """The error that names the samples whose loss is no number, of this rank; gradients alone may overflow too."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    whose = f"the loss of {', '.join(batch.keys[row] for row in bad[:8])}" if bad else "the gradient, but no loss,"
    return NonFiniteError(
        f"step {step}: {whose} is NaN or infinite ({len(bad)} of {len(losses)} samples of this rank); the last "
        "checkpoint is finite: lower the learning rate and resume"
    )


def backward(
    forward: nn.Module,
    batch: Batch,
    part: slice,
    statistics: LatentStatistics,
    recipe: TrainDiffusionRecipe,
    ranks: Ranks,
    *,
    synchronise: bool,
) -> Tensor:
    """Forward and backward of one micro-batch; returns its losses, one a sample, detached."""
    latents = statistics.normalise(batch.latents[part].to(ranks.device, non_blocking=True).float())
    noise = normals(tuple(latents.shape[1:]), recipe.seed, "noise", batch.positions[part], ranks.device)
    t, labels = batch.t[part].to(ranks.device), batch.labels[part].to(ranks.device)
    hold = contextlib.nullcontext() if synchronise or ranks.world == 1 else forward.no_sync()
    with hold:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocity = forward(noisy_latents(latents, noise, t), t, labels)
        losses = flow_loss(velocity, latents, noise)
        (losses.sum() / len(batch.positions)).backward()
    return losses.detach()


def config_of(state: State, recipe: TrainDiffusionRecipe, cache: LatentCache) -> dict[str, Any]:
    """What a lone checkpoint has to say of itself."""
    return {
        "format": "rae-diffusion",
        "version": 1,
        "step": state.step,
        "samples_consumed": state.step * recipe.batch_size,
        "recipe": recipe.to_dict(),
        "latents": latents_config(cache.manifest),
    }


def save(state: State, recipe: TrainDiffusionRecipe, cache: LatentCache, ranks: Ranks) -> None:
    """Write a checkpoint, by the main rank; the others wait."""
    if ranks.is_main:
        save_checkpoint(
            Path(recipe.output),
            state.step,
            model=state.model.state_dict(),
            ema=state.ema.weights(),
            optimizer=optimizer_tensors(state.model, state.optimizer),
            statistics=cache.statistics,
            state={"samples_consumed": state.step * recipe.batch_size},
            config=config_of(state, recipe, cache),
            keep=recipe.keep_checkpoints,
        )
    ranks.barrier()


def finish(state: State, recipe: TrainDiffusionRecipe, cache: LatentCache) -> None:
    """Write final/: the averaged model and its card."""
    run_folder, count = Path(recipe.output), parameter_count(state.model)
    card = (
        f"# {run_folder.name}\n\nA {recipe.model.kind} with {count:,} parameters, trained by rae on latents of "
        f"{cache.manifest.encoder.name} ({recipe.cache}) for {state.step} steps of {recipe.batch_size} images.\n\n"
        f"{recipe.paper}\n\n    rae sample {run_folder}/final samples/ --autoencoder AUTOENCODER\n"
    )
    config = config_of(state, recipe, cache)
    weights = state.ema.weights()
    folder = save_final(run_folder, weights=weights, statistics=cache.statistics, config=config, card=card)
    print(f"{folder}: {count} parameters, {state.step} steps")
