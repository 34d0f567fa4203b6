"""`rae train-diffusion`: reads a latent cache; writes a run folder with checkpoints and a final model.

Everything random is a function of (seed, position in the stream of samples): the same on one rank and on many, and
after a restart.
"""

import functools
from dataclasses import dataclass, field
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
from raecli.models.flops import diffusion_macs
from raecli.models.layers import Block
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.sampling.online import EVALUATED, Generation, prepare_generation
from raecli.store.checkpoint import check_space, load_optimizer, load_weights, optimizer_tensors, save_final
from raecli.store.checkpoint_writer import CheckpointWriter
from raecli.store.latent_cache import LatentCache, check_cache, damaged, open_cache
from raecli.store.manifest import MANIFEST
from raecli.store.resolve import latents_config
from raecli.store.statistics import LatentStatistics
from raecli.training.beginning import begin_run, resumed_from
from raecli.training.distributed import Ranks, check_batch, data_parallel, fully_sharded, gradients_held
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import optimizer_of, rate_at, set_learning_rate, take_step
from raecli.training.result import tell_result
from raecli.training.stopping import StopRequest
from raecli.training.verdict import Verdict

TOKENS = torch.channels_last  # in memory: what the model makes of a map, and back, are views then
VERIFY_BYTES = 32e9  # caches up to this size are held against their digests before training


@dataclass
class State:
    """All that training changes."""

    model: nn.Module
    forward: nn.Module  # the model, under DDP where there are several ranks
    ema: Ema
    optimizer: torch.optim.AdamW
    step: int
    verdict: Verdict = field(default_factory=Verdict)  # of the last step's gradient


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
    ranks.main_first(lambda: check_batch(recipe.batch_size, ranks.world))
    with ranks.holding(Path(recipe.output)):
        cache = open_verified(recipe, ranks)
        total = duration_in_steps(recipe.duration, len(cache), recipe.batch_size)
        state = begin_or_resume(recipe, cache, total, ranks)
        parameters = list(state.model.parameters())
        ranks.main_first(lambda: check_space(Path(recipe.output), parameters, recipe.keep_checkpoints))
        with CheckpointWriter(writes=ranks.is_main) as writer:
            train(state, writer, cache, total, recipe, ranks)
        weights = state.ema.weights()
        if ranks.is_main:
            finish(state, weights, recipe, cache)
        ranks.barrier()


def train(
    state: State,
    writer: CheckpointWriter,
    cache: LatentCache,
    total: int,
    recipe: TrainDiffusionRecipe,
    ranks: Ranks,
) -> None:
    """The loop: batch, rate, step, figures, checkpoint."""
    stop, statistics = StopRequest(ranks), cache.statistics.to(ranks.device).channels_last()
    save_every = duration_in_steps(recipe.save_every, len(cache), recipe.batch_size)
    generation = prepare_generation(recipe.evaluation, recipe, cache, ranks) if recipe.evaluation else None
    feed = LatentFeed(
        cache, lambda step: samples_of(cache, step, recipe, ranks), recipe.batch_size // ranks.world, ranks.device
    )
    flops = training_flops(recipe)
    with Meter(
        recipe, ranks, first_step=state.step, total_steps=total, samples=len(cache), training_flops=flops
    ) as meter:
        evaluate_if_due(state, generation, total, recipe, meter)  # a run that was stopped before it could
        batches = ahead(lambda step: make_batch(feed, step, recipe, ranks), range(state.step, total))
        for batch in meter.timed(batches):
            rate = rate_at(state.step, total, len(cache), recipe)
            set_learning_rate(state.optimizer, rate)
            loss, norm = train_step(state, batch, statistics, recipe, ranks)
            state.step += 1
            stopping = stop.agreed()
            losses = {"loss": loss, "gradient_norm": norm}
            meter.record(state.step, losses, {"learning_rate": rate}, last=stopping or state.step == total)
            if state.step % save_every == 0 or state.step == total or stopping:
                with meter.aside("save"):
                    save(state, writer, recipe, cache)
            writer.check()
            if stopping and state.step < total:
                writer.wait()
                ranks.barrier()  # who leaves first has the others ended: not before the state is on disk
                raise stop.error()
            evaluate_if_due(state, generation, total, recipe, meter)


def evaluate_if_due(
    state: State, generation: Generation | None, total: int, recipe: TrainDiffusionRecipe, meter: Meter
) -> None:
    """Samples and FID of the averaged weights, every `evaluation.every` and at the end; not twice for one step."""
    if generation is None or not generation.is_due(state.step, total) or meter.has_told(state.step, EVALUATED):
        return
    with meter.aside("evaluate"):
        model = averaged_model(state, recipe)
        figures, sheet = generation.measure(model, state.step)
    meter.tell(state.step, figures)
    if sheet:
        meter.show(state.step, "sheet", sheet)  # "samples" is a figure of the log


def averaged_model(state: State, recipe: TrainDiffusionRecipe) -> nn.Module:
    """A second module around the averages themselves, never compiled: what runs is what final/ will hold.

    Swapping weights under the training module would leave its compiled blocks a chance to run the raw ones.
    """
    with torch.device("meta"):
        model = diffusion_of(recipe.model)
    model.load_state_dict(state.ema.weights(), assign=True)  # no copy
    for name, buffer in state.model.named_buffers():  # also those that are in no state dict
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    size = recipe.model.input_size
    model.time_shift, model.latent_shape = recipe.flow.time_shift, (recipe.model.in_channels, size, size)
    return model.eval().requires_grad_(False)


def training_flops(recipe: TrainDiffusionRecipe) -> float:
    """FLOPs of one image's forward and backward, as executed: a backward is two forwards."""
    keys = ("in_channels", "input_size", "patch_size", "width", "depth", "head_width", "head_depth", "mlp_ratio")
    return 3 * 2 * diffusion_macs(**{key: getattr(recipe.model, key) for key in keys}).executed


def open_verified(recipe: TrainDiffusionRecipe, ranks: Ranks) -> LatentCache:
    """The cache, its shards' digests checked: each rank takes its share. Larger caches: each shard at its first use."""
    ranks.main_first(lambda: check_cache(recipe.cache, VERIFY_BYTES))  # what is wrong with it is told once
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
    begin_run(recipe, ranks)
    torch.manual_seed(recipe.seed)
    model = diffusion_of(recipe.model).to(ranks.device)
    forward = parallel(model, recipe, ranks)
    ema = Ema(model, recipe.ema_decay, ramp=recipe.ema_ramp)  # after sharding: the averages are sharded alike
    optimizer = optimizer_of(model, recipe)
    checkpoint = resumed_from(recipe, latents_config(cache.manifest), total, ranks, model, ema)
    if checkpoint:
        load_weights(model, checkpoint.model)
        ema.load(checkpoint.ema)
        load_optimizer(model, optimizer, checkpoint.optimizer)
    return State(model, forward, ema, optimizer, checkpoint.step if checkpoint else 0)


def parallel(model: nn.Module, recipe: TrainDiffusionRecipe, ranks: Ranks) -> nn.Module:
    """The model as its ranks train it: blocks that recompute, compiled blocks, then DDP or FSDP around them."""
    for block in blocks_of(model):
        block.recomputes = recipe.checkpoint_activations
    if recipe.compile:
        compile_blocks(model)
    if recipe.parallel == "fsdp":
        return fully_sharded(model, blocks_of(model), ranks, bf16=recipe.precision == "bf16")
    return data_parallel(model, ranks)


def blocks_of(model: nn.Module) -> list[Block]:
    """Transformer blocks of backbone and head."""
    return [module for module in model.modules() if isinstance(module, Block)]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself: one graph serves them all, and DDP still overlaps, because it wraps afterwards.

    The weights stay the module's own, so whatever runs them (the average, a checkpoint) runs what was trained.
    """
    for block in blocks_of(model):
        block.compile()


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
    if ranks.device.type == "cuda":  # from pageable memory a copy waits for all that is queued
        labels, t = labels.pin_memory(), t.pin_memory()
    return Batch(positions, [cache.keys[index] for index in indices], latents, labels, t)


def train_step(
    state: State, batch: Batch, statistics: LatentStatistics, recipe: TrainDiffusionRecipe, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """One optimiser step over the batch, in micro-batches; this rank's mean loss and the gradient's norm, on device."""
    micro = recipe.micro_batch_size or len(batch.positions)
    losses = []
    for start in range(0, len(batch.positions), micro):
        part = slice(start, start + micro)
        last = start + micro >= len(batch.positions)
        losses.append(backward(state.forward, batch, part, statistics, recipe, ranks, synchronise=last))
    per_sample = torch.cat(losses)
    norm, finite = take_step(state.model, state.optimizer, recipe.optimizer.clip_norm)
    state.ema.update(state.step, finite)
    state.verdict.note(norm, functools.partial(not_finite, state.step, batch, per_sample))
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
    latents = batch.latents[part].to(ranks.device, non_blocking=True)
    latents = statistics.normalise(latents.to(torch.float32, memory_format=TOKENS))
    noise = normals(tuple(latents.shape[1:]), recipe.seed, "noise", batch.positions[part], ranks.device)
    noise = noise.contiguous(memory_format=TOKENS)
    t, labels = (values[part].to(ranks.device, non_blocking=True) for values in (batch.t, batch.labels))
    with gradients_held(forward, hold=not synchronise):
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


def save(state: State, writer: CheckpointWriter, recipe: TrainDiffusionRecipe, cache: LatentCache) -> None:
    """Hand the state to the writer, who copies it and writes while training goes on. All ranks, one writes."""
    state.verdict.settle()
    writer.save(
        Path(recipe.output),
        state.step,
        model=state.model.state_dict(),
        ema=state.ema.state(),
        optimizer=optimizer_tensors(state.model, state.optimizer),
        statistics=cache.statistics,
        state={"samples_consumed": state.step * recipe.batch_size},
        config=config_of(state, recipe, cache),
        keep=recipe.keep_checkpoints,
    )


def finish(state: State, weights: dict[str, Tensor], recipe: TrainDiffusionRecipe, cache: LatentCache) -> None:
    """Write final/: the averaged model and its card."""
    run_folder, count = Path(recipe.output), parameter_count(state.model)
    card = (
        f"# {run_folder.name}\n\nA {recipe.model.kind} with {count:,} parameters, trained by rae on latents of "
        f"{cache.manifest.encoder.name} ({recipe.cache}) for {state.step} steps of {recipe.batch_size} images.\n\n"
        f"{recipe.paper}\n\n    rae sample {run_folder}/final samples/ --autoencoder AUTOENCODER\n"
    )
    config = config_of(state, recipe, cache)
    folder = save_final(run_folder, weights=weights, statistics=cache.statistics, config=config, card=card)
    facts = {"output": str(folder), "parameters": count, "steps": state.step}
    tell_result(f"{folder}: {count} parameters, {state.step} steps", facts)
