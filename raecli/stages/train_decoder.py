"""`rae train-decoder`: reads images, and a cache for its encoder and statistics; writes a run folder with a decoder.

The encoder is frozen and runs on the crops as they come, or the cache's latents stand in for it. In a step the decoder
and its adversary each take their gradient at the weights that the step began with; then both optimisers step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raecli.data.crops import Crops, CropSource, with_cached_latents
from raecli.data.feed import ahead
from raecli.data.images import open_images
from raecli.decoding.adversary import Adversary, adversary_of
from raecli.decoding.decoder_turn import decoder_turn
from raecli.decoding.learner import Learner
from raecli.errors import NonFiniteError
from raecli.evaluation.reconstruction_online import Validation, open_validation
from raecli.losses.reconstruction import load_lpips
from raecli.metrics.lpips_file import locate_vgg
from raecli.models.build import decoder_of, encoder_of
from raecli.models.classifier import load_classifier
from raecli.models.discriminator import load_backbone
from raecli.models.discriminator_file import find_backbone
from raecli.models.flops import decoder_macs
from raecli.models.load import located
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import check_space, load_optimizer, load_weights, optimizer_tensors, save_final
from raecli.store.checkpoint_writer import CheckpointWriter
from raecli.store.latent_cache import LatentCache, check_cache, open_cache
from raecli.store.resolve import latents_config
from raecli.store.statistics import LatentStatistics
from raecli.training.beginning import begin_run, resumed_from
from raecli.training.distributed import Ranks, check_batch, data_parallel, decode_threads
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import clip_gradients, optimizer_of, rate_at, set_learning_rate
from raecli.training.result import tell_result
from raecli.training.stopping import StopRequest

ADVERSARY = "adversary."  # begins the keys of a checkpoint's optimizer.safetensors that are the adversary's


@dataclass
class State:
    """The decoder in training, what it is trained against, and how far it is."""

    learner: Learner
    ema: Ema
    optimizer: torch.optim.Optimizer
    adversary: Adversary | None
    perceptual_start: int  # the first step with the perceptual term
    latents: dict[str, Any]  # what the decoder has to remember of what it learned from
    step: int


def run(recipe: TrainDecoderRecipe, ranks: Ranks) -> None:
    """Train until the recipe's end, from where the run stands."""
    ranks.main_first(lambda: check_batch(recipe.batch_size, ranks.world))
    with ranks.holding(Path(recipe.output)):
        ranks.main_first(lambda: check_inputs(recipe))  # what is wrong with them is told once
        cache = open_cache(recipe.cache)
        crops = crop_source(recipe, cache)
        total = duration_in_steps(recipe.duration, len(crops.source.items), recipe.batch_size)
        state = begin_or_resume(recipe, crops, cache, total, ranks)
        parameters = list(state.learner.model.parameters())
        ranks.main_first(lambda: check_space(Path(recipe.output), parameters, recipe.keep_checkpoints))
        with CheckpointWriter(writes=ranks.is_main) as writer:
            train(state, writer, crops, cache, total, recipe, ranks)
        if ranks.is_main:
            finish(state, recipe, cache.statistics)
        ranks.barrier()


def train(
    state: State,
    writer: CheckpointWriter,
    crops: CropSource,
    cache: LatentCache,
    total: int,
    recipe: TrainDecoderRecipe,
    ranks: Ranks,
) -> None:
    """The loop: crops, rate, step, figures, checkpoint."""
    stop, samples = StopRequest(ranks), len(crops.source.items)
    save_every = duration_in_steps(recipe.save_every, samples, recipe.batch_size)
    validation = open_validation(recipe, cache, samples, ranks)
    flops = training_flops(recipe, cache)
    with Meter(recipe, ranks, first_step=state.step, total_steps=total, samples=samples, training_flops=flops) as meter:
        batches = ahead(lambda step: crops.crops(share_of(step, recipe, ranks)), range(state.step, total))
        for batch in meter.timed(batches):
            rates = set_rates(state, total, samples, recipe)
            figures = train_step(state, batch, recipe, ranks)
            state.step += 1
            stopping = stop.agreed()
            meter.record(state.step, figures, rates, last=stopping or state.step == total)
            if validation and not stopping and validation.is_due(state.step, total):
                validate(validation, state, meter)
            if state.step % save_every == 0 or state.step == total or stopping:
                with meter.aside("save"):
                    save(state, writer, recipe, cache.statistics)
            writer.check()
            if stopping and state.step < total:
                writer.wait()
                ranks.barrier()  # who leaves first has the others ended: not before the state is on disk
                raise stop.error()


def validate(validation: Validation, state: State, meter: Meter) -> None:
    """Measure the averaged decoder on images that it does not learn from; tell and show what came out."""
    learner = state.learner
    with meter.aside("evaluate"):
        figures, sheet = validation.measure(state.step, learner.model, state.ema.weights(), learner.encoder)
    meter.tell(state.step, figures)
    if sheet:
        meter.show(state.step, "samples", sheet)


def training_flops(recipe: TrainDecoderRecipe, cache: LatentCache) -> float:
    """FLOPs of one image's forward and backward in the decoder alone; frozen networks are not counted."""
    channels, side, _ = cache.manifest.latent_shape
    sizes = recipe.decoder.model_dump(exclude={"heads"})
    return 3 * 2 * decoder_macs(in_channels=channels, tokens_side=side, **sizes).executed


def check_inputs(recipe: TrainDecoderRecipe) -> None:
    """Open all that the recipe names; raises what is wrong with it."""
    check_cache(recipe.cache)
    crop_source(recipe, open_cache(recipe.cache))
    perceptual_network(recipe)
    if recipe.adversarial:
        load_backbone(find_backbone(recipe.adversarial.backbone))


def crop_source(recipe: TrainDecoderRecipe, cache: LatentCache) -> CropSource:
    """The images as the decoder is to make them; with the cache's latents where the recipe says so."""
    side = cache.manifest.encoder.tokens_side * recipe.decoder.patch_size
    crops = CropSource(open_images(recipe.images), side, recipe.seed, recipe.augmentation, decode_threads())
    return with_cached_latents(crops, cache) if recipe.latents == "cached" else crops


def share_of(step: int, recipe: TrainDecoderRecipe, ranks: Ranks) -> range:
    """This rank's slice of positions [step B, (step + 1) B)."""
    share = recipe.batch_size // ranks.world
    first = step * recipe.batch_size + ranks.rank * share
    return range(first, first + share)


def latents_of(cache: LatentCache, crops: CropSource, recipe: TrainDecoderRecipe) -> dict[str, Any]:
    """What the decoder has to remember: the latents, the images it learned from, and the networks that judged it."""
    latents = latents_config(cache.manifest) | {"images_sha256": crops.source.fingerprint()}
    if perceptual := perceptual_file(recipe):
        latents["perceptual_sha256"] = sha256_of(perceptual)
    if recipe.adversarial:
        latents["discriminator_sha256"] = sha256_of(find_backbone(recipe.adversarial.backbone))
    return latents


def begin_or_resume(
    recipe: TrainDecoderRecipe, crops: CropSource, cache: LatentCache, total: int, ranks: Ranks
) -> State:
    """Decoder, average, adversary and optimisers: fresh from the seed, or as the newest whole checkpoint has them."""
    samples = len(crops.source.items)
    begin_run(recipe, ranks)
    torch.manual_seed(recipe.seed)
    model = decoder_of(recipe.decoder, cache.manifest.encoder).to(ranks.device)
    ema = Ema(model, recipe.ema_decay, ramp=recipe.ema_ramp)
    optimizer = optimizer_of(model, recipe)
    adversary = adversary_of(recipe, samples, ranks)
    latents = latents_of(cache, crops, recipe)
    checkpoint = resumed_from(recipe, latents, total, ranks, model, ema)
    if checkpoint:
        load_weights(model, checkpoint.model)
        ema.load(checkpoint.ema)
        own = {name: value for name, value in checkpoint.optimizer.items() if not name.startswith(ADVERSARY)}
        load_optimizer(model, optimizer, own)
        if adversary:
            adversary.load(checkpoint.optimizer)
    if recipe.compile:
        for block in model.blocks:
            block.compile()
    perceptual_start = duration_in_steps(recipe.loss.perceptual_start, samples, recipe.batch_size)
    learner = learner_of(model, recipe, cache, ranks)
    return State(learner, ema, optimizer, adversary, perceptual_start, latents, checkpoint.step if checkpoint else 0)


def learner_of(model: Any, recipe: TrainDecoderRecipe, cache: LatentCache, ranks: Ranks) -> Learner:
    """The decoder with the frozen networks around it."""
    told, image_size = cache.manifest.encoder, cache.manifest.image_size
    encoder = None if recipe.latents == "cached" else encoder_of(located(told, image_size)).to(ranks.device)
    perceptual = perceptual_network(recipe)
    return Learner(
        model,
        data_parallel(model, ranks),
        encoder,
        image_size,
        perceptual.to(ranks.device) if perceptual else None,
        torch.tensor(told.mean, device=ranks.device).view(3, 1, 1),
        torch.tensor(told.std, device=ranks.device).view(3, 1, 1),
        recipe,
        ranks,
    )


def perceptual_network(recipe: TrainDecoderRecipe) -> nn.Module | None:
    """The network behind the perceptual term, frozen."""
    file = perceptual_file(recipe)
    if file is None:
        return None
    return load_lpips(file) if recipe.loss.perceptual == "lpips" else load_classifier(file)


def perceptual_file(recipe: TrainDecoderRecipe) -> Path | None:
    """Its weights: as told, else for LPIPS those in torch hub's cache; None without a perceptual term."""
    loss = recipe.loss
    if loss.perceptual == "lpips":
        return locate_vgg(loss.perceptual_weights, "loss.perceptual_weights")
    return Path(loss.perceptual_weights) if loss.perceptual == "features" and loss.perceptual_weights else None


def set_rates(state: State, total: int, samples: int, recipe: TrainDecoderRecipe) -> dict[str, float]:
    """Give both optimisers the learning rates of this step."""
    rates = {"learning_rate": rate_at(state.step, total, samples, recipe)}
    set_learning_rate(state.optimizer, rates["learning_rate"])
    if state.adversary:
        rate = state.adversary.set_rate(state.step, total, samples, recipe.batch_size)
        rates["discriminator_learning_rate"] = rate
    return rates


def train_step(state: State, crops: Crops, recipe: TrainDecoderRecipe, ranks: Ranks) -> dict[str, Tensor | float]:
    """One optimiser step of the decoder, and one of its adversary; this rank's mean losses and the gradients' norms."""
    learner, adversary, limit = state.learner, state.adversary, recipe.optimizer.clip_norm
    parts = learner.parts(crops)
    heard = adversary if adversary and state.step >= adversary.generator_start else None
    losses = decoder_turn(learner, parts, heard, perceptual=state.step >= state.perceptual_start)
    norms = {"gradient_norm": clip_gradients(learner.model.parameters(), limit)}
    learns = adversary is not None and state.step >= adversary.discriminator_start
    if adversary:
        zero = torch.zeros((), device=ranks.device)
        losses = {"adversarial": zero, "lambda": zero, **losses}
        losses["discriminator"] = adversary.turn(learner, parts) if learns else zero
        limit = adversary.spec.optimizer.clip_norm
        norms["discriminator_gradient_norm"] = clip_gradients(adversary.parameters(), limit) if learns else zero
    figures = check_finite_step(state.step, losses, norms, crops, ranks)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.step)
    if adversary and learns:
        adversary.optimizer.step()
        adversary.optimizer.zero_grad(set_to_none=True)
    return {**losses, **figures}


def check_finite_step(
    step: int, losses: dict[str, Tensor], norms: dict[str, Tensor], crops: Crops, ranks: Ranks
) -> dict[str, float]:
    """The gradients' norms as numbers. Raises NonFiniteError on all ranks if one's loss or gradient is NaN or infinite.

    Called before an optimiser or the average is touched. Losses are looked at too: the hinge's gradient of NaN is 0.
    """
    told = {**losses, **norms}
    values = torch.stack([value.float() for value in told.values()])
    finite = ranks.sum(values.clone()).isfinite().tolist()
    if not all(finite):
        bad = ", ".join(name for name, good in zip(told, finite, strict=True) if not good)
        raise NonFiniteError(
            f"step {step}: {bad} is NaN or infinite (images {', '.join(crops.names[:8])}, ...); the last checkpoint is "
            "finite: lower the learning rate and resume"
        )
    return {name: value.item() for name, value in norms.items()}


def config_of(state: State, recipe: TrainDecoderRecipe) -> dict[str, Any]:
    """What a lone decoder has to say of itself."""
    return {
        "format": "rae-decoder",
        "version": 1,
        "step": state.step,
        "samples_consumed": state.step * recipe.batch_size,
        "recipe": recipe.to_dict(),
        "latents": state.latents,
    }


def save(state: State, writer: CheckpointWriter, recipe: TrainDecoderRecipe, statistics: LatentStatistics) -> None:
    """Hand the state to the writer, who copies it and writes while training goes on. All ranks, one writes."""
    model = state.learner.model
    adversary = state.adversary.tensors(Path(recipe.output)) if state.adversary else {}
    writer.save(
        Path(recipe.output),
        state.step,
        model=model.state_dict(),
        ema=state.ema.weights(),
        optimizer=optimizer_tensors(model, state.optimizer) | adversary,
        statistics=statistics,
        state={"samples_consumed": state.step * recipe.batch_size},
        config=config_of(state, recipe),
        keep=recipe.keep_checkpoints,
    )


def finish(state: State, recipe: TrainDecoderRecipe, statistics: LatentStatistics) -> None:
    """Write final/: the averaged decoder, its encoder's identity, the statistics."""
    run_folder = Path(recipe.output)
    count = sum(parameter.numel() for parameter in state.learner.model.parameters())
    encoder = state.latents["encoder"]["name"]
    card = (
        f"# {run_folder.name}\n\nA ViT decoder with {count:,} parameters for latents of {encoder}, trained by rae for "
        f"{state.step} steps of {recipe.batch_size} images, noise tau {recipe.noise_tau}.\n\n"
        f"{recipe.paper}\n"
    )
    config, weights = config_of(state, recipe), state.ema.weights()
    folder = save_final(run_folder, weights=weights, statistics=statistics, config=config, card=card)
    facts = {"output": str(folder), "parameters": count, "steps": state.step}
    tell_result(f"{folder}: {count} parameters, {state.step} steps", facts)
