"""`rae train-diffusion`: reads a latent cache; writes a run folder with checkpoints and a final model.

Everything random is a function of (seed, position in the stream of samples): the same on one rank and on many, and
after a restart.
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raecli.data.feed import ahead
from raecli.data.order import normals, stream_slice, uniforms
from raecli.errors import InputError, NonFiniteError
from raecli.flow.path import flow_loss, noisy_latents
from raecli.flow.time import training_time
from raecli.models.build import diffusion_of
from raecli.models.dit import parameter_count
from raecli.models.layers import Block
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.checkpoint import load_optimizer, newest_checkpoint, optimizer_tensors, save_checkpoint, save_final
from raecli.store.latent_cache import LatentCache, damaged, open_cache
from raecli.store.lock import hold_folder
from raecli.store.manifest import MANIFEST
from raecli.store.resolve import latents_config
from raecli.store.run_folder import MetricsLog, prepare_run
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks, check_batch, data_parallel
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import clip_gradients, make_optimizer, rate_at, set_learning_rate
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
    with hold_folder(Path(recipe.output)) if ranks.is_main else contextlib.nullcontext():
        train(recipe, ranks)


def train(recipe: TrainDiffusionRecipe, ranks: Ranks) -> None:
    """Data, model, loop, checkpoints."""
    check_batch(recipe.batch_size, ranks.world)
    run_folder, stop = Path(recipe.output), StopRequest(ranks)
    cache = open_verified(recipe, ranks)
    statistics = cache.statistics.to(ranks.device)
    total = duration_in_steps(recipe.duration, len(cache), recipe.batch_size)
    save_every = duration_in_steps(recipe.save_every, len(cache), recipe.batch_size)
    if ranks.is_main:
        prepare_run(run_folder, recipe, ranks.world)
    ranks.barrier()
    state = resume_or_start(recipe, run_folder, ranks)
    log = MetricsLog(run_folder, state.step) if ranks.is_main else None
    progress = Progress(total, "steps", "train-diffusion", shown=ranks.is_main, done=state.step)
    meter = Meter(log, ranks, log_every=recipe.log_every, batch_size=recipe.batch_size)
    steps = range(state.step, total)
    for batch in ahead(lambda step: make_batch(cache, step, recipe, ranks), steps):
        set_learning_rate(state.optimizer, rate_at(state.step, total, len(cache), recipe))
        loss, norm = train_step(state, batch, statistics, recipe, ranks)
        state.step += 1
        stopping = stop.agreed()
        figures = {"gradient_norm": norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
        meter.record(state.step, {"loss": loss}, figures, progress, last=stopping or state.step == total)
        if state.step % save_every == 0 or state.step == total or stopping:
            save(run_folder, state, statistics, recipe, cache, ranks)
        if stopping and state.step < total:
            raise stop.error()
    progress.close()
    if ranks.is_main:
        finish(run_folder, state, statistics, recipe, cache)
    ranks.barrier()


def open_verified(recipe: TrainDiffusionRecipe, ranks: Ranks) -> LatentCache:
    """The cache, its shards' digests checked: each rank takes its share. Larger caches: sizes alone."""
    cache = open_cache(recipe.cache)
    numbers = range(ranks.rank, len(cache.manifest.shards), ranks.world)
    small = sum(shard.bytes for shard in cache.manifest.shards) <= VERIFY_BYTES
    problems = [problem for part in ranks.gather(cache.bad_shards(numbers) if small else []) for problem in part]
    if problems:
        raise damaged(cache.folder, problems)
    if len(cache) == 0:
        raise InputError(f"{cache.folder / MANIFEST}: the cache is empty")
    return cache


def resume_or_start(recipe: TrainDiffusionRecipe, run_folder: Path, ranks: Ranks) -> State:
    """Model, average and optimiser: fresh from the seed, or as the newest whole checkpoint has them."""
    torch.manual_seed(recipe.seed)
    model = diffusion_of(recipe.model).to(ranks.device)
    ema = Ema(model, recipe.ema_decay, ramp=recipe.ema_ramp)
    spec = recipe.optimizer
    optimizer = make_optimizer(
        model, learning_rate=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay
    )
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        ema.load(checkpoint.ema)
        load_optimizer(model, optimizer, checkpoint.optimizer)
        if ranks.is_main:
            print(f"resuming {run_folder} at step {checkpoint.step}", file=sys.stderr)
    if recipe.compile:
        for block in model.modules():
            if isinstance(block, Block):
                block.compile()
    forward = data_parallel(model, ranks)
    return State(model, forward, ema, optimizer, checkpoint.step if checkpoint else 0)


def make_batch(cache: LatentCache, step: int, recipe: TrainDiffusionRecipe, ranks: Ranks) -> Batch:
    """This rank's slice of positions [step B, (step + 1) B), and all that is drawn for them but the noise."""
    share = recipe.batch_size // ranks.world
    first = step * recipe.batch_size + ranks.rank * share
    positions = range(first, first + share)
    indices = stream_slice(recipe.seed, len(cache), first, share)
    flips = None
    if recipe.horizontal_flip and cache.has_flips:
        flips = (uniforms(recipe.seed, "flip", positions) < 0.5).tolist()
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
    latents = cache.latents(indices.tolist(), flips)
    if ranks.device.type == "cuda":
        latents = latents.pin_memory()
    return Batch(positions, [cache.keys[index] for index in indices], latents, labels, t)


def train_step(
    state: State, batch: Batch, statistics: LatentStatistics, recipe: TrainDiffusionRecipe, ranks: Ranks
) -> tuple[Tensor, float]:
    """One optimiser step over the batch, in micro-batches; returns this rank's mean loss and the gradient's norm."""
    micro = recipe.micro_batch_size or len(batch.positions)
    total = torch.zeros((), device=ranks.device)
    for start in range(0, len(batch.positions), micro):
        part = slice(start, start + micro)
        last = start + micro >= len(batch.positions)
        total += backward(state.forward, batch, part, statistics, recipe, ranks, synchronise=last)
    norm = clip_gradients(state.model.parameters(), recipe.optimizer.clip_norm).item()
    if not math.isfinite(norm):  # before the optimiser and the average are touched
        raise NonFiniteError(
            f"step {state.step}: the gradient is NaN or infinite (this rank's loss {total.item():.4g}, samples "
            f"{', '.join(batch.keys[:8])}, ...); the last checkpoint is finite: lower the learning rate and resume"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.step)
    return total, norm


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
    """Forward and backward of one micro-batch; returns its share of the mean loss, detached."""
    latents = statistics.normalise(batch.latents[part].to(ranks.device, non_blocking=True).float())
    noise = normals(tuple(latents.shape[1:]), recipe.seed, "noise", batch.positions[part], ranks.device)
    t, labels = batch.t[part].to(ranks.device), batch.labels[part].to(ranks.device)
    hold = contextlib.nullcontext() if synchronise or ranks.world == 1 else forward.no_sync()
    with hold:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocity = forward(noisy_latents(latents, noise, t), t, labels)
        loss = flow_loss(velocity, latents, noise).sum() / len(batch.positions)
        loss.backward()
    return loss.detach()


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


def save(
    run_folder: Path,
    state: State,
    statistics: LatentStatistics,
    recipe: TrainDiffusionRecipe,
    cache: LatentCache,
    ranks: Ranks,
) -> None:
    """Write a checkpoint, by the main rank; the others wait."""
    if ranks.is_main:
        save_checkpoint(
            run_folder,
            state.step,
            model=state.model.state_dict(),
            ema=state.ema.weights(),
            optimizer=optimizer_tensors(state.model, state.optimizer),
            statistics=statistics,
            state={"samples_consumed": state.step * recipe.batch_size},
            config=config_of(state, recipe, cache),
            keep=recipe.keep_checkpoints,
        )
    ranks.barrier()


def finish(
    run_folder: Path, state: State, statistics: LatentStatistics, recipe: TrainDiffusionRecipe, cache: LatentCache
) -> None:
    """Write final/: the averaged model and its card."""
    encoder = cache.manifest.encoder
    card = (
        f"# {run_folder.name}\n\nA {recipe.model.kind} with {parameter_count(state.model):,} parameters, trained by "
        f"rae on latents of {encoder.name} ({recipe.cache}) for {state.step} steps of {recipe.batch_size} images.\n\n"
        f"{recipe.paper}\n\n"
        f"    rae sample {run_folder}/final samples/ --autoencoder AUTOENCODER\n"
    )
    config = config_of(state, recipe, cache)
    folder = save_final(run_folder, weights=state.ema.weights(), statistics=statistics, config=config, card=card)
    print(f"{folder}: {parameter_count(state.model)} parameters, {state.step} steps")
